// N consecutive elements, in the widest loads that their alignment allows.
template <int N, typename Word, typename T> __device__ __forceinline__ void load_words(const T* from, float* to) {
  constexpr int PER_WORD = sizeof(Word) / sizeof(T);
  Word words[N / PER_WORD];
  UNROLL for (int i = 0; i < N / PER_WORD; ++i) words[i] = reinterpret_cast<const Word*>(from)[i];
  UNROLL for (int i = 0; i < N; ++i) to[i] = to_f32(reinterpret_cast<const T*>(words)[i]);
}
template <int N, typename T> __device__ __forceinline__ void load_f32(const T* from, float* to) {
  constexpr int BYTES = N * sizeof(T);
  if constexpr (BYTES % 16 == 0) load_words<N, uint4>(from, to);
  else if constexpr (BYTES % 8 == 0) load_words<N, uint2>(from, to);
  else if constexpr (BYTES % 4 == 0) load_words<N, uint>(from, to);
  else load_words<N, T>(from, to);
}
template <int N, typename Word, typename T> __device__ __forceinline__ void store_words(T* to, const float* from) {
  constexpr int PER_WORD = sizeof(Word) / sizeof(T);
  Word words[N / PER_WORD];
  UNROLL for (int i = 0; i < N; ++i) reinterpret_cast<T*>(words)[i] = from_f32<T>(from[i]);
  UNROLL for (int i = 0; i < N / PER_WORD; ++i) reinterpret_cast<Word*>(to)[i] = words[i];
}
template <int N, typename T> __device__ __forceinline__ void store_f32(T* to, const float* from) {
  constexpr int BYTES = N * sizeof(T);
  if constexpr (BYTES % 16 == 0) store_words<N, uint4>(to, from);
  else if constexpr (BYTES % 8 == 0) store_words<N, uint2>(to, from);
  else if constexpr (BYTES % 4 == 0) store_words<N, uint>(to, from);
  else store_words<N, T>(to, from);
}
// N consecutive elements as they lie in memory, to be converted later.
template <typename T, int N> struct Raw {
  static constexpr int BYTES = N * sizeof(T);
  using Pair = cuda::std::conditional_t<BYTES % 4 == 0, uint, T>;
  using Word = cuda::std::conditional_t<BYTES % 16 == 0, uint4, cuda::std::conditional_t<BYTES % 8 == 0, uint2, Pair>>;
  static constexpr int WORDS = BYTES / sizeof(Word);
  Word words[WORDS];
};
template <int N, typename T> __device__ __forceinline__ Raw<T, N> load_raw(const T* from) {
  Raw<T, N> raw;
  using Word = typename Raw<T, N>::Word;
  UNROLL for (int i = 0; i < Raw<T, N>::WORDS; ++i) raw.words[i] = reinterpret_cast<const Word*>(from)[i];
  return raw;
}
template <typename T, int N> __device__ __forceinline__ void unpack_f32(const Raw<T, N>& raw, float* to) {
  UNROLL for (int i = 0; i < N; ++i) to[i] = to_f32(reinterpret_cast<const T*>(raw.words)[i]);
}
