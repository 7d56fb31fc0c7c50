//! `hone-train`: token packs in, an adapter or full weights out.
//!
//! | file | holds |
//! |---|---|
//! | `args` | flags, the `[train]` table, and the plan they resolve to |
//! | `run` | the stage: opens its inputs, runs the loop, seals what was learned |
//! | `start` | what is trained, an adapter to go on from, the decoder |
//! | `plan` | what every step will see, found before anything is trained |
//! | `memory` | what a run will hold, and settings that would fit |
//! | `epochs` | packs, their order, micro-batches |
//! | `training` | the training loop: one visible loop |
//! | `checkpoint` | what a resumed run needs, sealed; the newest that verifies is taken |
//! | `weights` | named tensors into a file |
//! | `watch` | the least held-out loss; a training that has gone wrong |
//! | `tally` | losses told apart by source and by role |
//! | `samples` | answers while training |
//! | `selftest` | what must hold of every training, tried on the first step |
//! | `report` | the part of the report that tells sources and roles apart |
//! | `metrics` | the lines of `metrics.jsonl`, and the live logs with times |
//! | `tensorboard` | event files |
//!
//! A run is a function of its packs, its base and its configuration: killed at any point and started again, it ends with the same
//! bytes.

mod args;
mod checkpoint;
mod epochs;
mod memory;
mod metrics;
mod plan;
mod report;
mod run;
mod samples;
mod selftest;
mod start;
mod tally;
mod tensorboard;
mod training;
mod watch;
mod weights;

use std::process::ExitCode;

use args::{Args, Command};

fn main() -> ExitCode {
    hone_cli::launch(|args: Args, ctx| match &args.command {
        None => run::train(ctx, &args.common, args.earlier),
        Some(Command::Selftest) => selftest::run(ctx, &args.common),
        Some(Command::Plan(show)) => plan::show(ctx, &args.common, show),
    })
}
