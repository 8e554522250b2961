// The CHOSEN experts of each row with the largest scores, in descending order, and their weights. A SIMD-group per row.
// Scores are logits, whose softmax the weights are; SIGMOID, sigmoids plus biases, of which the weights are the sigmoids.
// GROUPED, only the KEPT groups with the largest highest score, or sum of the two highest, take part.
constexpr int HELD = (EXPERTS + 31) / 32;
constexpr bool GROUPED = GROUPS > KEPT;
constexpr int GROUP = EXPERTS / GROUPS;
constexpr float LOWEST = -3.0e38f;
THREADGROUP_ARRAY(float, all, GROUPED ? EXPERTS : 1);
THREADGROUP_ARRAY(float, of_group, GROUPS);
THREADGROUP_ARRAY(int, kept, GROUPS);
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
UNROLL for (int h = 0; h < HELD; ++h) {
  const int at = h * 32 + lane;
  if (at < EXPERTS && SIGMOID) held[h] = 1.0f / (1.0f + exp2_fast(-1.44269504f * held[h])) + bias_in[at];
  else if (at < EXPERTS) total += exp2_fast(1.44269504f * (held[h] - highest));
}
UNROLL for (int step = 16; step > 0; step /= 2) total += simd_shuffle_xor(total, step);
if (GROUPED) {
  UNROLL for (int h = 0; h < HELD; ++h) {
    if (h * 32 + lane < EXPERTS) all[h * 32 + lane] = held[h];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int group = lane; group < GROUPS; group += 32) {
    float best = LOWEST;
    float second = LOWEST;
    for (int i = 0; i < GROUP; ++i) {
      const float score = all[group * GROUP + i];
      second = max(second, min(best, score));
      best = max(best, score);
    }
    of_group[group] = SIGMOID ? best + second : best;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int group = lane; group < GROUPS; group += 32) {
    int better = 0;
    for (int i = 0; i < GROUPS; ++i) {
      better += of_group[i] > of_group[group] || (of_group[i] == of_group[group] && i < group) ? 1 : 0;
    }
    kept[group] = better < KEPT ? 1 : 0;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  UNROLL for (int h = 0; h < HELD; ++h) {
    const int at = h * 32 + lane;
    if (at < EXPERTS && kept[at / GROUP] == 0) held[h] = SIGMOID ? 0.0f : LOWEST;
  }
}
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
  at = min(int(best_at), EXPERTS - 1);
  UNROLL for (int h = 0; h < HELD; ++h) held[h] = h * 32 + lane == at ? LOWEST : held[h];
  const float logit = SIGMOID ? to_f32(logits_in[long(row) * EXPERTS + at]) : best;
  const float weight =
      SIGMOID ? 1.0f / (1.0f + exp2_fast(-1.44269504f * logit)) : exp2_fast(1.44269504f * (logit - highest)) / total;
  chosen_total += weight;
  UNROLL for (int s = 0; s < (CHOSEN + 31) / 32; ++s) score[s] = s * 32 + lane == c ? weight : score[s];
  if (lane == c % 32) experts_out[row * CHOSEN + c] = at;
}
UNROLL for (int s = 0; s < (CHOSEN + 31) / 32; ++s) {
  if (s * 32 + lane < CHOSEN) {
    scores_out[row * CHOSEN + s * 32 + lane] = (NORMALISED ? score[s] / chosen_total : score[s]) * factors_in[0];
  }
}
