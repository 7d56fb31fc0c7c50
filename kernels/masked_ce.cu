// masked_ce.cu -- cross-entropy over rows of logits (N, V), and its gradient, in place or elsewhere.
// Math: f32; one pass keeps the largest logit and the sum of exp(z - largest) together, and the second makes the
// gradient. What a row gives of these is f64, by one thread.
// Launch: a block of 512 threads a row. Bytes a logit: 4 read, and 4 read and 4 (2 in bf16) written.
// Deterministic: a thread's values and the order of sums follow from V, however the row is aligned.
// Reference: hone_kernels::Reference. Tolerance 1e-6, 2e-6 with options; gradients 2e-6 and 4e-6.
#include "units.cuh"

namespace {

// What is known of a row beforehand.
struct Row {
    unsigned target;
    float weight;
};

// LossOptions; the cap is infinite where there is none.
struct Options {
    float smoothing, z_loss;
    int reweight;
    float cap;

    __device__ bool caps() const { return cap < -NEG_INF; }
    __device__ float capped(float x) const { return caps() ? cap * tanhf(x / cap) : x; }
};

// What the second pass writes.
enum Writes { NOTHING = 0, CAPPED = 1, GRADIENT = 2 };

// Of some logits: the largest, the sum of exp(z - largest), and the sum of z - pivot.
struct Sums {
    float top, sum, below;

    template <int N> __device__ __forceinline__ void take(const float (&z)[N], float pivot) {
        // Maxima pass over what is not a number; the sums do not.
        float most = z[0];
        for (int k = 1; k < N; k++) most = fmaxf(most, z[k]);
        if (most > top) {
            sum *= expf(top - most);
            top = most;
        }
        // As long as all are -inf, so that they do not become NaN.
        float shift = top == NEG_INF ? 0.0f : top, part = 0.0f, part_below = 0.0f;
        for (int k = 0; k < N; k++) {
            part += expf(z[k] - shift);
            part_below += z[k] - pivot;
        }
        sum += part;
        below += part_below;
    }
};

// Hands the values of a row out to the threads: take(index of the first, values, may be taken as a unit).
template <class X, class Take> __device__ __forceinline__ void each_unit(const X* x, i64 cols, Take take) {
    constexpr int N = 16 / sizeof(X);
    bool wide = is_wide<N>(x);
    i64 units = cols / N, step = blockDim.x, unit = threadIdx.x;
    for (; unit + step < units; unit += 2 * step) {
        // Two at a time, so that more is on its way from memory.
        float a[N], b[N];
        load(x + unit * N, wide, a);
        load(x + (unit + step) * N, wide, b);
        take(unit * N, a);
        take((unit + step) * N, b);
    }
    for (; unit < units; unit += step) {
        float a[N];
        load(x + unit * N, wide, a);
        take(unit * N, a);
    }
    for (i64 j = units * N + threadIdx.x; j < cols; j += step) {
        float a[1] = {value(x[j])};
        take(j, a);
    }
}

// The scalars of a row's gradient: exp(z - top) softmax - smooth, less `hit` at the target.
struct Slope {
    float top, softmax, smooth, hit;
};

// A row's loss, cross-entropy and whether its target is the largest, into `result`; and its slope.
__device__ Slope finish(Sums all, float at_target, double cols, double scale, Options o, float* result) {
    // Relative to the largest, so that large logits do not swallow the logarithm.
    double log_sum = log((double)all.sum), top = all.top;
    double ce = log_sum + (top - at_target), lse = log_sum + top;
    double e = o.smoothing, q = o.reweight ? exp(-ce) : 1.0;
    double uniform = e > 0.0 ? log_sum - (all.below / cols + (at_target - top)) : 0.0;
    result[0] = (float)(q * ((1.0 - e) * ce + e * uniform) + o.z_loss * lse * lse);
    result[1] = (float)ce;
    result[2] = at_target == all.top ? 1.0f : 0.0f;
    return {all.top, (float)(scale * (q + 2.0 * o.z_loss * lse) / all.sum), (float)(scale * q * e / cols),
            (float)(scale * q * (1.0 - e))};
}

// A logit's gradient. Each step is rounded by itself, so that it is the same wherever it goes.
__device__ __forceinline__ float slope_at(float x, bool is_target, Slope s, Options o) {
    float t = o.caps() ? tanhf(x / o.cap) : 0.0f, z = o.caps() ? o.cap * t : x;
    float slope = __fsub_rn(__fmul_rn(expf(z - s.top), s.softmax), s.smooth);
    if (is_target) slope = __fsub_rn(slope, s.hit);
    return o.caps() ? __fmul_rn(slope, fmaf(-t, t, 1.0f)) : slope;
}

template <class X, class G>
__device__ void masked_ce(const X* logits, i64 stride, i64 cols, const Row* rows, float* results, int writes,
                          G* gradient, i64 gradient_stride, float scale, Options o) {
    __shared__ float scratch[32];
    __shared__ Slope shared;
    const X* x = logits + blockIdx.x * stride;
    G* to = gradient + blockIdx.x * gradient_stride;
    Row row = rows[blockIdx.x];
    float at_target = o.capped(value(x[row.target]));

    Sums own = {NEG_INF, 0.0f, 0.0f};
    each_unit(x, cols, [&](i64, auto& z) {
        for (auto& z : z) z = o.capped(z);
        own.take(z, at_target);
    });
    Sums all;
    all.top = block_max(own.top, scratch);
    all.sum = block_sum(own.sum * expf(own.top - all.top), scratch);
    all.below = o.smoothing > 0.0f ? block_sum(own.below, scratch) : 0.0f;
    if (threadIdx.x == 0)
        shared = finish(all, at_target, (double)cols, __fmul_rn(scale, row.weight), o, results + 3 * (i64)blockIdx.x);
    // All have read their target before anything is written over.
    __syncthreads();
    if (writes == NOTHING) return;

    Slope slope = shared;
    bool wide = is_wide<16 / sizeof(X)>(to);
    each_unit(x, cols, [&](i64 at, auto& z) {
        int k = 0;
        for (auto& z : z) {
            z = writes == GRADIENT ? slope_at(z, at + k == row.target, slope, o) : o.capped(z);
            k++;
        }
        store(to + at, wide, z);
    });
}

}  // namespace

#define FOR_XG(X, x_, G, g_)                                                                                       \
    KERNEL(512, masked_ce_##x_##_##g_,                                                                             \
           (const X* logits, i64 stride, i64 cols, const Row* rows, float* results, int writes, G* to,             \
            i64 to_stride, float scale, float smoothing, float z_loss, int reweight, float cap),                   \
           masked_ce(logits, stride, cols, rows, results, writes, to, to_stride, scale,                            \
                     Options{smoothing, z_loss, reweight, cap}))

FOR_XG(float, f32, float, f32)
FOR_XG(float, f32, bf16, bf16)
