// pointwise.cu -- what is done to each value by itself: copies, sums, scales, biases, dropout, noise.
// Math: f32; results are rounded where they lie in bf16.
// Launch: blocks of 256 threads that go on until all packs of values are done: a pack is 8 values where rows lie
// aligned, and 1 elsewhere, in soft_cap and in add_noise. bias_grad has a block of 1,024 threads for 32 columns.
// Deterministic: no value depends on another, and sums go through rows in an order that the shape decides.
// Reference: hone_kernels::Reference. Bytes equal to the twin's but for bias_grad (1e-6) and sums of two products.
#include "columns.cuh"
#include "packs.cuh"

namespace {

// A matrix whose rows are `stride` apart.
template <class X> struct Rows {
    X* at;
    i64 stride;
    __device__ __forceinline__ X* operator()(i64 row, i64 col) const { return &at[row * stride + col]; }
    // Whether rows can be read and written by packs of 8.
    __device__ __forceinline__ bool wide(i64 rows) const { return packs<8>(at, rows > 1 ? stride : 0); }
};

template <int N, class X> __device__ void fill_by(X* x, float s, i64 n) {
    Pack<N> all;
    for (int i = 0; i < N; i++) all.at[i] = s;
    each_pack<N>(1, n, [&](i64, i64 at, i64 some) { store_some<N>(&x[at], all, some); });
}
template <class X> __device__ void fill(X* x, float s, i64 n) {
    packs<8>(x, 0) ? fill_by<8>(x, s, n) : fill_by<1>(x, s, n);
}

template <int N, class X, class Y> __device__ void copy_by(Rows<const X> x, Rows<Y> y, i64 rows, i64 cols) {
    each_pack<N>(rows, cols, [&](i64 row, i64 col, i64 some) {
        store_some<N>(y(row, col), load_some<N>(x(row, col), some), some);
    });
}
template <class X, class Y> __device__ void copy_rows(Rows<const X> x, Rows<Y> y, i64 rows, i64 cols) {
    // Dense rows are one long row.
    if (x.stride == cols && y.stride == cols) cols *= rows, rows = 1;
    x.wide(rows) && y.wide(rows) ? copy_by<8>(x, y, rows, cols) : copy_by<1>(x, y, rows, cols);
}

// y <- a x + b y; y is not read where b is 0.
template <int N, class X, class Y> __device__ void axpby_by(float a, const X* x, float b, Y* y, i64 n) {
    each_pack<N>(1, n, [&](i64, i64 at, i64 some) {
        Pack<N> sum = load_some<N>(&x[at], some);
        for (int i = 0; i < N; i++) sum.at[i] = __fmul_rn(a, sum.at[i]);
        if (b != 0.0f) {
            Pack<N> old = load_some<N>(&y[at], some);
            for (int i = 0; i < N; i++) sum.at[i] = __fadd_rn(sum.at[i], __fmul_rn(b, old.at[i]));
        }
        store_some<N>(&y[at], sum, some);
    });
}
template <class X, class Y> __device__ void axpby(float a, const X* x, float b, Y* y, i64 n) {
    packs<8>(x, 0) && packs<8>(y, 0) ? axpby_by<8>(a, x, b, y, n) : axpby_by<1>(a, x, b, y, n);
}

template <int N, class X> __device__ void scale_by(X* x, float s, i64 n) {
    each_pack<N>(1, n, [&](i64, i64 at, i64 some) {
        Pack<N> scaled = load_some<N>(&x[at], some);
        for (int i = 0; i < N; i++) scaled.at[i] *= s;
        store_some<N>(&x[at], scaled, some);
    });
}
template <class X> __device__ void scale(X* x, float s, i64 n) {
    packs<8>(x, 0) ? scale_by<8>(x, s, n) : scale_by<1>(x, s, n);
}

template <int N, class Y> __device__ void add_bias_by(Rows<Y> y, const float* bias, i64 rows, i64 cols) {
    each_pack<N>(rows, cols, [&](i64 row, i64 col, i64 some) {
        Pack<N> sum = load_some<N>(y(row, col), some), more = load_some<N>(&bias[col], some);
        for (int i = 0; i < N; i++) sum.at[i] += more.at[i];
        store_some<N>(y(row, col), sum, some);
    });
}
template <class Y> __device__ void add_bias(Rows<Y> y, const float* bias, i64 rows, i64 cols) {
    y.wide(rows) && packs<8>(bias, 0) ? add_bias_by<8>(y, bias, rows, cols) : add_bias_by<1>(y, bias, rows, cols);
}

template <class Y> __device__ void bias_grad(Rows<const Y> dy, float* dbias, i64 rows, i64 cols) {
    i64 col = own_column();
    double sum = column_sum(rows, col < cols, [&](i64 row) { return (double)value(*dy(row, col)); });
    if (threadIdx.x < 32 && col < cols) dbias[col] = (float)((double)dbias[col] + sum);
}

// `stream` is that of the seed; a value is kept if the upper half of its draw is not below `below`.
struct Drops {
    uint64_t stream, below;
    float scale;
    __device__ __forceinline__ float of(float x, i64 index) const {
        bool kept = below == 0 || draw(stream, (uint64_t)index) >> 32 >= below;
        return kept ? __fmul_rn(x, scale) : 0.0f;
    }
};
template <int N, class X, class Y>
__device__ void dropout_by(Rows<const X> x, Rows<Y> y, i64 rows, i64 cols, Drops drops) {
    each_pack<N>(rows, cols, [&](i64 row, i64 col, i64 some) {
        Pack<N> left = load_some<N>(x(row, col), some);
        for (int i = 0; i < N; i++) left.at[i] = drops.of(left.at[i], row * cols + col + i);
        store_some<N>(y(row, col), left, some);
    });
}
template <class X, class Y> __device__ void dropout(Rows<const X> x, Rows<Y> y, i64 rows, i64 cols, Drops drops) {
    x.wide(rows) && y.wide(rows) ? dropout_by<8>(x, y, rows, cols, drops) : dropout_by<1>(x, y, rows, cols, drops);
}

__device__ void soft_cap(float* x, float cap, i64 n) {
    for (i64 i = thread_index(); i < n; i += n_threads()) x[i] = cap * tanhf(x[i] / cap);
}

// Noise of one document of `n` values: bound (2 u - 1), u a multiple of 2^-53.
__device__ void add_noise(float* x, i64 n, uint64_t stream, double bound) {
    for (i64 i = thread_index(); i < n; i += n_threads()) {
        double u = (double)(draw(stream, (uint64_t)i) >> 11) * (1.0 / 9007199254740992.0);
        x[i] += (float)((2.0 * u - 1.0) * bound);
    }
}

}  // namespace

