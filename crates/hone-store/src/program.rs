//! Which program is running.

use std::sync::OnceLock;

use hone_schema::Program;

use crate::{StoreError, input};

/// The running program: the version given, and the hash of its executable file, which is read once.
///
/// # Errors
/// The executable cannot be read.
pub fn program(version: &str) -> Result<Program, StoreError> {
    static PROGRAM: OnceLock<Program> = OnceLock::new();
    if let Some(program) = PROGRAM.get() {
        return Ok(program.clone());
    }
    let path = std::env::current_exe()
        .map_err(|e| StoreError::io("find", "the running program".as_ref(), e))?;
    let (sha256, _) = input::hash(&path)?;
    Ok(PROGRAM.get_or_init(|| Program { version: version.to_owned(), sha256 }).clone())
}
