// Softmax of each row, and its CHOSEN largest elements in descending order. A SIMD-group per row.
constexpr int HELD = (EXPERTS + 31) / 32;
constexpr float LOWEST = -3.0e38f;
const int row = int(threadgroup_position_in_grid.x);
const int lane = int(thread_index_in_simdgroup);
float held[HELD];
float highest = LOWEST;
UNROLL for (int h = 0; h < HELD; ++h) {
  const int at = h * 32 + lane;
  held[h] = at < EXPERTS ? to_f32(logits_in[long(row) * EXPERTS + at]) : LOWEST;
  highest = max(highest, held[h]);
}
UNROLL for (int step = 16; step > 0; step /= 2) highest = max(highest, simd_shuffle_xor(highest, step));
float total = 0.0f;
UNROLL for (int h = 0; h < HELD; ++h) total += h * 32 + lane < EXPERTS ? exp2_fast(1.44269504f * (held[h] - highest)) : 0.0f;
UNROLL for (int step = 16; step > 0; step /= 2) total += simd_shuffle_xor(total, step);
float chosen_total = 0.0f;
float score[(CHOSEN + 31) / 32];
for (int c = 0; c < CHOSEN; ++c) {
  float best = LOWEST;
  int at = EXPERTS;
  UNROLL for (int h = 0; h < HELD; ++h) {
    if (held[h] > best) {
      best = held[h];
      at = h * 32 + lane;
    }
  }
  float best_at = float(at);
  UNROLL for (int step = 16; step > 0; step /= 2) {
    const float other = simd_shuffle_xor(best, step);
    const float other_at = simd_shuffle_xor(best_at, step);
    const bool wins = other > best || (other == best && other_at < best_at);
    best = wins ? other : best;
    best_at = wins ? other_at : best_at;
  }
  at = int(best_at);
  UNROLL for (int h = 0; h < HELD; ++h) held[h] = h * 32 + lane == at ? LOWEST : held[h];
  const float weight = exp2_fast(1.44269504f * (best - highest)) / total;
  chosen_total += weight;
  UNROLL for (int s = 0; s < (CHOSEN + 31) / 32; ++s) score[s] = s * 32 + lane == c ? weight : score[s];
  if (lane == c % 32) experts_out[row * CHOSEN + c] = min(at, EXPERTS - 1);
}
UNROLL for (int s = 0; s < (CHOSEN + 31) / 32; ++s) {
  if (s * 32 + lane < CHOSEN) scores_out[row * CHOSEN + s * 32 + lane] = NORMALISED ? score[s] / chosen_total : score[s];
}
