//! Attention of the plain twin: three nested loops over queries, keys and values of a head.

use crate::{AttnMask, Heads};

/// Index of the first value of a head's query, key and value in a row of `qkv`.
#[derive(Clone, Copy)]
struct HeadCols {
    q: usize,
    k: usize,
    v: usize,
}

/// Where query head `h` finds its three parts.
fn head_cols(heads: Heads, h: usize) -> HeadCols {
    let kv = h / (heads.n_q / heads.n_kv);
    HeadCols {
        q: h * heads.dim,
        k: (heads.n_q + kv) * heads.dim,
        v: (heads.n_q + heads.n_kv + kv) * heads.dim,
    }
}

/// The first key that query `i` sees.
fn first_key(mask: AttnMask, i: usize) -> usize {
    mask.window.map_or(0, |w| (i + 1).saturating_sub(w))
}

/// The score of a scalar product, and its slope: s = scale q.k, or c tanh(s / c) of it.
fn score(mask: AttnMask, product: f64) -> (f64, f64) {
    let scale = f64::from(mask.scale);
    let Some(cap) = mask.soft_cap.map(f64::from) else {
        return (scale * product, scale);
    };
    let t = (scale * product / cap).tanh();
    (cap * t, scale * (1.0 - t * t))
}

/// Scalar product of `n` values.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// Exponentials of one row of scores below their maximum, their sum, and the log-sum-exp.
fn exponentials(scores: &[f64]) -> (Vec<f64>, f64, f64) {
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exponentials: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let sum: f64 = exponentials.iter().sum();
    (exponentials, sum, max + sum.ln())
}

/// See [`crate::Backend::attention`]; `docs` holds the start and length of each document, `qkv` is
/// rounded, and `round` is what factors of products go through: exponentials are rounded before
/// they are divided by their sum.
pub(super) fn forward(
    qkv: &[f64],
    heads: Heads,
    docs: &[(usize, usize)],
    mask: AttnMask,
    round: impl Fn(f64) -> f64,
    out: &mut [f64],
    lse: &mut [f64],
) {
    let (width, dim) = (heads.qkv_width(), heads.dim);
    for &(start, len) in docs {
        for h in 0..heads.n_q {
            let cols = head_cols(heads, h);
            for i in 0..len {
                let q = &qkv[(start + i) * width + cols.q..][..dim];
                let keys = first_key(mask, i)..i + 1;
                let scores: Vec<f64> = (keys.clone())
                    .map(|j| score(mask, dot(q, &qkv[(start + j) * width + cols.k..][..dim])).0)
                    .collect();
                let (exponentials, sum, row_lse) = exponentials(&scores);
                lse[(start + i) * heads.n_q + h] = row_lse;
                let row = &mut out[(start + i) * heads.out_width() + h * dim..][..dim];
                row.fill(0.0);
                for (j, e) in keys.zip(exponentials) {
                    let p = round(e) / sum;
                    let v = &qkv[(start + j) * width + cols.v..][..dim];
                    row.iter_mut().zip(v).for_each(|(o, v)| *o += p * v);
                }
            }
        }
    }
}

/// The inputs of the backward that are only read.
pub(super) struct Saved<'a> {
    pub(super) dout: &'a [f64],
    /// The same as a factor of products; `qkv` is rounded, too.
    pub(super) dout_rounded: &'a [f64],
    pub(super) qkv: &'a [f64],
    pub(super) out: &'a [f64],
    pub(super) lse: &'a [f64],
}

/// See [`crate::Backend::attention_backward`]. With p the probabilities and d = dout . out:
/// ds = p (dout . v - d), dq = slope ds k, dk = slope ds q, dv = p dout, the slope being that of
/// [`score`].
pub(super) fn backward(
    saved: &Saved<'_>,
    heads: Heads,
    docs: &[(usize, usize)],
    mask: AttnMask,
    round: impl Fn(f64) -> f64,
    dqkv: &mut [f64],
) {
    let (width, dim) = (heads.qkv_width(), heads.dim);
    for &(start, len) in docs {
        dqkv[start * width..(start + len) * width].fill(0.0);
        for h in 0..heads.n_q {
            let cols = head_cols(heads, h);
            for i in 0..len {
                let q_at = (start + i) * width + cols.q;
                let o_at = (start + i) * heads.out_width() + h * dim;
                let delta = dot(&saved.dout[o_at..][..dim], &saved.out[o_at..][..dim]);
                let dout = &saved.dout_rounded[o_at..][..dim];
                let lse = saved.lse[(start + i) * heads.n_q + h];
                for j in first_key(mask, i)..i + 1 {
                    let (k_at, v_at) = ((start + j) * width + cols.k, (start + j) * width + cols.v);
                    let product = dot(&saved.qkv[q_at..][..dim], &saved.qkv[k_at..][..dim]);
                    let (score, slope) = score(mask, product);
                    let p = (score - lse).exp();
                    let ds = round(slope * p * (dot(dout, &saved.qkv[v_at..][..dim]) - delta));
                    let p = round(p);
                    for c in 0..dim {
                        dqkv[q_at + c] += ds * saved.qkv[k_at + c];
                        dqkv[k_at + c] += ds * saved.qkv[q_at + c];
                        dqkv[v_at + c] += p * dout[c];
                    }
                }
            }
        }
    }
}

/// See [`crate::Backend::attention_decode`]; `q` gives the query rows.
pub(super) fn decode<'a>(
    q: impl Fn(usize) -> &'a [f64],
    (k_cache, v_cache): (&[f64], &[f64]),
    capacity: usize,
    lens: &[usize],
    heads: Heads,
    mask: AttnMask,
    out: &mut [f64],
) {
    let (dim, kv_width) = (heads.dim, heads.n_kv * heads.dim);
    for (b, &len) in lens.iter().enumerate() {
        for h in 0..heads.n_q {
            let kv = h / (heads.n_q / heads.n_kv);
            let at = |j: usize| (b * capacity + j) * kv_width + kv * dim;
            let query = &q(b)[h * dim..][..dim];
            let keys = first_key(mask, len.saturating_sub(1))..len;
            let scores: Vec<f64> = (keys.clone())
                .map(|j| score(mask, dot(query, &k_cache[at(j)..][..dim])).0)
                .collect();
            let (exponentials, sum, _) = exponentials(&scores);
            let row = &mut out[b * heads.out_width() + h * dim..][..dim];
            row.fill(0.0);
            for (j, e) in keys.zip(exponentials) {
                let p = e / sum;
                row.iter_mut().zip(&v_cache[at(j)..][..dim]).for_each(|(o, v)| *o += p * v);
            }
        }
    }
}
