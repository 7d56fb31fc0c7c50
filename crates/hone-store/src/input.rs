//! What users bring: raw files and directories, read under limits.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use hone_schema::Sha256Hex;
use sha2::{Digest, Sha256};

use crate::StoreError;

/// Bytes hashed at a time.
const HASH_BLOCK: usize = 1 << 20;

/// The whole of a file of at most `bytes_max` bytes.
///
/// # Errors
/// It is missing, too large, not a regular file, or cannot be read.
pub fn read(path: &Path, bytes_max: u64) -> Result<Vec<u8>, StoreError> {
    let file = open(path)?;
    let mut bytes = Vec::new();
    file.take(bytes_max + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| StoreError::io("read", path, e))?;
    if bytes.len() as u64 > bytes_max {
        let found = fs::metadata(path).map_or(bytes.len() as u64, |m| m.len());
        return Err(StoreError::TooLarge { path: path.to_owned(), bytes: found, max: bytes_max });
    }
    Ok(bytes)
}

/// A file open for reading: a regular one, or a pipe; never a directory or a device.
///
/// # Errors
/// It is missing, of another type, or cannot be opened.
pub fn open(path: &Path) -> Result<File, StoreError> {
    use std::os::unix::fs::FileTypeExt;
    let meta = fs::metadata(path).map_err(|e| StoreError::io("read", path, e))?;
    let kind = meta.file_type();
    if kind.is_dir() {
        let source = std::io::Error::from(std::io::ErrorKind::IsADirectory);
        return Err(StoreError::io("read", path, source));
    }
    if kind.is_char_device() || kind.is_block_device() || kind.is_socket() {
        let source = std::io::Error::other("it is a device, not a file");
        return Err(StoreError::io("read", path, source));
    }
    File::open(path).map_err(|e| StoreError::io("open", path, e))
}

/// Hash and length of a file.
///
/// # Errors
/// As [`open`].
pub fn hash(path: &Path) -> Result<(Sha256Hex, u64), StoreError> {
    hash_reader(open(path)?).map_err(|e| StoreError::io("read", path, e))
}

pub(crate) fn hash_reader(mut file: impl Read) -> std::io::Result<(Sha256Hex, u64)> {
    let mut digest = Sha256::new();
    let mut block = vec![0; HASH_BLOCK];
    let mut bytes = 0;
    loop {
        match file.read(&mut block) {
            Ok(0) => return Ok((Sha256Hex::from_digest(&digest.finalize()), bytes)),
            Ok(n) => {
                digest.update(&block[..n]);
                bytes += n as u64;
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// Whether there is a directory at `path`.
pub fn is_dir(path: &Path) -> bool {
    path.is_dir()
}

/// Whether there is a regular file (or a link to one) at `path`.
pub fn is_file(path: &Path) -> bool {
    path.is_file()
}

/// Length of a file in bytes.
///
/// # Errors
/// It is missing or cannot be looked at.
pub fn len(path: &Path) -> Result<u64, StoreError> {
    Ok(fs::metadata(path).map_err(|e| StoreError::io("read", path, e))?.len())
}

/// The regular files of a directory (links to such included), sorted by name; nothing below it.
///
/// # Errors
/// It is missing or cannot be read.
pub fn list(dir: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let error = |e| StoreError::io("read", dir, e);
    let mut paths = Vec::new();
    for entry in fs::read_dir(dir).map_err(error)? {
        let path = entry.map_err(error)?.path();
        if path.is_file() {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}
