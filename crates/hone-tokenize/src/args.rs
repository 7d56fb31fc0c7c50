//! What was typed and what the pipeline file says, checked against each other.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use hone_cli::worker::WORKER;
use hone_cli::{Common, Failure, Pipeline};
use hone_schema::Split;
use hone_tokens::{Learn, Packing, Policy, TooLong, TrainOn, TrainOnStop};
use serde::{Deserialize, Serialize};

use crate::aliases;
use crate::diff::DiffArgs;
use crate::explain::ExplainArgs;
use crate::export::ExportArgs;
use crate::import::ImportArgs;
use crate::show::ShowArgs;

/// Turn rendered text into token packs and a loss mask.
///
/// Reads the sealed directory of `hone-template` and the tokenizer of the base model. Without a subcommand it writes packs.
#[derive(Parser)]
#[command(version)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

impl AsRef<Common> for Args {
    fn as_ref(&self) -> &Common {
        &self.common
    }
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Show what is trained: a row, a pack, or a page of rows.
    Show(ShowArgs),
    /// Say of one token whose it is, and why it is trained or not.
    Explain(ExplainArgs),
    /// Compare two outputs row by row; ends with 1 where they differ.
    Diff(DiffArgs),
    /// Write a split as token ids and labels, for trainers that take such tables.
    Export(ExportArgs),
    /// Take token ids and labels that another tool made, instead of rendered text.
    Import(ImportArgs),
    /// Train a byte-level BPE vocabulary from texts.
    Vocab(VocabArgs),
    /// Be the worker of a stage.
    #[command(name = WORKER, hide = true)]
    Worker,
}

/// Which texts, and how large a vocabulary.
#[derive(clap::Args)]
pub(crate) struct VocabArgs {
    /// JSON lines with a column `text`; may be given more than once.
    #[arg(long, value_name = "FILE.jsonl", required = true)]
    pub(crate) input: Vec<PathBuf>,
    /// Number of tokens, special tokens and the 256 bytes included.
    #[arg(long, value_name = "TOKENS")]
    pub(crate) size: usize,
    /// Special tokens, separated by commas; they get the first ids.
    #[arg(long, value_name = "TOKENS", value_delimiter = ',')]
    pub(crate) specials: Vec<String>,
}

/// A split by its name.
pub(crate) fn split(name: &str) -> Result<Split, String> {
    Split::from_name(name).ok_or_else(|| "a split is `train`, `eval` or `test`".to_owned())
}

/// The table `[tokenize]` of a pipeline file.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// Longest pack and longest row, in tokens. No default: it decides what is lost.
    pub(crate) max_len: u32,
    /// What happens to longer rows. No default, for the same reason.
    pub(crate) too_long: TooLong,
    /// How rows share packs.
    #[serde(default)]
    pub(crate) packing: Packing,
    /// Whether rows of similar length stand beside each other, for whoever pads them; without packing only.
    #[serde(default)]
    pub(crate) length_buckets: bool,
    /// An older spelling: `true` is `packing = "best-fit"`, `false` is `packing = "none"`.
    #[serde(default, skip_serializing)]
    pack: Option<bool>,
    /// Which messages are trained: `"all"` responses, the `"last"` one, what `"every"` role says, or a list of roles.
    #[serde(default)]
    pub(crate) train_on: TrainOn,
    /// Which stop markers are trained: that of each trained `"turn"`, `"all"`, the `"last"` one, or `"none"`.
    #[serde(default)]
    pub(crate) train_on_stop: TrainOnStop,
    /// Whether responses are trained (`"train"`) to think, or what they think is only context (`"mask"`).
    #[serde(default)]
    pub(crate) reasoning: Learn,
    /// Whether responses are trained to open with a thought that is empty, where the template writes one.
    #[serde(default)]
    pub(crate) empty_thoughts: Learn,
    /// Largest share of rows that the certificate may refuse; above it the stage ends with exit 1. Rows that are too long do not count.
    #[serde(default = "max_violation_share")]
    pub(crate) max_violation_share: f64,
    /// Added tokens that messages may write as one token, such as `<think>`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) allow_in_messages: Vec<String>,
    /// A directory with the `tokenizer.json` to use instead of the base model's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tokenizer: Option<PathBuf>,
}

/// Real sets have a few rows without an answer; more is a wrong setting.
fn max_violation_share() -> f64 {
    0.05
}

/// Longest pack, in tokens: beyond any context window in use.
const MAX_LEN_MAX: u32 = 1 << 24;

impl Config {
    /// The table of a pipeline, and what to tell people about names in it that are not hone's own.
    pub(crate) fn read(pipeline: &Pipeline) -> Result<(Self, Vec<String>), Failure> {
        let mut notes = Vec::new();
        let pipeline = pipeline.translate("tokenize", |table| {
            let aliases = aliases::translate(table)?;
            notes = aliases.notes;
            Ok(aliases.renamed)
        })?;
        let config: Config = pipeline.stage("tokenize")?;
        let config = config.check().map_err(|failure| pipeline.at("tokenize", failure))?;
        Ok((config, notes))
    }

    /// Checks the values against each other.
    fn check(mut self) -> Result<Self, Failure> {
        match self.pack.take() {
            Some(true) => self.packing = Packing::BestFit,
            Some(false) => self.packing = Packing::None,
            None => {}
        }
        if self.length_buckets && self.packing != Packing::None {
            let message = "[tokenize] `length_buckets` sorts rows that are not packed";
            return Err(Failure::usage(message).hint("add `packing = \"none\"`, or leave it out"));
        }
        if self.max_len < 2 || self.max_len > MAX_LEN_MAX {
            let message = format!("[tokenize] `max_len` is {}", self.max_len);
            return Err(
                Failure::usage(message).hint(format!("a pack holds 2 to {MAX_LEN_MAX} tokens"))
            );
        }
        if !(0.0..=1.0).contains(&self.max_violation_share) {
            let message =
                format!("[tokenize] `max_violation_share` is {}", self.max_violation_share);
            return Err(Failure::usage(message).hint("a share lies between 0 and 1"));
        }
        Ok(self)
    }

    /// What is trained of a row.
    pub(crate) fn policy(&self) -> Policy {
        Policy {
            train_on: self.train_on.clone(),
            stop: self.train_on_stop,
            reasoning: self.reasoning,
            empty_thoughts: self.empty_thoughts,
        }
    }
}
