//! Cross-entropy, the sum of squares and the AdamW step.

use std::cell::Cell;

use super::par::{self, TASK_VALUES};
use super::pointwise::{rows_mut, scale_piece};
use super::simd::{Level, exp, simd_fn};
use super::value::Value;
use crate::shape::Layout;
use crate::{AdamW, LossSums};

simd_fn! {
    /// Largest value of a row.
    pub(super) fn max_of<s>(z: &[f32]) -> f32 {
        let low = f32::NEG_INFINITY;
        let mut tops = [s.splat(low); 4];
        let mut whole = z.chunks_exact(4 * S::LANES);
        for z in &mut whole {
            for (i, top) in tops.iter_mut().enumerate() {
                *top = s.max(s.load(&z[i * S::LANES..]), *top);
            }
        }
        for z in whole.remainder().chunks(S::LANES) {
            tops[0] = s.max(s.load_part(z, low), tops[0]);
        }
        s.max_lanes(s.max(s.max(tops[0], tops[1]), s.max(tops[2], tops[3])))
    }
}

simd_fn! {
    /// Sum of exp(z - max) over a row.
    pub(super) fn sum_exp<s>(z: &[f32], max: f32) -> f32 {
        let (shift, mut sums) = (s.splat(max), [s.splat(0.0); 2]);
        for (i, z) in z.chunks(S::LANES).enumerate() {
            let x = s.load_part(z, f32::NEG_INFINITY);
            sums[i % 2] = s.add(sums[i % 2], exp(s, s.sub(x, shift)));
        }
        s.sum_lanes(s.add(sums[0], sums[1]))
    }
}

simd_fn! {
    /// The same sum, in the same order; `y` becomes exp(z - max).
    fn sum_exp_to<s>(z: &[f32], max: f32, y: &mut [f32]) -> f32 {
        let (lanes, shift) = (S::LANES, s.splat(max));
        let [mut even, mut odd] = [s.splat(0.0); 2];
        let (mut zs, mut ys) = (z.chunks_exact(2 * lanes), y.chunks_exact_mut(2 * lanes));
        for (z, y) in (&mut zs).zip(&mut ys) {
            let (a, b) = (s.sub(s.load(z), shift), s.sub(s.load(&z[lanes..]), shift));
            let (a, b) = (exp(s, a), exp(s, b));
            s.store(y, a);
            s.store(&mut y[lanes..], b);
            even = s.add(even, a);
            odd = s.add(odd, b);
        }
        let rest = zs.remainder().chunks(lanes).zip(ys.into_remainder().chunks_mut(lanes));
        for (i, (z, y)) in rest.enumerate() {
            let x = exp(s, s.sub(s.load_part(z, f32::NEG_INFINITY), shift));
            s.store_part(y, x);
            (even, odd) = if i == 0 { (s.add(even, x), odd) } else { (even, s.add(odd, x)) };
        }
        s.sum_lanes(s.add(even, odd))
    }
}

simd_fn! {
    /// The same sum, in the same order; the row becomes exp(z - max).
    fn sum_exp_in_place<s>(z: &mut [f32], max: f32) -> f32 {
        let (shift, mut sums) = (s.splat(max), [s.splat(0.0); 2]);
        for (i, z) in z.chunks_mut(S::LANES).enumerate() {
            let x = exp(s, s.sub(s.load_part(z, f32::NEG_INFINITY), shift));
            sums[i % 2] = s.add(sums[i % 2], x);
            s.store_part(z, x);
        }
        s.sum_lanes(s.add(sums[0], sums[1]))
    }
}

simd_fn! {
    /// `y <- factor x`.
    fn scaled<s, Y: Value>(x: &[f32], factor: f32, y: &mut [Y]) {
        let (factor, lanes) = (s.splat(factor), S::LANES);
        let (mut xs, mut ys) = (x.chunks_exact(lanes), y.chunks_exact_mut(lanes));
        for (x, y) in (&mut xs).zip(&mut ys) {
            Y::store(s, y, s.mul(s.load(x), factor));
        }
        Y::store(s, ys.into_remainder(), s.mul(s.load_part(xs.remainder(), 0.0), factor));
    }
}

thread_local! {
    /// A row of exp(z - max), kept from row to row.
    static ROW: Cell<Vec<f32>> = Cell::default();
}

simd_fn! {
    /// Sum of squares of a piece, in 16 interleaved f64 sums.
    pub(super) fn squares_piece<_s>(x: &[f32]) -> f64 {
        let mut sums = [0.0_f64; 16];
        let mut whole = x.chunks_exact(16);
        for x in &mut whole {
            for (sum, &x) in sums.iter_mut().zip(x) {
                *sum += f64::from(x) * f64::from(x);
            }
        }
        for (sum, &x) in sums.iter_mut().zip(whole.remainder()) {
            *sum += f64::from(x) * f64::from(x);
        }
        sums.iter().sum()
    }
}

/// The scalars of an AdamW step, in f32 as PyTorch applies them to f32 tensors.
#[derive(Clone, Copy)]
pub(super) struct Rates {
    pub(super) keep: f32,
    pub(super) grad_scale: f32,
    pub(super) first: f32,
    pub(super) beta2: f32,
    pub(super) second: f32,
    pub(super) step_size: f32,
    pub(super) root_scale: f32,
    pub(super) eps: f32,
}

