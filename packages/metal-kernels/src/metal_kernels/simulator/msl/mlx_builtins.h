// The compiler builtins that MLX's own headers name directly, and metal_logging and uniforms.
#pragma once
#include "atomic.h"
#include "matrix.h"
#include "pack.h"
#include "simdgroup_matrix.h"

#define __METAL_MAYBE_FAST_MATH__ false
#define __METAL_FAST_MATH__ true
#define __METAL_PRECISE_MATH__ false

namespace msl_builtins {
using namespace metal;
#define MSL_BUILTIN1(n) template <class T> MSL_FN T __metal_##n(T x, bool) { return n(x); }
#define MSL_BUILTIN2(n) template <class T> MSL_FN T __metal_##n(T x, T y, bool) { return n(x, y); }
#define MSL_BUILTIN3(n) template <class T> MSL_FN T __metal_##n(T x, T y, T z, bool) { return n(x, y, z); }
MSL_BUILTIN1(fabs) MSL_BUILTIN1(acos) MSL_BUILTIN1(acosh) MSL_BUILTIN1(asin) MSL_BUILTIN1(asinh) MSL_BUILTIN1(atan)
MSL_BUILTIN1(atanh) MSL_BUILTIN1(ceil) MSL_BUILTIN1(cos) MSL_BUILTIN1(cosh) MSL_BUILTIN1(cospi) MSL_BUILTIN1(exp)
MSL_BUILTIN1(exp10) MSL_BUILTIN1(exp2) MSL_BUILTIN1(floor) MSL_BUILTIN1(fract) MSL_BUILTIN1(log) MSL_BUILTIN1(log10)
MSL_BUILTIN1(log2) MSL_BUILTIN1(rint) MSL_BUILTIN1(round) MSL_BUILTIN1(rsqrt) MSL_BUILTIN1(sin) MSL_BUILTIN1(sinh)
MSL_BUILTIN1(sinpi) MSL_BUILTIN1(sqrt) MSL_BUILTIN1(tan) MSL_BUILTIN1(tanh) MSL_BUILTIN1(tanpi) MSL_BUILTIN1(trunc)
MSL_BUILTIN2(atan2) MSL_BUILTIN2(divide) MSL_BUILTIN2(fmax) MSL_BUILTIN2(fmin) MSL_BUILTIN2(fmod) MSL_BUILTIN2(pow)
MSL_BUILTIN2(powr) MSL_BUILTIN3(fmax3) MSL_BUILTIN3(fmin3) MSL_BUILTIN3(fmedian3)
template <class T> MSL_FN T __metal_fma(T x, T y, T z) { return fma(x, y, z); }
template <class T> MSL_FN T __metal_nextafter(T x, T y) { return nextafter(x, y); }
template <class T> MSL_FN T __metal_ldexp(T x, int k, bool) { return ldexp(x, k); }
template <class T> MSL_FN T __metal_frexp(T x, thread int* e) { return frexp(x, *e); }

template <class T> MSL_FN T __metal_get_thread_index_in_simdgroup(T) { return (T)msl_lane(); }
template <class T> MSL_FN T __metal_get_simdgroup_size(T) { return (T)32; }
#define MSL_LANE_BUILTIN1(n) \
  template <class T> MSL_FN T __metal_##n(T v, msl_site site = MSL_SITE) { return metal::n(v, site); }
#define MSL_LANE_BUILTIN2(n) \
  template <class T> MSL_FN T __metal_##n(T v, ushort k, msl_site site = MSL_SITE) { return metal::n(v, k, site); }
MSL_LANE_BUILTIN1(simd_max) MSL_LANE_BUILTIN1(simd_min) MSL_LANE_BUILTIN1(simd_sum) MSL_LANE_BUILTIN1(simd_product)
MSL_LANE_BUILTIN1(simd_prefix_exclusive_sum) MSL_LANE_BUILTIN1(simd_prefix_inclusive_sum)
MSL_LANE_BUILTIN1(simd_prefix_exclusive_product) MSL_LANE_BUILTIN1(simd_prefix_inclusive_product)
template <class T> MSL_FN T __metal_simd_xor(T v, msl_site site = MSL_SITE) {
  return as_type<T>(metal::simd_xor(as_type<typename msl_word<sizeof(T)>::type>(v), site));
}
MSL_LANE_BUILTIN2(simd_broadcast) MSL_LANE_BUILTIN2(simd_shuffle) MSL_LANE_BUILTIN2(simd_shuffle_down)
MSL_LANE_BUILTIN2(simd_shuffle_up) MSL_LANE_BUILTIN2(simd_shuffle_xor) MSL_LANE_BUILTIN2(simd_shuffle_rotate_down)
MSL_LANE_BUILTIN2(simd_shuffle_rotate_up)
template <class T> MSL_FN T __metal_simd_shuffle_and_fill_down(T v, T f, ushort d, ushort m, msl_site site = MSL_SITE) {
  return metal::simd_shuffle_and_fill_down(v, f, d, m, site);
}
template <class T> MSL_FN T __metal_simd_shuffle_and_fill_up(T v, T f, ushort d, ushort m, msl_site site = MSL_SITE) {
  return metal::simd_shuffle_and_fill_up(v, f, d, m, site);
}
}  // namespace msl_builtins
using namespace msl_builtins;

namespace metal {
template <class T> struct uniform {
  T value_;
  MSL_FN constexpr uniform(T value) : value_(value) {}
  MSL_FN constexpr operator T() const { return value_; }
};
#define MSL_UNIFORM(op)                                                                                          \
  template <class T> MSL_FN constexpr auto operator op(uniform<T> a, uniform<T> b) { return a.value_ op b.value_; } \
  template <class T, class U, enable_if_t<is_arithmetic_v<U>, bool> = true>                                       \
  MSL_FN constexpr auto operator op(uniform<T> a, U b) { return a.value_ op b; }                                  \
  template <class T, class U, enable_if_t<is_arithmetic_v<U>, bool> = true>                                       \
  MSL_FN constexpr auto operator op(U a, uniform<T> b) { return a op b.value_; }
MSL_UNIFORM(+) MSL_UNIFORM(-) MSL_UNIFORM(*) MSL_UNIFORM(/) MSL_UNIFORM(%) MSL_UNIFORM(<) MSL_UNIFORM(>)
MSL_UNIFORM(<=) MSL_UNIFORM(>=) MSL_UNIFORM(==) MSL_UNIFORM(!=)
template <class T> MSL_FN constexpr uniform<T> make_uniform(T value) { return uniform<T>(value); }
#if __METAL_VERSION__ >= 320
struct os_log {
  constexpr os_log(const constant char*, const constant char*) constant {}
  template <class... A> MSL_FN void log_debug(const constant char*, A...) const constant {}
  template <class... A> MSL_FN void log_info(const constant char*, A...) const constant {}
  template <class... A> MSL_FN void log_error(const constant char*, A...) const constant {}
  template <class... A> MSL_FN void log(const constant char*, A...) const constant {}
  template <class... A> MSL_FN void log_debug(const constant char*, A...) const thread {}
  template <class... A> MSL_FN void log_info(const constant char*, A...) const thread {}
  template <class... A> MSL_FN void log_error(const constant char*, A...) const thread {}
  template <class... A> MSL_FN void log(const constant char*, A...) const thread {}
};
constexpr constant os_log os_log_default("", "");
#endif
}  // namespace metal
