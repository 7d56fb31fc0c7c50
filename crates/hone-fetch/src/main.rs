//! Brings a base model in: from a local directory, from a GGUF file, or from a hub; checked, and
//! sealed as an artefact.
//!
//! Whatever the source, what comes out is the same: a Hugging Face model directory with a manifest,
//! whose configuration hone's decoder accepts, whose weights have the names and shapes that the
//! configuration asks for, and whose tokenizer loads.
//!
//! | file | holds |
//! |---|---|
//! | `args` | the flags, and which kind of source a text names |
//! | `run` | bringing a model in, by each of the three ways |
//! | `quantize` | a base in 4 bits |
//! | `tokens` | a base with new tokens |
//! | `inspect` | what a GGUF file says of itself |
//! | `gguf` | the GGUF file format |
//! | `import` | a GGUF file as a model directory |
//! | `directory` | the checks that every model directory passes |
//! | `hub` | the hub's protocol: revisions, files, redirects, resuming |

mod args;
mod directory;
#[cfg(test)]
mod fixture;
mod gguf;
mod hub;
mod import;
mod inspect;
mod quantize;
mod run;
mod tokens;

fn main() -> std::process::ExitCode {
    hone_cli::launch(run::run)
}
