//! Parquet files, and their cells as JSON.
//!
//! A struct of columns has a null for every key that another row has; those nulls were invented by
//! whoever wrote the file, so a null inside a struct, or a whole column's null, is left out. Nulls
//! in lists stay.
//!
//! The reader is not ours and may panic on damaged files; that is caught and becomes an error of
//! the file.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use arrow::array::cast::AsArray;
use arrow::array::{Array, ArrayRef, RecordBatch};
use arrow::datatypes::{
    DataType, Float16Type, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type,
    UInt8Type, UInt16Type, UInt32Type, UInt64Type,
};
use arrow::util::display::array_value_to_string;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use parquet::file::reader::ChunkReader;

use super::{ROW_BYTES_MAX, RawRow, ReadError};
use crate::fault::Fault;
use crate::json::quote;

/// Rows decoded at a time. Small, because the sizes in a file's metadata do not bound what its rows
/// expand to.
const BATCH_ROWS: usize = 256;

const HINT: &str =
    "the file is damaged or of a kind that is not read; write it again, or give JSON lines";

pub(super) struct Batches {
    reader: ParquetRecordBatchReader,
    path: PathBuf,
    batch: Option<RecordBatch>,
    next: usize,
    row: u64,
    over: bool,
}

pub(super) fn rows(file: impl ChunkReader + 'static, path: &Path) -> Result<Batches, ReadError> {
    let reader = guarded(path, None, || {
        let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|e| e.to_string())?;
        builder.with_batch_size(BATCH_ROWS).build().map_err(|e| e.to_string())
    })?;
    Ok(Batches { reader, path: path.to_owned(), batch: None, next: 0, row: 0, over: false })
}

/// Runs foreign decoding; an error or a panic of it becomes an error of the file.
fn guarded<T>(
    path: &Path,
    row: Option<u64>,
    work: impl FnOnce() -> Result<T, String>,
) -> Result<T, ReadError> {
    let what = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(what)) => what,
        Err(_) => "the Parquet reader gave up on it".to_owned(),
    };
    Err(ReadError::refused(path, row, what).hint(HINT))
}

impl Iterator for Batches {
    type Item = Result<RawRow, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.over {
            if let Some(batch) = &self.batch
                && self.next < batch.num_rows()
            {
                let (idx, row) = (self.next, self.row + 1);
                (self.next, self.row) = (idx + 1, row);
                let text = guarded(&self.path, Some(row), || object(batch.columns(), batch, idx));
                self.over = text.is_err();
                return Some(text.map(|text| raw_row(row, text)));
            }
            let reader = &mut self.reader;
            let next = guarded(&self.path, Some(self.row + 1), || {
                reader.next().transpose().map_err(|e| e.to_string())
            });
            match next {
                Ok(Some(batch)) => (self.batch, self.next) = (Some(batch), 0),
                Ok(None) => self.over = true,
                Err(e) => {
                    self.over = true;
                    return Some(Err(e));
                }
            }
        }
        None
    }
}

fn raw_row(line: u64, text: String) -> RawRow {
    let fault: Option<Fault> = (text.len() > ROW_BYTES_MAX).then(super::lines::too_long);
    let mut bytes = text.into_bytes();
    bytes.truncate(ROW_BYTES_MAX);
    RawRow { line, bytes, fault }
}

fn object(columns: &[ArrayRef], batch: &RecordBatch, row: usize) -> Result<String, String> {
    let schema = batch.schema_ref();
    let cells = schema.fields().iter().zip(columns);
    entries(cells.map(|(field, array)| (field.name().as_str(), array)), row)
}

fn entries<'a>(
    cells: impl Iterator<Item = (&'a str, &'a ArrayRef)>,
    row: usize,
) -> Result<String, String> {
    let mut parts = Vec::new();
    for (name, array) in cells {
        if array.is_valid(row) {
            parts.push(format!("{}:{}", quote(name), cell(array, row)?));
        }
    }
    Ok(format!("{{{}}}", parts.join(",")))
}

