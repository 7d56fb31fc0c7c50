//! Rows of a golden as batches.

use hone_model::Batch;
use serde_json::Value;

/// A list of whole numbers.
pub(crate) fn integers(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

/// A list of numbers.
pub(crate) fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

/// A batch of some of the rows.
pub(crate) fn batch(rows: &Value, chosen: &[usize]) -> Batch {
    let mut batch = Batch::new();
    for &row in chosen {
        batch.push(&integers(&rows[row]["input_ids"]), &floats(&rows[row]["weights"])).unwrap();
    }
    batch
}

/// The numbers of all rows.
pub(crate) fn all(rows: &Value) -> Vec<usize> {
    (0..rows.as_array().unwrap().len()).collect()
}
