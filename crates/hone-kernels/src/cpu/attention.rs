//! Attention by tiles, after FlashAttention-2 (Dao 2023): online softmax forward, probabilities
//! recomputed from the log-sum-exp backward.
//!
//! Scores are held transposed, (keys, queries): the keys are then read as they lie, the running
//! maximum and sum of a query are lanes of a vector, and only a tile of queries is ever transposed.
//! A forward task is a tile of queries of one head; a backward task is one head of one document,
//! which walks over its key tiles in order.

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

/// The inputs of the backward.
#[derive(Clone, Copy)]
pub(super) struct Saved<'a> {
    pub(super) dout: &'a [f32],
    pub(super) qkv: &'a [f32],
    pub(super) out: &'a [f32],
    pub(super) lse: &'a [f32],
}

/// Scratch of a backward task, for documents of up to `len` tokens.
struct Backward {
    /// Queries times the scale, transposed, (K, pitch).
    q: Vec<f32>,
    /// Gradient of the output, transposed, (K, pitch).
    dout: Vec<f32>,
    /// Log-sum-exp of each query.
    lse: Vec<f32>,
    /// `dout . out` of each query.
    delta: Vec<f32>,
    /// Probabilities, (SHORT, LONG).
    probs: Vec<f32>,
    /// Gradient of the scores, (SHORT, LONG).
    dscores: Vec<f32>,
    /// Gradient of the queries, (len, K).
    dq: Vec<f32>,
    /// Gradients of keys and of values, (len, K) each.
    dk: Vec<f32>,
    dv: Vec<f32>,
}

impl Backward {
    /// Scratch for documents of up to `len` tokens.
    fn new(len: usize, dim: usize) -> Self {
        let pitch = len.next_multiple_of(SHORT);
        let zeros = |n: usize| vec![0.0; n];
        Backward {
            q: zeros(dim * pitch),
            dout: zeros(dim * pitch),
            lse: zeros(pitch),
            delta: zeros(pitch),
            probs: zeros(SHORT * LONG),
            dscores: zeros(SHORT * LONG),
            dq: zeros(len * dim),
            dk: zeros(len * dim),
            dv: zeros(len * dim),
        }
    }

    /// Gathers what the tiles of one head read.
    #[inline(always)]
    fn fill(&mut self, plan: Plan, saved: Saved<'_>, of: HeadOf, pitch: usize) {
        let (dim, width) = (plan.heads.dim, plan.heads.qkv_width());
        let out_width = plan.heads.out_width();
        let q_at = of.start * width + plan.columns(of.head)[0];
        let o_at = of.start * out_width + of.head * dim;
        transpose(&saved.qkv[q_at..], width, of.len, dim, plan.mask.scale, &mut self.q, pitch);
        transpose(&saved.dout[o_at..], out_width, of.len, dim, 1.0, &mut self.dout, pitch);
        for i in 0..of.len {
            let at = o_at + i * out_width;
            let pairs = saved.dout[at..at + dim].iter().zip(&saved.out[at..at + dim]);
            self.delta[i] = pairs.map(|(d, o)| d * o).sum();
            self.lse[i] = saved.lse[(of.start + i) * plan.heads.n_q + of.head];
        }
        for x in [&mut self.dq, &mut self.dk, &mut self.dv] {
            x[..of.len * dim].fill(0.0);
        }
    }
}

/// A tile of keys against a tile of queries.
#[derive(Clone, Copy)]
struct Pair {
    key: usize,
    n_keys: usize,
    query: usize,
    n_queries: usize,
}

simd_fn! {
    /// The backward of one head of one document, into the scratch's `dq`, `dk` and `dv`.
    fn backward_head<s>(plan: Plan, saved: Saved<'_>, of: HeadOf, scratch: &mut Backward) {
        let pitch = of.len.next_multiple_of(SHORT);
        scratch.fill(plan, saved, of, pitch);
        for key in (0..of.len).step_by(SHORT) {
            let n_keys = (of.len - key).min(SHORT);
            let end = plan.end_query(key + n_keys - 1, of.len);
            for query in (key..end).step_by(LONG) {
                let pair = Pair { key, n_keys, query, n_queries: (end - query).min(LONG) };
                score_gradients(s, plan, saved, of, pitch, pair, scratch);
                accumulate(s, plan, saved, of, pair, scratch);
            }
        }
    }
}

