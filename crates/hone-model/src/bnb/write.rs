//! Writing bitsandbytes' checkpoints.

use std::io::Write;

use hone_kernels::quant::{NESTED_BLOCK, QuantSpec, Quantized, Scales};
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::{BnbConfig, QuantizeOnLoad, STATE};
use crate::safetensors::encode;
use crate::tensors::TensorSource;
use crate::{ModelConfig, ModelError, StoredType, TensorEntry};

/// The description of a weight, byte for byte as Python writes it.
fn describe(weight: &Quantized, shape: &[usize]) -> String {
    let QuantSpec { book, block, values, .. } = weight.spec();
    let sizes: Vec<String> = shape.iter().map(usize::to_string).collect();
    let mut text = format!(
        "{{\"quant_type\": \"{}\", \"blocksize\": {block}, \"dtype\": \"{}\", \"shape\": [{}]",
        book.name(),
        values.name(),
        sizes.join(", ")
    );
    if let Scales::Nested(nested) = weight.scales() {
        text += &format!(
            ", \"nested_blocksize\": {NESTED_BLOCK}, \"nested_dtype\": \"float32\", \
             \"nested_offset\": {}",
            python_float(f64::from(nested.offset))
        );
    }
    text + "}"
}

/// A float as Python prints it: the shortest digits that mean it, an exponent of two digits below
/// 1e-4 and from 1e16 on.
fn python_float(x: f64) -> String {
    if x == 0.0 || (1e-4..1e16).contains(&x.abs()) {
        return format!("{x:?}");
    }
    let text = format!("{x:e}");
    let (digits, exponent) = text.split_once('e').expect("`{:e}` writes an exponent");
    let (sign, exponent) = match exponent.strip_prefix('-') {
        Some(exponent) => ('-', exponent),
        None => ('+', exponent),
    };
    format!("{digits}e{sign}{exponent:0>2}")
}

/// A tensor to be written: its type and shape, and its bytes or, where they are made only when
/// they are due, nothing.
struct Part {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Option<Vec<u8>>,
}

impl Part {
    fn n_bytes(&self) -> usize {
        let bytes = match self.dtype {
            Dtype::U8 => 1,
            Dtype::BF16 => 2,
            _ => 4,
        };
        self.shape.iter().product::<usize>() * bytes
    }

    fn tag(&self) -> &'static str {
        match self.dtype {
            Dtype::U8 => "U8",
            Dtype::BF16 => "BF16",
            _ => "F32",
        }
    }
}

/// Writes `source` as a checkpoint whose linear maps are in 4 bits, which transformers loads with
/// bitsandbytes; what is not quantised is stored as `stored`. The bytes are those that they would
/// write. Needs the memory of the quantised weights.
pub fn write_bnb_checkpoint(
    mut out: impl Write,
    model: &ModelConfig,
    source: &dyn TensorSource,
    quant: &BnbConfig,
    stored: StoredType,
) -> Result<(), ModelError> {
    let weights = QuantizeOnLoad::new(model, source, quant);
    let mut parts = Vec::new();
    for TensorEntry { name, shape } in source.entries() {
        match weights.quantized(&name)? {
            Some(weight) => parts.extend(weight_parts(&name, &shape, &weight)),
            None => {
                let dtype = match stored {
                    StoredType::F32 => Dtype::F32,
                    StoredType::Bf16 => Dtype::BF16,
                };
                parts.push(Part { name, dtype, shape, bytes: None });
            }
        }
    }
    // The order of the safetensors library: wide types first, then by name.
    parts.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut offset = 0;
    for part in &parts {
        let end = offset + part.n_bytes();
        let entry = json!({
            "dtype": part.tag(), "shape": part.shape, "data_offsets": [offset, end]
        });
        header.insert(part.name.clone(), entry);
        offset = end;
    }
    let mut text = Value::Object(header).to_string();
    text.extend(std::iter::repeat_n(' ', text.len().next_multiple_of(8) - text.len()));
    out.write_all(&(text.len() as u64).to_le_bytes())?;
    out.write_all(text.as_bytes())?;
    for part in parts {
        match part.bytes {
            Some(bytes) => out.write_all(&bytes)?,
            None => encode(&source.tensor(&part.name)?.data, stored, &mut out)?,
        }
    }
    Ok(out.flush()?)
}

/// The tensors that a quantised weight is stored as.
fn weight_parts(name: &str, shape: &[usize], weight: &Quantized) -> Vec<Part> {
    let floats = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let part = |suffix: &str, dtype, shape, bytes| Part {
        name: format!("{name}{suffix}"),
        dtype,
        shape,
        bytes: Some(bytes),
    };
    let bytes = |suffix: &str, bytes: Vec<u8>| part(suffix, Dtype::U8, vec![bytes.len()], bytes);
    let f32s =
        |suffix: &str, values: &[f32]| part(suffix, Dtype::F32, vec![values.len()], floats(values));
    let codes = weight.codes().to_vec();
    let book = weight.spec().book;
    let mut parts = vec![
        part("", Dtype::U8, vec![codes.len(), 1], codes),
        f32s(".quant_map", book.values()),
        bytes(&format!("{STATE}{}", book.name()), describe(weight, shape).into_bytes()),
    ];
    match weight.scales() {
        Scales::Plain(absmax) => parts.push(f32s(".absmax", absmax)),
        Scales::Nested(nested) => parts.extend([
            bytes(".absmax", nested.codes.clone()),
            f32s(".nested_absmax", &nested.absmax),
            f32s(".nested_quant_map", &nested.map),
        ]),
    }
    parts
}
