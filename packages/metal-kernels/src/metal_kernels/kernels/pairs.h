// Four 8-bit elements as two pairs of float16, without their scale.
// FORMAT is 0 int8 or 1 fp8 (e4m3), 256 times too small.
template <int FORMAT> FUNCTION void unpack_pairs(uint word, THREAD(uint)* to) {
  if constexpr (FORMAT == 0) {
    const uint raised = word ^ 0x80808080u;  // 1024 + x + 128 has x + 128 in its last bits
    to[0] = minus_1152((raised & 0xFFu) | (raised & 0xFF00u) << 8 | 0x64006400u);
    to[1] = minus_1152((raised >> 16 & 0xFFu) | (raised >> 8 & 0xFF0000u) | 0x64006400u);
  } else {
    const uint first = (word & 0xFFu) << 8 | (word & 0xFF00u) << 16;
    const uint last = (word >> 8 & 0xFF00u) | (word & 0xFF000000u);
    to[0] = (first & 0x80008000u) | (first >> 1 & 0x3F803F80u);
    to[1] = (last & 0x80008000u) | (last >> 1 & 0x3F803F80u);
  }
}

// Sixteen elements as float16.
template <int FORMAT> FUNCTION void store_halves(uint4 words, TG(uint4)* to) {
  uint pairs[8];
  unpack_pairs<FORMAT>(words.x, pairs);
  unpack_pairs<FORMAT>(words.y, pairs + 2);
  unpack_pairs<FORMAT>(words.z, pairs + 4);
  unpack_pairs<FORMAT>(words.w, pairs + 6);
  uint4 half_words;
  half_words.x = pairs[0];
  half_words.y = pairs[1];
  half_words.z = pairs[2];
  half_words.w = pairs[3];
  to[0] = half_words;
  half_words.x = pairs[4];
  half_words.y = pairs[5];
  half_words.z = pairs[6];
  half_words.w = pairs[7];
  to[1] = half_words;
}
