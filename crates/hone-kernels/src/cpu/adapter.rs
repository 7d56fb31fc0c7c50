//! What adapters need beside products: columns gathered and scaled, and the row norms of DoRA.

use rayon::prelude::*;

use super::par::{TASK_VALUES, task_rows};
use super::value::Value;
use crate::shape::Layout;

/// Columns summed by one task.
const TASK_COLUMNS: usize = 64;

/// `y` (ids, rows of the table) <- columns of the table.
pub(super) fn gather_columns<X: Value, Y: Value>(l: Layout, table: &[X], ids: &[u32], y: &mut [Y]) {
    let column = |(row, &id): (&mut [Y], &u32)| {
        for (k, value) in row.iter_mut().enumerate() {
            *value = Y::of(table[l.row(k) + id as usize].get());
        }
    };
    if l.rows > 0 {
        let rows = y.par_chunks_mut(l.rows).with_min_len(task_rows(l.rows));
        rows.zip(ids).for_each(column);
    }
}

/// Columns of the table <- themselves + rows of `dy`, in order; a task has rows of the table of its
/// own.
pub(super) fn scatter_add_columns(dy: &[f32], ids: &[u32], l: Layout, table: &mut [f32]) {
    if l.rows == 0 || ids.is_empty() {
        return;
    }
    let table = &mut table[l.offset..];
    table.par_chunks_mut(l.stride).take(l.rows).enumerate().for_each(|(k, row)| {
        for (i, &id) in ids.iter().enumerate() {
            row[id as usize] += dy[i * l.rows + k];
        }
    });
}

/// `y <- beta y + (scale + shift) x`, column by column.
pub(super) fn add_scaled_columns<X: Value, Y: Value>(
    (lx, x): (Layout, &[X]),
    scale: &[f32],
    shift: f32,
    (ly, y): (Layout, &mut [Y]),
    beta: f32,
) {
    if lx.rows == 0 || lx.cols == 0 {
        return;
    }
    let y = &mut y[ly.offset..];
    let rows = y.par_chunks_mut(ly.stride).take(lx.rows).enumerate();
    rows.with_min_len(TASK_VALUES.div_ceil(lx.cols)).for_each(|(i, row)| {
        let x = &x[lx.row(i)..][..lx.cols];
        for ((y, x), scale) in row[..ly.cols].iter_mut().zip(x).zip(scale) {
            let kept = if beta == 0.0 { 0.0 } else { beta * y.get() };
            *y = Y::of(kept + (scale + shift) * x.get());
        }
    });
}

/// `out <- out + (sums over the rows of a b) / divisor`, column by column. Sums are f64: a
/// magnitude's gradient is one over all tokens.
pub(super) fn columns_dot<A: Value, B: Value>(
    (la, a): (Layout, &[A]),
    (lb, b): (Layout, &[B]),
    divisor: &[f32],
    out: &mut [f32],
) {
    out.par_chunks_mut(TASK_COLUMNS).enumerate().for_each(|(task, out)| {
        let start = task * TASK_COLUMNS;
        let mut sums = [0.0_f64; TASK_COLUMNS];
        for i in 0..la.rows {
            let a = &a[la.row(i) + start..][..out.len()];
            let b = &b[lb.row(i) + start..][..out.len()];
            for ((sum, &a), &b) in sums.iter_mut().zip(a).zip(b) {
                *sum += f64::from(a.get()) * f64::from(b.get());
            }
        }
        for ((out, sum), &divisor) in out.iter_mut().zip(sums).zip(&divisor[start..]) {
            *out += (sum / f64::from(divisor)) as f32;
        }
    });
}

/// `norms[j] <- sqrt(squares[j] + sum over k of b[j][k] c[k][j])`.
pub(super) fn row_norms(
    squares: &[f32],
    (lb, b): (Layout, &[f32]),
    (lc, c): (Layout, &[f32]),
    norms: &mut [f32],
) {
    for (j, (norm, &square)) in norms.iter_mut().zip(squares).enumerate() {
        let b = &b[lb.row(j)..][..lb.cols];
        let dot = b.iter().enumerate().map(|(k, &b)| f64::from(b) * f64::from(c[lc.row(k) + j]));
        *norm = (f64::from(square) + dot.sum::<f64>()).sqrt() as f32;
    }
}
