//! Single files for people and for programs outside hone: nothing that a stage reads, so nothing that is sealed.
//!
//! A file appears whole under its name or not at all: it is written beside its place and renamed.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;

use crate::StoreError;

/// Most rows of a Parquet row group: rows of packed tokens are long.
const ROW_GROUP_ROWS: usize = 8_192;

/// Writes `bytes` to the file `path`, in the place of an older one.
///
/// # Errors
/// The place cannot be written, or it is a directory.
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let mut file = Scratch::create(path)?;
    file.write_all(bytes).map_err(|e| StoreError::io("write", path, e))?;
    file.finish()
}

/// A Parquet file (zstd) in the making; gone when dropped before [`Table::finish`].
pub struct Table {
    writer: ArrowWriter<Scratch>,
    path: PathBuf,
}

impl Table {
    /// A new table that will lie at `path`.
    ///
    /// # Errors
    /// The place cannot be written, or it is a directory.
    pub fn create(path: &Path, schema: SchemaRef) -> Result<Self, StoreError> {
        let level = ZstdLevel::try_new(3).expect("3 is a zstd level");
        let properties = WriterProperties::builder()
            .set_compression(Compression::ZSTD(level))
            .set_created_by("hone".to_owned())
            .set_max_row_group_row_count(Some(ROW_GROUP_ROWS))
            .build();
        let writer = ArrowWriter::try_new(Scratch::create(path)?, schema, Some(properties))
            .map_err(|e| StoreError::write(path, &e))?;
        Ok(Table { writer, path: path.to_owned() })
    }

    /// Appends rows.
    ///
    /// # Errors
    /// A batch of another schema, or the file system.
    pub fn write(&mut self, batch: &RecordBatch) -> Result<(), StoreError> {
        self.writer.write(batch).map_err(|e| StoreError::write(&self.path, &e))
    }

    /// Writes the footer, and gives the file its name.
    ///
    /// # Errors
    /// The file system.
    pub fn finish(self) -> Result<(), StoreError> {
        let file = self.writer.into_inner().map_err(|e| StoreError::write(&self.path, &e))?;
        file.finish()
    }
}

/// A file beside its place.
struct Scratch {
    out: Option<BufWriter<File>>,
    scratch: PathBuf,
    path: PathBuf,
}

impl Scratch {
    fn create(path: &Path) -> Result<Self, StoreError> {
        let error = |e| StoreError::io("create", path, e);
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        let Some(name) = name.filter(|_| !path.is_dir()) else {
            return Err(error(io::Error::from(io::ErrorKind::IsADirectory)));
        };
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        fs::create_dir_all(&parent).map_err(|e| StoreError::io("create", &parent, e))?;
        let scratch = parent.join(format!(".{name}.draft-{}", std::process::id()));
        let file = File::create(&scratch).map_err(error)?;
        Ok(Scratch { out: Some(BufWriter::new(file)), scratch, path: path.to_owned() })
    }

    fn out(&mut self) -> &mut BufWriter<File> {
        self.out.as_mut().expect("it is taken in finish alone, which takes all of it")
    }

    fn finish(mut self) -> Result<(), StoreError> {
        let path = self.path.clone();
        let error = |e| StoreError::io("write", &path, e);
        let out = self.out.take().expect("it is taken here alone");
        let file = out.into_inner().map_err(|e| error(e.into_error()))?;
        file.sync_all().map_err(error)?;
        fs::rename(&self.scratch, &path).map_err(|e| StoreError::io("rename", &path, e))
    }
}

impl Write for Scratch {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out().flush()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Renamed away it is no longer there; else what was begun goes.
        let _ = fs::remove_file(&self.scratch);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).expect("a directory of the test");
        let mut names: Vec<String> = entries
            .map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_there_whole_or_not_at_all() {
        let temp = tempfile::tempdir().expect("a temporary directory");
        let path = temp.path().join("inner/page.html");
        write(&path, b"one").expect("the directory is made");
        write(&path, b"two").expect("an older file is replaced");
        assert_eq!(fs::read(&path).expect("it is there"), b"two");
        let mut begun = Scratch::create(&path).expect("beside it");
        begun.write_all(b"half").expect("space");
        drop(begun);
        assert_eq!(fs::read(&path).expect("it is still there"), b"two");
        assert_eq!(names(&temp.path().join("inner")), ["page.html"]);
        let error = write(temp.path(), b"x").expect_err("a directory").to_string();
        assert!(error.contains("directory"), "{error}");
    }
}
