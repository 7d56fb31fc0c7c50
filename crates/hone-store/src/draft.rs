//! Writing an artefact.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use arrow::ipc::writer::FileWriter;
use hone_schema::{
    ArtefactKind, FileEntry, FileName, InputRef, Ledger, Manifest, Program, SCHEMA_VERSION,
    Sha256Hex,
};
use parquet::arrow::ArrowWriter;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::{Sealed, SpillWriter, StoreError, sync, tables, tidy};

/// Most rows of a Parquet row group: bounds what a reader must hold at once.
const ROW_GROUP_ROWS: usize = 65_536;

/// What a manifest says beside its files; see [`Manifest`] for the fields.
#[derive(Clone, Debug)]
pub struct Seal {
    /// What the directory holds.
    pub kind: ArtefactKind,
    /// The stage.
    pub stage: String,
    /// Its key.
    pub key: Sha256Hex,
    /// The program.
    pub program: Program,
    /// The resolved configuration.
    pub config: Value,
    /// What was read.
    pub inputs: Vec<InputRef>,
    /// Where every row went.
    pub ledger: Ledger,
    /// What the stage has to say.
    pub report: Value,
}

type Entries = Arc<Mutex<BTreeMap<FileName, Option<FileEntry>>>>;

/// A directory in the making: hidden, exclusive, gone when dropped before [`Draft::seal`].
#[derive(Debug)]
pub struct Draft {
    target: PathBuf,
    scratch: PathBuf,
    entries: Entries,
    is_sealed: bool,
    _lock: File,
}

impl Draft {
    /// Takes the lock of `target`, clears what a killed writer left behind, and makes a scratch directory beside it.
    ///
    /// # Errors
    /// Another process is writing it, it is a directory of something else, or the place cannot be written.
    pub fn open(target: &Path) -> Result<Self, StoreError> {
        let name = target
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .ok_or_else(|| StoreError::Foreign { path: target.to_owned() })?;
        let parent = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        fs::create_dir_all(&parent).map_err(|e| StoreError::io("create", &parent, e))?;
        refuse_foreign(target)?;
        let lock = sync::lock(&parent.join(format!(".{name}.lock")), target)?;
        let prefix = format!(".{name}.draft-");
        tidy::clear(&parent, &prefix)?;
        let scratch = parent.join(format!("{prefix}{}", std::process::id()));
        fs::create_dir(&scratch).map_err(|e| StoreError::io("create", &scratch, e))?;
        Ok(Draft {
            target: parent.join(&name),
            scratch,
            entries: Entries::default(),
            is_sealed: false,
            _lock: lock,
        })
    }

    /// A new file of the artefact.
    ///
    /// # Errors
    /// The name does not fit, is taken, or the file cannot be made.
    pub fn file(&self, name: &str) -> Result<DraftFile, StoreError> {
        let name = FileName::try_from(name)?;
        let path = self.scratch.join(name.as_str());
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(|e| StoreError::io("create", &path, e))?;
        self.entries.lock().expect("no writer panics with it").insert(name.clone(), None);
        Ok(DraftFile {
            out: BufWriter::with_capacity(1 << 18, Hashing::new(file)),
            name,
            path,
            entries: self.entries.clone(),
        })
    }

    /// A new file holding `bytes`.
    ///
    /// # Errors
    /// As [`Draft::file`], and the write.
    pub fn write(&self, name: &str, bytes: &[u8], rows: Option<u64>) -> Result<(), StoreError> {
        let mut file = self.file(name)?;
        file.write_all(bytes).map_err(|e| StoreError::io("write", &file.path, e))?;
        file.finish(rows)
    }

    /// A new Parquet file (zstd).
    ///
    /// # Errors
    /// As [`Draft::file`].
    pub fn parquet(&self, name: &str, schema: SchemaRef) -> Result<ParquetFile, StoreError> {
        let file = self.file(name)?;
        let path = file.path.clone();
        let writer = ArrowWriter::try_new(file, schema, Some(tables::properties(ROW_GROUP_ROWS)))
            .map_err(|e| StoreError::write(&path, &e))?;
        Ok(ParquetFile { writer, path, rows: 0 })
    }

    /// A new Arrow IPC file, uncompressed so that it can be mapped into memory.
    ///
    /// # Errors
    /// As [`Draft::file`].
    pub fn ipc(&self, name: &str, schema: SchemaRef) -> Result<IpcFile, StoreError> {
        let file = self.file(name)?;
        let path = file.path.clone();
        let writer =
            FileWriter::try_new(file, &schema).map_err(|e| StoreError::write(&path, &e))?;
        Ok(IpcFile { writer, path, rows: 0 })
    }

    /// A scratch file beside the artefact's own, to put aside what does not fit into memory. It is no part of the artefact: it has no
    /// name, and is gone when it is dropped. `what` is for messages.
    ///
    /// # Errors
    /// The name does not fit, or the file cannot be made.
    pub fn spill(&self, what: &str) -> Result<SpillWriter, StoreError> {
        let name = FileName::try_from(what)?;
        SpillWriter::create(&self.scratch.join(name.as_str()))
    }

