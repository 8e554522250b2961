// Neighbours of a row: as they are, or as codes of BITS bits with a scale and a bias.
template <int BITS> struct PackedRun {
  uint words[4];
  float scale;
  float bias;
};
template <int BITS> FUNCTION void load_packed(THREAD(PackedRun<BITS>)& to, const DEV(uint)* from) {
  const uint4 words = *(const DEV(uint4)*)from;
  to.words[0] = words.x;
  to.words[1] = words.y;
  to.words[2] = words.z;
  to.words[3] = words.w;
}
template <typename T> using Eight = Raw<T, 8>;
template <typename T> FUNCTION Eight<T> eight_of(const THREAD(Eight<T>)& run, int) { return run; }
template <typename T, int BITS> FUNCTION Eight<T> eight_of(const THREAD(PackedRun<BITS>)& run, int from) {
  float x[8];
  UNROLL for (int i = 0; i < 8; ++i) {
    const uint code = run.words[(from + i) * BITS / 32] >> ((from + i) * BITS % 32) & ((1u << BITS) - 1u);
    x[i] = (bits_f32(0x4B000000u | code) - 8388608.0f) * run.scale + run.bias;
  }
  return pack_eight<T>(x);
}
