// Runs one kernel launch: every threadgroup in turn, its threads as fibers.
#include "collectives.h"
#include "hooks.h"
#include "signals.h"

struct Buffer {
  u64 address, bytes;
  u32 initialised, must_write;
};

struct Launch {
  Entry entry;
  const Buffer* buffers;
  u32 buffer_count;
  u32 grid[3], threadgroup[3];
  u32 order, checked, max_threads, poison;
  u64 seed, library_begin, library_end;
};

struct Variable {
  u64 offset;
  bool placed;
};

static u8* arena;
static u8* stacks;
static Variable variables[kMaxVariables];

extern "C" u64 msl_threadgroup_variable(u32 id, u64 bytes, u64 alignment) {
  if (id >= kMaxVariables) abort();
  Variable& v = variables[id];
  if (v.placed) return u64(arena) + v.offset;
  u64 offset = (arena_used + alignment - 1) / alignment * alignment;
  v = {offset, true};
  arena_used = offset + bytes;
  if (arena_used > kThreadgroupLimit) {
    Fault f = fault_here(Kind::threadgroup_memory, u64(__builtin_return_address(0)));
    f.offset = arena_used;
    f.size = kThreadgroupLimit;
    add_fault(f);
    stop_launch();
  }
  return u64(arena) + offset;
}

static Cell* map_cells(u64 bytes) { return (Cell*)map_lazy((bytes + 4) * sizeof(Cell)); }

static void open_regions(const Launch& l) {
  region_count = 0;
  last_region = nullptr;
  for (u32 i = 0; i < l.buffer_count; i++) {
    const Buffer& b = l.buffers[i];
    u8* written = b.initialised ? nullptr : (u8*)map_lazy(b.bytes + 1);
    regions[region_count++] = {b.address, b.address + b.bytes, Space::buffer, i, map_cells(b.bytes), written};
  }
  regions[region_count++] = {u64(arena), u64(arena) + kArenaBytes, Space::threadgroup, 0, map_cells(kArenaBytes), (u8*)map_lazy(kArenaBytes)};
}

static void report_unwritten(const Launch& l) {
  for (u32 i = 0; i < l.buffer_count; i++) {
    if (!regions[i].written || !l.buffers[i].must_write) continue;
    u64 missing = 0, bytes = l.buffers[i].bytes, first = 0;
    for (u64 k = bytes; k-- > 0;)
      if (!regions[i].written[k]) missing++, first = k;
    if (!missing) continue;
    Fault f = {};
    f.kind = Kind::never_written;
    f.space = Space::buffer;
    f.buffer = i;
    f.offset = first;
    f.size = missing;
    add_fault(f);
  }
}

static void close_regions() {
  for (u32 i = 0; i < region_count; i++) {
    u64 bytes = regions[i].end - regions[i].begin;
    munmap(regions[i].cells, (bytes + 4) * sizeof(Cell));
    if (regions[i].written) munmap(regions[i].written, bytes + (regions[i].space == Space::buffer));
  }
}

struct Shape {
  u32 threadgroup[3], groups[3], largest;
};

static void start_thread(Thread& t, u32 i, const Uint3& group, const u32 size[3], const Launch& l, const Shape& shape) {
  u32 x = i % size[0], y = i / size[0] % size[1], z = i / (size[0] * size[1]);
  const u32* tg = shape.threadgroup;
  t.index = i;
  t.lane = i % kSimdWidth;
  t.simd = &simds[i / kSimdWidth];
  t.simd->thread[t.lane] = &t;
  t.stack = stacks + i * kStackBytes;
  t.steps = 0;
  t.fenced = false;
  Context& c = t.context;
  c.thread_position_in_threadgroup = {x, y, z};
  c.threadgroup_position_in_grid = group;
  c.thread_position_in_grid = {group.x * tg[0] + x, group.y * tg[1] + y, group.z * tg[2] + z};
  c.threads_per_grid = c.grid_size = {l.grid[0], l.grid[1], l.grid[2]};
  c.threads_per_threadgroup = {size[0], size[1], size[2]};
  c.dispatch_threads_per_threadgroup = {tg[0], tg[1], tg[2]};
  c.threadgroups_per_grid = {shape.groups[0], shape.groups[1], shape.groups[2]};
  c.grid_origin = {0, 0, 0};
  c.thread_index_in_threadgroup = i;
  c.thread_index_in_simdgroup = t.lane;
  c.simdgroup_index_in_threadgroup = i / kSimdWidth;
  c.simdgroups_per_threadgroup = (thread_count + kSimdWidth - 1) / kSimdWidth;
  c.threads_per_simdgroup = c.thread_execution_width = kSimdWidth;
  c.quadgroup_index_in_threadgroup = i / 4;
  c.quadgroups_per_threadgroup = (thread_count + 3) / 4;
  c.thread_index_in_quadgroup = i % 4;
  c.dispatch_simdgroups_per_threadgroup = (shape.largest + kSimdWidth - 1) / kSimdWidth;
  c.dispatch_quadgroups_per_threadgroup = (shape.largest + 3) / 4;
  u64* top = (u64*)(t.stack + kStackBytes - 64);
  *--top = 0;
  *--top = u64(&thread_main);
  for (int k = 0; k < 6; k++) *--top = 0;
  t.stack_pointer = top;
  make_ready(&t);
}

