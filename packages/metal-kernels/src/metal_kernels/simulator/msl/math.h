// metal_math, metal_integer, metal_common, metal_relational and metal_geometric, computed in float by the C library.
#pragma once
#include "vectors.h"

extern "C" {
float expf(float); float exp2f(float); float exp10f(float); float logf(float); float log2f(float); float log10f(float);
float sinf(float); float cosf(float); float tanf(float); float asinf(float); float acosf(float); float atanf(float);
float sinhf(float); float coshf(float); float tanhf(float); float asinhf(float); float acoshf(float); float atanhf(float);
float powf(float, float); float fmodf(float, float); float atan2f(float, float); float nextafterf(float, float);
float remainderf(float, float); float ldexpf(float, int); float frexpf(float, ulong); float logbf(float); int ilogbf(float);
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
}  // namespace msl_scalar

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
  template <int N> MSL_FN vec<T, N> name(vec<T, N> a, vec<T, N> b) {                 \
    vec<T, N> r;                                                                     \
    for (int i = 0; i < N; i++) r[i] = name((T)a[i], (T)b[i]);                       \
    return r;                                                                        \
  }
#define MSL_MATH3_FOR(T, name, expression)                                           \
  MSL_FN T name(T a, T b, T c) {                                                     \
    float x = a, y = b, z = c;                                                       \
    return (T)(expression);                                                          \
  }                                                                                  \
  template <int N> MSL_FN vec<T, N> name(vec<T, N> a, vec<T, N> b, vec<T, N> c) {    \
    vec<T, N> r;                                                                     \
    for (int i = 0; i < N; i++) r[i] = name((T)a[i], (T)b[i], (T)c[i]);              \
    return r;                                                                        \
  }
#define MSL_MATH1(name, expression) MSL_MATH1_FOR(float, name, expression) MSL_MATH1_FOR(half, name, expression)
#define MSL_MATH2(name, expression) MSL_MATH2_FOR(float, name, expression) MSL_MATH2_FOR(half, name, expression)
#define MSL_MATH3(name, expression) MSL_MATH3_FOR(float, name, expression) MSL_MATH3_FOR(half, name, expression)

