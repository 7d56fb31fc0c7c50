//! Every gradient against the loss itself: (L(p + h d) - L(p - h d)) / 2h for a random direction d
//! in each tensor.

use crate::common::*;
use hone_kernels::{Reference, rng};
use hone_model::{
    Adapter, Batch, BiasMode, BnbConfig, Decoder, LoraConfig, ModelConfig, QuantizeOnLoad, Targets,
    Tensors, Training, ValueType,
};

/// Difference of the two slopes allowed, over the larger of the slope and [`FLOOR`]. The loss is
/// summed in f64 from f32 activations, so a slope has an error of about 1e-6 / h.
const RELATIVE: f64 = 5e-3;
const FLOOR: f64 = 2e-2;

/// Step along a direction of norm one.
const H: f32 = 4e-3;

/// Loss over the sum of the weights.
fn loss(decoder: &mut Decoder<Reference>, batch: &Batch) -> f64 {
    let sums = decoder.loss(batch, None).unwrap();
    sums.weighted_loss / sums.weight
}

/// Checks every trained tensor in three directions.
pub(crate) fn check(mut decoder: Decoder<Reference>, batch: &Batch, n_expected: usize) {
    decoder.accumulate(batch, (1.0 / batch.weight()) as f32, None).unwrap();
    let gradients = decoder.gradients();
    let values = decoder.trained();
    assert_eq!(gradients.len(), n_expected);
    for gradient in gradients.iter() {
        for seed in 0..3 {
            let n = gradient.data.len();
            let mut direction: Vec<f64> = (0..n).map(|i| rng::normal(seed, i as u64)).collect();
            let norm = direction.iter().map(|d| d * d).sum::<f64>().sqrt();
            direction.iter_mut().for_each(|d| *d /= norm);
            let expected: f64 =
                gradient.data.iter().zip(&direction).map(|(&g, d)| f64::from(g) * d).sum();
            let mut at = |h: f32| {
                let mut moved: Tensors = values.clone();
                let tensor = moved.get_mut(&gradient.name).unwrap();
                for (value, d) in tensor.data.iter_mut().zip(&direction) {
                    *value += h * *d as f32;
                }
                decoder.set_trained(&moved).unwrap();
                loss(&mut decoder, batch)
            };
            // Richardson's extrapolation takes the error of order h^2 out.
            let wide = (at(2.0 * H) - at(-2.0 * H)) / (4.0 * f64::from(H));
            let near = (at(H) - at(-H)) / (2.0 * f64::from(H));
            let found = (4.0 * near - wide) / 3.0;
            let off = (found - expected).abs() / expected.abs().max(FLOOR);
            let name = &gradient.name;
            assert!(off < RELATIVE, "{name}: slope {found}, gradient {expected}: {off:e}");
        }
    }
    decoder.set_trained(&values).unwrap();
}

#[test]
fn all_weights() {
    for odd in [false, true] {
        let config = config(odd);
        let batch = pack(&documents(&config, &[7, 4, 11]));
        let n = config.tensors().len();
        check(decoder(Reference, &config, Training::Full), &batch, n);
    }
}

#[test]
fn adapters() {
    for odd in [false, true] {
        let config = config(odd);
        let batch = pack(&documents(&config, &[7, 4, 11]));
        let mut decoder = decoder(Reference, &config, Training::Frozen);
        decoder.attach(&adapter(&config, LoraConfig::all_linear(3, 6.0)), true).unwrap();
        check(decoder, &batch, 3 * 7 * 2);
    }
}

/// What adapters train outside the linear maps' factors, on 4-bit weights: embeddings, heads, rows
/// of tokens, biases, whole modules, with ranks of their own. (The norms of DoRA are constants for
/// its gradient, so that its slopes are others by design: PEFT's gradients are its test.)
#[test]
fn adapters_of_every_part() {
    let small = |more: &str| {
        let text = format!(
            r#"{{"vocab_size": 67, "hidden_size": 20, "intermediate_size": 28,
                "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.3, {more}}}"#
        );
        ModelConfig::from_json(&text).unwrap()
    };
    check_every_part(&config(false));
    check_every_part(&config(true));
    // Factors on embeddings and logits, and a cap, are inside of what adapters add to or outside.
    check_every_part(&small(
        r#""model_type": "gemma3_text", "sliding_window": 6, "sliding_window_pattern": 2,
           "final_logit_softcapping": 4"#,
    ));
    check_every_part(&small(r#""model_type": "phi3", "sliding_window": 6"#));
    check_every_part(&small(
        r#""model_type": "granite", "attention_bias": true, "mlp_bias": true,
           "attention_multiplier": 0.3, "embedding_multiplier": 2, "residual_multiplier": 0.5,
           "logits_scaling": 0.7, "tie_word_embeddings": true"#,
    ));
}

fn check_every_part(config: &ModelConfig) {
    let targets = |names: &[&str]| {
        let names: Vec<String> = names.iter().map(|&n| n.to_owned()).collect();
        Targets::from(names)
    };
    let is_fused = config.linear_names().contains(&"qkv_proj");
    let qkv = |name: &'static str| if is_fused { "qkv_proj" } else { name };
    let batch = pack(&documents(config, &[7, 4, 11]));
    let plain = weights(config, 3);
    let quant = BnbConfig::qlora(ValueType::F32);
    let base = QuantizeOnLoad::new(config, &plain, &quant);
    let mut factors = LoraConfig::all_linear(3, 6.0);
    factors.target_modules = targets(&["lm_head", "embed_tokens", qkv("k_proj"), "down_proj"]);
    factors.rank_pattern = vec![("embed_tokens".to_owned(), 2), (qkv("k_proj").to_owned(), 5)];
    factors.bias = BiasMode::All;
    let mut whole = LoraConfig::all_linear(2, 6.0);
    whole.target_modules = targets(&[qkv("q_proj")]);
    whole.modules_to_save =
        ["lm_head", "embed_tokens", "input_layernorm"].map(str::to_owned).to_vec();
    whole.bias = BiasMode::LoraOnly;
    let mut tokens = LoraConfig::all_linear(2, 6.0);
    tokens.target_modules = targets(&[qkv("v_proj")]);
    let ids = &documents(config, &[7])[0].0;
    tokens.trainable_tokens.embed_tokens = vec![ids[3], 66];
    if !config.tie_word_embeddings {
        tokens.trainable_tokens.lm_head = vec![66, ids[2], ids[5]];
    }
    for settings in [factors, whole, tokens] {
        let mut adapter = Adapter::init_from(config, settings, &base, 11).unwrap();
        let names: Vec<String> = adapter.tensors.iter().map(|t| t.name.clone()).collect();
        for (n, name) in names.iter().enumerate() {
            let values = &mut adapter.tensors.get_mut(name).unwrap().data;
            for (i, value) in values.iter_mut().enumerate() {
                *value += 0.2 * rng::normal(n as u64, i as u64) as f32;
            }
        }
        let mut decoder = Decoder::load(Reference, config, &base, Training::Frozen).unwrap();
        decoder.attach(&adapter, true).unwrap();
        check(decoder, &batch, names.len());
    }
}
