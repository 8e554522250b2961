// Barriers, fences and their flags.
#pragma once
#include "types.h"

extern "C" {
void msl_threadgroup_barrier(uint flags, uint site);
void msl_simdgroup_barrier(uint flags, uint site);
void msl_device_fence();
ulong msl_threadgroup_variable(uint id, ulong bytes, ulong alignment);
}
namespace metal {
// One place of the kernel: lines of a flattened unit are unique. A type of its own, so that no argument is one.
struct msl_site {
  uint value;
  MSL_FN explicit constexpr msl_site(uint v) : value(v) {}
  MSL_FN operator uint() const { return value; }
};
#define MSL_SITE metal::msl_site(__builtin_LINE() * 1024u + __builtin_COLUMN() % 1024u)

enum class mem_flags : uint {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
  mem_object_data = 16
};
MSL_FN constexpr mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((uint)a | (uint)b); }
MSL_FN constexpr mem_flags operator&(mem_flags a, mem_flags b) { return (mem_flags)((uint)a & (uint)b); }
enum memory_order {
  memory_order_relaxed = 0,
#if __METAL_VERSION__ >= 320
  memory_order_acquire = 2,
  memory_order_release = 3,
  memory_order_acq_rel = 4,
  memory_order_seq_cst = 5,
#endif
};

MSL_FN void threadgroup_barrier(mem_flags flags, msl_site site = MSL_SITE) { msl_threadgroup_barrier((uint)flags, site); }
MSL_FN void simdgroup_barrier(mem_flags flags, msl_site site = MSL_SITE) { msl_simdgroup_barrier((uint)flags, site); }
#if __METAL_VERSION__ >= 320
enum thread_scope { thread_scope_thread = 0, thread_scope_threadgroup = 1, thread_scope_device = 2, thread_scope_simdgroup = 4 };
MSL_FN void atomic_thread_fence(mem_flags flags, memory_order, thread_scope scope = thread_scope_device) {
  if (((uint)flags & 1) && scope != thread_scope_thread && scope != thread_scope_threadgroup && scope != thread_scope_simdgroup) msl_device_fence();
}
#endif

// A threadgroup variable of a kernel: the pre-pass numbers them.
template <class T, uint ID, ulong ALIGNMENT> MSL_FN threadgroup T& msl_threadgroup() {
  return *(threadgroup T*)msl_threadgroup_variable(ID, sizeof(T), ALIGNMENT > alignof(T) ? ALIGNMENT : alignof(T));
}
}  // namespace metal
