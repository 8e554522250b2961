// Matrices spread over the lanes of a SIMD-group: A is 16x16, B is 16x8, C is 16x8 of float32.
// A lane has four elements of C: i is in row row_of(lane) + i / 2 * 8 and column column_of(lane) + i % 2.
// Lanes of one row differ by the steps 1 and ROW_STEP. Sources in threadgroup memory start at multiples of 16 bytes.
#ifdef __METAL_VERSION__
#define TG(T) threadgroup T
#define THREAD(T) thread T
#define FUNCTION METAL_FUNC
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
#else
#define TG(T) T
#define THREAD(T) T
#define FUNCTION __device__ __forceinline__
#define ROW_STEP 2
FUNCTION int row_of(int lane) { return lane / 4; }
FUNCTION int column_of(int lane) { return lane % 4 * 2; }
template <typename T> struct MatrixA { uint part[4]; };
template <typename T> struct MatrixB { uint part[2]; };
struct MatrixC { float part[4]; };
FUNCTION float get(const MatrixC& c, int i) { return c.part[i]; }
FUNCTION void put(MatrixC& c, int i, float x) { c.part[i] = x; }
FUNCTION int matrix_lane() { return threadIdx.x & 31; }
template <typename T> FUNCTION void load_a(MatrixA<T>& a, const T* from, int stride) {
  const int lane = matrix_lane();
  const uint at = uint(__cvta_generic_to_shared(from + (lane & 15) * stride + (lane >> 4) * 8));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a.part[0]), "=r"(a.part[1]), "=r"(a.part[2]), "=r"(a.part[3]) : "r"(at) : "memory");
}
// Two neighbours of B from rows of k.
template <typename T> FUNCTION void load_b(MatrixB<T>& left, MatrixB<T>& right, const T* from, int stride) {
  const int lane = matrix_lane();
  const uint at = uint(__cvta_generic_to_shared(from + (lane & 15) * stride + (lane >> 4) * 8));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(left.part[0]), "=r"(left.part[1]), "=r"(right.part[0]), "=r"(right.part[1]) : "r"(at) : "memory");
}
// Two neighbours of B from rows of columns.
template <typename T> FUNCTION void load_b_transposed(MatrixB<T>& left, MatrixB<T>& right, const T* from, int stride) {
  const int lane = matrix_lane();
  const int column = (lane & 7) + (lane >> 4) * 8;
  const uint at = uint(__cvta_generic_to_shared(from + column * stride + (lane >> 3 & 1) * 8));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(left.part[0]), "=r"(left.part[1]), "=r"(right.part[0]), "=r"(right.part[1]) : "r"(at) : "memory");
}
#define MULTIPLY_ADD(T, NAME)                                                                                   \
  FUNCTION void multiply_add(MatrixC& c, const MatrixA<T>& a, const MatrixB<T>& b) {                            \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 "                                 \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                              \
                 : "+f"(c.part[0]), "+f"(c.part[1]), "+f"(c.part[2]), "+f"(c.part[3])                           \
                 : "r"(a.part[0]), "r"(a.part[1]), "r"(a.part[2]), "r"(a.part[3]), "r"(b.part[0]), "r"(b.part[1])); \
  }
MULTIPLY_ADD(__half, "f16")
MULTIPLY_ADD(__nv_bfloat16, "bf16")
FUNCTION uint pair_of(float x, float y, __half) {
  const __half2 pair = __floats2half2_rn(x, y);
  return *reinterpret_cast<const uint*>(&pair);
}
FUNCTION uint pair_of(float x, float y, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const uint*>(&pair);
}
template <typename T> FUNCTION void join(MatrixA<T>& a, const MatrixC& left, const MatrixC& right) {
  for (int r = 0; r < 2; ++r) {
    a.part[r] = pair_of(left.part[r * 2], left.part[r * 2 + 1], T());
    a.part[r + 2] = pair_of(right.part[r * 2], right.part[r * 2 + 1], T());
  }
}
#endif
FUNCTION void clear(THREAD(MatrixC)& c) {
  for (int i = 0; i < 4; ++i) put(c, i, 0.0f);
}
FUNCTION float row_max(float x) {
  const float y = simd_shuffle_xor(x, 1);
  x = x > y ? x : y;
  const float z = simd_shuffle_xor(x, ROW_STEP);
  return x > z ? x : z;
}
FUNCTION float row_sum(float x) {
  x += simd_shuffle_xor(x, 1);
  return x + simd_shuffle_xor(x, ROW_STEP);
}
