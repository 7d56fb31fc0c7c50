//! How long a training step takes, and which operators take it.
//!
//! `cargo run --release -p hone-learn --example step_times [tiny|smollm2] [steps] [f32|bf16]`
//! trains from random weights on random tokens: first as it is, then with every operator timed. `tiny` is full
//! training of the quick start's base (hidden 128, 4 layers, vocabulary 2048, 2048 tokens a step);
//! `smollm2` is LoRA of rank 16 on all linear maps in the shape of SmolLM2-135M (4 x 512 tokens).

mod timed;

use std::io::Write;
use std::time::{Duration, Instant};

use hone_kernels::{Backend, Compute, Cpu, rng};
use hone_learn::{AdamWConfig, Learner, OptimizerConfig, ScheduleConfig};
use hone_model::{Adapter, Batch, Decoder, LoraConfig, ModelConfig, Training, init_weights};
use timed::Timed;

/// What is trained.
struct Shape {
    name: &'static str,
    config: &'static str,
    /// Rank of the adapter on all linear maps; `None` trains all weights.
    lora_rank: Option<usize>,
    /// Documents of a step, and tokens of each.
    n_documents: usize,
    n_tokens: usize,
}

const SHAPES: [Shape; 2] = [
    Shape {
        name: "tiny",
        config: r#"{"model_type": "llama", "vocab_size": 2048, "hidden_size": 128,
            "intermediate_size": 320, "num_hidden_layers": 4, "num_attention_heads": 4,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": true, "max_position_embeddings": 512}"#,
        lora_rank: None,
        n_documents: 16,
        n_tokens: 128,
    },
    Shape {
        name: "smollm2",
        config: r#"{"model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
            "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
            "num_key_value_heads": 3, "rms_norm_eps": 1e-5, "rope_theta": 100000,
            "tie_word_embeddings": true, "max_position_embeddings": 8192}"#,
        lora_rank: Some(16),
        n_documents: 4,
        n_tokens: 512,
    },
];

/// Steps before the clock starts: buffers are made in the first.
const WARM_UP: usize = 2;

fn main() -> std::io::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let name = arguments.next().unwrap_or_else(|| "tiny".to_owned());
    let n_steps: usize = arguments.next().and_then(|n| n.parse().ok()).unwrap_or(20);
    let Some(shape) = SHAPES.iter().find(|shape| shape.name == name) else {
        return Err(std::io::Error::other(format!("no shape is named `{name}`")));
    };
    let backend = match arguments.next().as_deref() {
        None | Some("f32") => Cpu::new(),
        Some("bf16") => Cpu::new().with_compute(Compute::Bf16),
        Some(other) => {
            return Err(std::io::Error::other(format!("`{other}` is neither f32 nor bf16")));
        }
    };
    let mut out = std::io::stdout().lock();
    let plain = train(backend, shape, n_steps);
    let tokens = (n_steps * shape.n_documents * shape.n_tokens) as f64;
    let rate = tokens / plain.as_secs_f64();
    let step_ms = plain.as_secs_f64() * 1e3 / n_steps as f64;
    let threads = rayon::current_num_threads();
    writeln!(
        out,
        "{n_steps} steps, {threads} threads: {rate:.0} tokens/s, {step_ms:.1} ms a step"
    )?;

    let timed = train(Timed(backend), shape, n_steps);
    timed::report(&mut out, timed, n_steps)
}

/// Time of `n_steps` steps after the warm-up.
fn train<B: Backend>(backend: B, shape: &Shape, n_steps: usize) -> Duration {
    let config = ModelConfig::from_json(shape.config).expect("the shapes above are valid");
    let mut weights = init_weights(&config, 1);
    // Published models hold their embedding in bf16.
    if let Some(embedding) = weights.get_mut("model.embed_tokens.weight") {
        embedding.data.iter_mut().for_each(|x| *x = Compute::Bf16.round(*x));
    }
    let training = if shape.lora_rank.is_some() { Training::Frozen } else { Training::Full };
    let mut decoder = Decoder::load(backend, &config, &weights, training)
        .expect("the weights were made for the configuration");
    if let Some(rank) = shape.lora_rank {
        let lora = LoraConfig::all_linear(rank, 2.0 * rank as f64);
        let adapter = Adapter::init(&config, lora, 1).expect("every linear map is there");
        decoder.attach(&adapter, true).expect("the adapter was made for the configuration");
    }
    let adamw = AdamWConfig { beta2: 0.95, weight_decay: 0.1, ..Default::default() };
    let optimizer = OptimizerConfig::AdamW(adamw);
    let schedule = ScheduleConfig::constant(1e-3, 1 << 20);
    let mut learner =
        Learner::new(decoder, optimizer, schedule, 0).expect("all weights are trained");
    let batches: Vec<Batch> = (0..4).map(|i| batch(i, shape, config.vocab_size)).collect();
    let mut start = Instant::now();
    for step in 0..WARM_UP + n_steps {
        if step == WARM_UP {
            timed::clear();
            start = Instant::now();
        }
        let batch = &batches[step % batches.len()];
        learner.train_step(std::slice::from_ref(batch)).expect("random tokens can be learnt from");
    }
    start.elapsed()
}

/// Random documents.
fn batch(seed: u64, shape: &Shape, vocab: usize) -> Batch {
    let id = |i: usize| (rng::mix(seed, i as u64) % vocab as u64) as u32;
    let ids: Vec<u32> = (0..shape.n_documents * shape.n_tokens).map(id).collect();
    let lens = vec![shape.n_tokens; shape.n_documents];
    Batch::from_pack(&ids, &vec![1.0; ids.len()], &lens)
        .expect("lengths agree and weights are ones")
}
