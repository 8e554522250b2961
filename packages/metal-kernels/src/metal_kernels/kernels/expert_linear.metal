// Linear layers of experts on the few rows that chose them. y counts pairs of row and expert; the first pair of an
// expert takes all of its rows, so that weights are read once for TILE of them. A SIMD-group takes ROWS rows of the
// weight, TURNS times; GATED, as many of two weights, of which the first one's results gate the second's. Weights are
// loaded a chunk ahead.
#define LOAD_WEIGHTS(k)                                                                             \
  UNROLL for (int r = 0; r < ROWS; ++r) {                                                           \
    next[0][r] = load_raw<8>(weight_in + weight_row + r * INPUT + (k));                             \
    if constexpr (GATED) next[MATRICES - 1][r] = load_raw<8>(up_in + weight_row + r * INPUT + (k)); \
  }
constexpr int TILE = 8;
constexpr int MATRICES = GATED ? 2 : 1;
constexpr int CHUNK = 32 * 8;
constexpr int THREADS = SIMDGROUPS * 32;
constexpr int MOST_ROWS = 256;
THREADGROUP_ARRAY(int, chosen, MOST_ROWS);
THREADGROUP_ARRAY(int, counts, THREADS);
THREADGROUP_ARRAY(int, totals, SIMDGROUPS);

const int thread_index = int(thread_position_in_threadgroup.x);
const int simdgroup_index = int(simdgroup_index_in_threadgroup);
const int lane = int(thread_index_in_simdgroup);
const int pairs = experts_in_shape[0];
const int own = int(threadgroup_position_in_grid.y);
const int expert = experts_in[own];

const int found = find_pairs(experts_in, pairs, expert, thread_index, THREADS, chosen, counts, totals);

if (chosen[0] == own) {
  for (int turn = 0; turn < TURNS; ++turn) {
    const int first_row = ((int(threadgroup_position_in_grid.x) * TURNS + turn) * SIMDGROUPS + simdgroup_index) * ROWS;
    if (first_row >= OUTPUT) break;
    const long weight_row = (long(expert) * OUTPUT + first_row) * INPUT;
    for (int tile = 0; tile < found; tile += TILE) {
      const int taken = min(TILE, found - tile);
      float acc[MATRICES][ROWS][TILE];
      UNROLL for (int w = 0; w < MATRICES; ++w) {
        UNROLL for (int r = 0; r < ROWS; ++r) {
          UNROLL for (int t = 0; t < TILE; ++t) acc[w][r][t] = 0.0f;
        }
      }
      Raw<T, 8> next[MATRICES][ROWS];
      LOAD_WEIGHTS(min(lane * 8, INPUT - 8));
      for (int at = lane * 8; at < INPUT; at += CHUNK) {
        float weight[MATRICES][ROWS][8];
        UNROLL for (int w = 0; w < MATRICES; ++w) {
          UNROLL for (int r = 0; r < ROWS; ++r) unpack_f32(next[w][r], weight[w][r]);
        }
        LOAD_WEIGHTS(min(at + CHUNK, INPUT - 8));
        UNROLL for (int t = 0; t < TILE; ++t) {
          if (t < taken) {
            float x[8];
            load_f32<8>(rows_in + long(chosen[tile + t] / PAIRS_PER_ROW) * INPUT + at, x);
            UNROLL for (int w = 0; w < MATRICES; ++w) {
              UNROLL for (int r = 0; r < ROWS; ++r) {
                UNROLL for (int i = 0; i < 8; ++i) acc[w][r][t] += weight[w][r][i] * x[i];
              }
            }
          }
        }
      }
      UNROLL for (int t = 0; t < TILE; ++t) {
        if (t < taken) {
          UNROLL for (int r = 0; r < ROWS; ++r) {
            UNROLL for (int w = 0; w < MATRICES; ++w) {
              UNROLL for (int step = 16; step > 0; step /= 2) acc[w][r][t] += simd_shuffle_xor(acc[w][r][t], step);
            }
            const int pair = chosen[tile + t];
            if (lane == r) {
              float y = acc[MATRICES - 1][r][t];
              if constexpr (GATED) y *= acc[0][r][t] / (1.0f + exp2_fast(-1.44269504f * acc[0][r][t]));
              else y *= scores_in[pair];
              out[long(pair) * OUTPUT + first_row + r] = from_f32<O>(y);
            }
          }
        }
      }
    }
  }
}
#undef LOAD_WEIGHTS
