//! RMSNorm and rotary positions.

use std::borrow::Cow;

use rayon::prelude::*;

use super::ahead;
use super::par::{self, task_rows};
use super::pointwise::extent;
use super::simd::{Level, simd_fn};
use super::value::Value;
use crate::shape::Layout;
use crate::{Heads, RmsNorm};

simd_fn! {
    /// Sum of the products of two rows, in four interleaved sums.
    pub(super) fn dot<s, A: Value>(a: &[A], b: &[A]) -> f32 {
        let mut sums = [s.splat(0.0); 4];
        let (mut a, mut b) = (a.chunks_exact(4 * S::LANES), b.chunks_exact(4 * S::LANES));
        for (a, b) in (&mut a).zip(&mut b) {
            for (i, sum) in sums.iter_mut().enumerate() {
                let at = i * S::LANES;
                *sum = s.fma(A::load(s, &a[at..]), A::load(s, &b[at..]), *sum);
            }
        }
        let rest = a.remainder().chunks(S::LANES).zip(b.remainder().chunks(S::LANES));
        for (i, (a, b)) in rest.enumerate() {
            sums[i] = s.fma(A::load(s, a), A::load(s, b), sums[i]);
        }
        s.sum_lanes(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])))
    }
}

simd_fn! {
    /// `y <- x r w` on rows.
    fn scale_row<s, X: Value, Y: Value>(x: &[X], w: &[f32], r: f32, y: &mut [Y]) {
        let r = s.splat(r);
        let rows = x.chunks(S::LANES).zip(w.chunks(S::LANES)).zip(y.chunks_mut(S::LANES));
        for ((x, w), y) in rows {
            Y::store(s, y, s.mul(s.mul(X::load(s, x), r), s.load_part(w, 0.0)));
        }
    }
}

simd_fn! {
    /// `dx <- dx + r (z - n mean(z n))` on a row, with z = dy w and n = x r; `dw <- dw + dy n`
    /// unless it is empty.
    fn backward_row<s, X: Value, D: Value>(
        dy: &[f32],
        x: &[X],
        w: &[f32],
        r: f32,
        dx: &mut [D],
        dw: &mut [f32],
    ) {
        let lanes = S::LANES;
        let (factor, mut sums) = (s.splat(r), [s.splat(0.0); 2]);
        let rows = dy.chunks(lanes).zip(x.chunks(lanes)).zip(w.chunks(lanes));
        for (i, ((dy, x), w)) in rows.clone().enumerate() {
            let z = s.mul(s.load_part(dy, 0.0), s.load_part(w, 0.0));
            let n = s.mul(X::load(s, x), factor);
            sums[i % 2] = s.fma(z, n, sums[i % 2]);
        }
        let mean = s.splat(s.sum_lanes(s.add(sums[0], sums[1])) / -(x.len() as f32));
        for (((dy, x), w), dx) in rows.zip(dx.chunks_mut(lanes)) {
            let z = s.mul(s.load_part(dy, 0.0), s.load_part(w, 0.0));
            let n = s.mul(X::load(s, x), factor);
            let old = D::load(s, dx);
            D::store(s, dx, s.fma(factor, s.fma(n, mean, z), old));
        }
        for ((dw, dy), x) in dw.iter_mut().zip(dy).zip(x) {
            *dw += dy * (x.get() * r);
        }
    }
}

simd_fn! {
    /// Rotates the first columns of each head, `dim` wide: as many as twice the cosines, in halves.
    fn rotate<s, X: Value>(heads: &mut [X], dim: usize, cos: &[f32], sin: &[f32], sign: f32) {
        let (sign, lanes) = (s.splat(sign), S::LANES);
        for head in heads.chunks_mut(dim) {
            let (a, rest) = head.split_at_mut(cos.len());
            let halves = a.chunks_mut(lanes).zip(rest[..cos.len()].chunks_mut(lanes));
            for ((a, b), (cos, sin)) in halves.zip(cos.chunks(lanes).zip(sin.chunks(lanes))) {
                let (x, y) = (X::load(s, a), X::load(s, b));
                let (cos, sin) = (s.load_part(cos, 0.0), s.mul(sign, s.load_part(sin, 0.0)));
                X::store(s, a, s.sub(s.mul(x, cos), s.mul(y, sin)));
                X::store(s, b, s.add(s.mul(y, cos), s.mul(x, sin)));
            }
        }
    }
}

/// 1 / sqrt(mean(x^2) + eps); squares too large for f32 are summed in f64.
fn inverse_root<X: Value>(level: Level, x: &[X], eps: f32) -> f32 {
    let mean = dot(level, x, x) / x.len() as f32;
    if mean.is_finite() {
        return 1.0 / (mean + eps).sqrt();
    }
    let squares: f64 = x.iter().map(|x| f64::from(x.get()).powi(2)).sum();
    (1.0 / (squares / x.len() as f64 + f64::from(eps)).sqrt()) as f32
}

/// The factors of a norm: its weight plus the offset.
fn factors(w: &[f32], norm: RmsNorm) -> Cow<'_, [f32]> {
    if norm.offset == 0.0 {
        return Cow::Borrowed(w);
    }
    w.iter().map(|w| w + norm.offset).collect()
}

