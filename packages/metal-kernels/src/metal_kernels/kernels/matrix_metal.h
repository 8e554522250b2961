// Matrices spread over the lanes of a SIMD-group: A is 16x16, B is 16x8, C is 16x8 of float32.
// A lane has four elements of C: i is in row row_of(lane) + i / 2 * 8 and column column_of(lane) + i % 2.
// Lanes of one row differ by the steps 1 and ROW_STEP. Sources in threadgroup memory start at multiples of 16 bytes.
#define HALF half
#define ROW_STEP 8
FUNCTION int row_of(int lane) { return (lane / 4 & 4) + lane / 2 % 4; }
FUNCTION int column_of(int lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }
template <typename T> struct MatrixA { simdgroup_matrix<T, 8, 8> part[2][2]; };
template <typename T> struct MatrixB { simdgroup_matrix<T, 8, 8> part[2]; };
struct MatrixC { simdgroup_matrix<float, 8, 8> part[2]; };
FUNCTION float get(thread MatrixC& c, int i) { return c.part[i / 2].thread_elements()[i % 2]; }
FUNCTION void put(thread MatrixC& c, int i, float x) { c.part[i / 2].thread_elements()[i % 2] = x; }
template <typename T> FUNCTION void load_a(thread MatrixA<T>& a, const threadgroup T* from, int stride) {
  for (int r = 0; r < 2; ++r)
    for (int k = 0; k < 2; ++k) simdgroup_load(a.part[r][k], from + r * 8 * stride + k * 8, ulong(stride));
}
// Two neighbours of B from rows of k.
template <typename T>
FUNCTION void load_b(thread MatrixB<T>& left, thread MatrixB<T>& right, const threadgroup T* from, int stride) {
  for (int k = 0; k < 2; ++k) {
    simdgroup_load(left.part[k], from + k * 8 * stride, ulong(stride));
    simdgroup_load(right.part[k], from + k * 8 * stride + 8, ulong(stride));
  }
}
// Two neighbours of B from rows of columns.
template <typename T>
FUNCTION void load_b_transposed(thread MatrixB<T>& left, thread MatrixB<T>& right, const threadgroup T* from, int stride) {
  for (int k = 0; k < 2; ++k) {
    simdgroup_load(left.part[k], from + k * 8, ulong(stride), ulong2(0, 0), true);
    simdgroup_load(right.part[k], from + 8 * stride + k * 8, ulong(stride), ulong2(0, 0), true);
  }
}
template <typename T>
FUNCTION void multiply_add(thread MatrixC& c, const thread MatrixA<T>& a, const thread MatrixB<T>& b) {
  for (int r = 0; r < 2; ++r)
    for (int k = 0; k < 2; ++k) simdgroup_multiply_accumulate(c.part[r], a.part[r][k], b.part[k], c.part[r]);
}
template <typename T> FUNCTION void join(thread MatrixA<T>& a, thread MatrixC& left, thread MatrixC& right) {
  for (int r = 0; r < 2; ++r)
    for (int i = 0; i < 2; ++i) {
      a.part[r][0].thread_elements()[i] = T(left.part[r].thread_elements()[i]);
      a.part[r][1].thread_elements()[i] = T(right.part[r].thread_elements()[i]);
    }
}
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
