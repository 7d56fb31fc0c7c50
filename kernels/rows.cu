// rows.cu -- rows and columns of tables by their numbers, and what adapters need beside products.
// Math: f32; sums down columns and row norms in f64. Results are rounded where they lie in bf16.
// Launch: blocks of 256 threads that go on until all packs of values are done; columns_dot has a block of
// 1,024 threads for 32 columns, dora_scales a thread a column in blocks of 64.
// Deterministic: no atomics. Rows that are added to the same row were put behind each other by the launcher,
// and one thread adds a column's values in that order.
// Reference: hone_kernels::Reference. Copies are exact; sums are held to 1e-6, scaled columns and norms to 5e-7.
#include "columns.cuh"
#include "packs.cuh"

namespace {

template <int N, class X, class Y>
__device__ void gather_by(const X* table, const unsigned* ids, Y* y, i64 n, i64 d) {
    each_pack<N>(n, d, [&](i64 i, i64 col, i64 some) {
        store_some<N>(&y[i * d + col], load_some<N>(&table[ids[i] * d + col], some), some);
    });
}
template <class X, class Y> __device__ void gather_rows(const X* table, const unsigned* ids, Y* y, i64 n, i64 d) {
    if (packs<8>(table, d) && packs<8>(y, d)) return gather_by<8>(table, ids, y, n, d);
    gather_by<1>(table, ids, y, n, d);
}

// Numbers that were given, each once, and the places where number k stood: order[starts[k]] up to
// order[starts[k + 1]], as they followed each other.
struct Meetings {
    const unsigned* ids;
    const unsigned* starts;
    const unsigned* order;
};

template <int N> __device__ void scatter_by(const float* dy, Meetings met, float* dtable, i64 n_ids, i64 d) {
    each_pack<N>(n_ids, d, [&](i64 k, i64 col, i64 some) {
        float* to = &dtable[met.ids[k] * d + col];
        Pack<N> sum = load_some<N>(to, some);
#pragma unroll 4
        for (unsigned at = met.starts[k]; at < met.starts[k + 1]; at++) {
            Pack<N> more = load_some<N>(&dy[met.order[at] * d + col], some);
            for (int i = 0; i < N; i++) sum.at[i] += more.at[i];
        }
        store_some<N>(to, sum, some);
    });
}
__device__ void scatter_add_rows(const float* dy, Meetings met, float* dtable, i64 n_ids, i64 d) {
    if (packs<4>(dy, d) && packs<4>(dtable, d)) return scatter_by<4>(dy, met, dtable, n_ids, d);
    scatter_by<1>(dy, met, dtable, n_ids, d);
}

template <class X, class Y>
__device__ void gather_columns(const X* table, i64 stride, const unsigned* ids, Y* y, i64 n, i64 rank) {
    each_pack<1>(n, rank, [&](i64 i, i64 k, i64) { put(&y[i * rank + k], value(table[k * stride + ids[i]])); });
}

__device__ void scatter_add_columns(const float* dy, Meetings met, float* dtable, i64 stride, i64 n_ids, i64 rank) {
    each_pack<1>(n_ids, rank, [&](i64 id, i64 k, i64) {
        float* to = &dtable[k * stride + met.ids[id]];
        float sum = *to;
#pragma unroll 4
        for (unsigned at = met.starts[id]; at < met.starts[id + 1]; at++) sum += dy[met.order[at] * rank + k];
        *to = sum;
    });
}

// y <- beta y + (scale + shift) x; y is not read where beta is 0.
template <int N, class X, class Y>
__device__ void add_scaled_by(const X* x, i64 x_stride, const float* scale, float shift, Y* y, i64 y_stride,
                              float beta, i64 rows, i64 cols) {
    each_pack<N>(rows, cols, [&](i64 row, i64 col, i64 some) {
        Pack<N> from = load_some<N>(&x[row * x_stride + col], some), factor = load_some<N>(&scale[col], some);
        Pack<N> to = from;
        if (beta != 0.0f) to = load_some<N>(&y[row * y_stride + col], some);
        for (int i = 0; i < N; i++) {
            float kept = beta == 0.0f ? 0.0f : __fmul_rn(beta, to.at[i]);
            to.at[i] = fmaf(factor.at[i] + shift, from.at[i], kept);
        }
        store_some<N>(&y[row * y_stride + col], to, some);
    });
}
template <class X, class Y>
__device__ void add_scaled_columns(const X* x, i64 x_stride, const float* scale, float shift, Y* y, i64 y_stride,
                                   float beta, i64 rows, i64 cols) {
    if (packs<8>(x, x_stride) && packs<8>(y, y_stride) && packs<8>(scale, 0))
        return add_scaled_by<8>(x, x_stride, scale, shift, y, y_stride, beta, rows, cols);
    add_scaled_by<1>(x, x_stride, scale, shift, y, y_stride, beta, rows, cols);
}

template <class A, class B>
__device__ void columns_dot(const A* a, i64 a_stride, const B* b, i64 b_stride, const float* divisor, float* out,
                            i64 rows, i64 cols) {
    i64 col = own_column();
    double sum = column_sum(rows, col < cols, [&](i64 row) {
        return (double)value(a[row * a_stride + col]) * (double)value(b[row * b_stride + col]);
    });
    if (threadIdx.x < 32 && col < cols) out[col] += (float)(sum / (double)divisor[col]);
}

__device__ void dora_scales(const float* squares, const float* b, i64 b_stride, const float* c, i64 c_stride,
                            const float* magnitude, float* norms, float* scales, i64 out, i64 rank) {
    i64 j = thread_index();
    if (j >= out) return;
    double sum = 0.0;
    for (i64 k = 0; k < rank; k++) sum += (double)b[j * b_stride + k] * (double)c[k * c_stride + j];
    float norm = (float)sqrt((double)squares[j] + sum);
    norms[j] = norm;
    scales[j] = magnitude[j] / norm;
}

}  // namespace

