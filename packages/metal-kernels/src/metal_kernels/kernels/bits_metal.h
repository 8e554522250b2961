// Bit patterns as numbers.
FUNCTION float bits_f32(uint bits) { return as_type<float>(bits); }
FUNCTION uint f32_bits(float x) { return as_type<uint>(x); }
FUNCTION float half_bits_f32(uint bits) { return float(as_type<half>(ushort(bits))); }
FUNCTION uint f32_half_bits(float x) { return uint(as_type<ushort>(half(x))); }
FUNCTION uint f32_bfloat_bits(float x) { return uint(as_type<ushort>(bfloat16_t(x))); }
FUNCTION float round_even(float x) { return rint(x); }
FUNCTION float magnitude(float x) { return fabs(x); }
FUNCTION uint minus_1152(uint halves) { return as_type<uint>(as_type<half2>(halves) - half2(1152.0h)); }
