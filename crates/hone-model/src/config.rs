//! What a model is: the knobs of `config.json`, and which of its keys are refused.
//!
//! Keys fall into four tables: those read into [`ModelConfig`], those that must have one value
//! because the decoder computes nothing else, those that do not change what a decoder computes, and
//! the rest. The rest are refused by name unless they are null or false: a knob that is silently
//! ignored is a model that is silently wrong.

use serde_json::{Map, Value, json};

use crate::tensors::TensorSource;
use crate::{ModelError, TensorEntry};

/// Name of the file in messages.
const FILE: &str = "config.json";

/// Longest context that a configuration may claim: the table of positions is sized by what is used,
/// this only stops nonsense.
const POSITIONS_MAX: usize = 1 << 24;

/// Largest value accepted for a width or a count: products of three of them stay inside usize.
const SIZE_MAX: usize = 1 << 20;

/// Keys that change nothing that a decoder computes here.
const HARMLESS: &[&str] = &[
    "architectures",
    "auto_map",
    "bad_words_ids",
    "bos_token_id",
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

/// Keys that [`ModelConfig::from_json`] reads.
const READ: &[&str] = &[
    "attention_bias",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "vocab_size",
];

/// A family of decoders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Llama 2 and 3, SmolLM2 and others with `model_type` llama.
    Llama,
}

impl Family {
    /// The value of `model_type`.
    pub fn model_type(self) -> &'static str {
        match self {
            Family::Llama => "llama",
        }
    }
}

/// The shape of a decoder, as `config.json` gives it.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Family.
    pub family: Family,
    /// V, rows of the embedding and of the head.
    pub vocab_size: usize,
    /// D, width of the residual stream.
    pub hidden_size: usize,
    /// I, width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// H, query heads.
    pub num_attention_heads: usize,
    /// G, key/value heads; divides H.
    pub num_key_value_heads: usize,
    /// K, width of a head; even.
    pub head_dim: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Longest document that the model is made for, in tokens.
    pub max_position_embeddings: usize,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether q, k, v and o have biases.
    pub attention_bias: bool,
    /// Whether gate, up and down have biases.
    pub mlp_bias: bool,
    /// Standard deviation of freshly drawn matrices.
    pub initializer_range: f64,
    /// Id of the token that begins a text, if any.
    pub bos_token_id: Option<u32>,
    /// Ids of the tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// Id of the padding token, if any.
    pub pad_token_id: Option<u32>,
}

