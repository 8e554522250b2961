// metal_simdgroup and metal_quadgroup: lanes publish a value and read those of the lanes that did the same.
#pragma once
#include "math.h"
#include "synchronize.h"

struct MslSlots {
  uint mask, done, unused[14];
  uchar value[32][64];
  uchar result[64];
};
extern "C" {
thread MslSlots* msl_exchange(const thread void* value, uint bytes, uint site);
uint msl_lane();
}

namespace metal {
// Metal has these functions for no 64-bit integers and not for bool.
template <class E> constexpr constant bool msl_exchangeable = is_arithmetic_v<E> && sizeof(E) <= 4 && !is_same_v<E, bool>;
#define MSL_LANES(T) template <class T, enable_if_t<msl_exchangeable<make_scalar_t<T>>, bool> = true> MSL_FN
#define MSL_PUBLISH(v) thread MslSlots* lanes = msl_exchange((const thread void*)&v, sizeof(v), site)
template <class T> MSL_FN T msl_of_lane(const thread MslSlots* lanes, uint lane) {
  return *(const thread T*)lanes->value[lane & 31];
}

#define MSL_REDUCE_LANES(first, last, combine)            \
  bool some = false;                                      \
  T r{};                                                  \
  for (uint lane = first; lane < last; lane++) {          \
    if (!(lanes->mask >> lane & 1)) continue;             \
    T x = msl_of_lane<T>(lanes, lane);                    \
    r = some ? (T)(combine) : x;                          \
    some = true;                                          \
  }
#define MSL_REDUCTION(name, combine)                      \
  MSL_LANES(T) T simd_##name(T v, uint site = MSL_SITE) { \
    MSL_PUBLISH(v);                                       \
    if (!lanes->done) {                                   \
      MSL_REDUCE_LANES(0, 32, combine)                    \
      *(thread T*)lanes->result = r;                      \
      lanes->done = 1;                                    \
    }                                                     \
    return *(const thread T*)lanes->result;               \
  }                                                       \
  MSL_LANES(T) T quad_##name(T v, uint site = MSL_SITE) { \
    MSL_PUBLISH(v);                                       \
    uint base = msl_lane() & ~3u;                         \
    MSL_REDUCE_LANES(base, base + 4, combine)             \
    return r;                                             \
  }
MSL_REDUCTION(sum, r + x) MSL_REDUCTION(product, r* x) MSL_REDUCTION(max, max(r, x)) MSL_REDUCTION(min, min(r, x))
MSL_REDUCTION(and, r& x) MSL_REDUCTION(or, r | x) MSL_REDUCTION(xor, r ^ x)

#define MSL_SCAN(name, own, start, combine)               \
  MSL_LANES(T) T simd_prefix_##name(T v, uint site = MSL_SITE) { \
    MSL_PUBLISH(v);                                       \
    T r = (T)start;                                       \
    for (uint lane = 0; lane < msl_lane() + own; lane++)  \
      if (lanes->mask >> lane & 1) r = r combine msl_of_lane<T>(lanes, lane); \
    return r;                                             \
  }
MSL_SCAN(inclusive_sum, 1, 0, +) MSL_SCAN(exclusive_sum, 0, 0, +)
MSL_SCAN(inclusive_product, 1, 1, *) MSL_SCAN(exclusive_product, 0, 1, *)

// `from` is the lane whose value the calling lane gets; beyond the SIMD-group it keeps its own.
#define MSL_SHUFFLE(name, argument, from)                                  \
  MSL_LANES(T) T simd_##name(T v, ushort argument, uint site = MSL_SITE) { \
    MSL_PUBLISH(v);                                                        \
    uint me = msl_lane();                                                  \
    (void)me;                                                              \
    uint lane = from;                                                      \
    return lane < 32 ? msl_of_lane<T>(lanes, lane) : v;                    \
  }
