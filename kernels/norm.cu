// norm.cu -- RMSNorm of rows and of groups of columns, forward and backward.
// Math (Zhang and Sennrich 2019): y = x r w', r = 1 / sqrt(mean(x^2) + eps), w' = w + offset. With z = dy w' and n = x r:
// dx <- dx + r (z - n mean(z n)), dw <- dw + sum of dy n. Squares that are too large for f32 are summed in f64.
// Launch: rows have a block of 256 threads each, groups a warp each; dw is summed over ranges of rows by a thread a column, then
// over the ranges, in order.
// Deterministic: sums are added in an order that the shape gives. Bytes: forward x read twice (the second time from a cache), y
// written; backward dy, x and dx read, dx written, and what else is asked for.
// Reference: hone_kernels::Reference, 1e-6; gradients 2e-6.
#include "common.cuh"

namespace {

// A team of threads that have a row: a whole block, or one of its warps.
struct Block {
    __device__ static int rank() { return threadIdx.x; }
    __device__ static int size() { return blockDim.x; }
    template <class T> __device__ static T sum(T x) {
        __shared__ T scratch[32];
        return block_sum(x, scratch);
    }
};
struct Warp {
    __device__ static int rank() { return threadIdx.x & 31; }
    __device__ static int size() { return 32; }
    template <class T> __device__ static T sum(T x) { return warp_sum(x); }
};

template <class Team, class X> __device__ float inverse_root(const X* x, i64 d, float eps) {
    float squares = 0.0f;
    for (i64 j = Team::rank(); j < d; j += Team::size()) {
        float v = value(x[j]);
        squares += v * v;
    }
    float mean = Team::sum(squares) / (float)d;
    if (isfinite(mean)) return 1.0f / sqrtf(mean + eps);
    double large = 0.0;
    for (i64 j = Team::rank(); j < d; j += Team::size()) {
        double v = value(x[j]);
        large += v * v;
    }
    return (float)(1.0 / sqrt(Team::sum(large) / (double)d + (double)eps));
}

template <class Y>
__device__ void rms_norm(const float* x, const float* w, float offset, float eps, i64 d, Y* y, float* r) {
    i64 row = blockIdx.x;
    x += row * d;
    y += row * d;
    float root = inverse_root<Block>(x, d, eps);
    if (threadIdx.x == 0) r[row] = root;
    for (i64 j = threadIdx.x; j < d; j += blockDim.x) put(&y[j], x[j] * root * (w[j] + offset));
}

// `y` and `again` may be none.
template <class G, class Y, class D>
__device__ void rms_norm_backward(const G* dy, const float* x, const float* w, float offset, const float* r, i64 d, float* dx, Y* y,
                                  D* again) {
    i64 row = blockIdx.x, at = row * d;
    float root = r[row], sum = 0.0f;
    for (i64 j = threadIdx.x; j < d; j += blockDim.x) sum += value(dy[at + j]) * (w[j] + offset) * (x[at + j] * root);
    float mean = Block::sum(sum) / (float)d;
    for (i64 j = threadIdx.x; j < d; j += blockDim.x) {
        float factor = w[j] + offset, n = x[at + j] * root, z = value(dy[at + j]) * factor;
        float now = dx[at + j] + root * (z - n * mean);
        dx[at + j] = now;
        if (y) put(&y[at + j], n * factor);
        if (again) put(&again[at + j], now);
    }
}

// Partial sums of dy x r over ranges of `range` rows, into (ranges, d). Rows of `groups` groups lie `stride` apart in dy, densely in x.
template <class G, class X>
__device__ void norm_dw(const G* dy, i64 stride, const X* x, const float* r, i64 rows, i64 groups, i64 d, i64 range, float* parts) {
    i64 j = (i64)blockIdx.x * blockDim.x + threadIdx.x, part = blockIdx.y;
    if (j >= d) return;
    float sum = 0.0f;
    for (i64 row = part * range; row < min((part + 1) * range, rows); row++)
        for (i64 group = 0; group < groups; group++) {
            i64 pair = row * groups + group;
            sum += value(dy[row * stride + group * d + j]) * (value(x[pair * d + j]) * r[pair]);
        }
    parts[part * d + j] = sum;
}

// dw <- dw + the sums of all parts.
__device__ void add_parts(const float* parts, i64 n, i64 d, float* dw) {
    i64 j = thread_index();
    if (j >= d) return;
    double sum = 0.0;
    for (i64 part = 0; part < n; part++) sum += parts[part * d + j];
    dw[j] = (float)(dw[j] + sum);
}

// The warp's group of the (rows, groups) there are, or none.
__device__ i64 group_index() { return (i64)blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5); }

