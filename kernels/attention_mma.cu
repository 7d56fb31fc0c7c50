// attention_mma.cu -- causal attention inside documents and its backward on tensor cores, heads of 64 and 128.
// Math: as attention.cu with `rounds`; queries, keys, values and dout lie in bf16, sums are f32, exponentials are
//   of base 2. Scores and probabilities stay in registers: the results of one product are the factors of the next.
// Launch: blocks of 4 warps, each of 16 of the tile's 64 rows; x = tile and head: attention_mma and attention_dq_mma
//   of queries, attention_dkv_mma of keys. Shared: tiles of 64 rows, pieces of 16 bytes turned by the row so that
//   eight rows lie in different banks. The next tile is copied while this one is multiplied.
// Deterministic: a block has its results alone and adds tiles in order.
// Reference: hone_kernels::reference::attention in bf16; within 3e-3 of the largest result where running maxima
//   change (factors are rounded below another maximum then), 1e-6 where they do not.
#include "attention.cuh"
#include "mma.cuh"

namespace {
using namespace attention;

constexpr int THREADS = 128;
constexpr float LOG2_E = 1.44269504088896340736f;
constexpr float LN_2 = 0.69314718055994530942f;

// Where eight values of a row of a shared tile lie.
template <int DIM> __device__ __forceinline__ int place(int row, int eighth) {
    return row * DIM + ((eighth ^ (row & 7)) << 3);
}

// Rows of one head in memory; what lies behind the last counts as zeros.
struct Rows {
    const bf16* at;
    i64 stride;
    int n;
};

// Begins to copy a tile.
template <int DIM> __device__ __forceinline__ void fetch(bf16* tile, const Rows& rows) {
    constexpr int EIGHTHS = DIM / 8;
#pragma unroll
    for (int i = 0; i < TILE * EIGHTHS / THREADS; i++) {
        int at = i * THREADS + threadIdx.x, row = at / EIGHTHS, eighth = at % EIGHTHS;
        bool there = row < rows.n;
        mma::copy(tile + place<DIM>(row, eighth), rows.at + (there ? row * rows.stride : 0) + eighth * 8, there);
    }
}

// The first of a thread's rows in a tile; the second is 8 behind. And the first of two columns of eight.
__device__ __forceinline__ int thread_row() { return (threadIdx.x >> 5) * 16 + ((threadIdx.x & 31) >> 2); }
__device__ __forceinline__ int thread_col() { return (threadIdx.x & 3) * 2; }

template <int N> __device__ __forceinline__ void clear(float (&acc)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[n][e] = 0.0f;
}

// Scalar products of the warp's rows of A with 8 N rows of B from `first` on.
template <int DIM, int N>
__device__ __forceinline__ void dots(float (&acc)[N][4], const bf16* a, const bf16* b, int first) {
    const int lane = threadIdx.x & 31, row = (threadIdx.x >> 5) * 16 + (lane & 15);
    const int col = first + (lane & 7) + ((lane >> 4) << 3);
    clear(acc);
#pragma unroll
    for (int k = 0; k < DIM / 16; k++) {
        unsigned x[4];
        mma::load(x, a + place<DIM>(row, 2 * k + (lane >> 4)));
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            unsigned y[4];
            mma::load(y, b + place<DIM>(col + 8 * n, 2 * k + ((lane >> 3) & 1)));
            mma::multiply(acc[n], x, y[0], y[1]);
            mma::multiply(acc[n + 1], x, y[2], y[3]);
        }
    }
}