/// Probabilities and gradients of the scores of one pair of tiles, both (keys, queries).
#[inline(always)]
fn score_gradients<S: Simd>(
    s: S,
    plan: Plan,
    saved: Saved<'_>,
    of: HeadOf,
    pitch: usize,
    pair: Pair,
    scratch: &mut Backward,
) {
    let (dim, width) = (plan.heads.dim, plan.heads.qkv_width());
    let [_, k_at, v_at] = plan.columns(of.head).map(|c| (of.start + pair.key) * width + c);
    let n = pair.n_queries.next_multiple_of(S::LANES);
    let sides = Sides { m: pair.n_keys, n, k: dim };
    let row = |at: usize| Left { data: &saved.qkv[at..], row_stride: width, col_stride: 1 };
    let (q, dout) = (&scratch.q[pair.query..], &scratch.dout[pair.query..]);
    let out = |data| Out { data, stride: LONG, add: false };
    product(s, sides, row(k_at), Right { data: q, stride: pitch }, out(&mut scratch.probs));
    product(s, sides, row(v_at), Right { data: dout, stride: pitch }, out(&mut scratch.dscores));
    let scale = s.splat(plan.mask.scale);
    let rows = scratch.probs.chunks_exact_mut(LONG).zip(scratch.dscores.chunks_exact_mut(LONG));
    for (r, (probs, dscores)) in rows.take(pair.n_keys).enumerate() {
        let key = pair.key + r;
        let from = key.saturating_sub(pair.query).min(n);
        let to = plan.end_query(key, pair.query + pair.n_queries).saturating_sub(pair.query);
        let of_query = [&scratch.lse[pair.query..][..n], &scratch.delta[pair.query..][..n]];
        let rows = [&mut probs[..n], &mut dscores[..n]];
        match plan.mask.soft_cap {
            // A value that the compiler sees, so that the loop holds no choice.
            None => score_row(s, None, scale, of_query, rows),
            cap => score_row(s, cap, scale, of_query, rows),
        }
        for x in [probs, dscores] {
            x[..from].fill(0.0);
            x[to.max(from)..].fill(0.0);
        }
    }
}

/// One key against the queries of a tile: scores become probabilities, the gradients of those the
/// gradients of the scores.
#[inline(always)]
fn score_row<S: Simd>(
    s: S,
    cap: Option<f32>,
    scale: S::V,
    [lse, delta]: [&[f32]; 2],
    [probs, dscores]: [&mut [f32]; 2],
) {
    for at in (0..probs.len()).step_by(S::LANES) {
        let score = s.load(&probs[at..]);
        let (score, slope) = match cap {
            Some(cap) => soft_cap(s, cap, score),
            None => (score, s.splat(1.0)),
        };
        let p = exp(s, s.sub(score, s.load(&lse[at..])));
        let d = s.mul(s.mul(p, scale), s.sub(s.load(&dscores[at..]), s.load(&delta[at..])));
        s.store(&mut dscores[at..], if cap.is_some() { s.mul(d, slope) } else { d });
        s.store(&mut probs[at..], p);
    }
}

