//! Flags, the `[merge]` table, and the plan they resolve to.

use std::path::PathBuf;

use hone_cli::{Common, Failure, Pipeline};
use hone_model::StoredType;
use serde::{Deserialize, Serialize};

/// Fold an adapter into its base, or export full weights, as a Hugging Face model directory.
#[derive(Debug, clap::Parser)]
#[command(name = "hone-merge", version)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) common: Common,
}

impl AsRef<Common> for Args {
    fn as_ref(&self) -> &Common {
        &self.common
    }
}

/// Value type of the weights that are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Dtype {
    /// As in the source: bf16 where all of its tensors are, f32 otherwise (which holds f16
    /// exactly).
    #[default]
    Base,
    /// Exact.
    F32,
    /// Rounded to bfloat16.
    Bf16,
}

impl Dtype {
    /// How values will lie in the file, when those of the source are all bfloat16 or not.
    pub(crate) fn stored(self, is_source_bf16: bool) -> StoredType {
        match self {
            Dtype::Bf16 => StoredType::Bf16,
            Dtype::Base if is_source_bf16 => StoredType::Bf16,
            Dtype::Base | Dtype::F32 => StoredType::F32,
        }
    }
}

/// Which base an adapter that learned on 4-bit weights is folded into.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum MergeBase {
    /// The weights that it learned on, dequantised: the merged model is the trained one.
    #[default]
    Trained,
    /// The weights as they were before: nearer to the base, and what quantising took from it, which
    /// the adapter has learned to live with, is back.
    Original,
}

/// The `[merge]` table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct MergeConfig {
    /// `base`, `f32` or `bf16`.
    pub(crate) dtype: Dtype,
    /// After `method = "qlora"`: `trained` or `original`.
    pub(crate) base: MergeBase,
    /// Documents that the check runs.
    pub(crate) check_rows: usize,
    /// Largest difference of a logit that an f32 merge may make. W + s B A is the same sum in
    /// another order, so what is left is rounding: about 1e-5 on logits of size 10. A wrong scaling
    /// or a transposed factor makes a difference of 0.1 and more.
    pub(crate) max_logit_diff: f64,
    /// Largest mean divergence, in nats a token, that rounding to bfloat16 may make. A weight keeps
    /// 8 bits, which moves logits by about 0.05 and costs about 1e-3 nats; ten times that is no
    /// rounding any more.
    pub(crate) max_kl: f64,
}

impl Default for MergeConfig {
    fn default() -> Self {
        MergeConfig {
            dtype: Dtype::Base,
            base: MergeBase::Trained,
            check_rows: 8,
            max_logit_diff: 1e-3,
            max_kl: 0.01,
        }
    }
}

/// The plan of a merge, checked.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct MergePlan {
    /// The table with every default filled in.
    #[serde(flatten)]
    pub(crate) config: MergeConfig,
    /// The base model's directory.
    #[serde(skip)]
    pub(crate) base: PathBuf,
    /// What was trained.
    #[serde(skip)]
    pub(crate) trained: PathBuf,
    /// The packs it was trained on.
    #[serde(skip)]
    pub(crate) packs: PathBuf,
    /// The rendered rows that these come from, with their template.
    #[serde(skip)]
    pub(crate) rendered: PathBuf,
    /// What is written.
    #[serde(skip)]
    pub(crate) out: PathBuf,
}

impl MergeConfig {
    fn check(&self) -> Result<(), Failure> {
        if self.check_rows == 0 {
            return Err(Failure::usage("[merge] `check_rows` is 0").hint(
                "a merge that nothing was computed with is not known to be one; give 1 or more",
            ));
        }
        for (key, bound) in [("max_logit_diff", self.max_logit_diff), ("max_kl", self.max_kl)] {
            if !(bound >= 0.0 && bound.is_finite()) {
                return Err(Failure::usage(format!("[merge] `{key}` = {bound} is not 0 or more")));
            }
        }
        Ok(())
    }
}

impl MergePlan {
    /// Reads the pipeline file and checks the settings; opens nothing else.
    pub(crate) fn resolve(common: &Common) -> Result<Self, Failure> {
        let pipeline = Pipeline::load(common)?;
        let config: MergeConfig = pipeline.stage("merge")?;
        config.check().map_err(|failure| pipeline.at("merge", failure))?;
        Ok(MergePlan {
            config,
            base: pipeline.need_base()?.to_owned(),
            trained: pipeline.dir("train"),
            packs: pipeline.dir("tokenize"),
            rendered: pipeline.dir("template"),
            out: pipeline.dir("merge"),
        })
    }
}
