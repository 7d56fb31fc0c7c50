//! Operators that treat each value by itself: sums, scaling, bias, dropout, SwiGLU.

use rayon::prelude::*;

use super::par::{self, TASK_VALUES, task_rows};
use super::simd::{Level, Simd, exp, simd_fn, tanh};
use crate::rng;
use crate::shape::Layout;

simd_fn! {
    /// `y <- y + x`.
    fn add_piece<_s>(x: &[f32], y: &mut [f32]) {
        y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
    }
}

simd_fn! {
    /// `x <- s x`.
    pub(super) fn scale_piece<_s>(x: &mut [f32], factor: f32) {
        x.iter_mut().for_each(|x| *x *= factor);
    }
}

simd_fn! {
    /// A row of SwiGLU.
    fn swiglu_row<s>(gate: &[f32], up: &[f32], h: &mut [f32]) {
        let one = s.splat(1.0);
        let rows = gate.chunks(S::LANES).zip(up.chunks(S::LANES)).zip(h.chunks_mut(S::LANES));
        for ((gate, up), h) in rows {
            let (gate, up) = (s.load_part(gate, 0.0), s.load_part(up, 0.0));
            let sigmoid = s.div(one, s.add(one, exp(s, s.sub(s.splat(0.0), gate))));
            s.store_part(h, s.mul(s.mul(gate, sigmoid), up));
        }
    }
}

simd_fn! {
    /// A row of SwiGLU's backward: gates and ups become their gradients.
    fn swiglu_backward_row<s>(dh: &[f32], gate: &mut [f32], up: &mut [f32]) {
        let one = s.splat(1.0);
        let rows = dh.chunks(S::LANES).zip(gate.chunks_mut(S::LANES)).zip(up.chunks_mut(S::LANES));
        for ((dh, gate_at), up_at) in rows {
            let (dh, gate, up) =
                (s.load_part(dh, 0.0), s.load_part(gate_at, 0.0), s.load_part(up_at, 0.0));
            let sigmoid = s.div(one, s.add(one, exp(s, s.sub(s.splat(0.0), gate))));
            let slope = s.mul(sigmoid, s.fma(gate, s.sub(one, sigmoid), one));
            s.store_part(gate_at, s.mul(s.mul(dh, up), slope));
            s.store_part(up_at, s.mul(dh, s.mul(gate, sigmoid)));
        }
    }
}

/// sqrt(2 / pi), the slope of u at 0 in the tanh formula of GELU.
const GELU_SLOPE: f32 = 0.797_884_6;

/// The cubic's share in that u.
const GELU_CUBIC: f32 = 0.044_715;

/// From here on tanh(u) is 1 in f32, so that a gate may be held at it where only tanh(u) and its
/// slope matter: cubes of large gates would overflow.
const GELU_FLAT: f32 = 8.0;

/// The gate held at [`GELU_FLAT`], and tanh(u) of it.
#[inline(always)]
fn gelu_tanh<S: Simd>(s: S, gate: S::V) -> (S::V, S::V) {
    let flat = s.splat(GELU_FLAT);
    let x = s.max(s.sub(s.splat(0.0), flat), s.min(flat, gate));
    let cubic = s.fma(s.mul(s.splat(GELU_CUBIC), x), s.mul(x, x), x);
    (x, tanh(s, s.mul(s.splat(GELU_SLOPE), cubic)))
}

simd_fn! {
    /// A row of GeGLU.
    fn geglu_row<s>(gate: &[f32], up: &[f32], h: &mut [f32]) {
        let (one, half) = (s.splat(1.0), s.splat(0.5));
        let rows = gate.chunks(S::LANES).zip(up.chunks(S::LANES)).zip(h.chunks_mut(S::LANES));
        for ((gate, up), h) in rows {
            let (gate, up) = (s.load_part(gate, 0.0), s.load_part(up, 0.0));
            let share = s.mul(half, s.add(one, gelu_tanh(s, gate).1));
            s.store_part(h, s.mul(s.mul(gate, share), up));
        }
    }
}

