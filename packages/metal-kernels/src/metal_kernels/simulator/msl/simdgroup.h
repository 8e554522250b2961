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

template <class T> MSL_FN T msl_larger(T a, T b) { return max(a, b); }
template <class T> MSL_FN T msl_smaller(T a, T b) { return min(a, b); }
MSL_FN bfloat msl_larger(bfloat a, bfloat b) { return (bfloat)max((float)a, (float)b); }
MSL_FN bfloat msl_smaller(bfloat a, bfloat b) { return (bfloat)min((float)a, (float)b); }
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
  MSL_LANES(T) T simd_##name(T v, msl_site site = MSL_SITE) { \
    MSL_PUBLISH(v);                                       \
    if (!lanes->done) {                                   \
      MSL_REDUCE_LANES(0, 32, combine)                    \
      *(thread T*)lanes->result = r;                      \
      lanes->done = 1;                                    \
    }                                                     \
    return *(const thread T*)lanes->result;               \
  }                                                       \
  MSL_LANES(T) T quad_##name(T v, msl_site site = MSL_SITE) { \
    MSL_PUBLISH(v);                                       \
    uint base = msl_lane() & ~3u;                         \
    MSL_REDUCE_LANES(base, base + 4, combine)             \
    return r;                                             \
  }
MSL_REDUCTION(sum, r + x) MSL_REDUCTION(product, r* x) MSL_REDUCTION(max, msl_larger(r, x)) MSL_REDUCTION(min, msl_smaller(r, x))
MSL_REDUCTION(and, r& x) MSL_REDUCTION(or, r | x) MSL_REDUCTION(xor, r ^ x)

#define MSL_SCAN(name, own, start, combine)               \
  MSL_LANES(T) T simd_prefix_##name(T v, msl_site site = MSL_SITE) { \
    MSL_PUBLISH(v);                                       \
    T r = (T)start;                                       \
    for (uint lane = 0; lane < msl_lane() + own; lane++)  \
      if (lanes->mask >> lane & 1) r = r combine msl_of_lane<T>(lanes, lane); \
    return r;                                             \
  }                                                       \
  MSL_LANES(T) T quad_prefix_##name(T v, msl_site site = MSL_SITE) { \
    MSL_PUBLISH(v);                                       \
    T r = (T)start;                                       \
    for (uint lane = msl_lane() & ~3u; lane < msl_lane() + own; lane++) \
      if (lanes->mask >> lane & 1) r = r combine msl_of_lane<T>(lanes, lane); \
    return r;                                             \
  }
MSL_SCAN(inclusive_sum, 1, 0, +) MSL_SCAN(exclusive_sum, 0, 0, +)
MSL_SCAN(inclusive_product, 1, 1, *) MSL_SCAN(exclusive_product, 0, 1, *)

// `from` is the lane whose value the calling lane gets; beyond the SIMD-group it keeps its own.
#define MSL_SHUFFLE(name, argument, from)                                  \
  MSL_LANES(T) T simd_##name(T v, ushort argument, msl_site site = MSL_SITE) { \
    MSL_PUBLISH(v);                                                        \
    uint me = msl_lane();                                                  \
    (void)me;                                                              \
    uint lane = from;                                                      \
    return lane < 32 ? msl_of_lane<T>(lanes, lane) : v;                    \
  }
MSL_SHUFFLE(shuffle, source, source) MSL_SHUFFLE(broadcast, source, source) MSL_SHUFFLE(shuffle_xor, mask, me ^ mask)
MSL_SHUFFLE(shuffle_down, delta, me + delta) MSL_SHUFFLE(shuffle_up, delta, me - delta)
MSL_SHUFFLE(shuffle_rotate_down, delta, (me + delta) & 31) MSL_SHUFFLE(shuffle_rotate_up, delta, (me - delta) & 31)
MSL_LANES(T) T simd_broadcast_first(T v, msl_site site = MSL_SITE) {
  MSL_PUBLISH(v);
  return msl_of_lane<T>(lanes, __builtin_ctz(lanes->mask));
}

