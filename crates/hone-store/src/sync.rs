//! The system calls of the protocol: sync a directory, lock, rename without replacing, exchange.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{CWD, FlockOperation, OFlags, RenameFlags};

use crate::StoreError;

/// Makes the entries of a directory durable.
pub(crate) fn dir(path: &Path) -> Result<(), StoreError> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(|e| StoreError::io("sync", path, e))
}

/// Takes the lock file at `path` for as long as the returned file lives. The kernel frees it when the holder dies.
pub(crate) fn lock(path: &Path, target: &Path) -> Result<File, StoreError> {
    loop {
        let file = try_lock(path, target)?;
        // Who removes a lock file holds it; it may have been removed between our opening and locking it.
        let is_ours = |there: &Metadata| file.metadata().is_ok_and(|m| m.ino() == there.ino());
        if std::fs::metadata(path).is_ok_and(|there| is_ours(&there)) {
            return Ok(file);
        }
    }
}

fn try_lock(path: &Path, target: &Path) -> Result<File, StoreError> {
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(|e| StoreError::io("create", path, e))?;
    if let Err(errno) = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        if errno != rustix::io::Errno::WOULDBLOCK {
            return Err(StoreError::io("lock", path, errno.into()));
        }
        let mut pid = String::new();
        let _ = file.read_to_string(&mut pid);
        let pid = if pid.trim().is_empty() { "unknown".into() } else { pid.trim().to_owned() };
        return Err(StoreError::Locked { path: target.to_owned(), pid });
    }
    let write_pid = |file: &mut File| {
        file.set_len(0)?;
        file.seek(SeekFrom::Start(0))?;
        write!(file, "{}", std::process::id())
    };
    write_pid(&mut file).map_err(|e| StoreError::io("write", path, e))?;
    Ok(file)
}

/// Renames `from` to `to`, which must not exist.
pub(crate) fn rename_new(from: &Path, to: &Path) -> Result<(), StoreError> {
    rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE)
        .map_err(|e| StoreError::io("rename", to, io::Error::from(e)))
}

/// Exchanges two directories in one step.
pub(crate) fn exchange(one: &Path, other: &Path) -> Result<(), StoreError> {
    rustix::fs::renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE)
        .map_err(|e| StoreError::io("rename", other, io::Error::from(e)))
}

/// Opens a regular file for reading; a symbolic link is an error.
pub(crate) fn open_no_follow(path: &Path) -> Result<File, StoreError> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32;
    OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)
        .map_err(|e| StoreError::io("open", path, e))
}
