//! Products of small matrices that lie in the nearest caches: what attention is made of.
//!
//! `C (m, n) <- A (m, k) B (k, n)`, or added to C. A is read value by value in any layout, so its
//! transpose costs nothing; rows of B and C are contiguous. Nothing is packed and nothing is
//! allocated.
//!
//! [`rows`] is the same for factors that were packed into slots of 32 bits, in whichever arithmetic
//! the slots are [`Factors`].

use std::ops::Range;

use super::simd::Simd;
use super::value::Value;

/// A factor read value by value: (i, l) lies at `data[i * row_stride + l * col_stride]`.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    pub(super) data: &'a [f32],
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
}

/// A factor of contiguous rows, `stride` apart.
#[derive(Clone, Copy)]
pub(super) struct Right<'a, X = f32> {
    pub(super) data: &'a [X],
    pub(super) stride: usize,
}

/// The result: contiguous rows, `stride` apart, overwritten or added to.
pub(super) struct Out<'a> {
    pub(super) data: &'a mut [f32],
    pub(super) stride: usize,
    pub(super) add: bool,
}

/// Sides of a product: C is (m, n), the sums have k terms.
#[derive(Clone, Copy)]
pub(super) struct Sides {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
}

/// The product; see the module. Values of bf16 are widened as they are read.
#[inline(always)]
pub(super) fn product<S: Simd, X: Value>(
    s: S,
    sides: Sides,
    a: Left<'_>,
    b: Right<'_, X>,
    c: Out<'_>,
) {
    let Sides { m, n, k } = sides;
    if m == 0 || n == 0 {
        return;
    }
    // What the unchecked reads of `micro` rely on.
    assert!((m - 1) * c.stride + n <= c.data.len());
    if k > 0 {
        assert!((m - 1) * a.row_stride + (k - 1) * a.col_stride < a.data.len());
        assert!((k - 1) * b.stride + n <= b.data.len());
    }
    let mut c = c;
    let mut j = 0;
    while j < n {
        let width = (n - j).min(2 * S::LANES);
        if width == 2 * S::LANES {
            panel::<S, X, 2>(s, sides, (j, width), a, b, &mut c);
            j += width;
        } else {
            let width = width.min(S::LANES);
            panel::<S, X, 1>(s, sides, (j, width), a, b, &mut c);
            j += width;
        }
    }
}

/// Columns `at .. at + width` of the product, `VECS` vectors wide (the last may be partly used).
#[inline(always)]
fn panel<S: Simd, X: Value, const VECS: usize>(
    s: S,
    sides: Sides,
    columns: (usize, usize),
    a: Left<'_>,
    b: Right<'_, X>,
    c: &mut Out<'_>,
) {
    let mut i = 0;
    // Sixteen sums in registers where there are 32 of them, eight where there are 16.
    while S::LANES == 16 && i + 8 <= sides.m {
        block::<S, X, 8, VECS>(s, sides.k, i, columns, a, b, c);
        i += 8;
    }
    while i + 4 <= sides.m {
        block::<S, X, 4, VECS>(s, sides.k, i, columns, a, b, c);
        i += 4;
    }
    while i < sides.m {
        block::<S, X, 1, VECS>(s, sides.k, i, columns, a, b, c);
        i += 1;
    }
}

