//! Flags, the `[train]` table, and the plan they resolve to.

use std::path::PathBuf;

use hone_cli::{Common, Failure, Pipeline};
use hone_learn::{
    AdamWConfig, Convention, LearnError, OptimizerConfig, Recipe, ScheduleConfig, ScheduleKind,
    Warmup,
};
use hone_model::LoraConfig;
use serde::{Deserialize, Serialize};

/// Fine-tune a base model on token packs, or pre-train one from random weights.
#[derive(Debug, clap::Parser)]
#[command(name = "hone-train", version)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Print what every step would see, without training anything.
    Plan(PlanArgs),
}

/// How much of the plan is printed.
#[derive(Debug, clap::Args)]
pub(crate) struct PlanArgs {
    /// Steps that are printed one by one, from the first; 0 prints all.
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub(crate) steps: u64,
}

impl AsRef<Common> for Args {
    fn as_ref(&self) -> &Common {
        &self.common
    }
}

/// What is trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Method {
    /// A low-rank adapter (Hu et al. 2021); the base stays as it is.
    #[default]
    Lora,
    /// All weights.
    Full,
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

/// How much the backward pass computes again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum RecomputeKnob {
    /// Nothing: fastest.
    #[default]
    None,
    /// Each layer's forward: a third more time, a fraction of the memory.
    Layer,
}

/// The `[train]` table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct TrainConfig {
    /// `lora` or `full`.
    pub(crate) method: Method,
    /// `sft` or `causal`.
    pub(crate) objective: Objective,
    /// `base` or `random`.
    pub(crate) init: Init,
    /// Passes over the packs.
    pub(crate) epochs: u32,
    /// Ends the run after so many steps, whatever `epochs` says.
    pub(crate) max_steps: Option<u64>,
    /// Packs of an optimizer step.
    pub(crate) batch_size: usize,
    /// `packs`, `batches` or `none`.
    pub(crate) shuffle: Shuffle,
    /// Packs computed at once; changes memory and speed, not the result's meaning.
    pub(crate) micro_batch_size: usize,
    /// Peak learning rate. No default: it decides more than anything else.
    pub(crate) lr: Option<f64>,
    /// `constant`, `linear` or `cosine`.
    pub(crate) schedule: ScheduleKind,
    /// Steps of warm-up.
    pub(crate) warmup_steps: Option<u64>,
    /// Steps of warm-up as a share of all.
    pub(crate) warmup_ratio: Option<f64>,
    /// Floor of the learning rate as a share of its peak.
    pub(crate) min_lr_ratio: f64,
    /// AdamW's decay of the first moment.
    pub(crate) beta1: f64,
    /// AdamW's decay of the second moment.
    pub(crate) beta2: f64,
    /// AdamW's epsilon.
    pub(crate) eps: f64,
    /// Decoupled weight decay of matrices.
    pub(crate) weight_decay: f64,
    /// Largest global gradient norm; 0 never clips.
    pub(crate) max_grad_norm: f64,
    /// Rank of the adapter.
    pub(crate) rank: usize,
    /// Numerator of the adapter's scaling; twice the rank when not given.
    pub(crate) alpha: Option<f64>,
    /// Dropout of the adapter's input.
    pub(crate) dropout: f32,
    /// Scales by alpha / sqrt(rank) instead of alpha / rank.
    pub(crate) rslora: bool,
    /// Modules with an adapter, by the end of their name; `["all-linear"]` for all.
    pub(crate) target_modules: Vec<String>,
    /// `none` or `layer`.
    pub(crate) recompute: RecomputeKnob,
    /// Steps between evaluations on the held-out split; 0 evaluates at the end only.
    pub(crate) eval_every: u64,
    /// Steps between checkpoints; 0 makes one only when the run is stopped by a signal.
    pub(crate) checkpoint_every: u64,
    /// `f32` or `bf16`, for full weights.
    pub(crate) save_dtype: SaveDtype,
    /// Ids of tokens whose embeddings are drawn anew at the end: markers that pre-training never sees, for tuning to tell apart.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) reinit_tokens: Vec<u32>,
}

impl Default for TrainConfig {
    fn default() -> Self {
        let adamw = AdamWConfig::default();
        TrainConfig {
            method: Method::Lora,
            objective: Objective::Sft,
            init: Init::Base,
            epochs: 1,
            max_steps: None,
            batch_size: 16,
            shuffle: Shuffle::Packs,
            micro_batch_size: 4,
            lr: None,
            schedule: ScheduleKind::Cosine,
            warmup_steps: None,
            warmup_ratio: None,
            min_lr_ratio: 0.0,
            beta1: adamw.beta1,
            beta2: adamw.beta2,
            eps: adamw.eps,
            weight_decay: adamw.weight_decay,
            max_grad_norm: 1.0,
            rank: 16,
            alpha: None,
            dropout: 0.0,
            rslora: false,
            target_modules: vec!["all-linear".to_owned()],
            recompute: RecomputeKnob::None,
            eval_every: 0,
            checkpoint_every: 100,
            save_dtype: SaveDtype::F32,
            reinit_tokens: Vec::new(),
        }
    }
}

