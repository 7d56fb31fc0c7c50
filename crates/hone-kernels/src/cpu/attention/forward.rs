//! The forward of attention: softmax with running maxima and sums, tile by tile of keys.
//!
//! A task is a tile of queries of one document for all query heads of a key/value head, so that a
//! tile of keys is packed once for all of them.

use std::ops::Range;

use rayon::prelude::*;

use super::pack::{self, Rows, Sides};
use super::{Columns, Plan, soft_cap};
use crate::cpu::simd::{Level, Simd, exp, simd_fn};
use crate::cpu::tile::{Factors, Left, Out, ROWS, Right, Rounded, Stored, Whole, rows};
use crate::{Compute, Heads};

/// Keys of a tile: their scores with a panel of queries lie in the nearest cache.
const KEYS: usize = 128;

/// Keys that are packed side by side: rows of A of two blocks.
const KEY_PANEL: usize = 16;

/// Queries of a panel, two vectors of the widest.
const PANEL_MAX: usize = 32;

/// Panels, of all heads of a group together, for which a tile of keys is packed.
const PANELS: usize = 12;

/// A tile of queries of one document, for one key/value head.
#[derive(Clone, Copy, Debug)]
pub(in crate::cpu) struct Task {
    /// First token of the document.
    start: usize,
    /// The key/value head.
    kv: usize,
    /// First query and number of queries, within the document.
    first: usize,
    n: usize,
}

/// What a task reads and writes besides its scratch.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Work<'a, T, O> {
    plan: Plan,
    qkv: &'a [T],
    out: Columns<O>,
    lse: Columns<f32>,
}

impl<'a, T, O> Work<'a, T, O> {
    /// `n` tokens of one head's columns from a token and a column on.
    #[inline(always)]
    fn rows(&self, token: usize, col: usize, n: usize) -> Rows<'a, T> {
        let stride = self.plan.heads.qkv_width();
        Rows { data: &self.qkv[token * stride + col..], stride, n, dim: self.plan.heads.dim }
    }
}

/// Scratch of a task.
struct Scratch<'a> {
    sides: Sides,
    /// Queries as factors of scores: panels of two vectors of each head.
    q: &'a mut [f32],
    /// Running shifts, at least the maxima so far, and sums of each panel.
    shift: &'a mut [f32],
    sum: &'a mut [f32],
    /// Outputs of each panel, (panel, width).
    out: &'a mut [f32],
    /// A tile of keys as factors of scores: panels of (turned_rows, KEY_PANEL).
    keys: &'a mut [f32],
    /// Its values packed down.
    values: &'a mut [f32],
    /// Scores of a tile of keys with a panel, (KEYS, panel).
    scores: &'a mut [f32],
    /// Their exponentials as factors, neighbouring keys in one slot.
    probs: &'a mut [f32],
}

impl<'a> Scratch<'a> {
    /// Scratch for so many panels of heads so wide.
    #[inline(always)]
    fn new<F: Factors>(all: &'a mut Vec<f32>, n_panels: usize, dim: usize) -> Self {
        let (sides, panel) = (Sides::new::<F>(dim), 2 * F::S::LANES);
        let n = n_panels * panel;
        let probs = KEYS * panel / F::PER_SLOT;
        let sizes = [
            [n * sides.turned_rows, n, n, n * sides.width],
            [KEYS * sides.turned_rows, KEYS / F::PER_SLOT * sides.width, KEYS * panel, probs],
        ];
        let [[q, shift, sum, out], [keys, values, scores, probs]] = pack::carve(all, sizes);
        Scratch { sides, q, shift, sum, out, keys, values, scores, probs }
    }
}

