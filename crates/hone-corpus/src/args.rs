//! What was typed, and what is meant by it.

use clap::Parser;
use hone_cli::{Common, Failure};

/// Most documents: 64 times the default, which is 2.5 GB and no longer a tiny corpus.
const DOCUMENTS_MAX: u64 = 9_600_000;

/// Write the corpus of the tiny world: plain text, instruction pairs and questions, as JSONL files.
#[derive(Parser, Clone, Debug)]
#[command(version)]
pub(crate) struct Args {
    #[command(flatten)]
    common: Common,
    /// Plain text documents for pre-training, of about 64 tokens each.
    #[arg(long, value_name = "N", default_value_t = 150_000)]
    documents: u64,
    /// Seed of documents and phrasings. Facts, and what tuning leaves out, never change.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

impl AsRef<Common> for Args {
    fn as_ref(&self) -> &Common {
        &self.common
    }
}

/// What to write, checked.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// The flags that every program has.
    pub(crate) common: Common,
    /// Rows of `plain.jsonl`.
    pub(crate) n_documents: u64,
    /// Seed of documents and phrasings.
    pub(crate) seed: u64,
}

impl Args {
    /// Checks the flags; opens nothing.
    ///
    /// # Errors
    /// A number of documents out of bounds, or a pipeline file, which this program does not read.
    pub(crate) fn resolve(self) -> Result<Plan, Failure> {
        if self.common.pipeline.is_some() || !self.common.set.is_empty() {
            let failure = Failure::usage("this program reads no pipeline file, and no `--set`");
            return Err(failure.hint("use `--documents`, `--seed` and `--out`"));
        }
        if !(1..=DOCUMENTS_MAX).contains(&self.documents) {
            let message =
                format!("`--documents {}` is not from 1 to {DOCUMENTS_MAX}", self.documents);
            return Err(Failure::usage(message).hint("leave the flag out for 150000"));
        }
        Ok(Plan { common: self.common, n_documents: self.documents, seed: self.seed })
    }
}
