// Where the compiler's instrumentation lands: memory accesses (-fsanitize=thread), indices and divisions, basic blocks.
#pragma once
#include "shadow.h"

#define CALLER u64(__builtin_return_address(0))
#define ACCESS_HOOKS(n) \
  void __tsan_read##n(u64 a) { check_access(a, n, false, false, true, CALLER); } \
  void __tsan_write##n(u64 a) { check_access(a, n, true, false, true, CALLER); } \
  void __tsan_unaligned_read##n(u64 a) { check_access(a, n, false, false, false, CALLER); } \
  void __tsan_unaligned_write##n(u64 a) { check_access(a, n, true, false, false, CALLER); }

constexpr u64 kMaxSteps = 20'000'000;  // basic blocks one thread may run between two switches

// The part of the compiler's description of an index or a division that is used here.
struct UbsanSite {
  const char* file;
  u32 line, column;
};

static void fault_on_line(Kind kind, u32 line, u64 value) {
  Fault f = fault_here(kind, 0);
  f.line = line;
  f.offset = value;
  add_fault(f);
  stop_launch();
}

extern "C" {
ACCESS_HOOKS(1) ACCESS_HOOKS(2) ACCESS_HOOKS(4) ACCESS_HOOKS(8) ACCESS_HOOKS(16)
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_read_range(u64 a, u64 n) { check_access(a, n, false, false, false, CALLER); }
void __tsan_write_range(u64 a, u64 n) { check_access(a, n, true, false, false, CALLER); }
void* __tsan_memcpy(void* to, const void* from, u64 n) {
  check_access(u64(from), n, false, false, false, CALLER);
  check_access(u64(to), n, true, false, false, CALLER);
  return memcpy(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, u64 n) {
  check_access(u64(from), n, false, false, false, CALLER);
  check_access(u64(to), n, true, false, false, CALLER);
  return memmove(to, from, n);
}
void* __tsan_memset(void* to, int value, u64 n) {
  check_access(u64(to), n, true, false, false, CALLER);
  return memset(to, value, n);
}
void __ubsan_handle_out_of_bounds(const UbsanSite* s, u64 index) { fault_on_line(Kind::array_index, s->line, index); }
void __ubsan_handle_divrem_overflow(const UbsanSite* s, u64, u64) { fault_on_line(Kind::division_by_zero, s->line, 0); }
void __sanitizer_cov_trace_pc() {
  if (current && ++current->steps > kMaxSteps) {
    add_fault(fault_here(Kind::endless, CALLER));
    stop_launch();
  }
}
void msl_atomic_access(u64 address, u32 bytes, int kind) {
  if (!checked) return;
  if (kind != 1) check_access(address, bytes, false, true, true, CALLER);
  if (kind != 0) check_access(address, bytes, true, true, true, CALLER);
}
void msl_device_fence() {
  group_fenced = current->fenced = true;
  if (!checked) return;
  for (u32 i = 0; i < region_count; i++) {
    Region& r = regions[i];
    if (r.space != Space::buffer) continue;
    for (u64 k = 0; k < r.end - r.begin; k++)
      if (r.cells[k].write_epoch >= group_device_epoch) r.cells[k].write_fenced = 1;
  }
}
}
