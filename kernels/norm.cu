// norm.cu -- RMSNorm of rows and of groups of columns, and its backward.
// Math: f32; squares that are too large for f32 are summed in f64. y = x r (w + offset), r = 1 / sqrt(mean x^2 +
// eps); with z = dy (w + offset) and n = x r: dx = r (z - n mean(z n)), dw = the sum of dy n.
// Launch: blocks of 256 threads. A team has a group of values at a time: a warp where a group is short (up to 128
// values, as heads have, it needs fewer registers), else a block. It keeps what it reads in registers, so that
// memory is passed once; what a long group has beyond them is read again. In the backward each team has
// neighbouring groups and leaves its own sum of dw, and norm_weight adds these, 32 columns a block of 1,024
// threads.
// Deterministic: which groups a team has is decided by the shape, and so is the order of all sums.
// Reference: hone_kernels::Reference. Tolerance 1e-6, gradients 2e-6.
#include "columns.cuh"
#include "packs.cuh"

namespace {

// Values of a pack.
constexpr int PACK = 4;
typedef Pack<PACK> Four;

// The threads that have a group together, and packs that each keeps in registers: with 4 of them a warp has 512
// values there, a block 4,096.
template <int WARPS, int PACKS> struct Team {
    static constexpr int THREADS = 32 * WARPS;
    static constexpr int HELD = PACKS;
    int thread;
    i64 index, n;

    __device__ Team()
        : thread(threadIdx.x % THREADS),
          index((i64)blockIdx.x * (256 / THREADS) + threadIdx.x / THREADS),
          n((i64)gridDim.x * (256 / THREADS)) {}
    // The first value of a thread's pack number k.
    __device__ __forceinline__ i64 column(int k) const { return (i64)(k * THREADS + thread) * PACK; }
    // The same bytes in all threads of the team.
    template <class T> __device__ __forceinline__ T sum(T x) const {
        if constexpr (WARPS == 1) return warp_sum(x);
        __shared__ T scratch[32];
        return block_sum(x, scratch);
    }
};

// Groups of `width` values in rows.
struct Groups {
    i64 rows, in_row, width;
    __device__ __forceinline__ i64 n() const { return rows * in_row; }
    // Where group `at` begins in a buffer whose rows are `stride` apart.
    __device__ __forceinline__ i64 start(i64 at, i64 stride) const {
        i64 row = at / in_row;
        return row * stride + (at - row * in_row) * width;
    }
    // Whether the groups of such a buffer lie so that packs can be read.
    template <class T> __device__ __forceinline__ bool wide(const T* x, i64 stride) const {
        return packs<PACK>(x, stride | width);
    }
};

// A row or a group: its values by columns.
template <class T> struct Row {
    T* at;
    i64 width;
    bool wide;
    __device__ __forceinline__ Four get(i64 col) const { return load_some<PACK>(at + col, width - col, wide); }
    __device__ __forceinline__ void set(i64 col, const Four& x) const {
        store_some<PACK>(at + col, x, width - col, wide);
    }
};

// A thread's share of the sum of squares; S is float or double.
template <class S, class T, class Of>
__device__ __forceinline__ S squares(const Of& team, const Four* held, const Row<T>& x) {
    S sum = 0;
    auto add = [&](const Four& four) {
        for (int i = 0; i < PACK; i++) sum += (S)four.at[i] * (S)four.at[i];
    };
#pragma unroll
    for (int k = 0; k < Of::HELD; k++) add(held[k]);
    for (int k = Of::HELD; team.column(k) < x.width; k++) add(x.get(team.column(k)));
    return sum;
}

// 1 / sqrt(mean(x^2) + eps).
template <class T, class Of>
__device__ __forceinline__ float inverse_root(const Of& team, const Four* held, const Row<T>& x, float eps) {
    float mean = team.sum(squares<float>(team, held, x)) / (float)x.width;
    // The same in all threads of the team.
    if (mean < -NEG_INF) return 1.0f / sqrtf(mean + eps);
    double sum = team.sum(squares<double>(team, held, x));
    return (float)(1.0 / sqrt(sum / (double)x.width + (double)eps));
}

// The weight and the constants.
struct Weight {
    const float* w;
    float eps, offset;
    __device__ __forceinline__ Four factors(i64 col, i64 width, bool wide) const {
        Four f = load_some<PACK>(w + col, width - col, wide);
        for (int i = 0; i < PACK; i++) f.at[i] += offset;
        return f;
    }
};

__device__ __forceinline__ Four times(const Four& x, float r) {
    Four n;
    for (int i = 0; i < PACK; i++) n.at[i] = __fmul_rn(x.at[i], r);
    return n;
}
__device__ __forceinline__ Four times(const Four& x, const Four& f) {
    Four y;
    for (int i = 0; i < PACK; i++) y.at[i] = __fmul_rn(x.at[i], f.at[i]);
    return y;
}

// y may be x: a thread writes what it alone has read. `raw` gets x, dense, and `r` the scales, unless they are
// null.
template <int WARPS, int HELD, class X, class Y>
__device__ void forward(const X* x, Y* y, i64 stride, X* raw, float* r, Weight weight, Groups groups) {
    Team<WARPS, HELD> team;
    i64 width = groups.width;
    bool wide = groups.wide(x, stride) && groups.wide(y, stride) && groups.wide(weight.w, 0) && groups.wide(raw, 0);
    for (i64 at = team.index; at < groups.n(); at += team.n) {
        i64 from = groups.start(at, stride);
        Row<const X> in{x + from, width, wide};
        Row<Y> out{y + from, width, wide};
        Row<X> kept{raw + at * width, width, wide};
        Four held[HELD];
#pragma unroll
        for (int k = 0; k < HELD; k++) held[k] = in.get(team.column(k));
        float scale = inverse_root(team, held, in, weight.eps);
        auto finish = [&](i64 col, const Four& four) {
            if (col >= width) return;
            if (raw) kept.set(col, four);
            out.set(col, times(times(four, scale), weight.factors(col, width, wide)));
        };
#pragma unroll
        for (int k = 0; k < HELD; k++) finish(team.column(k), held[k]);
        for (int k = HELD; team.column(k) < width; k++) finish(team.column(k), in.get(team.column(k)));
        if (r && team.thread == 0) r[at] = scale;
    }
}

// What the backward reads and writes, beside dy and x. All of it lies dense but dx; null is not wanted.
template <class D, class A, class Y> struct Outputs {
    D* dx;
    bool adds;
    A* again;
    Y* y;
    float* parts;
};

// Each team has `each` groups; its sum of dw goes into a row of `parts`. Without `r` the scales are found
// again. dx may be dy.
template <int WARPS, int HELD, class G, class X, class D, class A, class Y>
__device__ void backward(const G* dy, i64 stride, const X* x, const float* r, Weight weight, Groups groups,
                         Outputs<D, A, Y> to, i64 each) {
    Team<WARPS, HELD> team;
    i64 width = groups.width, first = team.index * each, end = first + each;
    if (end > groups.n()) end = groups.n();
    // All threads of a team: none is left behind at a barrier.
    if (first >= end) return;
    bool wide = groups.wide(dy, stride) && groups.wide(to.dx, stride) && groups.wide(x, 0) &&
                groups.wide(to.again, 0) && groups.wide(to.y, 0) && groups.wide(to.parts, 0) &&
                groups.wide(weight.w, 0);
    Four sums[HELD] = {};
    Row<float> part{to.parts + team.index * width, width, wide};
    for (i64 at = first; at < end; at++) {
        i64 from = groups.start(at, stride);
        Row<const G> slopes{dy + from, width, wide};
        Row<const X> in{x + at * width, width, wide};
        Row<D> dx{to.dx + from, width, wide};
        Row<A> again{to.again + at * width, width, wide};
        Row<Y> y{to.y + at * width, width, wide};
        // All of it is asked for before anything waits. n is x at first, and z is dy.
        Four n[HELD], z[HELD], old[HELD] = {};
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            n[k] = in.get(team.column(k));
            z[k] = slopes.get(team.column(k));
            if (to.adds) old[k] = dx.get(team.column(k));
        }
        float scale = r ? r[at] : inverse_root(team, n, in, weight.eps);
        float sum = 0.0f;
        auto begin = [&](i64 col, const Four& d, const Four& n) {
            Four f = weight.factors(col, width, wide), z = times(d, f);
            for (int i = 0; i < PACK; i++) sum = fmaf(z.at[i], n.at[i], sum);
            if (to.y && col < width) y.set(col, times(n, f));
            return z;
        };
        auto share = [&](Four& dw, const Four& d, const Four& n) {
            for (int i = 0; i < PACK; i++) dw.at[i] = fmaf(d.at[i], n.at[i], dw.at[i]);
        };
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            n[k] = times(n[k], scale);
            share(sums[k], z[k], n[k]);
            z[k] = begin(team.column(k), z[k], n[k]);
        }
        for (int k = HELD; team.column(k) < width; k++) {
            i64 col = team.column(k);
            begin(col, slopes.get(col), times(in.get(col), scale));
        }
        float mean = team.sum(sum) / (float)width;
        auto finish = [&](i64 col, const Four& z, const Four& n, Four slope) {
            if (col >= width) return;
            for (int i = 0; i < PACK; i++)
                slope.at[i] = fmaf(scale, fmaf(-mean, n.at[i], z.at[i]), slope.at[i]);
            dx.set(col, slope);
            if (to.again) again.set(col, slope);
        };
#pragma unroll
        for (int k = 0; k < HELD; k++) finish(team.column(k), z[k], n[k], old[k]);
        for (int k = HELD; team.column(k) < width; k++) {
            i64 col = team.column(k);
            Four d = slopes.get(col), n = times(in.get(col), scale), old = {}, dw = {};
            if (to.adds) old = dx.get(col);
            finish(col, times(d, weight.factors(col, width, wide)), n, old);
            if (!to.parts) continue;
            // A row of sums stays in the cache meanwhile.
            if (at > first) dw = part.get(col);
            share(dw, d, n);
            part.set(col, dw);
        }
    }
    if (!to.parts) return;
