//! The keys of a `config.json`, read with their types checked, and the refusal of unknown ones.

use serde_json::{Map, Value};

use super::families::Table;
use crate::ModelError;

/// Name of the file in messages.
const FILE: &str = "config.json";

/// Longest context that a configuration may claim: the table of positions is sized by what is used,
/// this only stops nonsense.
const POSITIONS_MAX: usize = 1 << 24;

/// Largest value accepted for a width or a count: products of three of them stay inside usize.
const SIZE_MAX: usize = 1 << 20;

/// Keys that count positions.
const POSITIONS: &[&str] =
    &["max_position_embeddings", "original_max_position_embeddings", "sliding_window"];

/// Keys that change nothing that a decoder computes here.
const HARMLESS: &[&str] = &[
    "architectures",
    "auto_map",
    "bad_words_ids",
    "bos_token_id",
    "cache_implementation",
    "do_sample",
    "dtype",
    "eos_token_id",
    "id2label",
    "is_llama_config",
    "label2id",
    "max_length",
    "max_new_tokens",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    // It splits a product for tensor parallelism; the result is the same.
    "pretraining_tp",
    "problem_type",
    "repetition_penalty",
    "return_dict",
    "task_specific_params",
    "temperature",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unsloth_version",
    "use_cache",
];

/// Keys that every family reads.
const COMMON: &[&str] = &[
    "head_dim",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "partial_rotary_factor",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "vocab_size",
];

/// Why a key with no table entry is refused.
const UNKNOWN: &str = "the decoder does not know this key; if it does not change what the model \
                       computes, remove it from the file";

/// The keys of an object, with what stands before them in messages.
#[derive(Clone, Copy)]
pub(super) struct Keys<'a> {
    map: &'a Map<String, Value>,
    /// `rope_scaling.` inside that object; empty at the top.
    prefix: &'static str,
}

impl<'a> Keys<'a> {
    /// The top of the file.
    pub(super) fn new(map: &'a Map<String, Value>) -> Self {
        Keys { map, prefix: "" }
    }