fn list(values: &ArrayRef) -> Result<String, String> {
    let items = (0..values.len()).map(|idx| cell(values, idx)).collect::<Result<Vec<_>, _>>()?;
    Ok(format!("[{}]", items.join(",")))
}

fn float(value: f64) -> String {
    serde_json::Number::from_f64(value).map_or_else(|| "null".to_owned(), |n| n.to_string())
}

/// Bytes that are text are text; others (a picture) are named by their length, they are no training
/// text.
fn bytes(value: &[u8]) -> String {
    match std::str::from_utf8(value) {
        Ok(text) => quote(text),
        Err(_) => quote(&format!("<{} bytes>", value.len())),
    }
}

/// One cell as JSON.
fn cell(array: &ArrayRef, row: usize) -> Result<String, String> {
    if array.is_null(row) {
        return Ok("null".to_owned());
    }
    Ok(match array.data_type() {
        DataType::Null => "null".to_owned(),
        DataType::Boolean => array.as_boolean().value(row).to_string(),
        DataType::Int8 => array.as_primitive::<Int8Type>().value(row).to_string(),
        DataType::Int16 => array.as_primitive::<Int16Type>().value(row).to_string(),
        DataType::Int32 => array.as_primitive::<Int32Type>().value(row).to_string(),
        DataType::Int64 => array.as_primitive::<Int64Type>().value(row).to_string(),
        DataType::UInt8 => array.as_primitive::<UInt8Type>().value(row).to_string(),
        DataType::UInt16 => array.as_primitive::<UInt16Type>().value(row).to_string(),
        DataType::UInt32 => array.as_primitive::<UInt32Type>().value(row).to_string(),
        DataType::UInt64 => array.as_primitive::<UInt64Type>().value(row).to_string(),
        DataType::Float16 => float(array.as_primitive::<Float16Type>().value(row).to_f64()),
        DataType::Float32 => float(f64::from(array.as_primitive::<Float32Type>().value(row))),
        DataType::Float64 => float(array.as_primitive::<Float64Type>().value(row)),
        DataType::Utf8 => quote(array.as_string::<i32>().value(row)),
        DataType::LargeUtf8 => quote(array.as_string::<i64>().value(row)),
        DataType::Utf8View => quote(array.as_string_view().value(row)),
        DataType::Binary => bytes(array.as_binary::<i32>().value(row)),
        DataType::LargeBinary => bytes(array.as_binary::<i64>().value(row)),
        DataType::BinaryView => bytes(array.as_binary_view().value(row)),
        DataType::FixedSizeBinary(_) => bytes(array.as_fixed_size_binary().value(row)),
        DataType::List(_) => list(&array.as_list::<i32>().value(row))?,
        DataType::LargeList(_) => list(&array.as_list::<i64>().value(row))?,
        DataType::FixedSizeList(..) => list(&array.as_fixed_size_list().value(row))?,
        DataType::Struct(fields) => {
            let array = array.as_struct();
            let cells = fields.iter().zip(array.columns());
            entries(cells.map(|(field, array)| (field.name().as_str(), array)), row)?
        }
        DataType::Map(..) => map(array, row)?,
        DataType::Dictionary(..) => {
            let array = array.as_any_dictionary();
            cell(array.values(), array.normalized_keys()[row])?
        }
        // Dates, times and decimals: their usual writing.
        _ => quote(&array_value_to_string(array, row).map_err(|e| e.to_string())?),
    })
}

fn map(array: &ArrayRef, row: usize) -> Result<String, String> {
    let entry = array.as_map().value(row);
    let (keys, values) = (entry.column(0), entry.column(1));
    let mut parts = Vec::with_capacity(keys.len());
    for idx in 0..keys.len() {
        let key = array_value_to_string(keys, idx).map_err(|e| e.to_string())?;
        parts.push(format!("{}:{}", quote(&key), cell(values, idx)?));
    }
    Ok(format!("{{{}}}", parts.join(",")))
}
