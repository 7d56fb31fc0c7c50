// cusim.h -- runs CUDA kernels on the CPU, so that they can be tested where there is no GPU.
//
// Used as `g++ -x c++ -include cusim.h kernel.cu`. Each CUDA thread is a fibre; a block's fibres are
// switched only where threads meet (barriers, shuffles), in an order that the schedule names, and blocks
// follow each other. What this shows: indices, masks, tails, reductions, missing barriers (a schedule
// makes them a wrong result), barriers that not all threads reach, and reads and writes outside of
// a buffer (see memory.cpp). What it cannot show: races between two meeting points, memory order, the
// accuracy of fast intrinsics, speed.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define CUSIM 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __constant__ static const
#define __align__(n) alignas(n)
// Blocks follow each other, so what a block shares may live in one place.
#define __shared__ static

// ------------------------------------------------------------------------------------- types

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct __nv_bfloat16 { uint16_t bits; };
inline float __bfloat162float(__nv_bfloat16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
// To nearest, ties to even; what is not a number stays so.
inline __nv_bfloat16 __float2bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
    return {(uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}
// Half precision as the f32 that it widens to. To nearest, ties to even; below 2^-14 to multiples of 2^-24.
struct __half { float widened; };
inline float __half2float(__half x) { return x.widened; }
inline __half __float2half_rn(float x) {
    float size = fabsf(x);
    uint32_t bits;
    memcpy(&bits, &size, 4);
    bits = (bits + 0xfff + ((bits >> 13) & 1)) & ~0x1fffu;
    if (size >= 65520.0f) size = INFINITY;
    else if (size < 6.103515625e-05f) size = (size + 0.5f) - 0.5f;
    else if (size == size) memcpy(&size, &bits, 4);
    return {copysignf(size, x)};
}
inline float __int_as_float(int bits) { float x; memcpy(&x, &bits, 4); return x; }
inline int __float_as_int(float x) { int bits; memcpy(&bits, &x, 4); return bits; }
inline unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
inline float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }

// -------------------------------------------------------------------------------- arithmetic

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline double __dmul_rn(double x, double y) { return x * y; }
inline double __dadd_rn(double x, double y) { return x + y; }
inline float __fdividef(float x, float y) { return x / y; }
template <class T> inline T __ldg(const T* x) { return *x; }
template <class T> inline T __ldcs(const T* x) { return *x; }
template <class T> inline void __stcs(T* to, T x) { *to = x; }
template <class T> inline void __stwb(T* to, T x) { *to = x; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
using std::isfinite;
using std::isnan;
using std::max;
using std::min;

// ----------------------------------------------------------------------------------- threads

namespace cusim {
struct Index { unsigned x, y, z; };
// Of the thread that runs.
extern Index thread_idx, block_idx;
extern dim3 block_dim, grid_dim;
// What the block shares by size, aligned to 128 bytes.
extern unsigned char* dynamic_shared;

int lane();
void block_barrier();
void warp_barrier(unsigned lanes);
// Each lane lays down `size` bytes; when all of `lanes` have, each reads those of all.
void exchange(unsigned lanes, const void* own, void* all, size_t size);
[[noreturn]] void die(const char* what);

// Where a lane of the running thread's warp lays down what it shuffles. There are two places that are taken in turn when all
// lanes take part: nobody lays down the next but one before all have met for the next, and so have read. Parts of a warp have
// a third.
void* shuffled(int lane, int place);
int turn();

template <class T> inline T shuffle(unsigned lanes, T x, int from) {
    if (from < 0 || from > 31 || !((lanes >> from) & 1)) die("a shuffle reads a lane outside of its mask");
    bool whole = lanes == 0xffffffffu;
    int place = whole ? turn() : 2;
    memcpy(shuffled(lane(), place), &x, sizeof x);
    warp_barrier(lanes);
    memcpy(&x, shuffled(from, place), sizeof x);
    if (!whole) warp_barrier(lanes);
    return x;
}

// What an argument is, as the launching side must have said it.
enum Kind : int { POINTER = 0, I32 = 1, I64 = 2, U64 = 3, F32 = 4, F64 = 5 };
template <class T> constexpr int kind_of() {
    if (std::is_pointer_v<T>) return POINTER;
    if (std::is_same_v<T, int> || std::is_same_v<T, unsigned>) return I32;
    if (std::is_same_v<T, int64_t>) return I64;
    if (std::is_same_v<T, uint64_t>) return U64;
    if (std::is_same_v<T, float>) return F32;
    if (std::is_same_v<T, double>) return F64;
    return -1;
}

struct Kernel {
    const char* name;
    int threads;
    int n_arguments;
    const int* kinds;
    void (*call)(void** arguments);
    Kernel* next;
    static Kernel* first;
};

template <class... A, size_t... I> inline void apply(void (*run)(A...), void** at, std::index_sequence<I...>) {
    run(*static_cast<std::remove_const_t<A>*>(at[I])...);
}
template <auto run> struct Of;
template <class... A, void (*run)(A...)> struct Of<run> {
    static constexpr int kinds[sizeof...(A) + 1] = {kind_of<A>()..., -1};
    static constexpr int n = sizeof...(A);
    static void call(void** at) { apply(run, at, std::index_sequence_for<A...>{}); }
};
struct Registered {
    Kernel kernel;
    Registered(const char* name, int threads, int n, const int* kinds, void (*call)(void**))
        : kernel{name, threads, n, kinds, call, Kernel::first} { Kernel::first = &kernel; }
};
}  // namespace cusim

#define threadIdx (cusim::thread_idx)
#define blockIdx (cusim::block_idx)
#define blockDim (cusim::block_dim)
#define gridDim (cusim::grid_dim)
#define __syncthreads() cusim::block_barrier()
#define __syncwarp(...) cusim::warp_barrier(0xffffffffu)
#define __shfl_sync(lanes, x, from) cusim::shuffle(lanes, x, (int)(from) & 31)
#define __shfl_xor_sync(lanes, x, mask) cusim::shuffle(lanes, x, cusim::lane() ^ (int)(mask))
#define __shfl_down_sync(lanes, x, by) cusim::shuffle(lanes, x, cusim::lane() + (int)(by) < 32 ? cusim::lane() + (int)(by) : cusim::lane())
#define DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(cusim::dynamic_shared)
#define REGISTER_KERNEL(threads, name) \
    __attribute__((used)) static cusim::Registered registered_##name(#name, threads, cusim::Of<name>::n, cusim::Of<name>::kinds, cusim::Of<name>::call);
