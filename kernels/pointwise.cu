// pointwise.cu -- what is done to each value by itself: copies, sums, scales, biases, dropout, noise.
// Math: f32; results are rounded where they lie in bf16.
// Launch: blocks of 256 threads that go on until all values are done; bias_grad has a thread a column.
// Deterministic: no value depends on another, and sums go through rows in order.
// Reference: hone_kernels::Reference. Bytes equal to the twin's but for bias_grad (1e-6) and sums of two products.
#include "common.cuh"

namespace {

// Row and column of value `i` of a matrix `cols` wide.
struct Place {
    i64 row, col;
    __device__ Place(i64 i, i64 cols) : row(i / cols), col(i - row * cols) {}
};

template <class X> __device__ void fill(X* x, float s, i64 n) {
    for (i64 i = thread_index(); i < n; i += n_threads()) put(&x[i], s);
}

template <class X, class Y>
__device__ void copy_rows(const X* x, i64 x_stride, Y* y, i64 y_stride, i64 rows, i64 cols) {
    for (i64 i = thread_index(); i < rows * cols; i += n_threads()) {
        Place at(i, cols);
        put(&y[at.row * y_stride + at.col], value(x[at.row * x_stride + at.col]));
    }
}

// y <- a x + b y; y is not read where b is 0.
template <class X, class Y> __device__ void axpby(float a, const X* x, float b, Y* y, i64 n) {
    for (i64 i = thread_index(); i < n; i += n_threads()) {
        float added = __fmul_rn(a, value(x[i]));
        put(&y[i], b == 0.0f ? added : __fadd_rn(added, __fmul_rn(b, value(y[i]))));
    }
}

template <class X> __device__ void scale(X* x, float s, i64 n) {
    for (i64 i = thread_index(); i < n; i += n_threads()) put(&x[i], s * value(x[i]));
}

template <class Y> __device__ void add_bias(Y* y, i64 stride, const float* bias, i64 rows, i64 cols) {
    for (i64 i = thread_index(); i < rows * cols; i += n_threads()) {
        Place at(i, cols);
        Y* to = &y[at.row * stride + at.col];
        put(to, value(*to) + bias[at.col]);
    }
}

template <class Y> __device__ void bias_grad(const Y* dy, i64 stride, float* dbias, i64 rows, i64 cols) {
    i64 col = thread_index();
    if (col >= cols) return;
    // In f64, so that many rows are no matter.
    double sum = 0.0;
    for (i64 row = 0; row < rows; row++) sum += value(dy[row * stride + col]);
    dbias[col] = (float)(dbias[col] + sum);
}

// `stream` is that of the seed; a value is kept if the upper half of its draw is not below `below`.
template <class X, class Y>
__device__ void dropout(const X* x, i64 x_stride, Y* y, i64 y_stride, i64 rows, i64 cols, uint64_t stream,
                        uint64_t below, float scale) {
    for (i64 i = thread_index(); i < rows * cols; i += n_threads()) {
        Place at(i, cols);
        bool kept = below == 0 || draw(stream, (uint64_t)i) >> 32 >= below;
        put(&y[at.row * y_stride + at.col], kept ? __fmul_rn(value(x[at.row * x_stride + at.col]), scale) : 0.0f);
    }
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
           add_bias(y, stride, bias, rows, cols))                                                 \
    KERNEL(256, bias_grad_##x_, (const X* dy, i64 stride, float* dbias, i64 rows, i64 cols),       \
           bias_grad(dy, stride, dbias, rows, cols))
#define FOR_XY(X, x_, Y, y_)                                                                        \
    KERNEL(256, copy_rows_##x_##_##y_, (const X* x, i64 x_stride, Y* y, i64 y_stride, i64 rows, i64 cols), \
           copy_rows(x, x_stride, y, y_stride, rows, cols))                                       \
    KERNEL(256, axpby_##x_##_##y_, (float a, const X* from, float b, Y* to, i64 n), axpby(a, from, b, to, n)) \
    KERNEL(256, dropout_##x_##_##y_,                                                                \
           (const X* from, i64 x_stride, Y* to, i64 y_stride, i64 rows, i64 cols, uint64_t stream, \
            uint64_t below, float scale),                                                         \
           dropout(from, x_stride, to, y_stride, rows, cols, stream, below, scale))

FOR_X(float, f32)
FOR_X(bf16, bf16)
FOR_XY(float, f32, float, f32)
FOR_XY(float, f32, bf16, bf16)
FOR_XY(bf16, bf16, float, f32)
FOR_XY(bf16, bf16, bf16, bf16)
KERNEL(256, soft_cap_f32, (float* x, float cap, i64 n), soft_cap(x, cap, n))
KERNEL(256, add_noise_f32, (float* x, i64 n, uint64_t stream, double bound), add_noise(x, n, stream, bound))
