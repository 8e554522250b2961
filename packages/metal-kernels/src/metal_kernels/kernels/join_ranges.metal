// Joins the ranges of one row and query head. A threadgroup per row and head, a thread per dimension.
// Scores are in units of log2. A row without ranges is zero.
const int row = int(threadgroup_position_in_grid.x) / Q_HEADS;
const int head = int(threadgroup_position_in_grid.x) % Q_HEADS;
const int first = ranges_in[row * 2];
const int last = first + ranges_in[row * 2 + 1];
float highest = SINKS ? sinks_in[head] * 1.44269504f : -3.0e38f;
for (int work = first; work < last; ++work) highest = max(highest, partial_stats[(long(work) * Q_HEADS + head) * 2]);
for (int i = int(thread_position_in_threadgroup.x); i < HEAD_SIZE; i += THREADS) {
  float total = SINKS ? exp2_fast(sinks_in[head] * 1.44269504f - highest) : 0.0f;
  float value = 0.0f;
  for (int work = first; work < last; ++work) {
    const long at = long(work) * Q_HEADS + head;
    const float weight = exp2_fast(partial_stats[at * 2] - highest);
    total += weight * partial_stats[at * 2 + 1];
    value += weight * partial_out[at * HEAD_SIZE + i];
  }
  out[(long(row) * ROW_STEP + head * HEAD_STEP) * HEAD_SIZE + i] = from_f32<T>(total > 0.0f ? value / total : 0.0f);
}
