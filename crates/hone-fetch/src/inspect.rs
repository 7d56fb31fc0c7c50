//! What a GGUF file says of itself: its metadata, and its table of tensors.

use std::path::Path;

use hone_cli::{Common, Context, Exit, Failure};
use hone_store::input;
use serde_json::{Map, Value as Json, json};

use crate::gguf::{Gguf, Value};
use crate::run::gguf_failure;

/// Prints a file's header, as lines or as one JSON object.
pub(crate) fn inspect(ctx: &Context, common: &Common, path: &Path) -> Result<Exit, Failure> {
    let file = input::open(path)?;
    let gguf = Gguf::read(file).map_err(|error| gguf_failure(path, error.into()))?;
    ctx.print(if common.json { as_json(&gguf).to_string() } else { as_lines(&gguf) });
    Ok(Exit::Done)
}

fn as_lines(gguf: &Gguf) -> String {
    let mut lines = vec![format!("GGUF version {}", gguf.version), String::new()];
    lines.extend(gguf.metadata.iter().map(|(key, value)| format!("{key} = {value}")));
    lines.push(String::new());
    let width = gguf.tensors.iter().map(|tensor| tensor.name.len()).max().unwrap_or(0);
    for tensor in &gguf.tensors {
        let dtype = format!("{:?}", tensor.dtype);
        let (name, shape, n_bytes) = (&tensor.name, &tensor.shape, tensor.n_bytes);
        lines.push(format!("{name:width$}  {dtype:5}  {n_bytes:>12} bytes  {shape:?}"));
    }
    let n_values: usize = gguf.tensors.iter().map(|tensor| tensor.n_values()).sum();
    let n_bytes: u64 = gguf.tensors.iter().map(|tensor| tensor.n_bytes).sum();
    let n_tensors = gguf.tensors.len();
    lines.push(format!("{n_tensors} tensors, {n_values} values, {n_bytes} bytes"));
    lines.join("\n")
}

fn as_json(gguf: &Gguf) -> Json {
    let metadata: Map<String, Json> =
        gguf.metadata.iter().map(|(key, value)| (key.to_owned(), value_json(value))).collect();
    let tensors: Vec<Json> = gguf
        .tensors
        .iter()
        .map(|tensor| {
            json!({
                "name": tensor.name, "type": format!("{:?}", tensor.dtype), "shape": tensor.shape,
                "start": tensor.start, "n_bytes": tensor.n_bytes
            })
        })
        .collect();
    json!({"version": gguf.version, "metadata": metadata, "tensors": tensors})
}

/// Floats that are not finite become null: JSON has no word for them.
fn value_json(value: &Value) -> Json {
    match value {
        Value::Unsigned(value) => json!(value),
        Value::Signed(value) => json!(value),
        Value::F32(value) => json!(value),
        Value::F64(value) => json!(value),
        Value::Bool(value) => json!(value),
        Value::String(text) => json!(text),
        Value::Array(values) => values.iter().map(value_json).collect(),
    }
}
