//! What was typed, and what it means.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use hone_cli::{Common, Failure};
use hone_model::StoredType;
use hone_store::input;

/// Bring a base model in: checked, and sealed as an artefact.
#[derive(Debug, Parser)]
#[command(name = "hone-fetch", version)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(subcommand)]
    pub(crate) command: Command,
}

impl AsRef<Common> for Args {
    fn as_ref(&self) -> &Common {
        &self.common
    }
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Bring a model into the directory that `--out` names.
    ///
    /// The hub is asked with the usual variables: HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE.
    Model {
        /// A model directory, a GGUF file, or a hub's `organisation/name`, with `@revision` if
        /// wanted.
        source: String,
        /// How the weights of a GGUF file are stored once decoded.
        #[arg(long, value_name = "TYPE", value_enum, default_value_t)]
        dtype: Dtype,
    },
    /// Make a base with new tokens: they are added to the tokenizer, and the embedding and the head
    /// get rows for them.
    ///
    /// A new token's row is the mean of those of the old tokens, also where the embedding had a row
    /// for it already, as padding (Qwen's has hundreds); padding that stays padding stays what it
    /// was. Train it: `train.trainable_tokens = ["<|token|>"]`, or `modules_to_save`, or full
    /// fine-tuning.
    Tokens {
        /// A model directory.
        base: PathBuf,
        /// A new token, as it is written; repeat it for more.
        #[arg(long, value_name = "TEXT", required = true)]
        add: Vec<String>,
        /// Rows of the embedding are a multiple of this.
        #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
        pad_to: u32,
    },
    /// Store a base in 4 bits, as bitsandbytes and transformers lay it out: a quarter of bf16's bytes.
    ///
    /// Training on it is training with `method = "qlora"` on the base that it was made from.
    Quantize {
        /// A model directory.
        base: PathBuf,
        /// The code book.
        #[arg(long = "type", value_name = "TYPE", value_enum, default_value_t)]
        book: Book,
        /// Keep the scales of blocks in f32: half a bit a weight instead of an eighth.
        #[arg(long)]
        no_double_quant: bool,
    },
    /// Print the metadata and the tensors of a GGUF file.
    Inspect {
        /// A GGUF file.
        file: PathBuf,
    },
}

/// How weights are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Dtype {
    /// bfloat16, two bytes a weight.
    #[default]
    Bf16,
    /// Single precision, four bytes a weight.
    F32,
}

impl Dtype {
    pub(crate) fn stored(self) -> StoredType {
        match self {
            Dtype::Bf16 => StoredType::Bf16,
            Dtype::F32 => StoredType::F32,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Dtype::Bf16 => "bf16",
            Dtype::F32 => "f32",
        }
    }
}

/// What the 16 codes of 4-bit weights stand for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Book {
    /// Quantiles of a normal distribution.
    #[default]
    Nf4,
    /// Floats of 4 bits.
    Fp4,
}

/// Where a model comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// A Hugging Face model directory on this machine.
    Directory(PathBuf),
    /// A GGUF file on this machine.
    Gguf(PathBuf),
    /// A model of a hub.
    Hub(HubId),
}

/// A model of a hub, at a revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HubId {
    /// `organisation/name`.
    pub(crate) repo: String,
    /// A branch, a tag or a commit.
    pub(crate) revision: String,
}

/// The revision when none is given.
const REVISION_DEFAULT: &str = "main";

impl Source {
    /// What `text` names: what lies on this machine under that path, else a model of a hub.
    pub(crate) fn parse(text: &str) -> Result<Self, Failure> {
        let path = PathBuf::from(text);
        if input::is_dir(&path) {
            return Ok(Source::Directory(path));
        }
        if input::is_file(&path) {
            return Ok(Source::Gguf(path));
        }
        if let Some(id) = HubId::parse(text) {
            return Ok(Source::Hub(id));
        }
        let message =
            format!("`{text}` does not exist, and is no hub's `organisation/name` either");
        Err(Failure::input(message).hint("give a model directory, a GGUF file, or a hub id"))
    }
}

impl HubId {
    /// `organisation/name` or `organisation/name@revision`, of the letters that hubs allow.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (repo, revision) = text.split_once('@').unwrap_or((text, REVISION_DEFAULT));
        let (organisation, name) = repo.split_once('/')?;
        let is_part = |part: &str| {
            !part.is_empty()
                && part.len() <= 96
                && !part.starts_with(['.', '-'])
                && part.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
        };
        let is_file = name.ends_with(".gguf") || name.ends_with(".safetensors");
        let fits =
            is_part(organisation) && is_part(name) && !is_file && revision.split('/').all(is_part);
        fits.then(|| HubId { repo: repo.to_owned(), revision: revision.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: Option<(&str, &str)>) {
        let found = HubId::parse(text);
        let found = found.as_ref().map(|id| (id.repo.as_str(), id.revision.as_str()));
        assert_eq!(found, expected, "{text}");
    }

    #[test]
    fn hub_ids() {
        check("org/name", Some(("org/name", "main")));
        check("org/name-1.5_b@v1.0", Some(("org/name-1.5_b", "v1.0")));
        check("org/name@refs/pr/1", Some(("org/name", "refs/pr/1")));
        check("name", None);
        check("./org/name", None);
        check("../name", None);
        check("org/..", None);
        check("org/name@", None);
        check("org/name@../x", None);
        check("org/name?x=y", None);
        check("models/tiny.gguf", None);
        check("/absolute/path", None);
    }

    #[test]
    fn a_path_that_is_there_comes_first() {
        assert_eq!(Source::parse("src").unwrap(), Source::Directory("src".into()));
        assert_eq!(Source::parse("src/main.rs").unwrap(), Source::Gguf("src/main.rs".into()));
        let error = Source::parse("no/such/file.gguf").unwrap_err();
        assert!(error.message.contains("does not exist"), "{error}");
    }
}
