// One token of a gated delta net for one request and one key head, with the value heads that it serves: convolution,
// recurrence, norm and gate. The state goes from one page to another, or stays where it is.
// LANES lanes share a row of the memory, four elements at a time.
constexpr int LANES = 8;
constexpr int RATIO = V_HEADS / K_HEADS;
constexpr int ROWS = RATIO * V_SIZE;
constexpr int MIXED = 2 * K_SIZE + ROWS;
constexpr int CHANNELS = 2 * K_HEADS * K_SIZE + V_HEADS * V_SIZE;
constexpr int FOURS = K_SIZE / (4 * LANES);
constexpr int THREADS = SIMDGROUPS * 32;
constexpr int ROUND = SIMDGROUPS * (32 / LANES);  // rows that a threadgroup takes at once
THREADGROUP_ARRAY(float, mixed, MIXED);
THREADGROUP_ARRAY(float, read_rows, ROWS);

const int thread_index = int(thread_position_in_threadgroup.x);
const int simdgroup_index = int(simdgroup_index_in_threadgroup);
const int lane = int(thread_index_in_simdgroup);
const int token = int(threadgroup_position_in_grid.x);
const int head = int(threadgroup_position_in_grid.y);
const int after = blocks_in[AFTER + token];
const bool kept = after > 0;  // rows that pad a step leave no state
DEV(uint)* pages = const_cast<DEV(uint)*>(pages_in);
const DEV(uint)* from = pages + long(blocks_in[token]) * PAGE_WORDS;
DEV(uint)* to = pages + long(kept ? after : 0) * PAGE_WORDS;
const DEV(T)* row = projected_in + token * projected_in_strides[0];

const DEV(T)* history = (const DEV(T)*)from;
DEV(T)* new_history = (DEV(T)*)to;
for (int c = thread_index; c < MIXED; c += THREADS) {
  const bool is_query = c < K_SIZE;
  const bool is_value = c >= 2 * K_SIZE;
  const int i = is_query ? c : is_value ? c - 2 * K_SIZE : c - K_SIZE;
  const int channel = is_query ? head * K_SIZE + i : is_value ? 2 * K_HEADS * K_SIZE + head * ROWS + i : (K_HEADS + head) * K_SIZE + i;
  const int at = (is_query ? QUERY + head * QUERY_STEP : is_value ? VALUE + head * VALUE_STEP : KEY + head * KEY_STEP) + i;
  const T newest = row[at];
  float sum = to_f32(newest) * to_f32(conv_in[channel * TAPS + TAPS - 1]);
  T earlier[TAPS - 1];
  UNROLL for (int t = 0; t < TAPS - 1; ++t) {
    earlier[t] = history[t * CHANNELS + channel];
    sum += to_f32(earlier[t]) * to_f32(conv_in[channel * TAPS + t]);
  }
  if (kept) {
    UNROLL for (int t = 0; t < TAPS - 2; ++t) new_history[t * CHANNELS + channel] = earlier[t + 1];
    new_history[(TAPS - 2) * CHANNELS + channel] = newest;
  }
  mixed[c] = sum / (1.0f + exp2_fast(-1.44269504f * sum));
}
threadgroup_barrier(mem_flags::mem_threadgroup);

float query[FOURS * 4];
float key[FOURS * 4];
float query_square = 0.0f;
float key_square = 0.0f;
float query_key = 0.0f;
UNROLL for (int f = 0; f < FOURS; ++f) {
  UNROLL for (int i = 0; i < 4; ++i) {
    const int at = (f * LANES + lane % LANES) * 4 + i;
    query[f * 4 + i] = mixed[at];
    key[f * 4 + i] = mixed[K_SIZE + at];
    query_square += mixed[at] * mixed[at];
    key_square += mixed[K_SIZE + at] * mixed[K_SIZE + at];
    query_key += mixed[at] * mixed[K_SIZE + at];
  }
}
UNROLL for (int step = LANES / 2; step > 0; step /= 2) {
  query_square += simd_shuffle_xor(query_square, step);
  key_square += simd_shuffle_xor(key_square, step);
  query_key += simd_shuffle_xor(query_key, step);
}
const float query_factor = rsqrt_precise(query_square + 1e-6f) * rsqrt_precise(float(K_SIZE));
const float key_factor = rsqrt_precise(key_square + 1e-6f);
query_key *= query_factor * key_factor;
UNROLL for (int i = 0; i < FOURS * 4; ++i) {
  query[i] *= query_factor;
  key[i] *= key_factor;
}