MSL_SHUFFLE(shuffle, source, source) MSL_SHUFFLE(broadcast, source, source) MSL_SHUFFLE(shuffle_xor, mask, me ^ mask)
MSL_SHUFFLE(shuffle_down, delta, me + delta) MSL_SHUFFLE(shuffle_up, delta, me - delta)
MSL_SHUFFLE(shuffle_rotate_down, delta, (me + delta) & 31) MSL_SHUFFLE(shuffle_rotate_up, delta, (me - delta) & 31)
MSL_LANES(T) T simd_broadcast_first(T v, uint site = MSL_SITE) {
  MSL_PUBLISH(v);
  return msl_of_lane<T>(lanes, __builtin_ctz(lanes->mask));
}

template <class T> struct msl_filled {
  T value, fill;
};
MSL_LANES(T) T simd_shuffle_and_fill_down(T v, T fill, ushort delta, ushort modulo = 32, uint site = MSL_SITE) {
  msl_filled<T> both = {v, fill};
  MSL_PUBLISH(both);
  uint base = msl_lane() / modulo * modulo, at = msl_lane() - base + delta;
  return at < modulo ? msl_of_lane<msl_filled<T>>(lanes, base + at).value
                     : msl_of_lane<msl_filled<T>>(lanes, base + at - modulo).fill;
}
MSL_LANES(T) T simd_shuffle_and_fill_up(T v, T fill, ushort delta, ushort modulo = 32, uint site = MSL_SITE) {
  msl_filled<T> both = {v, fill};
  MSL_PUBLISH(both);
  uint base = msl_lane() / modulo * modulo, at = msl_lane() - base;
  return at >= delta ? msl_of_lane<msl_filled<T>>(lanes, base + at - delta).value
                     : msl_of_lane<msl_filled<T>>(lanes, base + at + modulo - delta).fill;
}

// The same within each quad of four lanes.
#define MSL_QUAD_SHUFFLE(name, argument, from)                             \
  MSL_LANES(T) T quad_##name(T v, ushort argument, uint site = MSL_SITE) { \
    MSL_PUBLISH(v);                                                        \
    uint me = msl_lane() & 3u, base = msl_lane() & ~3u;                    \
    (void)me;                                                              \
    uint lane = from;                                                      \
    return lane < 4 ? msl_of_lane<T>(lanes, base + lane) : v;              \
  }
MSL_QUAD_SHUFFLE(shuffle, source, source) MSL_QUAD_SHUFFLE(broadcast, source, source)
MSL_QUAD_SHUFFLE(shuffle_xor, mask, me ^ mask) MSL_QUAD_SHUFFLE(shuffle_down, delta, me + delta)
MSL_QUAD_SHUFFLE(shuffle_up, delta, me - delta) MSL_QUAD_SHUFFLE(shuffle_rotate_down, delta, (me + delta) & 3)
MSL_QUAD_SHUFFLE(shuffle_rotate_up, delta, (me - delta) & 3)

struct simd_vote {
  typedef ulong vote_t;
  ulong bits_;
  MSL_FN explicit constexpr simd_vote(ulong bits) : bits_(bits) {}
  MSL_FN explicit operator vote_t() const { return bits_; }
  MSL_FN bool any() const { return bits_ != 0; }
  MSL_FN bool all() const { return bits_ == 0xffffffffu; }
};
#define MSL_VOTES                                                          \
  uint votes = 0;                                                          \
  MSL_PUBLISH(b);                                                          \
  for (uint lane = 0; lane < 32; lane++)                                   \
    if ((lanes->mask >> lane & 1) && msl_of_lane<bool>(lanes, lane)) votes |= 1u << lane;
MSL_FN simd_vote simd_ballot(bool b, uint site = MSL_SITE) { MSL_VOTES return simd_vote(votes); }
MSL_FN bool simd_any(bool b, uint site = MSL_SITE) { MSL_VOTES return votes != 0; }
MSL_FN bool simd_all(bool b, uint site = MSL_SITE) { MSL_VOTES return votes == lanes->mask; }
MSL_FN simd_vote simd_active_threads_mask(uint site = MSL_SITE) { bool b = true; MSL_VOTES return simd_vote(votes); }
MSL_FN bool simd_is_first(uint site = MSL_SITE) { bool b = true; MSL_VOTES return __builtin_ctz(votes) == msl_lane(); }
}  // namespace metal