impl Rates {
    pub(super) fn new(update: AdamW) -> Self {
        let AdamW { lr, beta1, beta2, eps, weight_decay, step, grad_scale } = update;
        let power = |beta: f64| beta.powf(step as f64);
        Rates {
            keep: (1.0 - lr * weight_decay) as f32,
            grad_scale,
            first: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            second: (1.0 - beta2) as f32,
            step_size: (lr / (1.0 - power(beta1))) as f32,
            root_scale: (1.0 - power(beta2)).sqrt() as f32,
            eps: eps as f32,
        }
    }
}

simd_fn! {
    /// One AdamW step on a piece.
    fn adamw_piece<_s>(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], r: Rates) {
        for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            let g = g * r.grad_scale;
            *m += (g - *m) * r.first;
            *v = *v * r.beta2 + r.second * (g * g);
            let denominator = v.sqrt() / r.root_scale + r.eps;
            *p = *p * r.keep - r.step_size * (*m / denominator);
        }
    }
}

/// What [`rows_mut`] leaves of a row: its loss, its cross-entropy, and whether its largest logit is
/// the target's.
#[derive(Clone, Copy, Default)]
pub(super) struct Row {
    pub(super) loss: f32,
    pub(super) ce: f32,
    pub(super) correct: bool,
}

impl Row {
    /// A row without options, of the sum of exp(z - max) and the target's logit.
    fn new(sum: f32, max: f32, at_target: f32) -> Self {
        // The loss is taken relative to the maximum, so that large logits do not swallow the
        // logarithm.
        let loss = (f64::from(sum).ln() + (f64::from(max) - f64::from(at_target))) as f32;
        Row { loss, ce: loss, correct: at_target == max }
    }
}

/// See [`crate::Backend::cross_entropy`].
pub(super) fn cross_entropy(
    level: Level,
    l: Layout,
    logits: &mut [f32],
    targets: &[u32],
    weights: &[f32],
    grad_scale: Option<f32>,
    row_loss: Option<&mut [f32]>,
) -> LossSums {
    let rows: Vec<std::sync::OnceLock<Row>> = vec![std::sync::OnceLock::new(); l.rows];
    rows_mut(l, logits, |i, z| {
        let target = targets[i] as usize;
        let (max, at_target) = (max_of(level, z), z[target]);
        let sum = match grad_scale {
            Some(scale) => {
                let sum = sum_exp_in_place(level, z, max);
                scale_piece(level, z, scale * weights[i] / sum);
                z[target] -= scale * weights[i];
                sum
            }
            None => sum_exp(level, z, max),
        };
        assert!(rows[i].set(Row::new(sum, max, at_target)).is_ok(), "each row is handled once");
    });
    collect(rows, weights, row_loss)
}

/// See [`crate::Backend::cross_entropy_into`], without options; the logits are only read.
pub(super) fn cross_entropy_into<D: Value>(
    level: Level,
    (l, logits): (Layout, &[f32]),
    (targets, weights): (&[u32], &[f32]),
    (scale, dlogits): (f32, &mut [D]),
    row_loss: Option<&mut [f32]>,
) -> LossSums {
    let rows: Vec<std::sync::OnceLock<Row>> = vec![std::sync::OnceLock::new(); l.rows];
    let dense = Layout { offset: 0, stride: l.cols, ..l };
    rows_mut(dense, dlogits, |i, d| {
        let (z, target) = (&logits[l.row(i)..][..l.cols], targets[i] as usize);
        let (max, at_target, weight) = (max_of(level, z), z[target], scale * weights[i]);
        let mut row = ROW.take();
        row.resize(z.len(), 0.0);
        let sum = sum_exp_to(level, z, max, &mut row);
        let factor = weight / sum;
        scaled(level, &row, factor, d);
        d[target] = D::of(row[target] * factor - weight);
        ROW.set(row);
        assert!(rows[i].set(Row::new(sum, max, at_target)).is_ok(), "each row is handled once");
    });
    collect(rows, weights, row_loss)
}

/// The sums over the rows, in their order.
pub(super) fn collect(
    rows: Vec<std::sync::OnceLock<Row>>,
    weights: &[f32],
    mut row_loss: Option<&mut [f32]>,
) -> LossSums {
    let mut sums = LossSums { n_rows: rows.len() as u64, ..LossSums::default() };
    let rows = rows.into_iter().map(|row| row.into_inner().unwrap_or_default());
    for (i, (row, &w)) in rows.zip(weights).enumerate() {
        sums.weighted_loss += f64::from(w) * f64::from(row.loss);
        sums.weighted_ce += f64::from(w) * f64::from(row.ce);
        sums.weight += f64::from(w);
        sums.n_correct += u64::from(row.correct);
        if let Some(row_loss) = row_loss.as_deref_mut() {
            row_loss[i] = row.loss;
        }
    }
    sums
}

/// See [`crate::Backend::sum_squares`].
pub(super) fn sum_squares(level: Level, x: &[f32]) -> f64 {
    par::map(x.len().div_ceil(TASK_VALUES), |t| {
        squares_piece(level, &x[t * TASK_VALUES..x.len().min((t + 1) * TASK_VALUES)])
    })
    .iter()
    .sum()
}

/// See [`crate::Backend::adamw`].
pub(super) fn adamw(
    level: Level,
    p: &mut [f32],
    g: &[f32],
    m: &mut [f32],
    v: &mut [f32],
    update: AdamW,
) {
    use rayon::prelude::*;
    let rates = Rates::new(update);
    p.par_chunks_mut(TASK_VALUES)
        .zip(g.par_chunks(TASK_VALUES))
        .zip(m.par_chunks_mut(TASK_VALUES))
        .zip(v.par_chunks_mut(TASK_VALUES))
        .for_each(|(((p, g), m), v)| adamw_piece(level, p, g, m, v, rates));
}
