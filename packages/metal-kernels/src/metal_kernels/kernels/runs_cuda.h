// Matrices from neighbours in the rows that a lane loads itself: lane i has row i / 4, run i % 4.
template <typename T> FUNCTION uint two_of(const Raw<T, 8>& raw, int i) { return reinterpret_cast<const uint*>(raw.words)[i]; }
// Four of eight neighbours of two rows, eight rows apart.
template <typename T> FUNCTION void rows_a(MatrixA<T>& a, const Raw<T, 8>& low, const Raw<T, 8>& high, int step) {
  for (int k = 0; k < 2; ++k) {
    a.part[k * 2] = two_of(low, step * 2 + k);
    a.part[k * 2 + 1] = two_of(high, step * 2 + k);
  }
}
// Four of eight neighbours, down a column.
template <typename T> FUNCTION void columns_b(MatrixB<T>& b, const Raw<T, 8>& column, int step, int) {
  for (int k = 0; k < 2; ++k) b.part[k] = two_of(column, step * 2 + k);
}
template <typename T> FUNCTION Raw<T, 8> pack_eight(const float* x) {
  Raw<T, 8> raw;
  store_f32<8>(reinterpret_cast<T*>(raw.words), x);
  return raw;
}
FUNCTION uint multiply_two(uint x, uint y, __half) {
  const __half2 product = __hmul2(*reinterpret_cast<const __half2*>(&x), *reinterpret_cast<const __half2*>(&y));
  return *reinterpret_cast<const uint*>(&product);
}
FUNCTION uint multiply_two(uint x, uint y, __nv_bfloat16) {
  const __nv_bfloat162 product =
      __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&x), *reinterpret_cast<const __nv_bfloat162*>(&y));
  return *reinterpret_cast<const uint*>(&product);
}
template <typename T> FUNCTION Raw<T, 8> multiply_eight(const Raw<T, 8>& x, const Raw<T, 8>& y) {
  Raw<T, 8> raw;
  for (int i = 0; i < 4; ++i) reinterpret_cast<uint*>(raw.words)[i] = multiply_two(two_of(x, i), two_of(y, i), T());
  return raw;
}
