constexpr int N = 96;
threadgroup float2 sums[32];
uint lid = thread_position_in_threadgroup.x;
const device float* row = x + threadgroup_position_in_grid.y * N;
float2 own = 0;
for (int c = lid; c < N; c += 32) own += float2(row[c], row[c] * row[c]);
sums[lid] = own;
for (uint half_size = 16; half_size > 0; half_size >>= 1) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (lid < half_size) sums[lid] += sums[lid + half_size];
}
threadgroup_barrier(mem_flags::mem_threadgroup);  // the sums are whole
float mean = sums[0].x / N, scale = rsqrt(sums[0].y / N - mean * mean + eps);
for (int c = lid; c < N; c += 32)
    out[threadgroup_position_in_grid.y * N + c] = (row[c] - mean) * scale * w[c];
