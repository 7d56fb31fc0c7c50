//! 4-bit models as bitsandbytes and transformers lay them out: quantising a model while it is
//! loaded, and reading and writing checkpoints that are quantised already.
//!
//! Only the linear maps of the layers are quantised; embeddings, norms and the head stay as they
//! are. A quantised weight `W` (out, in) is stored as
//!
//! | tensor | type and shape | holds |
//! |---|---|---|
//! | `W` | U8 (n/2, 1) | two codes a byte |
//! | `W.absmax` | F32 (blocks), or U8 with double quantisation | the scales |
//! | `W.quant_map` | F32 (16) | the value of each code |
//! | `W.nested_absmax`, `W.nested_quant_map` | F32 | of double quantisation |
//! | `W.quant_state.bitsandbytes__nf4` or `__fp4` | U8 | the rest, as JSON text |
//!
//! and `config.json` says so under `quantization_config`.

mod write;

use std::collections::{BTreeMap, BTreeSet};

use hone_kernels::quant::{
    CodeBook, NESTED_BLOCK, NestedScales, QuantError, QuantSpec, Quantized, Scales, ValueType,
};
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use crate::lora::modules;
use crate::safetensors::to_f32;
use crate::tensors::{NamedTensor, TensorSource};
use crate::{ModelConfig, ModelError, SafetensorsRegions, TensorEntry};

pub use write::write_bnb_checkpoint;

/// Name of the file in messages.
const FILE: &str = "config.json";

/// What stands between a weight's name and its code book's in the name of its description.
const STATE: &str = ".quant_state.bitsandbytes__";

/// Longest description read: one is about 200 bytes.
const STATE_BYTES_MAX: usize = 1 << 12;

/// Keys of `quantization_config` that do not change what the weights are.
const HARMLESS: &[&str] = &[
    "_load_in_4bit",
    "_load_in_8bit",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight",
    "llm_int8_skip_modules",
    "llm_int8_threshold",
    "load_in_4bit",
];

/// How a model is quantised: `quantization_config` of its `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct BnbConfig {
    /// Code book, block size, double quantisation, and the type of dequantised values.
    pub spec: QuantSpec,
    /// Modules that stay as they are, beside the head: their names, or the ends or beginnings of
    /// them at a dot.
    pub skip_modules: Vec<String>,
}

impl BnbConfig {
    /// NF4 with double quantisation, everywhere: what QLoRA trains on. `values` is the type that
    /// the weights have in their files.
    pub fn qlora(values: ValueType) -> Self {
        BnbConfig { spec: QuantSpec::qlora(values), skip_modules: Vec::new() }
    }

    /// Reads the text of a `config.json` and, where it has one, its `quantization_config`. Errors
    /// name the key; another method than bitsandbytes in 4 bits is refused.
    pub fn read_model_config(text: &str) -> Result<(ModelConfig, Option<Self>), ModelError> {
        let bad = |reason: String| ModelError::Config { file: FILE, reason };
        let value: Value =
            serde_json::from_str(text).map_err(|error| bad(format!("not JSON: {error}")))?;
        let Value::Object(mut map) = value else {
            return Err(bad("not a JSON object".to_owned()));
        };
        let quant = match map.remove("quantization_config") {
            None | Some(Value::Null) => None,
            Some(Value::Object(quant)) => {
                let dtype = map.get("dtype").or_else(|| map.get("torch_dtype"));
                let values = dtype.and_then(Value::as_str).and_then(value_type);
                Some(Self::from_map(&quant, values.unwrap_or(ValueType::F32))?)
            }
            Some(other) => {
                return Err(unsupported("quantization_config", &other, "give an object"));
            }
        };
        Ok((ModelConfig::from_json(&Value::Object(map).to_string())?, quant))
    }

