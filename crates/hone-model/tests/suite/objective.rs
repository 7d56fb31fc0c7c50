//! Gradients of a training pass with everything added to it, against the pass's own loss.

use crate::common::*;
use hone_kernels::{Reference, rng};
use hone_model::{EmbeddingNoise, LossOptions, PassOptions, Training};

/// Difference of the two slopes allowed, over the larger of the slope and [`FLOOR`]; the step and
/// the reasons are those of `finite_differences`.
const RELATIVE: f64 = 5e-3;
const FLOOR: f64 = 2e-2;
const H: f32 = 4e-3;

#[test]
fn options_and_noise() {
    let config = config(true);
    let batch = pack(&documents(&config, &[7, 4, 11]));
    let mut decoder = decoder(Reference, &config, Training::Full);
    // A reweighted loss is not the integral of its gradient: the kernels' tests have it.
    decoder.set_loss_options(LossOptions {
        label_smoothing: 0.2,
        z_loss: 0.05,
        reweight: false,
        soft_cap: Some(2.0),
    });
    let noise = EmbeddingNoise { alpha: 3.0, seed: 8, first_document: 2 };
    let options = PassOptions { dropout_seed: None, noise: Some(noise) };
    let scale = (1.0 / batch.weight()) as f32;
    decoder.accumulate_with(&batch, scale, options).unwrap();
    let (gradients, values) = (decoder.gradients(), decoder.trained());
    assert_eq!(gradients.len(), config.tensors().len());
    for gradient in gradients.iter() {
        let n = gradient.data.len() as u64;
        let mut direction: Vec<f64> = (0..n).map(|i| rng::normal(5, i)).collect();
        let norm = direction.iter().map(|d| d * d).sum::<f64>().sqrt();
        direction.iter_mut().for_each(|d| *d /= norm);
        let pairs = gradient.data.iter().zip(&direction);
        let expected: f64 = pairs.map(|(&g, d)| f64::from(g) * d).sum();
        let mut at = |h: f32| {
            let mut moved = values.clone();
            let tensor = moved.get_mut(&gradient.name).unwrap();
            tensor.data.iter_mut().zip(&direction).for_each(|(x, d)| *x += h * *d as f32);
            decoder.set_trained(&moved).unwrap();
            let sums = decoder.accumulate_with(&batch, scale, options).unwrap();
            sums.weighted_loss / sums.weight
        };
        let wide = (at(2.0 * H) - at(-2.0 * H)) / (4.0 * f64::from(H));
        let near = (at(H) - at(-H)) / (2.0 * f64::from(H));
        let found = (4.0 * near - wide) / 3.0;
        let off = (found - expected).abs() / expected.abs().max(FLOOR);
        assert!(off < RELATIVE, "{}: slope {found}, gradient {expected}: {off:e}", gradient.name);
    }
}
