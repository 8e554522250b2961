// Attention of one query row over one range of quantised keys, for HEADS query heads that share a key head.
// LANES lanes take a key and a value at a time; each holds WIDTH consecutive dimensions, of which all have one scale.
// The last lanes hold nothing where LANES * WIDTH exceeds the head. Scores are in units of log2.
constexpr int STREAMS = SIMDGROUPS * 32 / LANES;
constexpr int PARTS = (GROUP + HEADS - 1) / HEADS;
constexpr int KEY_DATA = HEAD_SIZE * Element<KEY_FORMAT>::BITS / 32;
constexpr int VALUE_DATA = HEAD_SIZE * Element<VALUE_FORMAT>::BITS / 32;
constexpr int KEY_WORDS = WIDTH * Element<KEY_FORMAT>::BITS / 32;
constexpr int VALUE_WORDS = WIDTH * Element<VALUE_FORMAT>::BITS / 32;
constexpr int SCALES = KV_HEADS * (KEY_DATA + VALUE_DATA);
constexpr float LOWEST = -3.0e38f;
THREADGROUP_ARRAY(float, all_out, SIMDGROUPS * HEADS * HEAD_SIZE);
THREADGROUP_ARRAY(float, all_max, SIMDGROUPS * HEADS);
THREADGROUP_ARRAY(float, all_sum, SIMDGROUPS * HEADS);

const int work = int(threadgroup_position_in_grid.x) / (KV_HEADS * PARTS);
const int head_part = int(threadgroup_position_in_grid.x) % (KV_HEADS * PARTS);
const int kv_head = head_part / PARTS;
const int first_head = head_part % PARTS * HEADS;  // within the group
const int simdgroup_index = int(simdgroup_index_in_threadgroup);
const int lane = int(thread_index_in_simdgroup) % LANES;
const int stream = simdgroup_index * (32 / LANES) + int(thread_index_in_simdgroup) / LANES;
const bool held = lane * WIDTH < HEAD_SIZE;
const int row = work_in[work * 4];
const int table = work_in[work * 4 + 1];
const int begin = work_in[work * 4 + 2];
const int end = work_in[work * 4 + 3];
// Where in a row this lane's words are; idle lanes read the first ones, for nothing.
const int key_at = kv_head * KEY_DATA + (held ? lane * KEY_WORDS : 0);
const int value_at = KV_HEADS * KEY_DATA + kv_head * VALUE_DATA + (held ? lane * VALUE_WORDS : 0);
const int key_scale_at = SCALES + kv_head * KEY_SCALES + (held ? lane * WIDTH * KEY_SCALES / HEAD_SIZE : 0);
const int value_scale_at =
    SCALES + KV_HEADS * KEY_SCALES + kv_head * VALUE_SCALES + (held ? lane * WIDTH * VALUE_SCALES / HEAD_SIZE : 0);

