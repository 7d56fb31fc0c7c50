//! Raw rows to conversations: the first stage of hone.
//!
//! A source (JSON lines, a JSON array, CSV, TSV, Parquet; plain, gzip or zstd) is read twice,
//! streamed both times. The first pass converts every row and keeps an index of it: source, hashes
//! of id and content, lengths. polars decides on that index: which rows are duplicates, which split
//! each belongs to, which replay rows are mixed in. The second pass converts again and writes what
//! is kept to `conversations.parquet` and what cannot be used to `rejects.parquet`. So memory grows
//! with the number of rows by a few hundred bytes each, never with their length, and no row is
//! lost unaccounted: in the ledger, in = out + each reason for not going out.
//!
//! - `read`: files to raw rows; `json`: their text; `schema`: what they are; `convert`: rows to
//!   conversations; `fault`: why not
//! - `index` and `select`: what is kept, in which split
//! - `args` and `plan`: what was typed, what is meant; `run`: the stage; `report`: what it says;
//!   `inspect`: a look at one file

use std::process::ExitCode;

mod args;
mod convert;
mod fault;
mod index;
mod inspect;
mod json;
mod plan;
mod read;
mod report;
mod run;
mod schema;
mod select;

fn main() -> ExitCode {
    hone_cli::launch(|args: args::Args, ctx| run::main(&args, ctx))
}
