//! The backward of attention: probabilities are recomputed from the log-sum-exp, tile by tile.
//!
//! A task is a range of keys of one document and one key/value head, with all query heads that
//! share it: gradients of keys and values are added up once ([`super::ranges`]).

use std::ops::Range;

use super::pack::{self, Rows, Sides};
use super::ranges::{Saved, Task, Work, each_task};
use super::{Plan, soft_cap};
use crate::cpu::simd::{Level, Simd, exp, simd_fn};
use crate::cpu::tile::{Factors, Left, Out, ROWS, Right, Rounded, Stored, Whole, rows};
use crate::{Compute, Heads};

/// Queries of a tile, and keys of one: their scores lie in the nearest cache beside what they are
/// multiplied by. Multiples of every panel.
const QUERIES: usize = 64;
pub(super) const KEYS: usize = 64;

/// Keys that are packed side by side: rows of A of two blocks.
const KEY_PANEL: usize = 16;

/// Scratch of a task: a tile of queries, a tile of scores, and all keys of the range.
struct Scratch<'a> {
    sides: Sides,
    /// Keys and values as factors of scores: panels of (turned_rows, KEY_PANEL).
    keys: &'a mut [f32],
    values: &'a mut [f32],
    /// Keys packed down.
    keys_down: &'a mut [f32],
    /// Gradients of keys and values, (keys, width).
    dk: &'a mut [f32],
    dv: &'a mut [f32],
    /// Queries and gradients of the output as factors of scores: panels of two vectors.
    q: &'a mut [f32],
    dout: &'a mut [f32],
    /// The same packed down.
    q_down: &'a mut [f32],
    dout_down: &'a mut [f32],
    /// Gradients of the queries, (QUERIES, width).
    dq: &'a mut [f32],
    /// Log-sum-exp of each query, infinite where there is none, and its `dout . out`.
    lse: &'a mut [f32],
    delta: &'a mut [f32],
    /// Probabilities and gradients of scores, (KEYS, slots of QUERIES).
    probs: &'a mut [f32],
    dscores: &'a mut [f32],
    /// The latter once more, neighbouring keys in one slot, (slots of KEYS, QUERIES).
    dscores_across: &'a mut [f32],
    /// Scores and gradients of probabilities of a block, (ROWS, a panel).
    block: [&'a mut [f32]; 2],
}

impl<'a> Scratch<'a> {
    /// Scratch for so many keys of a head so wide.
    #[inline(always)]
    fn new<F: Factors>(all: &'a mut Vec<f32>, n_keys: usize, dim: usize) -> Self {
        let sides = Sides::new::<F>(dim);
        let n_keys = n_keys.next_multiple_of(KEY_PANEL);
        let turned = |n: usize| sides.turned_rows * n;
        let down = |n: usize| n / F::PER_SLOT * sides.width;
        let scores = KEYS * QUERIES / F::PER_SLOT;
        let across = if F::PER_SLOT == 1 { 0 } else { scores };
        let (dk, dq) = (n_keys * sides.width, QUERIES * sides.width);
        let block = ROWS * 2 * F::S::LANES;
        let sizes = [
            [turned(n_keys), turned(n_keys), down(n_keys), dk, dk],
            [turned(QUERIES), turned(QUERIES), down(QUERIES), down(QUERIES), dq],
            [QUERIES, QUERIES, 0, block, block],
            [scores, scores, across, 0, 0],
        ];
        let [by_key, by_query, small, tiles] = pack::carve(all, sizes);
        let [keys, values, keys_down, dk, dv] = by_key;
        let [q, dout, q_down, dout_down, dq] = by_query;
        let [lse, delta, _, block_p, block_d] = small;
        let [probs, dscores, dscores_across, ..] = tiles;
        Scratch {
            sides,
            keys,
            values,
            keys_down,
            dk,
            dv,
            q,
            dout,
            q_down,
            dout_down,
            dq,
            lse,
            delta,
            probs,
            dscores,
            dscores_across,
            block: [block_p, block_d],
        }
    }
}

