//! Operators that treat each value by itself: sums, scaling, bias, dropout, SwiGLU.

use rayon::prelude::*;

use super::ahead;
use super::par::{self, TASK_VALUES, task_rows};
use super::simd::{Level, Simd, exp, simd_fn, tanh};
use super::value::Value;
use crate::rng;
use crate::shape::Layout;

simd_fn! {
    /// `y <- y + x`.
    fn add_piece<s, X: Value, Y: Value>(x: &[X], y: &mut [Y]) {
        for (x, y) in x.chunks(S::LANES).zip(y.chunks_mut(S::LANES)) {
            let sum = s.add(Y::load(s, y), X::load(s, x));
            Y::store(s, y, sum);
        }
    }
}

simd_fn! {
    /// `x <- s x`.
    pub(super) fn scale_piece<s, X: Value>(x: &mut [X], factor: f32) {
        let factor = s.splat(factor);
        for x in x.chunks_mut(S::LANES) {
            let scaled = s.mul(X::load(s, x), factor);
            X::store(s, x, scaled);
        }
    }
}

simd_fn! {
    /// `y <- x`, rounded or widened where they differ.
    pub(super) fn copy_piece<s, X: Value, Y: Value>(x: &[X], y: &mut [Y]) {
        for (x, y) in x.chunks(S::LANES).zip(y.chunks_mut(S::LANES)) {
            Y::store(s, y, X::load(s, x));
        }
    }
}

simd_fn! {
    /// A row of SwiGLU.
    fn swiglu_row<s, G: Value, H: Value>(gate: &[G], up: &[G], h: &mut [H]) {
        let one = s.splat(1.0);
        let rows = gate.chunks(S::LANES).zip(up.chunks(S::LANES)).zip(h.chunks_mut(S::LANES));
        for ((gate, up), h) in rows {
            let (gate, up) = (G::load(s, gate), G::load(s, up));
            let sigmoid = s.div(one, s.add(one, exp(s, s.sub(s.splat(0.0), gate))));
            H::store(s, h, s.mul(s.mul(gate, sigmoid), up));
        }
    }
}

