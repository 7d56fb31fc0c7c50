//! Matrix products: the `gemm` crate on blocks of the result.
//!
//! The result is cut into blocks by its shape alone and every block is computed by one thread, so
//! the bytes do not depend on the number of threads.

use super::par::{SharedPtr, each_block};

/// Multiply-adds below which a product stays on the calling thread: about 10 microseconds.
const SERIAL_WORK: usize = 1 << 19;

/// Multiply-adds of a block. A block packs the whole depth of one factor again: blocks of a quarter
/// of this lost a third of the speed on weight gradients, where the depth is the number of tokens.
const BLOCK_WORK: usize = 1 << 25;

/// Most blocks of a product.
const BLOCKS_MAX: usize = 64;

/// Block sides are multiples of this, which every register tile of `gemm` divides well.
const BLOCK_ALIGN: usize = 64;

/// A factor: value (i, j) lies at `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy)]
pub(super) struct Factor<'a> {
    pub(super) data: &'a [f32],
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
}

impl Factor<'_> {
    /// Checks that an (m, n) matrix lies inside the data.
    fn check(&self, m: usize, n: usize) {
        if m > 0 && n > 0 {
            let last = (m - 1) * self.row_stride + (n - 1) * self.col_stride;
            assert!(last < self.data.len(), "a factor of {m} x {n} leaves its buffer");
        }
    }
}

/// What a product goes into: C <- alpha A B + beta C, its rows `stride` apart.
pub(super) struct Target<'a> {
    pub(super) values: &'a mut [f32],
    pub(super) stride: usize,
    pub(super) alpha: f32,
    pub(super) beta: f32,
}

impl Target<'_> {
    /// Checks that an (m, n) matrix lies inside the values, and says whether it has any.
    pub(super) fn has(&self, m: usize, n: usize) -> bool {
        let has = m > 0 && n > 0;
        let fits = || (m - 1) * self.stride + n <= self.values.len();
        assert!(!has || fits() && (self.stride >= n || m == 1), "{m} x {n} leaves its buffer");
        has
    }
}

/// Sides of the blocks into which an (m, n) result of depth `k` is cut.
fn block(m: usize, n: usize, k: usize) -> (usize, usize) {
    let work = m * n * k;
    if work <= SERIAL_WORK {
        return (m, n);
    }
    // A power of two shares out evenly among the usual numbers of cores.
    let blocks = (work / BLOCK_WORK).next_power_of_two().clamp(2, BLOCKS_MAX);
    let side = |len: usize, pieces: usize| len.div_ceil(pieces).next_multiple_of(BLOCK_ALIGN);
    if m >= n {
        let rows = side(m, blocks).min(m);
        let left = (blocks / m.div_ceil(rows)).max(1);
        (rows, side(n, left).min(n))
    } else {
        let cols = side(n, blocks).min(n);
        let left = (blocks / n.div_ceil(cols)).max(1);
        (side(m, left).min(m), cols)
    }
}

/// `C (m, n) <- alpha A (m, k) B (k, n) + beta C`.
#[allow(unsafe_code, reason = "blocks of one matrix are written by several threads")]
pub(super) fn product(
    (m, n, k): (usize, usize, usize),
    a: Factor<'_>,
    b: Factor<'_>,
    c: Target<'_>,
) {
    if !c.has(m, n) {
        return;
    }
    a.check(m, k);
    b.check(k, n);
    let Target { values, stride, alpha, beta } = c;
    let out = SharedPtr(values.as_mut_ptr());
    each_block((m, n), block(m, n, k), |rows, cols| {
        let (i, j) = (rows.start, cols.start);
        // SAFETY: the block starts inside A, B and C, whose extents were checked above, and ends
        // with them; blocks of C do not overlap, and A and B are borrowed for reading.
        unsafe {
            gemm::gemm(
                rows.len(),
                cols.len(),
                k,
                out.at(i * stride + j),
                1,
                stride as isize,
                beta != 0.0,
                a.data.as_ptr().wrapping_add(i * a.row_stride),
                a.col_stride as isize,
                a.row_stride as isize,
                b.data.as_ptr().wrapping_add(j * b.col_stride),
                b.col_stride as isize,
                b.row_stride as isize,
                beta,
                alpha,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    });
}