/// `ROWS` rows from `i` of a panel, its sums held in registers.
#[inline(always)]
#[allow(unsafe_code, reason = "`product` has checked the bounds once for all")]
fn block<S: Simd, X: Value, const ROWS: usize, const VECS: usize>(
    s: S,
    k: usize,
    i: usize,
    (at, width): (usize, usize),
    a: Left<'_>,
    b: Right<'_, X>,
    c: &mut Out<'_>,
) {
    let whole = width == VECS * S::LANES;
    let mut sums = [[s.splat(0.0); VECS]; ROWS];
    for l in 0..k {
        // SAFETY: row l < k of B ends at l * stride + n >= l * stride + at + width, which `product`
        // has checked.
        let row = unsafe { b.data.get_unchecked(l * b.stride + at..l * b.stride + at + width) };
        let mut right = [s.splat(0.0); VECS];
        for (v, right) in right.iter_mut().enumerate() {
            *right = if whole {
                // SAFETY: the row is `VECS * LANES` long here.
                X::load(s, unsafe { row.get_unchecked(v * S::LANES..(v + 1) * S::LANES) })
            } else {
                X::load(s, &row[v * S::LANES..])
            };
        }
        for (r, sums) in sums.iter_mut().enumerate() {
            let from = (i + r) * a.row_stride + l * a.col_stride;
            // SAFETY: i + r < m and l < k, for which `product` has checked the index.
            let left = s.splat(unsafe { *a.data.get_unchecked(from) });
            for (sum, &right) in sums.iter_mut().zip(&right) {
                *sum = s.fma(left, right, *sum);
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        let from = (i + r) * c.stride + at;
        let row = &mut c.data[from..from + width];
        for (v, &sum) in sums.iter().enumerate() {
            let lanes = &mut row[v * S::LANES..];
            let lanes_len = lanes.len().min(S::LANES);
            let lanes = &mut lanes[..lanes_len];
            let sum = if c.add { s.add(sum, s.load_part(lanes, 0.0)) } else { sum };
            s.store_part(lanes, sum);
        }
    }
}

/// How the factors of products are held: in slots of 32 bits, each of one f32 or of a pair of bf16
/// that follow each other along the sums. Slots are carried as f32, and only [`Factors::dot`]
/// computes with them.
pub(super) trait Factors: Copy + Send + Sync {
    /// The vectors.
    type S: Simd;
    /// Values in a slot.
    const PER_SLOT: usize;

    /// The vectors' operations.
    fn simd(self) -> Self::S;
    /// `c` plus, in each lane, the products of what the slots of `a` and `b` hold.
    fn dot(self, a: Lanes<Self>, b: Lanes<Self>, c: Lanes<Self>) -> Lanes<Self>;
    /// Slots of values that follow each other along the sums: those of `values(0)`, then those of
    /// `values(1)` where a slot has room for two.
    fn along(self, values: impl Fn(usize) -> Lanes<Self>) -> Lanes<Self>;
    /// Slots of one lane each: lane i holds lane i of `values(0)` and, where a slot has room for
    /// two, of `values(1)`.
    fn across(self, values: impl Fn(usize) -> Lanes<Self>) -> Lanes<Self>;
}

/// A vector of those that hold the factors.
pub(super) type Lanes<F> = <<F as Factors>::S as Simd>::V;

/// A type in which a matrix is stored, at its outside.
pub(super) trait Stored<F: Factors>: Copy + Send + Sync {
    /// At most a vector of values, zeros behind them.
    fn load(f: F, from: &[Self]) -> Lanes<F>;
    /// As many values as there is room for.
    fn store(f: F, to: &mut [Self], v: Lanes<F>);
}

/// Factors as they are: one f32 a slot.
#[derive(Clone, Copy)]
pub(super) struct Whole<S>(pub(super) S);

impl<S: Simd> Factors for Whole<S> {
    type S = S;
    const PER_SLOT: usize = 1;

    #[inline(always)]
    fn simd(self) -> S {
        self.0
    }
    #[inline(always)]
    fn dot(self, a: S::V, b: S::V, c: S::V) -> S::V {
        self.0.fma(a, b, c)
    }
    #[inline(always)]
    fn along(self, values: impl Fn(usize) -> S::V) -> S::V {
        values(0)
    }
    #[inline(always)]
    fn across(self, values: impl Fn(usize) -> S::V) -> S::V {
        values(0)
    }
}

/// Factors rounded to bf16 but held as f32: for machines without an instruction for pairs.
#[derive(Clone, Copy)]
pub(super) struct Rounded<S>(pub(super) S);

impl<S: Simd> Rounded<S> {
    /// To nearest (Veltkamp 1968): the 16 low bits of the significand are lost in a sum so much
    /// larger. What is infinite, or above 2^111, becomes no number.
    #[inline(always)]
    fn round(self, x: S::V) -> S::V {
        let s = self.0;
        let large = s.mul(x, s.splat(65_537.0));
        s.sub(large, s.sub(large, x))
    }
}

impl<S: Simd> Factors for Rounded<S> {
    type S = S;
    const PER_SLOT: usize = 1;

    #[inline(always)]
    fn simd(self) -> S {
        self.0
    }
    #[inline(always)]
    fn dot(self, a: S::V, b: S::V, c: S::V) -> S::V {
        self.0.fma(a, b, c)
    }
    #[inline(always)]
    fn along(self, values: impl Fn(usize) -> S::V) -> S::V {
        self.round(values(0))
    }
    #[inline(always)]
    fn across(self, values: impl Fn(usize) -> S::V) -> S::V {
        self.round(values(0))
    }
}

impl<F: Factors> Stored<F> for f32 {
    #[inline(always)]
    fn load(f: F, from: &[f32]) -> Lanes<F> {
        f.simd().load_part(from, 0.0)
    }
    #[inline(always)]
    fn store(f: F, to: &mut [f32], v: Lanes<F>) {
        f.simd().store_part(to, v);
    }
}

/// Rows of A that are multiplied at once.
pub(super) const ROWS: usize = 8;

/// [`ROWS`] rows of `C <- A B` or, where `c.add`, of `C <- C + A B`: `n` columns, a multiple of the
/// lanes; the sums run over the slots `depth`. Strides count slots.
#[inline(always)]
pub(super) fn rows<F: Factors>(
    f: F,
    depth: Range<usize>,
    n: usize,
    a: Left<'_>,
    b: Right<'_>,
    c: Out<'_>,
) {
    if n == 0 || (depth.is_empty() && c.add) {
        return;
    }
    let lanes = F::S::LANES;
    // What the unchecked accesses of `sums_of` rely on.
    assert!(n.is_multiple_of(lanes) && (ROWS - 1) * c.stride + n <= c.data.len());
    if let Some(last) = depth.clone().last() {
        assert!((ROWS - 1) * a.row_stride + last * a.col_stride < a.data.len());
        assert!(last * b.stride + n <= b.data.len());
    }
    let mut c = c;
    // Sixteen sums in registers where there are 32 of them, eight where there are 16.
    let mut at = 0;
    while at + 2 * lanes <= n {
        if lanes == 16 {
            sums_of::<F, ROWS, 2>(f, depth.clone(), 0, at, a, b, &mut c);
        } else {
            sums_of::<F, 4, 2>(f, depth.clone(), 0, at, a, b, &mut c);
            sums_of::<F, 4, 2>(f, depth.clone(), 4, at, a, b, &mut c);
        }
        at += 2 * lanes;
    }
    if at < n {
        sums_of::<F, ROWS, 1>(f, depth, 0, at, a, b, &mut c);
    }
}

/// `M` rows from `i` on and `VECS` vectors of columns from `at` on.
#[inline(always)]
#[allow(unsafe_code, reason = "`rows` has checked the bounds once for all")]
fn sums_of<F: Factors, const M: usize, const VECS: usize>(
    f: F,
    depth: Range<usize>,
    i: usize,
    at: usize,
    a: Left<'_>,
    b: Right<'_>,
    c: &mut Out<'_>,
) {
    let (s, lanes) = (f.simd(), F::S::LANES);
    let mut sums = [[s.splat(0.0); VECS]; M];
    for l in depth {
        let mut right = [s.splat(0.0); VECS];
        for (v, right) in right.iter_mut().enumerate() {
            let from = l * b.stride + at + v * lanes;
            // SAFETY: at + VECS * lanes <= n and l is at most the last slot, for which `rows` has
            // checked the length.
            *right = s.load(unsafe { b.data.get_unchecked(from..from + lanes) });
        }
        for (r, sums) in sums.iter_mut().enumerate() {
            let from = (i + r) * a.row_stride + l * a.col_stride;
            // SAFETY: i + r < ROWS and l is at most the last slot, as above.
            let left = s.splat(unsafe { *a.data.get_unchecked(from) });
            for (sum, &right) in sums.iter_mut().zip(&right) {
                *sum = f.dot(left, right, *sum);
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        for (v, &sum) in sums.iter().enumerate() {
            let from = (i + r) * c.stride + at + v * lanes;
            // SAFETY: i + r < ROWS and at + VECS * lanes <= n, for which `rows` has checked it.
            let to = unsafe { c.data.get_unchecked_mut(from..from + lanes) };
            let sum = if c.add { s.add(sum, s.load(to)) } else { sum };
            s.store(to, sum);
        }
    }
}
