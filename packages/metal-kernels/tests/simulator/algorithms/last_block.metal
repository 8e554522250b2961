threadgroup uint last;
uint lid = thread_position_in_threadgroup.x, group = threadgroup_position_in_grid.x;
device float* partial = out + 1;
float sum = simd_sum(x[thread_position_in_grid.x]);
if (lid == 0) {
    partial[group] = sum;
    atomic_thread_fence(mem_flags::mem_device, memory_order_seq_cst, thread_scope_device);
    last = atomic_fetch_add_explicit((device atomic_uint*)out, 1u, memory_order_relaxed) + 1;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (last == threadgroups_per_grid.x) {
    atomic_thread_fence(mem_flags::mem_device, memory_order_seq_cst, thread_scope_device);
    float total = simd_sum(lid < last ? partial[lid] : 0.0f);
    if (lid == 0) partial[last] = total;
}
