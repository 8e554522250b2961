// metal_math, metal_integer, metal_common, metal_relational and metal_geometric, computed in float by the C library.
#pragma once
#include "vectors.h"

// Under other names, which Metal does not have.
#define MSL_C(result, name, parameters) result msl_##name parameters __asm__(#name);
extern "C" {
MSL_C(float, expf, (float)) MSL_C(float, exp2f, (float)) MSL_C(float, exp10f, (float)) MSL_C(float, logf, (float)) MSL_C(float, log2f, (float)) MSL_C(float, log10f, (float))
MSL_C(float, sinf, (float)) MSL_C(float, cosf, (float)) MSL_C(float, tanf, (float)) MSL_C(float, asinf, (float)) MSL_C(float, acosf, (float)) MSL_C(float, atanf, (float))
MSL_C(float, sinhf, (float)) MSL_C(float, coshf, (float)) MSL_C(float, tanhf, (float)) MSL_C(float, asinhf, (float)) MSL_C(float, acoshf, (float)) MSL_C(float, atanhf, (float))
MSL_C(float, powf, (float, float)) MSL_C(float, fmodf, (float, float)) MSL_C(float, atan2f, (float, float)) MSL_C(float, nextafterf, (float, float))
MSL_C(float, remainderf, (float, float)) MSL_C(float, ldexpf, (float, int)) MSL_C(float, frexpf, (float, ulong)) MSL_C(float, logbf, (float)) MSL_C(int, ilogbf, (float))
}

