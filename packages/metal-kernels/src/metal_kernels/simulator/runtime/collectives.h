// SIMD-group functions and barriers: threads wait, the last one to arrive lets them all go on.
#pragma once
#include "shadow.h"

// Lets the waiting lanes of `simd` go on: all of them, or those at `site` only.
static void release_simd(SimdGroup* simd, u32 site, bool all) {
  Slots* slots = &simd->slots[simd->generation++ & 1];
  slots->mask = slots->done = 0;
  memset(slots->value, 0xFF, sizeof slots->value);
  u32 flags = 0;
  bool barrier = false;
  for (u32 lane = 0; lane < simd->lanes; lane++) {
    Thread* t = simd->thread[lane];
    if (t->state != State::at_collective || !(all || t->site == site)) continue;
    slots->mask |= 1u << lane;
    if (t->value_bytes) memcpy(slots->value[lane], t->value, t->value_bytes);
    if (t->is_barrier) flags = t->barrier_flags, barrier = true;
    t->slots = slots;
    simd->waiting--;
    make_ready(t);
  }
  if (flags & 1) simd->device_epoch++;
  if (flags & 2) simd->threadgroup_epoch++;
  simd->steps += barrier;
  report.collectives++;
}

static void try_collective(SimdGroup* simd) {
  if (!simd->waiting || simd->waiting != simd->alive) return;
  u32 site = 0;
  for (u32 lane = 0; lane < simd->lanes; lane++) {
    Thread* t = simd->thread[lane];
    if (t->state != State::at_collective) continue;
    if (site && t->site != site) return;
    site = t->site;
  }
  release_simd(simd, site, true);
}

static void report_barrier(Kind kind, u32 site, u32 other_site) {
  Fault f = fault_here(kind, 0);
  f.line = site / 1024;
  f.other_line = other_site / 1024;
  f.offset = alive;
  f.size = thread_count;
  add_fault(f);
}

static void try_barrier() {
  if (!at_barrier || at_barrier != alive) return;
  u32 site = 0, other = 0, flags = 0;
  for (u32 i = 0; i < thread_count; i++) {
    Thread& t = threads[i];
    if (t.state != State::at_barrier) continue;
    if (site && t.site != site) other = t.site;
    if (!site) site = t.site, flags = t.barrier_flags;
  }
  if (other) {
    report_barrier(Kind::divergent_barrier, site, other);
    stop_launch();
  }
  if (alive != thread_count) report_barrier(Kind::missing_threads_at_barrier, site, 0);
  if (flags & 1) device_epoch++;
  if (flags & 2) threadgroup_epoch++;
  step++;
  for (u32 i = 0; i < thread_count; i++)
    if (threads[i].state == State::at_barrier) make_ready(&threads[i]);
  at_barrier = 0;
  report.barriers++;
}

// No thread can run: lanes of a SIMD-group diverged. The earliest function runs with the lanes that called it,
// as on the GPU. With threads at a barrier too and no such lanes left, the barrier itself is at fault.
static void resolve_stall() {
  for (u32 s = 0; s * kSimdWidth < thread_count; s++) {
    SimdGroup& simd = simds[s];
    Thread* first = nullptr;
    for (u32 lane = 0; lane < simd.lanes; lane++) {
      Thread* t = simd.thread[lane];
      if (t->state == State::at_collective && (!first || t->site < first->site)) first = t;
    }
    if (!first) continue;
    report.partial_collectives++;
    return release_simd(&simd, first->site, false);
  }
  add_fault(fault_here(Kind::deadlock, 0));
  stop_launch();
}

static void run_next() {
  if (overwrite_count) judge_overwrites();
  Thread* self = current;
  Thread* next = take_ready();
  while (!next) {
    resolve_stall();
    next = take_ready();
  }
  next->state = State::running;
  next->steps = 0;
  if (next == self) return;
  report.switches++;
  current = next;
  msl_switch(&self->stack_pointer, next->stack_pointer);
}

static void thread_main() {
  entry(buffer_address, threadgroup_address, &current->context);
  if (overwrite_count) judge_overwrites();
  Thread* self = current;
  self->state = State::finished;
  alive--;
  self->simd->alive--;
  try_collective(self->simd);
  if (alive) try_barrier();
  if (!alive) {
    void* unused;
    msl_switch(&unused, launcher_stack);
  }
  run_next();
  abort();
}

extern "C" {
u32 msl_lane() { return current->lane; }

Slots* msl_exchange(const void* value, u32 bytes, u32 site) {
  Thread* t = current;
  t->site = site;
  t->value = value;
  t->value_bytes = bytes;
  t->is_barrier = false;
  t->state = State::at_collective;
  t->simd->waiting++;
  try_collective(t->simd);
  run_next();
  return t->slots;
}

void msl_simdgroup_barrier(u32 flags, u32 site) {
  Thread* t = current;
  t->site = site;
  t->barrier_flags = flags;
  t->value_bytes = 0;
  t->is_barrier = true;
  t->state = State::at_collective;
  t->simd->waiting++;
  try_collective(t->simd);
  run_next();
}

void msl_threadgroup_barrier(u32 flags, u32 site) {
  Thread* t = current;
  t->site = site;
  t->barrier_flags = flags;
  t->state = State::at_barrier;
  at_barrier++;
  try_barrier();
  run_next();
}
}
