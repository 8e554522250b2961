// Pairs of row and expert that are of one expert, in order, put into threadgroup memory by the whole threadgroup, of
// which each thread looks through neighbours. Returns how many there are; all may be read then.
FUNCTION int find_pairs(const DEV(int)* experts, int pairs, int expert, int thread_index, int threads, TG(int)* found,
                        TG(int)* counts, TG(int)* totals) {
  const int share = (pairs + threads - 1) / threads;
  const int begin = thread_index * share;
  const int end = begin + share < pairs ? begin + share : pairs;
  int count = 0;
  for (int p = begin; p < end; ++p) count += experts[p] == expert ? 1 : 0;
  counts[thread_index] = count;
  float sum = float(count);
  for (int step = 16; step > 0; step /= 2) sum += simd_shuffle_xor(sum, step);
  if (thread_index % 32 == 0) totals[thread_index / 32] = int(sum);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  int all = 0;
  int at = 0;
  for (int s = 0; s < threads / 32; ++s) {
    if (s < thread_index / 32) at += totals[s];
    all += totals[s];
  }
  if (count > 0) {
    for (int i = thread_index / 32 * 32; i < thread_index; ++i) at += counts[i];
    for (int p = begin; p < end; ++p) {
      if (experts[p] == expert) found[at++] = p;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return all;
}
