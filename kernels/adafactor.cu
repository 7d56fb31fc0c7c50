// adafactor.cu -- Adafactor: the second moment of a matrix (rows, cols) as one vector for its rows and one for its
// columns; of anything else, which is a matrix of one row here, value by value.
// Math: the step u is f32; means and sums of squares are f64. The host is not asked in between: the rates of the
// last kernel are made by the one before.
// Launch: blocks of 256 threads. Rows: a block a row. Columns: a thread a column of a piece of the rows, and a thread
// a column for the pieces. The step: blocks of 1,024 columns, (x, y) over columns and rows; it is made twice, for its
// root mean square and to be applied. Bytes a value: 28 (36 with a first moment), 24 of them read.
// Deterministic: sums are of pieces that the shape cuts, in order.
// Reference: hone_kernels::Reference. Tolerance 1e-6.
#include "units.cuh"

namespace {

// Columns that a thread of the step has, 256 apart.
constexpr int COLUMNS = 4;

struct Decay {
    double scale, eps, beta2;

    // x decays towards the mean of g^2 + eps over `n` values, whose squares without their scale are `sum`.
    __device__ __forceinline__ void apply(float* x, double sum, double n) const {
        double mean = sum * scale * scale / n + eps;
        *x = (float)((double)*x * beta2 + (1.0 - beta2) * mean);
    }
};

__device__ void row_means(const float* g, i64 cols, float* row, Decay decay) {
    __shared__ double scratch[32];
    g += blockIdx.x * cols;
    bool wide = is_wide<4>(g);
    i64 units = cols / 4;
    double sum = 0.0;
    for (i64 unit = threadIdx.x; unit < units; unit += blockDim.x) {
        float a[4];
        load(g + unit * 4, wide, a);
        for (float a : a) sum += (double)a * a;
    }
    i64 rest = units * 4 + threadIdx.x;
    if (rest < cols) sum += (double)g[rest] * g[rest];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) decay.apply(row + blockIdx.x, sum, (double)cols);
}

// Sums of squares of `height` rows by column.
__device__ void column_parts(const float* g, i64 rows, i64 cols, i64 height, double* parts) {
    i64 col = thread_index();
    if (col >= cols) return;
    i64 start = blockIdx.y * height, end = min(rows, start + height);
    double sum = 0.0;
#pragma unroll 4
    for (i64 row = start; row < end; row++) {
        float x = g[row * cols + col];
        sum += (double)x * x;
    }
    parts[blockIdx.y * cols + col] = sum;
}

__device__ void column_means(const double* parts, i64 n_parts, i64 rows, i64 cols, float* col_means, Decay decay) {
    i64 col = thread_index();
    if (col >= cols) return;
    double sum = 0.0;
    for (i64 part = 0; part < n_parts; part++) sum += parts[part * cols + col];
    decay.apply(col_means + col, sum, (double)rows);
}

__device__ void value_means(const float* g, float* v, i64 n, Decay decay) {
    for (i64 i = thread_index(); i < n; i += n_threads()) decay.apply(v + i, (double)g[i] * g[i], 1.0);
}

// The sum of a list, by one block.
template <class X> __device__ __forceinline__ double listed(const X* x, i64 n, double* scratch) {
    double sum = 0.0;
    for (i64 i = threadIdx.x; i < n; i += blockDim.x) sum += (double)x[i];
    return block_sum(sum, scratch);
}

__device__ void mean(const float* x, i64 n, float* to) {
    __shared__ double scratch[32];
    double sum = listed(x, n, scratch);
    if (threadIdx.x == 0) *to = (float)(sum / (double)n);
}

// The step u = g / sqrt(row / mean(row)) / sqrt(second); without rows, g / sqrt(second).
struct Step {
    const float* g;
    i64 rows, cols;
    const float *row, *mean, *second;
    float grad_scale;

