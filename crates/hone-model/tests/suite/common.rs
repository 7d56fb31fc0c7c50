//! Small models and rows for the tests.

use hone_kernels::{Backend, Cpu, rng};
use hone_model::{
    Adapter, Batch, Decoder, LoraConfig, ModelConfig, Tensors, Training, init_weights,
};

/// A configuration: grouped heads whose width is not D / H, biases and an own head where `odd`.
pub(crate) fn config(odd: bool) -> ModelConfig {
    let (tied, bias) = (!odd, odd);
    let text = format!(
        r#"{{"model_type": "llama", "vocab_size": 67, "hidden_size": 20, "intermediate_size": 36,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 6, "tie_word_embeddings": {tied}, "attention_bias": {bias},
            "mlp_bias": {bias}, "max_position_embeddings": 64, "initializer_range": 0.3}}"#
    );
    ModelConfig::from_json(&text).unwrap()
}

/// Random weights whose norms are not ones and whose biases are not zeros.
pub(crate) fn weights(config: &ModelConfig, seed: u64) -> Tensors {
    let mut tensors = init_weights(config, seed);
    let names: Vec<String> = tensors.iter().map(|t| t.name.clone()).collect();
    for name in names {
        let tensor = tensors.get_mut(&name).unwrap();
        if tensor.shape.len() == 1 {
            for (i, value) in tensor.data.iter_mut().enumerate() {
                *value += 0.2 * rng::normal(seed ^ 99, i as u64) as f32;
            }
        }
    }
    tensors
}

pub(crate) fn decoder<B: Backend>(
    backend: B,
    config: &ModelConfig,
    training: Training,
) -> Decoder<B> {
    Decoder::load(backend, config, &weights(config, 3), training).unwrap()
}

/// An adapter whose B is not zero.
pub(crate) fn adapter(config: &ModelConfig, lora: LoraConfig) -> Adapter {
    let mut adapter = Adapter::init(config, lora, 11).unwrap();
    let names: Vec<String> = adapter.tensors.iter().map(|t| t.name.clone()).collect();
    for (n, name) in names.iter().enumerate() {
        let tensor = adapter.tensors.get_mut(name).unwrap();
        if name.contains("lora_B") {
            for (i, value) in tensor.data.iter_mut().enumerate() {
                *value = 0.3 * rng::normal(n as u64, i as u64) as f32;
            }
        }
    }
    adapter
}

/// Documents of the given lengths, with weights 0, 1/2 and 1.
pub(crate) fn documents(config: &ModelConfig, lens: &[usize]) -> Vec<(Vec<u32>, Vec<f32>)> {
    let document = |(n, &len): (usize, &usize)| {
        let draw = |i: usize| rng::mix(n as u64 + 50, i as u64);
        let ids = (0..len).map(|i| (draw(i) % config.vocab_size as u64) as u32).collect();
        let weights = (0..len).map(|i| (draw(i + 1000) % 3) as f32 / 2.0).collect();
        (ids, weights)
    };
    lens.iter().enumerate().map(document).collect()
}

/// One batch of all documents.
pub(crate) fn pack(documents: &[(Vec<u32>, Vec<f32>)]) -> Batch {
    let mut batch = Batch::new();
    for (ids, weights) in documents {
        batch.push(ids, weights).unwrap();
    }
    batch
}

/// Every position of a batch.
pub(crate) fn every_row(batch: &Batch) -> Vec<u32> {
    (0..batch.n_tokens() as u32).collect()
}

/// Largest absolute difference.
pub(crate) fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max)
}

/// Largest difference of two sets of tensors, each over the first's largest value.
pub(crate) fn relative_distance(a: &Tensors, b: &Tensors) -> f64 {
    assert_eq!(a.len(), b.len());
    let one = |t: &hone_model::NamedTensor| {
        let largest = t.data.iter().fold(1e-30_f32, |m, v| m.max(v.abs()));
        distance(&t.data, &b.get(&t.name).unwrap().data) / f64::from(largest)
    };
    a.iter().map(one).fold(0.0, f64::max)
}

/// Checks that the logits of a document alone are those of the document in a pack.
pub(crate) fn check_alone(config: &ModelConfig, lens: &[usize], bound: f64, what: &str) {
    let mut decoder = decoder(Cpu::new(), config, Training::Frozen);
    let documents = documents(config, lens);
    let packed = pack(&documents);
    let logits = decoder.logits(&packed, &every_row(&packed)).unwrap();
    let mut start = 0;
    for document in &documents {
        let alone = pack(std::slice::from_ref(document));
        let expected = decoder.logits(&alone, &every_row(&alone)).unwrap();
        let end = start + expected.len();
        let off = distance(&logits[start..end], &expected);
        assert!(off <= bound, "{what}, a document of {}: {off:e}", document.0.len());
        start = end;
    }
    assert_eq!(start, logits.len());
}
