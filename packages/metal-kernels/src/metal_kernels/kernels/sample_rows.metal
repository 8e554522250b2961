// One token for each row: its largest logit, or one drawn from what min-p, top-k and top-p leave. A threadgroup per row.
// Tokens are ranked by their distance, how far below the row's largest logit they are in units of the temperature and of
// log2; distances are ordered as their bits are. What a row keeps is found by counting distances, or adding weights, in
// buckets, and then in buckets of the bucket that holds the last token.
constexpr int RUN = VOCAB % 8 == 0 ? 8 : 1;
constexpr int UNROLLED = 4;
constexpr int BUCKETS = 2 * THREADS;
constexpr float PER_UNIT = float(BUCKETS / 32);
constexpr int PARTS = THREADS / 32;
constexpr int SPAN = ((VOCAB + THREADS - 1) / THREADS + RUN - 1) / RUN * RUN;
constexpr uint INFINITE = 0x7F800000u;
#define EACH_LOGIT(first, end, step, ...)                                                          \
  for (int start = first; start < end; start += UNROLLED * step) {                                 \
    float loaded[UNROLLED][RUN];                                                                   \
    UNROLL for (int u = 0; u < UNROLLED; ++u) {                                                    \
      if (start + u * step < end) load_f32<RUN>(row_in + start + u * step, loaded[u]);             \
    }                                                                                              \
    UNROLL for (int u = 0; u < UNROLLED; ++u) {                                                    \
      if (start + u * step < end) {                                                                \
        UNROLL for (int i = 0; i < RUN; ++i) {                                                     \
          const int token = start + u * step + i;                                                  \
          const float logit = loaded[u][i];                                                        \
          __VA_ARGS__                                                                              \
        }                                                                                          \
      }                                                                                            \
    }                                                                                              \
  }
THREADGROUP_ARRAY(float, best_of, THREADS);
THREADGROUP_ARRAY(float, best_of_simdgroup, PARTS);
THREADGROUP_ARRAY(float, token_of_simdgroup, PARTS);
THREADGROUP_ARRAY(ulong, part, THREADS);
THREADGROUP_ARRAY(ulong, of_lane, 32);
THREADGROUP_ARRAY(ulong, before, 1);
THREADGROUP_ARRAY(int, at, 1);
THREADGROUP_ARRAY(float, nearest, 1);
THREADGROUP_COUNTERS(low_of, BUCKETS);
THREADGROUP_COUNTERS(high_of, BUCKETS);
const int row = int(threadgroup_position_in_grid.x);
const int thread_index = int(thread_position_in_threadgroup.x);
DEV(const T)* row_in = logits_in + long(row) * VOCAB;

float best = bits_f32(0xFF800000u);
float best_token = 0.0f;
EACH_LOGIT(thread_index * RUN, VOCAB, THREADS * RUN, if (logit > best) {
  best = logit;
  best_token = float(token);
})
best_of[thread_index] = best;
UNROLL for (int step = 16; step > 0; step /= 2) {
  const float other = simd_shuffle_xor(best, step);
  const float other_token = simd_shuffle_xor(best_token, step);
  const bool wins = other > best || (other == best && other_token < best_token);
  best = wins ? other : best;
  best_token = wins ? other_token : best_token;
}
if (thread_index % 32 == 0) {
  best_of_simdgroup[thread_index / 32] = best;
  token_of_simdgroup[thread_index / 32] = best_token;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int s = 0; s < PARTS; ++s) {
  const float other = best_of_simdgroup[s];
  const float other_token = token_of_simdgroup[s];
  const bool wins = other > best || (other == best && other_token < best_token);
  best = wins ? other : best;
  best_token = wins ? other_token : best_token;
}
const float scale = rules_in[row * 8];
if (scale == 0.0f) {
  if (thread_index == 0) token_out[row] = int(best_token);
  return;
}
const float highest = max(best, -1.0e30f);
#define DISTANCE ((highest - logit) * scale)

