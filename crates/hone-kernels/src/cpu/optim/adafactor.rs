//! Adafactor: the second moment of a matrix as one vector for its rows and one for its columns.
//!
//! Nothing of the matrix's size is allocated: the step is computed twice, once for its root mean
//! square and once to be applied.

use rayon::prelude::*;

use crate::Adafactor;
use crate::cpu::loss::{squares_piece, sum_squares};
use crate::cpu::par::{self, TASK_VALUES, task_rows};
use crate::cpu::simd::{Level, simd_fn};

/// Most tasks of the columns' sums, each of which holds a row of them.
const TASKS_MAX: usize = 64;

/// The second moment as slices; see [`crate::SecondMoment`].
pub(in crate::cpu) enum Second<'a> {
    Factored(&'a mut [f32], &'a mut [f32]),
    Full(&'a mut [f32]),
}

simd_fn! {
    /// `sums += x^2`, value by value.
    fn add_squares<_s>(x: &[f32], sums: &mut [f64]) {
        sums.iter_mut().zip(x).for_each(|(sum, &x)| *sum += f64::from(x) * f64::from(x));
    }
}

simd_fn! {
    /// `u <- g row / sqrt(v)`, or `g row col` with `v` the columns' factors already.
    fn step_piece<_s>(g: &[f32], row: f32, v: &[f32], is_root: bool, u: &mut [f32]) {
        for ((u, g), v) in u.iter_mut().zip(g).zip(v) {
            *u = if is_root { g * row * v } else { g * row / v.sqrt() };
        }
    }
}

/// What is done with a piece of the step.
#[derive(Clone, Copy)]
struct Rates {
    keep: f32,
    step_size: f32,
    beta1: f32,
}

simd_fn! {
    /// `p <- keep p - size u`.
    fn apply_piece<_s>(p: &mut [f32], u: &[f32], r: Rates) {
        p.iter_mut().zip(u).for_each(|(p, u)| *p = *p * r.keep - r.step_size * u);
    }
}

simd_fn! {
    /// `m <- b1 m + (1 - b1) size u`, `p <- keep p - m`.
    fn apply_first_piece<_s>(p: &mut [f32], u: &[f32], m: &mut [f32], r: Rates) {
        for ((p, u), m) in p.iter_mut().zip(u).zip(m) {
            *m = *m * r.beta1 + (1.0 - r.beta1) * (r.step_size * u);
            *p = *p * r.keep - *m;
        }
    }
}

/// Means of s = g^2 + eps by row and by column, g being scaled.
fn means(level: Level, g: &[f32], cols: usize, scale: f64, eps: f64) -> (Vec<f64>, Vec<f64>) {
    let rows = g.len() / cols;
    let row = |sum: f64, n: usize| sum * scale * scale / n as f64 + eps;
    let by_row = g.par_chunks(cols).with_min_len(task_rows(cols));
    let by_row = by_row.map(|g| row(squares_piece(level, g), cols)).collect();
    let height = task_rows(cols).max(rows.div_ceil(TASKS_MAX));
    let parts = par::map(rows.div_ceil(height), |t| {
        let mut sums = vec![0.0; cols];
        let part = &g[t * height * cols..g.len().min((t + 1) * height * cols)];
        part.chunks(cols).for_each(|g| add_squares(level, g, &mut sums));
        sums
    });
    let mut by_col = vec![0.0; cols];
    for part in parts {
        by_col.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
    }
    by_col.iter_mut().for_each(|sum| *sum = row(*sum, rows));
    (by_row, by_col)
}

/// `x <- b x + (1 - b) mean`.
fn decay(x: &mut [f32], means: &[f64], beta: f64) {
    for (x, mean) in x.iter_mut().zip(means) {
        *x = (f64::from(*x) * beta + (1.0 - beta) * mean) as f32;
    }
}

/// The factors of the step: one for each row, and one for each column or each second moment.
struct Factors<'a> {
    rows: Vec<f32>,
    of_cols: Vec<f32>,
    of_values: &'a [f32],
    cols: usize,
}

