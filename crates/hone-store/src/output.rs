//! Single files for people and for programs outside hone: nothing that a stage reads, so nothing that is sealed.
//!
//! A file appears whole under its name or not at all: it is written beside its place and renamed.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use parquet::arrow::ArrowWriter;

use crate::{StoreError, tables};

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
        let properties = Some(tables::properties(ROW_GROUP_ROWS));
        let writer = ArrowWriter::try_new(Scratch::create(path)?, schema, properties)
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
    use std::sync::Arc;

    use arrow::array::BinaryArray;
    use arrow::datatypes::{DataType, Field, Schema};
    use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

    use super::*;
    use crate::Draft;

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

    #[test]
    fn a_few_long_rows_are_a_row_group_too() {
        let temp = tempfile::tempdir().expect("a temporary directory");
        let schema = Arc::new(Schema::new(vec![Field::new("x", DataType::Binary, false)]));
        // Bytes without a pattern, so that they stay as many: 20 rows of 4 MiB.
        let mut state = 1_u64;
        let mut row = || -> Vec<u8> {
            let step = |_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 33) as u8
            };
            (0..4 << 20).map(step).collect()
        };
        let rows: Vec<Vec<u8>> = (0..20).map(|_| row()).collect();
        let batches = rows.iter().map(|row| {
            let column = Arc::new(BinaryArray::from_iter_values([row]));
            RecordBatch::try_new(schema.clone(), vec![column]).expect("a batch")
        });
        let path = temp.path().join("x.parquet");
        let mut table = Table::create(&path, schema.clone()).expect("a file");
        let draft = Draft::open(&temp.path().join("sealed")).expect("a draft");
        let mut sealed = draft.parquet("x.parquet", schema.clone()).expect("a file");
        let sealed_path = draft.file("y").expect("a file").path().with_file_name("x.parquet");
        for batch in batches {
            table.write(&batch).expect("space");
            sealed.write(&batch).expect("space");
        }
        table.finish().expect("space");
        sealed.finish().expect("space");
        for path in [path, sealed_path] {
            let file = File::open(&path).expect("it is there");
            let table = ParquetRecordBatchReaderBuilder::try_new(file).expect("a table");
            let groups = table.metadata().row_groups().iter();
            let groups: Vec<_> = groups.map(|g| (g.num_rows(), g.compressed_size())).collect();
            assert_eq!(groups.iter().map(|group| group.0).sum::<i64>(), 20);
            assert!(groups.iter().all(|group| group.1 <= 36 << 20), "{groups:?}");
        }
    }
}