simd_fn! {
    /// A row of GeGLU's backward: gates and ups become their gradients.
    fn geglu_backward_row<s>(dh: &[f32], gate: &mut [f32], up: &mut [f32]) {
        let (one, half) = (s.splat(1.0), s.splat(0.5));
        let rows = dh.chunks(S::LANES).zip(gate.chunks_mut(S::LANES)).zip(up.chunks_mut(S::LANES));
        for ((dh, gate_at), up_at) in rows {
            let (dh, gate, up) =
                (s.load_part(dh, 0.0), s.load_part(gate_at, 0.0), s.load_part(up_at, 0.0));
            let (x, t) = gelu_tanh(s, gate);
            let share = s.mul(half, s.add(one, t));
            let rise = s.fma(s.splat(3.0 * GELU_CUBIC), s.mul(x, x), one);
            let du = s.mul(s.splat(GELU_SLOPE), rise);
            let bend = s.mul(s.sub(one, t), s.add(one, t));
            let slope = s.fma(s.mul(s.mul(half, x), bend), du, share);
            s.store_part(gate_at, s.mul(s.mul(dh, up), slope));
            s.store_part(up_at, s.mul(dh, s.mul(gate, share)));
        }
    }
}

simd_fn! {
    /// `x <- cap tanh(x / cap)`.
    pub(super) fn soft_cap_piece<s>(x: &mut [f32], cap: f32) {
        let (cap, inverse) = (s.splat(cap), s.splat(1.0 / cap));
        for x in x.chunks_mut(S::LANES) {
            let y = s.mul(cap, tanh(s, s.mul(s.load_part(x, 0.0), inverse)));
            s.store_part(x, y);
        }
    }
}

/// See [`crate::Backend::copy`].
pub(super) fn copy(x: &[f32], y: &mut [f32]) {
    par::pieces(y, TASK_VALUES, |t, y| y.copy_from_slice(&x[t * TASK_VALUES..][..y.len()]));
}

/// See [`crate::Backend::add`].
pub(super) fn add(level: Level, x: &[f32], y: &mut [f32]) {
    par::pieces(y, TASK_VALUES, |t, y| add_piece(level, &x[t * TASK_VALUES..][..y.len()], y));
}

/// See [`crate::Backend::scale`].
pub(super) fn scale(level: Level, x: &mut [f32], factor: f32) {
    par::pieces(x, TASK_VALUES, |_, x| scale_piece(level, x, factor));
}

/// The part of a buffer from the first to one past the last value of a view's rows.
pub(super) fn extent(l: Layout, buf: &mut [f32]) -> &mut [f32] {
    let end = crate::shape::end(l.offset, l.rows, l.cols, l.stride);
    &mut buf[l.offset.min(end)..end]
}

/// Calls `f(i, row)` for each row of a view.
pub(super) fn rows_mut(l: Layout, buf: &mut [f32], f: impl Fn(usize, &mut [f32]) + Sync + Send) {
    let rows = task_rows(l.cols);
    let stride = l.stride.max(1);
    par::pieces(extent(l, buf), rows * stride, |t, piece| {
        for (i, row) in piece.chunks_mut(stride).enumerate() {
            f(t * rows + i, &mut row[..l.cols]);
        }
    });
}

/// See [`crate::Backend::add_bias`].
pub(super) fn add_bias(level: Level, l: Layout, y: &mut [f32], bias: &[f32]) {
    rows_mut(l, y, |_, row| add_piece(level, bias, row));
}

/// See [`crate::Backend::bias_grad`].
pub(super) fn bias_grad(level: Level, l: Layout, dy: &[f32], dbias: &mut [f32]) {
    let rows = task_rows(l.cols);
    let sums = par::map(l.rows.div_ceil(rows), |t| {
        let mut sum = vec![0.0; l.cols];
        for i in t * rows..((t + 1) * rows).min(l.rows) {
            add_piece(level, &dy[l.row(i)..][..l.cols], &mut sum);
        }
        sum
    });
    sums.iter().for_each(|sum| add_piece(level, sum, dbias));
}

