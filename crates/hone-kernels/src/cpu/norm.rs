//! RMSNorm and rotary positions.

use std::borrow::Cow;

use rayon::prelude::*;

use super::ahead;
use super::par::{self, task_rows};
use super::pointwise::{copy_piece, extent};
use super::simd::{Level, Simd, simd_fn};
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
        let (r, lanes) = (s.splat(r), S::LANES);
        let (mut xs, mut ws) = (x.chunks_exact(lanes), w.chunks_exact(lanes));
        let mut ys = y.chunks_exact_mut(lanes);
        for ((x, w), y) in (&mut xs).zip(&mut ws).zip(&mut ys) {
            Y::store(s, y, s.mul(s.mul(X::load(s, x), r), s.load(w)));
        }
        let (x, w, y) = (xs.remainder(), ws.remainder(), ys.into_remainder());
        Y::store(s, y, s.mul(s.mul(X::load(s, x), r), s.load_part(w, 0.0)));
    }
}

/// z = dy w and n = x r of a vector of a row.
#[inline(always)]
fn slopes<S: Simd, G: Value, X: Value>(
    s: S,
    (dy, x, w): (&[G], &[X], &[f32]),
    r: S::V,
) -> (S::V, S::V) {
    (s.mul(G::load(s, dy), s.load_part(w, 0.0)), s.mul(X::load(s, x), r))
}

simd_fn! {
    /// `dx <- dx + r (z - n mean(z n))` on a row, with z = dy w and n = x r; `dw <- dw + dy n`
    /// unless it is empty.
    fn backward_row<s, G: Value, X: Value, D: Value>(
        dy: &[G],
        x: &[X],
        w: &[f32],
        r: f32,
        dx: &mut [D],
        dw: &mut [f32],
    ) {
        let (lanes, factor) = (S::LANES, s.splat(r));
        let [mut even, mut odd] = [s.splat(0.0); 2];
        let mut pairs = x.chunks_exact(2 * lanes);
        let whole = dy.chunks_exact(2 * lanes).zip(&mut pairs).zip(w.chunks_exact(2 * lanes));
        for ((dy, x), w) in whole {
            let (z, n) = slopes(s, (&dy[..lanes], &x[..lanes], &w[..lanes]), factor);
            even = s.fma(z, n, even);
            let (z, n) = slopes(s, (&dy[lanes..], &x[lanes..], &w[lanes..]), factor);
            odd = s.fma(z, n, odd);
        }
        let rest = x.len() - pairs.remainder().len();
        let (rest_dy, rest_w) = (dy[rest..].chunks(lanes), w[rest..].chunks(lanes));
        let mut rest = rest_dy.zip(x[rest..].chunks(lanes)).zip(rest_w);
        if let Some(((dy, x), w)) = rest.next() {
            let (z, n) = slopes(s, (dy, x, w), factor);
            even = s.fma(z, n, even);
        }
        if let Some(((dy, x), w)) = rest.next() {
            let (z, n) = slopes(s, (dy, x, w), factor);
            odd = s.fma(z, n, odd);
        }
        let mean = s.splat(s.sum_lanes(s.add(even, odd)) / -(x.len() as f32));
        let (mut dys, mut xs) = (dy.chunks_exact(lanes), x.chunks_exact(lanes));
        let (mut ws, mut dxs) = (w.chunks_exact(lanes), dx.chunks_exact_mut(lanes));
        for (((dy, x), w), dx) in (&mut dys).zip(&mut xs).zip(&mut ws).zip(&mut dxs) {
            let (z, n) = slopes(s, (dy, x, w), factor);
            let old = D::load(s, dx);
            D::store(s, dx, s.fma(factor, s.fma(n, mean, z), old));
        }
        let dx = dxs.into_remainder();
        let (z, n) = slopes(s, (dys.remainder(), xs.remainder(), ws.remainder()), factor);
        let old = D::load(s, dx);
        D::store(s, dx, s.fma(factor, s.fma(n, mean, z), old));
        for ((dw, dy), x) in dw.iter_mut().zip(dy).zip(x) {
            *dw += dy.get() * (x.get() * r);
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

/// Pieces of `size` values, `n` of them; all empty where `x` is.
fn pieces<T>(x: &mut [T], size: usize, n: usize) -> Vec<&mut [T]> {
    let mut pieces = x.chunks_mut(size);
    (0..n).map(|_| pieces.next().unwrap_or_default()).collect()
}

/// See [`crate::Backend::rms_norm_backward`]; `dw`'s sums of each task are added in the order of
/// the tasks. dx once more and the norm's output are empty where they are not asked for.
pub(super) fn backward<G: Value, D: Value, Y: Value>(
    level: Level,
    (dy, [x, w, r]): (&[G], [&[f32]; 3]),
    norm: RmsNorm,
    (dx, again, y): (&mut [f32], &mut [D], &mut [Y]),
    dw: Option<&mut [f32]>,
) {
    let w = &*factors(w, norm);
    let d = w.len();
    let (rows, n_tasks) = (task_rows(d), dx.len().div_ceil(task_rows(d) * d));
    let n_dw = if dw.is_some() { d } else { 0 };
    let outputs = pieces(dx, rows * d, n_tasks).into_par_iter();
    let more = pieces(again, rows * d, n_tasks).into_par_iter().zip(pieces(y, rows * d, n_tasks));
    let sums: Vec<Vec<f32>> = (outputs.zip(more).enumerate())
        .map(|(t, (dx, (again, y)))| {
            let mut sum = vec![0.0; n_dw];
            let at = t * rows * d;
            let inputs = dy[at..].chunks(d).zip(x[at..].chunks(d)).zip(&r[t * rows..]);
            let (mut again, mut y) = (again.chunks_mut(d), y.chunks_mut(d));
            for (dx, ((dy, x), &r)) in dx.chunks_mut(d).zip(inputs) {
                ahead::ask(dy, d);
                ahead::ask(x, d);
                ahead::ask(dx, d);
                backward_row(level, dy, x, w, r, dx, &mut sum);
                if let Some(again) = again.next() {
                    copy_piece(level, dx, again);
                }
                if let Some(y) = y.next() {
                    scale_row(level, x, w, r, y);
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
