//! Attention by tiles, after FlashAttention-2 (Dao 2023): online softmax forward, probabilities
//! recomputed from the log-sum-exp backward.
//!
//! Scores are held transposed, (keys, queries): the keys are then read as they lie, the running
//! maximum and sum of a query are lanes of a vector, and only a tile of queries is ever transposed.
//! A forward task is a tile of queries of one head; a backward task is one head of one document,
//! which walks over its key tiles in order.

mod backward;
mod pack;

pub(super) use backward::{Saved, backward};
use rayon::prelude::*;

use super::par::SharedPtr;
use super::simd::{Level, Simd, exp, simd_fn, tanh};
use super::tile::{Left, Out, Right, Sides, product};
use crate::{AttnMask, Heads};

/// Queries of a forward tile; keys of a backward one. A multiple of every vector's lanes.
const SHORT: usize = 32;

/// Keys of a forward tile; queries of a backward one.
const LONG: usize = 128;

/// One head of one document.
#[derive(Clone, Copy)]
pub(super) struct HeadOf {
    /// First token of the document.
    start: usize,
    /// Tokens of the document.
    len: usize,
    /// The query head.
    head: usize,
}

/// The layout of the packed buffer, and what a query may see.
#[derive(Clone, Copy)]
pub(super) struct Plan {
    pub(super) heads: Heads,
    pub(super) mask: AttnMask,
}

impl Plan {
    /// Columns of the query, key and value of a query head.
    fn columns(&self, head: usize) -> [usize; 3] {
        let Heads { n_q, n_kv, dim } = self.heads;
        let kv = head / (n_q / n_kv);
        [head * dim, (n_q + kv) * dim, (n_q + n_kv + kv) * dim]
    }

    /// The first key that query `i` sees.
    pub(super) fn first_key(&self, i: usize) -> usize {
        self.mask.window.map_or(0, |w| (i + 1).saturating_sub(w))
    }

    /// One past the last query of `len` that sees key `j`.
    fn end_query(&self, j: usize, len: usize) -> usize {
        self.mask.window.map_or(len, |w| j.saturating_add(w).min(len))
    }
}

/// A result of several tasks, each of which writes columns of rows that no other touches.
#[derive(Clone, Copy)]
struct Columns<O> {
    start: *mut O,
    /// Values of the result, and of a row.
    len: usize,
    stride: usize,
}

// SAFETY: it is only a number; `row` states why its parts are disjoint.
#[allow(unsafe_code, reason = "tasks write disjoint columns of the same rows")]
unsafe impl<O: Send> Send for Columns<O> {}
// SAFETY: as above.
#[allow(unsafe_code, reason = "tasks write disjoint columns of the same rows")]
unsafe impl<O: Send> Sync for Columns<O> {}

impl<O> Columns<O> {
    fn new(values: &mut [O], stride: usize) -> Self {
        Columns { start: values.as_mut_ptr(), len: values.len(), stride }
    }

    /// `n` values of a row from a column on. A task asks for its own columns and rows alone, one
    /// piece at a time.
    #[allow(unsafe_code, reason = "tasks write disjoint columns of the same rows")]
    #[allow(clippy::mut_from_ref, reason = "a piece of what the tasks share")]
    fn row(&self, row: usize, col: usize, n: usize) -> &mut [O] {
        let at = row * self.stride + col;
        assert!(col + n <= self.stride && at + n <= self.len);
        // SAFETY: the piece lies within the result; tasks are cut so that a row of one document and
        // the columns of one head belong to one task, which holds one piece at a time.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), n) }
    }
}

/// Every head of every document.
fn heads_of(plan: Plan, docs: &[(usize, usize)]) -> Vec<HeadOf> {
    let heads = 0..plan.heads.n_q;
    let all = docs
        .iter()
        .flat_map(|&(start, len)| heads.clone().map(move |head| HeadOf { start, len, head }));
    all.filter(|h| h.len > 0).collect()
}

/// Transposes `n` rows of `x`, `stride` apart and `dim` wide, into columns of `y`, `pitch` apart,
/// times `factor`.
#[inline(always)]
fn transpose(
    x: &[f32],
    stride: usize,
    n: usize,
    dim: usize,
    factor: f32,
    y: &mut [f32],
    pitch: usize,
) {
    for i in 0..n {
        for (c, x) in x[i * stride..][..dim].iter().enumerate() {
            y[c * pitch + i] = x * factor;
        }
    }
}

/// Scratch of a forward task.
struct Forward {
    /// Queries times the scale, (K, SHORT).
    q: Vec<f32>,
    /// Scores, then probabilities, (LONG, SHORT).
    scores: Vec<f32>,
    /// Output, (SHORT, K).
    out: Vec<f32>,
}

