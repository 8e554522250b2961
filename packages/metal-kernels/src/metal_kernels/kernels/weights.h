// Weights 2^-distance as integers, 2^40 of which are 1: their sums are the same in any order.
FUNCTION ulong weight_of(float distance) {
  const float weight = distance < 40.0f ? exp2_fast(-distance) * 256.0f : 0.0f;
  const uint high = uint(weight);
  return (ulong(high) << 32) | ulong(uint((weight - float(high)) * 4294967296.0f));
}
// A fraction below 1 of a sum, rounded down.
FUNCTION ulong share_of(ulong sum, float fraction) {
  const ulong of_word = ulong(uint(fraction * 4294967296.0f));
  return (sum >> 32) * of_word + ((sum & 0xFFFFFFFFu) * of_word >> 32);
}
// Sums of LENGTH neighbours each, by the first SIMD-group, with what all of them make.
template <int LENGTH> FUNCTION ulong sum_parts(TG(const ulong)* part, TG(ulong)* of_lane, int thread_index) {
  if (thread_index < 32) {
    ulong sum = 0;
    for (int i = 0; i < LENGTH; ++i) sum += part[thread_index * LENGTH + i];
    of_lane[thread_index] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  ulong sum = 0;
  for (int lane = 0; lane < 32; ++lane) sum += of_lane[lane];
  return sum;
}
// The first part with which the sum reaches `wanted`, and the sum before it; `at` stays if none does.
template <int LENGTH>
FUNCTION void find_part(
    TG(const ulong)* part, TG(const ulong)* of_lane, int thread_index, ulong wanted, TG(int)* at, TG(ulong)* before) {
  if (thread_index < 32) {
    ulong sum = 0;
    for (int lane = 0; lane < thread_index; ++lane) sum += of_lane[lane];
    if ((sum < wanted || (thread_index == 0 && wanted == 0)) && sum + of_lane[thread_index] >= wanted) {
      int i = thread_index * LENGTH;
      while (sum + part[i] < wanted) sum += part[i++];
      *at = i;
      *before = sum;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
