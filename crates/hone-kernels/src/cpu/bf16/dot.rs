//! Blocks of a product on the dot product of bf16 pairs, VDPBF16PS.
//!
//! The right factor of a block is a panel of groups of 16 columns, packed pair by pair ([`Pairs`]):
//! a frozen weight lies so in memory, anything else is packed here, as a whole where it is small and
//! otherwise a run of the sums at a time. The
//! left factor is read pair by pair: values of bf16 that lie side by side along the sums are read
//! where they are, others are rounded or turned first, a strip of rows at a time. A tile of the
//! result is held in registers, and the low-rank parts that are added to it are further pairs of
//! the same sums. On a machine with AMX its tiles take the place of registers and of that
//! instruction; see [`amx`].
#![cfg(target_arch = "x86_64")]
#![allow(unsafe_code, reason = "vector instructions are unsafe to call without a proof")]

mod ahead;
mod amx;
mod tile;

use std::arch::x86_64::_mm_sfence;
use std::cell::Cell;
use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::super::par::SharedPtr;
use super::packed::{GROUP, Pairs};
use super::pairs::{pack, pack_turned, rows_to_pairs};
use super::{Factor, Frozen, Job, Place, RUN_PACKED_MAX, Right, TAILS_MAX, Tail, Values};
use super::{four, runs};

pub(super) use ahead::Ahead;
pub(crate) use amx::Amx;
pub(super) use amx::Session;
pub(super) use tile::{Ends, Groups, Lines, Part, Shape, write};
use tile::{few_rows, panel_rows};

/// Most rows that are multiplied by pairs as they leave the registers in which they were turned: for
/// more, packing B pays.
const FEW: usize = 4;

/// Vectors of a panel.
const PANEL: usize = 3;

/// Bytes of the left factor in a strip of rows: a part of a core's second cache.
const STRIP_BYTES: usize = 192 << 10;

/// Sums that meet in a tile: the product's own and those of its tails.
const PARTS_MAX: usize = 1 + TAILS_MAX;

/// What a thread packs; kept from call to call.
#[derive(Default)]
struct Scratch {
    /// The right factor of a block.
    right: Vec<Pairs>,
    /// Rows of the left one.
    left: Vec<Pairs>,
    /// Both factors of each tail.
    tail_right: [Vec<Pairs>; TAILS_MAX],
    tail_left: [Vec<Pairs>; TAILS_MAX],
    /// Sums of a block between runs, where the result holds bf16.
    sums: Vec<f32>,
}

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

/// Makes room for `n` packed vectors.
pub(super) fn room(packed: &mut Vec<Pairs>, n: usize) -> &mut [Pairs] {
    if packed.len() < n {
        packed.resize(n, Pairs([0; GROUP]));
    }
    &mut packed[..n]
}

/// Proof that the machine has AVX-512 F, VL, BW, DQ and BF16.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512Bf16(());

impl Avx512Bf16 {
    /// The proof, where it is true.
    pub(super) fn detect() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512bf16");
        has.then_some(Avx512Bf16(()))
    }
}

/// What multiplies a block: vectors, or the tiles of the thread while it lasts.
pub(super) enum Means {
    Vectors,
    Tiles(Session),
}

impl Means {
    /// Takes tiles, where there are some.
    pub(super) fn begin(amx: Option<Amx>) -> Self {
        amx.map_or(Means::Vectors, |amx| Means::Tiles(amx.begin()))
    }

    /// Groups of a panel.
    fn panel(&self) -> usize {
        match self {
            Means::Vectors => PANEL,
            Means::Tiles(_) => amx::SIDE / GROUP,
        }
    }

    /// Rows of which the strips of a block are multiples.
    fn rows_align(&self) -> usize {
        match self {
            Means::Vectors => GROUP,
            Means::Tiles(_) => amx::SIDE,
        }
    }

    /// See [`lines`] and [`amx::lines`].
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
    fn lines<'a>(
        &self,
        a: Factor<'a>,
        rows: Range<usize>,
        run: Range<usize>,
        scale: f32,
        to: &'a mut Vec<Pairs>,
    ) -> Lines<'a> {
        match self {
            Means::Vectors => lines(a, rows, run, scale, to),
            Means::Tiles(_) => amx::lines(a, rows, run, scale, to),
        }
    }
}

/// One block of the result, all of its sums; see [`super::product`].
pub(super) fn block(
    _: Avx512Bf16,
    amx: Option<Amx>,
    job: &Job<'_>,
    rows: Range<usize>,
    cols: Range<usize>,
) {
    // Taken, not borrowed, so that nothing depends on what a thread does in between.
    let mut scratch = SCRATCH.take();
    let mut means = Means::begin(amx);
    // SAFETY: the first argument proves that the machine has the instructions.
    unsafe { whole_block(job, &mut means, rows, cols, &mut scratch) };
    SCRATCH.set(scratch);
}

