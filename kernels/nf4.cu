// nf4.cu -- weights of four bits (NF4 and FP4 as bitsandbytes lays them): dequantised whole or by rows, and multiplied by
// few rows as they are.
// Math: code value times scale, the scale of double quantisation as a product and a sum, each rounded by itself; then
// rounded to the type that the weight had, and to the one it is multiplied in. Sums of products are f32.
// Launch: blocks of 256 threads. Whole: eight values a thread, blocks that go on; 0.52 bytes read and 2 (4 in f32)
// written a value. Rows: a block a row. Products: a warp an output, 8 values a lane at a time; 0.52 bytes a value.
// Deterministic: a lane's values and the order of sums follow from the width of the weight.
// Reference: hone_kernels::Reference. Values exact; products 1e-6.
#include "units.cuh"
#ifndef CUSIM
#include <cuda_fp16.h>
#endif

namespace {

// What code values and scales of scales stand for, as the host lays it; and where threads look it up.
struct Tables {
    float book[16], map[256];
};

// What values are rounded to when they are dequantised, numbered as hone_kernels::gpu does.
enum Values { F32 = 0, BF16 = 1, F16 = 2 };

// A quantised matrix as `hone_kernels::quant::Quantized` has it, flat: two codes a byte, the first in the high half.
// Without `scale_codes` the scales are those of blocks of 2^shift values, else those of 256 scales' codes.
struct Weight {
    const unsigned char* codes;
    const float* scales;
    const unsigned char* scale_codes;
    const Tables* tables;
    float offset;
    int shift, values;

    // All threads of a block call it.
    __device__ void load_tables(Tables& to) const {
        if (threadIdx.x < 16) to.book[threadIdx.x] = tables->book[threadIdx.x];
        if (scale_codes)
            for (int i = threadIdx.x; i < 256; i += blockDim.x) to.map[i] = tables->map[i];
        __syncthreads();
    }

    __device__ __forceinline__ float scale(i64 i, const Tables& t) const {
        i64 block = i >> shift;
        if (!scale_codes) return scales[block];
        return __fadd_rn(__fmul_rn(t.map[scale_codes[block]], scales[block >> 8]), offset);
    }

    __device__ __forceinline__ float product(unsigned code, float scale, const Tables& t) const {
        float x = __fmul_rn(t.book[code], scale);
        if (values == BF16) return rounded(x, true);
        return values == F16 ? __half2float(__float2half_rn(x)) : x;
    }

    // Value i.
    __device__ __forceinline__ float one(i64 i, const Tables& t) const {
        unsigned byte = codes[i >> 1];
        return product(i & 1 ? byte & 15 : byte >> 4, scale(i, t), t);
    }