#define FOR_XY(X, x_, Y, y_)                                                                               \
    KERNEL(256, gather_rows_##x_##_##y_, (const X* table, const unsigned* ids, Y* y, i64 n, i64 d),        \
           gather_rows(table, ids, y, n, d))                                                               \
    KERNEL(256, gather_columns_##x_##_##y_,                                                                \
           (const X* table, i64 stride, const unsigned* ids, Y* y, i64 n, i64 rank),                       \
           gather_columns(table, stride, ids, y, n, rank))                                                 \
    KERNEL(256, add_scaled_columns_##x_##_##y_,                                                            \
           (const X* x, i64 x_stride, const float* scale, float shift, Y* y, i64 y_stride, float beta,     \
            i64 rows, i64 cols),                                                                           \
           add_scaled_columns(x, x_stride, scale, shift, y, y_stride, beta, rows, cols))                   \
    KERNEL(1024, columns_dot_##x_##_##y_,                                                                  \
           (const X* a, i64 a_stride, const Y* b, i64 b_stride, const float* divisor, float* out, i64 rows, \
            i64 cols),                                                                                     \
           columns_dot(a, a_stride, b, b_stride, divisor, out, rows, cols))

FOR_XY(float, f32, float, f32)
FOR_XY(float, f32, bf16, bf16)
FOR_XY(bf16, bf16, float, f32)
FOR_XY(bf16, bf16, bf16, bf16)
KERNEL(256, scatter_add_rows_f32_f32,
       (const float* dy, const unsigned* ids, const unsigned* starts, const unsigned* order, float* dtable, i64 n_ids,
        i64 d),
       scatter_add_rows(dy, Meetings{ids, starts, order}, dtable, n_ids, d))
KERNEL(256, scatter_add_columns_f32_f32,
       (const float* dy, const unsigned* ids, const unsigned* starts, const unsigned* order, float* dtable, i64 stride,
        i64 n_ids, i64 rank),
       scatter_add_columns(dy, Meetings{ids, starts, order}, dtable, stride, n_ids, rank))
KERNEL(64, dora_scales_f32,
       (const float* squares, const float* b, i64 b_stride, const float* c, i64 c_stride, const float* magnitude,
        float* norms, float* scales, i64 out, i64 rank),
       dora_scales(squares, b, b_stride, c, c_stride, magnitude, norms, scales, out, rank))
