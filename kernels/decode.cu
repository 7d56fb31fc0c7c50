// decode.cu -- attention of one new token per sequence against its cache.
// Math: f32, caches f32 or bf16: s = score(q k), out = sum exp(s - max) v / sum exp(s - max).
// Launch: blocks of 256 threads; x = sequence and key head, y = query heads of its group, 8 a block, z = columns of
//   the result, 128 a block. Each warp takes every eighth piece of 32 keys, and the eight are merged in order.
//   Shared: 8 queries, and what the warps found.
// Deterministic: which warp has which key, and the order of the merge, are the length's alone.
// Reference: hone_kernels::reference::attention::decode. Tolerance 2e-6.
#include "attention.cuh"

namespace {
using namespace attention;

constexpr int WARPS = 8;
constexpr int HEADS = 8;     // query heads of a block
constexpr int PIECE = 32;    // keys of a warp at a time
constexpr int AT_ONCE = 8;   // keys whose scalar products are made side by side
constexpr int COLUMNS = 128; // of the result
constexpr int PAIRS = COLUMNS / 64;

// What a block shares beside its queries.
struct Found {
    float weights[WARPS][HEADS][PIECE];
    float top[WARPS][HEADS];
    float sum[WARPS][HEADS];
    float out[WARPS][HEADS][COLUMNS];
};

// Values `col` and `col + 1` of a row; zeros behind its end.
template <class X> __device__ __forceinline__ float2 pair(const X* row, int col, int dim) {
    return make_float2(col < dim ? value(row[col]) : 0.0f, col + 1 < dim ? value(row[col + 1]) : 0.0f);
}
// The same where pairs are aligned.
__device__ __forceinline__ float2 aligned_pair(const float* row, int col) {
    return *reinterpret_cast<const float2*>(row + col);
}
__device__ __forceinline__ float2 aligned_pair(const bf16* row, int col) {
    unsigned bits = *reinterpret_cast<const unsigned*>(row + col);
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}
template <class X> __device__ __forceinline__ float2 pair(const X* row, int col, int dim, bool aligned) {
    return aligned && col < dim ? aligned_pair(row, col) : pair(row, col, dim);
}

// Sums over the lanes of eight values each; lanes 4 i to 4 i + 3 get that of value i. Each lane gives half of what
// it still has to a partner, which gives the other half.
__device__ __forceinline__ float sum_of_eight(const float (&x)[AT_ONCE]) {
    const int lane = threadIdx.x & 31;
    float four[4], two[2];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float own = lane & 16 ? x[i + 4] : x[i], other = lane & 16 ? x[i] : x[i + 4];
        four[i] = own + __shfl_xor_sync(ALL_LANES, other, 16);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float own = lane & 8 ? four[i + 2] : four[i], other = lane & 8 ? four[i] : four[i + 2];
        two[i] = own + __shfl_xor_sync(ALL_LANES, other, 8);
    }
    float own = lane & 4 ? two[1] : two[0], other = lane & 4 ? two[0] : two[1];
    float sum = own + __shfl_xor_sync(ALL_LANES, other, 4);
    sum += __shfl_xor_sync(ALL_LANES, sum, 2);
    return sum + __shfl_xor_sync(ALL_LANES, sum, 1);
}

// The rows of one key head.
template <class C> struct Cache {
    const C* at;
    i64 stride;
    int dim;
    bool aligned;
    __device__ float2 pair_of(int key, int col) const { return pair(at + key * stride, col, dim, aligned); }
};

// Scores of the keys from `key` on, of which `n` are there, into `weights`.
template <class C>
__device__ void score_piece(float (*weights)[PIECE], const float* queries, int n_heads, const Cache<C>& keys, int key,
                            int n, const Mask& mask) {
    const int lane = threadIdx.x & 31;
    for (int at = 0; at < n; at += AT_ONCE) {
        float products[HEADS][AT_ONCE] = {};
        for (int col = 2 * lane; col - 2 * lane < keys.dim; col += 64) {
            float2 k[AT_ONCE];
            // What is not there is the last once more; its weight will be 0.
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) k[i] = keys.pair_of(key + min(at + i, n - 1), col);
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                if (h >= n_heads) break;
                float2 q = pair(queries + h * keys.dim, col, keys.dim);
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++) products[h][i] += q.x * k[i].x + q.y * k[i].y;
            }
        }
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            if (h >= n_heads) break;
            float product = sum_of_eight(products[h]);
            if ((lane & 3) == 0) weights[h][at + (lane >> 2)] = mask.score(product);
        }
    }
}

