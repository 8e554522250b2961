// Attention of one query row over one range of 8-bit keys, for up to 8 query heads as the columns of matrices.
// Each SIMD-group has tiles of 16 keys of its own, which pass through threadgroup memory as float16: the keys, then the
// values; the next ones are loaded meanwhile. Scales stay outside: those of keys are applied to scores, those of
// values to weights, relative to the largest so far, so that weights fit float16. Scores are in units of log2.
constexpr int STRIDE = HEAD_SIZE + 8;  // so that rows start in different banks
constexpr int PARTS = (GROUP + HEADS - 1) / HEADS;
constexpr int ROW_CHUNKS = HEAD_SIZE / 16;
constexpr int CHUNKS = (16 * ROW_CHUNKS + 31) / 32;  // of sixteen elements, a lane
constexpr int VALUE_DATA = KV_HEADS * HEAD_SIZE / 4;
constexpr float LOWEST = -3.0e38f;
THREADGROUP_ARRAY(uint4, tile_words, SIMDGROUPS * 16 * STRIDE / 8);
THREADGROUP_ARRAY(float, all_scales, SIMDGROUPS * 32);
THREADGROUP_ARRAY(float, all_max, SIMDGROUPS * HEADS);
THREADGROUP_ARRAY(float, all_sum, SIMDGROUPS * HEADS);

const int work = int(threadgroup_position_in_grid.x) / (KV_HEADS * PARTS);
const int head_part = int(threadgroup_position_in_grid.x) % (KV_HEADS * PARTS);
const int kv_head = head_part / PARTS;
const int first_head = head_part % PARTS * HEADS;  // within the group
const int simdgroup_index = int(simdgroup_index_in_threadgroup);
const int lane = int(thread_index_in_simdgroup);
const int row = work_in[work * 4];
const int table = work_in[work * 4 + 1];
const int begin = work_in[work * 4 + 2];
const int end = work_in[work * 4 + 3];
TG(HALF)* tile = (TG(HALF)*)(tile_words + simdgroup_index * 2 * STRIDE);
TG(float)* scales = all_scales + simdgroup_index * 32;  // of the keys, then of the values

// Keys and values are loaded a tile ahead.
uint4 next_key[CHUNKS];
uint4 next_value[CHUNKS];
uint next_scale = 0;
#define SLOT_OF(position) \
  (long(block_table_in[table + (position) / BLOCK_SIZE]) * BLOCK_SIZE + (position) % BLOCK_SIZE)
#define LOAD_TILE(first)                                                                                       \
  UNROLL for (int c = 0; c < CHUNKS; ++c) {                                                                    \
    const int key = min((c * 32 + lane) / ROW_CHUNKS, 15);                                                     \
    const DEV(uint)* cached = kv_cache_in + SLOT_OF(max(0, min((first) + key, end - 1))) * ROW_WORDS           \
        + kv_head * (HEAD_SIZE / 4) + (c * 32 + lane) % ROW_CHUNKS * 4;                                        \
    next_key[c] = *(const DEV(uint4)*)cached;                                                                  \
    next_value[c] = *(const DEV(uint4)*)(cached + VALUE_DATA);                                                 \
  }                                                                                                            \
  next_scale = kv_cache_in[SLOT_OF(max(0, min((first) + lane % 16, end - 1))) * ROW_WORDS + 2 * VALUE_DATA     \
      + (lane < 16 ? 0 : KV_HEADS) + kv_head];
LOAD_TILE(begin + simdgroup_index * 16)

