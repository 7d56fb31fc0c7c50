// attention.cu -- causal attention inside documents and its backward, for any head width and any mask.
// Math: f32. With `rounds`, queries, keys, values, dout, probabilities and gradients of scores are rounded to
//   bf16 where they are factors. Forward (FlashAttention-2): s = score(q k), p = exp(s - max), out = sum p v /
//   sum p, lse = max + log sum p, the maximum and the sums running over tiles of keys. Backward: p = exp(s - lse),
//   ds = slope p (dout v - delta), delta = dout out; dq = sum ds k, dk = sum ds q, dv = sum p dout.
// Launch: blocks of 256 threads, 16 by 16 of 4 by 4 scores. attention_plain and attention_dq_plain: x = tile of
//   queries and query head, y = columns of the result, as many a block as the name says; attention_dkv_plain: x =
//   tile of keys and key head. Scores are made anew for each block of columns. attention_delta: a warp a row and head.
// Deterministic: a block has its results alone and adds tiles in order.
// Reference: hone_kernels::reference::attention. Tolerance 2e-6.
#include "attention.cuh"

namespace {
using namespace attention;

// Values from one row of a shared tile to the next: rows begin aligned to 16 bytes.
constexpr int PITCH = TILE + 4;
// Columns of heads that are multiplied at a time.
constexpr int DEPTH = 32;

// What a block shares: two tiles of DEPTH columns or one of TILE, and a tile of scores. Both lie turned, what is
// added up along rows.
struct Shared {
    float* tile;
    float* scores;
};

// The first row and the first column of a thread's 4 by 4 scores.
__device__ __forceinline__ int thread_row() { return (threadIdx.x >> 4) * 4; }
__device__ __forceinline__ int thread_col() { return (threadIdx.x & 15) * 4; }

// Rows of one head in memory; what lies behind the last counts as zeros.
template <class X> struct Rows {
    const X* at;
    i64 stride;
    int n;
};

// acc += A B of DEPTH_ products, A (rows) and B (columns) as they lie.
template <int DEPTH_> __device__ __forceinline__ void multiply(float (&acc)[4][4], const float* a, const float* b) {
    a += thread_row(), b += thread_col();
#pragma unroll 8
    for (int k = 0; k < DEPTH_; k++) {
        float4 x = *reinterpret_cast<const float4*>(a + k * PITCH);
        float4 y = *reinterpret_cast<const float4*>(b + k * PITCH);
        const float xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) acc[i][j] += xs[i] * ys[j];
    }
}

// Columns `from` on of a tile of rows, turned: (DEPTH, TILE).
template <class X>
__device__ void load_turned(float* to, const Rows<X>& rows, int from, int dim, bool rounds) {
    for (int at = threadIdx.x; at < TILE * DEPTH; at += blockDim.x) {
        int row = at / DEPTH, col = at % DEPTH;
        bool there = row < rows.n && from + col < dim;
        to[col * PITCH + row] = there ? rounded(value(rows.at[row * rows.stride + from + col]), rounds) : 0.0f;
    }
}

// Columns `from` on of a tile of rows, as they lie: (TILE, TILE).
template <class X>
__device__ void load_straight(float* to, const Rows<X>& rows, int from, int dim, bool rounds) {
    for (int at = threadIdx.x; at < TILE * TILE; at += blockDim.x) {
        int row = at / TILE, col = at % TILE;
        bool there = row < rows.n && from + col < dim;
        to[row * PITCH + col] = there ? rounded(value(rows.at[row * rows.stride + from + col]), rounds) : 0.0f;
    }
}

// Scalar products of the rows of A with those of B.
template <class X>
__device__ void dots(float (&acc)[4][4], const Rows<X>& a, const Rows<X>& b, int dim, bool rounds, Shared shared) {
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) acc[i][j] = 0.0f;
    for (int from = 0; from < dim; from += DEPTH) {
        __syncthreads();
        load_turned(shared.tile, a, from, dim, rounds);
        load_turned(shared.tile + DEPTH * PITCH, b, from, dim, rounds);
        __syncthreads();
        multiply<DEPTH>(acc, shared.tile, shared.tile + DEPTH * PITCH);
    }
}

