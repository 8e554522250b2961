// A linear layer on few rows, with the norm before it and the activation, bias or sum after it.
// Rows of the weight are rows of matrices A, rows of the input are columns of matrices B. A threadgroup takes TILES * 16
// rows of the weight; if GATED, the first half of them are gates of the others. Its SIMD-groups take turns on chunks of the inner
// axis, of which each lane holds RUN neighbours, four lanes a row: in which order the axis is multiplied does not
// matter, as long as both sides have the same. y is one of HEADS layers, each for a part of the rows, which may be wider
// than what is multiplied.
#if QUANTIZED
constexpr int RUN = 128 / BITS;
#define LOAD_RUN(to, n, k)                                                                   \
  load_packed(to, weight_in + (long(n) * INPUT + (k)) / RUN * 4);                            \
  to.scale = to_f32(scales_in[long(n) * (INPUT / GROUP_SIZE) + (k) / GROUP_SIZE]);           \
  to.bias = to_f32(biases_in[long(n) * (INPUT / GROUP_SIZE) + (k) / GROUP_SIZE])
PackedRun<BITS> w[DEPTH][TILES][2];
#else
constexpr int RUN = 8;
#define LOAD_RUN(to, n, k) to = load_raw<8>(weight_in + long(n) * INPUT + (k))
Raw<T, 8> w[DEPTH][TILES][2];
#endif
#define LOAD_WEIGHTS(d, k)                                                                               \
  UNROLL for (int j = 0; j < TILES; ++j) {                                                               \
    UNROLL for (int r = 0; r < 2; ++r) {                                                                 \
      const int eight = j * 2 + r;                                                                       \
      const int row = GATED && eight >= TILES ? OUTPUT + (eight - TILES) * 8 : eight * 8;                \
      LOAD_RUN(w[d][j][r], head * OUTPUT + first + row + lane_row, (k) + lane_run);                      \
    }                                                                                                    \
  }
#define LOAD_ROWS(d, k)                                                                                  \
  if (NORM) factor[d] = load_raw<8>(extra_in + (k) + lane_run);                                          \
  UNROLL for (int m = 0; m < COLUMNS; ++m) {                                                             \
    x[d][m] = load_raw<8>(rows_in + row_at[m] + (k) + lane_run);                                             \
  }
constexpr int CHUNK = 4 * RUN;
constexpr int TURN = SIMDGROUPS * CHUNK;
constexpr int TURNS = (INPUT + TURN - 1) / TURN;
constexpr bool EVEN = INPUT % (DEPTH * TURN) == 0;
constexpr int STEPS = RUN / 8;  // of a turn: eight elements of a lane's run at a time
constexpr int SLOTS = SIMDGROUPS / 2;
constexpr int STRIDE = TILES * 16 + 4;  // so that lanes write to different banks
constexpr int WIDTH = GATED ? TILES * 8 : TILES * 16;
THREADGROUP_ARRAY(float, sums, SLOTS * COLUMNS * 8 * STRIDE);
THREADGROUP_ARRAY(float, squares, SIMDGROUPS * COLUMNS * 8);

