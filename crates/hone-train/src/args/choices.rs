//! Settings of the `[train]` table that are one of a few names.

use hone_model::Recompute;
use serde::{Deserialize, Serialize};

/// What is trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Method {
    /// A low-rank adapter (Hu et al. 2021); the base stays as it is.
    #[default]
    Lora,
    /// Such an adapter on linear maps of 4 bits (Dettmers et al. 2023).
    Qlora,
    /// All weights.
    Full,
}

impl Method {
    /// Whether an adapter is trained, and the base stays as it is.
    pub(crate) fn has_adapter(self) -> bool {
        self != Method::Full
    }
}

/// The code book of 4-bit weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum QuantType {
    /// Quantiles of a normal distribution.
    Nf4,
    /// Floats of 4 bits.
    Fp4,
}

/// Which biases are trained with an adapter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Bias {
    /// None.
    #[default]
    None,
    /// All of the model's.
    All,
    /// Those of the modules that have an adapter.
    LoraOnly,
}

/// How a fresh adapter starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum LoraInit {
    /// A uniform, B zero: it changes nothing yet.
    #[default]
    Default,
    /// A normal of deviation 1/rank, B zero.
    Gaussian,
    /// The largest singular values of the base, which loses them while it is trained; saved as a plain adapter of twice the rank.
    Pissa,
    /// What the base's weights have lost by being cut to 4 bits.
    Loftq,
}

/// Which tokens count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Objective {
    /// Tokens count as the packs' loss weights say.
    #[default]
    Sft,
    /// Every token counts 1: pre-training.
    Causal,
}

/// Where the weights come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Init {
    /// From the base model's safetensors files.
    #[default]
    Base,
    /// Drawn anew, N(0, `initializer_range`), for the base's `config.json`.
    Random,
}

/// Value type of full weights in their file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum SaveDtype {
    /// Exact.
    #[default]
    F32,
    /// Rounded to bfloat16.
    Bf16,
}

/// What an epoch puts in a random order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Shuffle {
    /// Packs.
    #[default]
    Packs,
    /// Batches of packs that stand beside each other: those of similar length stay together, if they were laid so.
    Batches,
    /// Nothing: packs come in the order in which they lie.
    None,
}

/// Which weights a run with a moving average leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Save {
    /// The moving average.
    Average,
    /// Those after the last step.
    Last,
}

/// How much the backward pass computes again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum RecomputeKnob {
    /// Nothing: fastest.
    #[default]
    None,
    /// The linear maps of the attention half.
    Attention,
    /// Each layer's forward: a third more time, a fraction of the memory.
    Layer,
}

impl RecomputeKnob {
    /// All, each slower and smaller than the one before.
    pub(crate) const ALL: [RecomputeKnob; 3] =
        [RecomputeKnob::None, RecomputeKnob::Attention, RecomputeKnob::Layer];

    /// Its name in the table.
    pub(crate) fn name(self) -> &'static str {
        match self {
            RecomputeKnob::None => "none",
            RecomputeKnob::Attention => "attention",
            RecomputeKnob::Layer => "layer",
        }
    }

    /// As the engine has it.
    pub(crate) fn level(self) -> Recompute {
        match self {
            RecomputeKnob::None => Recompute::None,
            RecomputeKnob::Attention => Recompute::Attention,
            RecomputeKnob::Layer => Recompute::Layer,
        }
    }
}
