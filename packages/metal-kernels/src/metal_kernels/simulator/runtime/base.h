// The few C functions and types that the executor needs: it is compiled without any standard header.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long;

extern "C" {
void* mmap(void* address, u64 length, int protection, int flags, int fd, long offset);
int munmap(void* address, u64 length);
int mprotect(void* address, u64 length, int protection);
void* memcpy(void*, const void*, u64);
void* memmove(void*, const void*, u64);
void* memset(void*, int, u64);
[[noreturn]] void abort();
int sigaction(int signal, const void* action, void* before);
int sigaltstack(const void* stack, void* before);
}

constexpr int kReadWrite = 3;           // PROT_READ | PROT_WRITE
constexpr int kPrivateLazy = 0x4022;    // MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE

constexpr u32 kMaxThreads = 1024;       // per threadgroup
constexpr u32 kSimdWidth = 32;
constexpr u32 kMaxBuffers = 31;
constexpr u32 kMaxVariables = 256;      // threadgroup variables of one kernel
constexpr u64 kStackBytes = 256 * 1024; // private memory of one thread
constexpr u64 kGuardBytes = 4096;        // at the lower end of each stack, not accessible
constexpr u64 kArenaBytes = 1 << 20;    // more than the limit, so that an overflow can be reported, not suffered
constexpr u64 kThreadgroupLimit = 32768;

inline void* map_lazy(u64 bytes) { return mmap(nullptr, bytes, kReadWrite, kPrivateLazy, -1, 0); }
template <class T> inline T lesser(T a, T b) { return b < a ? b : a; }
template <class T> inline void exchange(T& a, T& b) { T t = a; a = b; b = t; }