simd_fn! {
    /// A row of SwiGLU's backward: gates and ups become their gradients, and the output's gradient the
    /// output.
    fn swiglu_backward_row<s, H: Value, G: Value>(h: &mut [H], gate: &mut [G], up: &mut [G]) {
        let (one, lanes) = (s.splat(1.0), S::LANES);
        let rows = h.chunks_mut(lanes).zip(gate.chunks_mut(lanes)).zip(up.chunks_mut(lanes));
        for ((h_at, gate_at), up_at) in rows {
            let (dh, gate, up) = (H::load(s, h_at), G::load(s, gate_at), G::load(s, up_at));
            let sigmoid = s.div(one, s.add(one, exp(s, s.sub(s.splat(0.0), gate))));
            let slope = s.mul(sigmoid, s.fma(gate, s.sub(one, sigmoid), one));
            let gated = s.mul(gate, sigmoid);
            G::store(s, gate_at, s.mul(s.mul(dh, up), slope));
            G::store(s, up_at, s.mul(dh, gated));
            H::store(s, h_at, s.mul(gated, up));
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
    fn geglu_row<s, G: Value, H: Value>(gate: &[G], up: &[G], h: &mut [H]) {
        let (one, half) = (s.splat(1.0), s.splat(0.5));
        let rows = gate.chunks(S::LANES).zip(up.chunks(S::LANES)).zip(h.chunks_mut(S::LANES));
        for ((gate, up), h) in rows {
            let (gate, up) = (G::load(s, gate), G::load(s, up));
            let share = s.mul(half, s.add(one, gelu_tanh(s, gate).1));
            H::store(s, h, s.mul(s.mul(gate, share), up));
        }
    }
}

simd_fn! {
    /// A row of GeGLU's backward: gates and ups become their gradients, and the output's gradient the
    /// output.
    fn geglu_backward_row<s, H: Value, G: Value>(h: &mut [H], gate: &mut [G], up: &mut [G]) {
        let (one, half, lanes) = (s.splat(1.0), s.splat(0.5), S::LANES);
        let rows = h.chunks_mut(lanes).zip(gate.chunks_mut(lanes)).zip(up.chunks_mut(lanes));
        for ((h_at, gate_at), up_at) in rows {
            let (dh, gate, up) = (H::load(s, h_at), G::load(s, gate_at), G::load(s, up_at));
            let (x, t) = gelu_tanh(s, gate);
            let share = s.mul(half, s.add(one, t));
            let rise = s.fma(s.splat(3.0 * GELU_CUBIC), s.mul(x, x), one);
            let du = s.mul(s.splat(GELU_SLOPE), rise);
            let bend = s.mul(s.sub(one, t), s.add(one, t));
            let slope = s.fma(s.mul(s.mul(half, x), bend), du, share);
            G::store(s, gate_at, s.mul(s.mul(dh, up), slope));
            let gated = s.mul(gate, share);
            G::store(s, up_at, s.mul(dh, gated));
            H::store(s, h_at, s.mul(gated, up));
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
pub(super) fn copy<X: Value, Y: Value>(level: Level, x: &[X], y: &mut [Y]) {
    par::pieces(y, TASK_VALUES, |t, y| copy_piece(level, &x[t * TASK_VALUES..][..y.len()], y));
}

/// Copies the values of one view to another of the same sides.
pub(super) fn copy_rows<X: Value, Y: Value>(
    level: Level,
    (lx, x): (Layout, &[X]),
    (ly, y): (Layout, &mut [Y]),
) {
    rows_mut(ly, y, |i, row| copy_piece(level, &x[lx.row(i)..][..lx.cols], row));
}

/// See [`crate::Backend::add`].
pub(super) fn add<X: Value, Y: Value>(level: Level, x: &[X], y: &mut [Y]) {
    par::pieces(y, TASK_VALUES, |t, y| add_piece(level, &x[t * TASK_VALUES..][..y.len()], y));
}

/// See [`crate::Backend::scale`].
pub(super) fn scale<X: Value>(level: Level, x: &mut [X], factor: f32) {
    par::pieces(x, TASK_VALUES, |_, x| scale_piece(level, x, factor));
}

/// The part of a buffer from the first to one past the last value of a view's rows.
pub(super) fn extent<T>(l: Layout, buf: &mut [T]) -> &mut [T] {
    let end = crate::shape::end(l.offset, l.rows, l.cols, l.stride);
    &mut buf[l.offset.min(end)..end]
}

/// Calls `f(i, row)` for each row of a view.
pub(super) fn rows_mut<T: Send>(
    l: Layout,
    buf: &mut [T],
    f: impl Fn(usize, &mut [T]) + Sync + Send,
) {
    let rows = task_rows(l.cols);
    let stride = l.stride.max(1);
    par::pieces(extent(l, buf), rows * stride, |t, piece| {
        for (i, row) in piece.chunks_mut(stride).enumerate() {
            f(t * rows + i, &mut row[..l.cols]);
        }
    });
}

/// See [`crate::Backend::add_bias`].
pub(super) fn add_bias<Y: Value>(level: Level, l: Layout, y: &mut [Y], bias: &[f32]) {
    rows_mut(l, y, |_, row| add_piece(level, bias, row));
}

/// See [`crate::Backend::bias_grad`].
pub(super) fn bias_grad<Y: Value>(level: Level, l: Layout, dy: &[Y], dbias: &mut [f32]) {
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
pub(super) fn dropout<X: Value, Y: Value>(
    (lx, x): (Layout, &[X]),
    (ly, y): (Layout, &mut [Y]),
    p: f32,
    seed: u64,
) {
    let (stream, below, factor) = (rng::stream(seed), rng::drop_below(p), 1.0 / (1.0 - p));
    rows_mut(ly, y, |i, row| {
        let first = (i * lx.cols) as u64;
        for (j, (y, x)) in row.iter_mut().zip(&x[lx.row(i)..]).enumerate() {
            let kept = rng::draw(stream, first + j as u64) >> 32 >= below;
            *y = if kept { Y::of(x.get() * factor) } else { Y::ZERO };
        }
    });
}

/// Values of a row of gates that are handled at a time, while those of the next row are asked for.
const GATE_VALUES: usize = 256;

/// Calls `row(gate, up, h)` with pieces of each row of gates and ups and of the (T, i) values `h`. The
/// ones below them are on their way from memory meanwhile.
fn each_gate<G: Value, H: Value>(
    gate_up: &[G],
    i: usize,
    h: &mut [H],
    row: impl Fn(&[G], &[G], &mut [H]) + Sync + Send,
) {
    let rows = task_rows(i);
    par::pieces(h, rows * i, |t, piece| {
        for (h, gate_up) in piece.chunks_mut(i).zip(gate_up[t * rows * 2 * i..].chunks(2 * i)) {
            let (gate, up) = gate_up.split_at(i);
            let pieces = gate.chunks(GATE_VALUES).zip(up.chunks(GATE_VALUES));
            for ((gate, up), h) in pieces.zip(h.chunks_mut(GATE_VALUES)) {
                ahead::ask(gate, 2 * i);
                ahead::ask(up, 2 * i);
                row(gate, up, h);
            }
        }
    });
}

/// Calls `row(h, gate, up)` as [`each_gate`] does, to change all three.
fn each_gate_mut<G: Value, H: Value>(
    h: &mut [H],
    i: usize,
    gate_up: &mut [G],
    row: impl Fn(&mut [H], &mut [G], &mut [G]) + Sync + Send,
) {
    let rows = task_rows(i);
    let tasks = h.par_chunks_mut(rows * i).zip(gate_up.par_chunks_mut(rows * 2 * i));
    tasks.for_each(|(h, gate_up)| {
        for (h, gate_up) in h.chunks_mut(i).zip(gate_up.chunks_mut(2 * i)) {
            let (gate, up) = gate_up.split_at_mut(i);
            let pieces = gate.chunks_mut(GATE_VALUES).zip(up.chunks_mut(GATE_VALUES));
            for ((gate, up), h) in pieces.zip(h.chunks_mut(GATE_VALUES)) {
                ahead::ask(gate, 2 * i);
                ahead::ask(up, 2 * i);
                ahead::ask(h, i);
                row(h, gate, up);
            }
        }
    });
}

/// See [`crate::Backend::swiglu`].
pub(super) fn swiglu<G: Value, H: Value>(level: Level, gate_up: &[G], i: usize, h: &mut [H]) {
    each_gate(gate_up, i, h, |gate, up, h| swiglu_row(level, gate, up, h));
}

/// See [`crate::Backend::swiglu_backward`].
pub(super) fn swiglu_backward<H: Value, G: Value>(
    level: Level,
    h: &mut [H],
    i: usize,
    gate_up: &mut [G],
) {
    each_gate_mut(h, i, gate_up, |h, gate, up| swiglu_backward_row(level, h, gate, up));
}

/// See [`crate::Backend::geglu`].
pub(super) fn geglu<G: Value, H: Value>(level: Level, gate_up: &[G], i: usize, h: &mut [H]) {
    each_gate(gate_up, i, h, |gate, up, h| geglu_row(level, gate, up, h));
}

/// See [`crate::Backend::geglu_backward`].
pub(super) fn geglu_backward<H: Value, G: Value>(
    level: Level,
    h: &mut [H],
    i: usize,
    gate_up: &mut [G],
) {
    each_gate_mut(h, i, gate_up, |h, gate, up| geglu_backward_row(level, h, gate, up));
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