impl ModelConfig {
    /// Reads the text of a `config.json`. Errors name the key.
    pub fn from_json(text: &str) -> Result<Self, ModelError> {
        let value: Value =
            serde_json::from_str(text).map_err(|error| bad(format!("not JSON: {error}")))?;
        let Value::Object(map) = value else {
            return Err(bad("not a JSON object".to_owned()));
        };
        let keys = Keys(&map);
        refuse_unknown(&keys)?;
        let hidden_size = keys.size("hidden_size")?;
        let num_attention_heads = keys.size("num_attention_heads")?;
        let head_dim = match keys.optional_size("head_dim")? {
            Some(head_dim) => head_dim,
            None => hidden_size / num_attention_heads,
        };
        let config = ModelConfig {
            family: Family::Llama,
            vocab_size: keys.size("vocab_size")?,
            hidden_size,
            intermediate_size: keys.size("intermediate_size")?,
            num_hidden_layers: keys.size("num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads: keys
                .optional_size("num_key_value_heads")?
                .unwrap_or(num_attention_heads),
            head_dim,
            rms_norm_eps: keys.number("rms_norm_eps", 1e-6)?,
            rope_theta: rope_theta(&keys)?,
            max_position_embeddings: keys.optional_size("max_position_embeddings")?.unwrap_or(2048),
            tie_word_embeddings: keys.flag("tie_word_embeddings", false)?,
            attention_bias: keys.flag("attention_bias", false)?,
            mlp_bias: keys.flag("mlp_bias", false)?,
            initializer_range: keys.number("initializer_range", 0.02)?,
            bos_token_id: keys.ids("bos_token_id")?.first().copied(),
            eos_token_ids: keys.ids("eos_token_id")?,
            pad_token_id: keys.ids("pad_token_id")?.first().copied(),
        };
        config.check()?;
        Ok(config)
    }

    /// The text of a `config.json` that [`ModelConfig::from_json`] and transformers read back,
    /// indented.
    pub fn to_json(&self) -> String {
        let eos = match self.eos_token_ids.as_slice() {
            [] => Value::Null,
            [one] => json!(one),
            many => json!(many),
        };
        let value = json!({
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": self.attention_bias,
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": self.initializer_range,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "mlp_bias": self.mlp_bias,
            "model_type": self.family.model_type(),
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "pad_token_id": self.pad_token_id,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": Value::Null,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": "bfloat16",
            "use_cache": true,
            "vocab_size": self.vocab_size,
        });
        serde_json::to_string_pretty(&value).expect("a value of plain JSON can be written") + "\n"
    }

    /// Names and shapes of all tensors of such a model, sorted by name.
    pub fn tensors(&self) -> Vec<TensorEntry> {
        let mut entries = vec![
            entry("model.embed_tokens.weight", &[self.vocab_size, self.hidden_size]),
            entry("model.norm.weight", &[self.hidden_size]),
        ];
        if !self.tie_word_embeddings {
            entries.push(entry("lm_head.weight", &[self.vocab_size, self.hidden_size]));
        }
        for layer in 0..self.num_hidden_layers {
            let prefix = layer_prefix(layer);
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                entries.push(entry(&format!("{prefix}.{norm}.weight"), &[self.hidden_size]));
            }
            for linear in self.linears() {
                let name = format!("{prefix}.{}", linear.name);
                entries.push(entry(&format!("{name}.weight"), &[linear.out, linear.inp]));
                if linear.has_bias {
                    entries.push(entry(&format!("{name}.bias"), &[linear.out]));
                }
            }
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        entries
    }

    /// The linear maps of one layer, in the order in which they are used.
    pub(crate) fn linears(&self) -> [LinearShape; 7] {
        let d = self.hidden_size;
        let i = self.intermediate_size;
        let q = self.num_attention_heads * self.head_dim;
        let kv = self.num_key_value_heads * self.head_dim;
        let shape = |name, out, inp, has_bias| LinearShape { name, out, inp, has_bias };
        [
            shape("self_attn.q_proj", q, d, self.attention_bias),
            shape("self_attn.k_proj", kv, d, self.attention_bias),
            shape("self_attn.v_proj", kv, d, self.attention_bias),
            shape("self_attn.o_proj", d, q, self.attention_bias),
            shape("mlp.gate_proj", i, d, self.mlp_bias),
            shape("mlp.up_proj", i, d, self.mlp_bias),
            shape("mlp.down_proj", d, i, self.mlp_bias),
        ]
    }

    /// Number of weights.
    pub fn n_params(&self) -> usize {
        self.tensors().iter().map(|entry| entry.shape.iter().product::<usize>()).sum()
    }

    /// Checks a source's names and shapes against this configuration, before any tensor is read. A
    /// head beside a tied embedding and precomputed rotary frequencies are allowed: older files
    /// carry them.
    pub fn check_source(&self, source: &dyn TensorSource) -> Result<(), ModelError> {
        let found = source.entries();
        let expected = self.tensors();
        let missing =
            |entry: &&TensorEntry| found.binary_search_by(|f| f.name.cmp(&entry.name)).is_err();
        let unexpected = |entry: &&TensorEntry| {
            let allowed = entry.name.ends_with("rotary_emb.inv_freq")
                || (self.tie_word_embeddings && entry.name == "lm_head.weight");
            !allowed && expected.binary_search_by(|e| e.name.cmp(&entry.name)).is_err()
        };
        let missing: Vec<_> = expected.iter().filter(missing).map(|e| e.name.clone()).collect();
        let unexpected: Vec<_> = found.iter().filter(unexpected).map(|e| e.name.clone()).collect();
        if !missing.is_empty() || !unexpected.is_empty() {
            return Err(ModelError::Names { missing, unexpected });
        }
        for entry in found {
            let Ok(idx) = expected.binary_search_by(|e| e.name.cmp(&entry.name)) else {
                continue;
            };
            if expected[idx].shape != entry.shape {
                let expected = expected[idx].shape.clone();
                return Err(ModelError::Shape { name: entry.name, found: entry.shape, expected });
            }
        }
        Ok(())
    }

    /// Relations between knobs.
    fn check(&self) -> Result<(), ModelError> {
        let (h, g) = (self.num_attention_heads, self.num_key_value_heads);
        if !h.is_multiple_of(g) {
            let what = format!("`num_attention_heads` = {h} is no multiple of");
            return Err(bad(format!("{what} `num_key_value_heads` = {g}")));
        }
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(2) {
            return Err(bad(format!("`head_dim` = {} is not even and above 0", self.head_dim)));
        }
        for (key, value) in [
            ("rms_norm_eps", self.rms_norm_eps),
            ("rope_theta", self.rope_theta),
            ("initializer_range", self.initializer_range),
        ] {
            if !(value > 0.0 && value.is_finite()) {
                return Err(bad(format!("`{key}` = {value} is not above 0")));
            }
        }
        Ok(())
    }
}

/// Shape of one linear map of a layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LinearShape {
    /// Name inside the layer.
    pub(crate) name: &'static str,
    pub(crate) out: usize,
    pub(crate) inp: usize,
    pub(crate) has_bias: bool,
}

