// Two neighbours of B from rows of k.
template <typename T> FUNCTION void load_b(MatrixB<T>& left, MatrixB<T>& right, const T* from, int stride) {
  const int lane = matrix_lane();
  const uint at = uint(__cvta_generic_to_shared(from + (lane & 15) * stride + (lane >> 4) * 8));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(left.part[0]), "=r"(left.part[1]), "=r"(right.part[0]), "=r"(right.part[1]) : "r"(at) : "memory");
}
template <typename T> FUNCTION void join(MatrixA<T>& a, const MatrixC& left, const MatrixC& right) {
  for (int r = 0; r < 2; ++r) {
    a.part[r] = pair_of(left.part[r * 2], left.part[r * 2 + 1], T());
    a.part[r + 2] = pair_of(right.part[r * 2], right.part[r * 2 + 1], T());
  }
}