/// Adds one pair's part to `dq`, `dk` and `dv`.
#[inline(always)]
fn accumulate<S: Simd>(
    s: S,
    plan: Plan,
    saved: Saved<'_>,
    of: HeadOf,
    pair: Pair,
    scratch: &mut Backward,
) {
    let (dim, width) = (plan.heads.dim, plan.heads.qkv_width());
    let out_width = plan.heads.out_width();
    let [q_col, k_col, _] = plan.columns(of.head);
    let q = &saved.qkv[(of.start + pair.query) * width + q_col..];
    let k = &saved.qkv[(of.start + pair.key) * width + k_col..];
    let dout = &saved.dout[(of.start + pair.query) * out_width + of.head * dim..];
    let by_key = Sides { m: pair.n_keys, n: dim, k: pair.n_queries };
    let by_query = Sides { m: pair.n_queries, n: dim, k: pair.n_keys };
    let rows = |data| Left { data, row_stride: LONG, col_stride: 1 };
    let columns = |data| Left { data, row_stride: 1, col_stride: LONG };
    let out = |data| Out { data, stride: dim, add: true };
    let key_at = pair.key * dim;
    let dv = out(&mut scratch.dv[key_at..]);
    product(s, by_key, rows(&scratch.probs), Right { data: dout, stride: out_width }, dv);
    let dk = out(&mut scratch.dk[key_at..]);
    product(s, by_key, rows(&scratch.dscores), Right { data: q, stride: width }, dk);
    let dq = out(&mut scratch.dq[pair.query * dim..]);
    product(s, by_query, columns(&scratch.dscores), Right { data: k, stride: width }, dq);
}

/// See [`crate::Backend::attention_backward`]. Each query head of a group makes its own gradients
/// of keys and values; they are then added in the order of the heads.
#[allow(unsafe_code, reason = "tasks write disjoint columns of the same rows")]
pub(super) fn backward(
    level: Level,
    plan: Plan,
    docs: &[(usize, usize)],
    saved: Saved<'_>,
    dqkv: &mut [f32],
) {
    let Heads { n_q, n_kv, dim } = plan.heads;
    let (width, group) = (plan.heads.qkv_width(), n_q / n_kv);
    let n_tokens: usize = docs.iter().map(|d| d.1).sum();
    let longest = docs.iter().map(|d| d.1).max().unwrap_or(0);
    // With one query head a group its gradients are the sums; else they wait here, (T, H, 2, K).
    let mut parts = vec![0.0; if group == 1 { 0 } else { n_tokens * n_q * 2 * dim }];
    let (whole, part) = (SharedPtr(dqkv.as_mut_ptr()), SharedPtr(parts.as_mut_ptr()));
    heads_of(plan, docs).par_iter().for_each_init(
        || Backward::new(longest, dim),
        |scratch, &of| {
            backward_head(level, plan, saved, of, scratch);
            let [q_col, k_col, v_col] = plan.columns(of.head);
            for i in 0..of.len {
                let t = of.start + i;
                let [k_to, v_to] = if group == 1 {
                    [whole.at(t * width + k_col), whole.at(t * width + v_col)]
                } else {
                    [0, 1].map(|side| part.at(((t * n_q + of.head) * 2 + side) * dim))
                };
                let to = [whole.at(t * width + q_col), k_to, v_to];
                for (from, to) in [&scratch.dq, &scratch.dk, &scratch.dv].into_iter().zip(to) {
                    // SAFETY: the caller has checked that both buffers hold every token; this task
                    // alone writes these columns (of its head, or of its key/value head where it is
                    // the only one) of its document.
                    let to = unsafe { std::slice::from_raw_parts_mut(to, dim) };
                    to.copy_from_slice(&from[i * dim..(i + 1) * dim]);
                }
            }
        },
    );
    if group > 1 {
        let rows =
            dqkv[..n_tokens * width].par_chunks_mut(width).zip(parts.par_chunks(n_q * 2 * dim));
        rows.with_min_len(16).for_each(|(row, parts)| {
            let (keys, values) = row[n_q * dim..].split_at_mut(n_kv * dim);
            let both = keys.chunks_mut(dim).zip(values.chunks_mut(dim));
            for ((key, value), parts) in both.zip(parts.chunks(group * 2 * dim)) {
                key.fill(0.0);
                value.fill(0.0);
                for part in parts.chunks(2 * dim) {
                    key.iter_mut().zip(&part[..dim]).for_each(|(k, p)| *k += p);
                    value.iter_mut().zip(&part[dim..]).for_each(|(v, p)| *v += p);
                }
            }
        });
    }
}
