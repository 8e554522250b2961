// What only the processor notices, such as a private stack that is too small: the launch ends with a fault.
#pragma once
#include "shadow.h"

// glibc's layouts on x86-64.
struct SignalAction {
  void (*handler)(int, void*, void*);
  u64 mask[16];
  int flags;
  void (*restorer)();
};
struct SignalStack {
  void* memory;
  int flags;
  u64 bytes;
};
constexpr int kSegmentationFault = 11, kBusError = 7, kArithmeticFault = 8;
constexpr int kOnStack = 0x08000000, kWithInformation = 4;
constexpr u64 kStackPointer = 160, kInstructionPointer = 168;  // in a ucontext_t
constexpr u64 kHandlerBytes = 64 * 1024;

static SignalAction before_launch[3];
static SignalStack stack_before_launch;
static constexpr int kSignals[3] = {kSegmentationFault, kBusError, kArithmeticFault};

static void release_signals() {
  for (int i = 0; i < 3; i++) sigaction(kSignals[i], &before_launch[i], nullptr);
  sigaltstack(&stack_before_launch, nullptr);
}

static void on_signal(int signal, void* information, void* context) {
  if (!current) {  // not a kernel's doing: happens again, to whoever listened before
    for (int i = 0; i < 3; i++) sigaction(kSignals[i], &before_launch[i], nullptr);
    return;
  }
  u64* pc = (u64*)((u8*)context + kInstructionPointer);
  u64* stack_pointer = (u64*)((u8*)context + kStackPointer);
  Fault f = fault_here(signal == kArithmeticFault ? Kind::division_by_zero : Kind::crash, *pc + 1);
  if (signal == kArithmeticFault) f.offset = checked;  // a checked run finds zeros itself: this is an overflow
  bool in_kernel = *pc >= library_begin && *pc < library_end;
  if (!in_kernel) f.pc = 0;
  u64 address = *(u64*)((u8*)information + 16);
  u64 base = u64(current->stack);
  f.size = signal == kSegmentationFault && address < base + kGuardBytes && address >= base;
  add_fault(f);
  report.stopped = 1;
  *stack_pointer = u64(launcher_stack);
  *pc = u64(&msl_resume);
}

static u8* handler_stack;

static void catch_signals() {
  if (!handler_stack) handler_stack = (u8*)map_lazy(kHandlerBytes);
  SignalStack stack = {handler_stack, 0, kHandlerBytes};
  sigaltstack(&stack, &stack_before_launch);
  SignalAction action = {on_signal, {}, kOnStack | kWithInformation, nullptr};
  for (int i = 0; i < 3; i++) sigaction(kSignals[i], &action, &before_launch[i]);
}
