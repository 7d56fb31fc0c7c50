//! Attention of one new token per sequence against a cache of keys and values.

use std::cell::Cell;

use rayon::prelude::*;

use super::attention::{Plan, soft_cap};
use super::simd::{Level, MAX_LANES, Simd, exp, simd_fn};
use super::tile::{Left, Out, Right, Sides, product};
use super::value::Value;
use crate::{AttnMask, Heads};

thread_local! {
    /// The scores of a task, kept from call to call.
    static SCORES: Cell<Vec<f32>> = Cell::default();
}

simd_fn! {
    /// The query heads `q` (R K) that share a key head against its cache of `len` rows, `stride`
    /// apart; K is `dim`.
    fn decode_heads<s, X: Value>(
        q: &[f32],
        dim: usize,
        keys: &[X],
        values: &[X],
        stride: usize,
        len: usize,
        mask: AttnMask,
        scores: &mut Vec<f32>,
        out: &mut [f32],
    ) {
        let (row, n_heads) = (len.next_multiple_of(S::LANES), q.len() / dim);
        scores.clear();
        scores.resize(n_heads * (row + 1) + S::LANES * dim, 0.0);
        let (scores, turned) = scores.split_at_mut(n_heads * (row + 1));
        let (scores, factors) = scores.split_at_mut(n_heads * row);
        for start in (0..len).step_by(S::LANES) {
            let block = &keys[start * stride..];
            turn_keys(s, block, (len - start).min(S::LANES), stride, (turned, dim));
            for (q, scores) in q.chunks_exact(dim).zip(scores.chunks_exact_mut(row)) {
                let mut sums = [s.splat(0.0); 4];
                for (d, (&q, keys)) in q.iter().zip(turned.chunks_exact(S::LANES)).enumerate() {
                    sums[d % 4] = s.fma(s.splat(q), s.load(keys), sums[d % 4]);
                }
                let sum = s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3]));
                s.store(&mut scores[start..], s.mul(sum, s.splat(mask.scale)));
            }
        }
        for (scores, factor) in scores.chunks_exact_mut(row).zip(&mut *factors) {
            scores[len..].fill(f32::NEG_INFINITY);
            *factor = 1.0 / softmax(s, scores, len, mask.soft_cap);
        }
        let sides = Sides { m: n_heads, n: dim, k: len };
        let probs = Left { data: scores, row_stride: row, col_stride: 1 };
        let right = Right { data: values, stride };
        product(s, sides, probs, right, Out { data: out, stride: dim, add: false });
        for (out, factor) in out.chunks_exact_mut(dim).zip(factors) {
            out.iter_mut().for_each(|o| *o *= *factor);
        }
    }
}

/// `turned` (K, lanes) <- the first `n` rows of `keys` as columns, zeros behind them.
#[inline(always)]
fn turn_keys<S: Simd, X: Value>(
    s: S,
    keys: &[X],
    n: usize,
    stride: usize,
    (turned, dim): (&mut [f32], usize),
) {
    for (start, turned) in (0..dim).step_by(S::LANES).zip(turned.chunks_mut(S::LANES * S::LANES)) {
        let mut square = [s.splat(0.0); MAX_LANES];
        for (i, lanes) in square.iter_mut().enumerate().take(n) {
            *lanes = X::load(s, &keys[i * stride + start..][..(dim - start).min(S::LANES)]);
        }
        s.turn(&mut square);
        for (turned, lanes) in turned.chunks_exact_mut(S::LANES).zip(square) {
            s.store(turned, lanes);
        }
    }
}

/// exp of scores less their maximum, and the sum of it; behind `len` scores are minus infinity.
#[inline(always)]
fn softmax<S: Simd>(s: S, scores: &mut [f32], len: usize, cap: Option<f32>) -> f32 {
    if let Some(cap) = cap {
        for scores in scores[..len].chunks_mut(S::LANES) {
            s.store_part(scores, soft_cap(s, cap, s.load_part(scores, 0.0)).0);
        }
    }
    let larger = |max: f32, &score: &f32| if score > max { score } else { max };
    let max = scores[..len].iter().fold(f32::MIN, larger);
    let (shift, mut total) = (s.splat(max), s.splat(0.0));
    for scores in scores.chunks_exact_mut(S::LANES) {
        let p = exp(s, s.sub(s.load(scores), shift));
        total = s.add(total, p);
        s.store(scores, p);
    }
    s.sum_lanes(total)
}

/// The caches of keys and values, (B, capacity, G K) each.
#[derive(Clone, Copy)]
pub(super) struct Cache<'a, X> {
    pub(super) keys: &'a [X],
    pub(super) values: &'a [X],
    pub(super) capacity: usize,
    pub(super) lens: &'a [usize],
}

/// See [`crate::Backend::attention_decode`]; `q(b)` gives the query heads of sequence `b`.
pub(super) fn decode<'a, X: Value>(
    level: Level,
    plan: Plan,
    q: impl Fn(usize) -> &'a [f32] + Sync + Send,
    cache: Cache<'_, X>,
    out: &mut [f32],
) {
    let Heads { n_q, n_kv, dim } = plan.heads;
    let stride = n_kv * dim;
    let shared = n_q / n_kv * dim;
    let work = |(task, out): (usize, &mut [f32])| {
        let (b, head) = (task / n_kv, task % n_kv);
        let len = cache.lens[b];
        let first = plan.first_key(len - 1);
        let at = (b * cache.capacity + first) * stride + head * dim;
        let (q, n) = (&q(b)[head * shared..][..shared], len - first);
        let (keys, values) = (&cache.keys[at..], &cache.values[at..]);
        let mut scores = SCORES.take();
        decode_heads(level, q, dim, keys, values, stride, n, plan.mask, &mut scores, out);
        SCORES.set(scores);
    };
    // A few thousand multiply-adds a head are not worth waking a thread.
    let n_positions: usize = cache.lens.iter().sum();
    if n_positions * n_q * dim < 1 << 16 {
        out.chunks_mut(shared).enumerate().for_each(work);
    } else {
        out.par_chunks_mut(shared).enumerate().for_each(work);
    }
}
