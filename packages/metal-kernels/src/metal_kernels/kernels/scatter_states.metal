// Writes the arrays of recurrent states into their pages in place, as words: x counts states, y slices of them.
// A state whose block is negative goes nowhere. order_in is only waited for.
const int state = int(threadgroup_position_in_grid.x);
const int first = int(threadgroup_position_in_grid.y) * THREADS + int(thread_position_in_threadgroup.x);
if (state == 0 && first < 8) order_out[first] = 0;
if (blocks_in[state] < 0) return;
DEV(uint)* page = (DEV(uint)*)const_cast<DEV(T)*>(kv_cache_in) + long(blocks_in[state]) * PAGE_WORDS;
#define COPY(ARRAY, START, WORDS) \
  { \
    const DEV(uint)* from = (const DEV(uint)*)ARRAY + long(state) * WORDS; \
    for (int i = first; i < WORDS; i += STRIDE) page[START + i] = from[i]; \
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
