//! Attention of one new token per sequence against a cache of keys and values.

use rayon::prelude::*;

use super::attention::{Plan, soft_cap};
use super::simd::{Level, exp, simd_fn};
use super::tile::{Left, Out, Right, Sides, product};
use crate::{AttnMask, Heads};

simd_fn! {
    /// One query head against its cache of `len` rows, `stride` apart.
    fn decode_head<s>(
        q: &[f32],
        keys: &[f32],
        values: &[f32],
        stride: usize,
        len: usize,
        mask: AttnMask,
        scores: &mut Vec<f32>,
        out: &mut [f32],
    ) {
        let dim = q.len();
        scores.clear();
        scores.resize(len.next_multiple_of(S::LANES), f32::NEG_INFINITY);
        for (score, key) in scores[..len].iter_mut().zip(keys.chunks(stride)) {
            let mut sum = s.splat(0.0);
            for (q, k) in q.chunks(S::LANES).zip(key[..dim].chunks(S::LANES)) {
                sum = s.fma(s.load_part(q, 0.0), s.load_part(k, 0.0), sum);
            }
            *score = s.sum_lanes(sum) * mask.scale;
        }
        if let Some(cap) = mask.soft_cap {
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
        let sides = Sides { m: 1, n: dim, k: len };
        let probs = Left { data: scores, row_stride: len, col_stride: 1 };
        let right = Right { data: values, stride };
        product(s, sides, probs, right, Out { data: out, stride: dim, add: false });
        let factor = 1.0 / s.sum_lanes(total);
        out.iter_mut().for_each(|o| *o *= factor);
    }
}

/// The caches of keys and values, (B, capacity, G K) each.
#[derive(Clone, Copy)]
pub(super) struct Cache<'a> {
    pub(super) keys: &'a [f32],
    pub(super) values: &'a [f32],
    pub(super) capacity: usize,
    pub(super) lens: &'a [usize],
}

/// See [`crate::Backend::attention_decode`]; `q(b)` gives the query heads of sequence `b`.
pub(super) fn decode<'a>(
    level: Level,
    plan: Plan,
    q: impl Fn(usize) -> &'a [f32] + Sync + Send,
    cache: Cache<'_>,
    out: &mut [f32],
) {
    let Heads { n_q, n_kv, dim } = plan.heads;
    let stride = n_kv * dim;
    let work = |(b, out): (usize, &mut [f32])| {
        let len = cache.lens[b];
        let first = plan.first_key(len - 1);
        let mut scores = Vec::new();
        for (h, out) in out.chunks_mut(dim).enumerate() {
            let at = (b * cache.capacity + first) * stride + h / (n_q / n_kv) * dim;
            let (q, n) = (&q(b)[h * dim..][..dim], len - first);
            let (keys, values) = (&cache.keys[at..], &cache.values[at..]);
            decode_head(level, q, keys, values, stride, n, plan.mask, &mut scores, out);
        }
    };
    // A few thousand multiply-adds a sequence are not worth waking a thread.
    let n_positions: usize = cache.lens.iter().sum();
    if n_positions * n_q * dim < 1 << 16 {
        out.chunks_mut(n_q * dim).enumerate().for_each(work);
    } else {
        out.par_chunks_mut(n_q * dim).enumerate().for_each(work);
    }
}
