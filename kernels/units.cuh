// units.cuh -- a few neighbouring values at once: one access to memory where they are aligned.
#pragma once
#include "common.cuh"

// What a GPU refuses and a processor does not mind.
#ifdef CUSIM
#define EXPECT_ALIGNED(at, bytes) \
    if (reinterpret_cast<uintptr_t>(at) % (bytes) != 0) cusim::die("a unit is taken where none begins")
#else
#define EXPECT_ALIGNED(at, bytes)
#endif

template <class T, int N> struct __align__(sizeof(T) * N) Unit { T x[N]; };

// Whether units of N values may be read or written at `at` and any multiple of N further on.
template <int N, class T> __device__ __forceinline__ bool is_wide(const T* at) {
    return reinterpret_cast<uintptr_t>(at) % (sizeof(T) * N) == 0;
}

template <int N, class T> __device__ __forceinline__ void load(const T* from, bool wide, float (&x)[N]) {
    Unit<T, N> unit;
    if (wide) {
        EXPECT_ALIGNED(from, sizeof unit);
        unit = *reinterpret_cast<const Unit<T, N>*>(from);
    } else {
        for (int k = 0; k < N; k++) unit.x[k] = from[k];
    }
    for (int k = 0; k < N; k++) x[k] = value(unit.x[k]);
}

template <int N, class T> __device__ __forceinline__ void store(T* to, bool wide, const float (&x)[N]) {
    Unit<T, N> unit;
    for (int k = 0; k < N; k++) put(&unit.x[k], x[k]);
    if (wide) {
        EXPECT_ALIGNED(to, sizeof unit);
        *reinterpret_cast<Unit<T, N>*>(to) = unit;
    } else {
        for (int k = 0; k < N; k++) to[k] = unit.x[k];
    }
}

// Four bytes, the first in the lowest bits.
__device__ __forceinline__ unsigned load_bytes(const unsigned char* from) {
    EXPECT_ALIGNED(from, 4);
    return *reinterpret_cast<const unsigned*>(from);
}
__device__ __forceinline__ void store_bytes(unsigned char* to, unsigned all) {
    EXPECT_ALIGNED(to, 4);
    *reinterpret_cast<unsigned*>(to) = all;
}
