//! The update rules that a run may choose from, with their knobs.

use hone_model::{ParamInfo, ParamKind};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::{LearnError, named};

/// The update rule of a run.
///
/// In a file it is a name, or a table of a `name` and knobs; a table without a name is AdamW's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(tag = "name")]
pub enum OptimizerConfig {
    /// AdamW in f32.
    #[serde(rename = "adamw")]
    AdamW(AdamWConfig),
    /// AdamW with moments of 8 bits.
    #[serde(rename = "adamw8bit")]
    AdamW8bit(AdamW8bitConfig),
    /// Lion.
    #[serde(rename = "lion")]
    Lion(LionConfig),
    /// Adafactor.
    #[serde(rename = "adafactor")]
    Adafactor(AdafactorConfig),
    /// Gradient descent, with or without momentum.
    #[serde(rename = "sgd")]
    Sgd(SgdConfig),
    /// Muon for the matrices of the layers and of adapters, AdamW for the rest.
    #[serde(rename = "muon")]
    Muon(MuonConfig),
}

/// AdamW (Loshchilov and Hutter 2019) with PyTorch's order of operations and f32 moments.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay of matrices (embeddings and adapters included); norms and biases have
    /// none.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        AdamWConfig { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

/// AdamW with block-wise 8-bit moments (Dettmers et al. 2022), blocks of 256 values.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamW8bitConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f64,
    /// Tensors of fewer values keep f32 moments, as in bitsandbytes.
    pub min_8bit_size: usize,
    /// Whether embeddings keep f32 moments, as transformers' `Trainer` has it.
    pub f32_embeddings: bool,
}

impl Default for AdamW8bitConfig {
    fn default() -> Self {
        let AdamWConfig { beta1, beta2, eps, weight_decay } = AdamWConfig::default();
        AdamW8bitConfig {
            beta1,
            beta2,
            eps,
            weight_decay,
            min_8bit_size: 4096,
            f32_embeddings: true,
        }
    }
}

impl AdamW8bitConfig {
    /// Whether a tensor's moments have 8 bits.
    pub fn has_codes(&self, info: &ParamInfo) -> bool {
        let is_kept = self.f32_embeddings && info.kind == ParamKind::Embedding;
        info.n_values() >= self.min_8bit_size && !is_kept
    }

    /// What it shares with AdamW.
    pub fn adamw(&self) -> AdamWConfig {
        let AdamW8bitConfig { beta1, beta2, eps, weight_decay, .. } = *self;
        AdamWConfig { beta1, beta2, eps, weight_decay }
    }
}

/// Lion (Chen et al. 2023): the sign of an interpolated momentum. Its rates are three to ten times
/// smaller than AdamW's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LionConfig {
    /// Share of the momentum in the step.
    pub beta1: f64,
    /// Decay of the momentum.
    pub beta2: f64,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f64,
}

impl Default for LionConfig {
    fn default() -> Self {
        LionConfig { beta1: 0.9, beta2: 0.99, weight_decay: 0.0 }
    }
}

/// Adafactor (Shazeer and Stern 2018) by the formula of `transformers.optimization.Adafactor`,
/// which is fairseq's; the defaults are those of transformers' `Trainer`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdafactorConfig {
    /// Added to the squared gradient.
    pub eps1: f64,
    /// Least root mean square of a tensor that scales its steps.
    pub eps2: f64,
    /// Largest root mean square of a step before it is multiplied by the rate.
    pub clip_threshold: f64,
    /// The second moment decays by 1 - t^decay_rate at step t.
    pub decay_rate: f64,
    /// Decay of a first moment; none is kept when it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beta1: Option<f64>,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f64,
    /// Whether steps are scaled by the root mean square of the tensor.
    pub scale_parameter: bool,
    /// Whether the rate is min(0.01, 1 / sqrt(t)) in place of the schedule's.
    pub relative_step: bool,
    /// Whether that rate starts at 1e-6 and rises by as much each step.
    pub warmup_init: bool,
}

impl Default for AdafactorConfig {
    fn default() -> Self {
        AdafactorConfig {
            eps1: 1e-30,
            eps2: 1e-3,
            clip_threshold: 1.0,
            decay_rate: -0.8,
            beta1: None,
            weight_decay: 0.0,
            scale_parameter: false,
            relative_step: false,
            warmup_init: false,
        }
    }
}

impl AdafactorConfig {
    /// The rate of step `t`, counted from 1, without a schedule.
    pub fn relative_lr(&self, t: u64) -> f64 {
        let least = if self.warmup_init { 1e-6 * t as f64 } else { 1e-2 };
        least.min(1.0 / (t as f64).sqrt())
    }
}

