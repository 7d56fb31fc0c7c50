//! Tiles of a product: sums in registers.
#![allow(unsafe_code, reason = "vector instructions are unsafe to call without a proof")]

use std::arch::x86_64::*;
use std::ops::Range;

use half::bf16;

use super::super::packed::{GROUP, Pairs};
use super::super::pairs::{ask_for, bf16_lanes, first, square};
use super::super::{Factor, Place};
use super::PANEL;
use super::ahead::Ahead;

/// Where sums go and what they are added to.
#[derive(Clone, Copy)]
pub(in super::super) struct Ends {
    pub(in super::super) alpha: f32,
    pub(in super::super) old: Place,
    pub(in super::super) beta: f32,
    pub(in super::super) to: Place,
    /// Whether whole lines are written past the caches: the result is larger than they are.
    pub(in super::super) streams: bool,
}

/// Groups of 16 columns of the right factor, the pairs of a group one after the other.
#[derive(Clone, Copy)]
pub(in super::super) struct Groups<'a> {
    pub(in super::super) pairs: &'a [Pairs],
    /// Vectors from a group to the next.
    pub(in super::super) pitch: usize,
    /// Pairs to multiply.
    pub(in super::super) n_pairs: usize,
}

/// Rows of the left factor: pair p of row i is at `i * row + p * pair`, in values.
#[derive(Clone, Copy)]
pub(in super::super) struct Lines<'a> {
    pub(in super::super) values: &'a [bf16],
    pub(in super::super) shape: Shape,
}

/// How [`Lines`] lie.
#[derive(Clone, Copy)]
pub(in super::super) enum Shape {
    /// Values of a row side by side; a row is so many values long.
    Rows(usize),
    /// Groups of 16 rows, so many pairs long.
    Groups(usize),
}

impl Lines<'_> {
    /// Index of the first pair of a row, and the distances between rows and between pairs.
    fn at(&self, row: usize) -> (usize, usize, usize) {
        match self.shape {
            Shape::Rows(len) => (row * len, len, 2),
            Shape::Groups(n_pairs) => {
                let group = row / GROUP * n_pairs * 2 * GROUP;
                (group + row % GROUP * 2, 2, 2 * GROUP)
            }
        }
    }
}

/// One of the sums that meet in a tile.
#[derive(Clone, Copy)]
pub(in super::super) struct Part<'a> {
    pub(in super::super) left: Lines<'a>,
    pub(in super::super) right: Groups<'a>,
}

