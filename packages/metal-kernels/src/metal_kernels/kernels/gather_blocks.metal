// Copies whole pages out of the cache, as words. A threadgroup per page; order_in is only waited for.
const int page = int(threadgroup_position_in_grid.x);
const DEV(uint)* from = (const DEV(uint)*)kv_cache_in + long(blocks_in[page]) * PAGE_WORDS;
DEV(uint)* to = (DEV(uint)*)pages_out + long(page) * PAGE_WORDS;
for (int i = int(thread_position_in_threadgroup.x); i < PAGE_WORDS; i += THREADS) to[i] = from[i];
