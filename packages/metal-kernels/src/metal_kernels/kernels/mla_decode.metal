// Latent attention of one query row over one range of its keys, for 16 query heads as the rows of matrices.
// Tiles of KEYS cached rows pass through threadgroup memory; the next one is loaded meanwhile. Each SIMD-group takes
// part of a row's elements for the scores, and COLUMNS of the values. Scores are in units of log2.
constexpr int ROW = LATENT + ROPE;
constexpr int STRIDE = ROW + 8;  // so that rows start in different banks
constexpr int STEPS = (ROW / 16 + SIMDGROUPS - 1) / SIMDGROUPS;
constexpr int COLUMNS = LATENT / SIMDGROUPS;
constexpr int THREADS = SIMDGROUPS * 32;
constexpr int CHUNKS = (KEYS * (ROW / 8) + THREADS - 1) / THREADS;  // of eight elements, a thread
constexpr int HEAD_BLOCKS = (Q_HEADS + 15) / 16;
constexpr int TILE_ROWS = KEYS > 16 ? KEYS : 16;
constexpr int QUERY_CHUNKS = (16 * (ROW / 8) + THREADS - 1) / THREADS;
constexpr float LOWEST = -3.0e38f;
#define LOAD_NEXT(from)                                                                                        \
  UNROLL for (int c = 0; c < CHUNKS; ++c) {                                                                    \
    const int chunk = c * THREADS + thread_index;                                                              \
    if (chunk < KEYS * (ROW / 8)) {                                                                            \
      const int position = min((from) + chunk / (ROW / 8), end - 1);                                           \
      const long slot = long(block_table_in[table + position / BLOCK_SIZE]) * BLOCK_SIZE + position % BLOCK_SIZE; \
      next[c] = *(const DEV(uint4)*)(kv_cache_in + slot * ROW + chunk % (ROW / 8) * 8);                        \
    }                                                                                                          \
  }
THREADGROUP_ARRAY(uint4, tile_words, TILE_ROWS * STRIDE / 8);
THREADGROUP_ARRAY(float, part_scores, SIMDGROUPS * 16 * KEYS);
TG(T)* tile = (TG(T)*)tile_words;

const int thread_index = int(thread_position_in_threadgroup.x);
const int simdgroup_index = int(simdgroup_index_in_threadgroup);
const int lane = int(thread_index_in_simdgroup);
const int work = int(threadgroup_position_in_grid.x) / HEAD_BLOCKS;
const int first_head = int(threadgroup_position_in_grid.x) % HEAD_BLOCKS * 16;
const int row = work_in[work * 4];
const int table = work_in[work * 4 + 1];
const int begin = work_in[work * 4 + 2];
const int end = work_in[work * 4 + 3];
if (begin >= end) {  // a range that pads the plan: the whole threadgroup leaves
  for (int e = thread_index; e < 16 * LATENT; e += THREADS) {
    const int head = first_head + e / LATENT;
    if (head < Q_HEADS) partial_out[(long(work) * Q_HEADS + head) * LATENT + e % LATENT] = 0.0f;
  }
  if (thread_index < 16 && first_head + thread_index < Q_HEADS) {
    const long at = long(work) * Q_HEADS + first_head + thread_index;
    partial_stats[at * 2] = LOWEST;
    partial_stats[at * 2 + 1] = 0.0f;
  }
  return;
}

