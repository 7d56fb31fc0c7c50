//! The table of rotary positions.

use crate::ModelConfig;

/// Cosines and sines of positions 0 to `n_positions` - 1: row p is K/2 cosines, then K/2 sines, of
/// the angles p theta^(-2i/K).
///
/// Angles are rounded to f32 where transformers rounds them (the inverse frequency and the
/// product), because at a position in the thousands the product's rounding is the larger part of a
/// logit's difference.
pub(crate) fn cos_sin(config: &ModelConfig, n_positions: usize) -> Vec<f32> {
    let half = config.head_dim / 2;
    let inverse = |i: usize| {
        let exponent = (2 * i) as f64 / config.head_dim as f64;
        (1.0 / config.rope_theta.powf(exponent)) as f32
    };
    let frequencies: Vec<f32> = (0..half).map(inverse).collect();
    let mut table = Vec::with_capacity(n_positions * config.head_dim);
    for position in 0..n_positions {
        let angle = |&frequency: &f32| f64::from(position as f32 * frequency);
        table.extend(frequencies.iter().map(|f| angle(f).cos() as f32));
        table.extend(frequencies.iter().map(|f| angle(f).sin() as f32));
    }
    table
}
