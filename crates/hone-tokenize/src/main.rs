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

fn main() -> ExitCode {
    hone_cli::launch(|args: Args, ctx| match &args.command {
        None => run::tokenize(ctx, &args.common),
        Some(Command::Show(show)) => show::show(ctx, &args.common, show),
        Some(Command::Diff(diff)) => diff::diff(ctx, &args.common, diff),
        Some(Command::Explain(explain)) => explain::explain(ctx, &args.common, explain),
        Some(Command::Export(export)) => export::export(ctx, &args.common, export),
        Some(Command::Import(import)) => import::import(ctx, &args.common, import),
        Some(Command::Worker) => worker::work(),
        Some(Command::Vocab(vocab)) => vocab::vocab(ctx, &args.common, vocab),
    })
}
