//! Reading an artefact.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use arrow::array::RecordBatch;
use arrow::ipc::reader::FileReader;
use hone_schema::{ArtefactKind, FileEntry, InputRef, Manifest, Sha256Hex, sha256};
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};

use crate::{StoreError, input, sync};

/// Longest manifest read, in bytes: ten thousand files and a long report.
const MANIFEST_BYTES_MAX: u64 = 64 << 20;

/// Rows decoded from Parquet at a time; the bound on what a small file can unfold to at once.
const BATCH_ROWS: usize = 8_192;

/// A sealed directory that was checked: manifest, ledger, names and sizes. Contents are checked against their hashes when read.
#[derive(Clone, Debug)]
pub struct Sealed {
    dir: PathBuf,
    manifest: Manifest,
    sha256: Sha256Hex,
}

impl Sealed {
    /// Opens a sealed directory of `kind`.
    ///
    /// # Errors
    /// It is missing, not sealed, of another kind, or not as it was sealed.
    pub fn open(dir: &Path, kind: ArtefactKind) -> Result<Self, StoreError> {
        let sealed = Self::open_any(dir)?;
        let found = sealed.manifest.kind;
        if found != kind {
            return Err(StoreError::Kind { path: dir.to_owned(), expected: kind, found });
        }
        Ok(sealed)
    }

    /// Opens a sealed directory of any kind.
    ///
    /// # Errors
    /// As [`Sealed::open`].
    pub fn open_any(dir: &Path) -> Result<Self, StoreError> {
        if !dir.exists() {
            return Err(StoreError::NotFound { path: dir.to_owned() });
        }
        let path = dir.join(Manifest::FILE);
        if !path.is_file() {
            return Err(StoreError::NotSealed { path: dir.to_owned() });
        }
        let bytes = input::read(&path, MANIFEST_BYTES_MAX)?;
        let manifest = Manifest::from_json(&bytes)
            .map_err(|source| StoreError::Manifest { path: path.clone(), source })?;
        let sealed = Sealed { dir: dir.to_owned(), manifest, sha256: sha256(&bytes) };
        for entry in &sealed.manifest.files {
            sealed.check_size(entry)?;
        }
        Ok(sealed)
    }

    fn check_size(&self, entry: &FileEntry) -> Result<(), StoreError> {
        let path = self.dir.join(entry.name.as_str());
        let meta = fs::symlink_metadata(&path).map_err(|e| StoreError::io("read", &path, e))?;
        if !meta.is_file() {
            let what = "it is not a regular file".to_owned();
            return Err(StoreError::Changed { path, what });
        }
        if meta.len() != entry.bytes {
            let what = format!("it had {} bytes, it has {}", entry.bytes, meta.len());
            return Err(StoreError::Changed { path, what });
        }
        Ok(())
    }

    /// Where it lies.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Hash of its manifest, which covers the hashes of all its files.
    pub fn sha256(&self) -> &Sha256Hex {
        &self.sha256
    }

    /// This artefact as an input of a stage.
    pub fn input(&self, role: &str) -> InputRef {
        InputRef { role: role.to_owned(), sha256: self.sha256.clone() }
    }

    /// Whether it has a file of that name.
    pub fn has(&self, name: &str) -> bool {
        self.manifest.file(name).is_some()
    }

