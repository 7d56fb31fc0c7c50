//! A Parquet table that is written while its rows come in.

use arrow::array::RecordBatch;
use hone_cli::Failure;
use hone_schema::RowError;
use hone_store::{Draft, ParquetFile};

/// Rows and bytes held back before they are written.
const ROWS_MAX: usize = 1024;
const BYTES_MAX: usize = 4 << 20;

/// A table of rows of one type.
pub(crate) struct Table<T> {
    file: ParquetFile,
    to_batch: fn(&[T]) -> Result<RecordBatch, RowError>,
    rows: Vec<T>,
    bytes: usize,
}

impl<T> Table<T> {
    /// A new table in the draft.
    pub(crate) fn new(
        draft: &Draft,
        name: &str,
        to_batch: fn(&[T]) -> Result<RecordBatch, RowError>,
    ) -> Result<Self, Failure> {
        let file = draft.parquet(name, to_batch(&[])?.schema())?;
        Ok(Table { file, to_batch, rows: Vec::new(), bytes: 0 })
    }

    /// Adds a row of about `bytes` bytes.
    pub(crate) fn push(&mut self, row: T, bytes: usize) -> Result<(), Failure> {
        self.rows.push(row);
        self.bytes += bytes;
        if self.rows.len() >= ROWS_MAX || self.bytes >= BYTES_MAX {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Failure> {
        self.file.write(&(self.to_batch)(&self.rows)?)?;
        self.rows.clear();
        self.bytes = 0;
        Ok(())
    }

    /// Writes the last rows and finishes the file.
    pub(crate) fn finish(mut self) -> Result<(), Failure> {
        self.flush()?;
        Ok(self.file.finish()?)
    }
}