template <class T> struct msl_filled {
  T value, fill;
};
MSL_LANES(T) T simd_shuffle_and_fill_down(T v, T fill, ushort delta, ushort modulo = 32, msl_site site = MSL_SITE) {
  msl_filled<T> both = {v, fill};
  MSL_PUBLISH(both);
  uint base = msl_lane() / modulo * modulo, at = msl_lane() - base + delta;
  return at < modulo ? msl_of_lane<msl_filled<T>>(lanes, base + at).value
                     : msl_of_lane<msl_filled<T>>(lanes, base + at - modulo).fill;
}
MSL_LANES(T) T simd_shuffle_and_fill_up(T v, T fill, ushort delta, ushort modulo = 32, msl_site site = MSL_SITE) {
  msl_filled<T> both = {v, fill};
  MSL_PUBLISH(both);
  uint base = msl_lane() / modulo * modulo, at = msl_lane() - base;
  return at >= delta ? msl_of_lane<msl_filled<T>>(lanes, base + at - delta).value
                     : msl_of_lane<msl_filled<T>>(lanes, base + at + modulo - delta).fill;
}

// The same within each quad of four lanes.
#define MSL_QUAD_SHUFFLE(name, argument, from)                             \
  MSL_LANES(T) T quad_##name(T v, ushort argument, msl_site site = MSL_SITE) { \
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

MSL_LANES(T) T quad_broadcast_first(T v, msl_site site = MSL_SITE) {
  MSL_PUBLISH(v);
  uint base = msl_lane() & ~3u;
  return msl_of_lane<T>(lanes, base + __builtin_ctz(lanes->mask >> base));
}

// Votes of a group of `size` lanes, whose bits are counted from its first lane.
template <uint SIZE> struct msl_vote {
  typedef ulong vote_t;
  ulong bits_;
  MSL_FN explicit constexpr msl_vote(ulong bits) : bits_(bits) {}
  MSL_FN explicit operator vote_t() const { return bits_; }
  MSL_FN bool any() const { return bits_ != 0; }
  MSL_FN bool all() const { return bits_ == (~0ul >> (64 - SIZE)); }
};
typedef msl_vote<32> simd_vote;
typedef msl_vote<4> quad_vote;
#define MSL_VOTING(group, first, size)                                                                              \
  MSL_FN uint msl_##group##_votes(bool b, thread uint& active, msl_site site) {                                         \
    MSL_PUBLISH(b);                                                                                                 \
    uint votes = 0, all = (uint)(~0ul >> (64 - size));                                                              \
    active = lanes->mask >> (first) & all;                                                                          \
    for (uint lane = 0; lane < size; lane++)                                                                        \
      if ((active >> lane & 1) && msl_of_lane<bool>(lanes, (first) + lane)) votes |= 1u << lane;                    \
    return votes;                                                                                                   \
  }                                                                                                                 \
  MSL_FN group##_vote group##_ballot(bool b, msl_site site = MSL_SITE) {                                                \
    uint active;                                                                                                    \
    return group##_vote(msl_##group##_votes(b, active, site));                                                      \
  }                                                                                                                 \
  MSL_FN bool group##_any(bool b, msl_site site = MSL_SITE) {                                                           \
    uint active;                                                                                                    \
    return msl_##group##_votes(b, active, site) != 0;                                                               \
  }                                                                                                                 \
  MSL_FN bool group##_all(bool b, msl_site site = MSL_SITE) {                                                           \
    uint active;                                                                                                    \
    return msl_##group##_votes(b, active, site) == active;                                                          \
  }                                                                                                                 \
  MSL_FN group##_vote group##_active_threads_mask(msl_site site = MSL_SITE) {                                           \
    uint active;                                                                                                    \
    return group##_vote(msl_##group##_votes(true, active, site));                                                   \
  }                                                                                                                 \
  MSL_FN bool group##_is_first(msl_site site = MSL_SITE) {                                                              \
    uint active;                                                                                                    \
    return (uint)__builtin_ctz(msl_##group##_votes(true, active, site)) == msl_lane() % size;                       \
  }
MSL_VOTING(simd, 0u, 32u) MSL_VOTING(quad, (msl_lane() & ~3u), 4u)
}  // namespace metal
