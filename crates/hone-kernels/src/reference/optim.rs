//! The plain twins of the update rules and of the loss's options: the formulas of [`Backend`] read
//! aloud.
//!
//! [`Backend`]: crate::Backend

use crate::{Adafactor, AdamW, CODE_BLOCK, CodeBook, Lion, LossOptions, Sgd};

/// Code of the value nearest to `x`, found by looking at all of them; the lower of two.
fn nearest(book: &CodeBook, x: f32) -> u8 {
    let above = book.bounds.iter().filter(|&&bound| bound < x).count();
    u8::try_from(above).expect("there are 255 bounds")
}

/// Takes a block of codes apart, changes its values, and puts it together again.
fn recode(book: &CodeBook, codes: &mut [u8], max: &mut f64, change: impl Fn(usize, f32) -> f32) {
    let old = *max as f32;
    let decoded = codes.iter().map(|&code| book.values[usize::from(code)] * old);
    let x: Vec<f32> = decoded.enumerate().map(|(i, x)| change(i, x)).collect();
    let top = x.iter().fold(0.0_f32, |top, x| top.max(x.abs()));
    let factor = 1.0 / top.max(1e-38);
    for (code, x) in codes.iter_mut().zip(x) {
        *code = nearest(book, (x * factor).clamp(-1.0, 1.0));
    }
    *max = f64::from(top);
}

/// AdamW in 8 bits, a block. Its arithmetic is f32, as the rounding is part of the operator: a
/// value beside a midpoint would otherwise take another code.
pub(super) fn adamw_8bit(
    p: &mut [f64],
    g: &[f64],
    [(m, m_max), (v, v_max)]: [(&mut [u8], &mut [f64]); 2],
    update: AdamW,
) {
    let AdamW { lr, beta1, beta2, eps, weight_decay, step, grad_scale } = update;
    let c1 = 1.0 - beta1.powf(step as f64);
    let c2 = (1.0 - beta2.powf(step as f64)).sqrt() as f32;
    for (block, start) in (0..p.len()).step_by(CODE_BLOCK).enumerate() {
        let n = CODE_BLOCK.min(p.len() - start);
        let g: Vec<f32> = g[start..start + n].iter().map(|&g| g as f32 * grad_scale).collect();
        let (m, v) = (&mut m[start..start + n], &mut v[start..start + n]);
        let (book1, book2) = (CodeBook::signed(), CodeBook::unsigned());
        let first = |i: usize, m: f32| m * beta1 as f32 + (1.0 - beta1) as f32 * g[i];
        let second = |i: usize, v: f32| v * beta2 as f32 + (1.0 - beta2) as f32 * (g[i] * g[i]);
        for i in 0..n {
            let m = first(i, book1.values[usize::from(m[i])] * m_max[block] as f32);
            let v = second(i, book2.values[usize::from(v[i])] * v_max[block] as f32);
            let p = &mut p[start + i];
            let kept = *p as f32 * (1.0 - lr * weight_decay) as f32;
            let denominator = v.sqrt() / c2 + eps as f32;
            *p = f64::from(kept - (lr / c1) as f32 * (m / denominator));
        }
        recode(book1, m, &mut m_max[block], first);
        recode(book2, v, &mut v_max[block], second);
    }
}

pub(super) fn lion(p: &mut [f64], g: &[f64], m: &mut [f64], update: Lion) {
    for i in 0..m.len() {
        let g = g[i] * f64::from(update.grad_scale);
        let u = update.beta1 * m[i] + (1.0 - update.beta1) * g;
        let sign = if u == 0.0 { 0.0 } else { u.signum() };
        p[i] = p[i] * (1.0 - update.lr * update.weight_decay) - update.lr * sign;
        m[i] = update.beta2 * m[i] + (1.0 - update.beta2) * g;
    }
}

pub(super) fn sgd(p: &mut [f64], g: &[f64], m: Option<&mut [f64]>, update: Sgd) {
    let Sgd { lr, momentum, dampening, nesterov, weight_decay, first, grad_scale } = update;
    let mut step: Vec<f64> =
        g.iter().zip(&*p).map(|(g, p)| g * f64::from(grad_scale) + weight_decay * p).collect();
    if let Some(m) = m {
        for (m, g) in m.iter_mut().zip(&mut step) {
            *m = if first { *g } else { momentum * *m + (1.0 - dampening) * *g };
            *g = if nesterov { *g + momentum * *m } else { *m };
        }
    }
    p.iter_mut().zip(step).for_each(|(p, g)| *p -= lr * g);
}

