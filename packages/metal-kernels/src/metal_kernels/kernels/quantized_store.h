// Elements and scales as they are stored; quantized.h names the formats.
FUNCTION uint f32_fp8(float x) {
  const uint bits = f32_bits(x);
  const uint size = bits & 0x7FFFFFFFu;
  const uint normal = ((size + 0x7FFFFu + ((size >> 20) & 1u)) >> 20) - (120u << 3);
  const uint code = size < 0x3C800000u ? uint(round_even(bits_f32(size) * 512.0f)) : normal;
  return (bits >> 24 & 0x80u) | (code < 0x7Eu ? code : 0x7Eu);
}

FUNCTION float limit(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

// A SIMD-group stores a head; each lane has 8 consecutive elements, zero beyond the head.
template <int FORMAT, int HEAD_SIZE> FUNCTION void
store_head(const THREAD(float)* x, int lane, DEV(uint)* data, DEV(uint)* scales) {
  constexpr int BITS = Element<FORMAT>::BITS;
  constexpr int GROUP = HEAD_SIZE % 32 == 0 ? 32 : HEAD_SIZE % 16 == 0 ? 16 : 8;
  const bool held = lane * 8 < HEAD_SIZE;
  float low = x[0];
  float high = x[0];
  UNROLL for (int i = 1; i < 8; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
  }
  float scale = 1.0f;
  float bias = 0.0f;
  if constexpr (FORMAT == 2) {
    UNROLL for (int step = GROUP / 16; step > 0; step /= 2) {
      const float other_low = simd_shuffle_xor(low, step);
      const float other_high = simd_shuffle_xor(high, step);
      low = other_low < low ? other_low : low;
      high = other_high > high ? other_high : high;
    }
    const uint bias_bits = f32_half_bits(limit(low, -65504.0f, 65504.0f));
    bias = half_bits_f32(bias_bits);
    const uint scale_bits = f32_half_bits(limit((high - bias) / 15.0f, -65504.0f, 65504.0f));
    scale = half_bits_f32(scale_bits);
    if (held && lane * 8 % GROUP == 0) scales[lane * 8 / GROUP] = scale_bits | bias_bits << 16;
  } else if constexpr (FORMAT < 2) {
    float largest = -low > high ? -low : high;
    UNROLL for (int step = 16; step > 0; step /= 2) {
      const float other = simd_shuffle_xor(largest, step);
      largest = other > largest ? other : largest;
    }
    scale = largest / (FORMAT == 1 ? 448.0f : 127.0f);
    if (lane == 0) scales[0] = f32_bits(scale);
  }
  scale = scale > 0.0f ? scale : 1.0f;
  if (held) {
    UNROLL for (int w = 0; w < BITS / 4; ++w) {
      uint word = 0;
      UNROLL for (int i = 0; i < 32 / BITS; ++i) {
        const float y = x[w * (32 / BITS) + i];
        uint code;
        if constexpr (FORMAT == 0) code = uint(int(limit(round_even(y / scale), -127.0f, 127.0f))) & 0xFFu;
        else if constexpr (FORMAT == 1) code = f32_fp8(y / scale);
        else if constexpr (FORMAT == 2) code = uint(limit(round_even((y - bias) / scale), 0.0f, 15.0f));
        else if constexpr (FORMAT == 3) code = f32_half_bits(y);
        else if constexpr (FORMAT == 4) code = f32_bfloat_bits(y);
        else code = f32_bits(y);
        word |= code << (i * BITS % 32);
      }
      data[lane * (BITS / 4) + w] = word;
    }
  }
}