const int rows = rows_in_shape[0];
const int first = int(threadgroup_position_in_grid.x) * WIDTH;
const int head = int(threadgroup_position_in_grid.y);
const int simdgroup_index = int(simdgroup_index_in_threadgroup);
const int lane = int(thread_index_in_simdgroup);
const int lane_row = row_of(lane);
const int lane_run = column_of(lane) / 2 * RUN;
const int begin = simdgroup_index * CHUNK;
long row_at[COLUMNS];
UNROLL for (int m = 0; m < COLUMNS; ++m) {
  row_at[m] = (long(min(m * 8 + lane_row, rows - 1)) * HEADS + head) * ROW;
}
// Weights are under way DEPTH turns ahead, rows one step.
Raw<T, 8> x[2][COLUMNS];
Raw<T, 8> factor[2];
UNROLL for (int d = 0; d < DEPTH; ++d) {
  LOAD_WEIGHTS(d, min(begin + d * TURN, INPUT - CHUNK));
}
LOAD_ROWS(0, min(begin, INPUT - CHUNK));
MatrixC c[TILES][COLUMNS];
MatrixC square[COLUMNS];  // of the rows with themselves, on the diagonal
UNROLL for (int m = 0; m < COLUMNS; ++m) {
  clear(square[m]);
  UNROLL for (int j = 0; j < TILES; ++j) clear(c[j][m]);
}
for (int turn = 0; turn < TURNS; turn += DEPTH) {
  UNROLL for (int step = 0; step < DEPTH * STEPS; ++step) {
    const int d = step / STEPS;
    const int e = step % STEPS * 8;
    const int k = begin + (turn + d) * TURN;
    const int next = begin + (turn + (step + 1) / STEPS) * TURN;
    if (step + 1 < DEPTH * STEPS) {
      LOAD_ROWS((step + 1) % 2, (EVEN ? next : min(next, INPUT - CHUNK)) + (step + 1) % STEPS * 8);
    }
    if (EVEN || k < INPUT) {
      if (NORM) {
        UNROLL for (int m = 0; m < COLUMNS; ++m) {
          UNROLL for (int s = 0; s < 2; ++s) {
            MatrixA<T> a;
            MatrixB<T> b;
            rows_a(a, x[step % 2][m], x[step % 2][m], s);
            columns_b(b, x[step % 2][m], s, lane);
            multiply_add(square[m], a, b);
          }
          x[step % 2][m] = multiply_eight(x[step % 2][m], factor[step % 2]);
        }
      }
      UNROLL for (int s = 0; s < 2; ++s) {
        MatrixA<T> a[TILES];
        UNROLL for (int j = 0; j < TILES; ++j) {
          rows_a(a[j], eight_of<T>(w[d][j][0], e), eight_of<T>(w[d][j][1], e), s);
        }
        UNROLL for (int m = 0; m < COLUMNS; ++m) {
          MatrixB<T> b;
          columns_b(b, x[step % 2][m], s, lane);
          UNROLL for (int j = 0; j < TILES; ++j) multiply_add(c[j][m], a[j], b);
        }
      }
    }
    if (e == RUN - 8 && k + DEPTH * TURN < INPUT) {
      LOAD_WEIGHTS(d, k + DEPTH * TURN);
    }
    if (TURNS > DEPTH && step + 1 == DEPTH * STEPS) {
      LOAD_ROWS(0, min(next, INPUT - CHUNK));
    }
  }
}
if (NORM && column_of(lane) == lane_row / 2 * 2) {
  UNROLL for (int m = 0; m < COLUMNS; ++m) {
    squares[(simdgroup_index * COLUMNS + m) * 8 + lane_row] = lane_row % 2 == 0 ? get(square[m], 0) : get(square[m], 1);
  }
}
// Half of the SIMD-groups hand their sums to the others, before every thread adds up what is left.
UNROLL for (int upper = 1; upper >= 0; --upper) {
  if (simdgroup_index / SLOTS == upper) {
    UNROLL for (int m = 0; m < COLUMNS; ++m) {
      UNROLL for (int i = 0; i < 4; ++i) {
        const int row = simdgroup_index % SLOTS * COLUMNS * 8 + m * 8 + column_of(lane) + i % 2;
        UNROLL for (int j = 0; j < TILES; ++j) {
          const int at = row * STRIDE + j * 16 + lane_row + i / 2 * 8;
          sums[at] = upper == 1 ? get(c[j][m], i) : sums[at] + get(c[j][m], i);
        }
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
for (int e = int(thread_position_in_threadgroup.x); e < COLUMNS * 8 * WIDTH; e += SIMDGROUPS * 32) {
  const int row = e / WIDTH;
  const int column = e % WIDTH;
  if (row < rows) {
    float norm = 1.0f;
    if (NORM) {
      float total = 0.0f;
      UNROLL for (int s = 0; s < SIMDGROUPS; ++s) total += squares[s * COLUMNS * 8 + row];
      norm = rsqrt_precise(total / INPUT + factors_in[0]);
    }
    float value[2];
    UNROLL for (int part = 0; part < (GATED ? 2 : 1); ++part) {
      float total = 0.0f;
      UNROLL for (int s = 0; s < SLOTS; ++s) total += sums[(s * COLUMNS * 8 + row) * STRIDE + part * WIDTH + column];
      total *= norm;
      if (BIAS) total += to_f32(bias_in[part * OUTPUT + first + column]);
      value[part] = to_f32(from_f32<T>(total));
    }
    const long at = (long(row) * HEADS + head) * OUTPUT + first + column;
    if (GATED) value[0] = value[1] * value[0] / (1.0f + exp2_fast(-1.44269504f * value[0]));
    if (ADDED) value[0] += to_f32(extra_in[at]);
    out[at] = from_f32<T>(value[0]);
  }
}