template <class Q, class C, class O>
__device__ void decode(const Q* q, i64 q_stride, const C* keys, const C* values, i64 capacity, const unsigned* lens,
                       O* out, Heads heads, Mask mask, float* shared) {
    const int sequence = blockIdx.x / heads.n_kv, kv = blockIdx.x % heads.n_kv, dim = heads.dim;
    const int head = kv * heads.group() + blockIdx.y * HEADS;
    const int n_heads = min(HEADS, (kv + 1) * heads.group() - head), from = blockIdx.z * COLUMNS;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    Found& found = *reinterpret_cast<Found*>(shared);
    float* queries = shared + sizeof(Found) / sizeof(float);
    for (int at = threadIdx.x; at < n_heads * dim; at += blockDim.x)
        queries[at] = value(q[sequence * q_stride + head * dim + at]);
    __syncthreads();

    const i64 stride = (i64)heads.n_kv * dim, first = sequence * capacity * stride + kv * dim;
    const bool aligned = dim % 2 == 0;
    const Cache<C> k{keys + first, stride, dim, aligned}, v{values + first, stride, dim, aligned};
    const int len = (int)lens[sequence];
    float top[HEADS], sum[HEADS], o[HEADS][2 * PAIRS] = {};
    for (int h = 0; h < HEADS; h++) top[h] = NEG_INF, sum[h] = 0.0f;
    float(*weights)[PIECE] = found.weights[warp];
    for (int key = mask.first_key(len - 1) + warp * PIECE; key < len; key += WARPS * PIECE) {
        const int n = min(PIECE, len - key);
        score_piece(weights, queries, n_heads, k, key, n, mask);
        __syncwarp();
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            if (h >= n_heads) break;
            float score = lane < n ? weights[h][lane] : NEG_INF;
            float most = fmaxf(top[h], warp_max(score)), older = expf(top[h] - most);
            float p = expf(score - most);
            top[h] = most;
            sum[h] = sum[h] * older + p;
#pragma unroll
            for (int i = 0; i < 2 * PAIRS; i++) o[h][i] *= older;
            // Its own place: nobody reads it before the next meeting.
            weights[h][lane] = p;
        }
        __syncwarp();
#pragma unroll 4
        for (int i = 0; i < n; i++)
#pragma unroll
            for (int c = 0; c < PAIRS; c++) {
                if (from + 64 * c >= dim) break;
                float2 x = v.pair_of(key + i, from + 64 * c + 2 * lane);
#pragma unroll
                for (int h = 0; h < HEADS; h++) {
                    if (h >= n_heads) break;
                    o[h][2 * c] += weights[h][i] * x.x;
                    o[h][2 * c + 1] += weights[h][i] * x.y;
                }
            }
        __syncwarp();
    }
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        if (h >= n_heads) break;
        float all = warp_sum(sum[h]);
        if (lane == 0) found.top[warp][h] = top[h], found.sum[warp][h] = all;
#pragma unroll
        for (int c = 0; c < PAIRS; c++) {
            found.out[warp][h][64 * c + 2 * lane] = o[h][2 * c];
            found.out[warp][h][64 * c + 2 * lane + 1] = o[h][2 * c + 1];
        }
    }
    __syncthreads();
    const int columns = min(COLUMNS, dim - from);
    for (int at = threadIdx.x; at < n_heads * columns; at += blockDim.x) {
        int h = at / columns, col = at % columns;
        float most = NEG_INF, all = 0.0f, x = 0.0f;
        for (int w = 0; w < WARPS; w++) most = fmaxf(most, found.top[w][h]);
        for (int w = 0; w < WARPS; w++) {
            float weight = expf(found.top[w][h] - most);
            all += weight * found.sum[w][h];
            x += weight * found.out[w][h][col];
        }
        put(&out[sequence * heads.out_width() + (head + h) * dim + from + col], x / all);
    }
}

}  // namespace

#define DECODE(Q, q_, C, c_, O, o_)                                                                             \
    KERNEL(256, attention_decode_##q_##_##c_##_##o_,                                                            \
           (const Q* q, i64 q_stride, const C* keys, const C* values, i64 capacity, const unsigned* lens, O* out, \
            int n_q, int n_kv, int dim, int window, float scale, float cap),                                    \
           DYNAMIC_SHARED(float, shared);                                                                       \
           decode(q, q_stride, keys, values, capacity, lens, out, Heads{n_q, n_kv, dim}, Mask{window, scale, cap}, shared))
#define FOR_QC(Q, q_, C, c_)               \
    DECODE(Q, q_, C, c_, float, f32)       \
    DECODE(Q, q_, C, c_, bf16, bf16)

FOR_QC(float, f32, float, f32)
FOR_QC(float, f32, bf16, bf16)
FOR_QC(bf16, bf16, float, f32)
FOR_QC(bf16, bf16, bf16, bf16)
