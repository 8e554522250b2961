// One token of a causal convolution and a SiLU: a thread per channel. The channels are a part of a row. The state, the
// last TAPS - 1 inputs, goes from one page to another, or stays.
const int token = int(threadgroup_position_in_grid.x);
const int channel = int(threadgroup_position_in_grid.y) * THREADS + int(thread_position_in_threadgroup.x);
if (channel < CHANNELS) {
  const int after = blocks_in[AFTER + token];
  DEV(uint)* pages = const_cast<DEV(uint)*>(pages_in);
  const DEV(T)* history = (const DEV(T)*)(pages + long(blocks_in[token]) * PAGE_WORDS);
  DEV(T)* new_history = (DEV(T)*)(pages + long(after > 0 ? after : 0) * PAGE_WORDS);
  const T newest = projected_in[token * projected_in_strides[0] + FIRST + channel];
  float sum = to_f32(newest) * to_f32(conv_in[channel * TAPS + TAPS - 1]);
  T earlier[TAPS - 1];
  UNROLL for (int t = 0; t < TAPS - 1; ++t) {
    earlier[t] = history[t * CHANNELS + channel];
    sum += to_f32(earlier[t]) * to_f32(conv_in[channel * TAPS + t]);
  }
  if (BIAS) sum += to_f32(bias_in[channel]);
  if (after > 0) {  // rows that pad a step leave no state
    UNROLL for (int t = 0; t < TAPS - 2; ++t) new_history[t * CHANNELS + channel] = earlier[t + 1];
    new_history[(TAPS - 2) * CHANNELS + channel] = newest;
  }
  out[long(token) * CHANNELS + channel] = from_f32<T>(sum / (1.0f + exp2_fast(-1.44269504f * sum)));
}
