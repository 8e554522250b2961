// Attention of one query row over one range of its keys, for HEADS query heads that share a key head.
// A group of LANES lanes takes a key and a value at a time; each lane holds WIDTH consecutive dimensions.
// Scores are in units of log2. DIRECT is 1 if every row has one range: then it writes the result. WRITES is 1 if the row's
// own key and value are given: then the range that ends with them writes them to their page first. It is 2 if they come
// as they are projected: then they and the queries are normalised and rotated here as well.
constexpr int WIDTH = HEAD_SIZE / LANES;
constexpr int STREAMS = SIMDGROUPS * 32 / LANES;
constexpr int KEYS = STREAMS * UNROLLED;  // of a round
constexpr int Q_HEADS = KV_HEADS * GROUP;
constexpr int PARTS = (GROUP + HEADS - 1) / HEADS;
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
const int row = work_in[work * 4];
const int table = work_in[work * 4 + 1];
const int begin = work_in[work * 4 + 2];
const int end = work_in[work * 4 + 3];
// A SIMD-group whose first key is beyond the range makes no round; a lane without a key loads its SIMD-group's first.
const int first_key = begin + simdgroup_index * (32 / LANES);
const int spare = max(begin, min(first_key, end - 1));
#define WITHIN(position) ((position) < end ? (position) : spare)

int block[UNROLLED];
UNROLL for (int u = 0; u < UNROLLED; ++u) {
  block[u] = block_table_in[table + WITHIN(begin + u * STREAMS + stream) / BLOCK_SIZE];
}
const int lane_dims = lane * WIDTH;
float q[HEADS][WIDTH];
UNROLL for (int h = 0; h < HEADS; ++h) {
  const int head = kv_head * GROUP + min(first_head + h, GROUP - 1);
#if WRITES == 2
  constexpr int PROJECTED = (Q_HEADS + 2 * KV_HEADS) * HEAD_SIZE;
  load_f32<WIDTH>(qkv_in + long(row) * PROJECTED + head * HEAD_SIZE + lane_dims, q[h]);
#else
  UNROLL for (int i = 0; i < WIDTH; ++i) {
    const long at = row * query_in_strides[0] + head * query_in_strides[1] + (lane_dims + i) * query_in_strides[2];
    q[h][i] = to_f32(query_in[at]);
  }
#endif
}
#if WRITES == 2
constexpr int HALF_LANES = LANES / 2;
float cosine[WIDTH];
float sine[WIDTH];
load_f32<WIDTH>(cos_sin_in + row * HEAD_SIZE + lane % HALF_LANES * WIDTH, cosine);
load_f32<WIDTH>(cos_sin_in + row * HEAD_SIZE + HEAD_SIZE / 2 + lane % HALF_LANES * WIDTH, sine);
#define NORMALISE_AND_ROTATE(x, factor)                                                                   \
  if (NORM) {                                                                                             \
    float square = 0.0f;                                                                                  \
    UNROLL for (int i = 0; i < WIDTH; ++i) square += x[i] * x[i];                                         \
    UNROLL for (int step = HALF_LANES; step > 0; step /= 2) square += simd_shuffle_xor(square, step);     \
    const float shrink = rsqrt_precise(square / HEAD_SIZE + factors_in[2]);                               \
    UNROLL for (int i = 0; i < WIDTH; ++i) x[i] = to_f32(from_f32<T>(x[i] * shrink * factor[i]));         \
  }                                                                                                       \
  UNROLL for (int i = 0; i < WIDTH; ++i) {                                                                \
    const float other = simd_shuffle_xor(x[i], HALF_LANES);                                               \
    x[i] = to_f32(from_f32<T>(x[i] * cosine[i] + (lane < HALF_LANES ? -other : other) * sine[i]));        \
  }
