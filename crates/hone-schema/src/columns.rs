//! Small helpers between rows and Arrow columns: build typed arrays, and take typed arrays out of a batch or say what is wrong.

use arrow::array::{Array, RecordBatch};

use crate::RowError;

/// The column `name` of `batch` as the array type `A`.
pub(crate) fn column<'a, A: Array + 'static>(
    batch: &'a RecordBatch,
    name: &'static str,
) -> Result<&'a A, RowError> {
    let array = batch.column_by_name(name).ok_or(RowError::MissingColumn { name })?;
    array
        .as_any()
        .downcast_ref::<A>()
        .ok_or_else(|| RowError::ColumnType { name, found: array.data_type().to_string() })
}

/// The values of a list column's row as the array type `A`.
pub(crate) fn item<A: Array + Clone + 'static>(
    list: &arrow::array::ListArray,
    row: usize,
    name: &'static str,
) -> Result<A, RowError> {
    let values = list.value(row);
    values
        .as_any()
        .downcast_ref::<A>()
        .cloned()
        .ok_or_else(|| RowError::ColumnType { name, found: values.data_type().to_string() })
}
