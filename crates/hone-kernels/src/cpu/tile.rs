//! Products of small matrices that lie in the nearest caches: what attention is made of.
//!
//! `C (m, n) <- A (m, k) B (k, n)`, or added to C. A is read value by value in any layout, so its
//! transpose costs nothing; rows of B and C are contiguous. Nothing is packed and nothing is
//! allocated.

use super::simd::Simd;

/// A factor read value by value: (i, l) lies at `data[i * row_stride + l * col_stride]`.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    pub(super) data: &'a [f32],
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
}

/// A factor of contiguous rows, `stride` apart.
#[derive(Clone, Copy)]
pub(super) struct Right<'a> {
    pub(super) data: &'a [f32],
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

/// The product; see the module.
#[inline(always)]
pub(super) fn product<S: Simd>(s: S, sides: Sides, a: Left<'_>, b: Right<'_>, c: Out<'_>) {
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
            panel::<S, 2>(s, sides, (j, width), a, b, &mut c);
            j += width;
        } else {
            let width = width.min(S::LANES);
            panel::<S, 1>(s, sides, (j, width), a, b, &mut c);
            j += width;
        }
    }
}

/// Columns `at .. at + width` of the product, `VECS` vectors wide (the last may be partly used).
#[inline(always)]
fn panel<S: Simd, const VECS: usize>(
    s: S,
    sides: Sides,
    columns: (usize, usize),
    a: Left<'_>,
    b: Right<'_>,
    c: &mut Out<'_>,
) {
    let mut i = 0;
    // Sixteen sums in registers where there are 32 of them, eight where there are 16.
    while S::LANES == 16 && i + 8 <= sides.m {
        block::<S, 8, VECS>(s, sides.k, i, columns, a, b, c);
        i += 8;
    }
    while i + 4 <= sides.m {
        block::<S, 4, VECS>(s, sides.k, i, columns, a, b, c);
        i += 4;
    }
    while i < sides.m {
        block::<S, 1, VECS>(s, sides.k, i, columns, a, b, c);
        i += 1;
    }
}

/// `ROWS` rows from `i` of a panel, its sums held in registers.
#[inline(always)]
#[allow(unsafe_code, reason = "`product` has checked the bounds once for all")]
fn block<S: Simd, const ROWS: usize, const VECS: usize>(
    s: S,
    k: usize,
    i: usize,
    (at, width): (usize, usize),
    a: Left<'_>,
    b: Right<'_>,
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
                s.load(unsafe { row.get_unchecked(v * S::LANES..(v + 1) * S::LANES) })
            } else {
                s.load_part(&row[v * S::LANES..], 0.0)
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