    // Calls take(index, u) for this thread's values, row after row.
    template <class Take> __device__ __forceinline__ void each(Take take) const {
        i64 first = blockIdx.x * (i64)(COLUMNS * blockDim.x) + threadIdx.x;
        float inverse[COLUMNS];
        for (int k = 0; k < COLUMNS; k++) {
            i64 col = first + k * blockDim.x;
            inverse[k] = col < cols ? 1.0f / sqrtf(second[col]) : 0.0f;
        }
        for (i64 r = blockIdx.y; r < rows; r += gridDim.y) {
            float factor = row ? grad_scale / sqrtf(row[r] / *mean) : grad_scale;
            for (int k = 0; k < COLUMNS; k++) {
                i64 col = first + k * blockDim.x, i = r * cols + col;
                if (col < cols) take(i, __fmul_rn(__fmul_rn(g[i], factor), inverse[k]));
            }
        }
    }
};

__device__ void step_squares(Step step, double* parts) {
    __shared__ double scratch[32];
    double sum = 0.0;
    step.each([&](i64, float u) { sum += (double)u * u; });
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) parts[blockIdx.y * (i64)gridDim.x + blockIdx.x] = sum;
}

// What is kept of a weight, and the factor of the step. Without sums of squares of the weight its root mean square
// scales nothing.
struct Rates {
    float keep, size;
};

__device__ void rates(const double* of_p, i64 n_of_p, const double* of_step, i64 n_of_step, double n, double lr,
                      double scale_min, double clip, double weight_decay, Rates* to) {
    __shared__ double scratch[32];
    double p = listed(of_p, n_of_p, scratch), step = listed(of_step, n_of_step, scratch);
    if (threadIdx.x != 0) return;
    if (n_of_p > 0) lr *= fmax(sqrt(p / n), scale_min);
    double shrink = fmax(sqrt(step / n) / clip, 1.0);
    *to = {(float)(1.0 - weight_decay * lr), (float)(lr / shrink)};
}

__device__ void apply(float* p, Step step, float* m, float beta1, float fresh, const Rates* of) {
    Rates r = *of;
    step.each([&](i64 i, float u) {
        u = __fmul_rn(r.size, u);
        if (m) m[i] = u = __fadd_rn(__fmul_rn(m[i], beta1), __fmul_rn(fresh, u));
        p[i] = __fsub_rn(__fmul_rn(p[i], r.keep), u);
    });
}

}  // namespace

#define STEP_ARGUMENTS \
    const float *g, i64 rows, i64 cols, const float *row, const float *row_mean, const float *second, float grad_scale
#define STEP Step{g, rows, cols, row, row_mean, second, grad_scale}

KERNEL(256, adafactor_rows_f32, (const float* g, i64 cols, float* row, double scale, double eps, double beta2),
       row_means(g, cols, row, {scale, eps, beta2}))
KERNEL(256, adafactor_columns_f32, (const float* g, i64 rows, i64 cols, i64 height, double* parts),
       column_parts(g, rows, cols, height, parts))
KERNEL(256, adafactor_column_means_f32,
       (const double* parts, i64 n_parts, i64 rows, i64 cols, float* col, double scale, double eps, double beta2),
       column_means(parts, n_parts, rows, cols, col, {scale, eps, beta2}))
KERNEL(256, adafactor_values_f32, (const float* g, float* v, i64 n, double scale, double eps, double beta2),
       value_means(g, v, n, {scale, eps, beta2}))
KERNEL(256, adafactor_mean_f32, (const float* x, i64 n, float* to), mean(x, n, to))
KERNEL(256, adafactor_squares_f32, (STEP_ARGUMENTS, double* parts), step_squares(STEP, parts))
KERNEL(256, adafactor_rates_f32,
       (const double* of_p, i64 n_of_p, const double* of_step, i64 n_of_step, double n, double lr, double scale_min,
        double clip, double weight_decay, Rates* to),
       rates(of_p, n_of_p, of_step, n_of_step, n, lr, scale_min, clip, weight_decay, to))
KERNEL(256, adafactor_apply_f32,
       (STEP_ARGUMENTS, float* p, float* m, float beta1, float fresh, const Rates* of),
       apply(p, STEP, m, beta1, fresh, of))
