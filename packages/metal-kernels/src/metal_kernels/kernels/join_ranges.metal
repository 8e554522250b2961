// Joins the ranges of one row and query head. A threadgroup per row and head: its SIMD-groups take turns on ranges, and a
// lane has four neighbouring dimensions at a time. Scores are in units of log2. A row without ranges is zero.
constexpr int CHUNKS = (HEAD_SIZE + 127) / 128;
constexpr int RANGES = 2;  // that a lane loads before it uses one
THREADGROUP_ARRAY(float, all_out, SIMDGROUPS * HEAD_SIZE);
THREADGROUP_ARRAY(float, all_sum, SIMDGROUPS);
const int row = int(threadgroup_position_in_grid.x) / Q_HEADS;
const int head = int(threadgroup_position_in_grid.x) % Q_HEADS;
const int lane = int(thread_index_in_simdgroup);
const int simdgroup_index = int(simdgroup_index_in_threadgroup);
const int first = ranges_in[row * 2];
const int last = first + ranges_in[row * 2 + 1] - 1;
float highest = SINKS ? sinks_in[head] * 1.44269504f : -3.0e38f;
for (int work = first + lane; work <= last; work += 32) {
  highest = max(highest, partial_stats[(long(work) * Q_HEADS + head) * 2]);
}
UNROLL for (int step = 16; step > 0; step /= 2) highest = max(highest, simd_shuffle_xor(highest, step));
float total = 0.0f;
float joined[CHUNKS][4];
UNROLL for (int c = 0; c < CHUNKS; ++c) {
  UNROLL for (int i = 0; i < 4; ++i) joined[c][i] = 0.0f;
}
for (int work = first + simdgroup_index; work <= last; work += RANGES * SIMDGROUPS) {
  float weight[RANGES];
  float value[RANGES][CHUNKS][4];
  UNROLL for (int r = 0; r < RANGES; ++r) {
    const long at = long(min(work + r * SIMDGROUPS, last)) * Q_HEADS + head;
    weight[r] = work + r * SIMDGROUPS <= last ? exp2_fast(partial_stats[at * 2] - highest) : 0.0f;
    total += weight[r] * partial_stats[at * 2 + 1];
    UNROLL for (int c = 0; c < CHUNKS; ++c) {
      load_f32<4>(partial_out + at * HEAD_SIZE + min(c * 128 + lane * 4, HEAD_SIZE - 4), value[r][c]);
    }
  }
  UNROLL for (int r = 0; r < RANGES; ++r) {
    UNROLL for (int c = 0; c < CHUNKS; ++c) {
      UNROLL for (int i = 0; i < 4; ++i) joined[c][i] += weight[r] * value[r][c][i];
    }
  }
}
UNROLL for (int c = 0; c < CHUNKS; ++c) {
  if (c * 128 + lane * 4 < HEAD_SIZE) {
    UNROLL for (int i = 0; i < 4; ++i) all_out[simdgroup_index * HEAD_SIZE + c * 128 + lane * 4 + i] = joined[c][i];
  }
}
if (lane == 0) all_sum[simdgroup_index] = total;
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int i = int(thread_position_in_threadgroup.x); i < HEAD_SIZE; i += SIMDGROUPS * 32) {
  float sum = SINKS ? exp2_fast(sinks_in[head] * 1.44269504f - highest) : 0.0f;
  float value = 0.0f;
  for (int s = 0; s < SIMDGROUPS; ++s) {
    sum += all_sum[s];
    value += all_out[s * HEAD_SIZE + i];
  }
  out[(long(row) * Q_HEADS + head) * HEAD_SIZE + i] = from_f32<T>(sum > 0.0f ? value / sum : 0.0f);
}
