threadgroup float buffer[2][64];
uint lid = thread_position_in_threadgroup.x, from = 0;
buffer[0][lid] = x[thread_position_in_grid.x];
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint step = 1; step < 64; step *= 2) {
    float v = buffer[from][lid];
    if (lid >= step) v += buffer[from][lid - step];
    from = 1 - from;
    buffer[from][lid] = v;
    threadgroup_barrier(mem_flags::mem_threadgroup);
}
out[thread_position_in_grid.x] = buffer[from][lid];