/// All tiles of a panel, whose groups start at `group`, in a strip of rows; `ahead` is asked for
/// meanwhile.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
pub(super) fn panel_rows(
    parts: &[Part<'_>],
    group: usize,
    strip: &Range<usize>,
    cols: Range<usize>,
    ends: Ends,
    ahead: [Ahead; 2],
) {
    match cols.len().div_ceil(GROUP) {
        1 => tiles::<1>(parts, group, strip, &cols, ends, ahead),
        2 => tiles::<2>(parts, group, strip, &cols, ends, ahead),
        _ => tiles::<PANEL>(parts, group, strip, &cols, ends, ahead),
    }
}

/// All tiles of a panel of `VECS` vectors: as many rows as there are registers for, and then the
/// powers of two that are left.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
fn tiles<const VECS: usize>(
    parts: &[Part<'_>],
    group: usize,
    strip: &Range<usize>,
    cols: &Range<usize>,
    ends: Ends,
    mut ahead: [Ahead; 2],
) {
    let mut row = strip.start;
    let n_tiles = strip.len().div_ceil(if VECS == 1 { 16 } else { 8 });
    let quotas = [ahead[0].quota(n_tiles), ahead[1].quota(n_tiles)];
    while row < strip.end {
        for (ahead, quota) in ahead.iter_mut().zip(quotas) {
            ahead.ask(quota);
        }
        let at = (group, row - strip.start);
        match strip.end - row {
            16.. if VECS == 1 => {
                tile::<16, VECS>(parts, at, row, cols, ends);
                row += 16;
            }
            8.. => {
                tile::<8, VECS>(parts, at, row, cols, ends);
                row += 8;
            }
            4.. => {
                tile::<4, VECS>(parts, at, row, cols, ends);
                row += 4;
            }
            2.. => {
                tile::<2, VECS>(parts, at, row, cols, ends);
                row += 2;
            }
            _ => {
                tile::<1, VECS>(parts, at, row, cols, ends);
                row += 1;
            }
        }
    }
}

/// A tile of the result: `ROWS` rows from `row` on, line `line` of the parts, and `VECS` vectors of
/// columns, groups from `group` on.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
fn tile<const ROWS: usize, const VECS: usize>(
    parts: &[Part<'_>],
    (group, line): (usize, usize),
    row: usize,
    cols: &Range<usize>,
    ends: Ends,
) {
    if ends.beta != 0.0 {
        ask_for_old(row..row + ROWS, cols, ends.old);
    }
    let mut sums = [[_mm512_setzero_ps(); VECS]; ROWS];
    for part in parts {
        let Groups { pairs, pitch, n_pairs } = part.right;
        if n_pairs == 0 {
            continue;
        }
        let (start, row_step, pair_step) = part.left.at(line);
        // What the unchecked reads below rely on.
        let last = start + (ROWS - 1) * row_step + (n_pairs - 1) * pair_step;
        assert!(last + 1 < part.left.values.len());
        assert!((group + VECS - 1) * pitch + n_pairs <= pairs.len());
        let mut left = part.left.values[start..].as_ptr();
        let mut right = pairs[group * pitch..].as_ptr();
        // A copy that only this loop has stays in registers.
        let mut held = sums;
        for _ in 0..n_pairs {
            let mut vectors = [_mm512_setzero_si512(); VECS];
            for (v, vector) in vectors.iter_mut().enumerate() {
                // SAFETY: vector v of this pair, see above; aligned as `Pairs` are.
                *vector = unsafe { _mm512_load_si512(right.add(v * pitch).cast()) };
            }
            for (r, sums) in held.iter_mut().enumerate() {
                // SAFETY: the pair of row r, see above; it may lie at any even address.
                let pair = unsafe { left.add(r * row_step).cast::<i32>().read_unaligned() };
                let pair = _mm512_set1_epi32(pair);
                for (sum, &vector) in sums.iter_mut().zip(&vectors) {
                    *sum = _mm512_dpbf16_ps(*sum, bf16_lanes(vector), bf16_lanes(pair));
                }
            }
            left = left.wrapping_add(pair_step);
            right = right.wrapping_add(1);
        }
        sums = held;
    }
    for (r, sums) in sums.iter().enumerate() {
        for (v, &sum) in sums.iter().enumerate() {
            let start = cols.start + v * GROUP;
            write(row + r, start..cols.end.min(start + GROUP), sum, ends);
        }
    }
}

/// Asks for what sums will be added to, while they are made.
#[inline]
#[target_feature(enable = "avx512f")]
fn ask_for_old(rows: Range<usize>, cols: &Range<usize>, old: Place) {
    for row in rows {
        for col in cols.clone().step_by(GROUP) {
            // An address is named, and nothing read: it may be any.
            match old {
                Place::F32 { start, stride } => {
                    _mm_prefetch::<_MM_HINT_T0>(start.at(row * stride + col).cast());
                }
                Place::Bf16 { start, stride } => {
                    _mm_prefetch::<_MM_HINT_T0>(start.at(row * stride + col).cast());
                }
            }
        }
    }
}

/// At most `ROWS` rows times all of a block's columns, without packing them; sums are added up in
/// the same order as in [`tile`].
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
pub(super) fn few_rows<const ROWS: usize>(
    (rows, all_cols): (&Range<usize>, &Range<usize>),
    run: Range<usize>,
    a: &[Pairs],
    b: Factor<'_>,
    ends: Ends,
) {
    for start in all_cols.clone().step_by(GROUP) {
        let cols = start..all_cols.end.min(start + GROUP);
        let mut sums = [_mm512_setzero_ps(); ROWS];
        for (a, l) in a.chunks(GROUP).zip(run.clone().step_by(2 * GROUP)) {
            let part = l..run.end.min(l + 2 * GROUP);
            ask_for(b, cols.end..all_cols.end.min(cols.end + GROUP), part.clone());
            let square = square(b, cols.clone(), part);
            for (Pairs(left), right) in a.iter().zip(square) {
                for (sum, &left) in sums.iter_mut().zip(left) {
                    let left = bf16_lanes(_mm512_set1_epi32(left as i32));
                    *sum = _mm512_dpbf16_ps(*sum, bf16_lanes(right), left);
                }
            }
        }
        for (row, sum) in rows.clone().zip(sums) {
            write(row, cols.clone(), sum, ends);
        }
    }
}

/// Adds sums to at most 16 columns of a row of the result.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
pub(in super::super) fn write(row: usize, cols: Range<usize>, sum: __m512, ends: Ends) {
    let mask = first(cols.len()) as u16;
    let mut sum = sum;
    if ends.alpha != 1.0 {
        sum = _mm512_mul_ps(sum, _mm512_set1_ps(ends.alpha));
    }
    // SAFETY: `product` has checked that the result and what is added to it hold the block, of which
    // these are columns of a row; no other task touches it.
    unsafe {
        if ends.beta != 0.0 {
            let old = match ends.old {
                Place::F32 { start, stride } => {
                    _mm512_maskz_loadu_ps(mask, start.at(row * stride + cols.start))
                }
                Place::Bf16 { start, stride } => {
                    let at = start.at(row * stride + cols.start);
                    let half = _mm256_maskz_loadu_epi16(mask, at.cast());
                    let wide = _mm512_cvtepu16_epi32(half);
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
                }
            };
            sum = _mm512_fmadd_ps(old, _mm512_set1_ps(ends.beta), sum);
        }
        match ends.to {
            Place::F32 { start, stride } => {
                let at = start.at(row * stride + cols.start);
                if ends.streams && mask == u16::MAX && at.addr().is_multiple_of(size_of::<Pairs>())
                {
                    _mm512_stream_ps(at, sum);
                } else {
                    _mm512_mask_storeu_ps(at, mask, sum);
                }
            }
            Place::Bf16 { start, stride } => {
                let at = start.at(row * stride + cols.start);
                let half: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(sum));
                _mm256_mask_storeu_epi16(at.cast(), mask, half);
            }
        }
    }
}
