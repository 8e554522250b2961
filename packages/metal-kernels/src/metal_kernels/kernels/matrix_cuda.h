// See matrix_metal.h: 16x16, 16x8 and 16x8 matrices for mma.sync.
#define HALF __half
#define ROW_STEP 2
FUNCTION void simdgroup_barrier(mem_flags) { __syncwarp(); }
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
