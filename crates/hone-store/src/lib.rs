//! Files, and nothing but files: the only crate that touches `std::fs`.
//!
//! An artefact is a directory that appears whole or not at all. [`Draft`] is the way in: a hidden scratch directory beside
//! the target, behind a lock that the kernel frees when its holder dies; every file is hashed while it is written and synced;
//! `manifest.json` comes last; one rename makes it visible. [`Sealed`] is the way out: it refuses a directory whose manifest,
//! ledger, names, sizes or hashes are not as they were sealed. [`ModelDir`] reads Hugging Face model directories, sealed or
//! foreign; [`input`] reads what users bring; [`Live`] appends to logs that people watch while a stage runs; [`Spill`] is where a
//! stage puts aside what does not fit into memory; [`machine`] says how much of that there is.

mod draft;
mod error;
mod foreign;
pub mod input;
mod live;
pub mod machine;
mod mapped;
mod model_dir;
pub mod output;
mod program;
mod sealed;
mod spill;
mod sync;
mod tables;
#[cfg(test)]
mod tests;
mod tidy;

pub use draft::{Draft, DraftFile, IpcFile, ParquetFile, Seal};
pub use error::{ErrorClass, StoreError};
pub use foreign::ForeignTable;
pub use live::Live;
pub use model_dir::ModelDir;
pub use program::{program, program_ahead};
pub use sealed::{Batches, Sealed, children, remove_sealed};
pub use spill::{Spill, SpillWriter};
pub use tidy::{sweep, sweep_all};
