constexpr uint WIDTH = 50, SIMDS = 2;
threadgroup float shared[SIMDS];
uint row = threadgroup_position_in_grid.x, lid = thread_index_in_threadgroup;
uint lane = thread_index_in_simdgroup, sg = simdgroup_index_in_threadgroup;
float v = lid < WIDTH ? x[row * WIDTH + lid] : -INFINITY;
float best = simd_max(v);
if (lane == 0) shared[sg] = best;
threadgroup_barrier(mem_flags::mem_threadgroup);
best = max(shared[0], shared[1]);
threadgroup_barrier(mem_flags::mem_threadgroup);  // every thread has read
float e = metal::fast::exp(v - best), total = simd_sum(e);
if (simd_is_first()) shared[sg] = total;
threadgroup_barrier(mem_flags::mem_threadgroup);
total = simd_sum(lane < SIMDS ? shared[lane] : 0.0f);
if (lid < WIDTH) out[row * WIDTH + lid] = e / total;