/// See [`block`].
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
fn whole_block(
    job: &Job<'_>,
    means: &mut Means,
    rows: Range<usize>,
    cols: Range<usize>,
    scratch: &mut Scratch,
) {
    let runs: Vec<_> = runs(job.k, job.right.run_max()).collect();
    let Scratch { sums, .. } = scratch;
    // Sums of several runs meet in f32.
    let between = match job.out {
        Place::Bf16 { .. } if runs.len() > 1 => {
            if sums.len() < rows.len() * cols.len() {
                sums.resize(rows.len() * cols.len(), 0.0);
            }
            let stride = cols.len();
            let start = sums.as_mut_ptr().wrapping_sub(rows.start * stride + cols.start);
            Place::F32 { start: SharedPtr(start), stride }
        }
        out => out,
    };
    for (nth, run) in runs.iter().enumerate() {
        let (is_first, is_last) = (nth == 0, nth + 1 == runs.len());
        let ends = Ends {
            alpha: job.alpha,
            old: if is_first { job.old } else { between },
            beta: if is_first { job.beta } else { 1.0 },
            to: if is_last { job.out } else { between },
            streams: job.streams && runs.len() == 1,
        };
        let tails = if is_last { job.tails } else { &[] };
        let few = rows.len() <= FEW && tails.is_empty() && matches!(means, Means::Vectors);
        match job.right {
            Right::Factor(b) if few && b.depth_stride == 1 => {
                let left = room(&mut scratch.left, run.len().div_ceil(2));
                pack(job.a, rows.clone(), 0..0, run.clone(), left);
                match rows.len() {
                    1 => few_rows::<1>((&rows, &cols), run.clone(), left, b, ends),
                    _ => few_rows::<FEW>((&rows, &cols), run.clone(), left, b, ends),
                }
            }
            _ => add_run(job, means, (&rows, &cols), run.clone(), tails, ends, scratch),
        }
    }
    if job.streams {
        // Before another thread is told that the block is done.
        _mm_sfence();
    }
}

/// The values of packed vectors.
pub(super) fn values_of(pairs: &[Pairs]) -> &[bf16] {
    // SAFETY: a vector of pairs is 32 values of 16 bits, aligned to more than those are.
    unsafe { std::slice::from_raw_parts(pairs.as_ptr().cast(), pairs.len() * 2 * GROUP) }
}

/// Lines of the left factor along a run: where they are, if they can be read so, or else rounded
/// into `to`, times `scale`.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
fn lines<'a>(
    a: Factor<'a>,
    rows: Range<usize>,
    run: Range<usize>,
    scale: f32,
    to: &'a mut Vec<Pairs>,
) -> Lines<'a> {
    if run.len().is_multiple_of(2)
        && let Some(lines) = lines_in_place(a, &rows, &run, scale)
    {
        return lines;
    }
    let n_pairs = run.len().div_ceil(2);
    if a.depth_stride == 1 {
        let pitch = n_pairs.div_ceil(GROUP);
        let to = room(to, rows.len() * pitch);
        rows_to_pairs(a, rows, run, scale, to);
        return Lines { values: values_of(to), shape: Shape::Rows(pitch * 2 * GROUP) };
    }
    assert!(scale == 1.0, "a factor that is turned is not scaled");
    let to = room(to, rows.len().div_ceil(GROUP) * n_pairs);
    pack_groups(a, rows, run, to);
    Lines { values: values_of(to), shape: Shape::Groups(n_pairs) }
}

/// Lines of the left factor along a run where they are, if they are bf16 that lie along the sums and are
/// not to be scaled.
fn lines_in_place<'a>(
    a: Factor<'a>,
    rows: &Range<usize>,
    run: &Range<usize>,
    scale: f32,
) -> Option<Lines<'a>> {
    let Values::Bf16(values) = a.values else { return None };
    let start = (rows.start * a.lane_stride + run.start).min(values.len());
    let lines = Lines { values: &values[start..], shape: Shape::Rows(a.lane_stride) };
    (a.depth_stride == 1 && scale == 1.0).then_some(lines)
}

/// Packs lanes of a factor along a run, group after group.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
pub(super) fn pack_groups(x: Factor<'_>, lanes: Range<usize>, run: Range<usize>, to: &mut [Pairs]) {
    let n_pairs = run.len().div_ceil(2);
    for (start, to) in lanes.clone().step_by(GROUP).zip(to.chunks_mut(n_pairs.max(1))) {
        let group = start..lanes.end.min(start + GROUP);
        let next = group.end..lanes.end.min(group.end + GROUP);
        pack(x, group, next, run.clone(), to);
    }
}

