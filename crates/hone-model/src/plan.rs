//! Bytes that a run will hold, estimated before anything is loaded.

use crate::buffers::{Acts, BackScratch, Dims};
use crate::head::chunk_rows;
use crate::lora::modules;
use crate::{LoraConfig, ModelConfig, QuantSpec, Recompute};

/// Bytes of a value: everything is f32.
const VALUE_BYTES: u64 = 4;

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method<'a> {
    /// Nothing: evaluation and generation.
    Inference,
    /// All weights.
    Full,
    /// An adapter.
    Lora(&'a LoraConfig),
    /// An adapter on linear maps of 4 bits.
    Qlora(&'a LoraConfig, QuantSpec),
}

/// Bytes held during a run, by purpose. The source of the weights (a mapped file) and the program
/// itself are not in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Base weights and adapters.
    pub weights: u64,
    /// Gradients of what is trained.
    pub gradients: u64,
    /// Both moments of AdamW.
    pub moments: u64,
    /// Activations, residual streams and the buffers of the passes.
    pub activations: u64,
    /// The chunk of logits, and the head's other buffers.
    pub head: u64,
}

impl MemoryPlan {
    /// The plan of a run whose largest micro-batch has `n_tokens` tokens.
    pub fn new(
        config: &ModelConfig,
        method: Method<'_>,
        n_tokens: usize,
        recompute: Recompute,
    ) -> Self {
        let dims = Dims::new(config);
        let n_base = config.n_params() as u64;
        let n_adapter = match method {
            Method::Lora(lora) | Method::Qlora(lora, _) => lora.n_params(config),
            _ => 0,
        };
        let n_trained = match method {
            Method::Inference => 0,
            Method::Full => n_base,
            Method::Lora(_) | Method::Qlora(..) => n_adapter,
        };
        let trains = n_trained > 0;
        let n_layers = config.num_hidden_layers;
        let n_streams = if trains { n_layers + 1 } else { 2 };
        let n_acts = if trains && recompute == Recompute::None { n_layers } else { 1 };
        let d = dims.d;
        let mut per_token =
            n_streams * d + n_acts * Acts::<hone_kernels::Cpu>::values_per_token(&dims);
        per_token += dims.i;
        if trains {
            per_token += d + BackScratch::<hone_kernels::Cpu>::values_per_token(&dims);
        }
        if let Method::Lora(lora) | Method::Qlora(lora, _) = method {
            // u and du of the widest group, and the two buffers of dropout.
            let ranks = lora.rank_pattern.iter().map(|&(_, r)| r);
            per_token += 2 * 3 * ranks.fold(lora.r, usize::max);
            // The unscaled output and the scaled gradient of the widest map.
            let widest = dims.heads.qkv_width().max(2 * dims.i).max(d);
            per_token += if lora.use_dora { 2 * widest } else { 0 };
            per_token += if lora.lora_dropout > 0.0 { 2 * d.max(dims.i) } else { 0 };
        }
        let head_width = if trains { 4 * d } else { 2 * d };
        // With a soft cap the backward reads the capped logits beside their gradient.
        let n_chunks = if dims.logit_cap.is_some() { 2 } else { 1 };
        let chunk = chunk_rows(dims.v).min(n_tokens.max(1)) * dims.v;
        let head = n_tokens * head_width + n_chunks * chunk;
        MemoryPlan {
            weights: base_bytes(config, method) + VALUE_BYTES * n_adapter,
            gradients: VALUE_BYTES * n_trained,
            moments: 2 * VALUE_BYTES * n_trained,
            activations: VALUE_BYTES * (per_token * n_tokens) as u64,
            head: VALUE_BYTES * head as u64,
        }
    }

    /// Bytes in all.
    pub fn total(&self) -> u64 {
        self.weights + self.gradients + self.moments + self.activations + self.head
    }

    /// The fastest setting whose plan fits `budget` bytes; `None` when not even recomputing fits.
    pub fn choose_recompute(
        config: &ModelConfig,
        method: Method<'_>,
        n_tokens: usize,
        budget: u64,
    ) -> Option<Recompute> {
        [Recompute::None, Recompute::Layer].into_iter().find(|&recompute| {
            MemoryPlan::new(config, method, n_tokens, recompute).total() <= budget
        })
    }
}

/// Bytes of the base's weights.
fn base_bytes(config: &ModelConfig, method: Method<'_>) -> u64 {
    let full = VALUE_BYTES * config.n_params() as u64;
    let Method::Qlora(_, spec) = method else { return full };
    let sizes = modules(config).map(|(_, shape)| shape.inp * shape.out);
    sizes.fold(full, |bytes, n| bytes - VALUE_BYTES * n as u64 + spec.n_bytes(n) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ValueType;

    #[test]
    fn smollm2_fits_as_counted_by_hand() {
        let text = r#"{"model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
            "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
            "num_key_value_heads": 3, "tie_word_embeddings": true}"#;
        let config = ModelConfig::from_json(text).unwrap();
        let lora = LoraConfig::all_linear(16, 32.0);
        let plan = MemoryPlan::new(&config, Method::Lora(&lora), 2048, Recompute::None);
        assert_eq!(plan.weights, 4 * (134_515_008 + 4_884_480));
        assert_eq!(plan.gradients, 4 * 4_884_480);
        assert_eq!(plan.moments, 2 * plan.gradients);
        // QLoRA: 106,168,320 values of the linear maps in 4 bits, blocks of 64 with double
        // quantisation: 4.127 bits each and a map of 1 KiB for each of 210 matrices.
        let small = Method::Qlora(&lora, QuantSpec::qlora(ValueType::Bf16));
        let small = MemoryPlan::new(&config, small, 2048, Recompute::None);
        let saved = plan.weights - small.weights;
        let bits =
            8.0 * (4.0 - saved as f64 / 106_168_320.0) - 8.0 * 1028.0 * 210.0 / 106_168_320.0;
        assert!((bits - 4.127).abs() < 1e-3, "{bits}");
        assert_eq!(small.gradients, plan.gradients);
        let layer = MemoryPlan::new(&config, Method::Lora(&lora), 2048, Recompute::Layer);
        assert!(layer.activations * 5 < plan.activations, "{layer:?} {plan:?}");
        let choose =
            |budget| MemoryPlan::choose_recompute(&config, Method::Lora(&lora), 2048, budget);
        assert_eq!(choose(plan.total()), Some(Recompute::None));
        assert_eq!(choose(plan.total() - 1), Some(Recompute::Layer));
        assert_eq!(choose(layer.total() - 1), None);
    }
}