/// Name of a layer's tensors up to the module.
pub(crate) fn layer_prefix(layer: usize) -> String {
    format!("model.layers.{layer}")
}

fn entry(name: &str, shape: &[usize]) -> TensorEntry {
    TensorEntry { name: name.to_owned(), shape: shape.to_vec() }
}

fn bad(reason: String) -> ModelError {
    ModelError::Config { file: FILE, reason }
}

fn unsupported(key: &str, value: &Value, reason: &str) -> ModelError {
    let (key, reason) = (key.to_owned(), reason.to_owned());
    ModelError::Unsupported { file: FILE, key, value: value.to_string(), reason }
}

/// Refuses what the decoder does not compute.
fn refuse_unknown(keys: &Keys<'_>) -> Result<(), ModelError> {
    match keys.0.get("model_type") {
        Some(Value::String(name)) if name == Family::Llama.model_type() => {}
        Some(other) => {
            return Err(unsupported("model_type", other, "this version knows only \"llama\""));
        }
        None => return Err(bad("`model_type` is missing".to_owned())),
    }
    for (key, value) in keys.0 {
        let is_known = READ.contains(&key.as_str()) || HARMLESS.contains(&key.as_str());
        let is_off = matches!(value, Value::Null | Value::Bool(false)) || key.starts_with('_');
        if is_known || is_off {
            continue;
        }
        match key.as_str() {
            // It splits a product for tensor parallelism; the result is the same.
            "pretraining_tp" => {}
            "attention_dropout" if value.as_f64() == Some(0.0) => {}
            "quantization_config" => {
                let reason = "dequantise the model first, or give the original one";
                return Err(unsupported(key, value, reason));
            }
            _ => {
                let reason = "the decoder does not know this key; if it does not change what the \
                              model computes, remove it from the file";
                return Err(unsupported(key, value, reason));
            }
        }
    }
    match keys.0.get("hidden_act") {
        None => Ok(()),
        Some(Value::String(name)) if name == "silu" => Ok(()),
        Some(other) => Err(unsupported("hidden_act", other, "only \"silu\" is")),
    }
}

/// The base of the rotary frequencies, from `rope_theta` or from the newer `rope_parameters`;
/// refuses scalings.
fn rope_theta(keys: &Keys<'_>) -> Result<f64, ModelError> {
    for key in ["rope_scaling", "rope_parameters"] {
        let Some(value) = keys.present(key) else {
            continue;
        };
        let kind = value.get("rope_type").or_else(|| value.get("type"));
        if !value.is_object() || kind.is_some_and(|kind| kind.as_str() != Some("default")) {
            return Err(unsupported(key, value, "only unscaled rotary positions are"));
        }
    }
    let nested = keys.present("rope_parameters").and_then(|value| value.get("rope_theta"));
    match nested {
        Some(theta) => {
            theta.as_f64().ok_or_else(|| bad("`rope_parameters.rope_theta` is no number".into()))
        }
        None => keys.number("rope_theta", 10_000.0),
    }
}

/// The keys of the file, read with their types checked.
struct Keys<'a>(&'a Map<String, Value>);

