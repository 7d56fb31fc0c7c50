//! The update rules other than AdamW: value by value here, the rest in files of their own.

mod adafactor;
mod adamw_8bit;

pub(super) use adafactor::{Second, adafactor};
pub(super) use adamw_8bit::adamw_8bit;

use rayon::prelude::*;

use super::par::TASK_VALUES;
use super::simd::{Level, simd_fn};
use crate::{Lion, Sgd};

simd_fn! {
    /// `y <- a x + b y`.
    fn axpby_piece<_s>(a: f32, x: &[f32], b: f32, y: &mut [f32]) {
        y.iter_mut().zip(x).for_each(|(y, x)| *y = a * x + b * *y);
    }
}

/// The scalars of a step of Lion in f32.
#[derive(Clone, Copy)]
struct LionRates {
    keep: f32,
    lr: f32,
    beta1: f32,
    beta2: f32,
    fresh1: f32,
    fresh2: f32,
    grad_scale: f32,
}

simd_fn! {
    /// One step of Lion on a piece.
    fn lion_piece<_s>(p: &mut [f32], g: &[f32], m: &mut [f32], r: LionRates) {
        for ((p, g), m) in p.iter_mut().zip(g).zip(m) {
            let g = g * r.grad_scale;
            let u = *m * r.beta1 + r.fresh1 * g;
            let sign = f32::from(u8::from(u > 0.0)) - f32::from(u8::from(u < 0.0));
            *p = *p * r.keep - r.lr * sign;
            *m = *m * r.beta2 + r.fresh2 * g;
        }
    }
}

/// The scalars of a step of descent in f32.
#[derive(Clone, Copy)]
struct SgdRates {
    lr: f32,
    decay: f32,
    momentum: f32,
    fresh: f32,
    nesterov: bool,
    grad_scale: f32,
}

simd_fn! {
    /// One step without momentum on a piece.
    fn sgd_piece<_s>(p: &mut [f32], g: &[f32], r: SgdRates) {
        for (p, g) in p.iter_mut().zip(g) {
            let g = g * r.grad_scale + r.decay * *p;
            *p -= r.lr * g;
        }
    }
}

simd_fn! {
    /// One step with momentum on a piece.
    fn momentum_piece<_s>(p: &mut [f32], g: &[f32], m: &mut [f32], r: SgdRates) {
        for ((p, g), m) in p.iter_mut().zip(g).zip(m) {
            let g = g * r.grad_scale + r.decay * *p;
            *m = *m * r.momentum + r.fresh * g;
            let step = if r.nesterov { g + r.momentum * *m } else { *m };
            *p -= r.lr * step;
        }
    }
}

/// See [`crate::Backend::axpby`].
pub(super) fn axpby(level: Level, a: f32, x: &[f32], b: f32, y: &mut [f32]) {
    y.par_chunks_mut(TASK_VALUES)
        .zip(x.par_chunks(TASK_VALUES))
        .for_each(|(y, x)| axpby_piece(level, a, x, b, y));
}

/// See [`crate::Backend::lion`].
pub(super) fn lion(level: Level, p: &mut [f32], g: &[f32], m: &mut [f32], update: Lion) {
    let rates = LionRates {
        keep: (1.0 - update.lr * update.weight_decay) as f32,
        lr: update.lr as f32,
        beta1: update.beta1 as f32,
        beta2: update.beta2 as f32,
        fresh1: (1.0 - update.beta1) as f32,
        fresh2: (1.0 - update.beta2) as f32,
        grad_scale: update.grad_scale,
    };
    p.par_chunks_mut(TASK_VALUES)
        .zip(g.par_chunks(TASK_VALUES))
        .zip(m.par_chunks_mut(TASK_VALUES))
        .for_each(|((p, g), m)| lion_piece(level, p, g, m, rates));
}

/// See [`crate::Backend::sgd`].
pub(super) fn sgd(level: Level, p: &mut [f32], g: &[f32], m: Option<&mut [f32]>, update: Sgd) {
    let rates = SgdRates {
        lr: update.lr as f32,
        decay: update.weight_decay as f32,
        // An empty momentum holds zeros, so that it becomes the gradient.
        momentum: update.momentum as f32,
        fresh: if update.first { 1.0 } else { (1.0 - update.dampening) as f32 },
        nesterov: update.nesterov,
        grad_scale: update.grad_scale,
    };
    let pieces = p.par_chunks_mut(TASK_VALUES).zip(g.par_chunks(TASK_VALUES));
    match m {
        None => pieces.for_each(|(p, g)| sgd_piece(level, p, g, rates)),
        Some(m) => pieces
            .zip(m.par_chunks_mut(TASK_VALUES))
            .for_each(|((p, g), m)| momentum_piece(level, p, g, m, rates)),
    }
}
