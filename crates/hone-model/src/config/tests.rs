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

/// Models as they are published: name, number of parameters as the hub counts them, and the keys of
/// `config.json` that say something. SHORT and LONG stand for 48 divisors each.
const PUBLISHED: [(&str, usize, &str); 12] = [
    (
        "Llama-3.2-1B",
        1_235_814_400,
        r#"{"model_type": "llama", "attention_bias": false, "attention_dropout": 0.0,
            "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192,
            "max_position_embeddings": 131072, "mlp_bias": false, "num_attention_heads": 32,
            "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
            "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0,
            "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3"}, "rope_theta": 500000.0, "tie_word_embeddings": true,
            "vocab_size": 128256}"#,
    ),
    (
        "SmolLM3-3B",
        3_075_098_624,
        r#"{"model_type": "smollm3", "attention_bias": false, "attention_dropout": 0.0,
            "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 11008,
            "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": false,
            "no_rope_layer_interval": 4, "num_attention_heads": 16, "num_hidden_layers": 36,
            "num_key_value_heads": 4, "pretraining_tp": 2, "rms_norm_eps": 1e-06,
            "rope_scaling": null, "rope_theta": 5000000.0, "sliding_window": null,
            "use_sliding_window": false, "vocab_size": 128256}"#,
    ),
    (
        "Mistral-7B-v0.1",
        7_241_732_096,
        r#"{"model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096,
            "intermediate_size": 14336, "max_position_embeddings": 32768,
            "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
            "tie_word_embeddings": false, "vocab_size": 32000}"#,
    ),
    (
        "Qwen2.5-0.5B",
        494_032_768,
        r#"{"model_type": "qwen2", "attention_dropout": 0.0, "hidden_act": "silu",
            "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
            "max_window_layers": 24, "num_attention_heads": 14, "num_hidden_layers": 24,
            "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
            "sliding_window": 32768, "tie_word_embeddings": true, "use_mrope": false,
            "use_sliding_window": false, "vocab_size": 151936}"#,
    ),
    (
        "Qwen3-0.6B",
        596_049_920,
        r#"{"model_type": "qwen3", "attention_bias": false, "attention_dropout": 0.0,
            "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
            "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
            "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000,
            "sliding_window": null, "tie_word_embeddings": true, "use_sliding_window": false,
            "vocab_size": 151936}"#,
    ),
    (
        "gemma-2-2b",
        2_614_341_888,
        r#"{"model_type": "gemma2", "attention_bias": false, "attention_dropout": 0.0,
            "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid",
            "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304,
            "intermediate_size": 9216, "max_position_embeddings": 8192, "num_attention_heads": 8,
            "num_hidden_layers": 26, "num_key_value_heads": 4, "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
            "vocab_size": 256000}"#,
    ),
    (
        "gemma-3-1b-it",
        999_885_952,
        r#"{"model_type": "gemma3_text", "attention_bias": false, "attention_dropout": 0.0,
            "attn_logit_softcapping": null, "cache_implementation": "hybrid", "eos_token_id": [1,
            106], "final_logit_softcapping": null, "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
            "intermediate_size": 6912, "max_position_embeddings": 32768,
            "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
            "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
            "rope_scaling": null, "rope_theta": 1000000, "sliding_window": 512,
            "sliding_window_pattern": 6, "vocab_size": 262144}"#,
    ),
    (
        "Phi-3-mini-4k-instruct",
        3_821_079_552,
        r#"{"model_type": "phi3", "attention_bias": false, "attention_dropout": 0.0,
            "embd_pdrop": 0.0, "hidden_act": "silu", "hidden_size": 3072,
            "intermediate_size": 8192, "max_position_embeddings": 4096,
            "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
            "original_max_position_embeddings": 4096, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
            "rope_scaling": null, "rope_theta": 10000.0, "sliding_window": 2047,
            "tie_word_embeddings": false, "vocab_size": 32064}"#,
    ),
    (
        "Phi-4-mini-instruct",
        3_836_021_760,
        r#"{"model_type": "phi3", "attention_bias": false, "attention_dropout": 0.0,
            "embd_pdrop": 0.0, "full_attn_mod": 1, "hidden_act": "silu", "hidden_size": 3072,
            "interpolate_factor": 1, "intermediate_size": 8192, "lm_head_bias": false,
            "max_position_embeddings": 131072, "mlp_bias": false, "num_attention_heads": 24,
            "num_hidden_layers": 32, "num_key_value_heads": 8,
            "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75,
            "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": {"type": "longrope",
            "short_factor": SHORT, "long_factor": LONG}, "rope_theta": 10000.0,
            "sliding_window": 262144, "tie_word_embeddings": true, "vocab_size": 200064}"#,
    ),
    (
        "granite-3.1-2b-instruct",
        2_533_531_648,
        r#"{"model_type": "granite", "attention_bias": false, "attention_dropout": 0.1,
            "attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "hidden_act": "silu",
            "hidden_size": 2048, "intermediate_size": 8192, "logits_scaling": 8.0,
            "max_position_embeddings": 131072, "mlp_bias": false, "num_attention_heads": 32,
            "num_hidden_layers": 40, "num_key_value_heads": 8, "residual_multiplier": 0.22,
            "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 5000000.0,
            "tie_word_embeddings": true, "vocab_size": 49155}"#,
    ),
    (
        "OLMo-2-0425-1B",
        1_484_916_736,
        r#"{"model_type": "olmo2", "attention_bias": false, "attention_dropout": 0.0,
            "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192,
            "max_position_embeddings": 4096, "num_attention_heads": 16, "num_hidden_layers": 16,
            "num_key_value_heads": 16, "rms_norm_eps": 1e-06, "rope_scaling": null,
            "rope_theta": 500000, "tie_word_embeddings": false, "vocab_size": 100352}"#,
    ),
    (
        "SmolLM2-135M",
        134_515_008,
        r#"{"model_type": "llama", "attention_bias": false, "attention_dropout": 0.0,
            "hidden_act": "silu", "hidden_size": 576, "intermediate_size": 1536,
            "is_llama_config": true, "max_position_embeddings": 8192, "mlp_bias": false,
            "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
            "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": false,
            "rope_scaling": null, "rope_theta": 100000, "tie_word_embeddings": true,
            "vocab_size": 49152}"#,
    ),
];

