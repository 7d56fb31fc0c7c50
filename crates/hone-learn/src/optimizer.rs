//! Settings of AdamW and of clipping.

use serde::{Deserialize, Serialize};

use crate::LearnError;

/// AdamW (Loshchilov and Hutter 2019) with PyTorch's order of operations, f32 moments, and clipping
/// by the global norm.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct OptimizerConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay of matrices (embeddings and adapters included); norms and biases have
    /// none.
    pub weight_decay: f64,
    /// Largest global norm of a step's gradient; `None` never clips.
    pub max_grad_norm: Option<f64>,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        OptimizerConfig {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            max_grad_norm: Some(1.0),
        }
    }
}

/// Added to the norm before dividing, as in `torch.nn.utils.clip_grad_norm_`.
const CLIP_EPS: f64 = 1e-6;

impl OptimizerConfig {
    /// Checks the ranges.
    pub fn check(&self) -> Result<(), LearnError> {
        let bad = |key, value: f64, expected| {
            Err(LearnError::Setting { key, value: value.to_string(), expected })
        };
        for (key, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&beta) {
                return bad(key, beta, "at least 0 and below 1");
            }
        }
        if !(self.eps > 0.0 && self.eps.is_finite()) {
            return bad("eps", self.eps, "above 0");
        }
        if !(self.weight_decay >= 0.0 && self.weight_decay.is_finite()) {
            return bad("weight_decay", self.weight_decay, "0 or more");
        }
        match self.max_grad_norm {
            Some(max) if !(max > 0.0 && max.is_finite()) => bad("max_grad_norm", max, "above 0"),
            _ => Ok(()),
        }
    }

    /// The factor on a gradient of that global norm: max_norm / (norm + 1e-6), at most 1.
    pub fn clip(&self, norm: f64) -> f64 {
        self.max_grad_norm.map_or(1.0, |max| (max / (norm + CLIP_EPS)).min(1.0))
    }
}