#define MSL_MATH                                                                                           \
  MSL_MATH1(exp, expf(x)) MSL_MATH1(exp2, exp2f(x)) MSL_MATH1(exp10, exp10f(x))                            \
  MSL_MATH1(log, logf(x)) MSL_MATH1(log2, log2f(x)) MSL_MATH1(log10, log10f(x))                            \
  MSL_MATH1(sin, sinf(x)) MSL_MATH1(cos, cosf(x)) MSL_MATH1(tan, tanf(x))                                  \
  MSL_MATH1(asin, asinf(x)) MSL_MATH1(acos, acosf(x)) MSL_MATH1(atan, atanf(x))                            \
  MSL_MATH1(sinh, sinhf(x)) MSL_MATH1(cosh, coshf(x)) MSL_MATH1(tanh, tanhf(x))                            \
  MSL_MATH1(asinh, asinhf(x)) MSL_MATH1(acosh, acoshf(x)) MSL_MATH1(atanh, atanhf(x))                      \
  MSL_MATH1(sinpi, sinf(msl_scalar::pi * x)) MSL_MATH1(cospi, cosf(msl_scalar::pi * x))                    \
  MSL_MATH1(tanpi, tanf(msl_scalar::pi * x))                                                               \
  MSL_MATH1(sqrt, __builtin_sqrtf(x)) MSL_MATH1(rsqrt, 1.0f / __builtin_sqrtf(x))                          \
  MSL_MATH1(floor, __builtin_floorf(x)) MSL_MATH1(ceil, __builtin_ceilf(x))                                \
  MSL_MATH1(trunc, __builtin_truncf(x)) MSL_MATH1(round, __builtin_roundf(x))                              \
  MSL_MATH1(rint, __builtin_rintf(x)) MSL_MATH1(fabs, __builtin_fabsf(x)) MSL_MATH1(abs, __builtin_fabsf(x)) \
  MSL_MATH1(fract, msl_scalar::fract(x)) MSL_MATH1(sign, msl_scalar::sign(x))                              \
  MSL_MATH1(saturate, msl_scalar::saturate(x))                                                             \
  MSL_MATH2(pow, powf(x, y)) MSL_MATH2(powr, powf(x, y)) MSL_MATH2(fmod, fmodf(x, y))                      \
  MSL_MATH2(atan2, atan2f(x, y)) MSL_MATH2(divide, x / y) MSL_MATH2(remainder, remainderf(x, y))           \
  MSL_MATH2(fdim, __builtin_fmaxf(x - y, 0.f)) MSL_MATH2(step, y < x ? 0.f : 1.f)                          \
  MSL_MATH2(nextafter, nextafterf(x, y)) MSL_MATH2(copysign, __builtin_copysignf(x, y))                    \
  MSL_MATH2(fmin, __builtin_fminf(x, y)) MSL_MATH2(fmax, __builtin_fmaxf(x, y))                            \
  MSL_MATH2(min, __builtin_fminf(x, y)) MSL_MATH2(max, __builtin_fmaxf(x, y))                              \
  MSL_MATH3(fma, __builtin_fmaf(x, y, z)) MSL_MATH3(mix, x + (y - x) * z)                                  \
  MSL_MATH3(clamp, __builtin_fminf(__builtin_fmaxf(x, y), z))                                              \
  MSL_MATH3(fmin3, __builtin_fminf(x, __builtin_fminf(y, z))) MSL_MATH3(min3, __builtin_fminf(x, __builtin_fminf(y, z))) \
  MSL_MATH3(fmax3, __builtin_fmaxf(x, __builtin_fmaxf(y, z))) MSL_MATH3(max3, __builtin_fmaxf(x, __builtin_fmaxf(y, z))) \
  MSL_MATH3(fmedian3, msl_scalar::median3(x, y, z)) MSL_MATH3(median3, msl_scalar::median3(x, y, z))       \
  MSL_MATH3(smoothstep, msl_scalar::smoothstep(x, y, z))                                                   \
  MSL_FN float ldexp(float x, int k) { return ldexpf(x, k); }                                              \
  MSL_FN half ldexp(half x, int k) { return (half)ldexpf(x, k); }                                          \
  MSL_FN float frexp(float x, thread int& e) { return frexpf(x, (ulong)&e); }                              \
  MSL_FN half frexp(half x, thread int& e) { return (half)frexpf(x, (ulong)&e); }                          \
  MSL_FN int ilogb(float x) { return ilogbf(x); }                                                          \
  MSL_FN float sincos(float x, thread float& c) { c = cosf(x); return sinf(x); }                           \
  MSL_FN half sincos(half x, thread half& c) { c = (half)cosf(x); return (half)sinf(x); }                  \
  MSL_FN float modf(float x, thread float& whole) { whole = __builtin_truncf(x); return x - whole; }
MSL_MATH
namespace fast { MSL_MATH }
namespace precise { MSL_MATH }

#define MSL_CLASSES_FOR(T)                                                                          \
  MSL_FN bool isnan(T x) { float f = x; return f != f; }                                            \
  MSL_FN bool isinf(T x) { return __builtin_fabsf((float)x) == __builtin_inff(); }                  \
  MSL_FN bool isfinite(T x) { return __builtin_fabsf((float)x) < __builtin_inff(); }                \
  MSL_FN bool signbit(T x) { return __builtin_signbit((float)x); }                                  \
  MSL_FN bool isnormal(T x) {                                                                       \
    float f = __builtin_fabsf((float)x);                                                            \
    return f < __builtin_inff() && f >= (float)numeric_limits<T>::min();                            \
  }                                                                                                 \
  template <int N> MSL_FN vec<char, N> isnan(vec<T, N> v) {                                         \
    vec<char, N> r;                                                                                 \
    for (int i = 0; i < N; i++) r[i] = isnan((T)v[i]);                                              \
    return r;                                                                                       \
  }                                                                                                 \
  template <int N> MSL_FN vec<char, N> isinf(vec<T, N> v) {                                         \
    vec<char, N> r;                                                                                 \
    for (int i = 0; i < N; i++) r[i] = isinf((T)v[i]);                                              \
    return r;                                                                                       \
  }
MSL_CLASSES_FOR(float) MSL_CLASSES_FOR(half) MSL_CLASSES_FOR(bfloat)

