threadgroup atomic_uint bins[16];
uint lid = thread_position_in_threadgroup.x;
if (lid < 16) atomic_store_explicit(bins + lid, 0u, memory_order_relaxed);
threadgroup_barrier(mem_flags::mem_threadgroup);
uchar value = codes[thread_position_in_grid.x];
atomic_fetch_add_explicit(&bins[value & 15], 1u, memory_order_relaxed);
threadgroup_barrier(mem_flags::mem_threadgroup);
uint count = 0;
device atomic_uint* counts = (device atomic_uint*)out;
if (lid < 16)
    count = atomic_load_explicit(&bins[lid], memory_order_relaxed);
if (lid < 16) atomic_fetch_add_explicit(&counts[lid], count, memory_order_relaxed);
