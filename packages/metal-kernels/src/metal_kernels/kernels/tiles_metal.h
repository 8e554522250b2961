// Matrices from threadgroup memory; sources start at multiples of 16 bytes.
template <typename T> FUNCTION void load_a(thread MatrixA<T>& a, const threadgroup T* from, int stride) {
  for (int r = 0; r < 2; ++r)
    for (int k = 0; k < 2; ++k) simdgroup_load(a.part[r][k], from + r * 8 * stride + k * 8, ulong(stride));
}
// Two neighbours of B from rows of columns.
template <typename T>
FUNCTION void load_b_transposed(thread MatrixB<T>& left, thread MatrixB<T>& right, const threadgroup T* from, int stride) {
  for (int k = 0; k < 2; ++k) {
    simdgroup_load(left.part[k], from + k * 8, ulong(stride), ulong2(0, 0), true);
    simdgroup_load(right.part[k], from + 8 * stride + k * 8, ulong(stride), ulong2(0, 0), true);
  }
}
