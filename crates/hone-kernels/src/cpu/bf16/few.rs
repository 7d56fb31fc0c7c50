//! Products of a few rows with a packed weight: what generating is made of.
//!
//! Such a product takes as long as reading the weight takes, so it is read once, in the order in
//! which it lies, for all rows at once. Sums are added up in the order of [`super::dot`], by tiles
//! where that uses tiles: a row has the same bytes alone, among a few and among many.
#![cfg(target_arch = "x86_64")]
#![allow(unsafe_code, reason = "vector instructions are unsafe to call without a proof")]

use std::arch::x86_64::*;
use std::cell::Cell;
use std::ops::Range;

use rayon::prelude::*;

use super::dot::{
    Ahead, Amx, Avx512Bf16, Ends, Groups, Lines, Means, Part, Session, Shape, room, values_of,
    write,
};
use super::packed::{GROUP, Pairs};
use super::pairs::{bf16_lanes, load, rows_to_pairs};
use super::{Factor, Frozen, Place, four, runs};
use crate::cpu::quant::Stack;

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
    /// Most values of a sum that are added up in registers.
    run_max: usize,
}

/// `Y (rows, out) <- alpha X (rows, in) Wt + beta Y`; values of a row of X lie side by side. The caller
/// has checked the sides of all three.
pub(super) fn product(
    (_, amx): (Avx512Bf16, Option<Amx>),
    x: Factor<'_>,
    rows: usize,
    w: Frozen<'_>,
    (alpha, beta): (f32, f32),
    y: Place,
) {
    let (out, inp) = w.sides();
    assert!(x.depth_stride == 1 && rows <= ROWS_MAX, "{rows} rows");
    // Taken, not borrowed, so that nothing depends on what a thread does in between.
    let mut packed = ROWS.take();
    let stride = inp.div_ceil(2 * GROUP);
    // Tiles read all of their rows; what comes of those that nobody asked for is left.
    let len = rows.next_multiple_of(ROWS_MAX) * stride;
    packed.resize(len.max(packed.len()), Pairs([0; GROUP]));
    // SAFETY: the first argument proves that the machine has the instructions.
    unsafe { rows_to_pairs(x, 0..rows, 0..inp, 1.0, &mut packed) };
    let x = Rows { pairs: &packed[..len], stride, n: rows };
    let ends = Ends { alpha, old: y, beta, to: y, streams: false };
    let n_groups = out.div_ceil(GROUP);
    let per_task = TASK_BYTES / (inp.div_ceil(2).max(1) * size_of::<Pairs>());
    let per_task = per_task.max(1).next_multiple_of(TASK_ALIGN);
    let run = |task: usize| {
        let groups = task * per_task..n_groups.min((task + 1) * per_task);
        // SAFETY: as above; Y has (rows, out) values, and no other task has these columns.
        unsafe {
            match Means::begin(amx) {
                Means::Vectors => multiply(x, w, groups, ends),
                Means::Tiles(tiles) => multiply_tiles(tiles, x, w, groups, ends),
            }
        }
    };
    match n_groups.div_ceil(per_task) {
        1 => run(0),
        tasks => (0..tasks).into_par_iter().for_each(run),
    }
    ROWS.set(packed);
}

/// Groups of a weight of 4 bits, unpacked into the start of `to`.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
fn unpack<'a>(stack: &Stack, groups: Range<usize>, to: &'a mut Vec<Pairs>) -> &'a [Pairs] {
    let n_pairs = stack.inp().div_ceil(2);
    let to = room(to, groups.len() * n_pairs);
    for (group, to) in groups.zip(to.chunks_exact_mut(n_pairs)) {
        four::unpack_group(stack, group, 0..stack.inp(), to);
    }
    to
}

