// Normalises and rotates queries and keys, and writes keys and values into the cache in place.
// A SIMD-group per head of a row: query heads, then key heads, then value heads. A lane takes pairs of elements
// that are rotated together; elements beyond ROTARY pass as they are, in pairs too.
constexpr int HEADS = Q_HEADS + 2 * KV_HEADS;
constexpr int PAIRS = (HEAD_SIZE / 2 + 31) / 32;
const int row = int(threadgroup_position_in_grid.x);
const int head = int(threadgroup_position_in_grid.y) * SIMDGROUPS + int(simdgroup_index_in_threadgroup);
const int lane = int(thread_index_in_simdgroup);
const bool is_query = head < Q_HEADS;
const bool is_value = head >= Q_HEADS + KV_HEADS;
const int source = !GATED ? head : is_query ? 2 * head : Q_HEADS + head;  // a gate follows each query
const int slot = is_query ? 0 : slots_in[row * slots_in_strides[0]];
// Whole SIMD-groups leave together, so the shuffles below are met by all lanes of those that stay.
if (head < HEADS && slot >= 0) {
  int at[PAIRS][2];
  float x[PAIRS][2];
  float square = 0.0f;
  UNROLL for (int p = 0; p < PAIRS; ++p) {
    const int pair = p * 32 + lane;
    const bool rotated = pair < ROTARY / 2;
    at[p][0] = rotated && !TRADITIONAL ? pair : 2 * pair;
    at[p][1] = rotated && !TRADITIONAL ? pair + ROTARY / 2 : 2 * pair + 1;
    UNROLL for (int i = 0; i < 2; ++i) {
      x[p][i] = pair < HEAD_SIZE / 2 ? to_f32(qkv_in[row * qkv_in_strides[0] + (source * HEAD_SIZE + at[p][i]) * qkv_in_strides[1]]) : 0.0f;
      square += x[p][i] * x[p][i];
    }
  }
  if (NORM && !is_value) {
    UNROLL for (int step = 16; step > 0; step /= 2) square += simd_shuffle_xor(square, step);
    const float factor = rsqrt_precise(square / HEAD_SIZE + factors_in[0]);
    UNROLL for (int p = 0; p < PAIRS; ++p) {
      if (p * 32 + lane < HEAD_SIZE / 2) {
        UNROLL for (int i = 0; i < 2; ++i) {
          const float weight = is_query ? to_f32(q_norm_in[at[p][i]]) : to_f32(k_norm_in[at[p][i]]);
          x[p][i] = to_f32(from_f32<T>(x[p][i] * factor * weight));
        }
      }
    }
  }
  DEV(C)* pages = const_cast<DEV(C)*>(kv_cache_in);
  const long to = ((long(slot / BLOCK_SIZE) * 2 + (is_value ? 1 : 0)) * BLOCK_SIZE + slot % BLOCK_SIZE) * KV_HEADS
      + (is_query ? 0 : (head - Q_HEADS) % KV_HEADS);
  UNROLL for (int p = 0; p < PAIRS; ++p) {
    const int pair = p * 32 + lane;
    if (pair < HEAD_SIZE / 2) {
      if (!is_value && pair < ROTARY / 2) {
        const float cosine = cos_sin_in[row * ROTARY + pair];
        const float sine = cos_sin_in[row * ROTARY + ROTARY / 2 + pair];
        const float first = x[p][0];
        x[p][0] = first * cosine - x[p][1] * sine;
        x[p][1] = first * sine + x[p][1] * cosine;
      }
      UNROLL for (int i = 0; i < 2; ++i) {
        if (is_query) query_out[(long(row) * Q_HEADS + head) * HEAD_SIZE + at[p][i]] = from_f32<T>(x[p][i]);
        else pages[to * HEAD_SIZE + at[p][i]] = from_f32<C>(x[p][i]);
      }
    }
  }
}
