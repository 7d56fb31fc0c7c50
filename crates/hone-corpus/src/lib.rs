//! The tiny world: a deterministic generator of text small enough to pre-train a base model on, and
//! of the instruction pairs that then teach this model to answer.
//!
//! A *world* is 1,178 facts in 13 relations ([`facts`]) and the sentences that tell or ask them
//! ([`phrasing`]). From it come
//!
//! - *documents* ([`documents`]): plain text of six kinds, in which every fact is told many times.
//!   One kind is lists of bare questions, and no other kind begins with a question: so a model
//!   trained on them carries on a question with more questions, as base models do;
//! - *pairs* ([`rows`]): instruction and answer, for tuning, and for evaluation about entities that
//!   tuning left out ([`split`]);
//! - apart from the world, *extraction tasks* ([`json_task`]): one short text, one JSON object.
//!
//! [`files`] says which JSONL files these make.
//!
//! Everything is integer arithmetic on SplitMix64 ([`rng`]) and each item depends on its own number
//! only, so the bytes are the same on every machine. Nothing here touches a file: the binary does.

pub mod documents;
pub mod facts;
pub mod files;
pub mod json_task;
pub mod phrasing;
pub mod rng;
pub mod rows;
pub mod split;
pub mod world;

pub use world::World;

/// A table compiled into this crate that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{table}:{line}: {what}")]
pub struct TableError {
    /// The file under `tables/`.
    pub table: &'static str,
    /// The line, counted from 1; 0 where the fault is not in one line.
    pub line: usize,
    /// What is wrong with it.
    pub what: String,
}