// acc += S B, S being the warp's scores, rounded, and B 8 N rows from `first` on.
template <int DIM, int N>
__device__ __forceinline__ void add_weighted(float (&acc)[DIM / 8][4], const float (&s)[N][4], const bf16* b,
                                             int first) {
    const int lane = threadIdx.x & 31, row = first + (lane & 15);
#pragma unroll
    for (int k = 0; k < N; k += 2) {
        const unsigned x[4] = {mma::pack(s[k][0], s[k][1]), mma::pack(s[k][2], s[k][3]),
                               mma::pack(s[k + 1][0], s[k + 1][1]), mma::pack(s[k + 1][2], s[k + 1][3])};
#pragma unroll
        for (int n = 0; n < DIM / 8; n += 2) {
            unsigned y[4];
            mma::load_turned(y, b + place<DIM>(row + 8 * k, n + (lane >> 4)));
            mma::multiply(acc[n], x, y[0], y[1]);
            mma::multiply(acc[n + 1], x, y[2], y[3]);
        }
    }
}

__device__ __forceinline__ void put_pair(float* to, float x, float y) {
    *reinterpret_cast<float2*>(to) = make_float2(x, y);
}
__device__ __forceinline__ void put_pair(bf16* to, float x, float y) {
    *reinterpret_cast<unsigned*>(to) = mma::pack(x, y);
}

// A tile of results, the thread's two rows times two factors.
template <int DIM, class Y>
__device__ __forceinline__ void write(const float (&acc)[DIM / 8][4], float first, float second, Y* to, i64 stride,
                                      int n) {
    const int row = thread_row();
    to += row * stride + thread_col();
#pragma unroll
    for (int i = 0; i < DIM / 8; i++) {
        if (row < n) put_pair(to + 8 * i, acc[i][0] * first, acc[i][1] * first);
        if (row + 8 < n) put_pair(to + 8 * stride + 8 * i, acc[i][2] * second, acc[i][3] * second);
    }
}

// Over the four threads that share rows.
__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

// Scores in units of ln 2, so that their exponentials are powers of two.
struct Scores {
    float scale, scale_2, cap_2, to_cap;
    bool capped;
    __device__ explicit Scores(const Mask& mask)
        : scale(mask.scale), scale_2(mask.scale * LOG2_E), cap_2(mask.cap * LOG2_E),
          to_cap(mask.cap == 0.0f ? 0.0f : mask.scale / mask.cap), capped(mask.cap != 0.0f) {}
    __device__ __forceinline__ float score(float product) const {
        return capped ? cap_2 * tanhf(product * to_cap) : product * scale_2;
    }
    __device__ __forceinline__ float slope(float score) const {
        if (!capped) return scale;
        float t = score / cap_2;
        return scale * ((1.0f - t) * (1.0f + t));
    }
};

// Whether each query of a tile sees each key of one.
__device__ __forceinline__ bool all_seen(const Mask& mask, int query, int key) {
    return key + TILE - 1 <= query && query + TILE - 1 - key < mask.window;
}

// Products become scores, of keys that are not seen minus infinity.
template <int N>
__device__ __forceinline__ void score(float (&s)[N][4], const Mask& mask, const Scores& scores, int query, int key) {
    const bool all = all_seen(mask, query, key);
    query += thread_row(), key += thread_col();
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            bool sees = all || mask.sees(query + (e >> 1) * 8, key + 8 * n + (e & 1));
            s[n][e] = sees ? scores.score(s[n][e]) : NEG_INF;
        }
}

// Scores become exponentials below the running maxima of the thread's rows; `o` and `sum` are brought below them.
template <int N, int M>
__device__ __forceinline__ void soften(float (&s)[N][4], float (&o)[M][4], float (&top)[2], float (&sum)[2]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float most = top[half];
#pragma unroll
        for (int n = 0; n < N; n++) most = fmaxf(most, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
        most = row_max(most);
        // A row that has seen no key yet: its exponentials are of minus infinity, not of no number.
        const float shift = most == NEG_INF ? 0.0f : most;
        const float older = mma::exp2_near(top[half] - shift);
        top[half] = most;
        float all = sum[half] * older;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; e++) {
                s[n][e] = mma::exp2_near(s[n][e] - shift);
                all += s[n][e];
            }
        sum[half] = all;
#pragma unroll
        for (int n = 0; n < M; n++) o[n][2 * half] *= older, o[n][2 * half + 1] *= older;
    }
}