#pragma unroll
    for (int k = 0; k < HELD; k++)
        if (team.column(k) < width) part.set(team.column(k), sums[k]);
}

// dw <- dw + the sum of the teams' rows.
__device__ void norm_weight(const float* parts, float* dw, i64 n_parts, i64 width) {
    i64 col = own_column();
    double sum = column_sum(n_parts, col < width, [&](i64 part) { return (double)parts[part * width + col]; });
    if (threadIdx.x < 32 && col < width) dw[col] = (float)((double)dw[col] + sum);
}

}  // namespace

#define FOR_Y(WARPS, HELD, by, Y, y_)                                                                       \
    KERNEL(256, rms_norm_by_##by##_##y_,                                                                    \
           (const float* x, const float* w, float eps, float offset, i64 rows, i64 width, Y* y, float* r),  \
           forward<WARPS, HELD>(x, y, width, (float*)nullptr, r, Weight{w, eps, offset}, Groups{rows, 1, width}))
#define FOR_GAY(WARPS, HELD, by, G, g_, A, a_, Y, y_)                                                       \
    KERNEL(256, rms_norm_backward_by_##by##_##g_##_##a_##_##y_,                                             \
           (const G* dy, const float* x, const float* w, float eps, float offset, const float* r, i64 rows, \
            i64 width, float* dx, A* again, Y* y, float* parts, i64 each),                                  \
           backward<WARPS, HELD>(dy, width, x, r, Weight{w, eps, offset}, Groups{rows, 1, width},           \
                                 Outputs<float, A, Y>{dx, true, again, y, parts}, each))