namespace metal {
namespace msl_scalar {
MSL_FN float fract(float x) { return __builtin_fminf(x - __builtin_floorf(x), 0x1.fffffep-1f); }
MSL_FN float sign(float x) { return x > 0 ? 1.f : x < 0 ? -1.f : x != x ? 0.f : x; }
MSL_FN float saturate(float x) { return __builtin_fminf(__builtin_fmaxf(x, 0.f), 1.f); }
MSL_FN float median3(float a, float b, float c) {
  return __builtin_fmaxf(__builtin_fminf(a, b), __builtin_fminf(__builtin_fmaxf(a, b), c));
}
MSL_FN float smoothstep(float low, float high, float x) {
  float t = saturate((x - low) / (high - low));
  return t * t * (3 - 2 * t);
}
constexpr constant float pi = 3.14159265358979323846f;
// With what is left of x beyond a whole number, so that large angles stay exact.
MSL_FN float sinpi(float x) {
  float whole = __builtin_rintf(x), s = msl_sinf(pi * (x - whole));
  return whole - 2 * __builtin_floorf(whole / 2) != 0 ? -s : s;
}
MSL_FN float cospi(float x) {
  float a = __builtin_fabsf(x);
  return sinpi(0.5f - (a - 2 * __builtin_floorf(a / 2)));
}
MSL_FN float powr(float x, float y) { return x < 0 ? __builtin_nanf("") : msl_powf(x, y); }
}  // namespace msl_scalar

// Where one argument is a vector, scalars among the others stand for vectors of that value.
#define MSL_SAME(T, N) typename msl_exactly<vec<T, N>>::type
#define MSL_WITH_SCALAR(S) template <class S, int N, enable_if_t<is_arithmetic_v<S>, bool> = true>

// Each function exists for float, half and their vectors; half is computed in float and rounded once.
#define MSL_MATH1_FOR(T, name, expression)                                           \
  MSL_FN T name(T a) {                                                               \
    float x = a;                                                                     \
    return (T)(expression);                                                          \
  }                                                                                  \
  template <int N> MSL_FN vec<T, N> name(vec<T, N> a) {                              \
    vec<T, N> r;                                                                     \
    for (int i = 0; i < N; i++) r[i] = name((T)a[i]);                                \
    return r;                                                                        \
  }
#define MSL_MATH2_FOR(T, name, expression)                                           \
  MSL_FN T name(T a, T b) {                                                          \
    float x = a, y = b;                                                              \
    return (T)(expression);                                                          \
  }                                                                                  \
  template <int N> MSL_FN vec<T, N> name(vec<T, N> a, MSL_SAME(T, N) b) {        \
    vec<T, N> r;                                                                     \
    for (int i = 0; i < N; i++) r[i] = name((T)a[i], (T)b[i]);                       \
    return r;                                                                        \
  }                                                                                  \
  MSL_WITH_SCALAR(S) MSL_FN vec<T, N> name(S a, vec<T, N> b) { return name((vec<T, N>)(T)a, b); }
#define MSL_MATH3_FOR(T, name, expression)                                           \
  MSL_FN T name(T a, T b, T c) {                                                     \
    float x = a, y = b, z = c;                                                       \
    return (T)(expression);                                                          \
  }                                                                                  \
  template <int N> MSL_FN vec<T, N> name(vec<T, N> a, MSL_SAME(T, N) b, MSL_SAME(T, N) c) { \
    vec<T, N> r;                                                                     \
    for (int i = 0; i < N; i++) r[i] = name((T)a[i], (T)b[i], (T)c[i]);              \
    return r;                                                                        \
  }                                                                                  \
  MSL_WITH_SCALAR(S) MSL_FN vec<T, N> name(S a, vec<T, N> b, MSL_SAME(T, N) c) { return name((vec<T, N>)(T)a, b, c); } \
  MSL_WITH_SCALAR(S) MSL_FN vec<T, N> name(S a, S b, vec<T, N> c) { return name((vec<T, N>)(T)a, (vec<T, N>)(T)b, c); }
#define MSL_MATH1(name, expression) MSL_MATH1_FOR(float, name, expression) MSL_MATH1_FOR(half, name, expression)
#define MSL_MATH2(name, expression) MSL_MATH2_FOR(float, name, expression) MSL_MATH2_FOR(half, name, expression)
#define MSL_MATH3(name, expression) MSL_MATH3_FOR(float, name, expression) MSL_MATH3_FOR(half, name, expression)

// What takes or gives an exponent or a second result, whose lanes are written one by one.
#define MSL_MATH_PARTS(T)                                                                                     \
  MSL_FN T ldexp(T x, int k) { return (T)msl_ldexpf(x, k); }                                                  \
  MSL_FN int ilogb(T x) { return msl_ilogbf(x); }                                                             \
  MSL_FN T frexp(T x, thread int& e) { return (T)msl_frexpf(x, (ulong)&e); }                                  \
  MSL_FN T sincos(T x, thread T& c) { c = (T)msl_cosf(x); return (T)msl_sinf(x); }                            \
  MSL_FN T modf(T x, thread T& whole) { whole = (T)__builtin_truncf(x); return __builtin_isinf(x) ? (T)__builtin_copysignf(0.f, x) : (T)(x - whole); } \
  template <int N> MSL_FN vec<T, N> ldexp(vec<T, N> x, vec<int, N> k) {                                       \
    vec<T, N> r;                                                                                              \
    for (int i = 0; i < N; i++) r[i] = ldexp((T)x[i], (int)k[i]);                                             \
    return r;                                                                                                 \
  }                                                                                                           \
  template <int N> MSL_FN vec<int, N> ilogb(vec<T, N> x) {                                                    \
    vec<int, N> r;                                                                                            \
    for (int i = 0; i < N; i++) r[i] = ilogb((T)x[i]);                                                        \
    return r;                                                                                                 \
  }                                                                                                           \
  MSL_MATH_PART(T, T, sincos) MSL_MATH_PART(T, T, modf) MSL_MATH_PART(T, int, frexp)
#define MSL_MATH_PART(T, P, name)                                                                             \
  template <int N> MSL_FN vec<T, N> name(vec<T, N> x, thread vec<P, N>& part) {                               \
    vec<T, N> r;                                                                                              \
    for (int i = 0; i < N; i++) {                                                                             \
      P lane;                                                                                                 \
      r[i] = name((T)x[i], lane);                                                                             \
      part[i] = lane;                                                                                         \
    }                                                                                                         \
    return r;                                                                                                 \
  }
#define MSL_MATH                                                                                           \
  MSL_MATH1(exp, msl_expf(x)) MSL_MATH1(exp2, msl_exp2f(x)) MSL_MATH1(exp10, msl_exp10f(x))                            \
  MSL_MATH1(log, msl_logf(x)) MSL_MATH1(log2, msl_log2f(x)) MSL_MATH1(log10, msl_log10f(x))                            \
  MSL_MATH1(sin, msl_sinf(x)) MSL_MATH1(cos, msl_cosf(x)) MSL_MATH1(tan, msl_tanf(x))                                  \
  MSL_MATH1(asin, msl_asinf(x)) MSL_MATH1(acos, msl_acosf(x)) MSL_MATH1(atan, msl_atanf(x))                            \
  MSL_MATH1(sinh, msl_sinhf(x)) MSL_MATH1(cosh, msl_coshf(x)) MSL_MATH1(tanh, msl_tanhf(x))                            \
  MSL_MATH1(asinh, msl_asinhf(x)) MSL_MATH1(acosh, msl_acoshf(x)) MSL_MATH1(atanh, msl_atanhf(x))                      \
  MSL_MATH1(sinpi, msl_scalar::sinpi(x)) MSL_MATH1(cospi, msl_scalar::cospi(x))                    \
  MSL_MATH1(tanpi, msl_scalar::sinpi(x) / msl_scalar::cospi(x))                                                               \
  MSL_MATH1(sqrt, __builtin_sqrtf(x)) MSL_MATH1(rsqrt, 1.0f / __builtin_sqrtf(x))                          \
  MSL_MATH1(floor, __builtin_floorf(x)) MSL_MATH1(ceil, __builtin_ceilf(x))                                \
  MSL_MATH1(trunc, __builtin_truncf(x)) MSL_MATH1(round, __builtin_roundf(x))                              \
  MSL_MATH1(rint, __builtin_rintf(x)) MSL_MATH1(fabs, __builtin_fabsf(x)) MSL_MATH1(abs, __builtin_fabsf(x)) \
  MSL_MATH1(fract, msl_scalar::fract(x)) MSL_MATH1(sign, msl_scalar::sign(x))                              \
  MSL_MATH1(saturate, msl_scalar::saturate(x))                                                             \
  MSL_MATH2(pow, msl_powf(x, y)) MSL_MATH2(powr, msl_scalar::powr(x, y)) MSL_MATH2(fmod, msl_fmodf(x, y))                      \
  MSL_MATH2(atan2, msl_atan2f(x, y)) MSL_MATH2(divide, x / y) MSL_MATH2(remainder, msl_remainderf(x, y))           \
  MSL_MATH2(fdim, __builtin_fmaxf(x - y, 0.f)) MSL_MATH2(step, y < x ? 0.f : 1.f)                          \
  MSL_MATH2(nextafter, msl_nextafterf(x, y)) MSL_MATH2(copysign, __builtin_copysignf(x, y))                    \
  MSL_MATH2(fmin, __builtin_fminf(x, y)) MSL_MATH2(fmax, __builtin_fmaxf(x, y))                            \
  MSL_MATH2(min, __builtin_fminf(x, y)) MSL_MATH2(max, __builtin_fmaxf(x, y))                              \
  MSL_MATH3(fma, __builtin_fmaf(x, y, z)) MSL_MATH3(mix, x + (y - x) * z)                                  \
  MSL_MATH3(clamp, __builtin_fminf(__builtin_fmaxf(x, y), z))                                              \
  MSL_MATH3(fmin3, __builtin_fminf(x, __builtin_fminf(y, z))) MSL_MATH3(min3, __builtin_fminf(x, __builtin_fminf(y, z))) \
  MSL_MATH3(fmax3, __builtin_fmaxf(x, __builtin_fmaxf(y, z))) MSL_MATH3(max3, __builtin_fmaxf(x, __builtin_fmaxf(y, z))) \
  MSL_MATH3(fmedian3, msl_scalar::median3(x, y, z)) MSL_MATH3(median3, msl_scalar::median3(x, y, z))       \
  MSL_MATH3(smoothstep, msl_scalar::smoothstep(x, y, z))                                                   \
  MSL_MATH_PARTS(float) MSL_MATH_PARTS(half)
MSL_MATH
namespace fast { MSL_MATH }
namespace precise { MSL_MATH }

#define MSL_CLASS_OF_LANES(T, name)                                                                 \
  template <int N> MSL_FN vec<char, N> name(vec<T, N> v) {                                          \
    vec<char, N> r;                                                                                 \
    for (int i = 0; i < N; i++) r[i] = name((T)v[i]);                                               \
    return r;                                                                                       \
  }
#define MSL_CLASSES_FOR(T)                                                                          \
  MSL_FN bool isnan(T x) { float f = x; return f != f; }                                            \
  MSL_FN bool isinf(T x) { return __builtin_fabsf((float)x) == __builtin_inff(); }                  \
  MSL_FN bool isfinite(T x) { return __builtin_fabsf((float)x) < __builtin_inff(); }                \
  MSL_FN bool signbit(T x) { return __builtin_signbit((float)x); }                                  \
  MSL_FN bool isnormal(T x) {                                                                       \
    float f = __builtin_fabsf((float)x);                                                            \
    return f < __builtin_inff() && f >= (float)numeric_limits<T>::min();                            \
  }                                                                                                 \
  MSL_CLASS_OF_LANES(T, isnan) MSL_CLASS_OF_LANES(T, isinf) MSL_CLASS_OF_LANES(T, isfinite)         \
  MSL_CLASS_OF_LANES(T, isnormal) MSL_CLASS_OF_LANES(T, signbit)                                    \
  MSL_FN bool isunordered(T a, T b) { return isnan(a) || isnan(b); }                                \
  MSL_FN bool isordered(T a, T b) { return !isunordered(a, b); }
MSL_CLASSES_FOR(float) MSL_CLASSES_FOR(half) MSL_CLASSES_FOR(bfloat)

// U is the unsigned type of T.
#define MSL_INTEGER_FOR(T, U)                                                                       \
  MSL_FN T min(T a, T b) { return b < a ? b : a; }                                                  \
  MSL_FN T max(T a, T b) { return a < b ? b : a; }                                                  \
  MSL_FN T min3(T a, T b, T c) { return min(a, min(b, c)); }                                        \
  MSL_FN T max3(T a, T b, T c) { return max(a, max(b, c)); }                                        \
  MSL_FN T clamp(T x, T low, T high) { return min(max(x, low), high); }                             \
  MSL_FN T abs(T a) { return a < 0 ? (T)(0 - (U)a) : a; }                                           \
  MSL_FN T median3(T a, T b, T c) { return max(min(a, b), min(max(a, b), c)); }                      \
  MSL_FN T hadd(T a, T b) { return (T)((a & b) + ((a ^ b) >> 1)); }                                  \
  MSL_FN T rhadd(T a, T b) { return (T)((a | b) - ((a ^ b) >> 1)); }                                 \
  MSL_FN U absdiff(T a, T b) { return a < b ? (U)b - (U)a : (U)a - (U)b; }                          \
  MSL_FN T popcount(T x) { return (T)__builtin_popcountl((ulong)(U)x); }                           \
  MSL_FN T clz(T x) {                                                                               \
    return (U)x == 0 ? (T)(sizeof(T) * 8) : (T)(__builtin_clzl((ulong)(U)x) - (64 - (int)sizeof(T) * 8)); \
  }                                                                                                 \
  MSL_FN T ctz(T x) { return (U)x == 0 ? (T)(sizeof(T) * 8) : (T)__builtin_ctzl((ulong)(U)x); }    \
  MSL_FN T rotate(T x, T k) {                                                                       \
    uint s = (uint)k & (sizeof(T) * 8 - 1);                                                         \
    U u = (U)x;                                                                                     \
    return (T)(s ? (U)((u << s) | (u >> (sizeof(T) * 8 - s))) : u);                                 \
  }                                                                                                 \
  MSL_FN T reverse_bits(T x) {                                                                      \
    U u = (U)x, r = 0;                                                                              \
    for (uint i = 0; i < sizeof(T) * 8; i++, u >>= 1) r = (U)((r << 1) | (u & 1));                  \
    return (T)r;                                                                                    \
  }                                                                                                 \
  MSL_FN T extract_bits(T x, uint offset, uint bits) {                                              \
    if (bits == 0) return 0;                                                                        \
    uint spare = sizeof(T) * 8 - bits;                                                              \
    return (T)((T)((U)x << (spare - offset)) >> spare);                                             \
  }                                                                                                 \
  MSL_FN T insert_bits(T base, T insert, uint offset, uint bits) {                                  \
    U mask = (U)((bits >= sizeof(T) * 8 ? ~0ul : (1ul << bits) - 1) << offset);                     \
    return (T)(((U)base & ~mask) | (((U)insert << offset) & mask));                                 \
  }                                                                                                 \
  MSL_FN T addsat(T a, T b) {                                                                       \
    T r;                                                                                            \
    return !__builtin_add_overflow(a, b, &r) ? r : b < 0 ? numeric_limits<T>::min() : numeric_limits<T>::max(); \
  }                                                                                                 \
  MSL_FN T subsat(T a, T b) {                                                                       \
    T r;                                                                                            \
    return !__builtin_sub_overflow(a, b, &r) ? r                                                    \
           : b < 0                           ? numeric_limits<T>::max()                             \
                                             : numeric_limits<T>::min();                            \
  }                                                                                                 \
  template <int N> MSL_FN vec<T, N> min(vec<T, N> a, MSL_SAME(T, N) b) {                       \
    vec<T, N> r;                                                                                    \
    for (int i = 0; i < N; i++) r[i] = min((T)a[i], (T)b[i]);                                       \
    return r;                                                                                       \
  }                                                                                                 \
  template <int N> MSL_FN vec<T, N> max(vec<T, N> a, MSL_SAME(T, N) b) {                       \
    vec<T, N> r;                                                                                    \
    for (int i = 0; i < N; i++) r[i] = max((T)a[i], (T)b[i]);                                       \
    return r;                                                                                       \
  }                                                                                                 \
  MSL_WITH_SCALAR(S) MSL_FN vec<T, N> min(S a, vec<T, N> b) { return min((vec<T, N>)(T)a, b); }     \
  MSL_WITH_SCALAR(S) MSL_FN vec<T, N> max(S a, vec<T, N> b) { return max((vec<T, N>)(T)a, b); }     \
  template <int N> MSL_FN vec<T, N> clamp(vec<T, N> x, MSL_SAME(T, N) low, MSL_SAME(T, N) high) { \
    return min(max(x, low), high);                                                                  \
  }
MSL_INTEGER_FOR(char, uchar) MSL_INTEGER_FOR(uchar, uchar) MSL_INTEGER_FOR(short, ushort) MSL_INTEGER_FOR(ushort, ushort)
MSL_INTEGER_FOR(int, uint) MSL_INTEGER_FOR(uint, uint) MSL_INTEGER_FOR(long, ulong) MSL_INTEGER_FOR(ulong, ulong)
MSL_FN int mulhi(int a, int b) { return (int)(((long)a * b) >> 32); }
MSL_FN uint mulhi(uint a, uint b) { return (uint)(((ulong)a * b) >> 32); }
MSL_FN short mulhi(short a, short b) { return (short)(((int)a * b) >> 16); }
MSL_FN ushort mulhi(ushort a, ushort b) { return (ushort)(((uint)a * b) >> 16); }
MSL_FN long mulhi(long a, long b) { return (long)(((__int128)a * b) >> 64); }
MSL_FN ulong mulhi(ulong a, ulong b) { return (ulong)(((unsigned __int128)a * b) >> 64); }
#define MSL_MAD(T)                                                      \
  MSL_FN T madhi(T a, T b, T c) { return (T)(mulhi(a, b) + c); }        \
  MSL_FN T madsat(T a, T b, T c) {                                      \
    __int128 r = (__int128)a * b + c;                                   \
    __int128 low = numeric_limits<T>::min(), high = numeric_limits<T>::max(); \
    return (T)(r < low ? low : high < r ? high : r);                    \
  }
MSL_MAD(int) MSL_MAD(uint) MSL_MAD(short) MSL_MAD(ushort)
MSL_FN int mul24(int a, int b) { return a * b; }
MSL_FN uint mul24(uint a, uint b) { return a * b; }
MSL_FN int mad24(int a, int b, int c) { return a * b + c; }
MSL_FN uint mad24(uint a, uint b, uint c) { return a * b + c; }
// The vectors of these: of integers only, and with shifts and counts that are one for all lanes.
#define MSL_OF_INTEGERS template <class T, int N, enable_if_t<is_integral_v<T>, bool> = true> MSL_FN
#define MSL_INTEGERS(result, name, parameters, arguments)      \
  MSL_OF_INTEGERS vec<result, N> name parameters {             \
    vec<result, N> r;                                          \
    for (int i = 0; i < N; i++) r[i] = name arguments;         \
    return r;                                                  \
  }
#define MSL_INTEGERS1(name) MSL_INTEGERS(T, name, (vec<T, N> a), ((T)a[i]))
#define MSL_INTEGERS2(name) MSL_INTEGERS(T, name, (vec<T, N> a, vec<T, N> b), ((T)a[i], (T)b[i]))
#define MSL_INTEGERS3(name) MSL_INTEGERS(T, name, (vec<T, N> a, vec<T, N> b, vec<T, N> c), ((T)a[i], (T)b[i], (T)c[i]))
MSL_INTEGERS1(abs) MSL_INTEGERS1(popcount) MSL_INTEGERS1(clz) MSL_INTEGERS1(ctz) MSL_INTEGERS1(reverse_bits)
MSL_INTEGERS2(rotate) MSL_INTEGERS2(mulhi) MSL_INTEGERS2(hadd) MSL_INTEGERS2(rhadd) MSL_INTEGERS2(addsat)
MSL_INTEGERS2(subsat) MSL_INTEGERS2(mul24) MSL_INTEGERS3(madhi) MSL_INTEGERS3(madsat) MSL_INTEGERS3(mad24)
MSL_INTEGERS3(min3) MSL_INTEGERS3(max3) MSL_INTEGERS3(median3)
MSL_INTEGERS(make_unsigned_t<T>, absdiff, (vec<T, N> a, vec<T, N> b), ((T)a[i], (T)b[i]))
MSL_INTEGERS(T, extract_bits, (vec<T, N> a, uint offset, uint bits), ((T)a[i], offset, bits))
MSL_INTEGERS(T, insert_bits, (vec<T, N> a, vec<T, N> b, uint offset, uint bits), ((T)a[i], (T)b[i], offset, bits))

template <class T, enable_if_t<!msl_shape<T>::is_vector, bool> = true> MSL_FN T select(T a, T b, bool c) { return c ? b : a; }
template <class T, class C, int N> MSL_FN vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<C, N> c) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r[i] = c[i] ? b[i] : a[i];
  return r;
}
template <class T, int N> MSL_FN vec<T, N> select(vec<T, N> a, vec<T, N> b, msl_bools<N> c) { return select(a, b, c.lanes()); }
template <class T, int N> MSL_FN vec<T, N> select(vec<T, N> a, vec<T, N> b, bool c) { return c ? b : a; }
MSL_FN float nan(uint) { return __builtin_nanf(""); }
MSL_FN half nan(ushort) { return (half)__builtin_nanf(""); }
MSL_FN bool any(bool b) { return b; }
MSL_FN bool all(bool b) { return b; }
template <class T, int N> MSL_FN bool any(vec<T, N> v) {
  bool r = false;
  for (int i = 0; i < N; i++) r |= (bool)v[i];
  return r;
}
template <class T, int N> MSL_FN bool all(vec<T, N> v) {
  bool r = true;
  for (int i = 0; i < N; i++) r &= (bool)v[i];
  return r;
}

