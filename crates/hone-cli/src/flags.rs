//! The flags that every program has.

use std::path::PathBuf;

/// How talk on stderr looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// Lines for people, progress bars on a terminal.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Flags shared by all programs.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Common {
    /// Pipeline file; this program reads its own table of it.
    #[arg(long, value_name = "FILE", global = true)]
    pub pipeline: Option<PathBuf>,
    /// Overrides a value of the pipeline file, such as `train.lr=2e-4`; may be given more than once.
    #[arg(long = "set", value_name = "KEY=VALUE", global = true)]
    pub set: Vec<String>,
    /// Directory to write, instead of `<runs>/<pipeline>/<stage>`.
    #[arg(long, value_name = "DIR", global = true)]
    pub out: Option<PathBuf>,
    /// Directory that holds the runs of all pipelines.
    #[arg(long, value_name = "DIR", global = true, default_value = "runs")]
    pub runs: PathBuf,
    /// Print the report of the stage on stdout as one JSON object.
    #[arg(long, global = true)]
    pub json: bool,
    /// Say nothing on stderr but errors.
    #[arg(long, global = true)]
    pub quiet: bool,
    /// Say why the stage would run again, or that it is fresh, and do nothing.
    #[arg(long, global = true)]
    pub why: bool,
    /// Run the stage even when its output is fresh.
    #[arg(long, global = true)]
    pub force: bool,
    /// Form of what is said on stderr.
    #[arg(long, value_name = "FORMAT", value_enum, global = true, default_value_t)]
    pub log_format: LogFormat,
    /// Threads to compute with; all of the machine's when not given. Never changes a byte of the output.
    #[arg(long, value_name = "N", global = true)]
    pub threads: Option<usize>,
}
