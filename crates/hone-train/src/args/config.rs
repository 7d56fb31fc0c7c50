//! The `[train]` table.
//!
//! Keys that came after the first release are left out of the record of a run that does not use them, so that its key stays what it
//! was.

use std::collections::BTreeMap;
use std::path::PathBuf;

use hone_cli::{Failure, is_default};
use hone_kernels::Place;
use hone_learn::{
    AdamWConfig, Convention, GroupConfig, LossConfig, OptimizerConfig, Recipe, ScheduleConfig,
    ScheduleKind, Warmup,
};
use hone_model::Compute;
use serde::{Deserialize, Serialize};

use super::adapter::{Modules, TokenLists};
use super::choices::{
    Bias, Init, LoraInit, Method, Objective, QuantType, RecomputeKnob, Save, SaveDtype, Shuffle,
};
use crate::watch::{EarlyStopping, Watchdog};

fn is_three(n: &usize) -> bool {
    *n == 3
}

fn is_sixty_four(n: &usize) -> bool {
    *n == 64
}

fn is_zero(x: &f64) -> bool {
    *x == 0.0
}

fn is_transformers(convention: &Convention) -> bool {
    *convention == Convention::Transformers
}

/// The `[train]` table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct TrainConfig {
    /// `lora`, `qlora` or `full`.
    pub(crate) method: Method,
    /// With `qlora`: the code book, `nf4` or `fp4`. NF4 when not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) quant_type: Option<QuantType>,
    /// With `qlora`: whether the scales of blocks are quantised too, as they are when it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) double_quant: Option<bool>,
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
    /// `constant`, `linear`, `cosine`, `cosine_restarts`, `polynomial`, `wsd` or `inverse_sqrt`: a name, or a table of a `name` and
    /// knobs.
    pub(crate) schedule: ScheduleKind,
    /// How a warm-up is counted: `transformers` has rate 0 at the first step, `hone` above 0.
    #[serde(skip_serializing_if = "is_transformers")]
    pub(crate) schedule_convention: Convention,
    /// Steps of warm-up.
    pub(crate) warmup_steps: Option<u64>,
    /// Steps of warm-up as a share of all.
    pub(crate) warmup_ratio: Option<f64>,
    /// Floor of the learning rate as a share of its peak.
    pub(crate) min_lr_ratio: f64,
    /// The update rule: `adamw`, `adamw8bit`, `lion`, `adafactor`, `sgd` or `muon`: a name, or a table of a `name` and knobs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) optimizer: Option<OptimizerConfig>,
    /// AdamW's decay of the first moment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) beta1: Option<f64>,
    /// AdamW's decay of the second moment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) beta2: Option<f64>,
    /// AdamW's epsilon.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) eps: Option<f64>,
    /// AdamW's decoupled weight decay of matrices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) weight_decay: Option<f64>,
    /// Rates and decays of the tensors whose names match a pattern; the first group that has a tensor decides.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) groups: Vec<GroupConfig>,
    /// Decay of a moving average of the weights; none is kept when it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ema_decay: Option<f64>,
    /// With `ema_decay`: whether the `average` is evaluated and saved, or the `last` weights. The average when not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) save: Option<Save>,
    /// Share of each target that is spread over the vocabulary.
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) label_smoothing: f64,
    /// Weight of the squared log-sum-exp of the logits.
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) z_loss: f64,
    /// Noise on the embeddings of training; 5, 10 and 15 are its paper's.
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) neftune_alpha: f64,
    /// Multiplies each token's loss by its probability.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) dft: bool,
    /// c: logits become c tanh(z / c).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) soft_cap: Option<f64>,
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
    /// Gives the rows of adapted weights a trained magnitude (DoRA, Liu et al. 2024).
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) dora: bool,
    /// Biases that are trained too: `none`, `all`, `lora_only`.
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) bias: Bias,
    /// How a fresh adapter starts: `default`, `gaussian`, `pissa`, `loftq`.
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) lora_init: LoraInit,
    /// Modules with an adapter, by the end of their name, `["all-linear"]` for all; or an expression for the whole name.
    pub(crate) target_modules: Modules,
    /// Modules that get none though they are targets, likewise.
    #[serde(skip_serializing_if = "Modules::is_empty")]
    pub(crate) exclude_modules: Modules,
    /// Layers that get an adapter, by number; all when empty.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) layers_to_transform: Vec<usize>,
    /// What the list of those layers is called in a module's name, where it is not the only one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) layers_pattern: Vec<String>,
    /// Other ranks by the end of a module's name, an expression; of those that match the first in the order of their texts.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) rank_pattern: BTreeMap<String, usize>,
    /// Other alphas, likewise.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) alpha_pattern: BTreeMap<String, f64>,
    /// Modules that are trained whole beside the adapter and saved with it: `lm_head`, `embed_tokens`, norms.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) modules_to_save: Vec<String>,
    /// Tokens whose rows of the embedding and of the head are trained, by id or as they are written: a list for both, or one each.
    #[serde(skip_serializing_if = "TokenLists::is_empty")]
    pub(crate) trainable_tokens: TokenLists,
    /// A PEFT adapter to go on from; its settings must be those given here. What it is, is an input of the run, not where it lies.
    #[serde(skip_serializing)]
    pub(crate) adapter_init: Option<PathBuf>,
    /// Patterns of names of tensors that full fine-tuning leaves as they are.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) freeze: Vec<String>,
    /// `none`, `attention` or `layer`.
    pub(crate) recompute: RecomputeKnob,
    /// `cpu`, `cuda:0` or another GPU, or `auto`: the first GPU if there is one that this program can use, else the processor.
    #[serde(skip_serializing_if = "Place::is_cpu")]
    pub(crate) device: Place,
    /// `f32` or `bf16`: the arithmetic of matrix products.
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) compute: Compute,
    /// Steps between evaluations on the held-out split; 0 evaluates at the end only.
    pub(crate) eval_every: u64,
    /// Steps between checkpoints; 0 makes one only when the run is stopped by a signal.
    pub(crate) checkpoint_every: u64,
    /// Checkpoints kept: the newest, and those before it in case the newest is lost to the disk.
    pub(crate) keep_checkpoints: usize,
    /// Ends with the weights of the evaluation with the least held-out loss instead of the last ones.
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) keep_best: bool,
    /// Ends the run when the held-out loss gets no better, with the best weights: `{patience = 3, min_delta = 0.0}`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) early_stopping: Option<EarlyStopping>,
    /// When a run is taken to have gone wrong and is ended with exit 1.
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) watchdog: Watchdog,
    /// Steps between gradient norms by layer; 0 writes none.
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) log_layers_every: u64,
    /// Steps between answers to a few held-out prompts; 0 asks for none.
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) sample_every: u64,
    /// How many prompts.
    #[serde(skip_serializing_if = "is_three")]
    pub(crate) sample_prompts: usize,
    /// Longest answer, in tokens.
    #[serde(skip_serializing_if = "is_sixty_four")]
    pub(crate) sample_tokens: usize,
    /// `f32` or `bf16`, for full weights.
    pub(crate) save_dtype: SaveDtype,
    /// Ids of tokens whose embeddings are drawn anew at the end: markers that pre-training never sees, for tuning to tell apart.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) reinit_tokens: Vec<u32>,
}

