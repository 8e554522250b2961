// Attention of one query row over one range of its keys, for up to 8 query heads as the columns of matrices. Lanes load
// the operands themselves, 16 bytes at a time: nothing that is cached passes through threadgroup memory. Of a tile of 16
// keys a lane has a quarter of two keys, which makes rows of matrices, and an eighth of four values, which it turns into
// columns. Scores are in units of log2. DIRECT is 1 if every row has one range: then it writes the result.
// QUANTIZED is 1 for rows of 8-bit elements, which become float16. Their scales stay outside: those of keys are applied to
// scores, those of values to weights, relative to the largest so far, so that weights fit float16.
// WRITES is 1 if the row's own key and value are given: then the range that ends with them writes them to their page first.
// It is 2 if they come as they are projected: then they and the queries are normalised and rotated here as well.
#if QUANTIZED
#define ELEMENT HALF
constexpr int RUN = 16;  // elements of 16 bytes
constexpr int ROW = ROW_WORDS / 4;
constexpr int VALUES = KV_HEADS * HEAD_SIZE / RUN;  // of a token, after its keys; here and below in units of 16 bytes
#else
#define ELEMENT C
constexpr int RUN = 8;
constexpr int ROW = KV_HEADS * HEAD_SIZE / RUN;
constexpr int VALUES = BLOCK_SIZE * ROW;
#endif
constexpr int HEAD_RUNS = HEAD_SIZE / RUN;
constexpr int KEY_RUNS = (HEAD_RUNS + 3) / 4;  // of a key, a lane
constexpr int VALUE_RUNS = (HEAD_RUNS + 7) / 8;
constexpr int STEPS = RUN / 4;  // of a run: matrices of keys take four elements of it
constexpr int Q_HEADS = KV_HEADS * GROUP;
constexpr int PARTS = (GROUP + HEADS - 1) / HEADS;
constexpr int ROUND = SIMDGROUPS * TILES * 16;
constexpr int STRIDE = HEAD_SIZE + 1;  // so that lanes write to different banks
constexpr float LOWEST = -3.0e38f;
THREADGROUP_ARRAY(float, all_out, SIMDGROUPS * HEADS * STRIDE);
THREADGROUP_ARRAY(float, all_max, SIMDGROUPS * HEADS);
THREADGROUP_ARRAY(float, all_sum, SIMDGROUPS * HEADS);
THREADGROUP_ARRAY(float, all_largest, SIMDGROUPS * 8);

const int work = int(threadgroup_position_in_grid.x) / (KV_HEADS * PARTS);
const int head_part = int(threadgroup_position_in_grid.x) % (KV_HEADS * PARTS);
const int kv_head = head_part / PARTS;
const int first_head = head_part % PARTS * HEADS;  // within the group
const int simdgroup_index = int(simdgroup_index_in_threadgroup);
const int lane = int(thread_index_in_simdgroup);
const int lane_row = row_of(lane);
const int lane_column = column_of(lane);
const int lane_run = lane_column / 2;
const int row = work_in[work * 4];
const int table = work_in[work * 4 + 1];
const int begin = work_in[work * 4 + 2];
const int end = work_in[work * 4 + 3];
const int last = max(begin, end - 1);
const int first_tile = begin / 16 * 16 + simdgroup_index * TILES * 16;

// Keys of half a tile are in one block, if blocks hold whole eights. Positions outside the range count as its ends.
#define WITHIN(position) max(begin, min(position, last))
#define BLOCK_OF(position) block_table_in[table + WITHIN(position) / BLOCK_SIZE]
#define LOAD_BLOCKS(first)                                                                                 \
  if (BLOCK_SIZE % 8 == 0) {                                                                               \
    UNROLL for (int h = 0; h < TILES * 2; ++h) blocks[h] = BLOCK_OF((first) + h * 8);                      \
  }
#define SLOT_OF(first, half_tile, key)                                                                     \
  (long(BLOCK_SIZE % 8 == 0 ? blocks[half_tile] : BLOCK_OF((first) + (half_tile) * 8 + (key))) * PAGE_ROWS \
   + WITHIN((first) + (half_tile) * 8 + (key)) % BLOCK_SIZE)