template <class X>
__device__ void group_norm(X* x, i64 stride, i64 rows, i64 groups, i64 d, const float* w, float offset, float eps, X* raw) {
    i64 pair = group_index();
    if (pair >= rows * groups) return;
    i64 row = pair / groups;
    x += row * stride + (pair - row * groups) * d;
    raw += pair * d;
    float root = inverse_root<Warp>(x, d, eps);
    for (i64 j = threadIdx.x & 31; j < d; j += 32) {
        raw[j] = x[j];
        put(&x[j], value(raw[j]) * root * (w[j] + offset));
    }
}

template <class X> __device__ void group_roots(const X* raw, i64 pairs, i64 d, float eps, float* r) {
    i64 pair = group_index();
    if (pair >= pairs) return;
    float root = inverse_root<Warp>(raw + pair * d, d, eps);
    if ((threadIdx.x & 31) == 0) r[pair] = root;
}

template <class G, class X>
__device__ void group_norm_backward(G* dy, i64 stride, i64 rows, i64 groups, i64 d, const X* raw, const float* w, float offset,
                                    const float* r) {
    i64 pair = group_index();
    if (pair >= rows * groups) return;
    i64 row = pair / groups;
    dy += row * stride + (pair - row * groups) * d;
    raw += pair * d;
    float root = r[pair], sum = 0.0f;
    for (i64 j = threadIdx.x & 31; j < d; j += 32) sum += value(dy[j]) * (w[j] + offset) * (value(raw[j]) * root);
    float mean = warp_sum(sum) / (float)d;
    for (i64 j = threadIdx.x & 31; j < d; j += 32) {
        float n = value(raw[j]) * root;
        put(&dy[j], root * (value(dy[j]) * (w[j] + offset) - n * mean));
    }
}

}  // namespace

#define FOR_X(X, x_)                                                                                                    \
    KERNEL(256, rms_norm_##x_, (const float* x, const float* w, float offset, float eps, i64 d, X* y, float* r),        \
           rms_norm(x, w, offset, eps, d, y, r))                                                                        \
    KERNEL(256, group_norm_##x_,                                                                                        \
           (X* x, i64 stride, i64 rows, i64 groups, i64 d, const float* w, float offset, float eps, X* raw),            \
           group_norm(x, stride, rows, groups, d, w, offset, eps, raw))                                                 \
    KERNEL(256, group_roots_##x_, (const X* raw, i64 pairs, i64 d, float eps, float* r), group_roots(raw, pairs, d, eps, r))
#define FOR_XY(X, x_, Y, y_)                                                                                            \
    KERNEL(256, norm_dw_##x_##_##y_,                                                                                    \
           (const X* dy, i64 stride, const Y* x, const float* r, i64 rows, i64 groups, i64 d, i64 range, float* parts), \
           norm_dw(dy, stride, x, r, rows, groups, d, range, parts))                                                    \
    KERNEL(256, group_norm_backward_##x_##_##y_,                                                                        \
           (X* dy, i64 stride, i64 rows, i64 groups, i64 d, const Y* raw, const float* w, float offset, const float* r), \
           group_norm_backward(dy, stride, rows, groups, d, raw, w, offset, r))
#define FOR_XYZ(X, x_, Y, y_, Z, z_)                                                                                    \
    KERNEL(256, rms_norm_backward_##x_##_##y_##_##z_,                                                                   \
           (const X* dy, const float* x, const float* w, float offset, const float* r, i64 d, float* dx, Y* y, Z* again), \
           rms_norm_backward(dy, x, w, offset, r, d, dx, y, again))

FOR_X(float, f32)
FOR_X(bf16, bf16)
FOR_XY(float, f32, float, f32)
FOR_XY(float, f32, bf16, bf16)
FOR_XY(bf16, bf16, float, f32)
FOR_XY(bf16, bf16, bf16, bf16)
FOR_XYZ(float, f32, float, f32, float, f32)
FOR_XYZ(float, f32, float, f32, bf16, bf16)
FOR_XYZ(float, f32, bf16, bf16, float, f32)
FOR_XYZ(float, f32, bf16, bf16, bf16, bf16)
FOR_XYZ(bf16, bf16, float, f32, float, f32)
FOR_XYZ(bf16, bf16, float, f32, bf16, bf16)
FOR_XYZ(bf16, bf16, bf16, bf16, float, f32)
FOR_XYZ(bf16, bf16, bf16, bf16, bf16, bf16)
KERNEL(256, add_parts_f32, (const float* parts, i64 n, i64 d, float* dw), add_parts(parts, n, d, dw))