/// The right factor of a block along a run.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
fn groups<'a>(
    right: Right<'a>,
    cols: Range<usize>,
    run: Range<usize>,
    to: &'a mut Vec<Pairs>,
) -> Groups<'a> {
    let n_pairs = run.len().div_ceil(2);
    let (pairs, pitch) = match right {
        Right::Rows(Frozen::Packed(weight)) => (weight.groups(), weight.n_pairs()),
        Right::Laid(Laid { pairs, pitch, .. }) => (pairs, pitch),
        _ => {
            let to = room(to, cols.len().div_ceil(GROUP) * n_pairs);
            lay(right, cols, run, to);
            return Groups { pairs: to, pitch: n_pairs, n_pairs };
        }
    };
    let start = cols.start / GROUP * pitch + run.start / 2;
    Groups { pairs: &pairs[start.min(pairs.len())..], pitch, n_pairs }
}

/// A right factor that is packed for all blocks of a product.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Laid<'a> {
    pairs: &'a [Pairs],
    /// Vectors of a group.
    pitch: usize,
    /// Most values of a sum that are added up in registers.
    pub(super) run_max: usize,
}

/// Bytes up to which a right factor is packed for all blocks at once: a part of the cache that cores
/// share.
const LAID_BYTES_MAX: usize = if cfg!(test) { 1 << 18 } else { 16 << 20 };

/// Pairs along the sums of a weight's columns where they are too large for that: they are packed by
/// slices, whose sums meet in the result.
const SLICE_PAIRS: usize = 1024;

thread_local! {
    /// What is packed for all blocks, kept from call to call.
    static LAID: Cell<Vec<Pairs>> = Cell::default();
}