impl<'a> Factors<'a> {
    /// Takes the gradient into the second moment.
    fn update(level: Level, g: &[f32], second: Second<'a>, update: Adafactor) -> Self {
        let (beta, eps, scale) = (update.beta2, update.eps, f64::from(update.grad_scale));
        match second {
            Second::Factored(row, col) => {
                let (by_row, by_col) = means(level, g, col.len(), scale, eps);
                decay(row, &by_row, beta);
                decay(col, &by_col, beta);
                let mean = row.iter().map(|&x| f64::from(x)).sum::<f64>() / row.len() as f64;
                let root = |x: f64| 1.0 / x.sqrt();
                Factors {
                    rows: row.iter().map(|&x| (scale * root(f64::from(x) / mean)) as f32).collect(),
                    of_cols: col.iter().map(|&x| root(f64::from(x)) as f32).collect(),
                    of_values: &[],
                    cols: col.len(),
                }
            }
            Second::Full(v) => {
                for (v, &g) in v.iter_mut().zip(g) {
                    let square = (f64::from(g) * scale).powi(2) + eps;
                    *v = (f64::from(*v) * beta + (1.0 - beta) * square) as f32;
                }
                let cols = v.len().max(1);
                let rows = vec![update.grad_scale];
                Factors { rows, of_cols: Vec::new(), of_values: v, cols }
            }
        }
    }

    /// The step of values `start ..` of the gradient, into `u`.
    fn step(&self, level: Level, g: &[f32], start: usize, u: &mut [f32]) {
        let mut at = start;
        let (mut g, mut u) = (g, u);
        while !g.is_empty() {
            let (row, col) = (at / self.cols, at % self.cols);
            let n = g.len().min(self.cols - col);
            let is_root = !self.of_cols.is_empty();
            let v = if is_root { &self.of_cols[col..] } else { &self.of_values[col..] };
            let (head, rest) = u.split_at_mut(n);
            step_piece(level, &g[..n], self.rows[row], v, is_root, head);
            (g, u, at) = (&g[n..], rest, at + n);
        }
    }
}

/// See [`crate::Backend::adafactor`].
pub(in crate::cpu) fn adafactor(
    level: Level,
    p: &mut [f32],
    g: &[f32],
    second: Second<'_>,
    first: Option<&mut [f32]>,
    update: Adafactor,
) {
    let n = p.len().max(1) as f64;
    let scale = update.scale_min.map_or(1.0, |min| (sum_squares(level, p) / n).sqrt().max(min));
    let lr = update.lr * scale;
    let factors = Factors::update(level, g, second, update);
    let squares = par::map(g.len().div_ceil(TASK_VALUES), |t| {
        let start = t * TASK_VALUES;
        let g = &g[start..g.len().min(start + TASK_VALUES)];
        let mut u = vec![0.0; g.len()];
        factors.step(level, g, start, &mut u);
        squares_piece(level, &u)
    });
    let rms = (squares.iter().sum::<f64>() / n).sqrt();
    let rates = Rates {
        keep: (1.0 - update.weight_decay * lr) as f32,
        step_size: (lr / (rms / update.clip_threshold).max(1.0)) as f32,
        beta1: update.beta1 as f32,
    };
    let pieces = p.par_chunks_mut(TASK_VALUES).zip(g.par_chunks(TASK_VALUES)).enumerate();
    let step = |t: usize, g: &[f32]| {
        let mut u = vec![0.0; g.len()];
        factors.step(level, g, t * TASK_VALUES, &mut u);
        u
    };
    match first {
        None => pieces.for_each(|(t, (p, g))| apply_piece(level, p, &step(t, g), rates)),
        Some(m) => pieces
            .zip(m.par_chunks_mut(TASK_VALUES))
            .for_each(|((t, (p, g)), m)| apply_first_piece(level, p, &step(t, g), m, rates)),
    }
}