// acc += S B, S being the threads' scores and B the columns `from` on of a tile of rows.
template <int N, class X>
__device__ void add_weighted(float (&acc)[N][4][4], const float (&s)[4][4], const Rows<X>& b, int from, int dim,
                             bool rounds, Shared shared) {
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float* to = shared.scores + (thread_col() + j) * PITCH + thread_row();
        *reinterpret_cast<float4*>(to) = make_float4(s[0][j], s[1][j], s[2][j], s[3][j]);
    }
#pragma unroll
    for (int c = 0; c < N; c++) {
        if (from + c * TILE >= dim) break;
        if (c > 0) __syncthreads();
        load_straight(shared.tile, b, from + c * TILE, dim, rounds);
        __syncthreads();
        multiply<TILE>(acc[c], shared.scores, shared.tile);
    }
}

// A block's results, row i times factor[i].
template <int N, class Y>
__device__ void write(const float (&acc)[N][4][4], const float (&factor)[4], Y* to, i64 stride, int n, int from,
                      int dim) {
#pragma unroll
    for (int c = 0; c < N; c++)
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int row = thread_row() + i, col = from + c * TILE + thread_col() + j;
                if (row < n && col < dim) put(&to[row * stride + col], acc[c][i][j] * factor[i]);
            }
}

template <int N> __device__ __forceinline__ void clear(float (&acc)[N][4][4]) {
#pragma unroll
    for (int c = 0; c < N; c++)
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) acc[c][i][j] = 0.0f;
}

// Over the 16 threads that share rows.
__device__ __forceinline__ float row_max(float x) {
    for (int lanes = 8; lanes > 0; lanes >>= 1) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, lanes));
    return x;
}
__device__ __forceinline__ float row_sum(float x) {
    for (int lanes = 8; lanes > 0; lanes >>= 1) x += __shfl_xor_sync(ALL_LANES, x, lanes);
    return x;
}

// Scores in `s` become exponentials below the new running maximum, rounded as factors; the sum of each row's
// goes to the thread's own `sum`. Gives what older results are multiplied by.
__device__ void soften(float (&s)[4][4], float (&top)[4], float (&sum)[4], float (&older)[4], bool rounds) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float most = row_max(fmaxf(fmaxf(s[i][0], s[i][1]), fmaxf(s[i][2], s[i][3])));
        most = fmaxf(top[i], most);
        // A row that has seen no key yet: its exponentials are of minus infinity, not of no number.
        float shift = most == NEG_INF ? 0.0f : most;
        older[i] = expf(top[i] - shift);
        top[i] = most;
        sum[i] *= older[i];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float p = expf(s[i][j] - shift);
            sum[i] += p;
            s[i][j] = rounded(p, rounds);
        }
    }
}

// COLUMNS columns of `out`, and lse.
template <int COLUMNS, class X, class Y>
__device__ void forward(const X* qkv, Y* out, float* lse, const unsigned* tiles, Heads heads, Mask mask, bool rounds,
                        Shared shared) {
    constexpr int N = COLUMNS / TILE;
    const Tile tile(tiles, blockIdx.x / heads.n_q);
    const int head = blockIdx.x % heads.n_q, kv = head / heads.group(), from = blockIdx.y * COLUMNS;
    const i64 width = heads.width(), start = tile.start;
    const Rows<X> q{qkv + (start + tile.first) * width + head * heads.dim, width, tile.rows()};
    float o[N][4][4], top[4], sum[4];
    clear(o);
    for (int i = 0; i < 4; i++) top[i] = NEG_INF, sum[i] = 0.0f;
    const int end = tile.first + tile.rows();
    for (int key = mask.first_key(tile.first) / TILE * TILE; key < end; key += TILE) {
        const X* at = qkv + (start + key) * width;
        const Rows<X> k{at + heads.key_column(kv), width, end - key}, v{at + heads.value_column(kv), width, end - key};
        float s[4][4], older[4];
        dots(s, q, k, heads.dim, rounds, shared);
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                bool sees = mask.sees(tile.first + thread_row() + i, key + thread_col() + j);
                s[i][j] = sees ? mask.score(s[i][j]) : NEG_INF;
            }
        soften(s, top, sum, older, rounds);
#pragma unroll
        for (int c = 0; c < N; c++)
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) o[c][i][j] *= older[i];
        add_weighted(o, s, v, from, heads.dim, rounds, shared);
    }
    float factor[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float all = row_sum(sum[i]);
        int row = thread_row() + i;
        factor[i] = 1.0f / all;
        if (row < tile.rows() && thread_col() == 0 && from == 0)
            lse[(start + tile.first + row) * heads.n_q + head] = top[i] + logf(all);
    }
    write(o, factor, out + (start + tile.first) * heads.out_width() + head * heads.dim, heads.out_width(),
          tile.rows(), from, heads.dim);
}

