//! `hone-tokenize`: rendered text to token packs with a loss mask; `show` prints the mask, `vocab` trains a vocabulary.

mod aliases;
mod args;
mod conserve;
mod diff;
mod documents;
mod explain;
mod inputs;
mod make;
mod packs;
mod page;
mod record;
mod run;
mod show;
mod table;
mod tally;
mod text;
mod view;
mod vocab;

use std::process::ExitCode;

use args::{Args, Command};

fn main() -> ExitCode {
    hone_cli::launch(|args: Args, ctx| match &args.command {
        None => run::tokenize(ctx, &args.common),
        Some(Command::Show(show)) => show::show(ctx, &args.common, show),
        Some(Command::Diff(diff)) => diff::diff(ctx, &args.common, diff),
        Some(Command::Explain(explain)) => explain::explain(ctx, &args.common, explain),
        Some(Command::Vocab(vocab)) => vocab::vocab(ctx, &args.common, vocab),
    })
}
