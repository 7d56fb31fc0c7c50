//! What killed writers leave behind, and its removal: never while somebody is writing there.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::{StoreError, sync};

/// Between the name of a target and the process that writes it, in the name of a scratch directory.
const SCRATCH: &str = ".draft-";

/// End of the name of a lock file.
const LOCK: &str = ".lock";

/// Clears what a writer of `target` left behind that was killed between making its work visible
/// and tidying up. Does nothing while another process is writing it.
///
/// # Errors
/// The place cannot be read or written.
pub fn sweep(target: &Path) -> Result<(), StoreError> {
    let (Some(name), Some(parent)) = (target.file_name(), target.parent()) else {
        return Ok(());
    };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let name = name.to_string_lossy();
    let prefix = format!(".{name}{SCRATCH}");
    if hidden(parent, &prefix)?.is_empty() {
        return Ok(());
    }
    match sync::lock(&parent.join(format!(".{name}{LOCK}")), target) {
        Ok(_lock) => clear(parent, &prefix),
        Err(StoreError::Locked { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Sweeps every target in `dir`, removes the locks of those that do not exist, and `dir` itself
/// when nothing is left in it.
///
/// # Errors
/// The place cannot be read or written.
pub fn sweep_all(dir: &Path) -> Result<(), StoreError> {
    if !dir.is_dir() {
        return Ok(());
    }
    let names = |end: &'static str| {
        let paths = hidden(dir, ".")?;
        let names = paths.iter().filter_map(|path| path.file_name()?.to_str());
        let cut = |name: &str| Some(name[1..].split_once(end)?.0.to_owned());
        Ok::<Vec<String>, StoreError>(names.filter_map(cut).collect())
    };
    for name in names(SCRATCH)? {
        sweep(&dir.join(name))?;
    }
    for target in names(LOCK)?.iter().map(|name| dir.join(name)).filter(|path| !path.exists()) {
        let lock = target.with_file_name(format!(".{}{LOCK}", shown(&target)));
        match sync::lock(&lock, &target) {
            // Who has just opened it sees, once it is locked, that it is gone, and makes another.
            Ok(_lock) => fs::remove_file(&lock).map_err(|e| StoreError::io("remove", &lock, e))?,
            Err(StoreError::Locked { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    match fs::remove_dir(dir) {
        Err(e) if e.kind() != io::ErrorKind::DirectoryNotEmpty => {
            Err(StoreError::io("remove", dir, e))
        }
        _ => Ok(()),
    }
}

fn shown(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Entries of `dir` whose names start with `prefix`.
fn hidden(dir: &Path, prefix: &str) -> Result<Vec<PathBuf>, StoreError> {
    let error = |e| StoreError::io("read", dir, e);
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(error)? {
        let entry = entry.map_err(error)?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// Removes scratch directories that a killed writer left; the lock is held, so none is in use.
pub(crate) fn clear(parent: &Path, prefix: &str) -> Result<(), StoreError> {
    for path in hidden(parent, prefix)? {
        fs::remove_dir_all(&path).map_err(|e| StoreError::io("remove", &path, e))?;
    }
    Ok(())
}
