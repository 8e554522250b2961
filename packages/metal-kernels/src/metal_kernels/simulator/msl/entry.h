// Everything, and how a generated entry point passes arguments to a kernel.
#pragma once
#include "mlx_builtins.h"

struct MslPointer {
  ulong address;
  template <class T> MSL_FN operator device T*() const { return (device T*)address; }
  template <class T> MSL_FN operator constant T*() const { return (constant T*)address; }
  template <class T> MSL_FN operator threadgroup T*() const { return (threadgroup T*)address; }
};
struct MslReference {
  ulong address;
  template <class T> MSL_FN operator device T&() const { return *(device T*)address; }
  template <class T> MSL_FN operator constant T&() const { return *(constant T*)address; }
  template <class T> MSL_FN operator threadgroup T&() const { return *(threadgroup T*)address; }
};
struct MslUint3 {
  uint x, y, z;
  MSL_FN operator uint() const { return x; }
  MSL_FN operator ushort() const { return x; }
  MSL_FN operator uint2() const { return metal::msl_make<uint2>(x, y); }
  MSL_FN operator uint3() const { return metal::msl_make<uint3>(x, y, z); }
  MSL_FN operator ushort2() const { return metal::msl_make<ushort2>(x, y); }
  MSL_FN operator ushort3() const { return metal::msl_make<ushort3>(x, y, z); }
};
// Layout shared with Context in runtime/threads.h.
struct MslContext {
  MslUint3 thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid, threads_per_grid,
      threads_per_threadgroup, threadgroups_per_grid, dispatch_threads_per_threadgroup, grid_size, grid_origin;
  uint thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup, simdgroups_per_threadgroup,
      threads_per_simdgroup, thread_execution_width, quadgroup_index_in_threadgroup, quadgroups_per_threadgroup,
      thread_index_in_quadgroup, dispatch_simdgroups_per_threadgroup, dispatch_quadgroups_per_threadgroup;
};