// delta = dout out of each row and head.
template <class X, class Y>
__device__ void delta(const X* dout, const Y* out, float* to, i64 rows, int dim) {
    i64 row = thread_index() >> 5;
    if (row >= rows) return;
    float sum = 0.0f;
    for (int col = threadIdx.x & 31; col < dim; col += 32)
        sum += value(dout[row * dim + col]) * value(out[row * dim + col]);
    sum = warp_sum(sum);
    if ((threadIdx.x & 31) == 0) to[row] = sum;
}

// What a query's backward needs beside its row.
struct Row {
    float lse, delta;
};

// Scores `s` and gradients of probabilities `dp` become probabilities and gradients of scores.
__device__ __forceinline__ void slopes(float& s, float& dp, bool sees, Row row, const Mask& mask, bool rounds) {
    float score = mask.score(s);
    float p = sees ? expf(score - row.lse) : 0.0f;
    dp = sees ? rounded(mask.slope(score) * p * (dp - row.delta), rounds) : 0.0f;
    s = rounded(p, rounds);
}

// COLUMNS columns of dq.
template <int COLUMNS, class X, class Y>
__device__ void backward_q(const X* dout, const X* qkv, const float* lse, const float* delta, Y* dqkv,
                           const unsigned* tiles, Heads heads, Mask mask, bool rounds, Shared shared) {
    constexpr int N = COLUMNS / TILE;
    const Tile tile(tiles, blockIdx.x / heads.n_q);
    const int head = blockIdx.x % heads.n_q, kv = head / heads.group(), from = blockIdx.y * COLUMNS;
    const i64 width = heads.width(), first = tile.start + tile.first;
    const Rows<X> q{qkv + first * width + head * heads.dim, width, tile.rows()};
    const Rows<X> g{dout + first * heads.out_width() + head * heads.dim, heads.out_width(), tile.rows()};
    Row rows[4];
    for (int i = 0; i < 4; i++) {
        int row = thread_row() + i;
        i64 at = (first + row) * heads.n_q + head;
        rows[i] = row < tile.rows() ? Row{lse[at], delta[at]} : Row{0.0f, 0.0f};
    }
    float dq[N][4][4];
    clear(dq);
    const int end = tile.first + tile.rows();
    for (int key = mask.first_key(tile.first) / TILE * TILE; key < end; key += TILE) {
        const X* at = qkv + (tile.start + key) * width;
        const Rows<X> k{at + heads.key_column(kv), width, end - key}, v{at + heads.value_column(kv), width, end - key};
        float s[4][4], ds[4][4];
        dots(s, q, k, heads.dim, rounds, shared);
        dots(ds, g, v, heads.dim, rounds, shared);
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int query = tile.first + thread_row() + i;
                bool sees = query < end && mask.sees(query, key + thread_col() + j);
                slopes(s[i][j], ds[i][j], sees, rows[i], mask, rounds);
            }
        add_weighted(dq, ds, k, from, heads.dim, rounds, shared);
    }
    const float factor[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    write(dq, factor, dqkv + first * width + head * heads.dim, width, tile.rows(), from, heads.dim);
}