impl Default for TrainConfig {
    fn default() -> Self {
        TrainConfig {
            method: Method::Lora,
            quant_type: None,
            double_quant: None,
            objective: Objective::Sft,
            init: Init::Base,
            epochs: 1,
            max_steps: None,
            batch_size: 16,
            shuffle: Shuffle::Packs,
            micro_batch_size: 4,
            lr: None,
            schedule: ScheduleKind::Cosine,
            schedule_convention: Convention::Transformers,
            warmup_steps: None,
            warmup_ratio: None,
            min_lr_ratio: 0.0,
            optimizer: None,
            beta1: None,
            beta2: None,
            eps: None,
            weight_decay: None,
            groups: Vec::new(),
            ema_decay: None,
            save: None,
            label_smoothing: 0.0,
            z_loss: 0.0,
            neftune_alpha: 0.0,
            dft: false,
            soft_cap: None,
            max_grad_norm: 1.0,
            rank: 16,
            alpha: None,
            dropout: 0.0,
            rslora: false,
            dora: false,
            bias: Bias::None,
            lora_init: LoraInit::Default,
            target_modules: Modules::Names(vec!["all-linear".to_owned()]),
            exclude_modules: Modules::default(),
            layers_to_transform: Vec::new(),
            layers_pattern: Vec::new(),
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            modules_to_save: Vec::new(),
            trainable_tokens: TokenLists::default(),
            adapter_init: None,
            freeze: Vec::new(),
            recompute: RecomputeKnob::None,
            device: Place::Auto,
            compute: Compute::F32,
            eval_every: 0,
            checkpoint_every: 100,
            keep_checkpoints: 2,
            keep_best: false,
            early_stopping: None,
            watchdog: Watchdog::default(),
            log_layers_every: 0,
            sample_every: 0,
            sample_prompts: 3,
            sample_tokens: 64,
            save_dtype: SaveDtype::F32,
            reinit_tokens: Vec::new(),
        }
    }
}

