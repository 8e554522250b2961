#if __CUDA_ARCH__ >= 890
#define FP8_UNIT 1
FUNCTION void convert_fp8(uint word, uint* to) {
  asm("{ .reg .b16 first, last; mov.b32 {first, last}, %2; cvt.rn.f16x2.e4m3x2 %0, first; cvt.rn.f16x2.e4m3x2 %1, last; }"
      : "=r"(to[0]), "=r"(to[1]) : "r"(word));
}
#else
#define FP8_UNIT 256
#endif