template <int DIM, class Y>
__device__ __forceinline__ void forward(const bf16* qkv, Y* out, float* lse, const unsigned* tiles, Heads heads,
                                        Mask mask, bf16* shared) {
    const Tile tile(tiles, blockIdx.x / heads.n_q);
    const int head = blockIdx.x % heads.n_q, kv = head / heads.group(), end = tile.first + tile.rows();
    const i64 width = heads.width(), first = tile.start + tile.first;
    const Scores scores(mask);
    bf16 *q = shared, *k = q + TILE * DIM, *v = k + TILE * DIM;
    auto rows = [&](int key, int column) { return Rows{qkv + (tile.start + key) * width + column, width, end - key}; };
    int key = mask.first_key(tile.first) / TILE * TILE;
    fetch<DIM>(q, Rows{qkv + first * width + head * DIM, width, tile.rows()});
    fetch<DIM>(k, rows(key, heads.key_column(kv)));
    mma::end_group();
    fetch<DIM>(v, rows(key, heads.value_column(kv)));
    mma::end_group();
    float o[DIM / 8][4], top[2] = {NEG_INF, NEG_INF}, sum[2] = {0.0f, 0.0f};
    clear(o);
    for (; key < end; key += TILE) {
        const bool more = key + TILE < end;
        float s[TILE / 8][4];
        mma::wait_groups<1>();
        __syncthreads();
        dots<DIM>(s, q, k, 0);
        __syncthreads();
        // The next keys come while these are softened and weigh values, and the next values behind them.
        if (more) fetch<DIM>(k, rows(key + TILE, heads.key_column(kv)));
        mma::end_group();
        score(s, mask, scores, tile.first, key);
        soften(s, o, top, sum);
        mma::wait_groups<1>();
        __syncthreads();
        add_weighted<DIM>(o, s, v, 0);
        __syncthreads();
        if (more) fetch<DIM>(v, rows(key + TILE, heads.value_column(kv)));
        mma::end_group();
    }
    const float all[2] = {row_sum(sum[0]), row_sum(sum[1])};
    if (thread_col() == 0)
        for (int half = 0; half < 2; half++) {
            int row = thread_row() + 8 * half;
            if (row < tile.rows()) lse[(first + row) * heads.n_q + head] = top[half] * LN_2 + logf(all[half]);
        }
    const i64 out_width = heads.out_width();
    write<DIM>(o, 1.0f / all[0], 1.0f / all[1], out + first * out_width + head * DIM, out_width, tile.rows());
}

// Score s, in units of ln 2, and gradient of the probability dp become probability and gradient of the product.
__device__ __forceinline__ void slopes(float& s, float& dp, bool sees, float lse_2, float delta, const Scores& scores) {
    const float score = scores.score(s);
    const float p = sees ? mma::exp2_near(score - lse_2) : 0.0f;
    dp = scores.slope(score) * p * (dp - delta);
    s = p;
}