#if QUANTIZED
constexpr int PAGE_ROWS = BLOCK_SIZE;
#define LOAD_KEY_SCALES(h)                                                                                 \
  key_scale[h] = ((const DEV(uint)*)kv_cache_in)[slot * ROW_WORDS + VALUES * 8 + kv_head];                 \
  value_scale[h] = ((const DEV(uint)*)kv_cache_in)[slot * ROW_WORDS + VALUES * 8 + KV_HEADS + kv_head];
#else
constexpr int PAGE_ROWS = 2 * BLOCK_SIZE;
#define LOAD_KEY_SCALES(h)
#endif
#define LOAD_KEYS(first)                                                                                   \
  UNROLL for (int h = 0; h < TILES * 2; ++h) {                                                             \
    const long slot = SLOT_OF(first, h, lane_row);                                                         \
    UNROLL for (int c = 0; c < KEY_RUNS; ++c) {                                                            \
      key[h][c] = pages[slot * ROW + kv_head * HEAD_RUNS + min(c * 4 + lane_run, HEAD_RUNS - 1)];          \
    }                                                                                                      \
    LOAD_KEY_SCALES(h)                                                                                     \
  }
#define LOAD_VALUES(first)                                                                                 \
  UNROLL for (int h = 0; h < TILES * 2; ++h) {                                                             \
    UNROLL for (int i = 0; i < 2; ++i) {                                                                   \
      const long slot = SLOT_OF(first, h, lane_column + i);                                                \
      UNROLL for (int c = 0; c < VALUE_RUNS; ++c) {                                                        \
        value[h][i][c] = pages[slot * ROW + VALUES + kv_head * HEAD_RUNS + min(c * 8 + lane_row, HEAD_RUNS - 1)]; \
      }                                                                                                    \
    }                                                                                                      \
  }
const DEV(uint4)* pages = (const DEV(uint4)*)kv_cache_in;
int blocks[TILES * 2];
LOAD_BLOCKS(first_tile)

// A lane has runs of one head's query: head lane_row.
float query[KEY_RUNS][RUN];
const int head = kv_head * GROUP + min(first_head + lane_row, GROUP - 1);
const bool used = lane_row < HEADS && first_head + lane_row < GROUP;
UNROLL for (int c = 0; c < KEY_RUNS; ++c) {
  const int from = min(c * 4 + lane_run, HEAD_RUNS - 1) * RUN;
#if WRITES == 2
  load_f32<RUN>(qkv_in + long(row) * (Q_HEADS + 2 * KV_HEADS) * HEAD_SIZE + head * HEAD_SIZE + from, query[c]);
#else
  UNROLL for (int i = 0; i < RUN; ++i) {
    query[c][i] = to_f32(query_in[row * query_in_strides[0] + head * query_in_strides[1] + (from + i) * query_in_strides[2]]);
  }
#endif
}
#if WRITES
#if WRITES == 2
constexpr int HALF_RUNS = KEY_RUNS / 2;
float cosine[HALF_RUNS][RUN];
float sine[HALF_RUNS][RUN];
UNROLL for (int c = 0; c < HALF_RUNS; ++c) {
  load_f32<RUN>(cos_sin_in + row * HEAD_SIZE + (c * 4 + lane_run) * RUN, cosine[c]);
  load_f32<RUN>(cos_sin_in + row * HEAD_SIZE + HEAD_SIZE / 2 + (c * 4 + lane_run) * RUN, sine[c]);
}
#define NORMALISE_AND_ROTATE(x, norm)                                                                      \
  if (NORM) {                                                                                              \
    float square = 0.0f;                                                                                   \
    UNROLL for (int c = 0; c < KEY_RUNS; ++c) {                                                            \
      UNROLL for (int i = 0; i < RUN; ++i) square += x[c][i] * x[c][i];                                    \
    }                                                                                                      \
    square += simd_shuffle_xor(square, 1);                                                                 \
    square += simd_shuffle_xor(square, ROW_STEP);                                                          \
    const float shrink = rsqrt_precise(square / HEAD_SIZE + factors_in[2]);                       \
    UNROLL for (int c = 0; c < KEY_RUNS; ++c) {                                                            \
      float factor[RUN];                                                                                   \
      load_f32<RUN>(norm + (c * 4 + lane_run) * RUN, factor);                                              \
      UNROLL for (int i = 0; i < RUN; ++i) x[c][i] = to_f32(from_f32<C>(x[c][i] * shrink * factor[i]));    \
    }                                                                                                      \
  }                                                                                                        \
  UNROLL for (int c = 0; c < HALF_RUNS; ++c) {                                                             \
    UNROLL for (int i = 0; i < RUN; ++i) {                                                                 \
      const float low = x[c][i];                                                                           \
      const float high = x[c + HALF_RUNS][i];                                                              \
      x[c][i] = low * cosine[c][i] - high * sine[c][i];                                                    \
      x[c + HALF_RUNS][i] = high * cosine[c][i] + low * sine[c][i];                                        \
    }                                                                                                      \
  }