impl TrainConfig {
    /// Fills in what follows from other keys.
    ///
    /// # Errors
    /// A flat key of AdamW beside another rule, or `save` without an average.
    pub(crate) fn settle(&mut self) -> Result<(), Failure> {
        self.alpha = Some(self.alpha.unwrap_or(2.0 * self.rank as f64));
        if self.method == Method::Qlora {
            self.quant_type = Some(self.quant_type.unwrap_or(QuantType::Nf4));
            self.double_quant = Some(self.double_quant.unwrap_or(true));
        }
        self.settle_optimizer()?;
        match (self.ema_decay, self.save) {
            (None, Some(Save::Average)) => {
                let message = "[train] `save` is \"average\", and there is no average";
                return Err(Failure::usage(message).hint(
                    "give `ema_decay`, 0.999 for example: the average's decay at each step",
                ));
            }
            (None, _) => self.save = None,
            (Some(_), save) => self.save = Some(save.unwrap_or(Save::Average)),
        }
        Ok(())
    }

    /// AdamW stands in the flat keys, as it always did; any other rule in `optimizer`.
    fn settle_optimizer(&mut self) -> Result<(), Failure> {
        let flat = [
            ("beta1", &mut self.beta1),
            ("beta2", &mut self.beta2),
            ("eps", &mut self.eps),
            ("weight_decay", &mut self.weight_decay),
        ];
        let mut adamw = match self.optimizer.take().unwrap_or_default() {
            OptimizerConfig::AdamW(adamw) => adamw,
            other => {
                if let Some((key, Some(value))) =
                    flat.into_iter().find(|(_, value)| value.is_some())
                {
                    return Err(not_adamw(key, *value, &other));
                }
                self.optimizer = Some(other);
                return Ok(());
            }
        };
        let own = [&mut adamw.beta1, &mut adamw.beta2, &mut adamw.eps, &mut adamw.weight_decay];
        for ((_, flat), own) in flat.into_iter().zip(own) {
            *flat = Some(flat.unwrap_or(*own));
        }
        Ok(())
    }

    /// The update rule.
    fn optimizer(&self) -> OptimizerConfig {
        let usual = AdamWConfig::default();
        self.optimizer.unwrap_or(OptimizerConfig::AdamW(AdamWConfig {
            beta1: self.beta1.unwrap_or(usual.beta1),
            beta2: self.beta2.unwrap_or(usual.beta2),
            eps: self.eps.unwrap_or(usual.eps),
            weight_decay: self.weight_decay.unwrap_or(usual.weight_decay),
        }))
    }

    /// How it learns, but for the rate.
    pub(crate) fn recipe(&self) -> Recipe {
        Recipe {
            optimizer: self.optimizer(),
            max_grad_norm: (self.max_grad_norm != 0.0).then_some(self.max_grad_norm),
            groups: self.groups.clone(),
            ema_decay: self.ema_decay,
            loss: LossConfig {
                label_smoothing: self.label_smoothing,
                z_loss: self.z_loss,
                dft: self.dft,
                soft_cap: self.soft_cap,
            },
            neftune_alpha: self.neftune_alpha,
        }
    }

    /// The learning-rate schedule of a run of `n_steps`.
    pub(crate) fn schedule(&self, n_steps: u64) -> ScheduleConfig {
        let warmup = match (self.warmup_steps, self.warmup_ratio) {
            (Some(steps), _) => Warmup::Steps(steps),
            (None, Some(ratio)) => Warmup::Ratio(ratio),
            (None, None) => Warmup::Steps(0),
        };
        ScheduleConfig {
            kind: self.schedule,
            lr: self.lr.unwrap_or_default(),
            warmup,
            min_lr_ratio: self.min_lr_ratio,
            n_steps,
            convention: self.schedule_convention,
        }
    }
}

/// A flat key of AdamW beside a rule that has it, if at all, with another meaning or another default.
fn not_adamw(key: &str, value: f64, rule: &OptimizerConfig) -> Failure {
    let name = rule.name();
    let message = format!("[train] `{key}` is AdamW's, and `optimizer` is \"{name}\"");
    let knobs = serde_json::to_value(rule).unwrap_or_default();
    Failure::usage(message).hint(match knobs.get(key) {
        Some(_) => format!("write `optimizer = {{ name = \"{name}\", {key} = {value:?} }}`"),
        None => format!("{name} has no such knob: leave it out"),
    })
}