/// The plan of a run, checked.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct TrainPlan {
    /// The table with every default filled in.
    #[serde(flatten)]
    pub(crate) config: TrainConfig,
    /// Seed of the order of packs, of the adapter's start and of dropout.
    pub(crate) seed: u64,
    /// The base model's directory.
    #[serde(skip)]
    pub(crate) base: PathBuf,
    /// The packs.
    #[serde(skip)]
    pub(crate) packs: PathBuf,
    /// Where live logs go.
    #[serde(skip)]
    pub(crate) logs: PathBuf,
}

impl TrainPlan {
    /// Reads the pipeline file and checks the settings against each other; opens nothing else.
    pub(crate) fn resolve(common: &Common) -> Result<Self, Failure> {
        let pipeline = Pipeline::load(common)?;
        let mut config: TrainConfig = pipeline.stage("train")?;
        config.alpha = Some(config.alpha.unwrap_or(2.0 * config.rank as f64));
        let plan = TrainPlan {
            seed: pipeline.seed,
            base: pipeline.need_base()?.to_owned(),
            packs: pipeline.dir("tokenize"),
            logs: pipeline.run_dir().join("logs").join("train"),
            config,
        };
        plan.check().map_err(|failure| pipeline.at("train", failure))?;
        Ok(plan)
    }

    fn check(&self) -> Result<(), Failure> {
        let config = &self.config;
        let wrong = |message: &str| Err(Failure::usage(format!("[train] {message}")));
        if config.lr.is_none() {
            return Err(Failure::usage("[train] `lr` is not given").hint(
                "it has no default: 2e-4 is a common start for LoRA, 1e-5 for full fine-tuning",
            ));
        }
        if config.batch_size == 0 || config.micro_batch_size == 0 {
            return wrong("`batch_size` and `micro_batch_size` are at least 1");
        }
        if config.epochs == 0 && config.max_steps.is_none() || config.max_steps == Some(0) {
            return wrong("`epochs` or `max_steps` is at least 1");
        }
        if config.warmup_steps.is_some() && config.warmup_ratio.is_some() {
            return wrong("give `warmup_steps` or `warmup_ratio`, not both");
        }
        if config.init == Init::Random && config.method != Method::Full {
            return wrong("`init = \"random\"` needs `method = \"full\"`");
        }
        if !config.reinit_tokens.is_empty() && config.method != Method::Full {
            return wrong("`reinit_tokens` needs `method = \"full\"`");
        }
        self.recipe().check().map_err(setting)?;
        self.schedule(1).check().map_err(setting)?;
        if config.rank == 0 {
            return wrong("`rank` is 0, and an adapter has at least 1");
        }
        if config.method == Method::Lora {
            let lora = self.lora();
            lora.check().map_err(|e| Failure::usage(format!("[train] {e}")))?;
        }
        Ok(())
    }

    /// The update rule and clipping.
    pub(crate) fn recipe(&self) -> Recipe {
        let config = &self.config;
        let adamw = AdamWConfig {
            beta1: config.beta1,
            beta2: config.beta2,
            eps: config.eps,
            weight_decay: config.weight_decay,
        };
        Recipe {
            optimizer: OptimizerConfig::AdamW(adamw),
            max_grad_norm: (config.max_grad_norm != 0.0).then_some(config.max_grad_norm),
            ..Recipe::default()
        }
    }

    /// The learning-rate schedule of a run of `n_steps`.
    pub(crate) fn schedule(&self, n_steps: u64) -> ScheduleConfig {
        let config = &self.config;
        let warmup = match (config.warmup_steps, config.warmup_ratio) {
            (Some(steps), _) => Warmup::Steps(steps),
            (None, Some(ratio)) => Warmup::Ratio(ratio),
            (None, None) => Warmup::Steps(0),
        };
        let (kind, min_lr_ratio) = (config.schedule, config.min_lr_ratio);
        let lr = config.lr.unwrap_or_default();
        let convention = Convention::Transformers;
        ScheduleConfig { kind, lr, warmup, min_lr_ratio, n_steps, convention }
    }

    /// The adapter's settings.
    pub(crate) fn lora(&self) -> LoraConfig {
        let config = &self.config;
        LoraConfig {
            r: config.rank,
            lora_alpha: config.alpha.unwrap_or(2.0 * config.rank as f64),
            lora_dropout: config.dropout,
            target_modules: config.target_modules.clone().into(),
            use_rslora: config.rslora,
            ..LoraConfig::all_linear(config.rank, 1.0)
        }
    }
}

fn setting(error: LearnError) -> Failure {
    Failure::usage(format!("[train] {error}"))
}