    fn from_map(map: &Map<String, Value>, values: ValueType) -> Result<Self, ModelError> {
        let unsupported =
            |key: &str, value, why| unsupported(&format!("quantization_config.{key}"), value, why);
        if map.get("quant_method").and_then(Value::as_str) != Some("bitsandbytes") {
            let found = map.get("quant_method").unwrap_or(&Value::Null);
            return Err(unsupported("quant_method", found, "only \"bitsandbytes\" is"));
        }
        if map.get("load_in_4bit") != Some(&Value::Bool(true)) {
            let found = map.get("load_in_4bit").unwrap_or(&Value::Null);
            return Err(unsupported("load_in_4bit", found, "only weights of 4 bits are"));
        }
        for (key, value) in map {
            let is_off = matches!(value, Value::Null | Value::Bool(false));
            let is_usual = match key.as_str() {
                "quant_method" => true,
                "bnb_4bit_quant_storage" => value == "uint8",
                other => HARMLESS.contains(&other),
            };
            if !is_off && !is_usual {
                return Err(unsupported(key, value, "it is not known what it changes"));
            }
        }
        let book = match map.get("bnb_4bit_quant_type").and_then(Value::as_str) {
            Some("nf4") => CodeBook::Nf4,
            Some("fp4") | None => CodeBook::Fp4,
            Some(other) => {
                let value = Value::from(other);
                return Err(unsupported("bnb_4bit_quant_type", &value, "give \"nf4\" or \"fp4\""));
            }
        };
        let nested = map.get("bnb_4bit_use_double_quant").and_then(Value::as_bool);
        let skip = map.get("llm_int8_skip_modules").and_then(Value::as_array);
        let skip = skip.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned);
        let spec = QuantSpec { book, block: 64, nested: nested.unwrap_or(false), values };
        Ok(BnbConfig { spec, skip_modules: skip.collect() })
    }

    /// The text of a `config.json` with this as its `quantization_config`.
    pub fn into_model_config(&self, config_json: &str) -> Result<String, ModelError> {
        let bad = |error| ModelError::Config { file: FILE, reason: format!("not JSON: {error}") };
        let mut map: Map<String, Value> = serde_json::from_str(config_json).map_err(bad)?;
        let skip = match self.skip_modules.as_slice() {
            [] => Value::Null,
            names => json!(names),
        };
        let quant = json!({
            "_load_in_4bit": true,
            "_load_in_8bit": false,
            "bnb_4bit_compute_dtype": self.spec.values.name(),
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": self.spec.book.name(),
            "bnb_4bit_use_double_quant": self.spec.nested,
            "llm_int8_enable_fp32_cpu_offload": false,
            "llm_int8_has_fp16_weight": false,
            "llm_int8_skip_modules": skip,
            "llm_int8_threshold": 6.0,
            "load_in_4bit": true,
            "load_in_8bit": false,
            "quant_method": "bitsandbytes",
        });
        map.insert("quantization_config".to_owned(), quant);
        let text = serde_json::to_string_pretty(&Value::Object(map));
        Ok(text.expect("a value of plain JSON can be written") + "\n")
    }

    /// Names of the weights of `model` that are quantised.
    fn weights(&self, model: &ModelConfig) -> BTreeSet<String> {
        let skips = |module: &str| {
            self.skip_modules.iter().any(|skip| {
                let ends = module.strip_suffix(skip.as_str());
                let begins = module.strip_prefix(skip.as_str());
                ends.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
                    || begins.is_some_and(|rest| rest.starts_with('.'))
            })
        };
        let kept = modules(model).filter(|(module, _)| !skips(module));
        kept.map(|(module, _)| format!("{module}.weight")).collect()
    }
}

/// A model that is quantised while it is read, one weight at a time. It is a [`TensorSource`]: a
/// decoder loaded from it holds 4-bit weights, and [`TensorSource::tensor`] gives the dequantised
/// values.
pub struct QuantizeOnLoad<'a> {
    source: &'a dyn TensorSource,
    spec: QuantSpec,
    weights: BTreeSet<String>,
}

impl<'a> QuantizeOnLoad<'a> {
    /// `source`, with the linear maps of `model` quantised as `quant` says.
    pub fn new(model: &ModelConfig, source: &'a dyn TensorSource, quant: &BnbConfig) -> Self {
        QuantizeOnLoad { source, spec: quant.spec, weights: quant.weights(model) }
    }
}

