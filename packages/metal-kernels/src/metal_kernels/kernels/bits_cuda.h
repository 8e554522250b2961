// Bit patterns as numbers.
FUNCTION float bits_f32(uint bits) { return __uint_as_float(bits); }
FUNCTION uint f32_bits(float x) { return __float_as_uint(x); }
FUNCTION float half_bits_f32(uint bits) { return __half2float(__ushort_as_half((unsigned short)bits)); }
FUNCTION uint f32_half_bits(float x) { return __half_as_ushort(__float2half_rn(x)); }
FUNCTION uint f32_bfloat_bits(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
FUNCTION float round_even(float x) { return rintf(x); }
FUNCTION float magnitude(float x) { return fabsf(x); }
FUNCTION uint minus_1152(uint halves) {
  const __half2 less = __hsub2(*reinterpret_cast<const __half2*>(&halves), __float2half2_rn(1152.0f));
  return *reinterpret_cast<const uint*>(&less);
}
