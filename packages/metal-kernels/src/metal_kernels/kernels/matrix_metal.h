// Matrices spread over the lanes of a SIMD-group: A is 16x16, B is 16x8, C is 16x8 of float32.
// A lane has four elements of C: i is in row row_of(lane) + i / 2 * 8 and column column_of(lane) + i % 2.
// Lanes of one row differ by the steps 1 and ROW_STEP.
#define HALF half
#define ROW_STEP 8
FUNCTION int row_of(int lane) { return (lane / 4 & 4) + lane / 2 % 4; }
FUNCTION int column_of(int lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }
template <typename T> struct MatrixA { simdgroup_matrix<T, 8, 8> part[2][2]; };
template <typename T> struct MatrixB { simdgroup_matrix<T, 8, 8> part[2]; };
struct MatrixC { simdgroup_matrix<float, 8, 8> part[2]; };
FUNCTION float get(thread MatrixC& c, int i) { return c.part[i / 2].thread_elements()[i % 2]; }
FUNCTION void put(thread MatrixC& c, int i, float x) { c.part[i / 2].thread_elements()[i % 2] = x; }
template <typename T>
FUNCTION void multiply_add(thread MatrixC& c, const thread MatrixA<T>& a, const thread MatrixB<T>& b) {
  for (int r = 0; r < 2; ++r)
    for (int k = 0; k < 2; ++k) simdgroup_multiply_accumulate(c.part[r], a.part[r][k], b.part[k], c.part[r]);
}
