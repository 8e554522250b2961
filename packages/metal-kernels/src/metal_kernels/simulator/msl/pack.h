// metal_pack: vectors of small integers that stand for [0, 1] or [-1, 1], in one word.
#pragma once
#include "math.h"

namespace metal {
template <class W, int N, int BITS, bool SIGNED> MSL_FN vec<float, N> msl_unpack(W word) {
  vec<float, N> v;
  for (int i = 0; i < N; i++) {
    uint bits = (uint)(word >> (i * BITS)) & ((1u << BITS) - 1);
    float value = SIGNED ? (float)((int)(bits << (32 - BITS)) >> (32 - BITS)) : (float)bits;
    v[i] = max(value / (float)((1u << (BITS - SIGNED)) - 1), -1.0f);
  }
  return v;
}
template <class W, int N, int BITS, bool SIGNED> MSL_FN W msl_pack(vec<float, N> v) {
  W word = 0;
  for (int i = 0; i < N; i++) {
    float value = rint(clamp((float)v[i], SIGNED ? -1.0f : 0.0f, 1.0f) * (float)((1u << (BITS - SIGNED)) - 1));
    word |= (W)((uint)(int)value & ((1u << BITS) - 1)) << (i * BITS);
  }
  return word;
}
#define MSL_PACK(name, W, N, BITS, SIGNED)                                                                      \
  MSL_FN vec<float, N> unpack_##name##_to_float(W word) { return msl_unpack<W, N, BITS, SIGNED>(word); }        \
  MSL_FN vec<half, N> unpack_##name##_to_half(W word) { return __builtin_convertvector((msl_unpack<W, N, BITS, SIGNED>(word)), vec<half, N>); } \
  MSL_FN W pack_float_to_##name(vec<float, N> v) { return msl_pack<W, N, BITS, SIGNED>(v); }                    \
  MSL_FN W pack_half_to_##name(vec<half, N> v) { return msl_pack<W, N, BITS, SIGNED>(__builtin_convertvector(v, vec<float, N>)); }
MSL_PACK(unorm4x8, uint, 4, 8, false) MSL_PACK(snorm4x8, uint, 4, 8, true)
MSL_PACK(unorm2x16, uint, 2, 16, false) MSL_PACK(snorm2x16, uint, 2, 16, true)
}  // namespace metal