    /// Writes the manifest, and makes the directory visible under its name in one step, in the place of an older one.
    ///
    /// # Errors
    /// A ledger that does not balance, or the file system; then nothing has become visible.
    pub fn seal(mut self, seal: Seal) -> Result<Sealed, StoreError> {
        let files = self.finished()?;
        let manifest = Manifest {
            schema: SCHEMA_VERSION,
            kind: seal.kind,
            stage: seal.stage,
            key: seal.key,
            program: seal.program,
            config: seal.config,
            inputs: seal.inputs,
            files,
            ledger: seal.ledger,
            report: seal.report,
        };
        manifest
            .check()
            .map_err(|source| StoreError::Manifest { path: self.target.clone(), source })?;
        let path = self.scratch.join(Manifest::FILE);
        let bytes = manifest.to_json();
        File::create_new(&path)
            .and_then(|mut file| file.write_all(&bytes).and_then(|()| file.sync_all()))
            .map_err(|e| StoreError::io("write", &path, e))?;
        sync::dir(&self.scratch)?;
        let parent = self.target.parent().expect("joined to its parent in open").to_owned();
        if self.target.exists() {
            sync::exchange(&self.scratch, &self.target)?;
        } else {
            sync::rename_new(&self.scratch, &self.target)?;
        }
        self.is_sealed = true;
        sync::dir(&parent)?;
        if self.scratch.exists() {
            // The older artefact lies there now: nobody can see it under its name any more.
            fs::remove_dir_all(&self.scratch)
                .map_err(|e| StoreError::io("remove", &self.scratch, e))?;
        }
        Sealed::open(&self.target, seal.kind)
    }

    fn finished(&self) -> Result<Vec<FileEntry>, StoreError> {
        let entries = self.entries.lock().expect("no writer panics with it");
        entries
            .iter()
            .map(|(name, entry)| {
                entry.clone().ok_or_else(|| StoreError::Table {
                    path: self.scratch.join(name.as_str()),
                    message: "the file was begun and not finished".to_owned(),
                })
            })
            .collect()
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.is_sealed {
            // Best effort: what stays is hidden, and cleared by the next writer.
            let _ = fs::remove_dir_all(&self.scratch);
        }
    }
}

/// A target may be absent, an empty directory, or an artefact of ours; nothing else is ever replaced.
fn refuse_foreign(target: &Path) -> Result<(), StoreError> {
    let foreign = || StoreError::Foreign { path: target.to_owned() };
    match fs::symlink_metadata(target) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(StoreError::io("read", target, e)),
        Ok(meta) if !meta.is_dir() => Err(foreign()),
        Ok(_) if target.join(Manifest::FILE).is_file() => Ok(()),
        Ok(_) => {
            let mut entries =
                fs::read_dir(target).map_err(|e| StoreError::io("read", target, e))?;
            if entries.next().is_none() { Ok(()) } else { Err(foreign()) }
        }
    }
}

/// Hashes and counts what passes through.
#[derive(Debug)]
struct Hashing {
    file: File,
    digest: Sha256,
    bytes: u64,
}

impl Hashing {
    fn new(file: File) -> Self {
        Hashing { file, digest: Sha256::new(), bytes: 0 }
    }
}

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.file.write(bytes)?;
        self.digest.update(&bytes[..n]);
        self.bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// A file of a draft: write to it, then [`DraftFile::finish`].
#[derive(Debug)]
pub struct DraftFile {
    out: BufWriter<Hashing>,
    name: FileName,
    path: PathBuf,
    entries: Entries,
}

impl Write for DraftFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

impl DraftFile {
    /// Where it lies while it is written; for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes out what is buffered, syncs, and enters the file in the manifest with its rows, if it has rows.
    ///
    /// # Errors
    /// The file system.
    pub fn finish(self, rows: Option<u64>) -> Result<(), StoreError> {
        let error = |e| StoreError::io("write", &self.path, e);
        let inner = self.out.into_inner().map_err(|e| error(e.into_error()))?;
        inner.file.sync_all().map_err(error)?;
        let entry = FileEntry {
            name: self.name.clone(),
            bytes: inner.bytes,
            sha256: Sha256Hex::from_digest(&inner.digest.finalize()),
            rows,
        };
        self.entries.lock().expect("no writer panics with it").insert(self.name, Some(entry));
        Ok(())
    }
}

/// A Parquet file of a draft.
pub struct ParquetFile {
    writer: ArrowWriter<DraftFile>,
    path: PathBuf,
    rows: u64,
}

impl ParquetFile {
    /// Appends rows.
    ///
    /// # Errors
    /// A batch of another schema, or the file system.
    pub fn write(&mut self, batch: &RecordBatch) -> Result<(), StoreError> {
        self.rows += batch.num_rows() as u64;
        self.writer.write(batch).map_err(|e| StoreError::write(&self.path, &e))
    }

    /// Writes the footer and finishes the file.
    ///
    /// # Errors
    /// The file system.
    pub fn finish(self) -> Result<(), StoreError> {
        let file = self.writer.into_inner().map_err(|e| StoreError::write(&self.path, &e))?;
        file.finish(Some(self.rows))
    }
}

/// An Arrow IPC file of a draft.
pub struct IpcFile {
    writer: FileWriter<DraftFile>,
    path: PathBuf,
    rows: u64,
}

impl IpcFile {
    /// Appends rows.
    ///
    /// # Errors
    /// A batch of another schema, or the file system.
    pub fn write(&mut self, batch: &RecordBatch) -> Result<(), StoreError> {
        self.rows += batch.num_rows() as u64;
        self.writer.write(batch).map_err(|e| StoreError::write(&self.path, &e))
    }

    /// Writes the footer and finishes the file.
    ///
    /// # Errors
    /// The file system.
    pub fn finish(self) -> Result<(), StoreError> {
        let file = self.writer.into_inner().map_err(|e| StoreError::write(&self.path, &e))?;
        file.finish(Some(self.rows))
    }
}
