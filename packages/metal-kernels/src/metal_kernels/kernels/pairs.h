// Four 8-bit elements as two pairs of float16, without their scale.
// FORMAT is 0 int8 or 1 fp8 (e4m3), FP8_UNIT times too small.
template <int FORMAT> FUNCTION void unpack_pairs(uint word, THREAD(uint)* to) {
  if constexpr (FORMAT == 0) {
    const uint raised = word ^ 0x80808080u;  // 1024 + x + 128 has x + 128 in its last bits
    to[0] = minus_1152(zip_bytes_low(raised, 0x64646464u));
    to[1] = minus_1152(zip_bytes_high(raised, 0x64646464u));
  } else {
#if FP8_UNIT == 1
    convert_fp8(word, to);
#else
    const uint first = zip_bytes_low(0u, word);
    const uint last = zip_bytes_high(0u, word);
    to[0] = (first & 0x80008000u) | (first >> 1 & 0x3F803F80u);
    to[1] = (last & 0x80008000u) | (last >> 1 & 0x3F803F80u);
#endif
  }
}
