//! Conversations to text: the second stage of hone.
//!
//! Each conversation is rendered once, with the model's own chat template or a built-in one, and
//! each byte of the text is known to be a message's or the template's (`hone-chat` has the how).
//! `rendered.parquet` holds text and spans, `rejects.parquet` the rows that the template refuses or
//! for which the origin of a byte is not known; `template.jinja` and `template.json` say which
//! template it was, so that the tuned model is served with the very same one.
//!
//! - `args`: what was typed; `source`: which template is meant, and what its tokenizer knows
//! - `run`: the stage; `worker`: the template at work in a process of its own, because it is foreign code
//! - `rows`: one row; `tally`: what became of every row; `render`: the subcommand for a look at one conversation

use std::process::ExitCode;

mod args;
mod render;
mod rows;
mod run;
mod source;
mod tally;
mod worker;

fn main() -> ExitCode {
    hone_cli::launch(|args: args::Args, ctx| run::main(&args, ctx))
}