// Queries relative to their largest element, as float16; zeros from HEADS on: matrices are loaded in pairs.
float x[HEADS][HEAD_SIZE / 32 + 1];
UNROLL for (int h = 0; h < HEADS; ++h) {
  const int head = kv_head * GROUP + min(first_head + h, GROUP - 1);
  UNROLL for (int c = 0; c <= HEAD_SIZE / 32; ++c) {
    const int i = min(c * 32 + lane, HEAD_SIZE - 1);
    x[h][c] = to_f32(query_in[row * query_in_strides[0] + head * query_in_strides[1] + i * query_in_strides[2]]);
  }
}
for (int i = HEADS * STRIDE + lane; i < 16 * STRIDE; i += 32) tile[i] = from_f32<HALF>(0.0f);
if (lane >= HEADS && lane < 16) scales[lane] = 0.0f;
UNROLL for (int h = 0; h < HEADS; ++h) {
  float largest = 0.0f;
  UNROLL for (int c = 0; c <= HEAD_SIZE / 32; ++c) largest = max(largest, magnitude(x[h][c]));
  UNROLL for (int step = 16; step > 0; step /= 2) largest = max(largest, simd_shuffle_xor(largest, step));
  const float per_unit = largest > 0.0f && first_head + h < GROUP ? 1.0f / largest : 0.0f;
  UNROLL for (int c = 0; c <= HEAD_SIZE / 32; ++c) {
    const int i = c * 32 + lane;
    if (i < HEAD_SIZE) tile[h * STRIDE + i] = from_f32<HALF>(x[h][c] * per_unit);
  }
  if (lane == 0) scales[h] = largest;
}
simdgroup_barrier(mem_flags::mem_threadgroup);
MatrixB<HALF> query[HEAD_SIZE / 16];
UNROLL for (int s = 0; s < HEAD_SIZE / 16; ++s) {
  MatrixB<HALF> nothing;  // heads from 8 on
  load_b_transposed(query[s], nothing, (const TG(HALF)*)(tile + s * 16), STRIDE);
}
// A lane has two heads, columns of C; and of each 16 keys or dimensions two rows.
const float factor[2] = {scales[column_of(lane)] * factors_in[0], scales[column_of(lane) + 1] * factors_in[0]};
MatrixC o[HEAD_SIZE / 16];
UNROLL for (int c = 0; c < HEAD_SIZE / 16; ++c) clear(o[c]);
float max_score[2] = {LOWEST, LOWEST};
float sum[2] = {0.0f, 0.0f};
float unit = 0.0f;  // of the weights: the largest scale of a value so far

