//! What training adds to the plain operators: options of the loss, noise on embeddings.

use super::loss::{Row, collect, max_of, sum_exp};
use super::par::{self, task_rows};
use super::pointwise::rows_mut;
use super::simd::{Level, Simd, exp, simd_fn};
use crate::shape::Layout;
use crate::{LossOptions, LossSums, rng};

/// Beyond it tanh is taken as 1: it is, to within the error of the approximation.
const TANH_MAX: f32 = 7.905_311;

/// Coefficients of x, x^3, ... and of 1, x^2, ... of the rational approximation of tanh that Eigen
/// uses: within seven units in the last place, five with fused multiplication.
const TANH_ABOVE: [f32; 7] = [
    4.893_524_6e-3,
    6.372_619_3e-4,
    1.485_722_4e-5,
    5.122_297_1e-8,
    -8.604_672e-11,
    2.000_188e-13,
    -2.760_768_5e-16,
];
const TANH_BELOW: [f32; 4] = [4.893_525e-3, 2.268_434_6e-3, 1.185_347_1e-4, 1.198_258_4e-6];

/// tanh(x) in each lane; NaN of NaN.
#[inline(always)]
fn tanh<S: Simd>(s: S, x: S::V) -> S::V {
    // The bound is the first argument, so that NaN, the second, stays.
    let x = s.max(s.splat(-TANH_MAX), s.min(s.splat(TANH_MAX), x));
    let square = s.mul(x, x);
    let horner = |coefficients: &[f32]| {
        let mut sum = s.splat(*coefficients.last().expect("there are some"));
        for &c in coefficients.iter().rev().skip(1) {
            sum = s.fma(sum, square, s.splat(c));
        }
        sum
    };
    s.div(s.mul(x, horner(&TANH_ABOVE)), horner(&TANH_BELOW))
}

simd_fn! {
    /// `z <- cap tanh(z / cap)`.
    fn cap_piece<s>(z: &mut [f32], cap: f32) {
        for z in z.chunks_mut(S::LANES) {
            let x = s.div(s.load_part(z, 0.0), s.splat(cap));
            s.store_part(z, s.mul(s.splat(cap), tanh(s, x)));
        }
    }
}

simd_fn! {
    /// Sum of z - max over a row.
    fn sum_below<s>(z: &[f32], max: f32) -> f32 {
        let (shift, mut sums) = (s.splat(max), [s.splat(0.0); 4]);
        for (i, z) in z.chunks(S::LANES).enumerate() {
            sums[i % 4] = s.add(sums[i % 4], s.sub(s.load_part(z, max), shift));
        }
        s.sum_lanes(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])))
    }
}

/// The scalars of a row's gradient.
#[derive(Clone, Copy)]
struct Slope {
    max: f32,
    /// Factor of exp(z - max).
    softmax: f32,
    /// What every logit loses to label smoothing.
    smooth: f32,
    /// c; infinite without one.
    cap: f32,
}

simd_fn! {
    /// Logits of a row become their gradient, but for the target's own share.
    fn slope_piece<s>(z: &mut [f32], r: Slope) {
        let (max, softmax, one) = (s.splat(r.max), s.splat(r.softmax), s.splat(1.0));
        for z in z.chunks_mut(S::LANES) {
            let x = s.load_part(z, 0.0);
            let slope = s.mul(exp(s, s.sub(x, max)), softmax);
            // A quotient: a logit that is all of the cap has no slope, never one below 0.
            let t = s.div(x, s.splat(r.cap));
            let bend = s.fma(s.mul(t, s.splat(-1.0)), t, one);
            s.store_part(z, s.mul(s.sub(slope, s.splat(r.smooth)), bend));
        }
    }
}

