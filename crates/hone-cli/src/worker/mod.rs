//! Work on foreign bytes in a process of its own.
//!
//! A chat template or a tokenizer that came with a model can ask for more memory than there is, and in Rust that aborts the
//! process; it can also never end. So the stages that run them start their own program a second time, as a worker: it has no
//! files but three pipes, a limit of memory that the kernel keeps, and a deadline that the stage keeps. Rows go in and answers
//! come out as frames, in order, with the next batch already on its way while one is at work. When a worker dies, another is
//! started, the rows it had are given to it one at a time, and the row that takes a worker down is the answer.
//!
//! - [`Sandbox`]: the stage's side; [`serve`]: the worker's side
//! - [`shielded`]: a command that runs foreign code once, for a person
//! - [`encode_rows`], [`join`] and their ways back: what frames hold
//! - `frame`: what goes through the pipes; `process`: the worker as a child

mod frame;
mod parts;
mod process;
mod sandbox;
mod serve;
mod shield;

pub use parts::{decode_rows, encode_rows, join, split};
pub use process::Limits;
pub use sandbox::{Answer, Sandbox};
pub use serve::serve;
pub use shield::shielded;

/// Subcommand by which a program becomes its own worker. Hidden: nobody types it.
pub const WORKER: &str = "worker";
