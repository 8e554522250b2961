// N consecutive elements, in the widest loads that their alignment allows.
template <int N, typename T> METAL_FUNC void load_f32(const device T* from, thread float* to) {
  if constexpr (N % 4 == 0) {
    for (int i = 0; i < N; i += 4) {
      vec<T, 4> v = *(const device vec<T, 4>*)(from + i);
      for (int j = 0; j < 4; ++j) to[i + j] = float(v[j]);
    }
  } else {
    for (int i = 0; i < N; ++i) to[i] = float(from[i]);
  }
}
template <int N, typename T> METAL_FUNC void store_f32(device T* to, const thread float* from) {
  if constexpr (N % 4 == 0) {
    for (int i = 0; i < N; i += 4) {
      *(device vec<T, 4>*)(to + i) = vec<T, 4>(T(from[i]), T(from[i + 1]), T(from[i + 2]), T(from[i + 3]));
    }
  } else {
    for (int i = 0; i < N; ++i) to[i] = T(from[i]);
  }
}
// N consecutive elements as they lie in memory, to be converted later.
template <typename T, int N, bool FOURS = N % 4 == 0> struct Raw {
  T words[N];
};
template <typename T, int N> struct Raw<T, N, true> {
  vec<T, 4> words[N / 4];
};
template <int N, typename T> METAL_FUNC Raw<T, N> load_raw(const device T* from) {
  Raw<T, N> raw;
  if constexpr (N % 4 == 0) {
    for (int i = 0; i < N / 4; ++i) raw.words[i] = *(const device vec<T, 4>*)(from + 4 * i);
  } else {
    for (int i = 0; i < N; ++i) raw.words[i] = from[i];
  }
  return raw;
}
template <typename T, int N> METAL_FUNC void unpack_f32(const thread Raw<T, N>& raw, thread float* to) {
  for (int i = 0; i < N; ++i) {
    if constexpr (N % 4 == 0) to[i] = float(raw.words[i / 4][i % 4]);
    else to[i] = float(raw.words[i]);
  }
}