impl TensorSource for QuantizeOnLoad<'_> {
    fn entries(&self) -> Vec<TensorEntry> {
        self.source.entries()
    }

    fn tensor(&self, name: &str) -> Result<NamedTensor, ModelError> {
        let mut tensor = self.source.tensor(name)?;
        if let Some(quantized) = self.quantized(name)? {
            tensor.data = quantized.dequantize();
        }
        Ok(tensor)
    }

    fn has(&self, name: &str) -> bool {
        self.source.has(name)
    }

    fn is_bf16(&self, name: &str) -> bool {
        !self.weights.contains(name) && self.source.is_bf16(name)
    }

    fn original(&self, name: &str) -> Result<Option<NamedTensor>, ModelError> {
        match self.source.quantized(name)? {
            Some(_) => self.source.original(name),
            None => self.source.tensor(name).map(Some),
        }
    }

    fn quantized(&self, name: &str) -> Result<Option<Quantized>, ModelError> {
        if !self.weights.contains(name) {
            return Ok(None);
        }
        if let Some(stored) = self.source.quantized(name)? {
            return Ok(Some(stored));
        }
        let tensor = self.source.tensor(name)?;
        let quantized = Quantized::quantize(&tensor.data, self.spec);
        quantized.map(Some).map_err(|error| refused(name, error))
    }
}

/// What the description of a stored weight says.
struct Stored {
    spec: QuantSpec,
    shape: Vec<usize>,
    /// Mean of the scales, with double quantisation.
    offset: Option<f32>,
}

/// The tensors of a checkpoint whose linear maps are stored in 4 bits. [`TensorSource::tensor`]
/// gives dequantised values under the names and shapes of the model.
pub struct BnbRegions<'a> {
    files: SafetensorsRegions<'a>,
    stored: BTreeMap<String, Stored>,
    entries: Vec<TensorEntry>,
}

impl<'a> BnbRegions<'a> {
    /// Reads the headers and the descriptions of one or more safetensors files. Errors: malformed
    /// files, a description that is not understood, parts that are missing or of the wrong type.
    /// A checkpoint without quantised weights is read too.
    pub fn new(regions: &[&'a [u8]]) -> Result<Self, ModelError> {
        let types = [Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::U8];
        let files = SafetensorsRegions::with_types(regions, &types)?;
        let mut stored = BTreeMap::new();
        let mut parts = BTreeSet::new();
        for entry in files.entries() {
            let Some((weight, book)) = entry.name.split_once(STATE) else { continue };
            let (_, bytes) = files.raw(&entry.name).expect("the entries are the file's own");
            let found = description(weight, book, bytes)?;
            for suffix in ["absmax", "quant_map", "nested_absmax", "nested_quant_map"] {
                parts.insert(format!("{weight}.{suffix}"));
            }
            parts.insert(entry.name.clone());
            stored.insert(weight.to_owned(), found);
        }
        let mut entries = Vec::new();
        for entry in files.entries().into_iter().filter(|entry| !parts.contains(&entry.name)) {
            let (dtype, _) = files.raw(&entry.name).expect("the entries are the file's own");
            match stored.get(&entry.name) {
                Some(weight) => {
                    entries.push(TensorEntry { shape: weight.shape.clone(), ..entry });
                }
                None if dtype == Dtype::U8 => {
                    let what = "is stored as U8 and has no `quant_state.bitsandbytes__` beside it";
                    return Err(ModelError::Format(format!("tensor `{}` {what}", entry.name)));
                }
                None => entries.push(entry),
            }
        }
        Ok(BnbRegions { files, stored, entries })
    }

    /// Whether every tensor is stored as bfloat16, or in 4 bits that stand for bfloat16.
    pub fn is_all_bf16(&self) -> bool {
        self.entries.iter().all(|TensorEntry { name, .. }| match self.stored.get(name) {
            Some(weight) => weight.spec.values == ValueType::Bf16,
            None => self.files.raw(name).is_some_and(|(dtype, _)| dtype == Dtype::BF16),
        })
    }

    /// The bytes of a part, which must be stored as `dtype`.
    fn part(&self, name: &str, dtype: Dtype) -> Result<&[u8], ModelError> {
        match self.files.raw(name) {
            Some((found, bytes)) if found == dtype => Ok(bytes),
            Some((found, _)) => {
                let what = format!("tensor `{name}` is stored as {found:?}, not as {dtype:?}");
                Err(ModelError::Format(what))
            }
            None => Err(ModelError::NoTensor(name.to_owned())),
        }
    }

    fn floats(&self, name: &str) -> Result<Vec<f32>, ModelError> {
        Ok(to_f32(Dtype::F32, self.part(name, Dtype::F32)?))
    }
}

impl TensorSource for BnbRegions<'_> {
    fn entries(&self) -> Vec<TensorEntry> {
        self.entries.clone()
    }

