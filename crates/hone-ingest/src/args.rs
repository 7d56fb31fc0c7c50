//! What was typed: flags, and the `[ingest]` table of the pipeline file.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::{Parser, Subcommand};
use hone_cli::Common;
use serde::{Deserialize, Serialize};

/// The keys of the table, for `--help`; a test holds it against [`Config`] and [`SourceConfig`].
const KEYS: &str = "\
The [ingest] table, with its defaults:
  eval_share = 0.05        share of rows held out to be looked at during training
  test_share = 0.05        share of rows held out for hone-eval alone
  replay_share = 0.1       share of the train rows that come from replay sources, if any
  max_reject_share = 0.05  more rejected rows of a source than this: sealed, but exit code 1
  dedup = true             drop rows whose content another row has; the held-out one stays
  seed                     of split and sampling; the pipeline's when not given

Each [[ingest.source]]:
  path                     a file, a directory of files, or a list of such (needed)
  name                     in ledgers and reports; the file's when not given
  schema = \"auto\"          or alpaca, sharegpt, messages, prompt-completion, flan, text,
                           preference
  split = \"auto\"           by the shares; or train, eval, test for all its rows
  weight = 1.0             of its rows' loss, times a row's own `weight`
  replay = false           mix it into training at replay_share
  eval_rows = 0            of a replay source: rows held out instead, for a loss curve of its own;
                           rows that share an id are held out together
  limit                    most rows taken, chosen by the hash of their ids
  columns                  names of the columns of a table without a header line
  rename = {}              new names of columns: { old = \"new\" }
  strip_suffix             taken off the end of responses and texts, such as \"<|endoftext|>\"
  quoting                  whether cells may be quoted: by default in CSV yes, in TSV no

What a row may say beside its texts:
  train, weight            of a message, or of a part of a content that is a list: true, false or a
                           number; so do training, loss, loss_scale, loss_weight
  train_detail             of a content: [{begin_offset, end_offset, train}] in characters, the end
                           being the last one; what no entry trains is not trained
  weight                   of the row
  tools, documents         for the chat template, as are the variables in chat_template_kwargs

A source whose rows are all rejected is refused: exit code 3, and nothing is written.";

/// Turn raw rows into conversations, split, deduplicated and accounted for.
///
/// Reads the `[ingest]` table of the pipeline file. Without one, sources can be given by `--set
/// 'ingest.source=[{path="rows.jsonl"}]'`.
#[derive(Debug, Parser)]
#[command(version, after_long_help = KEYS)]
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

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show what a file is: its schema and why, counts, a few rows as conversations, and what would
    /// be rejected.
    Inspect(InspectArgs),
}

#[derive(Debug, clap::Args)]
pub(crate) struct InspectArgs {
    /// File of rows: .jsonl, .json, .csv, .tsv (also .gz and .zst) or .parquet.
    pub(crate) file: PathBuf,
    /// Schema to read the rows by, instead of the one that is found.
    #[arg(long, value_name = "NAME")]
    pub(crate) schema: Option<String>,
    /// Names of the columns of a table without a header line, separated by commas.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub(crate) columns: Option<Vec<String>>,
    /// Rows to show.
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub(crate) rows: usize,
}

/// The `[ingest]` table.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Config {
    /// Where rows come from; their order is the order of the output.
    pub(crate) source: Vec<SourceConfig>,
    /// Share of the rows held out to be looked at during training.
    pub(crate) eval_share: f64,
    /// Share of the rows held out for `hone-eval` alone.
    pub(crate) test_share: f64,
    /// Share of the train rows that come from sources with `replay = true`, when there are such.
    pub(crate) replay_share: f64,
    /// Share of a source's rows that may be rejected before the stage ends with exit code 1.
    pub(crate) max_reject_share: f64,
    /// Whether rows with the same content as another are dropped.
    pub(crate) dedup: bool,
    /// Seed of split and sampling; the pipeline's when not given.
    pub(crate) seed: Option<u64>,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            source: Vec::new(),
            eval_share: 0.05,
            test_share: 0.05,
            replay_share: 0.1,
            max_reject_share: 0.05,
            dedup: true,
            seed: None,
        }
    }
}

/// One `[[ingest.source]]`.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct SourceConfig {
    /// Its name in ledgers and reports; the file's when not given.
    pub(crate) name: Option<String>,
    /// A file, a directory of files, or a list of such.
    pub(crate) path: Paths,
    /// `auto`, or the name of a schema.
    pub(crate) schema: String,
    /// `auto` (by the shares), or the split that all its rows belong to.
    pub(crate) split: String,
    /// Weight of its rows' loss.
    pub(crate) weight: f32,
    /// Whether it is mixed into training at `replay_share`.
    pub(crate) replay: bool,
    /// Rows of a replay source that are held out instead.
    pub(crate) eval_rows: u64,
    /// Most rows taken, chosen by the hash of their ids.
    pub(crate) limit: Option<u64>,
    /// Names of the columns of a table without a header line.
    pub(crate) columns: Option<Vec<String>>,
    /// New names of columns, by the name they have.
    pub(crate) rename: BTreeMap<String, String>,
    /// Taken off the end of responses and texts, such as `<|endoftext|>`.
    pub(crate) strip_suffix: Option<String>,
    /// Whether cells of a table may be quoted; CSV may, TSV may not, unless said otherwise.
    pub(crate) quoting: Option<bool>,
}

impl Default for SourceConfig {
    fn default() -> Self {
        SourceConfig {
            name: None,
            path: Paths::Many(Vec::new()),
            schema: "auto".to_owned(),
            split: "auto".to_owned(),
            weight: 1.0,
            replay: false,
            eval_rows: 0,
            limit: None,
            columns: None,
            rename: BTreeMap::new(),
            strip_suffix: None,
            quoting: None,
        }
    }
}

/// One path or several.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(untagged)]
pub(crate) enum Paths {
    One(PathBuf),
    Many(Vec<PathBuf>),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_help_names_every_key() {
        let keys = |value: serde_json::Value| -> Vec<String> {
            value.as_object().expect("a table").keys().cloned().collect()
        };
        let table = serde_json::to_value(Config::default()).expect("a table");
        let source = serde_json::to_value(SourceConfig::default()).expect("a table");
        for key in [keys(table), keys(source)].concat() {
            let line = format!("\n  {key} ");
            assert!(key == "source" || KEYS.contains(&line), "{key}");
        }
    }
}