    /// The object under `key`; `None` where it is absent, null or empty.
    pub(super) fn object(&self, key: &'static str) -> Result<Option<Keys<'a>>, ModelError> {
        match self.present(key) {
            None => Ok(None),
            Some(Value::Object(map)) if map.is_empty() => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Keys { map, prefix: key })),
            Some(other) => Err(self.bad(key, other, "an object")),
        }
    }

    /// Whether both hold the same.
    pub(super) fn same(&self, other: &Keys<'_>) -> bool {
        self.map == other.map
    }

    /// Name of a key in messages.
    pub(super) fn name(&self, key: &str) -> String {
        if self.prefix.is_empty() { key.to_owned() } else { format!("{}.{key}", self.prefix) }
    }

    fn bad(&self, key: &str, value: &Value, wanted: &str) -> ModelError {
        bad(format!("`{}` = {value} is not {wanted}", self.name(key)))
    }

    /// The refusal of what stands under `key`.
    pub(super) fn unsupported(&self, key: &str, reason: &str) -> ModelError {
        let value = self.map.get(key).cloned().unwrap_or_default();
        unsupported(&self.name(key), &value, reason)
    }

    /// Whether the key is there, be it null.
    pub(super) fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// The value of a key that is not null.
    pub(super) fn present(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn size(&self, key: &str) -> Result<usize, ModelError> {
        self.optional_size(key)?.ok_or_else(|| bad(format!("`{}` is missing", self.name(key))))
    }

    pub(super) fn optional_size(&self, key: &str) -> Result<Option<usize>, ModelError> {
        let Some(value) = self.present(key) else {
            return Ok(None);
        };
        let max = if POSITIONS.contains(&key) { POSITIONS_MAX } else { SIZE_MAX };
        match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(n) if (1..=max).contains(&n) => Ok(Some(n)),
            _ => Err(self.bad(key, value, &format!("a whole number from 1 to {max}"))),
        }
    }

    pub(super) fn number(&self, key: &str, default: f64) -> Result<f64, ModelError> {
        Ok(self.optional_number(key)?.unwrap_or(default))
    }

    pub(super) fn optional_number(&self, key: &str) -> Result<Option<f64>, ModelError> {
        let Some(value) = self.present(key) else {
            return Ok(None);
        };
        let number = value.as_f64().filter(|number| number.is_finite());
        number.map(Some).ok_or_else(|| self.bad(key, value, "a number"))
    }

    /// A number above 0.
    pub(super) fn positive(&self, key: &str) -> Result<Option<f64>, ModelError> {
        let number = self.optional_number(key)?;
        match number {
            Some(number) if number <= 0.0 => {
                Err(bad(format!("`{}` = {number} is not above 0", self.name(key))))
            }
            other => Ok(other),
        }
    }

    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool, ModelError> {
        match self.present(key) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.bad(key, value, "true or false")),
        }
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        match self.present(key) {
            None => Ok(None),
            Some(value) => value.as_str().map(Some).ok_or_else(|| self.bad(key, value, "a text")),
        }
    }

    /// A list whose items `read` takes.
    pub(super) fn list<T>(
        &self,
        key: &str,
        what: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>, ModelError> {
        let Some(value) = self.present(key) else {
            return Ok(None);
        };
        let items = value.as_array().and_then(|items| items.iter().map(read).collect());
        items.map(Some).ok_or_else(|| self.bad(key, value, what))
    }

    /// One token id, a list of them, or none.
    pub(super) fn ids(&self, key: &str) -> Result<Vec<u32>, ModelError> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        match self.present(key) {
            None => Ok(Vec::new()),
            // Some files write -1 for "none".
            Some(value) if value.as_i64() == Some(-1) => Ok(Vec::new()),
            Some(Value::Array(_)) => {
                Ok(self.list(key, "a token id or a list of them", id)?.unwrap_or_default())
            }
            Some(one) => id(one).map(|id| vec![id]).ok_or_else(|| self.bad(key, one, "a token id")),
        }
    }

    /// Refuses what the decoder of a family does not compute: a key that none of its tables knows
    /// and that is neither null nor false, and a key that may have one value alone and has another.
    pub(super) fn refuse_unknown(&self, table: &Table) -> Result<(), ModelError> {
        for (key, value) in self.map {
            let name = key.as_str();
            let fixed = table.fixed().find(|(known, _)| *known == name);
            if let (Some((_, allowed)), false) = (fixed, value.is_null()) {
                if !allowed.iter().any(|text| is_same(value, text)) {
                    return Err(unsupported(key, value, &only(allowed)));
                }
                continue;
            }
            let is_known =
                COMMON.contains(&name) || table.reads.contains(&name) || HARMLESS.contains(&name);
            let is_off = matches!(value, Value::Null | Value::Bool(false)) || name.starts_with('_');
            if is_known || is_off {
                continue;
            }
            let reason = match name {
                "quantization_config" => "dequantise the model first, or give the original one",
                _ => UNKNOWN,
            };
            return Err(unsupported(key, value, reason));
        }
        Ok(())
    }

    /// Refuses a key outside `known`, unless it is null or false.
    pub(super) fn refuse_others(&self, known: &[&str]) -> Result<(), ModelError> {
        let is_off = |value: &Value| matches!(value, Value::Null | Value::Bool(false));
        let other =
            self.map.iter().find(|(key, value)| !known.contains(&key.as_str()) && !is_off(value));
        match other {
            None => Ok(()),
            Some((key, value)) => Err(unsupported(&self.name(key), value, UNKNOWN)),
        }
    }
}

/// Whether a value is the one that a table writes as JSON; 0 and 0.0 are one number.
fn is_same(value: &Value, text: &str) -> bool {
    let wanted: Value = serde_json::from_str(text).expect("tables hold JSON");
    match (value.as_f64(), wanted.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => *value == wanted,
    }
}

/// `only "silu" is`, as the reason of a refusal.
fn only(allowed: &[&str]) -> String {
    match allowed {
        [one] => format!("only {one} is"),
        many => format!("only {} are", many.join(" and ")),
    }
}

pub(super) fn bad(reason: String) -> ModelError {
    ModelError::Config { file: FILE, reason }
}

pub(super) fn unsupported(key: &str, value: &Value, reason: &str) -> ModelError {
    let (key, reason) = (key.to_owned(), reason.to_owned());
    ModelError::Unsupported { file: FILE, key, value: value.to_string(), reason }
}
