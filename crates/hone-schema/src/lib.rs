//! The contract between the stages of hone: what they exchange, and how one trusts it. No I/O here.
//!
//! - [`Manifest`]: the last file of every sealed directory; names, sizes and hashes of the others, the resolved
//!   configuration, the inputs, the program, the [`Ledger`], and the [`key`](stage_key) that decides whether work is fresh.
//! - [`Ledger`]: rows and tokens in = out + rejected by reason, per source. A reader refuses one that does not balance.
//! - Row types and their Arrow schemas: [`Conversation`], [`Rendered`], [`Pack`], [`Prompt`], [`Reject`].
//!
//! Types that cross a process boundary live here and nowhere else; changing one means raising [`SCHEMA_VERSION`].

mod columns;
mod key;
mod ledger;
mod manifest;
mod message;
mod names;
mod packs;
mod roles;
mod rows;
mod share;
mod steps;

pub use key::{Sha256Hex, canonical_json, sha256, stage_key};
pub use ledger::{Ledger, LedgerError, SourceLedger, TokenLedger};
pub use manifest::{ArtefactKind, FileEntry, InputRef, Manifest, ManifestError, Program};
pub use message::{Mark, Message, MessageError, REASONING_KEYS, THOUGHT_MARKS, parse_messages};
pub use names::{FileName, NameError};
pub use packs::{Doc, Pack, PackColumns, PackError};
pub use roles::{Roles, TEMPLATE, TEXT, THOUGHTS, UNKNOWN};
pub use rows::{Conversation, Kind, Part, Prompt, Reject, Rendered, RowError, Span, Split};
pub use share::Share;
pub use steps::PlanStep;

/// Version of the manifest and of every row type; a reader takes exactly its own.
pub const SCHEMA_VERSION: u32 = 4;
