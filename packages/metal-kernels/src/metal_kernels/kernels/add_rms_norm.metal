// Adds rows, each the sum of ADDENDS and, if BESIDE, one more, to their residual and normalises the sums. A threadgroup
// per row; a thread holds runs of four elements.
constexpr int RUNS = (HIDDEN + 4 * THREADS - 1) / (4 * THREADS);
THREADGROUP_ARRAY(float, squares, THREADS / 32);
const long row = long(threadgroup_position_in_grid.x) * HIDDEN;
const int thread_index = int(thread_position_in_threadgroup.x);
float sums[RUNS][4];
float square = 0.0f;
UNROLL for (int r = 0; r < RUNS; ++r) {
  const int at = (r * THREADS + thread_index) * 4;
  if (at < HIDDEN) {
    float added[4];
    load_f32<4>(rows_in + row * ADDENDS + at, sums[r]);
    UNROLL for (int a = 1; a < ADDENDS; ++a) {
      load_f32<4>(rows_in + row * ADDENDS + a * HIDDEN + at, added);
      UNROLL for (int i = 0; i < 4; ++i) sums[r][i] += added[i];
    }
    if (BESIDE) {
      load_f32<4>(beside_in + row + at, added);
      UNROLL for (int i = 0; i < 4; ++i) sums[r][i] += added[i];
    }
    load_f32<4>(residual_in + row + at, added);
    UNROLL for (int i = 0; i < 4; ++i) {
      sums[r][i] = to_f32(from_f32<T>(sums[r][i] + added[i]));
      square += sums[r][i] * sums[r][i];
    }
    store_f32<4>(sum_out + row + at, sums[r]);
  }
}
UNROLL for (int step = 16; step > 0; step /= 2) square += simd_shuffle_xor(square, step);
if (thread_index % 32 == 0) squares[thread_index / 32] = square;
threadgroup_barrier(mem_flags::mem_threadgroup);
float total = 0.0f;
for (int s = 0; s < THREADS / 32; ++s) total += squares[s];
const float factor = rsqrt_precise(total / HIDDEN + factors_in[0]);
UNROLL for (int r = 0; r < RUNS; ++r) {
  const int at = (r * THREADS + thread_index) * 4;
  if (at < HIDDEN) {
    float weight[4];
    load_f32<4>(weight_in + at, weight);
    UNROLL for (int i = 0; i < 4; ++i) weight[i] *= sums[r][i] * factor;
    store_f32<4>(normed_out + row + at, weight);
  }
}
