//! GGUF's `llama` architecture: its metadata as a [`ModelConfig`], its tensor names as Hugging
//! Face's, and the order of rows.

use hone_model::{Family, Knobs, ModelConfig, TensorEntry};

use super::ImportError;
use crate::gguf::{Gguf, GgufError, Metadata, TensorInfo};

/// What follows `llama.` in the keys that are read. A key that is not here and not harmless is
/// refused: a setting that is ignored is a model that is silently another one.
const READ: &[&str] = &[
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "vocab_size",
];

/// The value that Hugging Face's configuration takes when a file says nothing; only random
/// initialisation uses it.
const INITIALIZER_RANGE: f64 = 0.02;

/// The base of the rotary frequencies when the file does not say.
const ROPE_THETA_DEFAULT: f64 = 10_000.0;

/// The configuration, without the ids of special tokens.
pub(super) fn config(gguf: &Gguf) -> Result<ModelConfig, ImportError> {
    let md = &gguf.metadata;
    refuse_unknown_keys(md)?;
    let hidden_size = size(md, "embedding_length")?;
    let n_heads = size(md, "attention.head_count")?;
    if n_heads == 0 {
        return Err(key_error("attention.head_count", "it is 0").into());
    }
    let head_dim = try_size(md, "attention.key_length")?.unwrap_or(hidden_size / n_heads);
    for key in ["attention.value_length", "rope.dimension_count"] {
        if try_size(md, key)?.is_some_and(|found| found != head_dim) {
            let reason = format!("only the width of a whole head, {head_dim}, is");
            return Err(ImportError::Unsupported { what: format!("`llama.{key}`"), reason });
        }
    }
    let embedding = find(gguf, "token_embd.weight")?;
    let vocab_size = embedding.shape[0];
    if try_size(md, "vocab_size")?.is_some_and(|found| found != vocab_size) {
        let reason = format!("the embedding has {vocab_size} rows");
        return Err(key_error("vocab_size", &reason).into());
    }
    let has = |name: &str| gguf.tensors.iter().any(|tensor| tensor.name == name);
    let config = ModelConfig {
        family: Family::Llama,
        vocab_size,
        hidden_size,
        intermediate_size: size(md, "feed_forward_length")?,
        num_hidden_layers: size(md, "block_count")?,
        num_attention_heads: n_heads,
        num_key_value_heads: try_size(md, "attention.head_count_kv")?.unwrap_or(n_heads),
        head_dim,
        rms_norm_eps: md
            .try_f64("llama.attention.layer_norm_rms_epsilon")?
            .ok_or_else(|| key_error("attention.layer_norm_rms_epsilon", "it is missing"))?,
        rope_theta: md.try_f64("llama.rope.freq_base")?.unwrap_or(ROPE_THETA_DEFAULT),
        max_position_embeddings: size(md, "context_length")?,
        tie_word_embeddings: !has("output.weight"),
        attention_bias: has("blk.0.attn_q.bias"),
        mlp_bias: has("blk.0.ffn_up.bias"),
        initializer_range: INITIALIZER_RANGE,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
        pad_token_id: None,
        knobs: Knobs::default(),
    };
    // Its own reader has the checks of sizes and of their relations.
    Ok(ModelConfig::from_json(&config.to_json())?)
}

fn key_error(key: &str, reason: &str) -> GgufError {
    GgufError::Key { key: format!("llama.{key}"), reason: reason.to_owned() }
}

fn try_size(md: &Metadata, key: &str) -> Result<Option<usize>, GgufError> {
    let value = md.try_u64(&format!("llama.{key}"))?;
    let fits = |value: u64| usize::try_from(value).map_err(|_| key_error(key, "it is too large"));
    value.map(fits).transpose()
}

fn size(md: &Metadata, key: &str) -> Result<usize, GgufError> {
    try_size(md, key)?.ok_or_else(|| GgufError::NoKey(format!("llama.{key}")))
}

fn refuse_unknown_keys(md: &Metadata) -> Result<(), ImportError> {
    for (key, value) in md.iter() {
        let Some(name) = key.strip_prefix("llama.") else { continue };
        let is_off = match name {
            "expert_count" | "expert_used_count" => value.to_string() == "0",
            "rope.scaling.type" => value.to_string() == "\"none\"",
            _ => false,
        };
        if !is_off && !READ.contains(&name) {
            let what = format!("`{key}` = {value}");
            let reason = "the decoder has no such setting".to_owned();
            return Err(ImportError::Unsupported { what, reason });
        }
    }
    Ok(())
}