// Tokens whose distance has bits up to `kept` are left: first by min-p, then by top-k, then by top-p.
uint kept = f32_bits(rules_in[row * 8 + 1]);
for (int by_weight = 0; by_weight < 2; ++by_weight) {
  const float rule = rules_in[row * 8 + 2 + by_weight];
  uint limit = INFINITE;
  ulong wanted = 0;
  if (by_weight == 0) {
    if (rule < 1.0f || rule >= float(VOCAB)) continue;
    wanted = ulong(rule);
    if (int(rule) <= THREADS) {
      // The k-th of the threads' largest logits is not above the k-th of all.
      const float own = best_of[thread_index];
      int larger = 0;
      for (int i = 0; i < THREADS; ++i) larger += best_of[i] > own || (best_of[i] == own && i < thread_index) ? 1 : 0;
      if (larger == int(rule) - 1) nearest[0] = own;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      limit = f32_bits((highest - nearest[0]) * scale);
    }
  } else {
    if (rule >= 1.0f) continue;
    ulong sum = 0;
    EACH_LOGIT(thread_index * RUN, VOCAB, THREADS * RUN, {
      const float distance = DISTANCE;
      if (f32_bits(distance) <= kept) sum += weight_of(distance);
    })
    part[thread_index] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const ulong total = sum_parts<PARTS>(part, of_lane, thread_index);
    wanted = share_of(total, rule);
    // All tokens lighter than this together weigh less than what top-p leaves out.
    const float lightest = (1.0f - rule) * (float(uint(total >> 32)) / 256.0f) / float(VOCAB);
    limit = min(kept, f32_bits(max(1.0f - 1.44269504f * log_precise(lightest), 1.0f)));
  }
  uint first = 0;
  uint end = INFINITE + 1;
  uint bound = limit;
  bool linear = true;
  while (true) {
    counter_set(low_of + thread_index, 0);
    counter_set(low_of + THREADS + thread_index, 0);
    counter_set(high_of + thread_index, 0);
    counter_set(high_of + THREADS + thread_index, 0);
    if (thread_index == 0) at[0] = -1;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint shift = 0;
    while (((end - first - 1) >> shift) >= uint(BUCKETS)) ++shift;
    EACH_LOGIT(thread_index * RUN, VOCAB, THREADS * RUN, {
      const float distance = DISTANCE;
      const uint key = f32_bits(distance);
      if (key <= limit && key >= first && key < end) {
        const uint near = uint(min(distance, 31.99f) * PER_UNIT);
        const uint bucket = linear ? near : (key - first) >> shift;
        if (by_weight == 0) {
          counter_add(low_of + bucket, 1);
        } else {
          const ulong weight = weight_of(distance);
          const uint low = uint(weight);
          const uint carry = counter_add(low_of + bucket, low) + low < low ? 1 : 0;
          const uint high = uint(weight >> 32) + carry;
          if (high != 0) counter_add(high_of + bucket, high);
        }
      }
    })
    threadgroup_barrier(mem_flags::mem_threadgroup);
#define IN_BUCKET(b) ((ulong(counter_get(high_of + (b))) << 32) | ulong(counter_get(low_of + (b))))
    part[thread_index] = IN_BUCKET(2 * thread_index) + IN_BUCKET(2 * thread_index + 1);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    sum_parts<PARTS>(part, of_lane, thread_index);
    find_part<PARTS>(part, of_lane, thread_index, wanted, at, before);
    if (at[0] < 0) break;
    const ulong through = before[0] + IN_BUCKET(2 * at[0]);
    const uint bucket = uint(2 * at[0]) + (through < wanted ? 1 : 0);
    wanted -= through < wanted ? through : before[0];
    const bool whole = by_weight == 0 && IN_BUCKET(bucket) == wanted;
    if (linear) {
      first = f32_bits(float(bucket) / PER_UNIT);
      if (bucket + 1 < uint(BUCKETS)) end = f32_bits(float(bucket + 1) / PER_UNIT);
    } else {
      first += bucket << shift;
      end = min(end, first + (1u << shift));
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (whole || end - first == 1) {
      bound = min(limit, end - 1);
      break;
    }
    linear = false;
  }
  kept = min(kept, bound);
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// The first token with which the running sum of what is left passes the row's share of the total.
ulong sum = 0;
EACH_LOGIT(thread_index * SPAN, min(VOCAB, (thread_index + 1) * SPAN), RUN, {
  const float distance = DISTANCE;
  if (f32_bits(distance) <= kept) sum += weight_of(distance);
})
part[thread_index] = sum;
threadgroup_barrier(mem_flags::mem_threadgroup);
const ulong total = sum_parts<PARTS>(part, of_lane, thread_index);
if (total == 0) {
  if (thread_index == 0) token_out[row] = VOCAB - 1;
  return;
}
const ulong wanted = share_of(total, uniform_in[row]) + 1;
find_part<PARTS>(part, of_lane, thread_index, wanted, at, before);
if (thread_index < 32) {
  constexpr int PIECE = (SPAN + 31) / 32;
  const int first = at[0] * SPAN + thread_index * PIECE;
  const int end = min(min(VOCAB, (at[0] + 1) * SPAN), first + PIECE);
  ulong weight[PIECE];
  ulong own = 0;
  UNROLL for (int i = 0; i < PIECE; ++i) {
    weight[i] = 0;
    if (first + i < end) {
      const float logit = to_f32(row_in[first + i]);
      const float distance = DISTANCE;
      if (f32_bits(distance) <= kept) weight[i] = weight_of(distance);
    }
    own += weight[i];
  }
  of_lane[thread_index] = own;
  simdgroup_barrier(mem_flags::mem_threadgroup);
  ulong running = before[0];
  for (int lane = 0; lane < thread_index; ++lane) running += of_lane[lane];
  if (running < wanted && running + own >= wanted) {
    int chosen = 0;
    UNROLL for (int i = 0; i < PIECE; ++i) {
      running += weight[i];
      chosen += running < wanted ? 1 : 0;
    }
    token_out[row] = first + chosen;
  }
}
