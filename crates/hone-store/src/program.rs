//! Which program is running.

use std::sync::OnceLock;

use hone_schema::{Program, Sha256Hex};

use crate::{StoreError, input};

/// The hash of the running program's file, once it is known; `None` when it could not be read.
static HASH: OnceLock<Option<Sha256Hex>> = OnceLock::new();

fn hash() -> Result<Sha256Hex, StoreError> {
    let path = std::env::current_exe()
        .map_err(|e| StoreError::io("find", "the running program".as_ref(), e))?;
    Ok(input::hash(&path)?.0)
}

/// The running program: the version given, and the hash of its executable file, which is read once.
///
/// # Errors
/// The executable cannot be read.
pub fn program(version: &str) -> Result<Program, StoreError> {
    let sha256 = match HASH.get_or_init(|| hash().ok()) {
        Some(sha256) => sha256.clone(),
        None => hash()?,
    };
    Ok(Program { version: version.to_owned(), sha256 })
}

/// Begins to hash the program's file, for a later [`program`], while the caller reads its inputs: a
/// program is tens of megabytes.
pub fn program_ahead() {
    // Where there is no thread to be had, the caller of `program` does it.
    let hashing = || {
        HASH.get_or_init(|| hash().ok());
    };
    drop(std::thread::Builder::new().spawn(hashing));
}