/// One task; see the module.
#[inline(always)]
#[allow(unsafe_code, reason = "tasks write disjoint columns of the same rows")]
pub(in crate::cpu) fn run_task<F: Factors, T: Stored<F>, O: Stored<F>>(
    f: F,
    work: Work<'_, T, O>,
    task: &Task,
    scratch: &mut Vec<f32>,
) {
    let Heads { n_q, n_kv, dim } = work.plan.heads;
    let mut scratch = Scratch::new::<F>(scratch, task.keys.len(), dim);
    let queries = task.queries(work.plan);
    let group = n_q / n_kv;
    let tile_from = |first: usize| first..queries.end.min(first + QUERIES);
    let heads = task.kv * group..(task.kv + 1) * group;
    work.ask_for_queries(task, heads.start, tile_from(queries.start));
    pack_keys(f, work, task, &mut scratch);
    for head in heads.clone() {
        for first in queries.clone().step_by(QUERIES) {
            let tile = tile_from(first);
            // What comes next is on its way from memory meanwhile.
            if tile.end < queries.end {
                work.ask_for_queries(task, head, tile_from(tile.end));
            } else if head + 1 < heads.end {
                work.ask_for_queries(task, head + 1, tile_from(queries.start));
            }
            pack_queries(f, work, task, head, tile.clone(), &mut scratch);
            let seen = work.plan.first_key(first).max(task.keys.start) - task.keys.start;
            let from = task.keys.start + seen / KEYS * KEYS;
            for key in (from..task.keys.end.min(tile.end)).step_by(KEYS) {
                let pair = Pair { keys: key..task.keys.end.min(key + KEYS), tile: tile.clone() };
                score_gradients(f, work.plan, task, &pair, &mut scratch);
                add_to_keys(f, work.plan, task, &pair, &mut scratch);
                add_to_queries(f, work.plan, task, &pair, &mut scratch);
            }
            write_queries(f, work, task, head, tile, &scratch);
        }
    }
    let [_, k_col, v_col] = work.plan.columns(task.kv * group);
    for (i, key) in task.keys.clone().enumerate() {
        let from = i * scratch.sides.width;
        for (col, from) in [(k_col, &scratch.dk[from..]), (v_col, &scratch.dv[from..])] {
            // SAFETY: this task alone has these keys of this head; see `ranges`.
            write_row(f, from, unsafe { work.dqkv.row(task.start + key, col, dim) });
        }
    }
}

/// A row of results, as they are stored.
#[inline(always)]
fn write_row<F: Factors, O: Stored<F>>(f: F, from: &[f32], to: &mut [O]) {
    let lanes = F::S::LANES;
    for (to, from) in to.chunks_mut(lanes).zip(from.chunks(lanes)) {
        O::store(f, to, f.simd().load(from));
    }
}

/// Packs the keys and values of a task, and clears their gradients.
#[inline(always)]
fn pack_keys<F: Factors, T: Stored<F>, O>(
    f: F,
    work: Work<'_, T, O>,
    task: &Task,
    scratch: &mut Scratch<'_>,
) {
    let (heads, sides) = (work.plan.heads, scratch.sides);
    let [_, k_col, v_col] = work.plan.columns(task.kv * (heads.n_q / heads.n_kv));
    let rows_from = |key: usize, col: usize| Rows {
        data: &work.saved.qkv[(task.start + key) * heads.qkv_width() + col..],
        stride: heads.qkv_width(),
        n: task.keys.end - key,
        dim: heads.dim,
    };
    let ask_for = |key: usize| {
        for col in [k_col, v_col] {
            let rows = rows_from(key, col);
            Rows { n: rows.n.min(KEYS), ..rows }.ask_for();
        }
    };
    ask_for(task.keys.start);
    let panel = sides.turned_rows * KEY_PANEL;
    for (nth, key) in task.keys.clone().step_by(KEY_PANEL).enumerate() {
        let (keys, values) = (rows_from(key, k_col), rows_from(key, v_col));
        if (nth * KEY_PANEL).is_multiple_of(KEYS) && key + KEYS < task.keys.end {
            ask_for(key + KEYS);
        }
        pack::turned(f, keys, sides, KEY_PANEL, &mut scratch.keys[nth * panel..][..panel]);
        pack::turned(f, values, sides, KEY_PANEL, &mut scratch.values[nth * panel..][..panel]);
    }
    let n_keys = task.keys.len().next_multiple_of(KEY_PANEL);
    pack::down(f, rows_from(task.keys.start, k_col), sides, n_keys, scratch.keys_down);
    scratch.dk.fill(0.0);
    scratch.dv.fill(0.0);
}