#define FOR_GROUPS_X(WARPS, HELD, by, X, x_)                                                                \
    KERNEL(256, group_norm_by_##by##_##x_,                                                                  \
           (X* x, i64 stride, const float* w, float eps, float offset, i64 rows, i64 in_row, i64 width, X* raw), \
           forward<WARPS, HELD>((const X*)x, x, stride, raw, (float*)nullptr, Weight{w, eps, offset},       \
                                Groups{rows, in_row, width}))
#define FOR_GROUPS_GX(WARPS, HELD, by, G, g_, X, x_)                                                        \
    KERNEL(256, group_norm_backward_by_##by##_##g_##_##x_,                                                  \
           (G* dy, i64 stride, const X* raw, const float* w, float eps, float offset, i64 rows, i64 in_row, \
            i64 width, float* parts, i64 each),                                                             \
           backward<WARPS, HELD>((const G*)dy, stride, raw, (const float*)nullptr, Weight{w, eps, offset},  \
                                 Groups{rows, in_row, width},                                               \
                                 Outputs<G, float, float>{dy, false, nullptr, nullptr, parts}, each))
#define ROWS(WARPS, HELD, by)                                     \
    FOR_Y(WARPS, HELD, by, float, f32)                            \
    FOR_Y(WARPS, HELD, by, bf16, bf16)                            \
    FOR_GAY(WARPS, HELD, by, float, f32, float, f32, float, f32)  \
    FOR_GAY(WARPS, HELD, by, float, f32, float, f32, bf16, bf16)  \
    FOR_GAY(WARPS, HELD, by, float, f32, bf16, bf16, float, f32)  \
    FOR_GAY(WARPS, HELD, by, float, f32, bf16, bf16, bf16, bf16)  \
    FOR_GAY(WARPS, HELD, by, bf16, bf16, float, f32, float, f32)  \
    FOR_GAY(WARPS, HELD, by, bf16, bf16, float, f32, bf16, bf16)  \
    FOR_GAY(WARPS, HELD, by, bf16, bf16, bf16, bf16, float, f32)  \
    FOR_GAY(WARPS, HELD, by, bf16, bf16, bf16, bf16, bf16, bf16)
#define GROUPS(WARPS, HELD, by)                                   \
    FOR_GROUPS_X(WARPS, HELD, by, float, f32)                     \
    FOR_GROUPS_X(WARPS, HELD, by, bf16, bf16)                     \
    FOR_GROUPS_GX(WARPS, HELD, by, float, f32, float, f32)        \
    FOR_GROUPS_GX(WARPS, HELD, by, float, f32, bf16, bf16)        \
    FOR_GROUPS_GX(WARPS, HELD, by, bf16, bf16, float, f32)        \
    FOR_GROUPS_GX(WARPS, HELD, by, bf16, bf16, bf16, bf16)

ROWS(1, 4, warp)
ROWS(8, 4, block)
GROUPS(1, 1, head)
GROUPS(1, 4, warp)
GROUPS(8, 4, block)
KERNEL(1024, norm_weight_f32_f32, (const float* parts, float* dw, i64 n_parts, i64 width),
       norm_weight(parts, dw, n_parts, width))
