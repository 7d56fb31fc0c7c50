//! A configuration as JSON.

use serde_json::{Map, Value, json};

use super::families::Table;
use super::{Activation, Family, LayerRope, ModelConfig, ScoreScale, rope};

/// Every key, as both generations of transformers read them.
pub(super) fn config(config: &ModelConfig) -> Map<String, Value> {
    let table = Table::of(config.family);
    let eos = match config.eos_token_ids.as_slice() {
        [] => Value::Null,
        [one] => json!(one),
        many => json!(many),
    };
    let value = json!({
        "architectures": [table.architecture],
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos,
        "head_dim": config.head_dim,
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": table.model_type,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "pad_token_id": config.pad_token_id,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": "bfloat16",
        "use_cache": true,
        "vocab_size": config.vocab_size,
    });
    let Value::Object(mut map) = value else { unreachable!("`json!` was given braces") };
    rope::write(config, &mut map);
    for key in table.reads {
        if let Some(value) = knob(config, key) {
            map.insert((*key).to_owned(), value);
        }
    }
    match config.knobs.activation {
        Activation::Silu => map.insert("hidden_act".to_owned(), json!("silu")),
        Activation::GeluTanh => {
            map.insert("hidden_activation".to_owned(), json!("gelu_pytorch_tanh"))
        }
    };
    // A map keeps the order of insertion where any crate of a program asks serde_json for it.
    map.sort_keys();
    map
}

/// The value of a key of the family's own; `None` where another key says it.
fn knob(config: &ModelConfig, key: &str) -> Option<Value> {
    let knobs = &config.knobs;
    let window = knobs.layers.iter().find_map(|layer| layer.window);
    let original = match &knobs.rope_scaling {
        super::RopeScaling::LongRope { original, .. } => *original,
        _ => config.max_position_embeddings,
    };
    let value = match key {
        "attention_bias" => json!(config.attention_bias),
        "mlp_bias" => json!(config.mlp_bias),
        "attn_logit_softcapping" => json!(knobs.score_soft_cap),
        "final_logit_softcapping" => json!(knobs.logit_soft_cap),
        "query_pre_attn_scalar" => match knobs.score_scale {
            // transformers wants a whole number.
            ScoreScale::RootOf(scalar) if scalar.fract() == 0.0 => json!(scalar as u64),
            ScoreScale::RootOf(scalar) => json!(scalar),
            _ => return None,
        },
        "attention_multiplier" => match knobs.score_scale {
            ScoreScale::Value(factor) => json!(factor),
            _ => return None,
        },
        "embedding_multiplier" => json!(knobs.embedding_scale),
        "residual_multiplier" => json!(knobs.residual_scale),
        "logits_scaling" => json!(knobs.logit_divisor),
        "sliding_window" => json!(window),
        "use_sliding_window" => json!(window.is_some()),
        "layer_types" => layer_types(config),
        "no_rope_layers" => {
            let rotated = |layer| u8::from(config.layer(layer).rope != LayerRope::Off);
            (0..config.num_hidden_layers).map(rotated).collect()
        }
        "original_max_position_embeddings" => json!(original),
        // `layer_types`, `no_rope_layers` and the rotary keys say these.
        _ => return None,
    };
    Some(value)
}

/// Gemma 3 tells its layers apart by their rotary positions, which a window need not go with.
fn layer_types(config: &ModelConfig) -> Value {
    let is_windowed = |layer| match config.family {
        Family::Gemma3 => config.layer(layer).rope == LayerRope::Local,
        _ => config.layer(layer).window.is_some(),
    };
    let name = |layer| if is_windowed(layer) { "sliding_attention" } else { "full_attention" };
    (0..config.num_hidden_layers).map(name).collect()
}
