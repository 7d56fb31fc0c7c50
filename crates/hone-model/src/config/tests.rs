//! What is read and what is refused.

use serde_json::Map;

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
    check("rope_scaling", r#"{"rope_type": "su"}"#, "`rope_scaling.rope_type` = \"su\"");
    check("rope_parameters", r#"{"rope_type": "llama3"}"#, "`rope_parameters.factor` is missing");
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
