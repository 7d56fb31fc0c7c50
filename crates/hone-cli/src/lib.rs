//! What all programs of hone share, so that they feel like one.
//!
//! - [`launch`]: parse, run, exit code; a failure is printed with its causes and a hint.
//! - [`Exit`] and [`Failure`]: the documented exit codes, and whose fault it was.
//! - [`Common`]: the flags that every program has.
//! - [`Pipeline`]: the pipeline file; each program reads its own table, `--set` overrides, unknown keys are refused.
//! - [`run_stage`]: the frame of a stage: key, `fresh`, lock, work, seal, summary.
//! - [`worker`]: work on foreign bytes in a process of its own, with limits of memory and time.
//! - [`text`]: what rows say, as people may see it.
//! - [`Context`]: talk goes to stderr (lines, JSON lines, progress bars), data to stdout; signals set a flag.

mod context;
mod exit;
mod flags;
mod launch;
mod nearest;
mod pipeline;
mod stage;
pub mod text;
pub mod worker;

pub use context::{Context, Progress};
pub use exit::{Exit, Failure};
pub use flags::{Common, LogFormat};
pub use launch::launch;
pub use nearest::nearest;
pub use pipeline::{Pipeline, STAGES, is_default};
pub use stage::{Outcome, StagePlan, changes, run_stage};
/// The form of the pipeline file.
pub use toml;