fn find<'a>(gguf: &'a Gguf, name: &str) -> Result<&'a TensorInfo, ImportError> {
    let found = gguf.tensors.iter().find(|tensor| tensor.name == name);
    found.ok_or_else(|| ImportError::Inconsistent(format!("there is no tensor `{name}`")))
}

/// What becomes of one tensor of the file.
#[derive(Debug)]
pub(super) struct Part {
    /// Where it comes from.
    pub(super) tensor: TensorInfo,
    /// Number of heads whose rows are to be put back in order; `None` when the rows are in order.
    pub(super) n_heads: Option<usize>,
}

/// Tensors under their new names, sorted by those.
#[derive(Debug)]
pub(super) struct Plan {
    parts: Vec<(TensorEntry, Part)>,
}

impl Plan {
    /// Names every tensor of the file; refuses one that has no name on the other side.
    pub(super) fn new(gguf: &Gguf, config: &ModelConfig) -> Result<Self, ImportError> {
        let mut parts = Vec::new();
        for tensor in &gguf.tensors {
            let name = hugging_face_name(&tensor.name)?;
            let n_heads = match name.rsplit('.').nth(1) {
                Some("q_proj") => Some(config.num_attention_heads),
                Some("k_proj") => Some(config.num_key_value_heads),
                _ => None,
            };
            let entry = TensorEntry { name, shape: tensor.shape.clone() };
            parts.push((entry, Part { tensor: tensor.clone(), n_heads }));
        }
        parts.sort_by(|(a, _), (b, _)| a.name.cmp(&b.name));
        Ok(Plan { parts })
    }

    /// New name and shape, and origin, of every tensor.
    pub(super) fn parts(&self) -> impl Iterator<Item = &(TensorEntry, Part)> {
        self.parts.iter()
    }
}

/// `blk.3.attn_q.weight` as `model.layers.3.self_attn.q_proj.weight`.
fn hugging_face_name(name: &str) -> Result<String, ImportError> {
    match name {
        "token_embd.weight" => return Ok("model.embed_tokens.weight".to_owned()),
        "output_norm.weight" => return Ok("model.norm.weight".to_owned()),
        "output.weight" => return Ok("lm_head.weight".to_owned()),
        _ => {}
    }
    let unsupported = |reason: &str| {
        let what = format!("the tensor `{name}`");
        Err(ImportError::Unsupported { what, reason: reason.to_owned() })
    };
    if name == "rope_freqs.weight" {
        return unsupported("it scales the rotary frequencies, which the decoder does not");
    }
    let mut parts = name.split('.');
    let (Some("blk"), Some(layer), Some(module), Some(kind), None) =
        (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return unsupported("a llama model has no tensor of that name");
    };
    let module = match module {
        "attn_norm" => "input_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return unsupported("a llama model has no tensor of that name"),
    };
    let is_plain = layer.parse::<u32>().is_ok_and(|number| number.to_string() == layer);
    if !is_plain || !matches!(kind, "weight" | "bias") {
        return unsupported("a llama model has no tensor of that name");
    }
    Ok(format!("model.layers.{layer}.{module}.{kind}"))
}

/// Puts the rows of a query or key projection back in Hugging Face's order.
///
/// llama.cpp rotates neighbouring rows (2i, 2i+1) of a head, Hugging Face row i of the first half
/// with row i of the second. So row 2i+j of a head of the file is row j*K/2+i of the head here (K
/// head width), for weights (rows of `shape[1]` values) and for biases (rows of one value).
pub(super) fn unpermute(values: &[f32], shape: &[usize], n_heads: usize) -> Vec<f32> {
    let row_len: usize = shape[1..].iter().product();
    let half = shape[0] / n_heads / 2;
    let mut out = Vec::with_capacity(values.len());
    for head in 0..n_heads {
        for j in 0..2 {
            for i in 0..half {
                let row = head * 2 * half + 2 * i + j;
                out.extend_from_slice(&values[row * row_len..][..row_len]);
            }
        }
    }
    out
}
