//! Norms of the plain twin.

use crate::RmsNorm;
use crate::shape::Layout;

/// 1 / sqrt(mean(x^2) + eps).
fn inverse_root(x: &[f64], norm: RmsNorm) -> f64 {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    1.0 / (mean + f64::from(norm.eps)).sqrt()
}

/// See [`crate::Backend::rms_norm`].
pub(super) fn forward(
    x: &[f64],
    w: &[f64],
    norm: RmsNorm,
    (rows, d): (usize, usize),
    y: &mut [f64],
    r: &mut [f64],
) {
    for (i, r) in r[..rows].iter_mut().enumerate() {
        let row = &x[i * d..(i + 1) * d];
        *r = inverse_root(row, norm);
        for j in 0..d {
            y[i * d + j] = row[j] * *r * (w[j] + f64::from(norm.offset));
        }
    }
}

/// The output of [`forward`] from the scales that it left.
pub(super) fn scaled(
    [x, w, r]: [&[f64]; 3],
    norm: RmsNorm,
    (rows, d): (usize, usize),
    y: &mut [f64],
) {
    for i in 0..rows * d {
        y[i] = x[i] * r[i / d] * (w[i % d] + f64::from(norm.offset));
    }
}

/// See [`crate::Backend::rms_norm_backward`].
pub(super) fn backward(
    [dy, x, w, r]: [&[f64]; 4],
    norm: RmsNorm,
    (rows, d): (usize, usize),
    dx: &mut [f64],
    mut dw: Option<&mut [f64]>,
) {
    for (i, &r) in r[..rows].iter().enumerate() {
        let at = i * d;
        let z = |j: usize| dy[at + j] * (w[j] + f64::from(norm.offset));
        let mean = (0..d).map(|j| z(j) * x[at + j] * r).sum::<f64>() / d as f64;
        for j in 0..d {
            let n = x[at + j] * r;
            dx[at + j] += r * (z(j) - n * mean);
            if let Some(dw) = dw.as_deref_mut() {
                dw[j] += dy[at + j] * n;
            }
        }
    }
}

/// See [`crate::Backend::group_norm`]; `w` is the width.
pub(super) fn group_forward(l: Layout, x: &mut [f64], w: &[f64], norm: RmsNorm, raw: &mut [f64]) {
    for i in 0..l.rows {
        let row = &mut x[l.row(i)..][..l.cols];
        raw[i * l.cols..][..l.cols].copy_from_slice(row);
        for group in row.chunks_mut(w.len()) {
            let r = inverse_root(group, norm);
            let factors = w.iter().map(|w| w + f64::from(norm.offset));
            group.iter_mut().zip(factors).for_each(|(x, w)| *x *= r * w);
        }
    }
}

/// See [`crate::Backend::group_norm_backward`].
pub(super) fn group_backward(
    l: Layout,
    dy: &mut [f64],
    [raw, w]: [&[f64]; 2],
    norm: RmsNorm,
    mut dw: Option<&mut [f64]>,
) {
    let width = w.len();
    for i in 0..l.rows {
        let row = &mut dy[l.row(i)..][..l.cols];
        for (dy, x) in row.chunks_mut(width).zip(raw[i * l.cols..].chunks(width)) {
            let r = inverse_root(x, norm);
            let z = |j: usize, dy: &[f64]| dy[j] * (w[j] + f64::from(norm.offset));
            let mean = (0..width).map(|j| z(j, dy) * x[j] * r).sum::<f64>() / width as f64;
            for j in 0..width {
                let n = x[j] * r;
                if let Some(dw) = dw.as_deref_mut() {
                    dw[j] += dy[j] * n;
                }
                dy[j] = r * (z(j, dy) - n * mean);
            }
        }
    }
}
