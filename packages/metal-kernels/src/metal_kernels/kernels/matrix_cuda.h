// See matrix_metal.h: 16x16, 16x8 and 16x8 matrices for mma.sync.
#define HALF __half
#define ROW_STEP 2
FUNCTION int row_of(int lane) { return lane / 4; }
FUNCTION int column_of(int lane) { return lane % 4 * 2; }
template <typename T> struct MatrixA { uint part[4]; };
template <typename T> struct MatrixB { uint part[2]; };
struct MatrixC { float part[4]; };
FUNCTION float get(const MatrixC& c, int i) { return c.part[i]; }
FUNCTION void put(MatrixC& c, int i, float x) { c.part[i] = x; }
FUNCTION int matrix_lane() { return threadIdx.x & 31; }
#define MULTIPLY_ADD(T, NAME)                                                                                   \
  FUNCTION void multiply_add(MatrixC& c, const MatrixA<T>& a, const MatrixB<T>& b) {                            \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 "                                 \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                              \
                 : "+f"(c.part[0]), "+f"(c.part[1]), "+f"(c.part[2]), "+f"(c.part[3])                           \
                 : "r"(a.part[0]), "r"(a.part[1]), "r"(a.part[2]), "r"(a.part[3]), "r"(b.part[0]), "r"(b.part[1])); \
  }
MULTIPLY_ADD(__half, "f16")
MULTIPLY_ADD(__nv_bfloat16, "bf16")