// U is the unsigned type of T.
#define MSL_INTEGER_FOR(T, U)                                                                       \
  MSL_FN T min(T a, T b) { return b < a ? b : a; }                                                  \
  MSL_FN T max(T a, T b) { return a < b ? b : a; }                                                  \
  MSL_FN T min3(T a, T b, T c) { return min(a, min(b, c)); }                                        \
  MSL_FN T max3(T a, T b, T c) { return max(a, max(b, c)); }                                        \
  MSL_FN T clamp(T x, T low, T high) { return min(max(x, low), high); }                             \
  MSL_FN T abs(T a) { return a < 0 ? (T)(0 - (U)a) : a; }                                           \
  MSL_FN U absdiff(T a, T b) { return a < b ? (U)b - (U)a : (U)a - (U)b; }                          \
  MSL_FN T popcount(T x) { return (T)__builtin_popcountll((ulong)(U)x); }                           \
  MSL_FN T clz(T x) {                                                                               \
    return (U)x == 0 ? (T)(sizeof(T) * 8) : (T)(__builtin_clzll((ulong)(U)x) - (64 - (int)sizeof(T) * 8)); \
  }                                                                                                 \
  MSL_FN T ctz(T x) { return (U)x == 0 ? (T)(sizeof(T) * 8) : (T)__builtin_ctzll((ulong)(U)x); }    \
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
  template <int N> MSL_FN vec<T, N> min(vec<T, N> a, vec<T, N> b) {                                 \
    vec<T, N> r;                                                                                    \
    for (int i = 0; i < N; i++) r[i] = min((T)a[i], (T)b[i]);                                       \
    return r;                                                                                       \
  }                                                                                                 \
  template <int N> MSL_FN vec<T, N> max(vec<T, N> a, vec<T, N> b) {                                 \
    vec<T, N> r;                                                                                    \
    for (int i = 0; i < N; i++) r[i] = max((T)a[i], (T)b[i]);                                       \
    return r;                                                                                       \
  }                                                                                                 \
  template <int N> MSL_FN vec<T, N> clamp(vec<T, N> x, vec<T, N> low, vec<T, N> high) {             \
    return min(max(x, low), high);                                                                  \
  }                                                                                                 \
  template <int N> MSL_FN vec<T, N> abs(vec<T, N> a) {                                              \
    vec<T, N> r;                                                                                    \
    for (int i = 0; i < N; i++) r[i] = abs((T)a[i]);                                                \
    return r;                                                                                       \
  }                                                                                                 \
  template <int N> MSL_FN vec<T, N> popcount(vec<T, N> a) {                                         \
    vec<T, N> r;                                                                                    \
    for (int i = 0; i < N; i++) r[i] = popcount((T)a[i]);                                           \
    return r;                                                                                       \
  }
MSL_INTEGER_FOR(char, uchar) MSL_INTEGER_FOR(uchar, uchar) MSL_INTEGER_FOR(short, ushort) MSL_INTEGER_FOR(ushort, ushort)
MSL_INTEGER_FOR(int, uint) MSL_INTEGER_FOR(uint, uint) MSL_INTEGER_FOR(long, ulong) MSL_INTEGER_FOR(ulong, ulong)
MSL_FN int mulhi(int a, int b) { return (int)(((long)a * b) >> 32); }
MSL_FN uint mulhi(uint a, uint b) { return (uint)(((ulong)a * b) >> 32); }
MSL_FN short mulhi(short a, short b) { return (short)(((int)a * b) >> 16); }
MSL_FN ushort mulhi(ushort a, ushort b) { return (ushort)(((uint)a * b) >> 16); }
MSL_FN int mul24(int a, int b) { return a * b; }
MSL_FN uint mul24(uint a, uint b) { return a * b; }
MSL_FN int mad24(int a, int b, int c) { return a * b + c; }
MSL_FN uint mad24(uint a, uint b, uint c) { return a * b + c; }

template <class T, enable_if_t<!msl_shape<T>::is_vector, bool> = true> MSL_FN T select(T a, T b, bool c) { return c ? b : a; }
template <class T, class C, int N> MSL_FN vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<C, N> c) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r[i] = c[i] ? b[i] : a[i];
  return r;
}
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

template <class T, int N> MSL_FN T dot(vec<T, N> a, vec<T, N> b) {
  T sum = (T)0;
  for (int i = 0; i < N; i++) sum += a[i] * b[i];
  return sum;
}
template <class T, int N> MSL_FN T length_squared(vec<T, N> a) { return dot(a, a); }
template <class T, int N> MSL_FN T length(vec<T, N> a) { return sqrt(dot(a, a)); }
template <class T, int N> MSL_FN T distance(vec<T, N> a, vec<T, N> b) { return length(a - b); }
template <class T, int N> MSL_FN vec<T, N> normalize(vec<T, N> a) { return a * (vec<T, N>)rsqrt(dot(a, a)); }
template <class T> MSL_FN vec<T, 3> cross(vec<T, 3> a, vec<T, 3> b) { return a.yzx * b.zxy - a.zxy * b.yzx; }
}  // namespace metal
