typedef unsigned int uint;
#define DEV(T) T
#define TG(T) T
#define THREAD(T) T
#define FUNCTION __device__ __forceinline__
#define THREADGROUP_ARRAY(T, name, size) __shared__ T name[size]
#define UNROLL _Pragma("unroll")
#define threadgroup_position_in_grid blockIdx
#define thread_position_in_threadgroup threadIdx
#define thread_index_in_simdgroup (threadIdx.x & 31u)
#define simdgroup_index_in_threadgroup (threadIdx.x >> 5)
enum class mem_flags { mem_none, mem_device, mem_threadgroup };
__device__ __forceinline__ void threadgroup_barrier(mem_flags) { __syncthreads(); }
__device__ __forceinline__ float simd_shuffle_xor(float x, unsigned short mask) { return __shfl_xor_sync(~0u, x, mask); }
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rsqrt_precise(float x) { return rsqrtf(x); }
__device__ __forceinline__ float tanh_precise(float x) { return tanhf(x); }
__device__ __forceinline__ float log_precise(float x) { return logf(x); }
__device__ __forceinline__ float to_f32(float x) { return x; }
__device__ __forceinline__ float to_f32(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_f32(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename T> struct Rounded;
template <> struct Rounded<float> { static __device__ float of(float x) { return x; } };
template <> struct Rounded<__half> { static __device__ __half of(float x) { return __float2half_rn(x); } };
template <> struct Rounded<__nv_bfloat16> { static __device__ __nv_bfloat16 of(float x) { return __float2bfloat16_rn(x); } };
template <typename T> __device__ __forceinline__ T from_f32(float x) { return Rounded<T>::of(x); }
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
