//! Products of a few rows with a packed weight: what generating is made of.
//!
//! Such a product takes as long as reading the weight takes, so it is read once, in the order in
//! which it lies, for all rows at once. Sums are added up in the order of [`super::dot`]: a row has
//! the same bytes alone, among a few and among many.
#![cfg(target_arch = "x86_64")]
#![allow(unsafe_code, reason = "vector instructions are unsafe to call without a proof")]

use std::arch::x86_64::*;
use std::cell::Cell;
use std::ops::Range;

use rayon::prelude::*;

use super::dot::{Avx512Bf16, bf16_lanes, first, line, load, store};
use super::packed::{GROUP, Pairs};
use super::{Factor, Frozen, Out, four, runs};
use crate::cpu::matmul::Target;
use crate::cpu::par::SharedPtr;

/// Most rows for which it pays: from then on a tile of [`super::dot`] does more with each vector
/// that it loads.
pub(super) const ROWS_MAX: usize = 16;

/// Rows of X whose sums are held in registers at once.
const TILE_ROWS: usize = 8;

/// Bytes of the weight that a task reads: 128 KiB take longer to come from memory than another
/// thread to take them over.
const TASK_BYTES: usize = 1 << 17;

/// Groups of a task are multiples of this, which every tile's number of groups divides.
const TASK_ALIGN: usize = 4;

/// Vectors of a group that are asked for ahead of their use.
const AHEAD: usize = 32;

thread_local! {
    /// The rows of X as bf16 pairs, kept from call to call.
    static ROWS: Cell<Vec<Pairs>> = Cell::default();
    /// Groups of a weight of 4 bits that a task multiplies next.
    static UNPACKED: Cell<Vec<Pairs>> = Cell::default();
}

/// Rows of X as pairs along the input.
#[derive(Clone, Copy)]
struct Rows<'a> {
    pairs: &'a [Pairs],
    /// Vectors of a row.
    stride: usize,
    n: usize,
}

/// A part of a weight: its groups from `group` on.
#[derive(Clone, Copy)]
struct Weight<'a> {
    pairs: &'a [Pairs],
    /// Of the whole weight, (out, in).
    sides: (usize, usize),
    group: usize,
}

/// Whether a weight can be multiplied here.
pub(super) fn takes(w: Frozen<'_>) -> bool {
    match w {
        Frozen::Packed(_) => true,
        Frozen::FourBits(stack) => {
            stack.inp().is_multiple_of(four::RUN) && stack.rounds_to_bf16_once()
        }
    }
}

/// Rows and columns of a weight, (out, in).
fn sides(w: Frozen<'_>) -> (usize, usize) {
    match w {
        Frozen::Packed(half) => half.sides(),
        Frozen::FourBits(stack) => (stack.rows(), stack.inp()),
    }
}

/// `Y (rows, out) <- alpha X (rows, in) Wt + beta Y`; values of a row of X lie side by side.
pub(super) fn product(_: Avx512Bf16, x: Factor<'_>, rows: usize, w: Frozen<'_>, y: Target<'_>) {
    let (out, inp) = sides(w);
    if !y.has(rows, out) {
        return;
    }
    assert!(x.depth_stride == 1 && rows <= ROWS_MAX, "{rows} rows");
    x.check(rows, inp);
    // Taken, not borrowed, so that nothing depends on what a thread does in between.
    let mut packed = ROWS.take();
    let stride = inp.div_ceil(2 * GROUP);
    // A tile reads all of its rows; what comes of those that nobody asked for is left.
    let len = rows.next_multiple_of(TILE_ROWS) * stride;
    packed.resize(len.max(packed.len()), Pairs([0; GROUP]));
    // SAFETY: the first argument proves that the machine has the instructions.
    unsafe { pack(x, rows, inp, stride, &mut packed) };
    let x = Rows { pairs: &packed[..len], stride, n: rows };
    let Target { values, stride, alpha, beta } = y;
    let to = Out { start: SharedPtr(values.as_mut_ptr()), stride };
    let n_groups = out.div_ceil(GROUP);
    let per_task = TASK_BYTES / (inp.div_ceil(2).max(1) * size_of::<Pairs>());
    let per_task = per_task.max(1).next_multiple_of(TASK_ALIGN);
    let run = |task: usize| {
        let groups = task * per_task..n_groups.min((task + 1) * per_task);
        // SAFETY: as above; `to` has (rows, out) values, and no other task has these columns.
        unsafe { multiply(x, w, groups, (alpha, beta), to) };
    };
    match n_groups.div_ceil(per_task) {
        1 => run(0),
        tasks => (0..tasks).into_par_iter().for_each(run),
    }
    ROWS.set(packed);
}

/// Rounds the rows of X, as [`super::dot`] does.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
fn pack(x: Factor<'_>, rows: usize, inp: usize, stride: usize, to: &mut [Pairs]) {
    for row in 0..rows {
        let to = to[row * stride..].iter_mut().zip((0..inp).step_by(2 * GROUP));
        for (to, start) in to {
            let n = (inp - start).min(2 * GROUP);
            store(to, line(x.values, row * x.lane_stride + start, n));
        }
    }
}

