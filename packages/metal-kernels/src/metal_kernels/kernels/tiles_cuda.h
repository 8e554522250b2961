// See tiles_metal.h.
template <typename T> FUNCTION void load_a(MatrixA<T>& a, const T* from, int stride) {
  const int lane = matrix_lane();
  const uint at = uint(__cvta_generic_to_shared(from + (lane & 15) * stride + (lane >> 4) * 8));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a.part[0]), "=r"(a.part[1]), "=r"(a.part[2]), "=r"(a.part[3]) : "r"(at) : "memory");
}
// Two neighbours of B from rows of columns.
template <typename T> FUNCTION void load_b_transposed(MatrixB<T>& left, MatrixB<T>& right, const T* from, int stride) {
  const int lane = matrix_lane();
  const int column = (lane & 7) + (lane >> 4) * 8;
  const uint at = uint(__cvta_generic_to_shared(from + column * stride + (lane >> 3 & 1) * 8));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(left.part[0]), "=r"(left.part[1]), "=r"(right.part[0]), "=r"(right.part[1]) : "r"(at) : "memory");
}
FUNCTION uint pair_of(float x, float y, __half) {
  const __half2 pair = __floats2half2_rn(x, y);
  return *reinterpret_cast<const uint*>(&pair);
}
FUNCTION uint pair_of(float x, float y, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const uint*>(&pair);
}