/// One task; see the module.
#[inline(always)]
pub(in crate::cpu) fn run_task<F: Factors, T: Stored<F>, O: Stored<F>>(
    f: F,
    work: Work<'_, T, O>,
    task: &Task,
    scratch: &mut Vec<f32>,
) {
    let Heads { n_q, n_kv, dim } = work.plan.heads;
    let (group, panel) = (n_q / n_kv, 2 * F::S::LANES);
    let across = task.n.div_ceil(panel);
    let mut scratch = Scratch::new::<F>(scratch, group * across, dim);
    let from = work.plan.first_key(task.first) / KEY_PANEL * KEY_PANEL;
    let columns = work.plan.columns(task.kv * group);
    let n_keys = (task.first + task.n - from).min(KEYS);
    work.rows(task.start + from, columns[1], n_keys).ask_for();
    work.rows(task.start + from, columns[2], n_keys).ask_for();
    pack_queries(f, work, task, &mut scratch);
    for key in (from..task.first + task.n).step_by(KEYS) {
        let tile = key..(task.first + task.n).min(key + KEYS);
        pack_keys(f, work, task, tile.clone(), &mut scratch);
        for nth in 0..group * across {
            let first = task.first + nth % across * panel;
            let queries = first..(task.first + task.n).min(first + panel);
            fold_tile(f, work.plan, nth, tile.clone(), queries, &mut scratch);
        }
    }
    write(f, work, task, &scratch);
}

/// Packs the queries of all heads and clears what will be made of them.
#[inline(always)]
fn pack_queries<F: Factors, T: Stored<F>, O>(
    f: F,
    work: Work<'_, T, O>,
    task: &Task,
    scratch: &mut Scratch<'_>,
) {
    let Heads { n_q, n_kv, dim } = work.plan.heads;
    let (group, panel) = (n_q / n_kv, 2 * F::S::LANES);
    let (across, size) = (task.n.div_ceil(panel), panel * scratch.sides.turned_rows);
    let rows_of = |nth: usize| {
        let (head, at) = (task.kv * group + nth / across, nth % across * panel);
        work.rows(task.start + task.first + at, head * dim, (task.n - at).min(panel))
    };
    (0..group * across).for_each(|nth| rows_of(nth).ask_for());
    for nth in 0..group * across {
        let to = &mut scratch.q[nth * size..][..size];
        pack::turned(f, rows_of(nth), scratch.sides, panel, to);
    }
    scratch.shift.fill(f32::NEG_INFINITY);
    scratch.sum.fill(0.0);
    scratch.out.fill(0.0);
}

/// Packs a tile of keys and its values.
#[inline(always)]
fn pack_keys<F: Factors, T: Stored<F>, O>(
    f: F,
    work: Work<'_, T, O>,
    task: &Task,
    tile: Range<usize>,
    scratch: &mut Scratch<'_>,
) {
    let (heads, sides) = (work.plan.heads, scratch.sides);
    let [_, k_col, v_col] = work.plan.columns(task.kv * (heads.n_q / heads.n_kv));
    let all = Rows { data: work.qkv, stride: heads.qkv_width(), n: 0, dim: heads.dim };
    let keys = all.behind(task.start + tile.start, k_col, tile.len());
    let values = all.behind(task.start + tile.start, v_col, tile.len());
    // The next tile is on its way from memory meanwhile.
    let n_next = (task.first + task.n - tile.end).min(KEYS);
    if n_next > 0 {
        keys.behind(tile.len(), 0, n_next).ask_for();
        values.behind(tile.len(), 0, n_next).ask_for();
    }
    let size = sides.turned_rows * KEY_PANEL;
    for at in (0..tile.len()).step_by(KEY_PANEL) {
        let to = &mut scratch.keys[at / KEY_PANEL * size..][..size];
        pack::turned(f, keys.behind(at, 0, tile.len() - at), sides, KEY_PANEL, to);
    }
    pack::down(f, values, sides, tile.len().next_multiple_of(ROWS), scratch.values);
}