    // Values i .. i + 7, i being a multiple of 8: they have a scale in common.
    __device__ __forceinline__ void eight(i64 i, const Tables& t, float (&x)[8]) const {
        unsigned all = load_bytes(codes + (i >> 1));
        float by = scale(i, t);
        for (int k = 0; k < 8; k++) x[k] = product(all >> (8 * (k / 2) + (k % 2 ? 0 : 4)) & 15, by, t);
    }
};

template <class Y> __device__ void dequantise(Weight w, i64 n, Y* y) {
    __shared__ Tables tables;
    w.load_tables(tables);
    constexpr int N = 16 / sizeof(Y);
    bool wide = is_wide<N>(y);
    i64 units = n / 8;
    for (i64 unit = thread_index(); unit < units; unit += n_threads()) {
        float x[8];
        w.eight(unit * 8, tables, x);
        for (int half = 0; half < 8; half += N) {
            float part[N];
            for (int k = 0; k < N; k++) part[k] = x[half + k];
            store(y + unit * 8 + half, wide, part);
        }
    }
    i64 rest = units * 8 + thread_index();
    if (rest < n) put(&y[rest], w.one(rest, tables));
}

// Those of the rows `ids` that lie in `rows` rows from `start` on, which are this weight's.
template <class Y>
__device__ void gather(Weight w, i64 start, i64 rows, i64 cols, const unsigned* ids, int rounds, Y* y) {
    __shared__ Tables tables;
    i64 row = (i64)ids[blockIdx.x] - start;
    if (row < 0 || row >= rows) return;
    w.load_tables(tables);
    for (i64 col = threadIdx.x; col < cols; col += blockDim.x)
        put(&y[blockIdx.x * cols + col], rounded(w.one(row * cols + col, tables), rounds));
}

// Eight neighbouring values.
template <class X> __device__ __forceinline__ void load_eight(const X* from, bool wide, float (&x)[8]) {
    constexpr int N = 16 / sizeof(X);
    for (int half = 0; half < 8; half += N) {
        float part[N];
        load(from + half, wide, part);
        for (int k = 0; k < N; k++) x[half + k] = part[k];
    }
}

// y (T, rows) <- x (T, cols) Wt + beta c.
template <int T, class X, class Y>
__device__ void linear(Weight w, i64 rows, i64 cols, const X* x, i64 x_stride, int rounds, const Y* c, i64 c_stride,
                       float beta, Y* y, i64 y_stride) {
    __shared__ Tables tables;
    w.load_tables(tables);
    int lane = threadIdx.x & 31;
    i64 row = thread_index() >> 5;
    if (row >= rows) return;
    float sums[T] = {};
    if (cols % 8 == 0) {
        constexpr int N = 16 / sizeof(X);
        bool wide = is_wide<N>(x) && (T == 1 || x_stride % N == 0);
#pragma unroll 4
        for (i64 col = 8 * lane; col < cols; col += 8 * 32) {
            float a[8], b[8];
            w.eight(row * cols + col, tables, a);
            for (int k = 0; k < 8; k++) a[k] = rounded(a[k], rounds);
            for (int t = 0; t < T; t++) {
                load_eight(x + t * x_stride + col, wide, b);
                for (int k = 0; k < 8; k++) sums[t] += a[k] * rounded(b[k], rounds);
            }
        }
    } else {
        for (i64 col = lane; col < cols; col += 32) {
            float a = rounded(w.one(row * cols + col, tables), rounds);
            for (int t = 0; t < T; t++) sums[t] += a * rounded(value(x[t * x_stride + col]), rounds);
        }
    }
    for (int t = 0; t < T; t++) {
        float sum = warp_sum(sums[t]);
        if (lane != 0) continue;
        put(&y[t * y_stride + row], beta == 0.0f ? sum : sum + beta * value(c[t * c_stride + row]));
    }
}

}  // namespace

#define WEIGHT_ARGUMENTS                                                                                      \
    const unsigned char *codes, const float *scales, const unsigned char *scale_codes, const Tables *tables,  \
        float offset, int shift, int values
#define WEIGHT Weight{codes, scales, scale_codes, tables, offset, shift, values}

#define FOR_Y(Y, y_)                                                                                              \
    KERNEL(256, nf4_dequantise_##y_, (WEIGHT_ARGUMENTS, i64 n, Y* y), dequantise(WEIGHT, n, y))                   \
    KERNEL(256, nf4_gather_##y_,                                                                                  \
           (WEIGHT_ARGUMENTS, i64 start, i64 rows, i64 cols, const unsigned* ids, int rounds, Y* y),              \
           gather(WEIGHT, start, rows, cols, ids, rounds, y))
#define FOR_TXY(T, X, x_, Y, y_)                                                                                  \
    KERNEL(256, nf4_linear_##T##_##x_##_##y_,                                                                     \
           (WEIGHT_ARGUMENTS, i64 rows, i64 cols, const X* x, i64 x_stride, int rounds, const Y* c, i64 c_stride, \
            float beta, Y* y, i64 y_stride),                                                                      \
           linear<T>(WEIGHT, rows, cols, x, x_stride, rounds, c, c_stride, beta, y, y_stride))
#define FOR_T(T)                      \
    FOR_TXY(T, float, f32, float, f32) \
    FOR_TXY(T, float, f32, bf16, bf16) \
    FOR_TXY(T, bf16, bf16, float, f32) \
    FOR_TXY(T, bf16, bf16, bf16, bf16)

FOR_Y(float, f32)
FOR_Y(bf16, bf16)
FOR_T(1)
FOR_T(2)
FOR_T(3)
FOR_T(4)
