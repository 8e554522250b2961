// What a launch tells its caller: counters, and one record for each distinct fault.
#pragma once
#include "base.h"

// The same order as FaultKind in report.py.
enum class Kind : u32 {
  out_of_bounds_read, out_of_bounds_write, misaligned, uninitialised_read, race_in_threadgroup, race_between_threadgroups,
  divergent_barrier, threadgroup_memory, too_many_threads, never_written, array_index, division_by_zero, endless, deadlock,
  missing_threads_at_barrier, crash,
};

enum class Space : u32 { none, buffer, threadgroup };

struct Fault {
  Kind kind;
  u32 line;          // of the flattened unit; 0: look up `pc`
  u64 pc, other_pc;  // of the two accesses of a race
  Space space;
  u32 buffer;
  u64 offset, size;  // bytes; for counting faults: how many, out of how many
  u32 thread, group, other_thread, other_group;
  u32 other_line;
  u32 writes;        // bit 0: this access writes, bit 1: the other one did
};

constexpr u32 kMaxFaults = 16;

struct Report {
  u64 switches, collectives, barriers, partial_collectives, threads, accesses;
  u32 fault_count, stopped;
  Fault faults[kMaxFaults];
};

static Report report;

// Records `fault` unless the same place already has one of its kind.
static void add_fault(const Fault& fault) {
  for (u32 i = 0; i < report.fault_count; i++) {
    const Fault& f = report.faults[i];
    if (f.kind == fault.kind && f.pc == fault.pc && f.line == fault.line && f.buffer == fault.buffer) return;
  }
  if (report.fault_count < kMaxFaults) report.faults[report.fault_count++] = fault;
}
