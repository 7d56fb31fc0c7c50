//! What the two candle peers share: reading a model's directory.

use std::collections::HashMap;
use std::error::Error;
use std::fs;

use candle_core::{Device, Tensor};
use serde_json::Value;

/// What goes wrong here ends the program with its message.
pub type Failure = Box<dyn Error + Send + Sync>;

/// A JSON file.
///
/// # Errors
/// It cannot be read or is no JSON.
pub fn json(path: &str) -> Result<Value, Failure> {
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

/// The number of that name in an object.
///
/// # Errors
/// There is none.
pub fn number(object: &Value, key: &str) -> Result<f64, Failure> {
    object[key].as_f64().ok_or_else(|| format!("`{key}` is no number").into())
}

/// A list of token ids.
///
/// # Errors
/// The value is no list of such numbers.
pub fn ids(value: &Value) -> Result<Vec<u32>, Failure> {
    let list = value.as_array().ok_or("not a list of ids")?;
    let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    list.iter().map(id).collect::<Option<_>>().ok_or_else(|| "not a list of ids".into())
}

/// All tensors of a safetensors file, as they are stored.
///
/// # Errors
/// The file cannot be read.
pub fn tensors(path: &str) -> Result<HashMap<String, Tensor>, Failure> {
    Ok(candle_core::safetensors::load(path, &Device::Cpu)?)
}
