#define DEV(T) device T
#define THREADGROUP_ARRAY(T, name, size) threadgroup T name[size]
#define UNROLL _Pragma("clang loop unroll(full)")
METAL_FUNC float exp2_fast(float x) { return fast::exp2(x); }
METAL_FUNC float rsqrt_precise(float x) { return precise::rsqrt(x); }
METAL_FUNC float tanh_precise(float x) { return precise::tanh(x); }
template <typename T> METAL_FUNC float to_f32(T x) { return float(x); }
template <typename T> METAL_FUNC T from_f32(float x) { return T(x); }
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