fn published(name: &str) -> ModelConfig {
    let (_, _, text) = PUBLISHED.iter().find(|(known, ..)| *known == name).unwrap();
    let list =
        |first: f64| format!("{:?}", (0..48).map(|i| first + f64::from(i)).collect::<Vec<_>>());
    let text = text.replace("SHORT", &list(1.0)).replace("LONG", &list(2.0));
    ModelConfig::from_json(&text).unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// The layers with a window of `size`.
fn windowed(config: &ModelConfig, size: usize) -> Vec<usize> {
    let layers = 0..config.num_hidden_layers;
    layers.filter(|&layer| config.layer(layer).window == Some(size)).collect()
}

#[test]
fn published_models_are_read() {
    for (name, n_params, _) in PUBLISHED {
        let config = published(name);
        assert_eq!(config.n_params(), n_params, "{name}");
        assert_eq!(ModelConfig::from_json(&config.to_json()).unwrap(), config, "{name}");
    }
    let smollm3 = published("SmolLM3-3B");
    let off = (0..36).filter(|&layer| smollm3.layer(layer).rope == LayerRope::Off);
    assert_eq!(off.collect::<Vec<_>>(), [3, 7, 11, 15, 19, 23, 27, 31, 35]);
    assert_eq!(windowed(&published("Mistral-7B-v0.1"), 4096).len(), 32);
    assert_eq!(windowed(&published("gemma-2-2b"), 4096), (0..26).step_by(2).collect::<Vec<_>>());
    let gemma3 = published("gemma-3-1b-it");
    let full = (0..26).filter(|&layer| gemma3.layer(layer).rope == LayerRope::Main);
    assert_eq!(full.collect::<Vec<_>>(), [5, 11, 17, 23]);
    assert_eq!(windowed(&gemma3, 512).len(), 22);
    let phi4 = published("Phi-4-mini-instruct");
    assert_eq!((phi4.head_dim, phi4.rotary_dim()), (128, 96));
    let RopeScaling::LongRope { attention_factor, original, .. } = phi4.knobs.rope_scaling else {
        panic!("{phi4:?}");
    };
    // sqrt(1 + ln 32 / ln 4096).
    assert!((attention_factor - 1.190_238_071_423_808_7).abs() < 1e-12, "{attention_factor}");
    assert_eq!(original, 4096);
}

/// A small model of a family, with more keys.
fn small(model_type: &str, more: &str) -> Result<ModelConfig, ModelError> {
    let more = if more.is_empty() { String::new() } else { format!(", {more}") };
    ModelConfig::from_json(&format!(
        r#"{{"model_type": "{model_type}", "vocab_size": 61, "hidden_size": 32,
            "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64{more}}}"#
    ))
}

/// A family refuses some keys, saying `expected`.
fn refused(model_type: &str, more: &str, expected: &str) {
    let message = small(model_type, more).expect_err(more).to_string();
    assert!(message.contains(expected), "{message}");
}

#[test]
fn each_family_refuses_what_it_does_not_compute() {
    refused("gemma3", "", "\"gemma3_text\"");
    refused("gpt2", "", "this version knows llama, smollm3, mistral, qwen2, qwen3, gemma2");
    refused("llama", r#""sliding_window": 5"#, "`sliding_window` = 5 is not supported");
    refused("mistral", r#""layer_types": ["full_attention"]"#, "`layer_types`");
    refused("mistral", r#""attention_bias": true"#, "`attention_bias` = true");
    refused("mistral", r#""sliding_window": 0"#, "`sliding_window` = 0 is not a whole number");
    refused("qwen2", r#""layer_types": ["full_attention"]"#, "`layer_types` has 1 items");
    refused("qwen2", r#""layer_types": ["chunked"]"#, "is not a list of \"full_attention\"");
    let sliding = r#""layer_types": ["sliding_attention", "sliding_attention",
        "sliding_attention", "sliding_attention"]"#;
    refused("qwen2", sliding, "no `sliding_window` is on");
    refused("qwen3", r#""use_sliding_window": 1"#, "is not true or false");
    refused("smollm3", r#""no_rope_layers": [1, 0]"#, "`no_rope_layers` has 2 items");
    refused("smollm3", r#""no_rope_layers": [1, 2, 1, 1]"#, "is not a list of 0 and 1");
    refused("gemma2", r#""hidden_activation": "gelu""#, "only \"gelu_pytorch_tanh\" is");
    refused("gemma2", r#""attn_logit_softcapping": -1"#, "`attn_logit_softcapping` = -1 is not");
    refused("gemma2", r#""use_bidirectional_attention": true"#, "`use_bidirectional_attention`");
    refused("gemma3_text", r#""attn_logit_softcapping": 50.0"#, "`attn_logit_softcapping` = 50");
    refused("phi3", r#""resid_pdrop": 0.1"#, "`resid_pdrop` = 0.1 is not supported: only 0.0 is");
    refused("phi3", r#""partial_rotary_factor": 0.4"#, "rotates 3 columns of a head of 8");
    refused("llama", r#""partial_rotary_factor": 0.5"#, "only 1.0 is in this family");
    refused("granite", r#""attention_dropout": 0.2"#, "only 0.0 and 0.1 are");
    refused("granite", r#""logits_scaling": 0"#, "`logits_scaling` = 0 is not above 0");
    refused("granite", r#""residual_multiplier": 1e-60"#, "not above 0 in single precision");
    refused("gemma2", r#""final_logit_softcapping": 1e-60"#, "`final_logit_softcapping` = ");
    refused("gemma2", r#""query_pre_attn_scalar": 1e60"#, "`query_pre_attn_scalar` = ");
    refused("olmo2", r#""mlp_bias": true"#, "`mlp_bias` = true is not supported");
}

#[test]
fn rotary_positions_are_refused_by_name() {
    let scaling = |model_type: &str, scaling: &str, expected: &str| {
        refused(model_type, &format!(r#""rope_scaling": {scaling}"#), expected);
    };
    scaling("llama", r#"{"type": "mrope"}"#, "`rope_scaling.type` = \"mrope\"");
    scaling("llama", r#"{"type": "linear"}"#, "`rope_scaling.factor` is missing");
    scaling("llama", r#"{"type": "linear", "factor": -1}"#, "not above 0");
    scaling("llama", r#"{"type": "linear", "factor": "2"}"#, "not a number");
    scaling("llama", r#"{"type": "default", "mrope_section": [1]}"#, "rope_scaling.mrope_section");
    scaling("llama", r#""linear""#, "is not an object");
    scaling("llama", r#"{"type": "llama3", "factor": 2}"#, "low_freq_factor` is missing");
    scaling("phi3", r#"{"type": "linear", "factor": 2}"#, "only default and longrope are");
    scaling("phi3", r#"{"type": "su", "short_factor": [1]}"#, "long_factor` is missing");
    let llama3 = r#"{"type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4}"#;
    scaling("llama", llama3, "`low_freq_factor` = 4 is not below");
    scaling("llama", r#"{"type": "linear", "factor": 1e60}"#, "range of single precision");
    scaling("llama", r#"{"type": "yarn", "factor": 2, "rope_theta": 1}"#, "range of single");
    let short = r#"{"type": "longrope", "short_factor": [1, 1], "long_factor": [1, 1, 1, 1]}"#;
    scaling("phi3", short, "`short_factor` has 2 numbers, half the rotated width is 4");
    let both = r#""rope_scaling": {"type": "linear", "factor": 2},
        "rope_parameters": {"rope_type": "linear", "factor": 3}"#;
    refused("llama", both, "say different things");
    let nested = r#""rope_parameters": {"full_attention": {"rope_type": "default"}, "x": {}}"#;
    refused("gemma3_text", nested, "`rope_parameters.x`");
    refused("qwen3", nested, "`rope_parameters.full_attention`");
}

#[test]
fn both_spellings_of_rotary_positions_are_one() {
    let llama = |more: &str| small("llama", more).unwrap();
    let old = r#""rope_theta": 77.0, "rope_scaling": {"type": "yarn", "factor": 4.0,
        "original_max_position_embeddings": 16}"#;
    let new = r#""rope_parameters": {"rope_type": "yarn", "rope_theta": 77.0, "factor": 4.0,
        "original_max_position_embeddings": 16, "attention_factor": null}"#;
    let config = llama(old);
    assert_eq!(config, llama(new));
    assert_eq!(config, llama(&format!("{old}, \"rope_parameters\": null")));
    let RopeScaling::Yarn { attention_factor, .. } = config.knobs.rope_scaling else {
        panic!("{config:?}");
    };
    assert!((attention_factor - (0.1 * 4.0_f64.ln() + 1.0)).abs() < 1e-12);
    let gemma = |more: &str| small("gemma3_text", more).unwrap();
    let old = r#""rope_theta": 9e5, "rope_local_base_freq": 8e3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}"#;
    let new = r#""rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 9e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 8e3}}"#;
    assert_eq!(gemma(old), gemma(new));
    assert_eq!(gemma("").rope_theta, 1e6);
    let scaled = new.replace("\"default\"", "\"dynamic\", \"factor\": 2.0");
    let config = gemma(&scaled);
    assert_eq!(ModelConfig::from_json(&config.to_json()).unwrap(), config);
    assert_eq!(small("smollm3", "").unwrap().rope_theta, 2e6);
    let dynamic = r#""rope_scaling": {"type": "dynamic", "factor": 2.5}"#;
    assert_eq!(small("llama", dynamic).unwrap().context(), 160);
}
