// One token of a selective state space (Mamba 2) for one request and one head: the memory decays, takes the values in,
// and is read. It goes from one page to another, or stays where it is.
// LANES lanes share the numbers of a value, four at a time.
constexpr int LANES = 8;
constexpr int FOURS = STATE_SIZE / (4 * LANES);
constexpr int ROUND = SIMDGROUPS * (32 / LANES);  // values that a threadgroup takes at once
constexpr int VALUES = HEADS * HEAD_SIZE;
constexpr int CHANNELS = VALUES + 2 * GROUPS * STATE_SIZE;

const int simdgroup_index = int(simdgroup_index_in_threadgroup);
const int lane = int(thread_index_in_simdgroup);
const int token = int(threadgroup_position_in_grid.x);
const int head = int(threadgroup_position_in_grid.y);
const int after = blocks_in[AFTER + token];
const bool kept = after > 0;  // rows that pad a step leave no state
DEV(uint)* pages = const_cast<DEV(uint)*>(pages_in);
const long offset = MEMORY_WORD + long(head) * HEAD_SIZE * STATE_SIZE;
const DEV(float)* memory = (const DEV(float)*)(pages + long(blocks_in[token]) * PAGE_WORDS + offset);
DEV(float)* new_memory = (DEV(float)*)(pages + long(kept ? after : 0) * PAGE_WORDS + offset);
const DEV(T)* row = projected_in + token * projected_in_strides[0];
const DEV(T)* mixed = mixed_in + long(token) * CHANNELS;

const float before = to_f32(row[VALUES + CHANNELS + head]) + heads_in[head];
const float softplus = before > 20.0f ? before : log_precise(1.0f + exp2_fast(1.44269504f * before));
const float low = softplus < factors_in[0] ? factors_in[0] : softplus;
const float time = low > factors_in[1] ? factors_in[1] : low;
const float decay = exp2_fast(1.44269504f * heads_in[HEADS + head] * time);

float written[FOURS * 4];
float read[FOURS * 4];
const DEV(T)* writing = mixed + VALUES + (head / (HEADS / GROUPS)) * STATE_SIZE;
UNROLL for (int f = 0; f < FOURS; ++f) {
  UNROLL for (int i = 0; i < 4; ++i) {
    const int at = (f * LANES + lane % LANES) * 4 + i;
    written[f * 4 + i] = time * to_f32(writing[at]);
    read[f * 4 + i] = to_f32(writing[GROUPS * STATE_SIZE + at]);
  }
}

for (int first = 0; first < HEAD_SIZE; first += ROUND * UNROLLED) {
  float held[UNROLLED][FOURS * 4];
  UNROLL for (int u = 0; u < UNROLLED; ++u) {
    const int v = first + u * ROUND + simdgroup_index * (32 / LANES) + lane / LANES;
    UNROLL for (int f = 0; f < FOURS; ++f) load_f32<4>(memory + v * STATE_SIZE + (f * LANES + lane % LANES) * 4, held[u] + f * 4);
  }
  UNROLL for (int u = 0; u < UNROLLED; ++u) {
    const int v = first + u * ROUND + simdgroup_index * (32 / LANES) + lane / LANES;
    const float value = to_f32(mixed[head * HEAD_SIZE + v]);
    float sum = 0.0f;
    UNROLL for (int i = 0; i < FOURS * 4; ++i) {
      held[u][i] = decay * held[u][i] + value * written[i];
      sum += held[u][i] * read[i];
    }
    UNROLL for (int step = LANES / 2; step > 0; step /= 2) sum += simd_shuffle_xor(sum, step);
    if (kept) {
      UNROLL for (int f = 0; f < FOURS; ++f) store_f32<4>(new_memory + v * STATE_SIZE + (f * LANES + lane % LANES) * 4, held[u] + f * 4);
    }
    if (lane % LANES == 0) {
      const float gate = GATED ? to_f32(row[head * HEAD_SIZE + v]) : 0.0f;
      const float y = sum + value * heads_in[2 * HEADS + head];
      out[(long(token) * HEADS + head) * HEAD_SIZE + v] = from_f32<T>(GATED ? y * gate / (1.0f + exp2_fast(-1.44269504f * gate)) : y);
    }
  }
}
