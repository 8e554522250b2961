// Two neighbours of B from rows of k.
template <typename T>
FUNCTION void load_b(thread MatrixB<T>& left, thread MatrixB<T>& right, const threadgroup T* from, int stride) {
  for (int k = 0; k < 2; ++k) {
    simdgroup_load(left.part[k], from + k * 8 * stride, ulong(stride));
    simdgroup_load(right.part[k], from + k * 8 * stride + 8, ulong(stride));
  }
}
template <typename T> FUNCTION void join(thread MatrixA<T>& a, thread MatrixC& left, thread MatrixC& right) {
  for (int r = 0; r < 2; ++r)
    for (int i = 0; i < 2; ++i) {
      a.part[r][0].thread_elements()[i] = T(left.part[r].thread_elements()[i]);
      a.part[r][1].thread_elements()[i] = T(right.part[r].thread_elements()[i]);
    }
}
