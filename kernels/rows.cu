// rows.cu -- rows and columns by number, and what adapters do by column.
// Math: gathers copy; scatters add, rows (or columns) that meet in the order in which they come; add_scaled_columns: y <- beta y +
// (scale + shift) x; columns_dot: out <- out + sum of a b / divisor; dora_scales: see Backend::dora_scales.
// Launch: gathers, add_scaled_columns: blocks of 256 threads that go on until all is done. Scatters: a block a number that occurs,
// which the host has found with its places. columns_dot: a thread a column and a range of rows.
// Deterministic: no atomics; sums in the order that is given. Bytes: each value read once, written once.
// Reference: hone_kernels::Reference, gathers 0, sums 1e-6, scales 5e-7.
#include "common.cuh"

namespace {

template <class X, class Y> __device__ void gather_rows(const X* table, const unsigned* ids, i64 n, i64 d, Y* y) {
    for (i64 i = thread_index(); i < n * d; i += n_threads()) {
        i64 row = i / d, col = i - row * d;
        put(&y[i], value(table[(i64)ids[row] * d + col]));
    }
}

template <class X, class Y>
__device__ void gather_columns(const X* table, i64 stride, i64 rank, const unsigned* ids, i64 n, Y* y) {
    for (i64 i = thread_index(); i < n * rank; i += n_threads()) {
        i64 row = i / rank, k = i - row * rank;
        put(&y[i], value(table[k * stride + ids[row]]));
    }
}

// Number `blockIdx.x` that occurs is ids[.], at the places starts[.] .. starts[. + 1] of `places`, rising. Value j of what it names
// lies at id * id_stride + j * stride, value j of place p of dy at p * d + j.
__device__ void scatter_add(const float* dy, const unsigned* ids, const unsigned* starts, const unsigned* places, i64 d, float* to,
                            i64 id_stride, i64 stride) {
    i64 id = ids[blockIdx.x];
    unsigned start = starts[blockIdx.x], end = starts[blockIdx.x + 1];
    for (i64 j = threadIdx.x; j < d; j += blockDim.x) {
        float* at = &to[id * id_stride + j * stride];
        float sum = *at;
        for (unsigned p = start; p < end; p++) sum += dy[(i64)places[p] * d + j];
        *at = sum;
    }
}

template <class X, class Y>
__device__ void add_scaled_columns(const X* x, i64 x_stride, const float* scale, float shift, Y* y, i64 y_stride, float beta, i64 rows,
                                   i64 cols) {
    for (i64 i = thread_index(); i < rows * cols; i += n_threads()) {
        i64 row = i / cols, col = i - row * cols;
        Y* to = &y[row * y_stride + col];
        float added = __fmul_rn(scale[col] + shift, value(x[row * x_stride + col]));
        put(to, beta == 0.0f ? added : __fadd_rn(__fmul_rn(beta, value(*to)), added));
    }
}

// Sums over ranges of `range` rows, into (ranges, cols).
template <class A, class B>
__device__ void columns_dot(const A* a, i64 a_stride, const B* b, i64 b_stride, i64 rows, i64 cols, i64 range, float* parts) {
    i64 j = (i64)blockIdx.x * blockDim.x + threadIdx.x, part = blockIdx.y;
    if (j >= cols) return;
    float sum = 0.0f;
    for (i64 row = part * range; row < min((part + 1) * range, rows); row++)
        sum += value(a[row * a_stride + j]) * value(b[row * b_stride + j]);
    parts[part * cols + j] = sum;
}

__device__ void add_divided_parts(const float* parts, i64 n, i64 cols, const float* divisor, float* out) {
    i64 j = thread_index();
    if (j >= cols) return;
    double sum = 0.0;
    for (i64 part = 0; part < n; part++) sum += parts[part * cols + j];
    out[j] = (float)(out[j] + sum / divisor[j]);
}

// b is (out, r), c is (r, out).
__device__ void dora_scales(const float* squares, const float* b, i64 b_stride, const float* c, i64 c_stride, const float* magnitude,
                            i64 out, i64 rank, float* norms, float* scales) {
    i64 j = thread_index();
    if (j >= out) return;
    double sum = squares[j];
    for (i64 k = 0; k < rank; k++) sum += (double)b[j * b_stride + k] * c[k * c_stride + j];
    double norm = sqrt(sum);
    norms[j] = (float)norm;
    scales[j] = (float)(magnitude[j] / norm);
}

}  // namespace

#define FOR_XY(X, x_, Y, y_)                                                                                                 \
    KERNEL(256, gather_rows_##x_##_##y_, (const X* table, const unsigned* ids, i64 n, i64 d, Y* y), gather_rows(table, ids, n, d, y)) \
    KERNEL(256, gather_columns_##x_##_##y_, (const X* table, i64 stride, i64 rank, const unsigned* ids, i64 n, Y* y),        \
           gather_columns(table, stride, rank, ids, n, y))                                                                   \
    KERNEL(256, add_scaled_columns_##x_##_##y_,                                                                              \
           (const X* x, i64 x_stride, const float* scale, float shift, Y* y, i64 y_stride, float beta, i64 rows, i64 cols),  \
           add_scaled_columns(x, x_stride, scale, shift, y, y_stride, beta, rows, cols))                                     \
    KERNEL(256, columns_dot_##x_##_##y_,                                                                                     \
           (const X* a, i64 a_stride, const Y* b, i64 b_stride, i64 rows, i64 cols, i64 range, float* parts),                \
           columns_dot(a, a_stride, b, b_stride, rows, cols, range, parts))

FOR_XY(float, f32, float, f32)
FOR_XY(float, f32, bf16, bf16)
FOR_XY(bf16, bf16, float, f32)
FOR_XY(bf16, bf16, bf16, bf16)
KERNEL(256, scatter_add_f32,
       (const float* dy, const unsigned* ids, const unsigned* starts, const unsigned* places, i64 d, float* to, i64 id_stride, i64 stride),
       scatter_add(dy, ids, starts, places, d, to, id_stride, stride))
KERNEL(256, add_divided_parts_f32, (const float* parts, i64 n, i64 cols, const float* divisor, float* out),
       add_divided_parts(parts, n, cols, divisor, out))
KERNEL(256, dora_scales_f32,
       (const float* squares, const float* b, i64 b_stride, const float* c, i64 c_stride, const float* magnitude, i64 out, i64 rank,
        float* norms, float* scales),
       dora_scales(squares, b, b_stride, c, c_stride, magnitude, out, rank, norms, scales))
