#define DEV(T) device T
#define TG(T) threadgroup T
#define THREAD(T) thread T
#define FUNCTION METAL_FUNC
#define THREADGROUP_ARRAY(T, name, size) threadgroup T name[size]
#define UNROLL _Pragma("clang loop unroll(full)")
METAL_FUNC float exp2_fast(float x) { return fast::exp2(x); }
METAL_FUNC float rsqrt_precise(float x) { return precise::rsqrt(x); }
METAL_FUNC float tanh_precise(float x) { return precise::tanh(x); }
METAL_FUNC float log_precise(float x) { return precise::log(x); }
template <typename T> METAL_FUNC float to_f32(T x) { return float(x); }
template <typename T> METAL_FUNC T from_f32(float x) { return T(x); }
