//! A second opinion on the logits: the Llama of candle-transformers.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::llama::{Cache, Config, Llama};
use hone_kernels::Cpu;
use hone_model::{Decoder, ModelConfig, Training};

/// Largest difference of a logit.
const BOUND: f64 = 1e-5;

#[test]
fn logits_are_those_of_candle() {
    for (tied, n_kv) in [(true, 4), (false, 2), (true, 1)] {
        let text = format!(
            r#"{{"model_type": "llama", "vocab_size": 67, "hidden_size": 32,
                "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": {n_kv},
                "tie_word_embeddings": {tied}, "max_position_embeddings": 64,
                "rope_theta": 5000.0, "initializer_range": 0.2}}"#
        );
        let config = ModelConfig::from_json(&text).unwrap();
        let weights = weights(&config, 8);
        let mut decoder = Decoder::load(Cpu::new(), &config, &weights, Training::Frozen).unwrap();
        let theirs = Config {
            hidden_size: 32,
            intermediate_size: 48,
            vocab_size: 67,
            num_hidden_layers: 3,
            num_attention_heads: 4,
            num_key_value_heads: n_kv,
            use_flash_attn: false,
            rms_norm_eps: config.rms_norm_eps,
            rope_theta: 5000.0,
            bos_token_id: None,
            eos_token_id: None,
            rope_scaling: None,
            max_position_embeddings: 64,
            tie_word_embeddings: tied,
        };
        let tensors = weights.iter().map(|t| {
            let tensor = Tensor::from_slice(&t.data, t.shape.as_slice(), &Device::Cpu).unwrap();
            (t.name.clone(), tensor)
        });
        let vars = VarBuilder::from_tensors(tensors.collect(), DType::F32, &Device::Cpu);
        let llama = Llama::load(vars, &theirs).unwrap();
        for document in documents(&config, &[1, 9, 40]) {
            let batch = pack(std::slice::from_ref(&document));
            let found = decoder.logits(&batch, &[document.0.len() as u32 - 1]).unwrap();
            // Their forward gives the logits of the last position.
            let mut cache = Cache::new(false, DType::F32, &theirs, &Device::Cpu).unwrap();
            let ids = Tensor::new(document.0.as_slice(), &Device::Cpu).unwrap();
            let logits = llama.forward(&ids.unsqueeze(0).unwrap(), 0, &mut cache).unwrap();
            let expected: Vec<f32> = logits.flatten_all().unwrap().to_vec1().unwrap();
            let off = distance(&found, &expected);
            assert!(off <= BOUND, "{} tokens: {off:e}", document.0.len());
        }
    }
}
