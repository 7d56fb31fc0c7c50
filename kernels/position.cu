// position.cu -- rotary positions in place, on the first columns of query and key heads.
// Math: f32; (a, b) -> (a cos - b sin, b cos + a sin), a and b half of the rotated columns apart.
// Launch: blocks of 256 threads that go on until all packs of pairs are done; a pack is 8 pairs where the
// halves are multiples of 8 and everything lies aligned, and 1 pair elsewhere.
// Deterministic: a pair depends on nothing else.
// Reference: hone_kernels::Reference. Tolerance 5e-7.
#include "packs.cuh"

namespace {

// `turned` heads of each row of `width` values are rotated; `sign` is -1 for the transpose.
template <int N, class X>
__device__ void rope_by(X* qkv, const unsigned* positions, const float* cos_sin, float sign, i64 tokens, i64 width,
                        i64 turned, i64 dim, i64 half) {
    i64 in_head = half / N, in_row = turned * in_head;
    for (i64 i = thread_index(); i < tokens * in_row; i += n_threads()) {
        i64 token = i / in_row, rest = i - token * in_row;
        i64 head = rest / in_head, col = (rest - head * in_head) * N;
        const float* angles = &cos_sin[(i64)positions[token] * 2 * half + col];
        X* to = &qkv[token * width + head * dim + col];
        Pack<N> a = load<N>(to), b = load<N>(to + half), cos = load<N>(angles), sin = load<N>(angles + half);
        for (int k = 0; k < N; k++) {
            float x = a.at[k], y = b.at[k], s = sign * sin.at[k];
            a.at[k] = fmaf(x, cos.at[k], -__fmul_rn(y, s));
            b.at[k] = fmaf(y, cos.at[k], __fmul_rn(x, s));
        }
        store<N>(to, a);
        store<N>(to + half, b);
    }
}

template <class X>
__device__ void rope(X* qkv, const unsigned* positions, const float* cos_sin, float sign, i64 tokens, i64 width,
                     i64 turned, i64 dim, i64 half) {
    if (half % 8 == 0 && packs<8>(qkv, width | dim) && packs<8>(cos_sin, 0))
        return rope_by<8>(qkv, positions, cos_sin, sign, tokens, width, turned, dim, half);
    rope_by<1>(qkv, positions, cos_sin, sign, tokens, width, turned, dim, half);
}

}  // namespace

#define FOR_X(X, x_)                                                                                        \
    KERNEL(256, rope_##x_,                                                                                  \
           (X* qkv, const unsigned* positions, const float* cos_sin, float sign, i64 tokens, i64 width,     \
            i64 turned, i64 dim, i64 half),                                                                 \
           rope(qkv, positions, cos_sin, sign, tokens, width, turned, dim, half))

FOR_X(float, f32)
FOR_X(bf16, bf16)
