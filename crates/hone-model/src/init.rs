//! Random weights.

use hone_kernels::rng;
use rayon::prelude::*;

use crate::ModelConfig;
use crate::tensors::{NamedTensor, Tensors};

/// Weights to pre-train from: matrices N(0, `initializer_range`), norms one (zero where one is
/// added to them), biases zero, as transformers initialises the families.
///
/// Every value is a function of `seed`, the tensor's name and the index alone.
pub fn init_weights(config: &ModelConfig, seed: u64) -> Tensors {
    let tensor = |entry: crate::TensorEntry| {
        let n: usize = entry.shape.iter().product();
        let data = if entry.name.ends_with("norm.weight") {
            vec![if config.knobs.norm_plus_one { 0.0 } else { 1.0 }; n]
        } else if entry.name.ends_with(".bias") {
            vec![0.0; n]
        } else {
            let stream = named_seed(seed, &entry.name);
            let value = |i| (rng::normal(stream, i as u64) * config.initializer_range) as f32;
            (0..n).into_par_iter().map(value).collect()
        };
        NamedTensor::new(entry.name, entry.shape, data)
    };
    config.tensors().into_iter().map(tensor).collect()
}

/// Draws rows of an embedding matrix anew: N(0, s), with s the root mean square of the rows that
/// stay.
///
/// Rows of tokens that never occur in pre-training are all pushed the same way by the softmax and
/// end up nearly parallel, so that fine-tuning cannot tell them apart; drawing them again before
/// the model is used undoes that.
pub fn reinit_rows(matrix: &mut NamedTensor, rows: &[u32], seed: u64) {
    let width = *matrix.shape.last().expect("an embedding matrix has two dimensions");
    let is_drawn = |row: usize| rows.contains(&(row as u32));
    let (mut sum, mut n) = (0.0, 0);
    for (_, row) in matrix.data.chunks(width).enumerate().filter(|&(i, _)| !is_drawn(i)) {
        sum += row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>();
        n += width;
    }
    let scale = (sum / n.max(1) as f64).sqrt();
    let stream = named_seed(seed, &matrix.name);
    for (i, row) in matrix.data.chunks_mut(width).enumerate().filter(|&(i, _)| is_drawn(i)) {
        for (j, value) in row.iter_mut().enumerate() {
            *value = (rng::normal(stream, (i * width + j) as u64) * scale) as f32;
        }
    }
}

/// A seed of its own for each tensor: the bytes of the name folded into `seed`.
pub(crate) fn named_seed(seed: u64, name: &str) -> u64 {
    name.bytes().fold(seed, |seed, byte| rng::mix(seed, u64::from(byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reinit_touches_only_the_named_rows() {
        let data: Vec<f32> = (0..400).map(|i| if i % 2 == 0 { 0.5 } else { -0.5 }).collect();
        let before = NamedTensor::new("e", vec![4, 100], data);
        let mut after = before.clone();
        reinit_rows(&mut after, &[1, 3], 7);
        assert_eq!(after.data[..100], before.data[..100]);
        assert_eq!(after.data[200..300], before.data[200..300]);
        let rms = |row: &[f32]| (row.iter().map(|v| v * v).sum::<f32>() / 100.0).sqrt();
        for row in [&after.data[100..200], &after.data[300..]] {
            assert!((rms(row) - 0.5).abs() < 0.15, "{}", rms(row));
        }
        assert_ne!(after.data[100..200], after.data[300..]);
    }
}