/// See [`crate::Backend::rms_norm`].
pub(super) fn forward<Y: Value>(
    level: Level,
    x: &[f32],
    w: &[f32],
    norm: RmsNorm,
    y: &mut [Y],
    r: &mut [f32],
) {
    let w = &*factors(w, norm);
    let d = w.len();
    let rows = task_rows(d);
    y.par_chunks_mut(rows * d).zip(r.par_chunks_mut(rows)).enumerate().for_each(|(t, (y, r))| {
        let x = &x[t * rows * d..];
        for ((y, x), r) in y.chunks_mut(d).zip(x.chunks(d)).zip(r) {
            *r = inverse_root(level, x, norm.eps);
            scale_row(level, x, w, *r, y);
        }
    });
}

/// See [`crate::Backend::rms_norm_backward`]; `dw`'s sums of each task are added in the order of
/// the tasks.
pub(super) fn backward(
    level: Level,
    [dy, x, w, r]: [&[f32]; 4],
    norm: RmsNorm,
    dx: &mut [f32],
    dw: Option<&mut [f32]>,
) {
    let w = &*factors(w, norm);
    let d = w.len();
    let rows = task_rows(d);
    let n_dw = if dw.is_some() { d } else { 0 };
    let sums: Vec<Vec<f32>> = (dx.par_chunks_mut(rows * d).enumerate())
        .map(|(t, dx)| {
            let mut sum = vec![0.0; n_dw];
            let at = t * rows * d;
            let inputs = dy[at..].chunks(d).zip(x[at..].chunks(d)).zip(&r[t * rows..]);
            for (dx, ((dy, x), &r)) in dx.chunks_mut(d).zip(inputs) {
                ahead::ask(dy, d);
                ahead::ask(x, d);
                ahead::ask(dx, d);
                backward_row(level, dy, x, w, r, dx, &mut sum);
            }
            sum
        })
        .collect();
    if let Some(dw) = dw {
        for sum in sums {
            dw.iter_mut().zip(sum).for_each(|(dw, s)| *dw += s);
        }
    }
}

/// See [`crate::Backend::group_norm`]; `w` is the width.
pub(super) fn group_forward<X: Value>(
    level: Level,
    l: Layout,
    x: &mut [X],
    w: &[f32],
    norm: RmsNorm,
    raw: &mut [X],
) {
    let w = &*factors(w, norm);
    let rows = task_rows(l.cols);
    let tasks = extent(l, x).par_chunks_mut(rows * l.stride).zip(raw.par_chunks_mut(rows * l.cols));
    tasks.for_each(|(x, raw)| {
        for (x, raw) in x.chunks_mut(l.stride).zip(raw.chunks_mut(l.cols)) {
            raw.copy_from_slice(&x[..l.cols]);
            for (y, x) in x[..l.cols].chunks_mut(w.len()).zip(raw.chunks(w.len())) {
                scale_row(level, x, w, inverse_root(level, x, norm.eps), y);
            }
        }
    });
}

/// See [`crate::Backend::group_norm_backward`]; `dw`'s sums of each task are added in the order of
/// the tasks.
pub(super) fn group_backward<D: Value, X: Value>(
    level: Level,
    l: Layout,
    dy: &mut [D],
    (raw, w): (&[X], &[f32]),
    norm: RmsNorm,
    dw: Option<&mut [f32]>,
) {
    let w = &*factors(w, norm);
    let (width, rows) = (w.len(), task_rows(l.cols));
    let n_dw = if dw.is_some() { width } else { 0 };
    let tasks = extent(l, dy).par_chunks_mut(rows * l.stride).zip(raw.par_chunks(rows * l.cols));
    let sums: Vec<Vec<f32>> = tasks
        .map(|(dy, raw)| {
            let (mut sum, mut old) = (vec![0.0; n_dw], vec![0.0; width]);
            for (dy, raw) in dy.chunks_mut(l.stride).zip(raw.chunks(l.cols)) {
                for (dx, x) in dy[..l.cols].chunks_mut(width).zip(raw.chunks(width)) {
                    old.iter_mut().zip(&mut *dx).for_each(|(old, dy)| {
                        *old = dy.get();
                        *dy = D::ZERO;
                    });
                    let r = inverse_root(level, x, norm.eps);
                    backward_row(level, &old, x, w, r, dx, &mut sum);
                }
            }
            sum
        })
        .collect();
    if let Some(dw) = dw {
        for sum in sums {
            dw.iter_mut().zip(sum).for_each(|(dw, s)| *dw += s);
        }
    }
}

/// See [`crate::Backend::rope`]; `rotary` = R columns of each head are rotated.
pub(super) fn rope<X: Value>(
    level: Level,
    qkv: &mut [X],
    heads: Heads,
    rotary: usize,
    positions: &[u32],
    cos_sin: &[f32],
    inverse: bool,
) {
    let (width, dim) = (heads.qkv_width(), heads.dim);
    let rows = task_rows(width);
    let sign = if inverse { -1.0 } else { 1.0 };
    par::pieces(qkv, rows * width, |t, piece| {
        for (row, &p) in piece.chunks_mut(width).zip(&positions[t * rows..]) {
            let (cos, sin) = cos_sin[p as usize * rotary..][..rotary].split_at(rotary / 2);
            ahead::ask(row, width);
            rotate(level, &mut row[..(heads.n_q + heads.n_kv) * dim], dim, cos, sin, sign);
        }
    });
}