#endif
// The SIMD-group that reads the row's own key and value writes them; no other does either.
if (begin < end && (last - begin / 16 * 16) / (TILES * 16) % SIMDGROUPS == simdgroup_index) {
  float own_key[KEY_RUNS][RUN];
  float own_value[KEY_RUNS][RUN];
  UNROLL for (int c = 0; c < KEY_RUNS; ++c) {
    const int from = min(c * 4 + lane_run, HEAD_RUNS - 1) * RUN;
#if WRITES == 2
    const DEV(C)* projected = qkv_in + (long(row) * (Q_HEADS + 2 * KV_HEADS) + Q_HEADS + kv_head) * HEAD_SIZE + from;
    load_f32<RUN>(projected, own_key[c]);
    load_f32<RUN>(projected + KV_HEADS * HEAD_SIZE, own_value[c]);
#else
    UNROLL for (int i = 0; i < RUN; ++i) {
      own_key[c][i] = to_f32(key_in[row * key_in_strides[0] + kv_head * key_in_strides[1] + (from + i) * key_in_strides[2]]);
      own_value[c][i] =
          to_f32(value_in[row * value_in_strides[0] + kv_head * value_in_strides[1] + (from + i) * value_in_strides[2]]);
    }
#endif
  }
  const int slot = slots_in[row];
  const int own = block_table_in[table + last / BLOCK_SIZE] * BLOCK_SIZE + last % BLOCK_SIZE;
#if WRITES == 2
  NORMALISE_AND_ROTATE(own_key, k_norm_in)
#endif
  UNROLL for (int c = 0; c < KEY_RUNS; ++c) {
    if (slot == own && lane_row == 0 && c * 4 + lane_run < HEAD_RUNS) {
      DEV(C)* page = const_cast<DEV(C)*>(kv_cache_in)
          + ((long(slot / BLOCK_SIZE) * PAGE_ROWS + slot % BLOCK_SIZE) * ROW + kv_head * HEAD_RUNS + c * 4 + lane_run) * RUN;
      store_f32<RUN>(page, own_key[c]);
      store_f32<RUN>(page + VALUES * RUN, own_value[c]);
    }
  }
  simdgroup_barrier(mem_flags::mem_device);
}
#if WRITES == 2
NORMALISE_AND_ROTATE(query, q_norm_in)
#endif
#endif
// Keys and values are loaded as soon as those before them are used.
uint4 key[TILES * 2][KEY_RUNS];
uint4 value[TILES * 2][2][VALUE_RUNS];
#if QUANTIZED
uint key_scale[TILES * 2];
uint value_scale[TILES * 2];
#endif
if (first_tile < end) {
  LOAD_KEYS(first_tile)
  LOAD_VALUES(first_tile)
  LOAD_BLOCKS(first_tile + ROUND)
}
// A lane has two heads, columns of C; and of each 16 keys or dimensions two rows.
float factor[2] = {factors_in[0], factors_in[0]};
float per_unit = used ? 1.0f : 0.0f;
#if QUANTIZED
float largest_query = 0.0f;
UNROLL for (int c = 0; c < KEY_RUNS; ++c) {
  UNROLL for (int i = 0; i < RUN; ++i) largest_query = max(largest_query, magnitude(query[c][i]));
}
if (!used) largest_query = 0.0f;
largest_query = max(largest_query, simd_shuffle_xor(largest_query, 1));
largest_query = max(largest_query, simd_shuffle_xor(largest_query, ROW_STEP));
per_unit = largest_query > 0.0f ? 1.0f / largest_query : 0.0f;
if (lane_run == 0) all_largest[simdgroup_index * 8 + lane_row] = largest_query;
simdgroup_barrier(mem_flags::mem_threadgroup);
UNROLL for (int h = 0; h < 2; ++h) factor[h] *= all_largest[simdgroup_index * 8 + lane_column + h];
#endif
MatrixB<ELEMENT> columns[KEY_RUNS * STEPS];
UNROLL for (int c = 0; c < KEY_RUNS; ++c) {
  UNROLL for (int i = 0; i < RUN; ++i) query[c][i] = c * 4 + lane_run < HEAD_RUNS ? query[c][i] * per_unit : 0.0f;
  UNROLL for (int s = 0; s < STEPS; ++s) set_b(columns[c * STEPS + s], query[c] + s * 4, lane);
}
MatrixC o[VALUE_RUNS * RUN / 2];
UNROLL for (int c = 0; c < VALUE_RUNS * RUN / 2; ++c) clear(o[c]);
float max_score[2] = {LOWEST, LOWEST};
float sum[2] = {0.0f, 0.0f};
float unit = 1.0f;  // of the weights: the largest scale of a value so far
if (QUANTIZED) unit = 0.0f;