/// Packs a tile of queries of one head and clears their gradients.
#[inline(always)]
fn pack_queries<F: Factors, T: Stored<F>, O>(
    f: F,
    work: Work<'_, T, O>,
    task: &Task,
    head: usize,
    tile: Range<usize>,
    scratch: &mut Scratch<'_>,
) {
    let (sides, n, panel) = (scratch.sides, tile.len(), 2 * F::S::LANES);
    let [q, dout, out] = work.queries(task, head, tile.clone());
    for at in (0..n).step_by(panel) {
        let to = at * sides.turned_rows..(at + panel) * sides.turned_rows;
        pack::turned(f, q.behind(at, 0, n - at), sides, panel, &mut scratch.q[to.clone()]);
        pack::turned(f, dout.behind(at, 0, n - at), sides, panel, &mut scratch.dout[to]);
    }
    let n_rows = n.next_multiple_of(ROWS);
    pack::down(f, q, sides, n_rows, scratch.q_down);
    pack::down(f, dout, sides, n_rows, scratch.dout_down);
    pack::dots(f, dout, out, scratch.delta);
    for (i, lse) in scratch.lse.iter_mut().enumerate() {
        let at = (task.start + tile.start + i) * work.plan.heads.n_q + head;
        *lse = if i < n { work.saved.lse[at] } else { f32::INFINITY };
    }
    scratch.dq.fill(0.0);
}

/// A tile of keys against a tile of queries, both counted within the document.
struct Pair {
    keys: Range<usize>,
    tile: Range<usize>,
}

/// Probabilities and gradients of the scores of one pair of tiles.
#[inline(always)]
fn score_gradients<F: Factors>(
    f: F,
    plan: Plan,
    task: &Task,
    pair: &Pair,
    scratch: &mut Scratch<'_>,
) {
    let (sides, panel) = (scratch.sides, 2 * F::S::LANES);
    for at in (0..pair.tile.len()).step_by(panel) {
        let first = pair.tile.start + at;
        let last = pair.tile.end.min(first + panel) - 1;
        for r in (0..pair.keys.len()).step_by(ROWS) {
            let key = pair.keys.start + r;
            if key > last || plan.end_query(key + ROWS - 1, task.len) <= first {
                continue;
            }
            let in_range = key - task.keys.start;
            let keys_at =
                in_range / KEY_PANEL * KEY_PANEL * sides.turned_rows + in_range % KEY_PANEL;
            let left = |data| Left { data, row_stride: 1, col_stride: KEY_PANEL };
            let right = |data| Right { data, stride: panel };
            let queries_at = at * sides.turned_rows;
            let [scores, dprobs] = &mut scratch.block;
            let (keys, values) = (&scratch.keys[keys_at..], &scratch.values[keys_at..]);
            let (q, dout) = (&scratch.q[queries_at..], &scratch.dout[queries_at..]);
            let out = |data| Out { data, stride: panel, add: false };
            rows(f, 0..sides.depth, panel, left(keys), right(q), out(scores));
            rows(f, 0..sides.depth, panel, left(values), right(dout), out(dprobs));
            let hidden = key + ROWS - 1 > first || plan.end_query(key, usize::MAX) < first + panel;
            let block = Block { key, first, at, r };
            match (plan.mask.soft_cap.is_some(), hidden) {
                // Choices that the compiler sees, so that the loops hold none.
                (false, false) => score_block::<F, false, false>(f, plan, block, scratch),
                (false, true) => score_block::<F, false, true>(f, plan, block, scratch),
                (true, _) => score_block::<F, true, true>(f, plan, block, scratch),
            }
        }
    }
}