impl<'a> Keys<'a> {
    fn present(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn size(&self, key: &str) -> Result<usize, ModelError> {
        self.optional_size(key)?.ok_or_else(|| bad(format!("`{key}` is missing")))
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>, ModelError> {
        let Some(value) = self.present(key) else {
            return Ok(None);
        };
        let max = if key == "max_position_embeddings" { POSITIONS_MAX } else { SIZE_MAX };
        match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(n) if (1..=max).contains(&n) => Ok(Some(n)),
            _ => Err(bad(format!("`{key}` = {value} is not a whole number from 1 to {max}"))),
        }
    }

    fn number(&self, key: &str, default: f64) -> Result<f64, ModelError> {
        match self.present(key) {
            None => Ok(default),
            Some(value) => {
                value.as_f64().ok_or_else(|| bad(format!("`{key}` = {value} is not a number")))
            }
        }
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool, ModelError> {
        match self.present(key) {
            None => Ok(default),
            Some(value) => value
                .as_bool()
                .ok_or_else(|| bad(format!("`{key}` = {value} is not true or false"))),
        }
    }

    /// One token id, a list of them, or none.
    fn ids(&self, key: &str) -> Result<Vec<u32>, ModelError> {
        let Some(value) = self.present(key) else {
            return Ok(Vec::new());
        };
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = match value {
            Value::Array(items) => items.iter().map(id).collect::<Option<Vec<u32>>>(),
            // Some files write -1 for "none".
            one if one.as_i64() == Some(-1) => Some(Vec::new()),
            one => id(one).map(|id| vec![id]),
        };
        ids.ok_or_else(|| bad(format!("`{key}` = {value} is not a token id")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = r#"{"model_type": "llama", "vocab_size": 61, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rope_theta": 500000.0, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": true, "eos_token_id": [1, 2], "hidden_act": "silu"}"#;

    /// `SMALL` with one key set to a value.
    fn with(key: &str, value: &str) -> String {
        let mut map: Map<String, Value> = serde_json::from_str(SMALL).unwrap();
        map.insert(key.to_owned(), serde_json::from_str(value).unwrap());
        Value::Object(map).to_string()
    }

    fn check(key: &str, value: &str, expected: &str) {
        let message = ModelConfig::from_json(&with(key, value)).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }

    #[test]
    fn unknown_knobs_are_refused_by_name() {
        check("model_type", "\"gpt2\"", "`model_type` = \"gpt2\" is not supported");
        check("hidden_act", "\"gelu\"", "`hidden_act` = \"gelu\" is not supported");
        check("rope_scaling", r#"{"rope_type": "yarn"}"#, "only unscaled rotary positions");
        check("rope_parameters", r#"{"rope_type": "llama3"}"#, "only unscaled rotary positions");
        check("logit_scale", "0.5", "`logit_scale` = 0.5 is not supported");
        check("attention_dropout", "0.1", "`attention_dropout` = 0.1 is not supported");
        check("quantization_config", "{}", "dequantise");
        check("num_key_value_heads", "3", "no multiple");
        check("head_dim", "7", "not even");
        check("vocab_size", "0", "whole number");
        check("vocab_size", "-5", "whole number");
        check("vocab_size", "\"many\"", "whole number");
        check("vocab_size", "99999999999", "whole number");
        check("rms_norm_eps", "0", "not above 0");
        check("eos_token_id", "\"</s>\"", "not a token id");
        assert!(ModelConfig::from_json("[]").is_err());
        assert!(ModelConfig::from_json("{").is_err());
        assert!(ModelConfig::from_json("{}").is_err());
    }

    #[test]
    fn json_round_trips() {
        let config = ModelConfig::from_json(SMALL).unwrap();
        assert_eq!(config.head_dim, 8);
        assert_eq!(config.eos_token_ids, [1, 2]);
        assert_eq!(ModelConfig::from_json(&config.to_json()).unwrap(), config);
    }

    #[test]
    fn newer_files_keep_theta_elsewhere() {
        let text = with("rope_parameters", r#"{"rope_type": "default", "rope_theta": 1234.0}"#);
        assert_eq!(ModelConfig::from_json(&text).unwrap().rope_theta, 1234.0);
        let harmless = with("num_experts", "null");
        assert!(ModelConfig::from_json(&harmless).is_ok());
    }

    #[test]
    fn parameters_are_counted() {
        // The tiny base of the quick start: 1,016,960 weights.
        let text = r#"{"model_type": "llama", "vocab_size": 2048, "hidden_size": 128,
            "intermediate_size": 320, "num_hidden_layers": 4, "num_attention_heads": 4,
            "tie_word_embeddings": true}"#;
        assert_eq!(ModelConfig::from_json(text).unwrap().n_params(), 1_016_960);
    }
}
