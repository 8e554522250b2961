// A from rows of k.
template <typename T> FUNCTION void load_a_transposed(thread MatrixA<T>& a, const threadgroup T* from, int stride) {
  for (int r = 0; r < 2; ++r)
    for (int k = 0; k < 2; ++k) simdgroup_load(a.part[r][k], from + k * 8 * stride + r * 8, ulong(stride), ulong2(0, 0), true);
}
template <typename T> FUNCTION void narrow(thread MatrixB<T>& b, thread MatrixC& c) {
  for (int k = 0; k < 2; ++k)
    for (int i = 0; i < 2; ++i) b.part[k].thread_elements()[i] = T(c.part[k].thread_elements()[i]);
}
FUNCTION float column_max(float x) {
  x = max(x, simd_shuffle_xor(x, 2));
  x = max(x, simd_shuffle_xor(x, 4));
  return max(x, simd_shuffle_xor(x, 16));
}
FUNCTION float column_sum(float x) {
  x += simd_shuffle_xor(x, 2);
  x += simd_shuffle_xor(x, 4);
  return x + simd_shuffle_xor(x, 16);
}
