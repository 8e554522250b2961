// Elements of quantised rows. FORMAT is 0 int8, 1 fp8 (e4m3), 2 int4, 3 float16, 4 bfloat16, 5 float32.
template <int FORMAT> struct Element {
  enum { BITS = FORMAT == 2 ? 4 : FORMAT < 2 ? 8 : FORMAT < 5 ? 16 : 32, SCALED = FORMAT < 3, BIASED = FORMAT == 2 };
};

// N words from an address that is a multiple of VECTOR words.
template <int N, int VECTOR> FUNCTION void load_bits(const DEV(uint)* from, THREAD(uint)* to) {
  UNROLL for (int i = 0; i < N; i += VECTOR) {
    if constexpr (VECTOR == 4) {
      uint4 v = *(const DEV(uint4)*)(from + i);
      to[i] = v.x;
      to[i + 1] = v.y;
      to[i + 2] = v.z;
      to[i + 3] = v.w;
    } else if constexpr (VECTOR == 2) {
      uint2 v = *(const DEV(uint2)*)(from + i);
      to[i] = v.x;
      to[i + 1] = v.y;
    } else {
      to[i] = from[i];
    }
  }
}

// N elements without scale and bias; those of fp8 are 256 times too small.
template <int FORMAT, int N> FUNCTION void unpack(const THREAD(uint)* words, THREAD(float)* to) {
  UNROLL for (int i = 0; i < N; ++i) {
    constexpr int BITS = Element<FORMAT>::BITS;
    const uint word = words[i * BITS / 32];
    const int at = i * BITS % 32;
    if constexpr (FORMAT == 0) to[i] = bits_f32(0x4B000000u | (((word ^ 0x80808080u) >> at) & 0xFFu)) - 8388736.0f;
    else if constexpr (FORMAT == 1) to[i] = half_bits_f32(((word >> at) & 0x80u) << 8 | ((word >> at) & 0x7Fu) << 7);
    else if constexpr (FORMAT == 2) to[i] = bits_f32(0x4B000000u | ((word >> at) & 0xFu)) - 8388608.0f;
    else if constexpr (FORMAT == 3) to[i] = half_bits_f32((word >> at) & 0xFFFFu);
    else if constexpr (FORMAT == 4) to[i] = bits_f32(at == 0 ? word << 16 : word & 0xFFFF0000u);
    else to[i] = bits_f32(word);
  }
}

// What a scale word says: an element is q * scale + bias.
template <int FORMAT> FUNCTION void unpack_scale(uint word, THREAD(float)& scale, THREAD(float)& bias) {
  scale = FORMAT == 2 ? half_bits_f32(word & 0xFFFFu) : FORMAT == 1 ? 256.0f * bits_f32(word) : bits_f32(word);
  bias = FORMAT == 2 ? half_bits_f32(word >> 16) : 0.0f;
}
