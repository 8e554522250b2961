FUNCTION float row_max(float x) {
  const float y = simd_shuffle_xor(x, 1);
  x = x > y ? x : y;
  const float z = simd_shuffle_xor(x, ROW_STEP);
  return x > z ? x : z;
}
FUNCTION float row_sum(float x) {
  x += simd_shuffle_xor(x, 1);
  return x + simd_shuffle_xor(x, ROW_STEP);
}
