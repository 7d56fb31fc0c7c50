// common.cuh -- what every kernel file begins with: types, names of kernels, reductions.
//
// One source for nvcc and for the simulator (sim/cusim.h, which defines CUSIM): kernels are templates
// over the types of their buffers, and KERNEL gives each use a plain name and a fixed block size. All
// arithmetic is f32 unless a file says otherwise; bf16 is only how values lie in memory. No atomics on
// floats: every sum is added in an order that the shape alone decides.
#pragma once

#ifndef CUSIM
#include <cstdint>
#include <cuda_bf16.h>
#define DYNAMIC_SHARED(T, name)                                   \
    extern __shared__ __align__(16) unsigned char dynamic_bytes[]; \
    T* name = reinterpret_cast<T*>(dynamic_bytes)
#define REGISTER_KERNEL(threads, name)
#endif

typedef __nv_bfloat16 bf16;
typedef int64_t i64;

// A kernel of blocks of `threads` threads: its name, its arguments in parentheses, and the call it is.
#define KERNEL(threads, name, arguments, ...)                                         \
    extern "C" __global__ void __launch_bounds__(threads, 1) name arguments { __VA_ARGS__; } \
    REGISTER_KERNEL(threads, name)

#define ALL_LANES 0xffffffffu
#define NEG_INF (-__int_as_float(0x7f800000))

// ---------------------------------------------------------------------------------------- values

__device__ __forceinline__ float value(float x) { return x; }
__device__ __forceinline__ float value(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void put(float* to, float x) { *to = x; }
__device__ __forceinline__ void put(bf16* to, float x) { *to = __float2bfloat16(x); }

// x as a factor of a product in bf16, or as it is.
__device__ __forceinline__ float rounded(float x, bool rounds) {
    return rounds ? __bfloat162float(__float2bfloat16(x)) : x;
}

__device__ __forceinline__ i64 thread_index() { return (i64)blockIdx.x * blockDim.x + threadIdx.x; }
__device__ __forceinline__ i64 n_threads() { return (i64)gridDim.x * blockDim.x; }

// ------------------------------------------------------------------------------------ reductions

// The sum over a warp, the same bytes in every lane: partners exchange, and a + b is b + a.
template <class T> __device__ __forceinline__ T warp_sum(T x) {
    for (int lanes = 16; lanes > 0; lanes >>= 1) x = x + __shfl_xor_sync(ALL_LANES, x, lanes);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
    for (int lanes = 16; lanes > 0; lanes >>= 1) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, lanes));
    return x;
}

// The sum over a block of whole warps, the same bytes in every thread. `scratch` has 32 places and may
// be used again at once.
template <class T> __device__ __forceinline__ T block_sum(T x, T* scratch) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    x = warp_sum(x);
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    x = warp_sum(lane < warps ? scratch[lane] : T(0));
    __syncthreads();
    return x;
}
__device__ __forceinline__ float block_max(float x, float* scratch) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    x = warp_max(x);
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    x = warp_max(lane < warps ? scratch[lane] : NEG_INF);
    __syncthreads();
    return x;
}

// ---------------------------------------------------------------------------------------- random

// SplitMix64, as hone_kernels::rng has it: value `index` of the stream that starts at `stream`.
__device__ __forceinline__ uint64_t mixed(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}
__device__ __forceinline__ uint64_t draw(uint64_t stream, uint64_t index) {
    return mixed(stream + index * 0x9e3779b97f4a7c15ull);
}