/// One row: its loss with all options, and its gradient in place of its logits.
fn row(
    level: Level,
    z: &mut [f32],
    target: usize,
    scale: Option<f32>,
    options: LossOptions,
) -> Row {
    if let Some(cap) = options.soft_cap {
        cap_piece(level, z, cap);
    }
    let (max, at_target, n) = (max_of(level, z), z[target], z.len() as f64);
    let sum = sum_exp(level, z, max);
    let log_sum = f64::from(sum).ln();
    // Relative to the maximum, so that large logits do not swallow the logarithm.
    let ce = log_sum + (f64::from(max) - f64::from(at_target));
    let lse = log_sum + f64::from(max);
    let e = f64::from(options.label_smoothing);
    let uniform = if e > 0.0 { log_sum - f64::from(sum_below(level, z, max)) / n } else { 0.0 };
    let q = if options.reweight { (-ce).exp() } else { 1.0 };
    let z_loss = f64::from(options.z_loss);
    if let Some(scale) = scale {
        let scale = f64::from(scale);
        let cap = options.soft_cap.unwrap_or(f32::INFINITY);
        let slope = Slope {
            max,
            softmax: (scale * (q + 2.0 * z_loss * lse) / f64::from(sum)) as f32,
            smooth: (scale * q * e / n) as f32,
            cap,
        };
        slope_piece(level, z, slope);
        let t = at_target / cap;
        z[target] -= (scale * q * (1.0 - e)) as f32 * (1.0 - t * t);
    }
    let loss = q * ((1.0 - e) * ce + e * uniform) + z_loss * lse * lse;
    Row { loss: loss as f32, ce: ce as f32, correct: at_target == max }
}

/// See [`crate::Backend::cross_entropy_with`].
#[allow(clippy::too_many_arguments, reason = "the arguments of the operator")]
pub(super) fn cross_entropy(
    level: Level,
    l: Layout,
    logits: &mut [f32],
    (targets, weights): (&[u32], &[f32]),
    grad_scale: Option<f32>,
    row_loss: Option<&mut [f32]>,
    options: LossOptions,
) -> LossSums {
    let rows: Vec<std::sync::OnceLock<Row>> = vec![std::sync::OnceLock::new(); l.rows];
    rows_mut(l, logits, |i, z| {
        let scale = grad_scale.map(|scale| scale * weights[i]);
        let row = row(level, z, targets[i] as usize, scale, options);
        assert!(rows[i].set(row).is_ok(), "each row is handled once");
    });
    collect(rows, weights, row_loss)
}

/// See [`crate::Backend::add_noise`].
pub(super) fn add_noise(
    x: &mut [f32],
    d: usize,
    seq_lens: &[usize],
    alpha: f32,
    seed: u64,
    first: u64,
) {
    // Of each document: its first row, its stream, and the width of its noise.
    let mut documents = Vec::with_capacity(seq_lens.len());
    let mut start = 0;
    for (k, &len) in seq_lens.iter().enumerate() {
        let bound = f64::from(alpha) / ((len * d) as f64).sqrt();
        documents.push((start, rng::mix(seed, first + k as u64), bound));
        start += len;
    }
    let rows = task_rows(d);
    par::pieces(x, rows * d, |task, piece| {
        for (i, x) in piece.chunks_mut(d).enumerate() {
            let row = task * rows + i;
            let at = documents.partition_point(|&(start, ..)| start <= row) - 1;
            let (start, stream, bound) = documents[at];
            let index = ((row - start) * d) as u64;
            for (j, x) in x.iter_mut().enumerate() {
                *x += rng::noise(stream, index + j as u64, bound);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Largest error of tanh in units of f32's rounding.
    const UNITS_MAX: f64 = 7.0;

    #[test]
    fn tanh_is_tanh() {
        let steps = -20_000..=20_000;
        let x: Vec<f32> = steps.map(|i| (i as f32 / 1000.0).powi(3) / 300.0).collect();
        for level in Level::all() {
            let mut found = x.clone();
            cap_piece(level, &mut found, 1.0);
            let mut worst = 0.0_f64;
            for (x, found) in x.iter().zip(found) {
                let exact = f64::from(*x).tanh();
                let unit = f64::from(f32::EPSILON) / 2.0 * exact.abs();
                worst = worst.max((f64::from(found) - exact).abs() / unit.max(1e-40));
                assert!(found.abs() <= 1.0, "{level:?} {x}: {found}");
            }
            assert!(worst <= UNITS_MAX, "{level:?}: off by {worst} units");
            let mut edges = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0];
            cap_piece(level, &mut edges, 2.0);
            assert!(edges[0].is_nan());
            assert_eq!((edges[3], edges[2]), (0.0, -edges[1]));
            assert!(edges[1] <= 2.0 && f64::from(edges[1]) >= 2.0 - UNITS_MAX * 1.2e-7);
        }
    }
}