for (int first = begin + simdgroup_index * 16; first < end; first += SIMDGROUPS * 16) {
  uint4 value_words[CHUNKS];
  simdgroup_barrier(mem_flags::mem_threadgroup);  // the tile has been used
  float scale = bits_f32(next_scale);
  if (lane < 16 ? KEY_FORMAT == 1 : VALUE_FORMAT == 1) scale *= 256.0f;
  scales[lane] = scale;
  UNROLL for (int c = 0; c < CHUNKS; ++c) {
    const int key = (c * 32 + lane) / ROW_CHUNKS;
    const int chunk = (c * 32 + lane) % ROW_CHUNKS;
    if (key < 16) store_halves<KEY_FORMAT>(next_key[c], (TG(uint4)*)(tile + key * STRIDE + chunk * 16));
    value_words[c] = next_value[c];
  }
  LOAD_TILE(first + SIMDGROUPS * 16)
  simdgroup_barrier(mem_flags::mem_threadgroup);
  MatrixC scores;
  clear(scores);
  UNROLL for (int s = 0; s < HEAD_SIZE / 16; ++s) {
    MatrixA<HALF> keys;
    load_a(keys, (const TG(HALF)*)(tile + s * 16), STRIDE);
    multiply_add(scores, keys, query[s]);
  }
  float highest[2] = {max_score[0], max_score[1]};
  UNROLL for (int i = 0; i < 4; ++i) {
    const int key = row_of(lane) + i / 2 * 8;
    float score = get(scores, i) * (scales[key] * factor[i % 2]);
    if (SOFT_CAP) score = tanh_precise(score) * factors_in[1];
    score = first + key < end ? score : LOWEST;
    put(scores, i, score);
    highest[i % 2] = max(highest[i % 2], score);
  }
  const float value_scale[2] = {scales[16 + row_of(lane)], scales[24 + row_of(lane)]};
  const float largest = max(unit, column_max(max(value_scale[0], value_scale[1])));
  const float per_unit = largest > 0.0f ? 1.0f / largest : 0.0f;
  float shrink[2];
  UNROLL for (int h = 0; h < 2; ++h) {
    highest[h] = column_max(highest[h]);
    shrink[h] = exp2_fast(max_score[h] - highest[h]);
    max_score[h] = highest[h];
    sum[h] *= shrink[h];
    shrink[h] *= unit * per_unit;
  }
  unit = largest;
  UNROLL for (int c = 0; c < HEAD_SIZE / 16; ++c) {
    UNROLL for (int i = 0; i < 4; ++i) put(o[c], i, get(o[c], i) * shrink[i % 2]);
  }
  UNROLL for (int i = 0; i < 4; ++i) {
    const bool seen = first + row_of(lane) + i / 2 * 8 < end;
    const float weight = seen ? exp2_fast(get(scores, i) - highest[i % 2]) : 0.0f;
    sum[i % 2] += weight;
    put(scores, i, weight * (value_scale[i / 2] * per_unit));
  }
  MatrixB<HALF> weights;
  narrow(weights, scores);
  simdgroup_barrier(mem_flags::mem_threadgroup);  // the keys have been used
  UNROLL for (int c = 0; c < CHUNKS; ++c) {
    const int key = (c * 32 + lane) / ROW_CHUNKS;
    const int chunk = (c * 32 + lane) % ROW_CHUNKS;
    if (key < 16) store_halves<VALUE_FORMAT>(value_words[c], (TG(uint4)*)(tile + key * STRIDE + chunk * 16));
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  UNROLL for (int c = 0; c < HEAD_SIZE / 16; ++c) {
    MatrixA<HALF> values;
    load_a_transposed(values, (const TG(HALF)*)(tile + c * 16), STRIDE);
    multiply_add(o[c], values, weights);
  }
}
// Join the SIMD-groups; their outputs take the place of the tiles.
threadgroup_barrier(mem_flags::mem_threadgroup);
TG(float)* all_out = (TG(float)*)tile_words;
UNROLL for (int i = 0; i < 2; ++i) {
  const float total = column_sum(sum[i]);
  if (column_of(lane) + i < HEADS) {
    const int at = simdgroup_index * HEADS + column_of(lane) + i;
    UNROLL for (int c = 0; c < HEAD_SIZE / 16; ++c) {
      all_out[at * HEAD_SIZE + c * 16 + row_of(lane)] = get(o[c], i) * unit;
      all_out[at * HEAD_SIZE + c * 16 + row_of(lane) + 8] = get(o[c], i + 2) * unit;
    }
    if (row_of(lane) == 0) {
      all_max[at] = max_score[i];
      all_sum[at] = total;
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int e = int(thread_position_in_threadgroup.x); e < HEADS * HEAD_SIZE; e += SIMDGROUPS * 32) {
  const int h = e / HEAD_SIZE;
  const int i = e % HEAD_SIZE;
  if (first_head + h < GROUP) {
    float highest = LOWEST;
    for (int s = 0; s < SIMDGROUPS; ++s) highest = max(highest, all_max[s * HEADS + h]);
    float total = 0.0f;
    float value = 0.0f;
    for (int s = 0; s < SIMDGROUPS; ++s) {
      const float weight = exp2_fast(all_max[s * HEADS + h] - highest);
      total += weight * all_sum[s * HEADS + h];
      value += weight * all_out[(s * HEADS + h) * HEAD_SIZE + i];
    }
    const long at = long(work) * KV_HEADS * GROUP + kv_head * GROUP + first_head + h;
    partial_out[at * HEAD_SIZE + i] = value;
    if (i == 0) {
      partial_stats[at * 2] = highest;
      partial_stats[at * 2 + 1] = total;
    }
  }
}
