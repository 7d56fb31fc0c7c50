// update.cu -- what a step does to weights: AdamW with moments of 32 or 8 bits, Lion, descent; sums of squares.
// Math: f32, each step rounded by itself, so that bytes are those of hone_kernels::Cpu; sums of squares f64. Rates
// come from the host, where they are f64 first.
// Launch: blocks of 256 threads that go on until all is done, four values a thread; in 8 bits a warp has a block of
// 256 values. Bytes a value: AdamW 28, in 8 bits 16, Lion and momentum 20, descent 12, squares 4.
// Deterministic: values are by themselves; a sum's order follows from the number of values.
// Reference: hone_kernels::Reference. Tolerance 5e-7; in 8 bits 0, codes too.
#include "units.cuh"

namespace {

__device__ __forceinline__ float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float sub(float a, float b) { return __fsub_rn(a, b); }

// ---------------------------------------------------------------------------------- sums of squares

__device__ void squares(const float* x, i64 n, double* parts) {
    __shared__ double scratch[32];
    bool wide = is_wide<4>(x);
    i64 units = n / 4;
    double sum = 0.0;
    for (i64 unit = thread_index(); unit < units; unit += n_threads()) {
        float a[4];
        load(x + unit * 4, wide, a);
        for (float a : a) sum += (double)a * a;
    }
    i64 rest = units * 4 + thread_index();
    if (rest < n) sum += (double)x[rest] * x[rest];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// --------------------------------------------------------------------------------- value by value

// A weight and up to two moments; a moment that there is none of is null, and 0 where it is used.
struct Tensor {
    float* p;
    const float* g;
    float *m, *v;
};

template <int N, class Step> __device__ __forceinline__ void step_unit(Tensor t, i64 at, bool wide, Step step) {
    float p[N], g[N], m[N] = {}, v[N] = {};
    load(t.p + at, wide, p);
    load(t.g + at, wide, g);
    if (t.m) load(t.m + at, wide, m);
    if (t.v) load(t.v + at, wide, v);
    for (int k = 0; k < N; k++) step(p[k], g[k], m[k], v[k]);
    store(t.p + at, wide, p);
    if (t.m) store(t.m + at, wide, m);
    if (t.v) store(t.v + at, wide, v);
}

template <class Step> __device__ __forceinline__ void each_value(Tensor t, i64 n, Step step) {
    bool wide = is_wide<4>(t.p) && is_wide<4>(t.g) && is_wide<4>(t.m) && is_wide<4>(t.v);
    i64 units = n / 4;
    for (i64 unit = thread_index(); unit < units; unit += n_threads()) step_unit<4>(t, unit * 4, wide, step);
    i64 rest = units * 4 + thread_index();
    if (rest < n) step_unit<1>(t, rest, false, step);
}

// The rates of AdamW; beta1 is used in 8 bits.
struct AdamW {
    float keep, grad_scale, first, beta1, second, beta2, step_size, root_scale, eps;

    __device__ __forceinline__ void step(float& p, float m, float v) const {
        float denominator = add(__fdiv_rn(__fsqrt_rn(v), root_scale), eps);
        p = sub(mul(p, keep), mul(step_size, __fdiv_rn(m, denominator)));
    }
    __device__ __forceinline__ float second_moment(float v, float g) const {
        return add(mul(v, beta2), mul(second, mul(g, g)));
    }
};

__device__ void adamw(Tensor t, i64 n, AdamW r) {
    each_value(t, n, [=](float& p, float g, float& m, float& v) {
        g = mul(g, r.grad_scale);
        m = add(m, mul(sub(g, m), r.first));
        v = r.second_moment(v, g);
        r.step(p, m, v);
    });
}

struct Lion {
    float keep, lr, beta1, beta2, fresh1, fresh2, grad_scale;
};

__device__ void lion(Tensor t, i64 n, Lion r) {
    each_value(t, n, [=](float& p, float g, float& m, float&) {
        g = mul(g, r.grad_scale);
        float u = add(mul(m, r.beta1), mul(r.fresh1, g));
        float sign = u > 0.0f ? 1.0f : u < 0.0f ? -1.0f : 0.0f;
        p = sub(mul(p, r.keep), mul(r.lr, sign));
        m = add(mul(m, r.beta2), mul(r.fresh2, g));
    });
}

struct Sgd {
    float lr, decay, momentum, fresh, grad_scale;
    int nesterov;
};

__device__ void sgd(Tensor t, i64 n, Sgd r) {
    each_value(t, n, [=](float& p, float g, float& m, float&) {
        g = add(mul(g, r.grad_scale), mul(r.decay, p));
        float by = g;
        if (t.m) {
            m = add(mul(m, r.momentum), mul(r.fresh, g));
            by = r.nesterov ? add(g, mul(r.momentum, m)) : m;
        }
        p = sub(p, mul(r.lr, by));
    });
}

// ------------------------------------------------------------------------------------- in 8 bits

// A book as the host lays it: what the codes stand for, and the midpoints as a search tree, whose node k has
// its children at 2k and 2k + 1 and whose root is node 1, so that neighbouring lanes read from different banks.
struct Book {
    float values[256], tree[256];

    // The number of midpoints below x, which is 0 for what is not a number.
    __device__ __forceinline__ unsigned code(float x) const {
        x = x < -1.0f ? -1.0f : x > 1.0f ? 1.0f : x;
        unsigned node = 1;
        for (int level = 0; level < 8; level++) node = 2 * node + (tree[node] < x);
        return node - 256;
    }
};

// Four codes, the first in the lowest bits; 0 where there are none.
__device__ __forceinline__ unsigned load_codes(const unsigned char* codes, i64 at, i64 n) {
    if (at + 4 <= n) return load_bytes(codes + at);
    unsigned all = 0;
    for (int k = 0; k < 4; k++)
        if (at + k < n) all |= (unsigned)codes[at + k] << 8 * k;
    return all;
}
__device__ __forceinline__ void store_codes(unsigned char* codes, i64 at, i64 n, unsigned all) {
    if (at + 4 <= n) return store_bytes(codes + at, all);
    for (int k = 0; k < 4; k++)
        if (at + k < n) codes[at + k] = (unsigned char)(all >> 8 * k);
}

// A lane's part of a block: values 4 lane .. 4 lane + 3 of either half.
constexpr int HALVES = 2;

// Codes of a block's values again; the warp's largest magnitude is returned.
__device__ __forceinline__ float recode(const Book& book, const float (&x)[HALVES][4], unsigned char* codes, i64 start,
                                        i64 n) {
    int lane = threadIdx.x & 31;
    float top = 0.0f;
    for (int half = 0; half < HALVES; half++)
        for (int k = 0; k < 4; k++) top = fmaxf(top, fabsf(x[half][k]));
    top = warp_max(top);
    float factor = __fdiv_rn(1.0f, fmaxf(top, 1e-38f));
    for (int half = 0; half < HALVES; half++) {
        unsigned all = 0;
        for (int k = 0; k < 4; k++) all |= book.code(mul(x[half][k], factor)) << 8 * k;
        store_codes(codes, start + 128 * half + 4 * lane, n, all);
    }
    return top;
}

__device__ void adamw_8bit(float* p, const float* g, unsigned char* m_codes, float* m_max, unsigned char* v_codes,
                           float* v_max, i64 n, const Book* books, AdamW r) {
    __shared__ Book shared[2];
    for (int i = threadIdx.x; i < 256; i += blockDim.x)
        for (int book = 0; book < 2; book++) {
            shared[book].values[i] = books[book].values[i];
            shared[book].tree[i] = books[book].tree[i];
        }
    __syncthreads();
    int lane = threadIdx.x & 31;
    bool wide = is_wide<4>(p) && is_wide<4>(g);
    for (i64 block = thread_index() >> 5; block * 256 < n; block += n_threads() >> 5) {
        float m[HALVES][4], v[HALVES][4], m_old = m_max[block], v_old = v_max[block];
        for (int half = 0; half < HALVES; half++) {
            i64 at = block * 256 + 128 * half + 4 * lane;
            unsigned m_code = load_codes(m_codes, at, n), v_code = load_codes(v_codes, at, n);
            bool whole = at + 4 <= n;
            float weights[4] = {}, gradients[4] = {};
            if (whole) {
                load(p + at, wide, weights);
                load(g + at, wide, gradients);
            }
            for (int k = 0; k < 4; k++) {
                m[half][k] = v[half][k] = 0.0f;
                if (at + k >= n) continue;
                float grad = mul(whole ? gradients[k] : g[at + k], r.grad_scale);
                float weight = whole ? weights[k] : p[at + k];
                float m_then = mul(shared[0].values[m_code >> 8 * k & 255], m_old);
                float v_then = mul(shared[1].values[v_code >> 8 * k & 255], v_old);
                m[half][k] = add(mul(m_then, r.beta1), mul(r.first, grad));
                v[half][k] = r.second_moment(v_then, grad);
                r.step(weight, m[half][k], v[half][k]);
                weights[k] = weight;
                if (!whole) p[at + k] = weight;
            }
            if (whole) store(p + at, wide, weights);
        }
        float m_top = recode(shared[0], m, m_codes, block * 256, n);
        float v_top = recode(shared[1], v, v_codes, block * 256, n);
        if (lane == 0) {
            m_max[block] = m_top;
            v_max[block] = v_top;
        }
    }
}

}  // namespace

KERNEL(256, squares_f32, (const float* x, i64 n, double* parts), squares(x, n, parts))
KERNEL(256, adamw_f32,
       (float* p, const float* g, float* m, float* v, i64 n, float keep, float grad_scale, float first, float beta1,
        float second, float beta2, float step_size, float root_scale, float eps),
       adamw({p, g, m, v}, n, {keep, grad_scale, first, beta1, second, beta2, step_size, root_scale, eps}))
KERNEL(256, adamw_8bit_f32,
       (float* p, const float* g, unsigned char* m_codes, float* m_max, unsigned char* v_codes, float* v_max, i64 n,
        const Book* books, float keep, float grad_scale, float first, float beta1, float second, float beta2,
        float step_size, float root_scale, float eps),
       adamw_8bit(p, g, m_codes, m_max, v_codes, v_max, n, books,
                  {keep, grad_scale, first, beta1, second, beta2, step_size, root_scale, eps}))
KERNEL(256, lion_f32,
       (float* p, const float* g, float* m, i64 n, float keep, float lr, float beta1, float beta2, float fresh1,
        float fresh2, float grad_scale),
       lion({p, g, m, nullptr}, n, {keep, lr, beta1, beta2, fresh1, fresh2, grad_scale}))
KERNEL(256, sgd_f32,
       (float* p, const float* g, float* m, i64 n, float lr, float decay, float momentum, float fresh,
        float grad_scale, int nesterov),
       sgd({p, g, m, nullptr}, n, {lr, decay, momentum, fresh, grad_scale, nesterov}))
