// packs.cuh -- neighbouring values read and written at once: 16 bytes an access where they lie aligned.
#pragma once
#include "common.cuh"

// N neighbouring values: 1, 4 or 8. Eight of bf16 are one access, eight of f32 are two.
template <int N> struct Pack {
    float at[N];
};

// Whether packs can be read at once from `at` on, and from places further on by multiples of `stride`.
template <int N, class T> __device__ __forceinline__ bool packs(const T* at, i64 stride) {
    constexpr uintptr_t bytes = N * sizeof(T) < 16 ? N * sizeof(T) : 16;
    return (reinterpret_cast<uintptr_t>(at) | (uintptr_t)(stride * (i64)sizeof(T))) % bytes == 0;
}

// A GPU stops at an access that is not aligned, and so does the simulator.
template <int N, class T> __device__ __forceinline__ void must_be_aligned(const T* at) {
#ifdef CUSIM
    if (!packs<N>(at, 0)) cusim::die("an access to several values that is not aligned");
#endif
}

__device__ __forceinline__ unsigned two_bf16(float low, float high) {
    bf16 a = __float2bfloat16(low), b = __float2bfloat16(high);
    return *reinterpret_cast<const uint16_t*>(&a) | (unsigned)*reinterpret_cast<const uint16_t*>(&b) << 16;
}
__device__ __forceinline__ float low_bf16(unsigned two) { return __uint_as_float(two << 16); }
__device__ __forceinline__ float high_bf16(unsigned two) { return __uint_as_float(two & 0xffff0000u); }

template <int N> __device__ __forceinline__ Pack<N> load(const float* from) {
    must_be_aligned<N>(from);
    Pack<N> x;
    if constexpr (N == 1) x.at[0] = *from;
#pragma unroll
    for (int i = 0; i + 4 <= N; i += 4) {
        float4 four = *reinterpret_cast<const float4*>(from + i);
        x.at[i] = four.x, x.at[i + 1] = four.y, x.at[i + 2] = four.z, x.at[i + 3] = four.w;
    }
    return x;
}

template <int N> __device__ __forceinline__ Pack<N> load(const bf16* from) {
    must_be_aligned<N>(from);
    Pack<N> x;
    if constexpr (N == 1) x.at[0] = value(*from);
    if constexpr (N == 4) {
        uint2 four = *reinterpret_cast<const uint2*>(from);
        x.at[0] = low_bf16(four.x), x.at[1] = high_bf16(four.x);
        x.at[2] = low_bf16(four.y), x.at[3] = high_bf16(four.y);
    }
    if constexpr (N == 8) {
        uint4 eight = *reinterpret_cast<const uint4*>(from);
        x.at[0] = low_bf16(eight.x), x.at[1] = high_bf16(eight.x);
        x.at[2] = low_bf16(eight.y), x.at[3] = high_bf16(eight.y);
        x.at[4] = low_bf16(eight.z), x.at[5] = high_bf16(eight.z);
        x.at[6] = low_bf16(eight.w), x.at[7] = high_bf16(eight.w);
    }
    return x;
}

// The usual store, asked for by name: the compiler takes stores of float4 apart where it sees their values.
template <int N> __device__ __forceinline__ void store(float* to, const Pack<N>& x) {
    must_be_aligned<N>(to);
    if constexpr (N == 1) *to = x.at[0];
#pragma unroll
    for (int i = 0; i + 4 <= N; i += 4)
        __stwb(reinterpret_cast<float4*>(to + i), make_float4(x.at[i], x.at[i + 1], x.at[i + 2], x.at[i + 3]));
}

template <int N> __device__ __forceinline__ void store(bf16* to, const Pack<N>& x) {
    must_be_aligned<N>(to);
    if constexpr (N == 1) put(to, x.at[0]);
    if constexpr (N == 4)
        __stwb(reinterpret_cast<uint2*>(to), make_uint2(two_bf16(x.at[0], x.at[1]), two_bf16(x.at[2], x.at[3])));
    if constexpr (N == 8)
        __stwb(reinterpret_cast<uint4*>(to),
               make_uint4(two_bf16(x.at[0], x.at[1]), two_bf16(x.at[2], x.at[3]), two_bf16(x.at[4], x.at[5]),
                          two_bf16(x.at[6], x.at[7])));
}

// The first `n` of the N values; zeros are read behind them, and nothing is written there. They are
// read one by one where there are fewer, or where `wide` says that packs do not lie aligned.
template <int N, class T> __device__ __forceinline__ Pack<N> load_some(const T* from, i64 n, bool wide = true) {
    if (wide && n >= N) return load<N>(from);
    Pack<N> x;
#pragma unroll
    for (int i = 0; i < N; i++) x.at[i] = i < n ? value(from[i]) : 0.0f;
    return x;
}
template <int N, class T>
__device__ __forceinline__ void store_some(T* to, const Pack<N>& x, i64 n, bool wide = true) {
    if (wide && n >= N) return store<N>(to, x);
#pragma unroll
    for (int i = 0; i < N; i++)
        if (i < n) put(&to[i], x.at[i]);
}

// Goes through a matrix by packs: run(row, first column, number of values, which may be less than N).
template <int N, class Run> __device__ __forceinline__ void each_pack(i64 rows, i64 cols, Run run) {
    i64 in_row = (cols + N - 1) / N, n = rows * in_row;
    for (i64 i = thread_index(); i < n; i += n_threads()) {
        i64 row = i / in_row, col = (i - row * in_row) * N;
        run(row, col, cols - col < N ? cols - col : (i64)N);
    }
}