/// The columns of some groups of the weight.
///
/// # Safety
///
/// `to` must have as many rows as X and the columns of these groups, and nobody else may use them.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
unsafe fn multiply(x: Rows<'_>, w: Frozen<'_>, groups: Range<usize>, factors: (f32, f32), to: Out) {
    let (sides, n_pairs) = (sides(w), sides(w).1.div_ceil(2));
    let mut unpacked = UNPACKED.take();
    let mut group = groups.start;
    while group < groups.end {
        let left = groups.end - group;
        let mut n_groups = 1;
        let w = match w {
            Frozen::Packed(half) => &half.groups()[group * n_pairs..],
            Frozen::FourBits(stack) => {
                // As many as the tiles below take at once.
                let n = if x.n <= 4 { 4 } else { 2 };
                let n = if left >= n { n } else { 1 };
                unpacked.resize((n * n_pairs).max(unpacked.len()), Pairs([0; GROUP]));
                for (i, to) in unpacked[..n * n_pairs].chunks_exact_mut(n_pairs).enumerate() {
                    four::unpack_group(stack, group + i, to);
                }
                &unpacked[..]
            }
        };
        let w = Weight { pairs: w, sides, group };
        for row in (0..x.n).step_by(TILE_ROWS) {
            let rows = (x.n - row).min(TILE_ROWS);
            // Few groups side by side for many rows: sums must have registers, and enough of them
            // to hide the latency of an addition.
            // SAFETY: the caller's.
            n_groups = unsafe {
                match (x.n.min(TILE_ROWS), left) {
                    (1, 4..) => tile::<1, 4>(x, row, w, factors, (to, rows)),
                    (2, 4..) => tile::<2, 4>(x, row, w, factors, (to, rows)),
                    (3..=4, 4..) => tile::<4, 4>(x, row, w, factors, (to, rows)),
                    (5.., 2..) => tile::<8, 2>(x, row, w, factors, (to, rows)),
                    (1, _) => tile::<1, 1>(x, row, w, factors, (to, rows)),
                    (2, _) => tile::<2, 1>(x, row, w, factors, (to, rows)),
                    (3..=4, _) => tile::<4, 1>(x, row, w, factors, (to, rows)),
                    _ => tile::<8, 1>(x, row, w, factors, (to, rows)),
                }
            };
        }
        group += n_groups;
    }
    UNPACKED.set(unpacked);
}

/// `ROWS` rows of X from `row` on, times the first `GROUPS` groups of a part of the weight; the first
/// `n` rows of what comes of it are written. Returns `GROUPS`.
///
/// # Safety
///
/// As for [`multiply`].
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
unsafe fn tile<const ROWS: usize, const GROUPS: usize>(
    x: Rows<'_>,
    row: usize,
    Weight { pairs, sides: (out, inp), group }: Weight<'_>,
    (alpha, beta): (f32, f32),
    (to, n): (Out, usize),
) -> usize {
    let n_pairs = inp.div_ceil(2);
    let (x, x_stride) = (&x.pairs[row * x.stride..][..ROWS * x.stride], x.stride * GROUP);
    let x: *const u32 = x.as_ptr().cast();
    let w = &pairs[..GROUPS * n_pairs];
    for (nth, run) in runs(inp).enumerate() {
        let mut sums = [[_mm512_setzero_ps(); ROWS]; GROUPS];
        for p in run.start / 2..run.end.div_ceil(2) {
            for (g, sums) in sums.iter_mut().enumerate() {
                // SAFETY: a run ends at most with the row, and each of these groups has its pairs.
                let right = unsafe { w.get_unchecked(g * n_pairs + p) };
                _mm_prefetch::<_MM_HINT_T0>((right as *const Pairs).wrapping_add(AHEAD).cast());
                let right = bf16_lanes(load(right));
                for (r, sum) in sums.iter_mut().enumerate() {
                    // SAFETY: each of these rows has so many pairs.
                    let left = unsafe { *x.add(r * x_stride + p) };
                    let left = bf16_lanes(_mm512_set1_epi32(left as i32));
                    *sum = _mm512_dpbf16_ps(*sum, right, left);
                }
            }
        }
        let beta = if nth == 0 { beta } else { 1.0 };
        for (g, sums) in sums.iter().enumerate() {
            let column = (group + g) * GROUP;
            let mask = first((out - column).min(GROUP)) as u16;
            for (r, &sum) in sums.iter().enumerate().take(n) {
                let at = to.start.at((row + r) * to.stride + column);
                let sum = _mm512_mul_ps(sum, _mm512_set1_ps(alpha));
                // SAFETY: the caller's; the mask ends with the row.
                unsafe {
                    let sum = if beta == 0.0 {
                        sum
                    } else {
                        let old = _mm512_maskz_loadu_ps(mask, at);
                        _mm512_fmadd_ps(old, _mm512_set1_ps(beta), sum)
                    };
                    _mm512_mask_storeu_ps(at, mask, sum);
                }
            }
        }
    }
    GROUPS
}