uint4 next[CHUNKS];
LOAD_NEXT(begin);
UNROLL for (int q = 0; q < QUERY_CHUNKS; ++q) {
  const int chunk = q * THREADS + thread_index;
  const int head = first_head + chunk / (ROW / 8);
  const int at = chunk % (ROW / 8) * 8;
  if (chunk < 16 * (ROW / 8)) {
    // Rows beyond the last head repeat it; their results are left out.
    const long of_head = long(row) * Q_HEADS + min(head, Q_HEADS - 1);
    const DEV(T)* from = at < LATENT ? latent_in + of_head * LATENT + at : rope_in + of_head * ROPE + at - LATENT;
    *(TG(uint4)*)(tile + chunk / (ROW / 8) * STRIDE + at) = *(const DEV(uint4)*)from;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
MatrixA<T> query[STEPS];
UNROLL for (int s = 0; s < STEPS; ++s) {
  const int step = simdgroup_index + s * SIMDGROUPS;
  load_a(query[s], tile + (step < ROW / 16 ? step : 0) * 16, STRIDE);
}
MatrixC o[COLUMNS / 8];
UNROLL for (int c = 0; c < COLUMNS / 8; ++c) clear(o[c]);
float max_score[2] = {LOWEST, LOWEST};
float sum[2] = {0.0f, 0.0f};

for (int first = begin; first < end; first += KEYS) {
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the tile has been used
  UNROLL for (int c = 0; c < CHUNKS; ++c) {
    const int chunk = c * THREADS + thread_index;
    if (chunk < KEYS * (ROW / 8)) *(TG(uint4)*)(tile + chunk / (ROW / 8) * STRIDE + chunk % (ROW / 8) * 8) = next[c];
  }
  LOAD_NEXT(first + KEYS);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  MatrixC scores[KEYS / 8];
  UNROLL for (int t = 0; t < KEYS / 8; ++t) clear(scores[t]);
  UNROLL for (int s = 0; s < STEPS; ++s) {
    const int step = simdgroup_index + s * SIMDGROUPS;
    if (step < ROW / 16) {
      UNROLL for (int t = 0; t < KEYS / 8; t += 2) {
        MatrixB<T> left;
        MatrixB<T> right;
        load_b_transposed(left, right, (const TG(T)*)(tile + t * 8 * STRIDE + step * 16), STRIDE);
        multiply_add(scores[t], query[s], left);
        multiply_add(scores[t + 1], query[s], right);
      }
    }
  }
  UNROLL for (int t = 0; t < KEYS / 8; ++t) {
    UNROLL for (int i = 0; i < 4; ++i) {
      part_scores[(simdgroup_index * 16 + row_of(lane) + i / 2 * 8) * KEYS + t * 8 + column_of(lane) + i % 2] = get(scores[t], i);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float highest[2] = {max_score[0], max_score[1]};
  UNROLL for (int t = 0; t < KEYS / 8; ++t) {
    UNROLL for (int i = 0; i < 4; ++i) {
      const int key = t * 8 + column_of(lane) + i % 2;
      float score = 0.0f;
      UNROLL for (int s = 0; s < SIMDGROUPS; ++s) score += part_scores[(s * 16 + row_of(lane) + i / 2 * 8) * KEYS + key];
      score = first + key < end ? score * factors_in[0] : LOWEST;
      put(scores[t], i, score);
      highest[i / 2] = max(highest[i / 2], score);
    }
  }
  float shrink[2];
  UNROLL for (int r = 0; r < 2; ++r) {
    highest[r] = row_max(highest[r]);
    shrink[r] = exp2_fast(max_score[r] - highest[r]);
    max_score[r] = highest[r];
    sum[r] *= shrink[r];
  }
  UNROLL for (int t = 0; t < KEYS / 8; ++t) {
    UNROLL for (int i = 0; i < 4; ++i) {
      const bool seen = first + t * 8 + column_of(lane) + i % 2 < end;
      const float weight = seen ? exp2_fast(get(scores[t], i) - highest[i / 2]) : 0.0f;
      sum[i / 2] += weight;
      put(scores[t], i, weight);
    }
  }
  UNROLL for (int c = 0; c < COLUMNS / 8; ++c) {
    UNROLL for (int i = 0; i < 4; ++i) put(o[c], i, get(o[c], i) * shrink[i / 2]);
  }
  UNROLL for (int t = 0; t < KEYS / 8; t += 2) {
    MatrixA<T> weights;
    join(weights, scores[t], scores[t + 1]);
    UNROLL for (int c = 0; c < COLUMNS / 8; c += 2) {
      MatrixB<T> left;
      MatrixB<T> right;
      load_b(left, right, (const TG(T)*)(tile + t * 8 * STRIDE + simdgroup_index * COLUMNS + c * 8), STRIDE);
      multiply_add(o[c], weights, left);
      multiply_add(o[c + 1], weights, right);
    }
  }
}
UNROLL for (int r = 0; r < 2; ++r) {
  const int head = first_head + row_of(lane) + r * 8;
  const float total = row_sum(sum[r]);
  if (head < Q_HEADS) {
    const long at = long(work) * Q_HEADS + head;
    UNROLL for (int c = 0; c < COLUMNS / 8; ++c) {
      UNROLL for (int i = 0; i < 2; ++i) {
        partial_out[at * LATENT + simdgroup_index * COLUMNS + c * 8 + column_of(lane) + i] = get(o[c], r * 2 + i);
      }
    }
    if (simdgroup_index == 0 && column_of(lane) == 0) {
      partial_stats[at * 2] = max_score[r];
      partial_stats[at * 2 + 1] = total;
    }
  }
}
#undef LOAD_NEXT
