//! How fast tokens are generated, and which operators take the time.
//!
//! `cargo run --release -p hone-learn --example decode_times [batch] [f32|bf16] [whole|4bit] [new]
//! [directory]` continues `batch` prompts of 37 random tokens by `new` greedy ones: first as it is,
//! then with every operator timed. The model has the shape of SmolLM2-135M and random weights, or is
//! that of `directory`. Reading the prompts is timed by itself: generating one token is that and no
//! step. Say `RAYON_NUM_THREADS=1` for one thread.

mod timed;

use std::fs::File;
use std::io::{self, Error, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use hone_kernels::quant::ValueType;
use hone_kernels::{Backend, Compute, Cpu, mapping, rng};
use hone_model::{
    BnbConfig, Decoder, Generator, ModelConfig, QuantizeOnLoad, SafetensorsRegions, TensorSource,
    Tensors, Training, init_weights,
};
use timed::Timed;

const CONFIG: &str = r#"{"model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
    "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "rms_norm_eps": 1e-5, "rope_theta": 100000,
    "tie_word_embeddings": true, "max_position_embeddings": 8192}"#;

/// Tokens of a prompt.
const PROMPT: usize = 37;

/// Times that the whole is done; the fastest counts.
const ROUNDS: usize = 3;

fn main() -> io::Result<()> {
    // Inside the pool, where generating runs: times are kept by thread.
    rayon::scope(|_| run())
}

fn run() -> io::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let batch: usize = arguments.next().and_then(|n| n.parse().ok()).unwrap_or(1);
    let backend = match arguments.next().as_deref() {
        None | Some("f32") => Cpu::new(),
        Some("bf16") => Cpu::new().with_compute(Compute::Bf16),
        Some(other) => return Err(Error::other(format!("`{other}` is neither f32 nor bf16"))),
    };
    let in_4_bits = arguments.next().as_deref() == Some("4bit");
    let n_new = arguments.next().and_then(|n| n.parse().ok()).unwrap_or(128_usize).max(2);
    let directory = arguments.next();
    let mut out = io::stdout().lock();
    let (config, mapped) = match &directory {
        None => (ModelConfig::from_json(CONFIG).map_err(Error::other)?, None),
        Some(path) => {
            let path = Path::new(path);
            let text = std::fs::read_to_string(path.join("config.json"))?;
            let mapped = mapping::map(&File::open(path.join("model.safetensors"))?)?;
            (ModelConfig::from_json(&text).map_err(Error::other)?, Some(mapped))
        }
    };
    let source: Box<dyn TensorSource> = match &mapped {
        None => Box::new(random(&config)),
        Some(bytes) => Box::new(SafetensorsRegions::new(&[bytes.as_ref()]).map_err(Error::other)?),
    };
    let quant = BnbConfig::qlora(ValueType::Bf16);
    let small = QuantizeOnLoad::new(&config, &*source, &quant);
    let source = if in_4_bits { &small as &dyn TensorSource } else { &*source };
    let id = |i: usize| (rng::mix(7, i as u64) % config.vocab_size as u64) as u32;
    let prompt = |b: usize| (0..PROMPT).map(|i| id(b * PROMPT + i)).collect();
    let prompts: Vec<Vec<u32>> = (0..batch).map(prompt).collect();

    let (prefill, decode) = times(backend, &config, source, &prompts, n_new)?;
    let (n_read, n_written) = ((batch * PROMPT) as f64, (batch * (n_new - 1)) as f64);
    let threads = rayon::current_num_threads();
    writeln!(
        out,
        "batch {batch}, {threads} threads: {:.0} tokens/s read, {:.1} tokens/s written, {:.3} ms \
         a step",
        n_read / prefill.as_secs_f64(),
        n_written / decode.as_secs_f64(),
        decode.as_secs_f64() * 1e3 / (n_new - 1) as f64
    )?;
    let (_, decode) = times(Timed(backend), &config, source, &prompts, n_new)?;
    timed::report(&mut out, decode, n_new - 1)
}

/// Random weights, of the embedding in bf16 as published models have it.
fn random(config: &ModelConfig) -> Tensors {
    let mut weights = init_weights(config, 1);
    if let Some(embedding) = weights.get_mut("model.embed_tokens.weight") {
        embedding.data.iter_mut().for_each(|x| *x = Compute::Bf16.round(*x));
    }
    weights
}

/// The least times of reading the prompts with the first token, and of all further tokens. What is
/// timed by operator are the further tokens of the last round.
fn times<B: Backend>(
    backend: B,
    config: &ModelConfig,
    source: &dyn TensorSource,
    prompts: &[Vec<u32>],
    n_new: usize,
) -> io::Result<(Duration, Duration)> {
    let mut decoder =
        Decoder::load(backend, config, source, Training::Frozen).map_err(Error::other)?;
    let mut run = |n_new: usize| {
        let generator = Generator { batch_size: prompts.len(), ..Generator::greedy(n_new, &[]) };
        let start = Instant::now();
        generator.run(&mut decoder, prompts).map_err(Error::other)?;
        Ok::<_, Error>(start.elapsed())
    };
    let (mut prefill, mut decode) = (Duration::MAX, Duration::MAX);
    for _ in 0..ROUNDS {
        timed::clear();
        prefill = prefill.min(run(1)?);
        timed::negate();
        decode = decode.min(run(n_new)?);
    }
    Ok((prefill, decode.saturating_sub(prefill)))
}
