// attention.cuh -- what both ways of attention share: who sees whom, what a score is, which block does what.
//
// A row of the packed buffer is H query heads, then G key heads, then G value heads, each `dim` wide. Rows of
// queries or keys are cut into tiles of TILE inside each document, and the host lists the tiles that there are,
// those with most work first: a block has one tile of one head, all heads of a tile side by side.
#pragma once
#include "common.cuh"

namespace attention {

constexpr int TILE = 64;

// A tile of a document: `len` tokens from token `start` on, of which the tile begins with number `first`.
struct Tile {
    i64 start;
    int len, first;
    __device__ Tile(const unsigned* tiles, unsigned index)
        : start(tiles[3 * index]), len((int)tiles[3 * index + 1]), first((int)tiles[3 * index + 2]) {}
    __device__ int rows() const { return min(len - first, TILE); }
};

// Heads of the packed buffer.
struct Heads {
    int n_q, n_kv, dim;
    __device__ int group() const { return n_q / n_kv; }
    __device__ i64 width() const { return (i64)(n_q + 2 * n_kv) * dim; }
    __device__ i64 out_width() const { return (i64)n_q * dim; }
    __device__ int key_column(int kv) const { return (n_q + kv) * dim; }
    __device__ int value_column(int kv) const { return (n_q + n_kv + kv) * dim; }
};

// What a query sees, and what a scalar product scores: scale x, or cap tanh(scale x / cap) where cap is not 0.
struct Mask {
    int window;
    float scale, cap;
    __device__ bool sees(int query, int key) const { return key <= query && query - key < window; }
    __device__ int first_key(int query) const { return max(0, query + 1 - window); }
    // One past the last query of `len` that sees the key.
    __device__ int end_query(int key, int len) const { return window < len - key ? key + window : len; }
    __device__ float score(float product) const {
        return cap == 0.0f ? scale * product : cap * tanhf(scale * product / cap);
    }
    // The score's slope by the product.
    __device__ float slope(float score) const {
        float t = cap == 0.0f ? 0.0f : score / cap;
        return scale * ((1.0f - t) * (1.0f + t));
    }
};

}  // namespace attention