/// See [`crate::Backend::dropout`].
pub(super) fn dropout(lx: Layout, x: &[f32], ly: Layout, y: &mut [f32], p: f32, seed: u64) {
    if p == 0.0 {
        // Nothing is dropped: a copy from view to view.
        return rows_mut(ly, y, |i, row| row.copy_from_slice(&x[lx.row(i)..][..lx.cols]));
    }
    let (stream, below, factor) = (rng::stream(seed), rng::drop_below(p), 1.0 / (1.0 - p));
    rows_mut(ly, y, |i, row| {
        let first = (i * lx.cols) as u64;
        for (j, (y, x)) in row.iter_mut().zip(&x[lx.row(i)..]).enumerate() {
            let kept = rng::draw(stream, first + j as u64) >> 32 >= below;
            *y = if kept { x * factor } else { 0.0 };
        }
    });
}

/// See [`crate::Backend::swiglu`].
pub(super) fn swiglu(level: Level, gate_up: &[f32], i: usize, h: &mut [f32]) {
    let rows = task_rows(i);
    par::pieces(h, rows * i, |t, piece| {
        for (h, gate_up) in piece.chunks_mut(i).zip(gate_up[t * rows * 2 * i..].chunks(2 * i)) {
            swiglu_row(level, &gate_up[..i], &gate_up[i..], h);
        }
    });
}

/// See [`crate::Backend::swiglu_backward`].
pub(super) fn swiglu_backward(level: Level, dh: &[f32], i: usize, gate_up: &mut [f32]) {
    let rows = task_rows(i);
    par::pieces(gate_up, rows * 2 * i, |t, piece| {
        for (gate_up, dh) in piece.chunks_mut(2 * i).zip(dh[t * rows * i..].chunks(i)) {
            let (gate, up) = gate_up.split_at_mut(i);
            swiglu_backward_row(level, dh, gate, up);
        }
    });
}

/// See [`crate::Backend::geglu`].
pub(super) fn geglu(level: Level, gate_up: &[f32], i: usize, h: &mut [f32]) {
    let rows = task_rows(i);
    par::pieces(h, rows * i, |t, piece| {
        for (h, gate_up) in piece.chunks_mut(i).zip(gate_up[t * rows * 2 * i..].chunks(2 * i)) {
            geglu_row(level, &gate_up[..i], &gate_up[i..], h);
        }
    });
}

/// See [`crate::Backend::geglu_backward`].
pub(super) fn geglu_backward(level: Level, dh: &[f32], i: usize, gate_up: &mut [f32]) {
    let rows = task_rows(i);
    par::pieces(gate_up, rows * 2 * i, |t, piece| {
        for (gate_up, dh) in piece.chunks_mut(2 * i).zip(dh[t * rows * i..].chunks(i)) {
            let (gate, up) = gate_up.split_at_mut(i);
            geglu_backward_row(level, dh, gate, up);
        }
    });
}

/// See [`crate::Backend::soft_cap`].
pub(super) fn soft_cap(level: Level, x: &mut [f32], cap: f32) {
    par::pieces(x, TASK_VALUES, |_, x| soft_cap_piece(level, x, cap));
}

/// Calls `f(i, row)` for each of the rows, `d` wide, of `y`.
pub(super) fn each_row(d: usize, y: &mut [f32], f: impl Fn(usize, &mut [f32]) + Sync + Send) {
    let rows = task_rows(d);
    par::pieces(y, rows * d, |t, piece| {
        for (i, row) in piece.chunks_mut(d).enumerate() {
            f(t * rows + i, row);
        }
    });
}

/// See [`crate::Backend::gather_rows`].
pub(super) fn gather_rows(table: &[f32], ids: &[u32], d: usize, y: &mut [f32]) {
    y.par_chunks_mut(d).with_min_len(task_rows(d)).zip(ids).for_each(|(y, &id)| {
        y.copy_from_slice(&table[id as usize * d..][..d]);
    });
}

/// See [`crate::Backend::scatter_add_rows`]. On one thread: rows may meet, and it is one pass over
/// memory.
pub(super) fn scatter_add_rows(level: Level, dy: &[f32], ids: &[u32], d: usize, table: &mut [f32]) {
    for (dy, &id) in dy.chunks(d).zip(ids) {
        add_piece(level, dy, &mut table[id as usize * d..][..d]);
    }
}