template <int DIM, class Y>
__device__ __forceinline__ void backward_q(const bf16* dout, const bf16* qkv, const float* lse, const float* delta,
                                           Y* dqkv, const unsigned* tiles, Heads heads, Mask mask, bf16* shared) {
    constexpr int SIZE = TILE * DIM;
    const Tile tile(tiles, blockIdx.x / heads.n_q);
    const int head = blockIdx.x % heads.n_q, kv = head / heads.group(), end = tile.first + tile.rows();
    const i64 width = heads.width(), out_width = heads.out_width(), first = tile.start + tile.first;
    const Scores scores(mask);
    bf16 *q = shared, *g = q + SIZE, *keys = g + SIZE, *values = keys + 2 * SIZE;
    auto fetch_keys = [&](int key, int stage) {
        const bf16* at = qkv + (tile.start + key) * width;
        fetch<DIM>(keys + stage * SIZE, Rows{at + heads.key_column(kv), width, end - key});
        fetch<DIM>(values + stage * SIZE, Rows{at + heads.value_column(kv), width, end - key});
    };
    int key = mask.first_key(tile.first) / TILE * TILE;
    fetch<DIM>(q, Rows{qkv + first * width + head * DIM, width, tile.rows()});
    fetch<DIM>(g, Rows{dout + first * out_width + head * DIM, out_width, tile.rows()});
    fetch_keys(key, 0);
    mma::end_group();
    float lse_2[2], sums[2];
    for (int half = 0; half < 2; half++) {
        int row = thread_row() + 8 * half;
        i64 at = (first + row) * heads.n_q + head;
        lse_2[half] = row < tile.rows() ? lse[at] * LOG2_E : -NEG_INF;
        sums[half] = row < tile.rows() ? delta[at] : 0.0f;
    }
    float dq[DIM / 8][4];
    clear(dq);
    for (int stage = 0; key < end; key += TILE, stage ^= 1) {
        if (key + TILE < end) fetch_keys(key + TILE, stage ^ 1);
        mma::end_group();
        mma::wait_groups<1>();
        __syncthreads();
        const bf16 *k = keys + stage * SIZE, *v = values + stage * SIZE;
        const bool all = all_seen(mask, tile.first, key);
        float s[TILE / 8][4], ds[TILE / 8][4];
        dots<DIM>(s, q, k, 0);
        dots<DIM>(ds, g, v, 0);
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int query = tile.first + thread_row() + (e >> 1) * 8;
                bool sees = all || mask.sees(query, key + thread_col() + 8 * n + (e & 1));
                slopes(s[n][e], ds[n][e], sees, lse_2[e >> 1], sums[e >> 1], scores);
            }
        add_weighted<DIM>(dq, ds, k, 0);
        // Before the tile after the next is copied over this one.
        __syncthreads();
    }
    write<DIM>(dq, 1.0f, 1.0f, dqkv + first * width + head * DIM, width, tile.rows());
}

// What a block of keys reads of a tile of queries, beside rows.
struct Saved {
    float lse_2[TILE], delta[TILE];
};