#define FOR_X(X, x_)                                                                               \
    KERNEL(256, fill_##x_, (X* x, float s, i64 n), fill(x, s, n))                                  \
    KERNEL(256, scale_##x_, (X* x, float s, i64 n), scale(x, s, n))                                \
    KERNEL(256, add_bias_##x_, (X* y, i64 stride, const float* bias, i64 rows, i64 cols),          \
           add_bias(Rows<X>{y, stride}, bias, rows, cols))                                       \
    KERNEL(1024, bias_grad_##x_, (const X* dy, i64 stride, float* dbias, i64 rows, i64 cols),      \
           bias_grad(Rows<const X>{dy, stride}, dbias, rows, cols))
#define FOR_XY(X, x_, Y, y_)                                                                        \
    KERNEL(256, copy_rows_##x_##_##y_, (const X* x, i64 x_stride, Y* y, i64 y_stride, i64 rows, i64 cols), \
           copy_rows(Rows<const X>{x, x_stride}, Rows<Y>{y, y_stride}, rows, cols))               \
    KERNEL(256, axpby_##x_##_##y_, (float a, const X* from, float b, Y* to, i64 n), axpby(a, from, b, to, n)) \
    KERNEL(256, dropout_##x_##_##y_,                                                                \
           (const X* from, i64 x_stride, Y* to, i64 y_stride, i64 rows, i64 cols, uint64_t stream, \
            uint64_t below, float scale),                                                         \
           dropout(Rows<const X>{from, x_stride}, Rows<Y>{to, y_stride}, rows, cols, Drops{stream, below, scale}))

FOR_X(float, f32)
FOR_X(bf16, bf16)
FOR_XY(float, f32, float, f32)
FOR_XY(float, f32, bf16, bf16)
FOR_XY(bf16, bf16, float, f32)
FOR_XY(bf16, bf16, bf16, bf16)
KERNEL(256, soft_cap_f32, (float* x, float cap, i64 n), soft_cap(x, cap, n))
KERNEL(256, add_noise_f32, (float* x, i64 n, uint64_t stream, double bound), add_noise(x, n, stream, bound))
