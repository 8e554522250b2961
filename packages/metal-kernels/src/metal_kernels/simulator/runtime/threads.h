// GPU threads as fibers: each has its own stack and runs until a barrier or a SIMD-group function.
#pragma once
#include "report.h"

struct Uint3 { u32 x, y, z; };

// Layout shared with MslContext in msl/entry.h.
struct Context {
  Uint3 thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid, threads_per_grid,
      threads_per_threadgroup, threadgroups_per_grid, dispatch_threads_per_threadgroup, grid_size, grid_origin;
  u32 thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup, simdgroups_per_threadgroup,
      threads_per_simdgroup, thread_execution_width, quadgroup_index_in_threadgroup, quadgroups_per_threadgroup,
      thread_index_in_quadgroup, dispatch_simdgroups_per_threadgroup, dispatch_quadgroups_per_threadgroup;
};

// Layout shared with MslSlots in msl/runtime.h: what the lanes of one SIMD-group published.
struct Slots {
  u32 mask, done, unused[14];
  u8 value[kSimdWidth][64];
  u8 result[64];
};

enum class State : u32 { ready, running, at_collective, at_barrier, finished };

struct SimdGroup;

struct Thread {
  void* stack_pointer;
  u8* stack;
  Context context;
  SimdGroup* simd;
  u32 lane, index;
  State state;
  u32 site;          // line * 1024 + column of the collective or barrier it waits at
  u32 barrier_flags;
  bool is_barrier;   // the collective is a simdgroup_barrier
  bool fenced;       // it executed a device-scope fence
  const void* value;
  u32 value_bytes;
  Slots* slots;
  u64 steps;         // basic blocks since it was last switched in
};

struct SimdGroup {
  Slots slots[2];
  u32 generation, waiting, alive, lanes;
  u32 device_epoch, threadgroup_epoch;  // simdgroup_barriers that ordered each kind of memory
  u32 steps;                            // simdgroup_barriers of any kind
  Thread* thread[kSimdWidth];
};

enum class Order : u32 { ordered, reversed, shuffled };

using Entry = void (*)(const u64* buffers, const u64* threadgroup_buffers, const Context* context);

static Thread threads[kMaxThreads];
static SimdGroup simds[kMaxThreads / kSimdWidth];
static u16 ready[kMaxThreads];
static u32 ready_head, ready_tail;     // a ring: at most one entry a thread
static u32 thread_count, alive, at_barrier;
static Thread* current;
static void* launcher_stack;
static Entry entry;
static Order order;
static u64 random_state;
static u64 buffer_address[kMaxBuffers + 1];
static u64 threadgroup_address[kMaxBuffers + 1];
static u32 group_index;

extern "C" {
void msl_switch(void** save, void* load);
void msl_resume();  // continues what msl_switch saved, from a stack pointer that is already there
}
asm(R"(.text
.globl msl_switch
.type msl_switch,@function
msl_switch:
 pushq %rbp
 pushq %rbx
 pushq %r12
 pushq %r13
 pushq %r14
 pushq %r15
 movq %rsp, (%rdi)
 movq %rsi, %rsp
.globl msl_resume
msl_resume:
 popq %r15
 popq %r14
 popq %r13
 popq %r12
 popq %rbx
 popq %rbp
 ret
.size msl_switch,.-msl_switch
)");

static u64 next_random() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

static void make_ready(Thread* t) {
  t->state = State::ready;
  ready[ready_tail++ % kMaxThreads] = u16(t - threads);
}

static Thread* take_ready() {
  if (ready_head == ready_tail) return nullptr;
  if (order == Order::reversed) return &threads[ready[--ready_tail % kMaxThreads]];
  if (order == Order::shuffled) {
    u32 pick = ready_head + u32(next_random() % (ready_tail - ready_head));
    exchange(ready[pick % kMaxThreads], ready[ready_head % kMaxThreads]);
  }
  return &threads[ready[ready_head++ % kMaxThreads]];
}

static Fault fault_here(Kind kind, u64 pc) {
  Fault f = {};
  f.kind = kind;
  f.pc = pc;
  f.thread = current ? current->index : 0;
  f.group = group_index;
  return f;
}

// Gives up on the whole launch; no fiber runs again.
[[noreturn]] static void stop_launch() {
  report.stopped = 1;
  void* unused;
  msl_switch(&unused, launcher_stack);
  abort();
}