// Rows of scores are keys here, columns queries; COLUMNS of them at a time.
template <int DIM, int COLUMNS, class Y>
__device__ __forceinline__ void backward_kv(const bf16* dout, const bf16* qkv, const float* lse, const float* delta,
                                            Y* dqkv, const unsigned* tiles, Heads heads, Mask mask, bf16* shared) {
    constexpr int SIZE = TILE * DIM;
    const Tile tile(tiles, blockIdx.x / heads.n_kv);
    const int kv = blockIdx.x % heads.n_kv, end = mask.end_query(tile.first + tile.rows() - 1, tile.len);
    const i64 width = heads.width(), out_width = heads.out_width(), first = tile.start + tile.first;
    const Scores scores(mask);
    bf16 *k = shared, *v = k + SIZE, *queries = v + SIZE, *gradients = queries + 2 * SIZE;
    Saved* saved = reinterpret_cast<Saved*>(gradients + 2 * SIZE);
    // Tiles of queries of one head after those of another.
    const int per_head = (end - tile.first + TILE - 1) / TILE, n = per_head * heads.group();
    auto head_of = [&](int i) { return kv * heads.group() + i / per_head; };
    auto query_of = [&](int i) { return tile.first + i % per_head * TILE; };
    auto fetch_queries = [&](int i) {
        const int head = head_of(i), query = query_of(i), stage = i & 1;
        const i64 token = tile.start + query;
        fetch<DIM>(queries + stage * SIZE, Rows{qkv + token * width + head * DIM, width, end - query});
        fetch<DIM>(gradients + stage * SIZE, Rows{dout + token * out_width + head * DIM, out_width, end - query});
    };
    // A query that is not there sees nothing: below an infinite log-sum-exp its probabilities are 0.
    auto saved_of = [&](int i) {
        const int query = query_of(i) + (threadIdx.x & (TILE - 1));
        const bool is_lse = threadIdx.x < TILE;
        if (query >= end) return is_lse ? -NEG_INF : 0.0f;
        i64 at = (tile.start + query) * heads.n_q + head_of(i);
        return is_lse ? lse[at] * LOG2_E : delta[at];
    };
    auto keep = [&](int i, float x) {
        Saved& to = saved[i & 1];
        (threadIdx.x < TILE ? to.lse_2 : to.delta)[threadIdx.x & (TILE - 1)] = x;
    };
    fetch<DIM>(k, Rows{qkv + first * width + heads.key_column(kv), width, tile.rows()});
    fetch<DIM>(v, Rows{qkv + first * width + heads.value_column(kv), width, tile.rows()});
    fetch_queries(0);
    mma::end_group();
    keep(0, saved_of(0));
    float dk[DIM / 8][4], dv[DIM / 8][4];
    clear(dk);
    clear(dv);
    for (int i = 0; i < n; i++) {
        const bool more = i + 1 < n;
        const int query = query_of(i);
        if (more) fetch_queries(i + 1);
        mma::end_group();
        const float next = more ? saved_of(i + 1) : 0.0f;
        mma::wait_groups<1>();
        __syncthreads();
        const bf16 *q = queries + (i & 1) * SIZE, *g = gradients + (i & 1) * SIZE;
        const Saved& of = saved[i & 1];
        const bool all = all_seen(mask, query, tile.first);
#pragma unroll
        for (int column = 0; column < TILE; column += COLUMNS) {
            float s[COLUMNS / 8][4], ds[COLUMNS / 8][4];
            dots<DIM>(s, k, q, column);
            dots<DIM>(ds, v, g, column);
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; n++) {
                const int col = column + 8 * n + thread_col();
                const float2 lse_2 = *reinterpret_cast<const float2*>(&of.lse_2[col]);
                const float2 sums = *reinterpret_cast<const float2*>(&of.delta[col]);
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    bool sees = all || mask.sees(query + col + (e & 1), tile.first + thread_row() + (e >> 1) * 8);
                    slopes(s[n][e], ds[n][e], sees, e & 1 ? lse_2.y : lse_2.x, e & 1 ? sums.y : sums.x, scores);
                }
            }
            add_weighted<DIM>(dv, s, g, column);
            add_weighted<DIM>(dk, ds, q, column);
        }
        if (more) keep(i + 1, next);
        // Before the tile after the next is copied over this one.
        __syncthreads();
    }
    Y* to = dqkv + first * width;
    write<DIM>(dk, 1.0f, 1.0f, to + heads.key_column(kv), width, tile.rows());
    write<DIM>(dv, 1.0f, 1.0f, to + heads.value_column(kv), width, tile.rows());
}

}  // namespace

#define PLAN Heads{n_q, n_kv, dim}, Mask{window, scale, cap}
#define BACKWARD(name, Y, ...)                                                                                  \
    KERNEL(128, name,                                                                                           \
           (const bf16* dout, const bf16* qkv, const float* lse, const float* sums, Y* dqkv, const unsigned* tiles, \
            int n_q, int n_kv, int dim, int window, float scale, float cap),                                    \
           DYNAMIC_SHARED(bf16, shared); __VA_ARGS__(dout, qkv, lse, sums, dqkv, tiles, PLAN, shared))
#define FOR_Y(DIM, COLUMNS, Y, y_)                                                                              \
    KERNEL(128, attention_mma##DIM##_bf16_##y_,                                                                 \
           (const bf16* qkv, Y* out, float* lse, const unsigned* tiles, int n_q, int n_kv, int dim, int window, \
            float scale, float cap),                                                                            \
           DYNAMIC_SHARED(bf16, shared); forward<DIM>(qkv, out, lse, tiles, PLAN, shared))                      \
    BACKWARD(attention_dq_mma##DIM##_bf16_##y_, Y, backward_q<DIM>)                                             \
    BACKWARD(attention_dkv_mma##DIM##_bf16_##y_, Y, backward_kv<DIM, COLUMNS>)

FOR_Y(64, 32, float, f32)
FOR_Y(64, 32, bf16, bf16)
FOR_Y(128, 32, float, f32)
FOR_Y(128, 32, bf16, bf16)
