//! Every gradient against the loss itself: (L(p + h d) - L(p - h d)) / 2h for a random direction d
//! in each tensor.

use crate::common::*;
use hone_kernels::{Reference, rng};
use hone_model::{Batch, Decoder, LoraConfig, Tensors, Training};

/// Difference of the two slopes allowed, over the larger of the slope and [`FLOOR`]. The loss is
/// summed in f64 from f32 activations, so a slope has an error of about 1e-6 / h.
const RELATIVE: f64 = 5e-3;
const FLOOR: f64 = 2e-2;

/// Step along a direction of norm one.
const H: f32 = 4e-3;

/// Loss over the sum of the weights.
fn loss(decoder: &mut Decoder<Reference>, batch: &Batch) -> f64 {
    let sums = decoder.loss(batch, None).unwrap();
    sums.weighted_loss / sums.weight
}

/// Checks every trained tensor in three directions.
pub(crate) fn check(mut decoder: Decoder<Reference>, batch: &Batch, n_expected: usize) {
    decoder.accumulate(batch, (1.0 / batch.weight()) as f32, None).unwrap();
    let gradients = decoder.gradients();
    let values = decoder.trained();
    assert_eq!(gradients.len(), n_expected);
    for gradient in gradients.iter() {
        for seed in 0..3 {
            let n = gradient.data.len();
            let mut direction: Vec<f64> = (0..n).map(|i| rng::normal(seed, i as u64)).collect();
            let norm = direction.iter().map(|d| d * d).sum::<f64>().sqrt();
            direction.iter_mut().for_each(|d| *d /= norm);
            let expected: f64 =
                gradient.data.iter().zip(&direction).map(|(&g, d)| f64::from(g) * d).sum();
            let mut at = |h: f32| {
                let mut moved: Tensors = values.clone();
                let tensor = moved.get_mut(&gradient.name).unwrap();
                for (value, d) in tensor.data.iter_mut().zip(&direction) {
                    *value += h * *d as f32;
                }
                decoder.set_trained(&moved).unwrap();
                loss(&mut decoder, batch)
            };
            // Richardson's extrapolation takes the error of order h^2 out.
            let wide = (at(2.0 * H) - at(-2.0 * H)) / (4.0 * f64::from(H));
            let near = (at(H) - at(-H)) / (2.0 * f64::from(H));
            let found = (4.0 * near - wide) / 3.0;
            let off = (found - expected).abs() / expected.abs().max(FLOOR);
            let name = &gradient.name;
            assert!(off < RELATIVE, "{name}: slope {found}, gradient {expected}: {off:e}");
        }
    }
    decoder.set_trained(&values).unwrap();
}

#[test]
fn all_weights() {
    for odd in [false, true] {
        let config = config(odd);
        let batch = pack(&documents(&config, &[7, 4, 11]));
        let n = config.tensors().len();
        check(decoder(Reference, &config, Training::Full), &batch, n);
    }
}

#[test]
fn adapters() {
    for odd in [false, true] {
        let config = config(odd);
        let batch = pack(&documents(&config, &[7, 4, 11]));
        let mut decoder = decoder(Reference, &config, Training::Frozen);
        decoder.attach(&adapter(&config, LoraConfig::all_linear(3, 6.0)), true).unwrap();
        check(decoder, &batch, 3 * 7 * 2);
    }
}
