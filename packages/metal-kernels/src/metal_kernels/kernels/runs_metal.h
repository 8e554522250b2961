// Matrices from neighbours in the rows that a lane loads itself: row row_of(lane), run column_of(lane) / 2.
// Four of eight neighbours of two rows, eight rows apart.
template <typename T>
FUNCTION void rows_a(thread MatrixA<T>& a, const thread Raw<T, 8>& low, const thread Raw<T, 8>& high, int step) {
  for (int k = 0; k < 2; ++k)
    for (int i = 0; i < 2; ++i) {
      a.part[0][k].thread_elements()[i] = low.words[step][k * 2 + i];
      a.part[1][k].thread_elements()[i] = high.words[step][k * 2 + i];
    }
}
// Four of eight neighbours, down a column. A lane's two elements are in two other lanes.
template <typename T>
FUNCTION void columns_b(thread MatrixB<T>& b, const thread Raw<T, 8>& column, int step, int lane) {
  const int run = row_of(lane) / 2;
  for (int i = 0; i < 2; ++i) {
    const int m = column_of(lane) + i;
    const ushort from = ushort((m & 4) << 2 | (m & 3) << 1 | (run & 2) << 2 | (run & 1));
    for (int k = 0; k < 2; ++k) {
      const float even = simd_shuffle(float(column.words[step][k * 2]), from);
      const float odd = simd_shuffle(float(column.words[step][k * 2 + 1]), from);
      b.part[k].thread_elements()[i] = T(row_of(lane) % 2 == 0 ? even : odd);
    }
  }
}
template <typename T> FUNCTION Raw<T, 8> pack_eight(const thread float* x) {
  Raw<T, 8> raw;
  for (int i = 0; i < 8; ++i) raw.words[i / 4][i % 4] = T(x[i]);
  return raw;
}
template <typename T> FUNCTION Raw<T, 8> multiply_eight(const thread Raw<T, 8>& x, const thread Raw<T, 8>& y) {
  Raw<T, 8> raw;
  for (int i = 0; i < 8; ++i) raw.words[i / 4][i % 4] = T(float(x.words[i / 4][i % 4]) * float(y.words[i / 4][i % 4]));
  return raw;
}