    /// Path of a file; for messages and for programs outside hone.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn entry(&self, name: &str) -> Result<&FileEntry, StoreError> {
        self.manifest
            .file(name)
            .ok_or_else(|| StoreError::NoFile { path: self.dir.clone(), name: name.to_owned() })
    }

    /// A file whose size and hash were checked, at its first byte.
    ///
    /// # Errors
    /// There is no such file, or it was changed.
    pub fn file(&self, name: &str) -> Result<File, StoreError> {
        let entry = self.entry(name)?;
        let path = self.dir.join(name);
        self.check_size(entry)?;
        let mut file = sync::open_no_follow(&path)?;
        let error = |e| StoreError::io("read", &path, e);
        let (found, _) = input::hash_reader(&mut file).map_err(error)?;
        if found != entry.sha256 {
            return Err(StoreError::hash(&path, &entry.sha256, &found));
        }
        file.seek(SeekFrom::Start(0)).map_err(error)?;
        Ok(file)
    }

    /// The bytes of a file, checked.
    ///
    /// # Errors
    /// As [`Sealed::file`].
    pub fn read(&self, name: &str) -> Result<Vec<u8>, StoreError> {
        let entry = self.entry(name)?;
        self.check_size(entry)?;
        let path = self.dir.join(name);
        let mut bytes = Vec::with_capacity(entry.bytes as usize);
        sync::open_no_follow(&path)?
            .take(entry.bytes + 1)
            .read_to_end(&mut bytes)
            .map_err(|e| StoreError::io("read", &path, e))?;
        let found = sha256(&bytes);
        if found != entry.sha256 {
            return Err(StoreError::hash(&path, &entry.sha256, &found));
        }
        Ok(bytes)
    }

    /// The batches of a Parquet file, checked.
    ///
    /// # Errors
    /// As [`Sealed::file`], and a file that is not Parquet.
    pub fn parquet(&self, name: &str) -> Result<Batches, StoreError> {
        let path = self.dir.join(name);
        let reader = ParquetRecordBatchReaderBuilder::try_new(self.file(name)?)
            .and_then(|builder| builder.with_batch_size(BATCH_ROWS).build())
            .map_err(|e| StoreError::table(&path, e))?;
        Ok(Batches { reader, path })
    }

    /// The batches of an Arrow IPC file, checked.
    ///
    /// # Errors
    /// As [`Sealed::file`], and a file that is not Arrow IPC.
    pub fn ipc(&self, name: &str) -> Result<Vec<RecordBatch>, StoreError> {
        let path = self.dir.join(name);
        let reader = FileReader::try_new(self.file(name)?, None);
        reader
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .map_err(|e| StoreError::table(&path, e))
    }
}

/// The batches of a Parquet file, one after the other.
pub struct Batches {
    reader: ParquetRecordBatchReader,
    path: PathBuf,
}

impl Batches {
    /// The file read; for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Every row of the file through `from`, such as `Conversation::from_batch`.
    ///
    /// # Errors
    /// A damaged file, or rows that are not what they should be.
    pub fn rows<T>(
        self,
        from: impl Fn(&RecordBatch) -> Result<Vec<T>, hone_schema::RowError>,
    ) -> Result<Vec<T>, StoreError> {
        let path = self.path.clone();
        let mut rows = Vec::new();
        for batch in self {
            let more = from(&batch?);
            rows.extend(more.map_err(|source| StoreError::Rows { path: path.clone(), source })?);
        }
        Ok(rows)
    }
}

impl Iterator for Batches {
    type Item = Result<RecordBatch, StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        Some(self.reader.next()?.map_err(|e| StoreError::table(&self.path, e)))
    }
}

/// Names of the directories in `dir`, sorted, hidden ones left out; none when it does not exist.
///
/// # Errors
/// It cannot be read.
pub fn children(dir: &Path) -> Result<Vec<String>, StoreError> {
    if !dir.exists() {
        return Ok(Vec::new());
    }
    let error = |e| StoreError::io("read", dir, e);
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(error)? {
        let entry = entry.map_err(error)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.path().is_dir() && !name.starts_with('.') {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Removes a sealed directory: out of sight in one step, then file by file. Absent is fine.
///
/// # Errors
/// It is not a sealed directory, or the file system.
pub fn remove_sealed(dir: &Path) -> Result<(), StoreError> {
    if !dir.exists() {
        return Ok(());
    }
    if !dir.join(Manifest::FILE).is_file() {
        return Err(StoreError::NotSealed { path: dir.to_owned() });
    }
    let name = dir.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let hidden = dir.with_file_name(format!(".{name}.draft-removed-{}", std::process::id()));
    fs::rename(dir, &hidden).map_err(|e| StoreError::io("rename", dir, e))?;
    fs::remove_dir_all(&hidden).map_err(|e| StoreError::io("remove", &hidden, e))
}
