//! Flags, the `[train]` table, and the plan they resolve to.

mod adapter;
mod aliases;
mod choices;
mod config;

use std::path::PathBuf;

use hone_cli::{Common, Failure, Pipeline};
use hone_kernels::Backend;
use hone_learn::{LearnError, Recipe, ScheduleConfig};
use hone_model::{LoraConfig, ModelConfig, ModelError, TokenRows};
use serde::Serialize;

use crate::watch;

pub(crate) use choices::{
    Init, LoraInit, Method, Objective, RecomputeKnob, Save, SaveDtype, Shuffle,
};
pub(crate) use config::TrainConfig;

/// Fine-tune a base model on token packs, or pre-train one from random weights.
#[derive(Debug, clap::Parser)]
#[command(name = "hone-train", version)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(flatten)]
    pub(crate) earlier: EarlierArgs,
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

/// What becomes of checkpoints that a run with other settings left; without a flag the difference is named, and nothing is done.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct EarlierArgs {
    /// Go on from the weights of such a checkpoint, with fresh moments.
    #[arg(long)]
    pub(crate) reset_optimizer: bool,
    /// Drop such checkpoints and start at step 0.
    #[arg(long, conflicts_with = "reset_optimizer")]
    pub(crate) restart: bool,
}

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Print what every step would see, without training anything.
    Plan(PlanArgs),
    /// Try on the run's first step what must hold of every training, and print a table; writes nothing.
    Selftest,
}

/// How much of the plan is printed.
#[derive(Debug, clap::Args)]
pub(crate) struct PlanArgs {
    /// Steps that are printed one by one, from the first; 0 prints all.
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub(crate) steps: u64,
    /// Instead, propose settings that fit into so much memory, such as 24GiB.
    #[arg(long, value_name = "BYTES", value_parser = crate::memory::bytes)]
    pub(crate) fit: Option<u64>,
}

impl AsRef<Common> for Args {
    fn as_ref(&self) -> &Common {
        &self.common
    }
}

/// The plan of a run, checked.
#[derive(Clone, Debug, Serialize)]
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
    /// What is said of names that are not hone's own.
    #[serde(skip)]
    pub(crate) notes: Vec<String>,
    /// Where the settings stand, for messages.
    #[serde(skip)]
    pub(crate) pipeline: Option<Pipeline>,
}

impl TrainPlan {
    /// Reads the pipeline file and checks the settings against each other; opens nothing else.
    pub(crate) fn resolve(common: &Common) -> Result<Self, Failure> {
        let mut notes = Vec::new();
        let pipeline = Pipeline::load(common)?.translate("train", |table| {
            let aliases = aliases::translate(table)?;
            notes = aliases.notes;
            Ok(aliases.renamed)
        })?;
        let mut config: TrainConfig = pipeline.stage("train")?;
        config.settle().map_err(|failure| pipeline.at("train", failure))?;
        config.device = config.device.found();
        let plan = TrainPlan {
            seed: pipeline.seed,
            base: pipeline.need_base()?.to_owned(),
            packs: pipeline.dir("tokenize"),
            logs: pipeline.run_dir().join("logs").join("train"),
            notes,
            config,
            pipeline: Some(pipeline),
        };
        plan.check().map_err(|failure| plan.at(failure))?;
        Ok(plan)
    }

    /// A failure of a check of the settings, with the place of the key that it names in backticks.
    pub(crate) fn at(&self, failure: Failure) -> Failure {
        match &self.pipeline {
            Some(pipeline) if failure.message.starts_with("[train]") => {
                pipeline.at("train", failure)
            }
            _ => failure,
        }
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
        if let Some(fault) = watch::fault(config) {
            return wrong(fault);
        }
        config.check_method()?;
        self.recipe().check().map_err(setting)?;
        self.schedule(1).check().map_err(setting)?;
        if config.rank == 0 {
            return wrong("`rank` is 0, and an adapter has at least 1");
        }
        if config.method.has_adapter() {
            let lora = config.lora(&[], TokenRows::default());
            lora.check().map_err(|e| refused(&e))?;
        }
        Ok(())
    }

    /// How it learns, but for the rate.
    pub(crate) fn recipe(&self) -> Recipe {
        self.config.recipe()
    }

    /// The learning-rate schedule of a run of `n_steps`.
    pub(crate) fn schedule(&self, n_steps: u64) -> ScheduleConfig {
        self.config.schedule(n_steps)
    }

    /// `backend` with the arithmetic of the run.
    pub(crate) fn on<B: Backend>(&self, backend: B) -> B {
        backend.with_compute(self.config.compute)
    }

    /// The adapter's settings on a model of which these rows are trained by themselves.
    pub(crate) fn lora(&self, model: &ModelConfig, tokens: &TokenRows) -> LoraConfig {
        self.config.lora(&model.linear_names(), tokens.clone())
    }
}

/// What the engine says of an adapter's settings, with the names that they have in the table.
pub(crate) fn refused(error: &ModelError) -> Failure {
    let mut text = error.to_string();
    for (theirs, own) in [
        ("`adapter_config.json`: ", ""),
        ("adapter_config.json: ", ""),
        ("the adapter does not fit the model: ", ""),
        ("`r`", "`rank`"),
        ("`lora_alpha`", "`alpha`"),
        ("`lora_dropout`", "`dropout`"),
        ("`use_dora`", "`dora`"),
        ("`trainable_token_indices`", "`trainable_tokens`"),
    ] {
        text = text.replace(theirs, own);
    }
    Failure::usage(format!("[train] {text}"))
}

fn setting(error: LearnError) -> Failure {
    Failure::usage(format!("[train] {error}"))
}