template <int N> MSL_FN bool any(msl_bools<N> b) { return any(b.lanes()); }
template <int N> MSL_FN bool all(msl_bools<N> b) { return all(b.lanes()); }

#define MSL_OF_VECTORS template <class T, int N, enable_if_t<is_floating_point_v<T>, bool> = true> MSL_FN
#define MSL_GEOMETRY                                                                                          \
  MSL_OF_VECTORS T dot(vec<T, N> a, vec<T, N> b) {                                                            \
    T sum = (T)0;                                                                                             \
    for (int i = 0; i < N; i++) sum += a[i] * b[i];                                                           \
    return sum;                                                                                               \
  }                                                                                                           \
  MSL_OF_VECTORS T length_squared(vec<T, N> a) { return dot(a, a); }                                          \
  MSL_OF_VECTORS T length(vec<T, N> a) { return sqrt(dot(a, a)); }                                            \
  MSL_OF_VECTORS T distance_squared(vec<T, N> a, vec<T, N> b) { return length_squared(a - b); }               \
  MSL_OF_VECTORS T distance(vec<T, N> a, vec<T, N> b) { return length(a - b); }                               \
  MSL_OF_VECTORS vec<T, N> normalize(vec<T, N> a) { return a * (vec<T, N>)rsqrt(dot(a, a)); }                 \
  MSL_OF_VECTORS vec<T, N> faceforward(vec<T, N> n, vec<T, N> i, vec<T, N> reference) { return dot(i, reference) < (T)0 ? n : -n; } \
  MSL_OF_VECTORS vec<T, N> reflect(vec<T, N> i, vec<T, N> n) { return i - n * (vec<T, N>)((T)2 * dot(n, i)); } \
  MSL_OF_VECTORS vec<T, N> refract(vec<T, N> i, vec<T, N> n, T ratio) {                                       \
    T c = dot(n, i), k = (T)1 - ratio * ratio * ((T)1 - c * c);                                               \
    return k < (T)0 ? (vec<T, N>)(T)0 : i * (vec<T, N>)ratio - n * (vec<T, N>)(ratio * c + sqrt(k));          \
  }                                                                                                           \
  template <class T> MSL_FN vec<T, 3> cross(vec<T, 3> a, vec<T, 3> b) { return a.yzx * b.zxy - a.zxy * b.yzx; }
MSL_GEOMETRY
namespace fast { MSL_GEOMETRY }
namespace precise { MSL_GEOMETRY }
}  // namespace metal
