// A from rows of k.
template <typename T> FUNCTION void load_a_transposed(MatrixA<T>& a, const T* from, int stride) {
  const int lane = matrix_lane();
  const uint at = uint(__cvta_generic_to_shared(from + ((lane & 7) + (lane >> 4) * 8) * stride + (lane >> 3 & 1) * 8));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a.part[0]), "=r"(a.part[1]), "=r"(a.part[2]), "=r"(a.part[3]) : "r"(at) : "memory");
}
template <typename T> FUNCTION void narrow(MatrixB<T>& b, const MatrixC& c) {
  for (int k = 0; k < 2; ++k) {
    const uint pair = pair_of(c.part[k * 2], c.part[k * 2 + 1], T());
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(b.part[k]) : "r"(pair));
  }
}
FUNCTION float column_max(float x) {
  x = fmaxf(x, simd_shuffle_xor(x, 4));
  x = fmaxf(x, simd_shuffle_xor(x, 8));
  return fmaxf(x, simd_shuffle_xor(x, 16));
}
FUNCTION float column_sum(float x) {
  x += simd_shuffle_xor(x, 4);
  x += simd_shuffle_xor(x, 8);
  return x + simd_shuffle_xor(x, 16);
}
