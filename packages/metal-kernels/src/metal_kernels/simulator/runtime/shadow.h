// Checked mode: the record of who last wrote and read each byte, and the questions asked of it on every access.
#pragma once
#include "threads.h"

// Barriers count epochs, which never restart, so an epoch also tells which threadgroup an access belonged to.
static u32 device_epoch, threadgroup_epoch;
static u32 group_device_epoch, group_threadgroup_epoch;  // the first epochs of the running threadgroup
static u32 step, group_step;  // as epochs, of barriers with any flags: what was read before one stays read
static bool group_fenced;                                // it executed a device-scope fence
static bool checked;

struct Cell {
  u32 write_epoch, write_simd_epoch, read_step, read_simd_step;
  u32 write_group, read_group;
  u32 write_pc, read_pc, earlier_read_pc;  // from the start of the kernel library
  u16 writer, reader, earlier_reader;      // the earlier reader is another one of the same epoch
  u8 split : 1, write_atomic : 1, plain_reader : 1, many_readers : 1, many_simds : 1, many_groups : 1, write_fenced : 1;
  bool many_readers_or_simds() const { return many_readers || many_simds; }
};

struct Region {
  u64 begin, end;
  Space space;
  u32 buffer;
  Cell* cells;
  u8* written;  // one byte for each byte, null when all are initialised
};

static Region regions[kMaxBuffers + 2];
static u32 region_count;
static Region* last_region;
static u64 arena_used;

static Region* find_region(u64 address, u64 bytes) {
  Region* r = last_region;
  if (r && address >= r->begin && address + bytes <= r->end) return r;
  for (u32 i = 0; i < region_count; i++) {
    r = &regions[i];
    if (address >= r->begin && address + bytes <= r->end) return last_region = r;
  }
  return nullptr;
}

static Region* nearest_region(u64 address) {
  Region* best = nullptr;
  u64 distance = ~0ul;
  for (u32 i = 0; i < region_count; i++) {
    Region& r = regions[i];
    u64 d = address < r.begin ? r.begin - address : address < r.end ? 0 : address - r.end;
    if (d < distance) best = &r, distance = d;
  }
  return best;
}

static Fault fault_at(Kind kind, const Region* r, u64 address, u64 bytes, bool write, u64 pc) {
  Fault f = fault_here(kind, pc);
  f.space = r ? r->space : Space::none;
  f.buffer = r ? r->buffer : 0;
  f.offset = r ? address - r->begin : address;
  f.size = bytes;
  f.writes = write;
  return f;
}

struct Access {
  const Region* region;
  u64 address, bytes, pc;
  bool write, atomic;
  u32 epoch, simd_epoch, group_epoch;
};

// The kernel library: its instructions and its own read-only data.
static u64 library_begin, library_end;

// Two writes of one value do no harm: whether they are is seen when the second has happened.
struct Overwrite {
  Fault fault;
  u64 address, bytes;
  u8 before[16];
};
static Overwrite overwrites[32];
static u32 overwrite_count;

static void judge_overwrites() {
  for (u32 i = 0; i < overwrite_count; i++) {
    const Overwrite& o = overwrites[i];
    for (u64 k = 0; k < o.bytes; k++)
      if (((const u8*)o.address)[k] != o.before[k]) {
        add_fault(o.fault);
        break;
      }
  }
  overwrite_count = 0;
}

static void race(Kind kind, const Access& a, const Cell& c, bool other_wrote) {
  Fault f = fault_at(kind, a.region, a.address, a.bytes, a.write, a.pc);
  bool earlier = !other_wrote && c.many_readers_or_simds() && c.reader == current->index;
  f.other_thread = other_wrote ? c.writer : earlier ? c.earlier_reader : c.reader;
  f.other_group = other_wrote ? c.write_group : c.read_group;
  f.other_pc = library_begin + (other_wrote ? c.write_pc : earlier ? c.earlier_read_pc : c.read_pc);
  f.writes |= other_wrote << 1;
  if (f.writes != 3 || a.atomic || a.bytes > 16 || overwrite_count == 32) return add_fault(f);
  if (overwrite_count && overwrites[overwrite_count - 1].address == a.address) return;
  Overwrite& o = overwrites[overwrite_count++];
  o = {f, a.address, a.bytes, {}};
  memcpy(o.before, (const void*)a.address, a.bytes);
}

// Whether an earlier write by thread `other` may still be in flight.
static bool unordered(const Access& a, u32 other, u32 epoch, u32 simd_epoch) {
  if (other == current->index || epoch != a.epoch) return false;
  return other / kSimdWidth != current->index / kSimdWidth || simd_epoch == a.simd_epoch;
}

static void check_against_write(const Access& a, const Cell& c) {
  if (!c.write_epoch || (a.atomic && c.write_atomic)) return;
  if (c.write_epoch < a.group_epoch) {
    if (a.region->space != Space::buffer || (c.write_fenced && group_fenced)) return;
    race(Kind::race_between_threadgroups, a, c, true);
  } else if (!(c.write_fenced && current->fenced) && unordered(a, c.writer, c.write_epoch, c.write_simd_epoch)) {
    race(Kind::race_in_threadgroup, a, c, true);
  }
}

