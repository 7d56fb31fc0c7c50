//! `hone-tokenize`: rendered text to token packs with a loss mask; `show` prints the mask, `vocab` trains a vocabulary.

mod args;
mod run;
mod show;
mod tally;
mod vocab;

use std::process::ExitCode;

use args::{Args, Command};

fn main() -> ExitCode {
    hone_cli::launch(|args: Args, ctx| match &args.command {
        None => run::tokenize(ctx, &args.common),
        Some(Command::Show(show)) => show::show(ctx, &args.common, show),
        Some(Command::Vocab(vocab)) => vocab::vocab(ctx, &args.common, vocab),
    })
}
