//! What was typed and what the pipeline file says, checked against each other.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use hone_cli::{Common, Failure};
use hone_schema::Split;
use hone_tokens::{TooLong, TrainOn};
use serde::{Deserialize, Serialize};

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
    /// Print one example with its trained tokens marked.
    Show(ShowArgs),
    /// Train a byte-level BPE vocabulary from texts.
    Vocab(VocabArgs),
}

/// Which example, and how it is shown.
#[derive(clap::Args)]
pub(crate) struct ShowArgs {
    /// Number of the row in its split, from 0.
    #[arg(long, value_name = "N", conflicts_with = "id")]
    pub(crate) row: Option<usize>,
    /// Id of the row.
    #[arg(long, value_name = "ID")]
    pub(crate) id: Option<String>,
    /// Split that the row is counted in.
    #[arg(long, value_name = "SPLIT", default_value = "train", value_parser = split)]
    pub(crate) split: Split,
    /// Colours, or marks made of characters.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) color: Color,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Color {
    /// Colours on a terminal, marks elsewhere.
    #[default]
    Auto,
    /// Colours everywhere.
    Always,
    /// Marks everywhere.
    Never,
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

fn split(name: &str) -> Result<Split, String> {
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
    /// Whether several rows share a pack.
    #[serde(default = "yes")]
    pub(crate) pack: bool,
    /// Which messages are trained.
    #[serde(default)]
    pub(crate) train_on: TrainOn,
    /// Added tokens that messages may write as one token, such as `<think>`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) allow_in_messages: Vec<String>,
    /// A directory with the `tokenizer.json` to use instead of the base model's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tokenizer: Option<PathBuf>,
}

fn yes() -> bool {
    true
}

/// Longest pack, in tokens: beyond any context window in use.
const MAX_LEN_MAX: u32 = 1 << 24;

impl Config {
    /// Checks the values against each other.
    pub(crate) fn check(self) -> Result<Self, Failure> {
        if self.max_len < 2 || self.max_len > MAX_LEN_MAX {
            let message = format!("[tokenize] `max_len` is {}", self.max_len);
            return Err(
                Failure::usage(message).hint(format!("a pack holds 2 to {MAX_LEN_MAX} tokens"))
            );
        }
        Ok(self)
    }
}
