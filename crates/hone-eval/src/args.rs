//! Flags, the `[eval]` table, and the plan they resolve to.

use std::path::PathBuf;

use hone_cli::{Common, Failure, Pipeline, is_default};
use hone_kernels::Place;
use hone_model::Compute;
use serde::{Deserialize, Serialize};

/// Measure base and tuned model on held-out rows, and write a report.
#[derive(Debug, clap::Parser)]
#[command(name = "hone-eval", version)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) common: Common,
}

impl AsRef<Common> for Args {
    fn as_ref(&self) -> &Common {
        &self.common
    }
}

/// What an answer has to be, beside equal to the reference.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Format {
    /// Any text.
    #[default]
    Text,
    /// One JSON object with exactly the reference's keys in their order.
    Json,
}

/// The `[eval]` table. A key that came after the first release is left out of the record of a run that does not use it, so that
/// its key stays what it was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct EvalConfig {
    /// Most new tokens of an answer.
    pub(crate) max_new: usize,
    /// Prompts answered side by side; changes memory and speed, not the result.
    pub(crate) batch_size: usize,
    /// `cpu`, `cuda:0` or another GPU, or `auto`: the first GPU if there is one that this program can use, else the processor.
    #[serde(skip_serializing_if = "Place::is_cpu")]
    pub(crate) device: Place,
    /// `f32` or `bf16`: the arithmetic of matrix products, of both models. Not given it is f32 whatever training computed in: an
    /// evaluation is a measurement, and rounds nothing that it is not told to.
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) compute: Compute,
    /// Most prompts asked, evenly spaced over all; all of them when not given.
    pub(crate) max_prompts: Option<usize>,
    /// `text` or `json`.
    pub(crate) format: Format,
    /// Prompts shown in the report.
    pub(crate) samples: usize,
    /// How many of these are also answered by drawing tokens.
    pub(crate) sampled: usize,
    /// Temperature of the drawn answers.
    pub(crate) temperature: f64,
    /// Nucleus of the drawn answers.
    pub(crate) top_p: f64,
    /// Gate: share of answers of the tuned model that are the reference, and end.
    pub(crate) min_exact_match: Option<f64>,
    /// Gate: share of answers of the tuned model that end by themselves.
    pub(crate) min_stop_rate: Option<f64>,
    /// Gate: share of answers of the tuned model that are a JSON object of the form asked for.
    pub(crate) min_json_valid: Option<f64>,
    /// Gate: exact match of the base model, with chat markers or without, whichever is more.
    pub(crate) max_base_exact_match: Option<f64>,
    /// Gate: rise of the perplexity of plain text from base to tuned, in percent.
    pub(crate) max_plain_perplexity_rise_percent: Option<f64>,
    /// Gate of a control that is meant to forget: the same rise is at least so large.
    pub(crate) min_plain_perplexity_rise_percent: Option<f64>,
}

impl Default for EvalConfig {
    fn default() -> Self {
        EvalConfig {
            max_new: 256,
            batch_size: 32,
            device: Place::Auto,
            compute: Compute::F32,
            max_prompts: None,
            format: Format::Text,
            samples: 12,
            sampled: 4,
            temperature: 0.8,
            top_p: 0.95,
            min_exact_match: None,
            min_stop_rate: None,
            min_json_valid: None,
            max_base_exact_match: None,
            max_plain_perplexity_rise_percent: None,
            min_plain_perplexity_rise_percent: None,
        }
    }
}

/// The plan of an evaluation, checked.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct EvalPlan {
    /// The table with every default filled in.
    #[serde(flatten)]
    pub(crate) config: EvalConfig,
    /// Seed of the drawn answers.
    pub(crate) seed: u64,
    /// Name of the run.
    pub(crate) name: String,
    /// The base model's directory.
    #[serde(skip)]
    pub(crate) base: PathBuf,
    /// The tuned model's directory.
    #[serde(skip)]
    pub(crate) tuned: PathBuf,
    /// The packs and prompts.
    #[serde(skip)]
    pub(crate) packs: PathBuf,
    /// What training wrote.
    #[serde(skip)]
    pub(crate) train: PathBuf,
    /// What is written.
    #[serde(skip)]
    pub(crate) out: PathBuf,
}

impl EvalPlan {
    /// Reads the pipeline file and checks the settings; opens nothing else.
    pub(crate) fn resolve(common: &Common) -> Result<Self, Failure> {
        let pipeline = Pipeline::load(common)?;
        let mut config: EvalConfig = pipeline.stage("eval")?;
        config.device = config.device.found();
        check(&config).map_err(|failure| pipeline.at("eval", failure))?;
        Ok(EvalPlan {
            config,
            seed: pipeline.seed,
            name: pipeline.name.clone(),
            base: pipeline.need_base()?.to_owned(),
            tuned: pipeline.dir("merge"),
            packs: pipeline.dir("tokenize"),
            train: pipeline.dir("train"),
            out: common.out.clone().unwrap_or_else(|| pipeline.dir("eval")),
        })
    }
}

fn check(config: &EvalConfig) -> Result<(), Failure> {
    let wrong = |message: String| Err(Failure::usage(format!("[eval] {message}")));
    if config.max_new == 0 || config.batch_size == 0 || config.max_prompts == Some(0) {
        return wrong("`max_new`, `batch_size` and `max_prompts` are at least 1".to_owned());
    }
    if !(config.temperature > 0.0 && config.temperature.is_finite()) {
        return wrong(format!("`temperature` = {} is not above 0", config.temperature));
    }
    if !(config.top_p > 0.0 && config.top_p <= 1.0) {
        return wrong(format!("`top_p` = {} is not above 0 and at most 1", config.top_p));
    }
    for (key, share) in [
        ("min_exact_match", config.min_exact_match),
        ("min_stop_rate", config.min_stop_rate),
        ("min_json_valid", config.min_json_valid),
        ("max_base_exact_match", config.max_base_exact_match),
    ] {
        if let Some(share) = share.filter(|share| !(0.0..=1.0).contains(share)) {
            return wrong(format!("`{key}` = {share} is a share, from 0 to 1"));
        }
    }
    for (key, percent) in [
        ("max_plain_perplexity_rise_percent", config.max_plain_perplexity_rise_percent),
        ("min_plain_perplexity_rise_percent", config.min_plain_perplexity_rise_percent),
    ] {
        if let Some(percent) = percent.filter(|percent| !percent.is_finite()) {
            return wrong(format!("`{key}` = {percent} is not a number of percent"));
        }
    }
    if config.min_json_valid.is_some() && config.format != Format::Json {
        return Err(Failure::usage("[eval] `min_json_valid` measures JSON answers")
            .hint("set `format = \"json\"`"));
    }
    Ok(())
}
