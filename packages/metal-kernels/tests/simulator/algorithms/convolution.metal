constexpr int TAPS = 5, HALO = TAPS / 2, WIDTH = 32;
threadgroup float line[WIDTH + 2 * HALO];
int lid = thread_position_in_threadgroup.x, first = threadgroup_position_in_grid.x * WIDTH;
for (int k = lid; k < WIDTH + 2 * HALO; k += WIDTH) {
    int at = first + k - HALO;
    line[k] = at >= 0 && at < n ? x[at] : 0.0f;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
float sum = 0;
for (int k = 0; k < TAPS; k++) sum += line[lid + k] * taps[k];
if (first + lid < n) out[first + lid] = sum;
