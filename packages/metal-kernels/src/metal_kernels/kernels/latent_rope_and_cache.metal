// Rotates the rotary part of queries, and writes the normed latent and the rotated key of each row into the cache in
// place. A SIMD-group per query head of a row, and one more for the latent.
constexpr int PAIRS = (ROPE / 2 + 31) / 32;
constexpr int HELD = (LATENT + 31) / 32;
const int row = int(threadgroup_position_in_grid.x);
const int head = int(threadgroup_position_in_grid.y) * SIMDGROUPS + int(simdgroup_index_in_threadgroup);
const int lane = int(thread_index_in_simdgroup);
const int slot = slots_in[row];
if (head < Q_HEADS || (head == Q_HEADS && slot >= 0)) {
  const bool is_query = head < Q_HEADS;
  const DEV(T)* from = is_query ? query_in + row * query_in_strides[0] + head * (NOPE + ROPE) : latent_in + row * latent_in_strides[0];
  DEV(C)* page_row = const_cast<DEV(C)*>(kv_cache_in) + long(is_query ? 0 : slot) * (LATENT + ROPE);
  if (!is_query) {
    // All of it is loaded before the first store, which the compiler could not move loads across.
    float x[HELD];
    float weight[HELD];
    float square = 0.0f;
    UNROLL for (int h = 0; h < HELD; ++h) {
      const int at = h * 32 + lane;
      x[h] = at < LATENT ? to_f32(from[at]) : 0.0f;
      weight[h] = at < LATENT ? to_f32(norm_in[at]) : 0.0f;
      square += x[h] * x[h];
    }
    UNROLL for (int step = 16; step > 0; step /= 2) square += simd_shuffle_xor(square, step);
    const float factor = rsqrt_precise(square / LATENT + factors_in[0]);
    UNROLL for (int h = 0; h < HELD; ++h) {
      const int at = h * 32 + lane;
      if (at < LATENT) page_row[at] = from_f32<C>(to_f32(from_f32<T>(x[h] * factor * weight[h])));
    }
  }
  const int turned = is_query ? NOPE : LATENT;
  UNROLL for (int p = 0; p < PAIRS; ++p) {
    const int pair = p * 32 + lane;
    if (pair < ROPE / 2) {
      const int at = TRADITIONAL ? 2 * pair : pair;
      const int other = TRADITIONAL ? 2 * pair + 1 : pair + ROPE / 2;
      const float cosine = cos_sin_in[row * ROPE + pair];
      const float sine = cos_sin_in[row * ROPE + ROPE / 2 + pair];
      const float first = to_f32(from[turned + at]);
      const float second = to_f32(from[turned + other]);
      const T one = from_f32<T>(first * cosine - second * sine);
      const T two = from_f32<T>(first * sine + second * cosine);
      if (is_query) {
        rope_out[(long(row) * Q_HEADS + head) * ROPE + at] = one;
        rope_out[(long(row) * Q_HEADS + head) * ROPE + other] = two;
      } else {
        page_row[LATENT + at] = from_f32<C>(to_f32(one));
        page_row[LATENT + other] = from_f32<C>(to_f32(two));
      }
    }
  }
}
