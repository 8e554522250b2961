// Copies the arrays of recurrent states out of their pages, as words: x counts states, y slices of them.
// order_in is only waited for.
const int state = int(threadgroup_position_in_grid.x);
const int first = int(threadgroup_position_in_grid.y) * THREADS + int(thread_position_in_threadgroup.x);
const DEV(uint)* page = (const DEV(uint)*)kv_cache_in + long(blocks_in[state]) * PAGE_WORDS;
#define COPY(ARRAY, START, WORDS) \
  { \
    DEV(uint)* to = (DEV(uint)*)ARRAY + long(state) * WORDS; \
    for (int i = first; i < WORDS; i += STRIDE) to[i] = page[START + i]; \
  }
COPY(state_0, START_0, WORDS_0)
#if COUNT > 1
COPY(state_1, START_1, WORDS_1)
#endif
#if COUNT > 2
COPY(state_2, START_2, WORDS_2)
#endif
#if COUNT > 3
COPY(state_3, START_3, WORDS_3)
#endif
#undef COPY