/// Stochastic gradient descent as `torch.optim.SGD` has it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SgdConfig {
    /// Decay of the momentum; 0 keeps none.
    pub momentum: f64,
    /// Share of the gradient that does not enter the momentum.
    pub dampening: f64,
    /// Whether the step looks ahead along the momentum.
    pub nesterov: bool,
    /// Weight decay of matrices, added to the gradient as in PyTorch: not decoupled.
    pub weight_decay: f64,
}

impl Default for SgdConfig {
    fn default() -> Self {
        SgdConfig { momentum: 0.9, dampening: 0.0, nesterov: false, weight_decay: 0.0 }
    }
}

/// How Muon's rate depends on the matrix (out, in); the names are those of `torch.optim.Muon`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MuonScale {
    /// sqrt(max(1, out / in)), of its author.
    #[default]
    Original,
    /// 0.2 sqrt(max(out, in)): steps as large as AdamW's, so that its rates can be taken over (Liu
    /// et al. 2025).
    MatchRmsAdamw,
    /// sqrt(out / in) (Bernstein 2025).
    SpectralUnclamped,
}

/// Muon (Jordan 2024) as `torch.optim.Muon` has it, with its Newton-Schulz iteration in f32, for
/// the matrices of the layers and of adapters; embeddings, heads, norms and biases have AdamW.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MuonConfig {
    /// Decay of the momentum.
    pub momentum: f64,
    /// Whether the step looks ahead along the momentum.
    pub nesterov: bool,
    /// Decoupled weight decay of those matrices.
    pub weight_decay: f64,
    /// Coefficients of x, x^3 and x^5 in the iteration.
    pub ns_coefficients: [f64; 3],
    /// Iterations.
    pub ns_steps: u32,
    /// Least norm that a momentum is divided by.
    pub eps: f64,
    /// How the rate depends on the matrix.
    pub adjust_lr: MuonScale,
    /// AdamW of everything else.
    pub adamw: AdamWConfig,
    /// Rate of AdamW over that of Muon.
    pub adamw_lr_scale: f64,
}

impl Default for MuonConfig {
    fn default() -> Self {
        MuonConfig {
            momentum: 0.95,
            nesterov: true,
            weight_decay: 0.0,
            ns_coefficients: [3.4445, -4.7750, 2.0315],
            ns_steps: 5,
            eps: 1e-7,
            adjust_lr: MuonScale::Original,
            adamw: AdamWConfig::default(),
            adamw_lr_scale: 1.0,
        }
    }
}

/// Most iterations, as in PyTorch.
const NS_STEPS_MAX: u32 = 99;

impl Default for OptimizerConfig {
    fn default() -> Self {
        OptimizerConfig::AdamW(AdamWConfig::default())
    }
}

impl<'de> Deserialize<'de> for OptimizerConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        let value = Value::deserialize(deserializer)?;
        let (name, table) = named::split::<D::Error>(value, Some("adamw"))?;
        Ok(match name.as_str() {
            "adamw" => OptimizerConfig::AdamW(named::knobs(&name, table)?),
            "adamw8bit" => OptimizerConfig::AdamW8bit(named::knobs(&name, table)?),
            "lion" => OptimizerConfig::Lion(named::knobs(&name, table)?),
            "adafactor" => OptimizerConfig::Adafactor(named::knobs(&name, table)?),
            "sgd" => OptimizerConfig::Sgd(named::knobs(&name, table)?),
            "muon" => OptimizerConfig::Muon(named::knobs(&name, table)?),
            other => {
                let names = OptimizerConfig::NAMES.join("`, `");
                return Err(D::Error::custom(format!("`{other}` is not one of `{names}`")));
            }
        })
    }
}

/// Refuses `value`.
pub(crate) fn bad(
    key: &'static str,
    value: impl ToString,
    expected: &'static str,
) -> Result<(), LearnError> {
    Err(LearnError::Setting { key, value: value.to_string(), expected })
}

/// A share of the past: at least 0 and below 1.
pub(crate) fn check_beta(key: &'static str, beta: f64) -> Result<(), LearnError> {
    if (0.0..1.0).contains(&beta) { Ok(()) } else { bad(key, beta, "at least 0 and below 1") }
}

pub(crate) fn check_positive(key: &'static str, x: f64) -> Result<(), LearnError> {
    if x > 0.0 && x.is_finite() { Ok(()) } else { bad(key, x, "above 0") }
}