static void run_group(u32 index, const Launch& l, const Shape& shape) {
  const u32* g = shape.groups;
  Uint3 group = {index % g[0], index / g[0] % g[1], index / (g[0] * g[1])};
  u32 at[3] = {group.x, group.y, group.z}, size[3];
  for (int i = 0; i < 3; i++) size[i] = lesser(shape.threadgroup[i], l.grid[i] - at[i] * shape.threadgroup[i]);
  group_index = index;
  thread_count = alive = size[0] * size[1] * size[2];
  at_barrier = ready_head = ready_tail = 0;
  group_device_epoch = ++device_epoch;
  group_threadgroup_epoch = ++threadgroup_epoch;
  group_step = ++step;
  group_fenced = false;
  if (checked) memset(regions[region_count - 1].written, 0, kThreadgroupLimit);
  memset(arena, int(l.poison), kThreadgroupLimit);
  arena_used = 0;
  for (Variable& v : variables) v.placed = false;
  for (u32 s = 0; s * kSimdWidth < thread_count; s++) {
    SimdGroup& simd = simds[s];
    simd.generation = simd.waiting = simd.device_epoch = simd.threadgroup_epoch = simd.steps = 0;
    simd.lanes = simd.alive = lesser(kSimdWidth, thread_count - s * kSimdWidth);
  }
  for (u32 i = 0; i < thread_count; i++) start_thread(threads[i], i, group, size, l, shape);
  current = take_ready();
  current->state = State::running;
  msl_switch(&launcher_stack, current->stack_pointer);
  current = nullptr;
  report.threads += thread_count;
}

static void run_groups(const Launch& l, const Shape& shape) {
  u32 total = shape.groups[0] * shape.groups[1] * shape.groups[2];
  u32* sequence = (u32*)map_lazy(total * sizeof(u32));
  for (u32 i = 0; i < total; i++) sequence[i] = order == Order::reversed ? total - 1 - i : i;
  if (order == Order::shuffled)
    for (u32 i = total; i > 1; i--) exchange(sequence[i - 1], sequence[next_random() % i]);
  for (u32 i = 0; i < total && !report.stopped; i++) run_group(sequence[i], l, shape);
  munmap(sequence, total * sizeof(u32));
}

static bool measure(const Launch& l, Shape& shape) {
  u64 largest = 1;
  for (int i = 0; i < 3; i++) {
    shape.threadgroup[i] = lesser(l.threadgroup[i], l.grid[i]);
    if (!shape.threadgroup[i]) return false;
    shape.groups[i] = (l.grid[i] + shape.threadgroup[i] - 1) / shape.threadgroup[i];
    largest *= shape.threadgroup[i];
  }
  shape.largest = u32(largest);
  if (largest <= l.max_threads) return true;
  Fault f = {};
  f.kind = Kind::too_many_threads;
  f.offset = largest;
  f.size = l.max_threads;
  add_fault(f);
  return false;
}

extern "C" {
void msl_launch(const Launch* l, Report* out) {
  memset(&report, 0, sizeof report);
  entry = l->entry;
  order = Order(l->order);
  checked = l->checked;
  random_state = l->seed * 2654435761u + 88172645463325252ull;
  library_begin = l->library_begin;
  library_end = l->library_end;
  device_epoch = threadgroup_epoch = step = 1;
  overwrite_count = 0;
  if (!arena) arena = (u8*)map_lazy(kArenaBytes);
  if (!stacks) {
    stacks = (u8*)map_lazy(kMaxThreads * kStackBytes);
    for (u32 i = 0; i < kMaxThreads; i++) mprotect(stacks + i * kStackBytes, kGuardBytes, 0);
  }
  for (u32 i = 0; i < l->buffer_count; i++) buffer_address[i] = l->buffers[i].address;
  Shape shape = {};
  if (checked) open_regions(*l);
  catch_signals();
  if (measure(*l, shape)) run_groups(*l, shape);
  release_signals();
  if (checked && !report.stopped && !report.fault_count) report_unwritten(*l);
  if (checked) close_regions();
  *out = report;
}

// Memory with an unmapped gap on both sides, so that a wild index cannot meet another buffer.
u64 msl_map(u64 bytes, u64 gap) {
  u64 rounded = (bytes + 4095) / 4096 * 4096 + 4096;
  void* p = mmap(nullptr, rounded + 2 * gap, 0, kPrivateLazy, -1, 0);
  if (p == (void*)-1) return 0;
  mprotect((u8*)p + gap, rounded, kReadWrite);
  return u64(p) + gap;
}
void msl_unmap(u64 address, u64 bytes, u64 gap) {
  munmap((void*)(address - gap), (bytes + 4095) / 4096 * 4096 + 4096 + 2 * gap);
}

// The compiler calls this to round a float to bfloat: to nearest, ties to even.
__bf16 __truncsfbf2(float value) {
  u32 bits = __builtin_bit_cast(u32, value);
  u32 rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  if ((bits & 0x7FFFFFFF) > 0x7F800000) rounded = (bits >> 16) | 0x40;
  return __builtin_bit_cast(__bf16, u16(rounded));
}
}
