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
__device__ __forceinline__ void simdgroup_barrier(mem_flags) { __syncwarp(); }
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
