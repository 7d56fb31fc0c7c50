//! Chat templates: sandboxed Jinja, and for each byte of the text who wrote it.
//!
//! A [`ChatTemplate`] is compiled once, renders any number of conversations from any number of
//! threads, and has no state that one row could leave for the next. It takes the dialect of Hugging
//! Face templates: what transformers renders, it renders to the byte (`tests/corpus.rs` compares),
//! or it says what it does not take.
//!
//! [`ChatTemplate::locate`] gives the text with [`Span`](hone_schema::Span)s. Nothing is found by
//! searching the text for tokens or for the response, because a message may hold either. Instead
//! the conversation is rendered a second time with every word of its messages replaced by
//! characters that nothing else contains, so that the positions of the words are read off, through
//! whatever trimming, splitting and reordering the template does; and the second text with the
//! words put back has to be the first one, or the row is refused (module `locate`).
//!
//! Templates that leave out of an answer, once others follow, what they write when it is the last
//! (thoughts, mostly) are noticed row by row: [`ChatTemplate::samples`] renders such an answer in a
//! sample of its own, as a served model is given it.
//!
//! A template is foreign code. Rendering is bounded in instructions and in bytes, and everything
//! that makes long texts from short ones in one instruction is bounded by itself (module `python`).

mod builtin;
mod context;
mod date;
mod engine;
mod filters;
mod fit;
mod forged;
mod history;
mod inline;
mod json;
mod locate;
mod names;
mod placed;
mod python;
mod source;
mod spans;
mod symbols;
mod template;
mod thoughts;
mod turns;
mod words;

pub use builtin::{BUILTINS, builtin};
pub use date::Date;
pub use history::{Rewritten, Sample};
pub use template::{ChatTemplate, Dialect, Given, Located, SOURCE_BYTES_MAX, TemplateError};
