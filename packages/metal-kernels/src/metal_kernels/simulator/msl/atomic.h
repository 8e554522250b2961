// metal_atomic: device and threadgroup atomics; the only order they take is relaxed.
#pragma once
#include "synchronize.h"
#include "vectors.h"

// kind: 0 reads, 1 writes, 2 does both.
extern "C" void msl_atomic_access(ulong address, uint bytes, int kind);

namespace metal {
template <class T> struct atomic {
  static_assert(is_same_v<T, int> || is_same_v<T, uint> || is_same_v<T, bool> || is_same_v<T, float> || is_same_v<T, ulong>,
                "atomic holds int, uint, bool, float or ulong");
  T value_;
};
template <class T> using _atomic = atomic<T>;
// OpenCL declares types of these names itself.
#define atomic_int msl_atomic_int
#define atomic_uint msl_atomic_uint
#define atomic_bool msl_atomic_bool
#define atomic_float msl_atomic_float
#define atomic_ulong msl_atomic_ulong
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<bool> atomic_bool;
typedef atomic<float> atomic_float;
typedef atomic<ulong> atomic_ulong;

template <int BYTES> struct msl_word;
template <> struct msl_word<1> { typedef uchar type; };
template <> struct msl_word<4> { typedef uint type; };
template <> struct msl_word<8> { typedef ulong type; };

// Sums of floating-point numbers are for device memory only.
template <class T> constexpr constant bool msl_in_device = false;
template <class T> constexpr constant bool msl_in_device<device T> = true;

#define MSL_RELAXED(order) \
  __attribute__((diagnose_if(order != memory_order_relaxed, "atomic operations take memory_order_relaxed only", "error")))
#define MSL_WORD typedef typename msl_word<sizeof(T)>::type W
#define MSL_ATOMIC_ACCESS(write) msl_atomic_access((ulong)p, sizeof(T), write)
#define MSL_ATOMICS(SPACE)                                                                                        \
  template <class T> MSL_FN T atomic_load_explicit(const volatile SPACE atomic<T>* p, memory_order order) MSL_RELAXED(order) { \
    MSL_WORD;                                                                                                     \
    MSL_ATOMIC_ACCESS(0);                                                                                         \
    return as_type<T>(__atomic_load_n((const volatile SPACE W*)p, __ATOMIC_SEQ_CST));                             \
  }                                                                                                               \
  template <class T>                                                                                              \
  MSL_FN void atomic_store_explicit(volatile SPACE atomic<T>* p, typename msl_exactly<T>::type v, memory_order order) \
      MSL_RELAXED(order) {                                                                                        \
    MSL_WORD;                                                                                                     \
    MSL_ATOMIC_ACCESS(1);                                                                                         \
    __atomic_store_n((volatile SPACE W*)p, as_type<W>(v), __ATOMIC_SEQ_CST);                                      \
  }                                                                                                               \
  template <class T>                                                                                              \
  MSL_FN T atomic_exchange_explicit(volatile SPACE atomic<T>* p, typename msl_exactly<T>::type v, memory_order order) \
      MSL_RELAXED(order) {                                                                                        \
    MSL_WORD;                                                                                                     \
    MSL_ATOMIC_ACCESS(2);                                                                                         \
    return as_type<T>(__atomic_exchange_n((volatile SPACE W*)p, as_type<W>(v), __ATOMIC_SEQ_CST));                \
  }                                                                                                               \
  template <class T>                                                                                              \
  MSL_FN bool atomic_compare_exchange_weak_explicit(volatile SPACE atomic<T>* p, thread T* expected,              \
                                                    typename msl_exactly<T>::type v, memory_order order, memory_order) \
      MSL_RELAXED(order) {                                                                                        \
    MSL_WORD;                                                                                                     \
    MSL_ATOMIC_ACCESS(2);                                                                                         \
    W old = as_type<W>(*expected);                                                                                \
    bool done = __atomic_compare_exchange_n((volatile SPACE W*)p, &old, as_type<W>(v), false, __ATOMIC_SEQ_CST,   \
                                            __ATOMIC_SEQ_CST);                                                    \
    *expected = as_type<T>(old);                                                                                  \
    return done;                                                                                                  \
  }                                                                                                               \
  MSL_ATOMIC_FETCH(SPACE, add, a + b, msl_in_device<SPACE char>) MSL_ATOMIC_FETCH(SPACE, sub, a - b, msl_in_device<SPACE char>) \
  MSL_ATOMIC_FETCH(SPACE, min, (b < a ? b : a), false) MSL_ATOMIC_FETCH(SPACE, max, (a < b ? b : a), false)       \
  MSL_ATOMIC_FETCH(SPACE, and, a & b, false) MSL_ATOMIC_FETCH(SPACE, or, a | b, false)                            \
  MSL_ATOMIC_FETCH(SPACE, xor, a ^ b, false)
#define MSL_ATOMIC_FETCH(SPACE, name, result, for_float)                                                          \
  template <class T, enable_if_t<is_same_v<T, int> || is_same_v<T, uint> || (for_float && is_same_v<T, float>), bool> = true> \
  MSL_FN T atomic_fetch_##name##_explicit(volatile SPACE atomic<T>* p, typename msl_exactly<T>::type b, memory_order order) \
      MSL_RELAXED(order) {                                                                                        \
    MSL_WORD;                                                                                                     \
    MSL_ATOMIC_ACCESS(2);                                                                                         \
    T a = as_type<T>(__atomic_load_n((volatile SPACE W*)p, __ATOMIC_SEQ_CST));                                                                      \
    __atomic_store_n((volatile SPACE W*)p, as_type<W>((T)(result)), __ATOMIC_SEQ_CST);                            \
    return a;                                                                                                     \
  }
MSL_ATOMICS(device) MSL_ATOMICS(threadgroup)
// On 64 bits Metal has these two only, without a result.
#define MSL_ATOMIC_EXTREME(name, worse)                                                                            \
  MSL_FN void atomic_##name##_explicit(volatile device atomic_ulong* p, ulong v, memory_order order) MSL_RELAXED(order) { \
    msl_atomic_access((ulong)p, sizeof(ulong), 2);                                                                 \
    volatile device ulong* at = (volatile device ulong*)p;                                                         \
    if (__atomic_load_n(at, __ATOMIC_SEQ_CST) worse v) __atomic_store_n(at, v, __ATOMIC_SEQ_CST);                  \
  }
MSL_ATOMIC_EXTREME(min, >) MSL_ATOMIC_EXTREME(max, <)
}  // namespace metal