float q_factor[WIDTH];
float k_factor[WIDTH];
if (NORM) {
  load_f32<WIDTH>(q_norm_in + lane_dims, q_factor);
  load_f32<WIDTH>(k_norm_in + lane_dims, k_factor);
}
#endif
#if WRITES
// The SIMD-group that reads the row's own key and value writes them; no other does either.
const int last = max(begin, end - 1);
if (begin < end && (last - begin) % STREAMS / (32 / LANES) == simdgroup_index) {
  float key[WIDTH];
  float value[WIDTH];
#if WRITES == 2
  const DEV(T)* projected = qkv_in + (long(row) * (Q_HEADS + 2 * KV_HEADS) + Q_HEADS + kv_head) * HEAD_SIZE + lane_dims;
  load_f32<WIDTH>(projected, key);
  load_f32<WIDTH>(projected + KV_HEADS * HEAD_SIZE, value);
#else
  UNROLL for (int i = 0; i < WIDTH; ++i) {
    const int from = lane_dims + i;
    key[i] = to_f32(key_in[row * key_in_strides[0] + kv_head * key_in_strides[1] + from * key_in_strides[2]]);
    value[i] = to_f32(value_in[row * value_in_strides[0] + kv_head * value_in_strides[1] + from * value_in_strides[2]]);
  }
#endif
  const int slot = slots_in[row];
  const int own = block_table_in[table + last / BLOCK_SIZE] * BLOCK_SIZE + last % BLOCK_SIZE;
#if WRITES == 2
  NORMALISE_AND_ROTATE(key, k_factor)
#endif
  if (slot == own && int(thread_index_in_simdgroup) < LANES) {
    DEV(C)* page = const_cast<DEV(C)*>(kv_cache_in)
        + ((long(slot / BLOCK_SIZE) * 2 * BLOCK_SIZE + slot % BLOCK_SIZE) * KV_HEADS + kv_head) * HEAD_SIZE + lane_dims;
    store_f32<WIDTH>(page, key);
    store_f32<WIDTH>(page + BLOCK_SIZE * KV_HEADS * HEAD_SIZE, value);
  }
  simdgroup_barrier(mem_flags::mem_device);
}
#endif
float o[HEADS][WIDTH];
float max_score[HEADS];
float sum[HEADS];
UNROLL for (int h = 0; h < HEADS; ++h) {
  max_score[h] = LOWEST;
  sum[h] = 0.0f;
#if WRITES == 2
  NORMALISE_AND_ROTATE(q[h], q_factor)
#endif
  UNROLL for (int i = 0; i < WIDTH; ++i) {
    q[h][i] *= factors_in[0];
    o[h][i] = 0.0f;
  }
}
// A round's keys are loaded AHEAD (0 or 1) rounds before their use, and their blocks' numbers a round before that.
// All lanes of a SIMD-group make the same number of rounds, so that all take part in the shuffles.
Raw<C, WIDTH> k[UNROLLED];
Raw<C, WIDTH> v[UNROLLED];
for (int round = begin - AHEAD * KEYS; round < end && first_key < end; round += KEYS) {
  Raw<C, WIDTH> next_k[UNROLLED];
  Raw<C, WIDTH> next_v[UNROLLED];
  const int next = round + AHEAD * KEYS;
  if (next < end) {
    UNROLL for (int u = 0; u < UNROLLED; ++u) {
      const int offset = WITHIN(next + u * STREAMS + stream) % BLOCK_SIZE;
      const long at = ((long(block[u]) * 2 * BLOCK_SIZE + offset) * KV_HEADS + kv_head) * HEAD_SIZE + lane * WIDTH;
      next_k[u] = load_raw<WIDTH>(kv_cache_in + at);
      next_v[u] = load_raw<WIDTH>(kv_cache_in + at + BLOCK_SIZE * KV_HEADS * HEAD_SIZE);
    }
    UNROLL for (int u = 0; u < UNROLLED; ++u) {
      block[u] = block_table_in[table + WITHIN(next + KEYS + u * STREAMS + stream) / BLOCK_SIZE];
    }
  }
  if (AHEAD == 0) {
    UNROLL for (int u = 0; u < UNROLLED; ++u) {
      k[u] = next_k[u];
      v[u] = next_v[u];
    }
  }
  if (round >= begin) {
    float score[HEADS][UNROLLED];
    UNROLL for (int u = 0; u < UNROLLED; ++u) {
      float key[WIDTH];
      unpack_f32(k[u], key);
      UNROLL for (int h = 0; h < HEADS; ++h) {
        float s = 0.0f;
        UNROLL for (int i = 0; i < WIDTH; ++i) s += q[h][i] * key[i];
        UNROLL for (int step = LANES / 2; step > 0; step /= 2) s += simd_shuffle_xor(s, step);
        if (SOFT_CAP) s = tanh_precise(s) * factors_in[1];
        score[h][u] = round + u * STREAMS + stream < end ? s : LOWEST;
      }
    }
    UNROLL for (int h = 0; h < HEADS; ++h) {
      float highest = max_score[h];
      UNROLL for (int u = 0; u < UNROLLED; ++u) highest = max(highest, score[h][u]);
      const float shrink = exp2_fast(max_score[h] - highest);
      max_score[h] = highest;
      sum[h] *= shrink;
      UNROLL for (int i = 0; i < WIDTH; ++i) o[h][i] *= shrink;
      UNROLL for (int u = 0; u < UNROLLED; ++u) {
        score[h][u] = round + u * STREAMS + stream < end ? exp2_fast(score[h][u] - highest) : 0.0f;
        sum[h] += score[h][u];
      }
    }
    UNROLL for (int u = 0; u < UNROLLED; ++u) {
      float value[WIDTH];
      unpack_f32(v[u], value);
      UNROLL for (int h = 0; h < HEADS; ++h) {
        UNROLL for (int i = 0; i < WIDTH; ++i) o[h][i] += score[h][u] * value[i];
      }
    }
  }
  if (AHEAD == 1) {
    UNROLL for (int u = 0; u < UNROLLED; ++u) {
      k[u] = next_k[u];
      v[u] = next_v[u];
    }
  }
}
// Join the streams of a SIMD-group, then the SIMD-groups.
UNROLL for (int h = 0; h < HEADS; ++h) {
  UNROLL for (int step = LANES; step < 32; step *= 2) {
    const float other = simd_shuffle_xor(max_score[h], step);
    const float highest = max(max_score[h], other);
    const float mine = exp2_fast(max_score[h] - highest);
    const float theirs = exp2_fast(other - highest);
    max_score[h] = highest;
    sum[h] = sum[h] * mine + simd_shuffle_xor(sum[h], step) * theirs;
    UNROLL for (int i = 0; i < WIDTH; ++i) o[h][i] = o[h][i] * mine + simd_shuffle_xor(o[h][i], step) * theirs;
  }
  if (int(thread_index_in_simdgroup) < LANES) {
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
    const int head = kv_head * GROUP + first_head + h;
    float highest = LOWEST;
    for (int s = 0; s < SIMDGROUPS; ++s) highest = max(highest, all_max[s * HEADS + h]);
    float total = 0.0f;
    float value = 0.0f;
    for (int s = 0; s < SIMDGROUPS; ++s) {
      const float weight = exp2_fast(all_max[s * HEADS + h] - highest);
      total += weight * all_sum[s * HEADS + h];
      value += weight * all_out[(s * HEADS + h) * HEAD_SIZE + i];
    }
    const long at = long(work) * Q_HEADS + head;
#if DIRECT
    if (SINKS) {
      const float sink = sinks_in[head] * 1.44269504f;
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