/// Calls `run` with a right factor (depth, columns) and its depth: packed, where it is not yet, for all
/// blocks at once; in slices of the depth, one after the other, where a weight's columns are too large
/// for that and the result can hold sums (`may_slice`). Otherwise blocks pack their part of it in a
/// cache, as often as there are blocks of rows.
pub(super) fn laid(
    proof: Avx512Bf16,
    right: Right<'_>,
    (n, k): (usize, usize),
    may_slice: bool,
    run: impl Fn(Right<'_>, Range<usize>),
) {
    let (n_groups, n_pairs) = (n.div_ceil(GROUP), k.div_ceil(2));
    let pairs_max = LAID_BYTES_MAX / size_of::<Pairs>() / n_groups;
    // The columns of a weight need no rows that come out alike alone and among others.
    let is_dx = matches!(right, Right::Columns(_));
    let pitch = if n_pairs > pairs_max && is_dx && may_slice { SLICE_PAIRS } else { n_pairs };
    if right.is_packed() || k == 0 || pitch > pairs_max {
        return run(right, 0..k);
    }
    let run_max = if is_dx { RUN_PACKED_MAX } else { right.run_max() };
    // Taken, not borrowed, so that nothing depends on what a thread does in between.
    let mut laid = LAID.take();
    for start in (0..k).step_by(2 * pitch) {
        let depth = start..k.min(start + 2 * pitch);
        let pitch = depth.len().div_ceil(2);
        let pairs = room(&mut laid, n_groups * pitch);
        lay_all(proof, right, n, depth.clone(), pairs);
        run(Right::Laid(Laid { pairs, pitch, run_max }), depth);
    }
    LAID.set(laid);
}

/// Packs all columns of a right factor along a run.
fn lay_all(_: Avx512Bf16, right: Right<'_>, n: usize, run: Range<usize>, pairs: &mut [Pairs]) {
    let pitch = run.len().div_ceil(2);
    pairs.par_chunks_mut(PANEL * pitch).enumerate().for_each(|(nth, to)| {
        let start = nth * PANEL * GROUP;
        // SAFETY: the first argument proves that the machine has the instructions.
        unsafe { lay(right, start..n.min(start + PANEL * GROUP), run.clone(), to) };
    });
}

/// Packs columns of a right factor along a run, group after group.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
fn lay(right: Right<'_>, cols: Range<usize>, run: Range<usize>, to: &mut [Pairs]) {
    let n_pairs = run.len().div_ceil(2);
    let each = to.chunks_mut(n_pairs.max(1));
    match right {
        Right::Factor(b) => pack_groups(b, cols, run, to),
        Right::Rows(Frozen::FourBits(stack)) => {
            for (group, to) in (cols.start / GROUP..).zip(each) {
                four::unpack_group(stack, group, run.clone(), to);
            }
        }
        Right::Columns(Frozen::Packed(weight)) => {
            let groups = &weight.groups()[run.start / GROUP * weight.n_pairs()..];
            for (start, to) in cols.step_by(GROUP).zip(each) {
                pack_turned(groups, weight.n_pairs(), start, to);
            }
        }
        Right::Columns(Frozen::FourBits(stack)) => {
            // Dequantised as rows first, from the last column on that is looked up with others.
            let first = cols.start / four::RUN * four::RUN;
            let wide = first..cols.end.next_multiple_of(four::RUN);
            let pitch = wide.len() / 2;
            let mut rows = vec![Pairs([0; GROUP]); run.len().div_ceil(GROUP) * pitch];
            for (i, rows) in rows.chunks_exact_mut(pitch).enumerate() {
                four::unpack_group(stack, run.start / GROUP + i, wide.clone(), rows);
            }
            for (start, to) in cols.step_by(GROUP).zip(each) {
                pack_turned(&rows, pitch, start - first, to);
            }
        }
        Right::Rows(Frozen::Packed(_)) | Right::Laid(_) => unreachable!("read as they lie"),
    }
}

/// Adds one run of the sums to a block of the result.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
fn add_run(
    job: &Job<'_>,
    means: &mut Means,
    (rows, cols): (&Range<usize>, &Range<usize>),
    run: Range<usize>,
    tails: &[Tail<'_>],
    ends: Ends,
    scratch: &mut Scratch,
) {
    let Scratch { right, left, tail_right, tail_left, .. } = scratch;
    let right = groups(job.right, cols.clone(), run.clone(), right);
    let mut tail_groups = [right; TAILS_MAX];
    for ((tail, to), groups) in tails.iter().zip(tail_right).zip(&mut tail_groups) {
        *groups = tail_columns(tail, cols, to);
    }
    let align = means.rows_align();
    let height = (STRIP_BYTES / (2 * run.len().max(1))).max(align) / align * align;
    let width = means.panel();
    let n_panels = cols.len().div_ceil(width * GROUP);
    for start in rows.clone().step_by(height) {
        let strip = start..rows.end.min(start + height);
        let next = strip.end..rows.end.min(strip.end + height);
        let mut next = Ahead::rows(job.a, next, run.clone());
        let left = means.lines(job.a, strip.clone(), run.clone(), 1.0, left);
        let mut tail_lines = [left; TAILS_MAX];
        for ((tail, to), at) in tails.iter().zip(&mut *tail_left).zip(&mut tail_lines) {
            *at = means.lines(tail.u, strip.clone(), 0..tail.rank, tail.scale, to);
        }
        for (panel, from) in cols.clone().step_by(width * GROUP).enumerate() {
            let panel_cols = from..cols.end.min(from + width * GROUP);
            let mut parts = [Part { left, right }; PARTS_MAX];
            let mut n_parts = 1;
            for (i, tail) in tails.iter().enumerate() {
                let (first, n) = tail.cols;
                if first < panel_cols.end && panel_cols.start < first + n {
                    parts[n_parts] = Part { left: tail_lines[i], right: tail_groups[i] };
                    n_parts += 1;
                }
            }
            let ahead = [
                Ahead::groups(right, (panel + 1) % n_panels * width, width),
                next.share(n_panels - panel),
            ];
            let (parts, group) = (&parts[..n_parts], panel * width);
            match means {
                Means::Vectors => panel_rows(parts, group, &strip, panel_cols, ends, ahead),
                Means::Tiles(tiles) => {
                    tiles.panel_rows(parts, group, &strip, panel_cols, ends, ahead);
                }
            }
        }
    }
}

/// The right factor of a tail in the columns of a block: zero in those that it does not reach.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
fn tail_columns<'a>(tail: &Tail<'_>, cols: &Range<usize>, to: &'a mut Vec<Pairs>) -> Groups<'a> {
    let n_pairs = tail.rank.div_ceil(2);
    let to = room(to, cols.len().div_ceil(GROUP) * n_pairs);
    for (start, to) in cols.clone().step_by(GROUP).zip(to.chunks_mut(n_pairs.max(1))) {
        let end = cols.end.min(start + GROUP);
        let (from, to_col) = (start.max(tail.cols.0), end.min(tail.cols.0 + tail.cols.1));
        if from >= to_col {
            to.fill(Pairs([0; GROUP]));
            continue;
        }
        let lanes = from - tail.cols.0..to_col - tail.cols.0;
        pack(tail.v, lanes, 0..0, 0..tail.rank, to);
        // The tail may begin inside of a group.
        let shift = from - start;
        if shift > 0 {
            for Pairs(lanes) in &mut *to {
                lanes.copy_within(..GROUP - shift, shift);
                lanes[..shift].fill(0);
            }
        }
    }
    Groups { pairs: to, pitch: n_pairs, n_pairs }
}