static void check_against_reads(const Access& a, const Cell& c) {
  if (!c.read_step || (a.atomic && !c.plain_reader)) return;
  if (c.many_groups || c.read_step < group_step) {
    if (a.region->space != Space::buffer || group_fenced) return;
    return race(Kind::race_between_threadgroups, a, c, false);
  }
  if (c.read_step != step) return;
  bool same_simd = c.reader / kSimdWidth == current->index / kSimdWidth;
  bool same_step = c.read_simd_step == current->simd->steps;
  bool others_read = c.many_simds || (c.many_readers && same_simd && same_step);
  if (others_read || (c.reader != current->index && (!same_simd || same_step)))
    race(Kind::race_in_threadgroup, a, c, false);
}

static void note_write(const Access& a, Cell& c) {
  c.write_epoch = a.epoch;
  c.write_simd_epoch = a.simd_epoch;
  c.write_group = group_index;
  c.write_pc = u32(a.pc - library_begin);
  c.writer = u16(current->index);
  c.write_atomic = a.atomic;
  c.write_fenced = 0;
}

static void note_read(const Access& a, Cell& c) {
  bool same_group = c.read_step >= group_step;
  if (c.read_step && !same_group && a.region->space == Space::buffer) c.many_groups = 1;
  bool same_epoch = c.read_step == step;
  if (!same_epoch) c.many_readers = c.many_simds = 0;
  if (!c.many_groups && !same_epoch) c.plain_reader = 0;
  if (same_epoch && c.reader / kSimdWidth != current->index / kSimdWidth) c.many_simds = 1;
  else if (same_epoch && c.read_simd_step == current->simd->steps && c.reader != current->index) c.many_readers = 1;
  else if (same_epoch && c.read_simd_step != current->simd->steps) c.many_readers = 0;
  if (same_epoch && c.reader != current->index) c.earlier_reader = c.reader, c.earlier_read_pc = c.read_pc;
  c.read_step = step;
  c.read_simd_step = current->simd->steps;
  c.read_group = group_index;
  c.read_pc = u32(a.pc - library_begin);
  c.reader = u16(current->index);
  if (!a.atomic) c.plain_reader = 1;
}

static void visit(const Access& a, Cell& c) {
  check_against_write(a, c);
  if (!a.write) return note_read(a, c);
  check_against_reads(a, c);
  note_write(a, c);
}

static void check_written(const Access& a) {
  u8* written = a.region->written + (a.address - a.region->begin);
  if (a.write) {
    memset(written, 1, a.bytes);
    return;
  }
  for (u64 i = 0; i < a.bytes; i++)
    if (!written[i]) {
      add_fault(fault_at(Kind::uninitialised_read, a.region, a.address, a.bytes, false, a.pc));
      memset(written, 1, a.bytes);
      return;
    }
}

// Cells describe single bytes, but the first of four stands for all while nobody accessed less.
static void visit_cells(const Access& a) {
  u64 offset = a.address - a.region->begin, end = offset + a.bytes;
  while (offset < end) {
    Cell* word = a.region->cells + (offset & ~3ul);
    if (!word->split && offset % 4 == 0 && end - offset >= 4) {
      visit(a, *word);
      offset += 4;
      continue;
    }
    if (!word->split) {
      word->split = 1;
      for (int i = 1; i < 4; i++) word[i] = word[0];
    }
    visit(a, word[offset & 3]);
    offset++;
  }
}

static bool is_private(u64 address) {
  u64 stack = u64(current->stack);
  return address >= stack && address < stack + kStackBytes;
}

// Threads publish values for SIMD-group functions in the executor's own memory.
static bool is_executor(u64 address) {
  auto inside = [&](const void* p, u64 bytes) { return address >= u64(p) && address < u64(p) + bytes; };
  return inside(threads, sizeof threads) || inside(simds, sizeof simds) || inside(buffer_address, sizeof buffer_address) ||
         inside(threadgroup_address, sizeof threadgroup_address);
}

static void check_access(u64 address, u64 bytes, bool write, bool atomic, bool aligned, u64 pc) {
  if (overwrite_count) judge_overwrites();
  if (!current || !checked || is_private(address) || is_executor(address)) return;
  if (address >= library_begin && address < library_end) return;
  report.accesses++;
  Region* r = find_region(address, bytes);
  if (!r || (r->space == Space::threadgroup && address + bytes > r->begin + arena_used)) {
    add_fault(fault_at(write ? Kind::out_of_bounds_write : Kind::out_of_bounds_read, nearest_region(address), address, bytes, write, pc));
    stop_launch();
  }
  if (aligned && address % bytes) {
    // The processor itself may refuse the access.
    add_fault(fault_at(Kind::misaligned, r, address, bytes, write, pc));
    stop_launch();
  }
  bool device = r->space == Space::buffer;
  SimdGroup* simd = current->simd;
  Access a = {r, address, bytes, pc, write, atomic, device ? device_epoch : threadgroup_epoch,
              device ? simd->device_epoch : simd->threadgroup_epoch, device ? group_device_epoch : group_threadgroup_epoch};
  if (r->written) check_written(a);
  visit_cells(a);
}