for (int first = first_tile; first < end; first += ROUND) {
  const int next = first + ROUND;
  MatrixC scores[TILES];
  UNROLL for (int t = 0; t < TILES; ++t) {
    clear(scores[t]);
    UNROLL for (int c = 0; c < KEY_RUNS; ++c) {
      uint low[RUN / 2];
      uint high[RUN / 2];
      UNROLL for (int w = 0; w < 4; ++w) {
#if QUANTIZED
        unpack_pairs<KEY_FORMAT>(word_of(key[t * 2][c], w), low + w * 2);
        unpack_pairs<KEY_FORMAT>(word_of(key[t * 2 + 1][c], w), high + w * 2);
#else
        low[w] = word_of(key[t * 2][c], w);
        high[w] = word_of(key[t * 2 + 1][c], w);
#endif
      }
      UNROLL for (int s = 0; s < STEPS; ++s) {
        MatrixA<ELEMENT> keys;
        set_a(keys, low[s * 2], high[s * 2], low[s * 2 + 1], high[s * 2 + 1]);
        multiply_add(scores[t], keys, columns[c * STEPS + s]);
      }
    }
  }
  float highest[2] = {max_score[0], max_score[1]};
  float largest = unit;
#if QUANTIZED
  float scale_of_value[TILES * 2];
  float scale_of_key[TILES * 2];
  UNROLL for (int h = 0; h < TILES * 2; ++h) {
    scale_of_key[h] = bits_f32(key_scale[h]) * (KEY_FORMAT == 1 ? float(FP8_UNIT) : 1.0f);
    scale_of_value[h] = bits_f32(value_scale[h]) * (VALUE_FORMAT == 1 ? float(FP8_UNIT) : 1.0f);
    largest = max(largest, scale_of_value[h]);
  }
  largest = column_max(largest);
#endif
  if (next < end) {
    LOAD_KEYS(next)
  }
  UNROLL for (int t = 0; t < TILES; ++t) {
    UNROLL for (int i = 0; i < 4; ++i) {
      const int position = first + t * 16 + lane_row + i / 2 * 8;
      float score = get(scores[t], i) * factor[i % 2];
#if QUANTIZED
      score *= scale_of_key[t * 2 + i / 2];
#endif
      if (SOFT_CAP) score = tanh_precise(score) * factors_in[1];
      score = position >= begin && position < end ? score : LOWEST;
      put(scores[t], i, score);
      highest[i % 2] = max(highest[i % 2], score);
    }
  }
  const float per_scale = QUANTIZED ? (largest > 0.0f ? 1.0f / largest : 0.0f) : 1.0f;
  float shrink[2];
  UNROLL for (int h = 0; h < 2; ++h) {
    highest[h] = column_max(highest[h]);
    shrink[h] = exp2_fast(max_score[h] - highest[h]);
    max_score[h] = highest[h];
    sum[h] *= shrink[h];
    shrink[h] *= unit * per_scale;
  }
  unit = largest;
  UNROLL for (int c = 0; c < VALUE_RUNS * RUN / 2; ++c) {
    UNROLL for (int i = 0; i < 4; ++i) put(o[c], i, get(o[c], i) * shrink[i % 2]);
  }
  UNROLL for (int t = 0; t < TILES; ++t) {
    UNROLL for (int i = 0; i < 4; ++i) {
      const float score = get(scores[t], i);
      float weight = score > LOWEST ? exp2_fast(score - highest[i % 2]) : 0.0f;
      sum[i % 2] += weight;
#if QUANTIZED
      weight *= scale_of_value[t * 2 + i / 2] * per_scale;
#endif
      put(scores[t], i, weight);
    }
    MatrixB<ELEMENT> weights;
    narrow(weights, scores[t]);
    UNROLL for (int c = 0; c < VALUE_RUNS; ++c) {
      UNROLL for (int w = 0; w < 4; ++w) {
        const uint x[4] = {word_of(value[t * 2][0][c], w), word_of(value[t * 2][1][c], w),
                           word_of(value[t * 2 + 1][0][c], w), word_of(value[t * 2 + 1][1][c], w)};
        MatrixA<ELEMENT> values;
#if QUANTIZED
        uint now[2];
        uint later[2];
        unpack_pairs<VALUE_FORMAT>(zip_bytes_low(x[0], x[1]), now);
        unpack_pairs<VALUE_FORMAT>(zip_bytes_low(x[2], x[3]), later);
        set_a(values, now[0], now[1], later[0], later[1]);
        multiply_add(o[(c * 4 + w) * 2], values, weights);
        unpack_pairs<VALUE_FORMAT>(zip_bytes_high(x[0], x[1]), now);
        unpack_pairs<VALUE_FORMAT>(zip_bytes_high(x[2], x[3]), later);
        set_a(values, now[0], now[1], later[0], later[1]);
        multiply_add(o[(c * 4 + w) * 2 + 1], values, weights);
#else
        set_a(values, zip_low(x[0], x[1]), zip_high(x[0], x[1]), zip_low(x[2], x[3]), zip_high(x[2], x[3]));
        multiply_add(o[c * 4 + w], values, weights);
#endif
      }
    }
  }
  if (next < end) {
    LOAD_VALUES(next)
    LOAD_BLOCKS(next + ROUND)
  }
}
// Join the SIMD-groups.
UNROLL for (int h = 0; h < 2; ++h) {
  const float total = column_sum(sum[h]);
  if (lane_column + h < HEADS) {
    const int at = simdgroup_index * HEADS + lane_column + h;
    UNROLL for (int c = 0; c < VALUE_RUNS * RUN / 2; ++c) {
      const int i = (c / (RUN / 2) * 8 + lane_row) * RUN + c % (RUN / 2) * 2;
      if (i < HEAD_SIZE) {
        all_out[at * STRIDE + i] = get(o[c], h) * unit;
        all_out[at * STRIDE + i + 1] = get(o[c], h + 2) * unit;
      }
    }
    if (lane_row == 0) {
      all_max[at] = max_score[h];
      all_sum[at] = total;
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int e = int(thread_position_in_threadgroup.x); e < HEADS * HEAD_SIZE; e += SIMDGROUPS * 32) {
  const int h = e / HEAD_SIZE;
  const int i = e % HEAD_SIZE;
  if (first_head + h < GROUP) {
    const int out_head = kv_head * GROUP + first_head + h;
    float highest = LOWEST;
    for (int s = 0; s < SIMDGROUPS; ++s) highest = max(highest, all_max[s * HEADS + h]);
    float total = 0.0f;
    float joined = 0.0f;
    for (int s = 0; s < SIMDGROUPS; ++s) {
      const float weight = exp2_fast(all_max[s * HEADS + h] - highest);
      total += weight * all_sum[s * HEADS + h];
      joined += weight * all_out[(s * HEADS + h) * STRIDE + i];
    }
    const long at = long(work) * Q_HEADS + out_head;
#if DIRECT
    if (SINKS) {
      const float sink = sinks_in[out_head] * 1.44269504f;
      const float top = max(highest, sink);
      const float shrink = exp2_fast(highest - top);
      total = total * shrink + exp2_fast(sink - top);
      joined *= shrink;
    }
    out[at * HEAD_SIZE + i] = from_f32<T>(total > 0.0f ? joined / total : 0.0f);
#else
    partial_out[at * HEAD_SIZE + i] = joined;
    if (i == 0) {
      partial_stats[at * 2] = highest;
      partial_stats[at * 2 + 1] = total;
    }
#endif
  }
}
