// Logits in float32, less what the penalties of a row take and -inf where a bit forbids a token. A thread has RUN
// neighbours of a row.
constexpr int RUN = VOCAB % 8 == 0 ? 8 : 1;
const int row = int(threadgroup_position_in_grid.y);
const int first = (int(threadgroup_position_in_grid.x) * THREADS + int(thread_position_in_threadgroup.x)) * RUN;
if (first < VOCAB) {
  float logit[RUN];
  load_f32<RUN>(logits_in + long(row) * VOCAB + first, logit);
  const int slot = PENALTIES ? int(penalties_in[row * 8]) : -1;
  if (slot >= 0) {
    float history[RUN];
    load_f32<RUN>(history_in + long(slot) * VOCAB + first, history);
    const float repetition = penalties_in[row * 8 + 1];
    const float frequency = penalties_in[row * 8 + 2];
    const float presence = penalties_in[row * 8 + 3];
    UNROLL for (int i = 0; i < RUN; ++i) {
      const int times = int(history[i]);
      const float scale = history[i] > 0.0f ? repetition : 1.0f;
      const float penalised = logit[i] > 0.0f ? logit[i] / scale : logit[i] * scale;
      logit[i] = penalised - frequency * float(times) - (times > 0 ? presence : 0.0f);
    }
  }
  if (GRAMMAR) {
    const uint bits = uint(bitmask_in[long(row) * WORDS + first / 32]) >> (first % 32);
    UNROLL for (int i = 0; i < RUN; ++i) logit[i] = (bits >> i & 1u) != 0 ? logit[i] : bits_f32(0xFF800000u);
  }
  store_f32<RUN>(out + long(row) * VOCAB + first, logit);
}
