// columns.cuh -- sums down the columns of a matrix, by blocks of 1,024 threads.
#pragma once
#include "common.cuh"

// Warp w of a block sums rows w, w + 32 and so on of the block's 32 columns, a lane a column; then the first
// warp adds the warps' sums in order. In f64, so that many rows are no matter.
__device__ __forceinline__ i64 own_column() { return (i64)blockIdx.x * 32 + (threadIdx.x & 31); }

// The sum of term(row) over rows; whole in the first warp alone. `there` says that the column is one.
template <class Term> __device__ __forceinline__ double column_sum(i64 rows, bool there, Term term) {
    __shared__ double sums[32][32];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    double sum = 0.0;
#pragma unroll 4
    for (i64 row = warp; row < (there ? rows : 0); row += 32) sum += term(row);
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0) return 0.0;
    sum = sums[0][lane];
    for (int i = 1; i < 32; i++) sum += sums[i][lane];
    return sum;
}
