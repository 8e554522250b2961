// Linear layers of experts on the rows that chose them, on matrix units. y is an expert. Its weights' rows are rows of
// matrices A, the rows that chose it are columns of matrices B, COLUMNS * 8 at a time. A threadgroup takes TILES * 16
// rows of the weight; if GATED, half as many of two weights, of which the first one's results gate the second's. Its
// SIMD-groups take turns on chunks of the inner axis, of which each lane holds RUN neighbours; see fused_linear.metal.
#if QUANTIZED
constexpr int RUN = 128 / BITS;
#define LOAD_RUN(to, name, n, k)                                                                   \
  load_packed(to, name##_in + (long(n) * INPUT + (k)) / RUN * 4);                                  \
  to.scale = to_f32(name##_scales_in[long(n) * (INPUT / GROUP_SIZE) + (k) / GROUP_SIZE]);          \
  to.bias = to_f32(name##_biases_in[long(n) * (INPUT / GROUP_SIZE) + (k) / GROUP_SIZE])
PackedRun<BITS> w[DEPTH][TILES][2];
#else
constexpr int RUN = 8;
#define LOAD_RUN(to, name, n, k) to = load_raw<8>(name##_in + long(n) * INPUT + (k))
Raw<T, 8> w[DEPTH][TILES][2];
#endif
#define LOAD_WEIGHTS(d, k)                                                                          \
  UNROLL for (int j = 0; j < TILES; ++j) {                                                          \
    UNROLL for (int r = 0; r < 2; ++r) {                                                            \
      const int eight = j * 2 + r;                                                                  \
      if (GATED && eight >= TILES) {                                                                \
        LOAD_RUN(w[d][j][r], up, weight_row + (eight - TILES) * 8, (k) + lane_run);                 \
      } else {                                                                                      \
        LOAD_RUN(w[d][j][r], weight, weight_row + eight * 8, (k) + lane_run);                       \
      }                                                                                             \
    }                                                                                               \
  }
#define LOAD_ROWS(d, k) \
  UNROLL for (int m = 0; m < COLUMNS; ++m) x[d][m] = load_raw<8>(rows_in + row_at[m] + (k) + lane_run)
constexpr int CHUNK = 4 * RUN;
constexpr int TURN = SIMDGROUPS * CHUNK;
constexpr int TURNS = (INPUT + TURN - 1) / TURN;
constexpr bool EVEN = INPUT % (DEPTH * TURN) == 0;
constexpr int STEPS = RUN / 8;  // of a turn: eight elements of a lane's run at a time
constexpr int SLOTS = SIMDGROUPS / 2;
constexpr int STRIDE = TILES * 16 + 4;  // so that lanes write to different banks
constexpr int WIDTH = GATED ? TILES * 8 : TILES * 16;
constexpr int THREADS = SIMDGROUPS * 32;
THREADGROUP_ARRAY(int, chosen, MOST_ROWS);
THREADGROUP_ARRAY(int, counts, THREADS);
THREADGROUP_ARRAY(int, totals, SIMDGROUPS);
THREADGROUP_ARRAY(float, sums, SLOTS * COLUMNS * 8 * STRIDE);

const int thread_index = int(thread_position_in_threadgroup.x);
const int simdgroup_index = int(simdgroup_index_in_threadgroup);
const int lane = int(thread_index_in_simdgroup);
const int expert = int(threadgroup_position_in_grid.y);
const int first = int(threadgroup_position_in_grid.x) * WIDTH;
const int found =
    find_pairs(experts_in, experts_in_shape[0], expert, thread_index, THREADS, chosen, counts, totals);
const int lane_run = column_of(lane) / 2 * RUN;
const int weight_row = expert * OUTPUT + first + row_of(lane);
const int begin = simdgroup_index * CHUNK;

for (int tile = 0; tile < found; tile += COLUMNS * 8) {
  long row_at[COLUMNS];
  UNROLL for (int m = 0; m < COLUMNS; ++m) {
    row_at[m] = long(chosen[min(tile + m * 8 + row_of(lane), found - 1)] / PAIRS_PER_ROW) * INPUT;
  }
  Raw<T, 8> x[2][COLUMNS];
  UNROLL for (int d = 0; d < DEPTH; ++d) {
    LOAD_WEIGHTS(d, min(begin + d * TURN, INPUT - CHUNK));
  }
  LOAD_ROWS(0, min(begin, INPUT - CHUNK));
  MatrixC c[TILES][COLUMNS];
  UNROLL for (int j = 0; j < TILES; ++j) {
    UNROLL for (int m = 0; m < COLUMNS; ++m) clear(c[j][m]);
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
  // Half of the SIMD-groups hand their sums to the others, before every thread adds up what is left.
  UNROLL for (int upper = 1; upper >= 0; --upper) {
    if (simdgroup_index / SLOTS == upper) {
      UNROLL for (int m = 0; m < COLUMNS; ++m) {
        UNROLL for (int i = 0; i < 4; ++i) {
          const int row = simdgroup_index % SLOTS * COLUMNS * 8 + m * 8 + column_of(lane) + i % 2;
          UNROLL for (int j = 0; j < TILES; ++j) {
            const int at = row * STRIDE + j * 16 + row_of(lane) + i / 2 * 8;
            sums[at] = upper == 1 ? get(c[j][m], i) : sums[at] + get(c[j][m], i);
          }
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  for (int e = thread_index; e < COLUMNS * 8 * WIDTH; e += THREADS) {
    const int row = e / WIDTH;
    const int column = e % WIDTH;
    if (tile + row < found) {
      const int pair = chosen[tile + row];
      float value[2];
      UNROLL for (int part = 0; part < (GATED ? 2 : 1); ++part) {
        float total = 0.0f;
        UNROLL for (int s = 0; s < SLOTS; ++s) total += sums[(s * COLUMNS * 8 + row) * STRIDE + part * WIDTH + column];
        value[part] = total;
      }
      if (GATED) value[0] = value[1] * value[0] / (1.0f + exp2_fast(-1.44269504f * value[0]));
      else value[0] *= scores_in[pair];
      out[long(pair) * OUTPUT + first + column] = from_f32<O>(value[0]);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the sums have been read
}
#undef LOAD_ROWS
#undef LOAD_WEIGHTS
#undef LOAD_RUN
