//! Logs that people watch while a stage runs: appended to, never sealed, never read by a stage.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::StoreError;

/// An append-only file outside every artefact.
#[derive(Debug)]
pub struct Live {
    file: File,
    path: PathBuf,
}

impl Live {
    /// Opens `path` for appending, making its directory; what is there stays.
    ///
    /// # Errors
    /// The place cannot be written.
    pub fn append(path: &Path) -> Result<Self, StoreError> {
        Self::open(path, OpenOptions::new().create(true).append(true))
    }

    /// Opens `path` anew and empty, making its directory.
    ///
    /// # Errors
    /// The place cannot be written.
    pub fn create(path: &Path) -> Result<Self, StoreError> {
        Self::open(path, OpenOptions::new().create(true).write(true).truncate(true))
    }

    fn open(path: &Path, options: &OpenOptions) -> Result<Self, StoreError> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(|e| StoreError::io("create", parent, e))?;
        }
        let file = options.open(path).map_err(|e| StoreError::io("create", path, e))?;
        Ok(Live { file, path: path.to_owned() })
    }

    /// Writes `bytes` at the end.
    ///
    /// # Errors
    /// The write failed.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.file.write_all(bytes).map_err(|e| StoreError::io("write", &self.path, e))
    }
}
