// See fragments_metal.h.
template <typename T> FUNCTION void set_a(MatrixA<T>& a, uint low, uint high, uint low_later, uint high_later) {
  a.part[0] = low;
  a.part[1] = high;
  a.part[2] = low_later;
  a.part[3] = high_later;
}
FUNCTION uint halves_of(float x, float y, __half) {
  const __half2 pair = __floats2half2_rn(x, y);
  return *reinterpret_cast<const uint*>(&pair);
}
FUNCTION uint halves_of(float x, float y, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const uint*>(&pair);
}
template <typename T> FUNCTION void set_b(MatrixB<T>& b, const float* x, int) {
  for (int k = 0; k < 2; ++k) b.part[k] = halves_of(x[k * 2], x[k * 2 + 1], T());
}
template <typename T> FUNCTION void narrow(MatrixB<T>& b, const MatrixC& c) {
  for (int k = 0; k < 2; ++k) {
    const uint pair = halves_of(c.part[k * 2], c.part[k * 2 + 1], T());
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
FUNCTION uint word_of(uint4 words, int i) { return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w; }
FUNCTION uint zip_low(uint x, uint y) { return __byte_perm(x, y, 0x5410); }
FUNCTION uint zip_high(uint x, uint y) { return __byte_perm(x, y, 0x7632); }
FUNCTION uint zip_bytes_low(uint x, uint y) { return __byte_perm(x, y, 0x5140); }
FUNCTION uint zip_bytes_high(uint x, uint y) { return __byte_perm(x, y, 0x7362); }