/// Folds a tile of keys into the running maxima, sums and outputs of a panel of queries, the `nth`
/// of the task; keys and queries are counted within the document.
#[inline(always)]
fn fold_tile<F: Factors>(
    f: F,
    plan: Plan,
    nth: usize,
    tile: Range<usize>,
    queries: Range<usize>,
    scratch: &mut Scratch<'_>,
) {
    let (s, panel, sides) = (f.simd(), 2 * F::S::LANES, scratch.sides);
    // Whole blocks of keys, of which some query sees one.
    let from = plan.first_key(queries.start).max(tile.start) - tile.start;
    let to = tile.end.min(queries.end).saturating_sub(tile.start);
    let seen = from / ROWS * ROWS..to.next_multiple_of(ROWS);
    if from >= to {
        return;
    }
    let q = &scratch.q[nth * panel * sides.turned_rows..];
    for r in seen.clone().step_by(ROWS) {
        let at = r / KEY_PANEL * KEY_PANEL * sides.turned_rows + r % KEY_PANEL;
        let keys = Left { data: &scratch.keys[at..], row_stride: 1, col_stride: KEY_PANEL };
        let to = &mut scratch.scores[r * panel..][..ROWS * panel];
        let out = Out { data: &mut *to, stride: panel, add: false };
        rows(f, 0..sides.depth, panel, keys, Right { data: q, stride: panel }, out);
        let key = tile.start + r;
        if let Some(cap) = plan.mask.soft_cap {
            let scale = s.splat(plan.mask.scale);
            for to in to.chunks_exact_mut(F::S::LANES) {
                s.store(to, soft_cap(s, cap, s.mul(s.load(to), scale)).0);
            }
        }
        let end = plan.end_query(key, usize::MAX);
        if key + ROWS - 1 > queries.start || end < queries.start + panel {
            hide(s, plan, key, queries.start, to);
        }
    }
    let scale = if plan.mask.soft_cap.is_some() { 1.0 } else { plan.mask.scale };
    exponentials(f, scale, nth, seen, scratch);
    let out = &mut scratch.out[nth * panel * sides.width..][..panel * sides.width];
    for at in (0..queries.len()).step_by(ROWS) {
        let query = queries.start + at;
        let from = plan.first_key(query).max(tile.start) - tile.start;
        let to = tile.end.min(query + ROWS).saturating_sub(tile.start);
        let depth = from / F::PER_SLOT..to.div_ceil(F::PER_SLOT);
        let probs = Left { data: &scratch.probs[at..], row_stride: 1, col_stride: panel };
        let values = Right { data: &*scratch.values, stride: sides.width };
        let to = Out { data: &mut out[at * sides.width..], stride: sides.width, add: true };
        rows(f, depth, sides.width, probs, values, to);
    }
}

/// Sets the scores that the mask hides to minus infinity, in the rows of [`ROWS`] keys from `key`
/// on.
#[inline(always)]
fn hide<S: Simd>(s: S, plan: Plan, key: usize, first: usize, scores: &mut [f32]) {
    for (r, row) in scores.chunks_exact_mut(2 * S::LANES).enumerate() {
        let to = plan.end_query(key + r, usize::MAX).saturating_sub(first);
        let bounds = pack::edges(s, (key + r).saturating_sub(first), to);
        for (row, bound) in row.chunks_exact_mut(S::LANES).zip(bounds) {
            s.store(row, s.min(s.load(row), bound));
        }
    }
}

/// The scores `seen` of a tile become exponentials below the running maxima, and sums and outputs
/// so far are brought to those.
#[inline(always)]
fn exponentials<F: Factors>(
    f: F,
    scale: f32,
    nth: usize,
    seen: Range<usize>,
    scratch: &mut Scratch<'_>,
) {
    let (s, lanes) = (f.simd(), F::S::LANES);
    let (panel, width, zero) = (2 * lanes, scratch.sides.width, s.splat(0.0));
    let scores = &scratch.scores[seen.start * panel..seen.end * panel];
    let probs = &mut scratch.probs[seen.start / F::PER_SLOT * panel..];
    let shift = &mut scratch.shift[nth * panel..][..panel];
    let sum = &mut scratch.sum[nth * panel..][..panel];
    let factor = s.splat(scale);
    // A query that has seen no key yet has maximum minus infinity; this stands in so that
    // differences are numbers.
    let lowest = s.splat(f32::MIN);
    let mut shrink = [1.0; PANEL_MAX];
    let mut new = [s.max(s.load(shift), lowest), s.max(s.load(&shift[lanes..]), lowest)];
    for row in scores.chunks_exact(panel) {
        new[0] = s.max(s.mul(s.load(row), factor), new[0]);
        new[1] = s.max(s.mul(s.load(&row[lanes..]), factor), new[1]);
    }
    let down = [s.sub(zero, new[0]), s.sub(zero, new[1])];
    let mut total = [zero; 2];
    let pairs = scores.chunks_exact(F::PER_SLOT * panel);
    for (rows, to) in pairs.zip(probs.chunks_exact_mut(panel)) {
        for v in 0..2 {
            let mut p = [zero; 2];
            for i in 0..F::PER_SLOT {
                let x = s.load(&rows[i * panel + v * lanes..]);
                p[i] = exp(s, s.fma(x, factor, down[v]));
                total[v] = s.add(total[v], p[i]);
            }
            s.store(&mut to[v * lanes..], f.across(|i| p[i]));
        }
    }
    for v in 0..2 {
        let at = v * lanes..(v + 1) * lanes;
        let factor = exp(s, s.add(s.load(&shift[at.clone()]), down[v]));
        let old = s.load(&sum[at.clone()]);
        s.store(&mut sum[at.clone()], s.fma(old, factor, total[v]));
        s.store(&mut shift[at.clone()], new[v]);
        s.store(&mut shrink[at], factor);
    }
    let out = &mut scratch.out[nth * panel * width..][..panel * width];
    for (row, &factor) in out.chunks_exact_mut(width).zip(&shrink) {
        if factor != 1.0 {
            let factor = s.splat(factor);
            for x in row.chunks_exact_mut(lanes) {
                s.store(x, s.mul(s.load(x), factor));
            }
        }
    }
}

