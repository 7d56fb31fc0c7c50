//! Parquet tables that users bring: not sealed, so nothing is known of them before they are read.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use arrow::array::RecordBatch;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};

use crate::{StoreError, input};

/// Rows decoded at a time. Small, because the sizes in a file's metadata do not bound what its rows expand to.
const BATCH_ROWS: usize = 256;

/// The batches of a Parquet file, one after the other. The reader is not ours and may panic on damaged files; that is caught and
/// becomes an error of the file.
pub struct ForeignTable {
    reader: Option<ParquetRecordBatchReader>,
    path: PathBuf,
}

impl ForeignTable {
    /// Opens the file `path`.
    ///
    /// # Errors
    /// It is missing, or not Parquet.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let file = input::open(path)?;
        let reader = guarded(path, || {
            let builder = ParquetRecordBatchReaderBuilder::try_new(file)?;
            builder.with_batch_size(BATCH_ROWS).build()
        })?;
        Ok(ForeignTable { reader: Some(reader), path: path.to_owned() })
    }
}

impl Iterator for ForeignTable {
    type Item = Result<RecordBatch, StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        let reader = self.reader.as_mut()?;
        let next = guarded(&self.path, || reader.next().transpose()).transpose();
        // What panicked once is not asked again.
        if next.as_ref().is_none_or(Result::is_err) {
            self.reader = None;
        }
        next
    }
}

/// Runs foreign decoding.
fn guarded<T, E: std::fmt::Display>(
    path: &Path,
    work: impl FnOnce() -> Result<T, E>,
) -> Result<T, StoreError> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => done.map_err(|e| StoreError::table(path, e)),
        Err(_) => Err(StoreError::table(path, "the Parquet reader gave up on it")),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::Int32Array;
    use arrow::datatypes::{DataType, Field, Schema};

    use super::*;
    use crate::output;

    #[test]
    fn a_damaged_file_is_an_error_wherever_it_is_damaged() {
        let temp = tempfile::tempdir().expect("a temporary directory");
        let path = temp.path().join("x.parquet");
        let schema = Arc::new(Schema::new(vec![Field::new("n", DataType::Int32, false)]));
        let mut table = output::Table::create(&path, schema.clone()).expect("a file");
        let numbers = Arc::new(Int32Array::from_iter_values(0..300));
        let batch = RecordBatch::try_new(schema, vec![numbers]).expect("a batch");
        table.write(&batch).expect("space");
        table.finish().expect("space");
        let read = |path: &Path| {
            ForeignTable::open(path)?.map(|b| b.map(|b| b.num_rows())).sum::<Result<usize, _>>()
        };
        assert_eq!(read(&path).expect("it is whole"), 300);
        let bytes = std::fs::read(&path).expect("it is there");
        for at in (0..bytes.len()).step_by(7) {
            let mut bytes = bytes.clone();
            bytes[at] ^= 0x55;
            std::fs::write(&path, &bytes).expect("space");
            // A changed digit may still be a number; what matters is that nothing ends the process.
            let _ = read(&path);
        }
        std::fs::write(&path, &bytes[..bytes.len() - 1]).expect("space");
        assert!(read(&path).is_err());
    }
}
