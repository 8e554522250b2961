// Attention of a block of query rows of one request and head to its keys, tile by tile, on matrix units. Each
// SIMD-group has 16 rows; keys and values of a tile are in threadgroup memory, where the queries were first.
// Scores are in units of log2.
constexpr int KEYS = 8 * SIMDGROUPS;
constexpr int ROWS = 16 * SIMDGROUPS;
constexpr int STRIDE = HEAD_SIZE + 8;  // so that rows start in different banks
constexpr int THREADS = SIMDGROUPS * 32;
constexpr int CHUNKS = (KEYS * (HEAD_SIZE / 8) + THREADS - 1) / THREADS;  // of eight elements, a thread
constexpr int HALF_PAGE = BLOCK_SIZE * KV_HEADS * HEAD_SIZE;
constexpr float LOWEST = -3.0e38f;
THREADGROUP_ARRAY(uint4, tile_words, 2 * KEYS * STRIDE / 8);
TG(T)* keys = (TG(T)*)tile_words;
TG(T)* values = keys + KEYS * STRIDE;

const int thread_index = int(thread_position_in_threadgroup.x);
const int simdgroup_index = int(simdgroup_index_in_threadgroup);
const int lane = int(thread_index_in_simdgroup);
const int work = int(threadgroup_position_in_grid.x);
const int head = int(threadgroup_position_in_grid.y);
const int kv_head = head / GROUP;
const int first_row = work_in[work * 4];
const int num_rows = work_in[work * 4 + 1];
const int table = work_in[work * 4 + 2];
const int position = work_in[work * 4 + 3];  // of the first row
const int end = position + num_rows;
const int begin = WINDOW > 0 ? max(0, position - WINDOW + 1) : 0;

for (int e = thread_index; e < ROWS * HEAD_SIZE; e += THREADS) {
  const int i = e % HEAD_SIZE;
  const long row = first_row + min(e / HEAD_SIZE, num_rows - 1);
  keys[e / HEAD_SIZE * STRIDE + i] = query_in[row * query_in_strides[0] + head * query_in_strides[1] + i * query_in_strides[2]];
}
threadgroup_barrier(mem_flags::mem_threadgroup);
MatrixA<T> query[HEAD_SIZE / 16];
UNROLL for (int s = 0; s < HEAD_SIZE / 16; ++s) {
  load_a(query[s], keys + simdgroup_index * 16 * STRIDE + s * 16, STRIDE);
}
MatrixC o[HEAD_SIZE / 8];
UNROLL for (int c = 0; c < HEAD_SIZE / 8; ++c) clear(o[c]);
float max_score[2] = {LOWEST, LOWEST};
float sum[2] = {0.0f, 0.0f};
// The rows of this lane are at own_position and own_position + 8.
const int own_position = position + simdgroup_index * 16 + row_of(lane);
const int last_position = position + simdgroup_index * 16 + 15;

uint4 next_key[CHUNKS];
uint4 next_value[CHUNKS];
for (int first = begin - KEYS; first < end; first += KEYS) {
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the tile has been used
  UNROLL for (int c = 0; c < CHUNKS; ++c) {
    const int chunk = c * THREADS + thread_index;
    const int key = chunk / (HEAD_SIZE / 8);
    const int at = chunk % (HEAD_SIZE / 8) * 8;
    if (key < KEYS) {
      if (first >= begin) {
        *(TG(uint4)*)(keys + key * STRIDE + at) = next_key[c];
        *(TG(uint4)*)(values + key * STRIDE + at) = next_value[c];
      }
      const int seen = min(first + KEYS + key, end - 1);
      const long block = block_table_in[table + seen / BLOCK_SIZE];
      const long from = ((block * 2 * BLOCK_SIZE + seen % BLOCK_SIZE) * KV_HEADS + kv_head) * HEAD_SIZE + at;
      next_key[c] = *(const DEV(uint4)*)(kv_cache_in + from);
      next_value[c] = *(const DEV(uint4)*)(kv_cache_in + from + HALF_PAGE);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  // SIMD-groups leave out tiles beyond their last row, or before its window, as a whole.
  if (first < begin || first > last_position) continue;
  if (WINDOW > 0 && first + KEYS - 1 <= position + simdgroup_index * 16 - WINDOW) continue;
  MatrixC scores[KEYS / 8];
  UNROLL for (int t = 0; t < KEYS / 8; ++t) clear(scores[t]);
  UNROLL for (int s = 0; s < HEAD_SIZE / 16; ++s) {
    UNROLL for (int t = 0; t < KEYS / 8; t += 2) {
      MatrixB<T> left;
      MatrixB<T> right;
      load_b_transposed(left, right, (const TG(T)*)(keys + t * 8 * STRIDE + s * 16), STRIDE);
      multiply_add(scores[t], query[s], left);
      multiply_add(scores[t + 1], query[s], right);
    }
  }
  float highest[2] = {max_score[0], max_score[1]};
  UNROLL for (int t = 0; t < KEYS / 8; ++t) {
    UNROLL for (int i = 0; i < 4; ++i) {
      const int distance = own_position + i / 2 * 8 - (first + t * 8 + column_of(lane) + i % 2);
      float score = get(scores[t], i) * factors_in[0];
      if (SOFT_CAP) score = tanh_precise(score) * factors_in[1];
      score = distance >= 0 && (WINDOW == 0 || distance < WINDOW) ? score : LOWEST;
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
      const float score = get(scores[t], i);
      const float weight = score > LOWEST ? exp2_fast(score - highest[i / 2]) : 0.0f;
      sum[i / 2] += weight;
      put(scores[t], i, weight);
    }
  }
  UNROLL for (int c = 0; c < HEAD_SIZE / 8; ++c) {
    UNROLL for (int i = 0; i < 4; ++i) put(o[c], i, get(o[c], i) * shrink[i / 2]);
  }
  UNROLL for (int t = 0; t < KEYS / 8; t += 2) {
    MatrixA<T> weights;
    join(weights, scores[t], scores[t + 1]);
    UNROLL for (int c = 0; c < HEAD_SIZE / 8; c += 2) {
      MatrixB<T> left;
      MatrixB<T> right;
      load_b(left, right, (const TG(T)*)(values + t * 8 * STRIDE + c * 8), STRIDE);
      multiply_add(o[c], weights, left);
      multiply_add(o[c + 1], weights, right);
    }
  }
}
UNROLL for (int r = 0; r < 2; ++r) {
  const int row = simdgroup_index * 16 + row_of(lane) + r * 8;
  float total = row_sum(sum[r]);
  float factor = 1.0f;
  if (SINKS) {
    const float sink = sinks_in[head] * 1.44269504f;
    const float joined = max(max_score[r], sink);
    factor = exp2_fast(max_score[r] - joined);
    total = total * factor + exp2_fast(sink - joined);
  }
  if (row < num_rows) {
    const long at = (long(first_row + row) * KV_HEADS * GROUP + head) * HEAD_SIZE;
    UNROLL for (int c = 0; c < HEAD_SIZE / 8; ++c) {
      UNROLL for (int i = 0; i < 2; ++i) {
        out[at + c * 8 + column_of(lane) + i] = from_f32<T>(get(o[c], r * 2 + i) * factor / total);
      }
    }
  }
}