// COLUMNS columns of dk and dv: rows of scores are keys, columns queries.
template <int COLUMNS, class X, class Y>
__device__ void backward_kv(const X* dout, const X* qkv, const float* lse, const float* delta, Y* dqkv,
                            const unsigned* tiles, Heads heads, Mask mask, bool rounds, Shared shared) {
    constexpr int N = COLUMNS / TILE;
    const Tile tile(tiles, blockIdx.x / heads.n_kv);
    const int kv = blockIdx.x % heads.n_kv, from = blockIdx.y * COLUMNS;
    const i64 width = heads.width(), first = tile.start + tile.first;
    const X* at = qkv + first * width;
    const Rows<X> k{at + heads.key_column(kv), width, tile.rows()}, v{at + heads.value_column(kv), width, tile.rows()};
    float dk[N][4][4], dv[N][4][4];
    clear(dk);
    clear(dv);
    const int end = mask.end_query(tile.first + tile.rows() - 1, tile.len);
    for (int head = kv * heads.group(); head < (kv + 1) * heads.group(); head++)
        for (int query = tile.first; query < end; query += TILE) {
            const i64 token = tile.start + query;
            const Rows<X> q{qkv + token * width + head * heads.dim, width, end - query};
            const Rows<X> g{dout + token * heads.out_width() + head * heads.dim, heads.out_width(), end - query};
            float s[4][4], ds[4][4];
            dots(s, k, q, heads.dim, rounds, shared);
            dots(ds, v, g, heads.dim, rounds, shared);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int col = query + thread_col() + j;
                i64 place = (tile.start + col) * heads.n_q + head;
                Row row = col < end ? Row{lse[place], delta[place]} : Row{0.0f, 0.0f};
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    bool sees = col < end && mask.sees(col, tile.first + thread_row() + i);
                    slopes(s[i][j], ds[i][j], sees, row, mask, rounds);
                }
            }
            add_weighted(dv, s, g, from, heads.dim, rounds, shared);
            add_weighted(dk, ds, q, from, heads.dim, rounds, shared);
        }
    const float factor[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    Y* to = dqkv + first * width;
    write(dk, factor, to + heads.key_column(kv), width, tile.rows(), from, heads.dim);
    write(dv, factor, to + heads.value_column(kv), width, tile.rows(), from, heads.dim);
}

}  // namespace

#define SHARED                                              \
    __align__(16) __shared__ float shared_tile[TILE * PITCH];   \
    __align__(16) __shared__ float shared_scores[TILE * PITCH]; \
    Shared shared{shared_tile, shared_scores}
#define PLAN n_q, n_kv, dim
#define FORWARD(COLUMNS, X, x_, Y, y_)                                                                    \
    KERNEL(256, attention_plain##COLUMNS##_##x_##_##y_,                                                   \
           (const X* qkv, Y* out, float* lse, const unsigned* tiles, int n_q, int n_kv, int dim, int window, \
            float scale, float cap, int rounds),                                                          \
           SHARED; forward<COLUMNS>(qkv, out, lse, tiles, Heads{PLAN}, Mask{window, scale, cap}, rounds != 0, shared))
#define BACKWARD(WHICH, COLUMNS, run, X, x_, Y, y_)                                                       \
    KERNEL(256, attention_##WHICH##_plain##COLUMNS##_##x_##_##y_,                                         \
           (const X* dout, const X* qkv, const float* lse, const float* sums, Y* dqkv, const unsigned* tiles, \
            int n_q, int n_kv, int dim, int window, float scale, float cap, int rounds),                  \
           SHARED; run<COLUMNS>(dout, qkv, lse, sums, dqkv, tiles, Heads{PLAN}, Mask{window, scale, cap}, \
                                rounds != 0, shared))
#define FOR_XY(X, x_, Y, y_)                                                                              \
    FORWARD(64, X, x_, Y, y_)                                                                             \
    FORWARD(128, X, x_, Y, y_)                                                                            \
    FORWARD(256, X, x_, Y, y_)                                                                            \
    BACKWARD(dq, 64, backward_q, X, x_, Y, y_)                                                            \
    BACKWARD(dq, 128, backward_q, X, x_, Y, y_)                                                           \
    BACKWARD(dkv, 64, backward_kv, X, x_, Y, y_)                                                          \
    BACKWARD(dkv, 128, backward_kv, X, x_, Y, y_)                                                         \
    KERNEL(256, attention_delta_##x_##_##y_, (const X* dout, const Y* out, float* to, i64 rows, int dim),  \
           delta(dout, out, to, rows, dim))

FOR_XY(float, f32, float, f32)
FOR_XY(float, f32, bf16, bf16)
FOR_XY(bf16, bf16, float, f32)
FOR_XY(bf16, bf16, bf16, bf16)