const DEV(float)* memory = (const DEV(float)*)(from + MEMORY_WORD) + long(head) * ROWS * K_SIZE;
DEV(float)* new_memory = (DEV(float)*)(to + MEMORY_WORD) + long(head) * ROWS * K_SIZE;
for (int first = 0; first < ROWS; first += ROUND * UNROLLED) {
  float held[UNROLLED][FOURS * 4];
  UNROLL for (int u = 0; u < UNROLLED; ++u) {
    const int r = first + u * ROUND + simdgroup_index * (32 / LANES) + lane / LANES;
    UNROLL for (int f = 0; f < FOURS; ++f) load_f32<4>(memory + r * K_SIZE + (f * LANES + lane % LANES) * 4, held[u] + f * 4);
  }
  UNROLL for (int u = 0; u < UNROLLED; ++u) {
    const int r = first + u * ROUND + simdgroup_index * (32 / LANES) + lane / LANES;
    const int value_head = r / V_SIZE;
    const float beta = 1.0f / (1.0f + exp2_fast(-1.44269504f * to_f32(row[BETA + head * BETA_STEP + value_head])));
    const int gates = head * RATIO + value_head;
    const float time = to_f32(row[DECAY + head * DECAY_STEP + value_head]) + gates_in[V_HEADS + gates];
    const float softplus = time > 20.0f ? time : log_precise(1.0f + exp2_fast(1.44269504f * time));
    const float decay = exp2_fast(1.44269504f * gates_in[gates] * softplus);
    float by_key = 0.0f;
    float by_query = 0.0f;
    UNROLL for (int i = 0; i < FOURS * 4; ++i) {
      by_key += held[u][i] * key[i];
      by_query += held[u][i] * query[i];
    }
    UNROLL for (int step = LANES / 2; step > 0; step /= 2) {
      by_key += simd_shuffle_xor(by_key, step);
      by_query += simd_shuffle_xor(by_query, step);
    }
    const float delta = (mixed[2 * K_SIZE + r] - decay * by_key) * beta;
    UNROLL for (int i = 0; i < FOURS * 4; ++i) held[u][i] = decay * held[u][i] + delta * key[i];
    if (kept) {
      UNROLL for (int f = 0; f < FOURS; ++f) store_f32<4>(new_memory + r * K_SIZE + (f * LANES + lane % LANES) * 4, held[u] + f * 4);
    }
    if (lane % LANES == 0) read_rows[r] = to_f32(from_f32<T>(decay * by_query + delta * query_key));
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

for (int value_head = simdgroup_index; value_head < RATIO; value_head += SIMDGROUPS) {
  float square = 0.0f;
  for (int i = lane; i < V_SIZE; i += 32) square += read_rows[value_head * V_SIZE + i] * read_rows[value_head * V_SIZE + i];
  UNROLL for (int step = 16; step > 0; step /= 2) square += simd_shuffle_xor(square, step);
  const float factor = rsqrt_precise(square / V_SIZE + factors_in[0]);
  for (int i = lane; i < V_SIZE; i += 32) {
    const float gate = to_f32(row[GATE + head * GATE_STEP + value_head * V_SIZE + i]);
    const float x = read_rows[value_head * V_SIZE + i] * factor * to_f32(norm_in[i]);
    out[(long(token) * K_HEADS + head) * ROWS + value_head * V_SIZE + i] = from_f32<T>(x * gate / (1.0f + exp2_fast(-1.44269504f * gate)));
  }
}