pub(crate) fn check_not_negative(key: &'static str, x: f64) -> Result<(), LearnError> {
    if x >= 0.0 && x.is_finite() { Ok(()) } else { bad(key, x, "0 or more") }
}

impl AdamWConfig {
    /// Checks the ranges.
    pub fn check(&self) -> Result<(), LearnError> {
        check_beta("beta1", self.beta1)?;
        check_beta("beta2", self.beta2)?;
        check_positive("eps", self.eps)?;
        check_not_negative("weight_decay", self.weight_decay)
    }
}

impl AdafactorConfig {
    fn check(&self) -> Result<(), LearnError> {
        check_positive("eps1", self.eps1)?;
        check_not_negative("eps2", self.eps2)?;
        check_positive("clip_threshold", self.clip_threshold)?;
        check_not_negative("weight_decay", self.weight_decay)?;
        self.beta1.map_or(Ok(()), |beta1| check_beta("beta1", beta1))?;
        if !(self.decay_rate < 0.0 && self.decay_rate.is_finite()) {
            return bad("decay_rate", self.decay_rate, "below 0");
        }
        if self.warmup_init && !self.relative_step {
            return bad("warmup_init", true, "used without `relative_step = true`");
        }
        Ok(())
    }
}

impl SgdConfig {
    fn check(&self) -> Result<(), LearnError> {
        check_beta("momentum", self.momentum)?;
        check_not_negative("weight_decay", self.weight_decay)?;
        if !(0.0..=1.0).contains(&self.dampening) {
            return bad("dampening", self.dampening, "from 0 to 1");
        }
        if self.nesterov && (self.momentum == 0.0 || self.dampening != 0.0) {
            return bad("nesterov", true, "used without a momentum, or with `dampening`");
        }
        Ok(())
    }
}

impl MuonConfig {
    fn check(&self) -> Result<(), LearnError> {
        check_beta("momentum", self.momentum)?;
        check_not_negative("weight_decay", self.weight_decay)?;
        check_positive("eps", self.eps)?;
        check_not_negative("adamw_lr_scale", self.adamw_lr_scale)?;
        if self.ns_steps == 0 || self.ns_steps > NS_STEPS_MAX {
            return bad("ns_steps", self.ns_steps, "from 1 to 99");
        }
        if let Some(x) = self.ns_coefficients.iter().find(|x| !x.is_finite()) {
            return bad("ns_coefficients", x, "three numbers");
        }
        self.adamw.check()
    }

    /// Factor on the rate of a matrix (out, in).
    pub fn lr_factor(&self, out: usize, inp: usize) -> f64 {
        let (out, inp) = (out as f64, inp as f64);
        match self.adjust_lr {
            MuonScale::Original => (out / inp).max(1.0).sqrt(),
            MuonScale::MatchRmsAdamw => 0.2 * out.max(inp).sqrt(),
            MuonScale::SpectralUnclamped => (out / inp).sqrt(),
        }
    }
}

impl OptimizerConfig {
    /// Every name.
    pub const NAMES: [&'static str; 6] = ["adamw", "adamw8bit", "lion", "adafactor", "sgd", "muon"];

    /// Its name.
    pub fn name(&self) -> &'static str {
        match self {
            OptimizerConfig::AdamW(_) => "adamw",
            OptimizerConfig::AdamW8bit(_) => "adamw8bit",
            OptimizerConfig::Lion(_) => "lion",
            OptimizerConfig::Adafactor(_) => "adafactor",
            OptimizerConfig::Sgd(_) => "sgd",
            OptimizerConfig::Muon(_) => "muon",
        }
    }

    /// Checks the ranges.
    pub fn check(&self) -> Result<(), LearnError> {
        match self {
            OptimizerConfig::AdamW(adamw) => adamw.check(),
            OptimizerConfig::AdamW8bit(adamw) => adamw.adamw().check(),
            OptimizerConfig::Lion(lion) => {
                check_beta("beta1", lion.beta1)?;
                check_beta("beta2", lion.beta2)?;
                check_not_negative("weight_decay", lion.weight_decay)
            }
            OptimizerConfig::Adafactor(adafactor) => adafactor.check(),
            OptimizerConfig::Sgd(sgd) => sgd.check(),
            OptimizerConfig::Muon(muon) => muon.check(),
        }
    }

    /// The rate of step `t`, counted from 1, given the schedule's.
    pub fn lr(&self, scheduled: f64, t: u64) -> f64 {
        match self {
            OptimizerConfig::Adafactor(adafactor) if adafactor.relative_step => {
                adafactor.relative_lr(t)
            }
            _ => scheduled,
        }
    }
}
