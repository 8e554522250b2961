// Writes whole pages into the cache in place, as words. A threadgroup per page.
const int page = int(threadgroup_position_in_grid.x);
const int thread_index = int(thread_position_in_threadgroup.x);
if (page == 0 && thread_index < 8) order_out[thread_index] = 0;
const DEV(uint)* from = (const DEV(uint)*)pages_in + long(page) * PAGE_WORDS;
DEV(uint)* to = (DEV(uint)*)const_cast<DEV(T)*>(kv_cache_in) + long(blocks_in[page]) * PAGE_WORDS;
for (int i = thread_index; i < PAGE_WORDS; i += THREADS) to[i] = from[i];