    fn tensor(&self, name: &str) -> Result<NamedTensor, ModelError> {
        match self.quantized(name)? {
            None => self.files.tensor(name),
            Some(weight) => {
                let shape = self.stored[name].shape.clone();
                Ok(NamedTensor::new(name, shape, weight.dequantize()))
            }
        }
    }

    fn is_bf16(&self, name: &str) -> bool {
        !self.stored.contains_key(name) && self.files.is_bf16(name)
    }

    fn quantized(&self, name: &str) -> Result<Option<Quantized>, ModelError> {
        let Some(stored) = self.stored.get(name) else { return Ok(None) };
        let map = self.floats(&format!("{name}.quant_map"))?;
        if map != stored.spec.book.values() {
            let what = format!("`{name}.quant_map` is not {}", stored.spec.book.name());
            return Err(ModelError::Format(what));
        }
        let absmax = format!("{name}.absmax");
        let scales = match stored.offset {
            None => Scales::Plain(self.floats(&absmax)?),
            Some(offset) => Scales::Nested(NestedScales {
                codes: self.part(&absmax, Dtype::U8)?.to_vec(),
                absmax: self.floats(&format!("{name}.nested_absmax"))?,
                map: self.floats(&format!("{name}.nested_quant_map"))?,
                offset,
            }),
        };
        let codes = self.part(name, Dtype::U8)?.to_vec();
        let n = stored.shape.iter().product();
        let weight = Quantized::from_parts(stored.spec, n, codes, scales);
        weight.map(Some).map_err(|error| refused(name, error))
    }
}

fn refused(name: &str, error: QuantError) -> ModelError {
    match error {
        QuantError::NotFinite { index } => ModelError::NotFinite { name: name.to_owned(), index },
        other => ModelError::Format(format!("4-bit tensor `{name}`: {other}")),
    }
}

fn unsupported(key: &str, value: &Value, reason: &str) -> ModelError {
    let (key, reason) = (key.to_owned(), reason.to_owned());
    ModelError::Unsupported { file: FILE, key, value: value.to_string(), reason }
}

fn value_type(name: &str) -> Option<ValueType> {
    let types = [ValueType::F32, ValueType::Bf16, ValueType::F16];
    types.into_iter().find(|value_type| value_type.name() == name)
}

/// Reads the JSON beside a weight.
fn description(weight: &str, book: &str, bytes: &[u8]) -> Result<Stored, ModelError> {
    let bad =
        |what: &str| ModelError::Format(format!("the quantisation state of `{weight}` {what}"));
    if bytes.len() > STATE_BYTES_MAX {
        return Err(bad("is longer than 4 KiB"));
    }
    let value: Value = serde_json::from_slice(bytes).map_err(|_| bad("is not JSON"))?;
    let number = |key: &str| value.get(key).and_then(Value::as_u64).and_then(|n| n.try_into().ok());
    let text = |key: &str| value.get(key).and_then(Value::as_str);
    let book = match (book, text("quant_type")) {
        ("nf4", Some("nf4")) => CodeBook::Nf4,
        ("fp4", Some("fp4")) => CodeBook::Fp4,
        _ => return Err(bad("names no `quant_type` of nf4 or fp4, or another than its tensor")),
    };
    let values = text("dtype").and_then(value_type);
    let values = values.ok_or_else(|| bad("has no `dtype` of float32, bfloat16 or float16"))?;
    let block: usize = number("blocksize").ok_or_else(|| bad("has no `blocksize`"))?;
    let shape = value.get("shape").and_then(Value::as_array);
    let shape: Option<Vec<usize>> = shape.and_then(|sizes| {
        sizes.iter().map(|n| n.as_u64().and_then(|n| n.try_into().ok())).collect()
    });
    let shape = shape.ok_or_else(|| bad("has no `shape`"))?;
    let n = shape.iter().try_fold(1_usize, |n, &size| n.checked_mul(size));
    n.ok_or_else(|| bad("has a `shape` of too many values"))?;
    let offset = value.get("nested_offset").and_then(Value::as_f64).map(|offset| offset as f32);
    if offset.is_some() {
        if number("nested_blocksize") != Some(NESTED_BLOCK) {
            return Err(bad("has a `nested_blocksize` that is not 256"));
        }
        if text("nested_dtype") != Some("float32") {
            return Err(bad("has a `nested_dtype` that is not float32"));
        }
    }
    let spec = QuantSpec { book, block, nested: offset.is_some(), values };
    Ok(Stored { spec, shape, offset })
}
