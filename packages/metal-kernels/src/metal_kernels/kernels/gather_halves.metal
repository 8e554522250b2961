// Copies keys and values out of pages, each to a place of their own. A threadgroup takes one of both of a page;
// order_in is only waited for.
const int page = int(threadgroup_position_in_grid.x);
const int part = int(threadgroup_position_in_grid.y);
const DEV(uint4)* from = (const DEV(uint4)*)kv_cache_in + (long(blocks_in[page]) * 2 + part) * HALF_WORDS;
DEV(uint4)* to = (DEV(uint4)*)pages_out + (long(part) * blocks_in_shape[0] + page) * HALF_WORDS;
for (int i = int(thread_position_in_threadgroup.x); i < HALF_WORDS; i += THREADS) to[i] = from[i];
