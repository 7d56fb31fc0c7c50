//! `hone-merge`: what was trained, as a Hugging Face model directory.
//!
//! | file | holds |
//! |---|---|
//! | `args` | flags, the `[merge]` table, and the plan they resolve to |
//! | `inputs` | base, training, packs, template: opened, and shown to belong together |
//! | `run` | the stage: writes the directory, checks it, seals it |
//! | `files` | the files beside the weights: configuration, tokenizer, template, stop tokens |
//! | `check` | the written weights against base and adapter, by their logits on real rows |
//!
//! Weights are streamed tensor by tensor from mapped files: merging holds the largest tensor a few
//! times over, whatever the size of the model. The check then loads one model at a time.

mod args;
mod check;
mod files;
mod inputs;
mod run;

use std::process::ExitCode;

fn main() -> ExitCode {
    hone_cli::launch(run::merge)
}