/// Root of the mean of the squares.
fn rms(x: &[f64]) -> f64 {
    (x.iter().map(|x| x * x).sum::<f64>() / x.len().max(1) as f64).sqrt()
}

/// The second moment; of a matrix as its rows and columns.
pub(super) enum Second<'a> {
    Factored(&'a mut [f64], &'a mut [f64]),
    Full(&'a mut [f64]),
}

pub(super) fn adafactor(
    p: &mut [f64],
    g: &[f64],
    second: Second<'_>,
    first: Option<&mut [f64]>,
    update: Adafactor,
) {
    let g: Vec<f64> = g.iter().map(|g| g * f64::from(update.grad_scale)).collect();
    let square = |i: usize| g[i] * g[i] + update.eps;
    let decay = |x: &mut f64, mean: f64| *x = update.beta2 * *x + (1.0 - update.beta2) * mean;
    let mut u: Vec<f64> = match second {
        Second::Factored(row, col) => {
            let (rows, cols) = (row.len(), col.len());
            for (i, r) in row.iter_mut().enumerate() {
                decay(r, (0..cols).map(|j| square(i * cols + j)).sum::<f64>() / cols as f64);
            }
            for (j, c) in col.iter_mut().enumerate() {
                decay(c, (0..rows).map(|i| square(i * cols + j)).sum::<f64>() / rows as f64);
            }
            let mean = row.iter().sum::<f64>() / rows as f64;
            let at = |i: usize| g[i] / (row[i / cols] / mean).sqrt() / col[i % cols].sqrt();
            (0..g.len()).map(at).collect()
        }
        Second::Full(v) => {
            v.iter_mut().enumerate().for_each(|(i, v)| decay(v, square(i)));
            g.iter().zip(v).map(|(g, v)| g / v.sqrt()).collect()
        }
    };
    let lr = update.lr * update.scale_min.map_or(1.0, |min| rms(p).max(min));
    let shrink = (rms(&u) / update.clip_threshold).max(1.0);
    u.iter_mut().for_each(|u| *u *= lr / shrink);
    if let Some(m) = first {
        for (m, u) in m.iter_mut().zip(&mut u) {
            *m = update.beta1 * *m + (1.0 - update.beta1) * *u;
            *u = *m;
        }
    }
    p.iter_mut().zip(u).for_each(|(p, u)| *p = *p - update.weight_decay * lr * *p - u);
}

/// What a row of the loss gives: the loss, plain cross-entropy, and whether its target is largest.
pub(super) struct Row {
    pub(super) loss: f64,
    pub(super) ce: f64,
    pub(super) correct: bool,
}

/// A row of logits, which become their gradient times `scale` if there is one.
pub(super) fn loss_row(
    x: &mut [f64],
    target: usize,
    scale: Option<f64>,
    options: LossOptions,
) -> Row {
    if let Some(cap) = options.soft_cap.map(f64::from) {
        x.iter_mut().for_each(|x| *x = cap * (*x / cap).tanh());
    }
    let n = x.len() as f64;
    let (e, l) = (f64::from(options.label_smoothing), f64::from(options.z_loss));
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let lse = max + x.iter().map(|z| (z - max).exp()).sum::<f64>().ln();
    let ce = lse - x[target];
    let q = if options.reweight { (-ce).exp() } else { 1.0 };
    let smooth = lse - x.iter().sum::<f64>() / n;
    let loss = q * ((1.0 - e) * ce + e * smooth) + l * lse * lse;
    let correct = x[target] == max;
    if let Some(scale) = scale {
        for (j, x) in x.iter_mut().enumerate() {
            let (p, hit) = ((*x - lse).exp(), f64::from(u8::from(j == target)));
            let dz = q * (p - (1.0 - e) * hit - e / n) + 2.0 * l * lse * p;
            let bend = options.soft_cap.map_or(1.0, |cap| 1.0 - (*x / f64::from(cap)).powi(2));
            *x = scale * dz * bend;
        }
    }
    Row { loss, ce, correct }
}