simd_fn! {
    /// One tile of queries `first ..` of a head: `store(i, row, lse)` receives each query's output.
    fn forward_tile<s>(
        plan: Plan,
        qkv: &[f32],
        of: HeadOf,
        first: usize,
        scratch: &mut Forward,
        max: &mut [f32; SHORT],
        sum: &mut [f32; SHORT],
    ) {
        let (dim, width) = (plan.heads.dim, plan.heads.qkv_width());
        let [q_at, k_at, v_at] = plan.columns(of.head).map(|c| of.start * width + c);
        let n_q = (of.len - first).min(SHORT);
        scratch.q.fill(0.0);
        let queries = &qkv[q_at + first * width..];
        transpose(queries, width, n_q, dim, plan.mask.scale, &mut scratch.q, SHORT);
        scratch.out.fill(0.0);
        let mut tile = plan.first_key(first);
        while tile < first + n_q {
            let n_k = (first + n_q - tile).min(LONG);
            let scores = &mut scratch.scores[..n_k * SHORT];
            let keys = Left { data: &qkv[k_at + tile * width..], row_stride: width, col_stride: 1 };
            product(
                s,
                Sides { m: n_k, n: SHORT, k: dim },
                keys,
                Right { data: &scratch.q, stride: SHORT },
                Out { data: scores, stride: SHORT, add: false },
            );
            if let Some(cap) = plan.mask.soft_cap {
                for row in scores.chunks_exact_mut(S::LANES) {
                    s.store(row, soft_cap(s, cap, s.load(row)).0);
                }
            }
            mask_scores(plan, tile, first, n_q, scores);
            softmax_tile(s, scores, max, sum, &mut scratch.out, dim);
            product(
                s,
                Sides { m: n_q, n: dim, k: n_k },
                Left { data: scores, row_stride: 1, col_stride: SHORT },
                Right { data: &qkv[v_at + tile * width..], stride: width },
                Out { data: &mut scratch.out, stride: dim, add: true },
            );
            tile += n_k;
        }
    }
}

/// `cap tanh(x / cap)` and its slope, 1 - tanh^2.
#[inline(always)]
pub(super) fn soft_cap<S: Simd>(s: S, cap: f32, x: S::V) -> (S::V, S::V) {
    let (t, one) = (tanh(s, s.mul(x, s.splat(1.0 / cap))), s.splat(1.0));
    (s.mul(s.splat(cap), t), s.mul(s.sub(one, t), s.add(one, t)))
}

/// Sets the scores that the mask hides to minus infinity; row `r` belongs to key `tile + r`.
#[inline(always)]
fn mask_scores(plan: Plan, tile: usize, first: usize, n_q: usize, scores: &mut [f32]) {
    for (r, row) in scores.chunks_mut(SHORT).enumerate() {
        let from = (tile + r).saturating_sub(first).min(SHORT);
        let to = plan.end_query(tile + r, first + n_q).saturating_sub(first).max(from);
        row[..from].fill(f32::NEG_INFINITY);
        row[to..].fill(f32::NEG_INFINITY);
    }
}

/// Folds a tile of scores into the running maxima and sums; scores become probabilities up to the
/// final sum, and the output so far is brought to the new maxima.
#[inline(always)]
fn softmax_tile<S: Simd>(
    s: S,
    scores: &mut [f32],
    max: &mut [f32; SHORT],
    sum: &mut [f32; SHORT],
    out: &mut [f32],
    dim: usize,
) {
    let mut shrink = [1.0; SHORT];
    // A query that has seen no key yet has maximum minus infinity; this stands in so that
    // differences are numbers.
    let lowest = s.splat(f32::MIN);
    for at in (0..SHORT).step_by(S::LANES) {
        let old = s.load(&max[at..]);
        let mut new = s.max(old, lowest);
        for row in scores.chunks_exact(SHORT) {
            new = s.max(s.load(&row[at..]), new);
        }
        let mut total = s.splat(0.0);
        for row in scores.chunks_exact_mut(SHORT) {
            let p = exp(s, s.sub(s.load(&row[at..]), new));
            total = s.add(total, p);
            s.store(&mut row[at..], p);
        }
        let factor = exp(s, s.sub(old, new));
        s.store(&mut shrink[at..], factor);
        s.store(&mut max[at..], new);
        let old_sum = s.load(&sum[at..]);
        s.store(&mut sum[at..], s.fma(old_sum, factor, total));
    }
    for (row, factor) in out.chunks_exact_mut(dim).zip(shrink) {
        if factor != 1.0 {
            row.iter_mut().for_each(|o| *o *= factor);
        }
    }
}

/// See [`crate::Backend::attention`].
#[allow(unsafe_code, reason = "tasks write disjoint columns of the same rows")]
pub(super) fn forward(
    level: Level,
    plan: Plan,
    docs: &[(usize, usize)],
    qkv: &[f32],
    out: &mut [f32],
    lse: &mut [f32],
) {
    let (dim, n_heads, out_width) = (plan.heads.dim, plan.heads.n_q, plan.heads.out_width());
    let tiles: Vec<(HeadOf, usize)> = heads_of(plan, docs)
        .into_iter()
        .flat_map(|of| (0..of.len).step_by(SHORT).map(move |first| (of, first)))
        .collect();
    let (out, lse) = (SharedPtr(out.as_mut_ptr()), SharedPtr(lse.as_mut_ptr()));
    let scratch = || Forward {
        q: vec![0.0; dim * SHORT],
        scores: vec![0.0; LONG * SHORT],
        out: vec![0.0; SHORT * dim],
    };
    tiles.par_iter().for_each_init(scratch, |scratch, &(of, first)| {
        let (mut max, mut sum) = ([f32::NEG_INFINITY; SHORT], [0.0; SHORT]);
        forward_tile(level, plan, qkv, of, first, scratch, &mut max, &mut sum);
        for (i, row) in scratch.out.chunks(dim).take(of.len - first).enumerate() {
            let t = of.start + first + i;
            // SAFETY: the caller has checked that `out` and `lse` hold every token; this task alone
            // writes the columns of this head in the rows of this tile.
            let to = unsafe {
                *lse.at(t * n_heads + of.head) = max[i] + sum[i].ln();
                std::slice::from_raw_parts_mut(out.at(t * out_width + of.head * dim), dim)
            };
            let factor = 1.0 / sum[i];
            to.iter_mut().zip(row).for_each(|(to, x)| *to = x * factor);
        }
    });
}