/// Writes the outputs, divided by their sums, and the log-sum-exps.
#[inline(always)]
#[allow(unsafe_code, reason = "tasks write disjoint columns of the same rows")]
fn write<F: Factors, T, O: Stored<F>>(
    f: F,
    work: Work<'_, T, O>,
    task: &Task,
    scratch: &Scratch<'_>,
) {
    let Heads { n_q, n_kv, dim } = work.plan.heads;
    let (s, lanes, group) = (f.simd(), F::S::LANES, n_q / n_kv);
    let (panel, across) = (2 * lanes, task.n.div_ceil(2 * lanes));
    for nth in 0..group {
        let head = task.kv * group + nth;
        for i in 0..task.n {
            let row = nth * across * panel + i;
            let (token, sum) = (task.start + task.first + i, scratch.sum[row]);
            // SAFETY: this task alone has these queries of this head.
            let (lse, to) =
                unsafe { (work.lse.row(token, head, 1), work.out.row(token, head * dim, dim)) };
            lse[0] = scratch.shift[row] + sum.ln();
            let from = &scratch.out[row * scratch.sides.width..][..scratch.sides.width];
            let factor = s.splat(1.0 / sum);
            for (to, from) in to.chunks_mut(lanes).zip(from.chunks_exact(lanes)) {
                O::store(f, to, s.mul(s.load(from), factor));
            }
        }
    }
}

simd_fn! {
    /// One task in f32 whose factors are rounded to bf16.
    fn rounded_task<s>(work: Work<'_, f32, f32>, task: &Task, scratch: &mut Vec<f32>) {
        run_task(Rounded(s), work, task, scratch);
    }
}

simd_fn! {
    /// One task in f32.
    fn whole_task<s>(work: Work<'_, f32, f32>, task: &Task, scratch: &mut Vec<f32>) {
        run_task(Whole(s), work, task, scratch);
    }
}

/// See [`crate::Backend::attention`].
pub(in crate::cpu) fn forward(
    (level, compute): (Level, Compute),
    plan: Plan,
    docs: &[(usize, usize)],
    qkv: &[f32],
    out: &mut [f32],
    lse: &mut [f32],
) {
    each_task(plan, docs, qkv, out, lse, |work, task, scratch| match compute {
        Compute::F32 => whole_task(level, work, task, scratch),
        Compute::Bf16 => rounded_task(level, work, task, scratch),
    });
}

/// Runs all tasks.
pub(in crate::cpu) fn each_task<T: Copy + Sync, O: Copy + Send + Sync>(
    plan: Plan,
    docs: &[(usize, usize)],
    qkv: &[T],
    out: &mut [O],
    lse: &mut [f32],
    run: impl Fn(Work<'_, T, O>, &Task, &mut Vec<f32>) + Sync,
) {
    let Heads { n_q, n_kv, .. } = plan.heads;
    let n_queries = (PANELS / (n_q / n_kv)).max(1) * PANEL_MAX;
    let mut tasks = Vec::new();
    for &(start, len) in docs {
        for first in (0..len).step_by(n_queries) {
            let n = n_queries.min(len - first);
            tasks.extend((0..n_kv).map(|kv| Task { start, kv, first, n }));
        }
    }
    let work = Work {
        plan,
        qkv,
        out: Columns::new(out, plan.heads.out_width()),
        lse: Columns::new(lse, n_q),
    };
    tasks.par_iter().for_each(|task| pack::with_scratch(|scratch| run(work, task, scratch)));
}
