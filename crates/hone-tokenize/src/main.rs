//! `hone-tokenize`: rendered text to token packs with a loss mask; `show` prints the mask, `vocab` trains a vocabulary.

mod aliases;
mod args;
mod conserve;
mod diff;
mod documents;
mod explain;
mod export;
mod import;
mod inputs;
mod labels;
mod make;
mod packs;
mod page;
mod record;
mod run;
mod show;
mod tally;
mod view;
mod vocab;
mod worker;

use std::process::ExitCode;

use args::{Args, Command};
use hone_cli::worker::shielded;
use hone_cli::{Exit, Failure};

fn main() -> ExitCode {
    hone_cli::launch(|args: Args, ctx| match &args.command {
        None => run::tokenize(ctx, &args.common),
        Some(Command::Show(show)) => guarded(&args, || show::show(ctx, &args.common, show)),
        Some(Command::Diff(diff)) => guarded(&args, || diff::diff(ctx, &args.common, diff)),
        Some(Command::Explain(explain)) => {
            guarded(&args, || explain::explain(ctx, &args.common, explain))
        }
        Some(Command::Export(export)) => export::export(ctx, &args.common, export),
        Some(Command::Import(import)) => {
            guarded(&args, || import::import(ctx, &args.common, import))
        }
        Some(Command::Worker) => worker::work(),
        Some(Command::Vocab(vocab)) => vocab::vocab(ctx, &args.common, vocab),
    })
}

/// Runs a command that reads a tokenizer, which is foreign, in a process with limits.
fn guarded(args: &Args, run: impl FnOnce() -> Result<Exit, Failure>) -> Result<Exit, Failure> {
    shielded("tokenizer", worker::LOOK_LIMITS, &args.common, run)
}