/// The columns of some groups of the weight.
///
/// # Safety
///
/// `ends` must have as many rows as X and the columns of these groups, and nobody else may use them.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
unsafe fn multiply(x: Rows<'_>, w: Frozen<'_>, groups: Range<usize>, ends: Ends) {
    let (sides, run_max) = (w.sides(), w.run_max());
    let n_pairs = sides.1.div_ceil(2);
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
                unpack(stack, group..group + n, &mut unpacked)
            }
        };
        let w = Weight { pairs: w, sides, group, run_max };
        for row in (0..x.n).step_by(TILE_ROWS) {
            let rows = (x.n - row).min(TILE_ROWS);
            // Few groups side by side for many rows: sums must have registers, and enough of them
            // to hide the latency of an addition.
            // SAFETY: the caller's.
            n_groups = unsafe {
                match (x.n.min(TILE_ROWS), left) {
                    (1, 4..) => tile::<1, 4>(x, row, w, (ends, rows)),
                    (2, 4..) => tile::<2, 4>(x, row, w, (ends, rows)),
                    (3..=4, 4..) => tile::<4, 4>(x, row, w, (ends, rows)),
                    (5.., 2..) => tile::<8, 2>(x, row, w, (ends, rows)),
                    (1, _) => tile::<1, 1>(x, row, w, (ends, rows)),
                    (2, _) => tile::<2, 1>(x, row, w, (ends, rows)),
                    (3..=4, _) => tile::<4, 1>(x, row, w, (ends, rows)),
                    _ => tile::<8, 1>(x, row, w, (ends, rows)),
                }
            };
        }
        group += n_groups;
    }
    UNPACKED.set(unpacked);
}

/// The same on tiles, two groups at a time.
///
/// # Safety
///
/// As for [`multiply`].
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
unsafe fn multiply_tiles(
    mut tiles: Session,
    x: Rows<'_>,
    w: Frozen<'_>,
    groups: Range<usize>,
    ends: Ends,
) {
    let ((out, inp), run_max) = (w.sides(), w.run_max());
    let n_pairs = inp.div_ceil(2);
    let mut unpacked = UNPACKED.take();
    for group in groups.clone().step_by(2) {
        let n = (groups.end - group).min(2);
        let pairs = match w {
            Frozen::Packed(half) => &half.groups()[group * n_pairs..],
            Frozen::FourBits(stack) => unpack(stack, group..group + n, &mut unpacked),
        };
        let cols = group * GROUP..out.min((group + n) * GROUP);
        for (nth, run) in runs(inp, run_max).enumerate() {
            let values = &values_of(x.pairs)[run.start..];
            let left = Lines { values, shape: Shape::Rows(x.stride * 2 * GROUP) };
            let (pairs, n_run) = (&pairs[run.start / 2..], run.len().div_ceil(2));
            let right = Groups { pairs, pitch: n_pairs, n_pairs: n_run };
            let ends = Ends { beta: if nth == 0 { ends.beta } else { 1.0 }, ..ends };
            let ahead = [Ahead::groups(right, 2, 2), Ahead::NONE];
            let parts = [Part { left, right }];
            tiles.panel_rows(&parts, 0, &(0..x.n), cols.clone(), ends, ahead);
        }
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
    Weight { pairs, sides: (out, inp), group, run_max }: Weight<'_>,
    (ends, n): (Ends, usize),
) -> usize {
    let n_pairs = inp.div_ceil(2);
    let (x, x_stride) = (&x.pairs[row * x.stride..][..ROWS * x.stride], x.stride * GROUP);
    let x: *const u32 = x.as_ptr().cast();
    let w = &pairs[..GROUPS * n_pairs];
    for (nth, run) in runs(inp, run_max).enumerate() {
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
        let beta = if nth == 0 { ends.beta } else { 1.0 };
        for (g, sums) in sums.iter().enumerate() {
            let start = (group + g) * GROUP;
            for (r, &sum) in sums.iter().enumerate().take(n) {
                write(row + r, start..out.min(start + GROUP), sum, Ends { beta, ..ends });
            }
        }
    }
    GROUPS
}