/// [`ROWS`] keys against a panel of queries.
#[derive(Clone, Copy)]
struct Block {
    /// The first key and query, within the document.
    key: usize,
    first: usize,
    /// The same within their tiles.
    r: usize,
    at: usize,
}

/// Scores become probabilities, their gradients the gradients of the scores:
/// p = exp(s - lse), ds = p (dp - delta), times the slope of s by the product.
#[inline(always)]
fn score_block<F: Factors, const CAPPED: bool, const HIDDEN: bool>(
    f: F,
    plan: Plan,
    block: Block,
    scratch: &mut Scratch<'_>,
) {
    let (s, lanes) = (f.simd(), F::S::LANES);
    let (panel, per_slot) = (2 * lanes, F::PER_SLOT);
    let scale = s.splat(plan.mask.scale);
    let zero = s.splat(0.0);
    let (lse, delta) = (&scratch.lse[block.at..][..panel], &scratch.delta[block.at..][..panel]);
    let shift = [s.sub(zero, s.load(lse)), s.sub(zero, s.load(&lse[lanes..]))];
    let delta = [s.load(delta), s.load(&delta[lanes..])];
    let pitch = QUERIES / per_slot;
    let to = block.r * pitch + block.at / per_slot;
    let n = (ROWS - 1) * pitch + panel / per_slot;
    let (probs, dscores) = (&mut scratch.probs[to..][..n], &mut scratch.dscores[to..][..n]);
    let across = &mut scratch.dscores_across[..];
    let [scores, dprobs] = &scratch.block;
    let (scores, dprobs) = (&scores[..ROWS * panel], &dprobs[..ROWS * panel]);
    for slot in 0..ROWS / per_slot {
        let mut p = [[zero; 2]; 2];
        let mut d = p;
        for i in 0..per_slot {
            let r = slot * per_slot + i;
            let key = block.key + r;
            let bounds = if HIDDEN {
                let to = plan.end_query(key, usize::MAX).saturating_sub(block.first);
                pack::edges(s, key.saturating_sub(block.first), to)
            } else {
                [zero; 2]
            };
            for v in 0..2 {
                let from = r * panel + v * lanes;
                let x = s.load(&scores[from..]);
                let (x, slope) = if CAPPED {
                    let cap = plan.mask.soft_cap.unwrap_or(f32::INFINITY);
                    let (x, slope) = soft_cap(s, cap, s.mul(x, scale));
                    (s.add(x, shift[v]), s.mul(slope, scale))
                } else {
                    (s.fma(x, scale, shift[v]), scale)
                };
                p[i][v] = exp(s, if HIDDEN { s.min(x, bounds[v]) } else { x });
                d[i][v] = s.mul(s.mul(p[i][v], slope), s.sub(s.load(&dprobs[from..]), delta[v]));
            }
        }
        for i in 0..per_slot {
            let to = (slot * per_slot + i) * pitch;
            for v in 0..2 / per_slot {
                let to = to + v * lanes;
                s.store(&mut probs[to..], f.along(|half| p[i][v * per_slot + half]));
                s.store(&mut dscores[to..], f.along(|half| d[i][v * per_slot + half]));
            }
        }
        if per_slot > 1 {
            let to = (block.r / per_slot + slot) * QUERIES + block.at;
            s.store(&mut across[to..], f.across(|i| d[i][0]));
            s.store(&mut across[to + lanes..], f.across(|i| d[i][1]));
        }
    }
}

