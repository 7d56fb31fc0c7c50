//! One table a family: which keys it reads beside the common ones, which may have one value alone,
//! what it takes where a key is absent, and how its keys become [`Knobs`](super::Knobs).
//!
//! Names, defaults and meanings are those of transformers 5.

use serde_json::Value;

use super::keys::{Keys, bad};
use super::{
    Activation, Family, LayerKnobs, LayerRope, ModelConfig, NormPlaces, QkNorm, ScoreScale,
};
use crate::ModelError;

/// A key and the JSON texts of the values that it may have.
type Fixed = (&'static str, &'static [&'static str]);

/// What one family reads and what it fixes.
pub(super) struct Table {
    pub(super) family: Family,
    pub(super) model_type: &'static str,
    /// Class of transformers, for `architectures`.
    pub(super) architecture: &'static str,
    /// Keys read beside the common ones.
    pub(super) reads: &'static [&'static str],
    fixed: &'static [Fixed],
    /// Values of absent keys.
    pub(super) absent: Absent,
    /// Turns the family's own keys into knobs, once the common ones are read.
    pub(super) read: fn(&Keys<'_>, &mut ModelConfig) -> Result<(), ModelError>,
}

/// What an absent key means.
pub(super) struct Absent {
    /// `head_dim`; `None` is D / H.
    pub(super) head_dim: Option<usize>,
    pub(super) rms_norm_eps: f64,
    pub(super) rope_theta: f64,
    pub(super) tie_word_embeddings: bool,
}

/// What most families take.
const LLAMA_ABSENT: Absent =
    Absent { head_dim: None, rms_norm_eps: 1e-6, rope_theta: 10_000.0, tie_word_embeddings: false };

/// Keys fixed for every family.
const ALWAYS: &[Fixed] = &[("attention_dropout", &["0.0"])];

const SILU: Fixed = ("hidden_act", &["\"silu\""]);

/// Every family, in the order in which messages list them.
const TABLES: [Table; 10] = [
    Table {
        family: Family::Llama,
        model_type: "llama",
        architecture: "LlamaForCausalLM",
        reads: &["attention_bias", "mlp_bias"],
        fixed: &[SILU],
        absent: LLAMA_ABSENT,
        read: |_, _| Ok(()),
    },
    Table {
        family: Family::SmolLm3,
        model_type: "smollm3",
        architecture: "SmolLM3ForCausalLM",
        reads: &[
            "attention_bias",
            "layer_types",
            "max_window_layers",
            "mlp_bias",
            "no_rope_layer_interval",
            "no_rope_layers",
            "sliding_window",
            "use_sliding_window",
        ],
        fixed: &[SILU],
        absent: Absent { rope_theta: 2e6, tie_word_embeddings: true, ..LLAMA_ABSENT },
        read: smollm3,
    },
    Table {
        family: Family::Mistral,
        model_type: "mistral",
        architecture: "MistralForCausalLM",
        reads: &["sliding_window"],
        fixed: &[SILU],
        absent: LLAMA_ABSENT,
        read: |keys, config| every_window(keys, config, Some(4096)),
    },
    Table {
        family: Family::Qwen2,
        model_type: "qwen2",
        architecture: "Qwen2ForCausalLM",
        reads: &["layer_types", "max_window_layers", "sliding_window", "use_sliding_window"],
        fixed: &[SILU],
        absent: LLAMA_ABSENT,
        read: qwen2,
    },
    Table {
        family: Family::Qwen3,
        model_type: "qwen3",
        architecture: "Qwen3ForCausalLM",
        reads: &[
            "attention_bias",
            "layer_types",
            "max_window_layers",
            "sliding_window",
            "use_sliding_window",
        ],
        fixed: &[SILU],
        absent: Absent { head_dim: Some(128), ..LLAMA_ABSENT },
        read: qwen3,
    },
    Table {
        family: Family::Gemma2,
        model_type: "gemma2",
        architecture: "Gemma2ForCausalLM",
        reads: &[
            "attention_bias",
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "layer_types",
            "query_pre_attn_scalar",
            "sliding_window",
            // Gemma 2 27B's, beside `sliding_window`; transformers does not read it.
            "sliding_window_size",
        ],
        fixed: GELU,
        absent: GEMMA_ABSENT,
        read: gemma2,
    },
    Table {
        family: Family::Gemma3,
        model_type: "gemma3_text",
        architecture: "Gemma3ForCausalLM",
        reads: &[
            "attention_bias",
            "final_logit_softcapping",
            "layer_types",
            "query_pre_attn_scalar",
            "rope_local_base_freq",
            "sliding_window",
            "sliding_window_pattern",
        ],
        fixed: GELU,
        absent: Absent { rope_theta: 1e6, ..GEMMA_ABSENT },
        read: gemma3,
    },
    Table {
        family: Family::Phi3,
        model_type: "phi3",
        architecture: "Phi3ForCausalLM",
        reads: &["original_max_position_embeddings", "sliding_window"],
        fixed: &[
            SILU,
            ("embd_pdrop", &["0.0"]),
            ("resid_pdrop", &["0.0"]),
            // Phi-4-mini's, of its own code: full attention everywhere, no interpolation.
            ("full_attn_mod", &["1"]),
            ("interpolate_factor", &["1"]),
        ],
        absent: Absent { rms_norm_eps: 1e-5, ..LLAMA_ABSENT },
        read: phi3,
    },
    Table {
        family: Family::Granite,
        model_type: "granite",
        architecture: "GraniteForCausalLM",
        reads: &[
            "attention_bias",
            "attention_multiplier",
            "embedding_multiplier",
            "logits_scaling",
            "mlp_bias",
            "residual_multiplier",
        ],
        // IBM's files carry the dropout of their pre-training; it changes nothing that the model
        // computes, and hone trains without.
        fixed: &[SILU, ("attention_dropout", &["0.0", "0.1"])],
        absent: LLAMA_ABSENT,
        read: granite,
    },
    Table {
        family: Family::Olmo2,
        model_type: "olmo2",
        architecture: "Olmo2ForCausalLM",
        reads: &["attention_bias"],
        fixed: &[SILU],
        absent: Absent { rms_norm_eps: 1e-5, ..LLAMA_ABSENT },
        read: |_, config| {
            config.knobs.norm_places = NormPlaces::After;
            config.knobs.qk_norm = QkNorm::Projection;
            Ok(())
        },
    },
];

/// The activation under both its names, of which transformers reads the first.
const GELU: &[Fixed] = &[
    ("hidden_activation", &["\"gelu_pytorch_tanh\""]),
    ("hidden_act", &["\"gelu_pytorch_tanh\""]),
];

const GEMMA_ABSENT: Absent =
    Absent { head_dim: Some(256), tie_word_embeddings: true, ..LLAMA_ABSENT };

impl Table {
    /// The table of a family.
    pub(super) fn of(family: Family) -> &'static Table {
        TABLES.iter().find(|table| table.family == family).expect("every family has a table")
    }

    /// The table that `model_type` asks for.
    pub(super) fn named(keys: &Keys<'_>) -> Result<&'static Table, ModelError> {
        let Some(name) = keys.text("model_type")? else {
            return Err(bad("`model_type` is missing".to_owned()));
        };
        TABLES.iter().find(|table| table.model_type == name).ok_or_else(|| {
            let known: Vec<_> = TABLES.iter().map(|table| table.model_type).collect();
            let reason = match name {
                "gemma3" => "its text model is, with `model_type` \"gemma3_text\"".to_owned(),
                _ => format!("this version knows {}", known.join(", ")),
            };
            keys.unsupported("model_type", &reason)
        })
    }

    /// Keys that may have one value alone; the family's own come first.
    pub(super) fn fixed(&self) -> impl Iterator<Item = &'static Fixed> {
        self.fixed.iter().chain(ALWAYS)
    }
}

/// Which layers have a window: `layer_types`, or `absent(layer)`.
fn windowed(
    keys: &Keys<'_>,
    config: &ModelConfig,
    absent: impl Fn(usize) -> bool,
) -> Result<Vec<bool>, ModelError> {
    let n = config.num_hidden_layers;
    let read = |value: &Value| match value.as_str() {
        Some("sliding_attention") => Some(true),
        Some("full_attention") => Some(false),
        _ => None,
    };
    let what = "a list of \"full_attention\" and \"sliding_attention\"";
    match keys.list("layer_types", what, read)? {
        None => Ok((0..n).map(absent).collect()),
        Some(types) if types.len() == n => Ok(types),
        Some(types) => {
            let what = format!("`layer_types` has {} items", types.len());
            Err(bad(format!("{what}, `num_hidden_layers` is {n}")))
        }
    }
}

/// The window that `sliding_window` gives; absent it is `absent`, null is none.
fn window(keys: &Keys<'_>, absent: Option<usize>) -> Result<Option<usize>, ModelError> {
    if keys.has("sliding_window") { keys.optional_size("sliding_window") } else { Ok(absent) }
}

/// Gives the layers marked in `windowed` the window.
fn set_windows(
    config: &mut ModelConfig,
    windowed: &[bool],
    window: Option<usize>,
) -> Result<(), ModelError> {
    if windowed.contains(&true) && window.is_none() {
        let what = "`layer_types` asks for \"sliding_attention\", but no `sliding_window` is on";
        return Err(bad(what.to_owned()));
    }
    let one = |&windowed: &bool| LayerKnobs {
        window: window.filter(|_| windowed),
        ..LayerKnobs::default()
    };
    config.knobs.layers = windowed.iter().map(one).collect();
    Ok(())
}

/// One window for every layer.
fn every_window(
    keys: &Keys<'_>,
    config: &mut ModelConfig,
    absent: Option<usize>,
) -> Result<(), ModelError> {
    let window = window(keys, absent)?;
    let windowed = vec![window.is_some(); config.num_hidden_layers];
    set_windows(config, &windowed, window)
}

/// Windows behind `use_sliding_window`.
fn optional_windows(
    keys: &Keys<'_>,
    config: &mut ModelConfig,
    absent: Option<usize>,
    is_windowed: impl Fn(usize) -> bool,
) -> Result<(), ModelError> {
    let is_used = keys.flag("use_sliding_window", false)?;
    let window = window(keys, absent)?.filter(|_| is_used);
    let windowed = windowed(keys, config, |layer| window.is_some() && is_windowed(layer))?;
    set_windows(config, &windowed, window)
}

/// Layers without rotary positions (Yang et al. 2025): those where `no_rope_layers` holds 0, or
/// every fourth.
fn smollm3(keys: &Keys<'_>, config: &mut ModelConfig) -> Result<(), ModelError> {
    let n = config.num_hidden_layers;
    let what = "a list of 0 and 1";
    let interval = keys.optional_size("no_rope_layer_interval")?.unwrap_or(4);
    let rotated = keys
        .list("no_rope_layers", what, |value| value.as_u64().filter(|&n| n < 2).map(|n| n == 1))?
        .unwrap_or_else(|| (1..=n).map(|layer| !layer.is_multiple_of(interval)).collect());
    if rotated.len() != n {
        let what = format!("`no_rope_layers` has {} items", rotated.len());
        return Err(bad(format!("{what}, `num_hidden_layers` is {n}")));
    }
    optional_windows(keys, config, None, |layer| !rotated[layer])?;
    for (layer, rotated) in config.knobs.layers.iter_mut().zip(rotated) {
        layer.rope = if rotated { LayerRope::Main } else { LayerRope::Off };
    }
    Ok(())
}

/// Windows from layer `max_window_layers` on.
fn qwen_windows(keys: &Keys<'_>, config: &mut ModelConfig) -> Result<(), ModelError> {
    // Zero is a count here, and means that every layer has its window.
    let first = match keys.present("max_window_layers").and_then(Value::as_u64) {
        Some(0) => 0,
        _ => keys.optional_size("max_window_layers")?.unwrap_or(28),
    };
    optional_windows(keys, config, Some(4096), |layer| layer >= first)
}

fn qwen2(keys: &Keys<'_>, config: &mut ModelConfig) -> Result<(), ModelError> {
    config.attention_bias = true;
    config.knobs.bare_output = true;
    qwen_windows(keys, config)
}

fn qwen3(keys: &Keys<'_>, config: &mut ModelConfig) -> Result<(), ModelError> {
    config.knobs.qk_norm = QkNorm::Head;
    qwen_windows(keys, config)
}

/// What both Gemmas share.
fn gemma(keys: &Keys<'_>, config: &mut ModelConfig) -> Result<(), ModelError> {
    let knobs = &mut config.knobs;
    knobs.norm_places = NormPlaces::Around;
    knobs.norm_plus_one = true;
    knobs.activation = Activation::GeluTanh;
    knobs.embedding_scale = Some((config.hidden_size as f64).sqrt());
    let scalar = keys.positive("query_pre_attn_scalar")?.unwrap_or(256.0);
    knobs.score_scale = ScoreScale::RootOf(scalar);
    Ok(())
}

fn gemma2(keys: &Keys<'_>, config: &mut ModelConfig) -> Result<(), ModelError> {
    gemma(keys, config)?;
    let cap = |key: &str, absent: f64| match keys.has(key) {
        true => keys.positive(key),
        false => Ok(Some(absent)),
    };
    config.knobs.score_soft_cap = cap("attn_logit_softcapping", 50.0)?;
    config.knobs.logit_soft_cap = cap("final_logit_softcapping", 30.0)?;
    let windowed = windowed(keys, config, |layer| layer.is_multiple_of(2))?;
    set_windows(config, &windowed, window(keys, Some(4096))?)
}

/// transformers never applies `attn_logit_softcapping` here, so that one is refused.
fn gemma3(keys: &Keys<'_>, config: &mut ModelConfig) -> Result<(), ModelError> {
    gemma(keys, config)?;
    config.knobs.qk_norm = QkNorm::Head;
    config.knobs.logit_soft_cap = keys.positive("final_logit_softcapping")?;
    let pattern = keys.optional_size("sliding_window_pattern")?.unwrap_or(6);
    let windowed = windowed(keys, config, |layer| !(layer + 1).is_multiple_of(pattern))?;
    set_windows(config, &windowed, window(keys, Some(4096))?)?;
    for (layer, windowed) in config.knobs.layers.iter_mut().zip(windowed) {
        layer.rope = if windowed { LayerRope::Local } else { LayerRope::Main };
    }
    Ok(())
}

fn phi3(keys: &Keys<'_>, config: &mut ModelConfig) -> Result<(), ModelError> {
    config.knobs.fused_weights = true;
    every_window(keys, config, None)
}

fn granite(keys: &Keys<'_>, config: &mut ModelConfig) -> Result<(), ModelError> {
    let factor = |key: &str| Ok::<f64, ModelError>(keys.positive(key)?.unwrap_or(1.0));
    let knobs = &mut config.knobs;
    knobs.score_scale = ScoreScale::Value(factor("attention_multiplier")?);
    knobs.embedding_scale = Some(factor("embedding_multiplier")?);
    knobs.residual_scale = Some(factor("residual_multiplier")?);
    knobs.logit_divisor = Some(factor("logits_scaling")?);
    Ok(())
}
