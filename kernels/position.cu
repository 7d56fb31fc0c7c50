// position.cu -- rotary positions in place, on the query and key heads of packed rows.
// Math: (a, b) -> (a cos - b sin, b cos + a sin), a and b being the halves of a head's first R columns.
// Launch: a block of 256 threads a token, one pair of values after the other.
// Deterministic: no value depends on another pair. Bytes: each rotated value read and written once.
// Reference: hone_kernels::Reference, 5e-7.
#include "common.cuh"

namespace {

template <class X>
__device__ void rope(X* qkv, i64 width, int n_heads, int dim, int rotary, const unsigned* positions, const float* cos_sin,
                     float sign) {
    i64 token = blockIdx.x;
    int half = rotary / 2;
    const float* cos = cos_sin + (i64)positions[token] * rotary;
    X* row = qkv + token * width;
    for (int pair = threadIdx.x; pair < n_heads * half; pair += blockDim.x) {
        int head = pair / half, at = pair - head * half;
        X* a = row + head * dim + at;
        X* b = a + half;
        float x = value(*a), y = value(*b), c = cos[at], s = sign * cos[half + at];
        put(a, x * c - y * s);
        put(b, y * c + x * s);
    }
}

}  // namespace

#define FOR_X(X, x_)                                                                                          \
    KERNEL(256, rope_##x_,                                                                                    \
           (X* qkv, i64 width, int n_heads, int dim, int rotary, const unsigned* positions, const float* cos_sin, \
            float sign),                                                                                      \
           rope(qkv, width, n_heads, dim, rotary, positions, cos_sin, sign))
FOR_X(float, f32)
FOR_X(bf16, bf16)