float q[HEADS][WIDTH];
float q_sum[HEADS];
float o[HEADS][WIDTH];
float o_bias[HEADS];  // what the biases of the values add to each element
float max_score[HEADS];
float sum[HEADS];
UNROLL for (int h = 0; h < HEADS; ++h) {
  const int head = kv_head * GROUP + min(first_head + h, GROUP - 1);
  max_score[h] = LOWEST;
  sum[h] = 0.0f;
  q_sum[h] = 0.0f;
  o_bias[h] = 0.0f;
  UNROLL for (int i = 0; i < WIDTH; ++i) {
    const long at = row * query_in_strides[0] + head * query_in_strides[1] + (lane * WIDTH + i) * query_in_strides[2];
    q[h][i] = held ? to_f32(query_in[at]) * factors_in[0] : 0.0f;
    q_sum[h] += q[h][i];
    o[h][i] = 0.0f;
  }
}
// Every lane makes the same number of rounds, so that all take part in the shuffles. Words are loaded a round ahead.
constexpr int ROUND = STREAMS * UNROLLED;
uint next_key[UNROLLED][KEY_WORDS];
uint next_value[UNROLLED][VALUE_WORDS];
uint next_key_scale[UNROLLED];
uint next_value_scale[UNROLLED];
for (int round = begin - ROUND; round < end; round += ROUND) {
  uint key_words[UNROLLED][KEY_WORDS];
  uint value_words[UNROLLED][VALUE_WORDS];
  uint key_scale[UNROLLED];
  uint value_scale[UNROLLED];
  UNROLL for (int u = 0; u < UNROLLED; ++u) {
    if (round >= begin) {
      UNROLL for (int w = 0; w < KEY_WORDS; ++w) key_words[u][w] = next_key[u][w];
      UNROLL for (int w = 0; w < VALUE_WORDS; ++w) value_words[u][w] = next_value[u][w];
      key_scale[u] = next_key_scale[u];
      value_scale[u] = next_value_scale[u];
    }
    const int position = min(round + ROUND + u * STREAMS + stream, end - 1);
    const long slot = long(block_table_in[table + position / BLOCK_SIZE]) * BLOCK_SIZE + position % BLOCK_SIZE;
    const DEV(uint)* cached = kv_cache_in + slot * ROW_WORDS;
    load_bits<KEY_WORDS, KEY_VECTOR>(cached + key_at, next_key[u]);
    load_bits<VALUE_WORDS, VALUE_VECTOR>(cached + value_at, next_value[u]);
    next_key_scale[u] = Element<KEY_FORMAT>::SCALED ? cached[key_scale_at] : 0u;
    next_value_scale[u] = Element<VALUE_FORMAT>::SCALED ? cached[value_scale_at] : 0u;
  }
  if (round < begin) continue;
  float score[HEADS][UNROLLED];
  UNROLL for (int u = 0; u < UNROLLED; ++u) {
    float k[WIDTH];
    unpack<KEY_FORMAT, WIDTH>(key_words[u], k);
    float scale = 1.0f;
    float bias = 0.0f;
    if (Element<KEY_FORMAT>::SCALED) unpack_scale<KEY_FORMAT>(key_scale[u], scale, bias);
    UNROLL for (int h = 0; h < HEADS; ++h) {
      float s = 0.0f;
      UNROLL for (int i = 0; i < WIDTH; ++i) s += q[h][i] * k[i];
      if (Element<KEY_FORMAT>::SCALED) s *= scale;
      if (Element<KEY_FORMAT>::BIASED) s += q_sum[h] * bias;
      score[h][u] = s;
    }
  }
  UNROLL for (int h = 0; h < HEADS; ++h) {
    float highest = max_score[h];
    UNROLL for (int u = 0; u < UNROLLED; ++u) {
      float s = score[h][u];
      UNROLL for (int step = LANES / 2; step > 0; step /= 2) s += simd_shuffle_xor(s, step);
      if (SOFT_CAP) s = tanh_precise(s) * factors_in[1];
      score[h][u] = round + u * STREAMS + stream < end ? s : LOWEST;
      highest = max(highest, score[h][u]);
    }
    const float shrink = exp2_fast(max_score[h] - highest);
    max_score[h] = highest;
    sum[h] *= shrink;
    o_bias[h] *= shrink;
    UNROLL for (int i = 0; i < WIDTH; ++i) o[h][i] *= shrink;
    UNROLL for (int u = 0; u < UNROLLED; ++u) {
      score[h][u] = round + u * STREAMS + stream < end ? exp2_fast(score[h][u] - highest) : 0.0f;
      sum[h] += score[h][u];
    }
  }
  UNROLL for (int u = 0; u < UNROLLED; ++u) {
    float v[WIDTH];
    unpack<VALUE_FORMAT, WIDTH>(value_words[u], v);
    float scale = 1.0f;
    float bias = 0.0f;
    if (Element<VALUE_FORMAT>::SCALED) unpack_scale<VALUE_FORMAT>(value_scale[u], scale, bias);
    UNROLL for (int h = 0; h < HEADS; ++h) {
      const float weight = Element<VALUE_FORMAT>::SCALED ? score[h][u] * scale : score[h][u];
      if (Element<VALUE_FORMAT>::BIASED) o_bias[h] += score[h][u] * bias;
      UNROLL for (int i = 0; i < WIDTH; ++i) o[h][i] += weight * v[i];
    }
  }
}
// Join the streams of a SIMD-group, then the SIMD-groups.
UNROLL for (int h = 0; h < HEADS; ++h) {
  UNROLL for (int i = 0; i < WIDTH; ++i) o[h][i] += o_bias[h];
  UNROLL for (int step = LANES; step < 32; step *= 2) {
    const float other = simd_shuffle_xor(max_score[h], step);
    const float highest = max(max_score[h], other);
    const float mine = exp2_fast(max_score[h] - highest);
    const float theirs = exp2_fast(other - highest);
    max_score[h] = highest;
    sum[h] = sum[h] * mine + simd_shuffle_xor(sum[h], step) * theirs;
    UNROLL for (int i = 0; i < WIDTH; ++i) o[h][i] = o[h][i] * mine + simd_shuffle_xor(o[h][i], step) * theirs;
  }
  if (held && int(thread_index_in_simdgroup) < LANES) {
    const int at = simdgroup_index * HEADS + h;
    UNROLL for (int i = 0; i < WIDTH; ++i) all_out[at * HEAD_SIZE + lane * WIDTH + i] = o[h][i];
    if (lane == 0) {
      all_max[at] = max_score[h];
      all_sum[at] = sum[h];
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
#if DIRECT
    if (SINKS) {
      const float sink = sinks_in[kv_head * GROUP + first_head + h] * 1.44269504f;
      const float joined = max(highest, sink);
      const float shrink = exp2_fast(highest - joined);
      total = total * shrink + exp2_fast(sink - joined);
      value *= shrink;
    }
    out[at * HEAD_SIZE + i] = from_f32<T>(total > 0.0f ? value / total : 0.0f);
#else
    partial_out[at * HEAD_SIZE + i] = value;
    if (i == 0) {
      partial_stats[at * 2] = highest;
      partial_stats[at * 2 + 1] = total;
    }
#endif
  }
}
