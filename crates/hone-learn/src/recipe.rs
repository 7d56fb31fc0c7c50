//! Everything that decides how a model learns, besides its data and its rate.

use hone_kernels::LossOptions;
use hone_model::ParamInfo;
use serde::{Deserialize, Serialize};

use crate::optimizer::{bad, check_beta, check_not_negative, check_positive};
use crate::{GroupConfig, LearnError, OptimizerConfig, groups};

/// How a model learns.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Recipe {
    /// The update rule.
    pub optimizer: OptimizerConfig,
    /// Largest global norm of a step's gradient; `None` never clips.
    pub max_grad_norm: Option<f64>,
    /// Rates and decays of some tensors; the first group that has a tensor decides.
    pub groups: Vec<GroupConfig>,
    /// Decay of a moving average of the weights (Polyak and Juditsky 1992), which starts as the
    /// weights after the first step; `None` keeps none.
    pub ema_decay: Option<f64>,
    /// What is added to cross-entropy.
    pub loss: LossConfig,
    /// Noise on the embeddings of training (Jain et al. 2023: NEFTune): uniform, up to alpha / sqrt(L
    /// D) for a document of L tokens; 0 has none.
    pub neftune_alpha: f64,
}

impl Default for Recipe {
    fn default() -> Self {
        Recipe {
            optimizer: OptimizerConfig::default(),
            max_grad_norm: Some(1.0),
            groups: Vec::new(),
            ema_decay: None,
            loss: LossConfig::default(),
            neftune_alpha: 0.0,
        }
    }
}

impl From<OptimizerConfig> for Recipe {
    /// The rule with every other default.
    fn from(optimizer: OptimizerConfig) -> Self {
        Recipe { optimizer, ..Recipe::default() }
    }
}

/// What is added to the cross-entropy of training. Evaluation has plain cross-entropy, but for the
/// soft cap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LossConfig {
    /// Share of the target that is spread over the vocabulary (Szegedy et al. 2016).
    pub label_smoothing: f64,
    /// Weight of the squared log-sum-exp of the logits (Chowdhery et al. 2022).
    pub z_loss: f64,
    /// Multiplies each token's cross-entropy by its probability, held constant (Wu et al. 2025:
    /// dynamic fine-tuning).
    pub dft: bool,
    /// c: logits become c tanh(z / c), in training and evaluation (Gemma 2). A model trained so has
    /// to be run so: its `config.json` needs the cap as `final_logit_softcapping`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub soft_cap: Option<f64>,
}

/// Added to the norm before dividing, as in `torch.nn.utils.clip_grad_norm_`.
const CLIP_EPS: f64 = 1e-6;

impl Recipe {
    /// Checks the ranges; groups are checked against a model's names by [`crate::Learner::new`].
    pub fn check(&self) -> Result<(), LearnError> {
        self.optimizer.check()?;
        self.max_grad_norm.map_or(Ok(()), |max| check_positive("max_grad_norm", max))?;
        self.ema_decay.map_or(Ok(()), |decay| check_beta("ema_decay", decay))?;
        check_not_negative("neftune_alpha", self.neftune_alpha)?;
        check_not_negative("z_loss", self.loss.z_loss)?;
        self.loss.soft_cap.map_or(Ok(()), |cap| check_positive("soft_cap", cap))?;
        if !(0.0..1.0).contains(&self.loss.label_smoothing) {
            return bad("label_smoothing", self.loss.label_smoothing, "at least 0 and below 1");
        }
        self.groups.iter().try_for_each(GroupConfig::check)
    }

    /// Checks the groups against the tensors that will be trained; `lr` is the schedule's peak.
    pub fn check_groups(&self, lr: f64, infos: &[ParamInfo]) -> Result<(), LearnError> {
        groups::resolve(&self.groups, &self.optimizer, lr, infos).map(|_| ())
    }

    /// The factor on a gradient of that global norm: max_norm / (norm + 1e-6), at most 1.
    pub fn clip(&self, norm: f64) -> f64 {
        self.max_grad_norm.map_or(1.0, |max| (max / (norm + CLIP_EPS)).min(1.0))
    }

    /// The loss's options as the operators take them.
    pub(crate) fn loss_options(&self) -> LossOptions {
        LossOptions {
            label_smoothing: self.loss.label_smoothing as f32,
            z_loss: self.loss.z_loss as f32,
            reweight: self.loss.dft,
            soft_cap: self.loss.soft_cap.map(|cap| cap as f32),
        }
    }
}
