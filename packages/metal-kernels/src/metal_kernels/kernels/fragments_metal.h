// A from pairs of neighbours along the inner axis that lanes hold as words: of row row_of(lane) and of the row eight below,
// from column_of(lane) and from eight columns later.
template <typename T> FUNCTION void set_a(thread MatrixA<T>& a, uint low, uint high, uint low_later, uint high_later) {
  a.part[0][0].thread_elements() = as_type<vec<T, 2>>(low);
  a.part[1][0].thread_elements() = as_type<vec<T, 2>>(high);
  a.part[0][1].thread_elements() = as_type<vec<T, 2>>(low_later);
  a.part[1][1].thread_elements() = as_type<vec<T, 2>>(high_later);
}
// Four neighbours down a column of B, of which a lane has run column_of(lane) / 2 of column row_of(lane).
// A lane's two elements are in two other lanes.
template <typename T> FUNCTION void set_b(thread MatrixB<T>& b, const thread float* x, int lane) {
  for (int i = 0; i < 2; ++i) {
    const int m = column_of(lane) + i;
    const int run = row_of(lane) / 2;
    const ushort from = ushort((m & 4) << 2 | (m & 3) << 1 | (run & 2) << 2 | (run & 1));
    for (int k = 0; k < 2; ++k) {
      const float even = simd_shuffle(x[k * 2], from);
      const float odd = simd_shuffle(x[k * 2 + 1], from);
      b.part[k].thread_elements()[i] = T(row_of(lane) % 2 == 0 ? even : odd);
    }
  }
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
FUNCTION uint word_of(uint4 words, int i) { return words[i]; }
// The first, or last, halves or bytes of two words in turn.
FUNCTION uint zip_low(uint x, uint y) { return (x & 0xFFFFu) | y << 16; }
FUNCTION uint zip_high(uint x, uint y) { return x >> 16 | (y & 0xFFFF0000u); }
FUNCTION uint zip_bytes_low(uint x, uint y) {
  return (x & 0xFFu) | (y & 0xFFu) << 8 | (x & 0xFF00u) << 8 | (y & 0xFF00u) << 16;
}
FUNCTION uint zip_bytes_high(uint x, uint y) { return zip_bytes_low(x >> 16, y >> 16); }
