//! What a stage must put aside for a while: a file without a name, on the disk that the artefact will be on.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::StoreError;

/// Bytes collected before they are written.
const BUFFER_BYTES: usize = 1 << 18;

/// A scratch file being filled; see [`crate::Draft::spill`]. It has lost its name already, so however the process ends, nothing of it
/// is left.
#[derive(Debug)]
pub struct SpillWriter {
    file: File,
    path: PathBuf,
    buffer: Vec<u8>,
    written: u64,
}

/// A scratch file that is full, to be read at any place by any thread.
#[derive(Debug)]
pub struct Spill {
    file: File,
    path: PathBuf,
    bytes: u64,
}

impl SpillWriter {
    pub(crate) fn create(path: &Path) -> Result<Self, StoreError> {
        let error = |e| StoreError::io("create", path, e);
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).open(path).map_err(error)?;
        fs::remove_file(path).map_err(error)?;
        Ok(SpillWriter {
            file,
            path: path.to_owned(),
            buffer: Vec::with_capacity(BUFFER_BYTES),
            written: 0,
        })
    }

    /// Puts `bytes` at the end and returns where they begin.
    ///
    /// # Errors
    /// The write.
    pub fn append(&mut self, bytes: &[u8]) -> Result<u64, StoreError> {
        if self.buffer.len() + bytes.len() > BUFFER_BYTES {
            self.flush()?;
        }
        let at = self.written + self.buffer.len() as u64;
        self.buffer.extend_from_slice(bytes);
        Ok(at)
    }

    fn flush(&mut self) -> Result<(), StoreError> {
        self.file.write_all(&self.buffer).map_err(|e| StoreError::io("write", &self.path, e))?;
        self.written += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    /// Writes out what is collected; from here on it is read.
    ///
    /// # Errors
    /// The write.
    pub fn finish(mut self) -> Result<Spill, StoreError> {
        self.flush()?;
        Ok(Spill { file: self.file, path: self.path, bytes: self.written })
    }
}

impl Spill {
    /// The `n` bytes from `offset` on.
    ///
    /// # Errors
    /// The read, or there are not so many.
    pub fn read(&self, offset: u64, n: usize) -> Result<Vec<u8>, StoreError> {
        let mut bytes = vec![0; n];
        self.file
            .read_exact_at(&mut bytes, offset)
            .map_err(|e| StoreError::io("read", &self.path, e))?;
        Ok(bytes)
    }

    /// Its length in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}