/// Adds one pair's part to `dk` and `dv`.
#[inline(always)]
fn add_to_keys<F: Factors>(f: F, plan: Plan, task: &Task, pair: &Pair, scratch: &mut Scratch<'_>) {
    let width = scratch.sides.width;
    for r in (0..pair.keys.len()).step_by(ROWS) {
        let key = pair.keys.start + r;
        let from = key.max(pair.tile.start) - pair.tile.start;
        let to = plan.end_query(key + ROWS - 1, pair.tile.end).saturating_sub(pair.tile.start);
        let depth = from / F::PER_SLOT..to.div_ceil(F::PER_SLOT);
        let pitch = QUERIES / F::PER_SLOT;
        let scores = |data| Left { data, row_stride: pitch, col_stride: 1 };
        let right = |data| Right { data, stride: width };
        let out = |data| Out { data, stride: width, add: true };
        let key_at = (key - task.keys.start) * width;
        let probs = scores(&scratch.probs[r * pitch..]);
        let dv = out(&mut scratch.dv[key_at..]);
        rows(f, depth.clone(), width, probs, right(scratch.dout_down), dv);
        let dscores = scores(&scratch.dscores[r * pitch..]);
        let dk = out(&mut scratch.dk[key_at..]);
        rows(f, depth, width, dscores, right(scratch.q_down), dk);
    }
}

/// Adds one pair's part to `dq`.
#[inline(always)]
fn add_to_queries<F: Factors>(
    f: F,
    plan: Plan,
    task: &Task,
    pair: &Pair,
    scratch: &mut Scratch<'_>,
) {
    let width = scratch.sides.width;
    let keys_down = &scratch.keys_down[(pair.keys.start - task.keys.start) / F::PER_SLOT * width..];
    let across = if F::PER_SLOT == 1 { &*scratch.dscores } else { &*scratch.dscores_across };
    for q in (0..pair.tile.len()).step_by(ROWS) {
        let query = pair.tile.start + q;
        let from = plan.first_key(query).max(pair.keys.start) - pair.keys.start;
        let to = pair.keys.end.min(query + ROWS).saturating_sub(pair.keys.start);
        let depth = from / F::PER_SLOT..to.div_ceil(F::PER_SLOT);
        let left = Left { data: &across[q..], row_stride: 1, col_stride: QUERIES };
        let dq = Out { data: &mut scratch.dq[q * width..], stride: width, add: true };
        rows(f, depth, width, left, Right { data: keys_down, stride: width }, dq);
    }
}

/// Writes the gradients of a tile of queries: to their place, or to this range's part.
#[inline(always)]
#[allow(unsafe_code, reason = "tasks write disjoint columns of the same rows")]
fn write_queries<F: Factors, T, O: Stored<F>>(
    f: F,
    work: Work<'_, T, O>,
    task: &Task,
    head: usize,
    tile: Range<usize>,
    scratch: &Scratch<'_>,
) {
    let dim = work.plan.heads.dim;
    for (i, from) in tile.zip(scratch.dq.chunks(scratch.sides.width)) {
        match task.part {
            None => {
                // SAFETY: this task alone has the queries of this document and this head.
                write_row(f, from, unsafe { work.dqkv.row(task.start + i, head * dim, dim) });
            }
            Some(part) => {
                let row = part + i - task.keys.start;
                // SAFETY: this task alone has this part's columns of this head.
                write_row(f, from, unsafe { work.parts.row(row, head * dim, dim) });
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

/// See [`crate::Backend::attention_backward`].
pub(in crate::cpu) fn backward(
    (level, compute): (Level, Compute),
    plan: Plan,
    docs: &[(usize, usize)],
    saved: Saved<'_, f32>,
    dqkv: &mut [f32],
) {
    let store = |to: &mut f32, sum: f32| *to = sum;
    let run = |work: Work<'_, f32, f32>, task: &Task, scratch: &mut Vec<f32>| match compute {
        Compute::F32 => whole_task(level, work, task, scratch),
        Compute::Bf16 => rounded_task(level, work, task, scratch),
    };
    each_task(plan, docs, saved, dqkv, run, store);
}
