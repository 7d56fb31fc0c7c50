//! `hone-eval`: what tuning changed, base beside tuned.
//!
//! | file | holds |
//! |---|---|
//! | `args` | flags, the `[eval]` table, and the plan they resolve to |
//! | `inputs` | both models, the test packs and prompts, the record of training: opened |
//! | `run` | the stage: measures one model after the other, seals, says the table |
//! | `losses` | held-out loss and perplexity, by source and by kind |
//! | `answers`, `score` | generation, and whether an answer is right |
//! | `groups` | what rows have in common, to break scores down by |
//! | `results`, `gates` | `results.json`, and the bars that scores must reach |
//! | `rows` | `rows.parquet`: every prompt with every model's answer |
//! | `report` | `report.html`: one page that needs nothing beside it |
//!
//! Both models get the very same ids: those that the tokenize stage made with the template that the
//! tuned model is served with. A base model does not know that template, so it is asked a second
//! time with the bare question.

mod answers;
mod args;
mod gates;
mod groups;
mod inputs;
mod losses;
mod report;
mod results;
mod rows;
mod run;
mod score;

use std::process::ExitCode;

fn main() -> ExitCode {
    hone_cli::launch(run::eval)
}
