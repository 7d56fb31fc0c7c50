//! `hone-corpus`: writes the corpus of the tiny world and the extraction task, as one sealed
//! directory of JSONL files. `data/README.md` says what is in them.

mod args;
mod run;

use std::process::ExitCode;

use args::Args;

fn main() -> ExitCode {
    hone_cli::launch(|args: Args, context| run::run(&args.resolve()?, context))
}
