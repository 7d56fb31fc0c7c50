//! What each level of recomputation holds and how long its steps take.
//!
//! `cargo run --release -p hone-learn --example recompute_levels [full|lora] [document] [rounds]`
//! trains the shape of SmolLM2-135M from random weights on 1024 random tokens a step, cut into
//! documents of the given length, by each level in turn. What a round says of a level is its time
//! over that of the first level in the same round: the machine's speed changes from round to round.

use std::io::Write;
use std::time::{Duration, Instant};

use hone_kernels::{Cpu, rng};
use hone_model::{
    Adapter, Batch, Decoder, LoraConfig, ModelConfig, Recompute, Training, init_weights,
};

const CONFIG: &str = r#"{"model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
    "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "rms_norm_eps": 1e-5, "rope_theta": 100000,
    "tie_word_embeddings": true, "max_position_embeddings": 8192}"#;

/// Tokens of a step.
const N_TOKENS: usize = 1024;

fn main() -> std::io::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let is_full = arguments.next().is_some_and(|method| method == "full");
    let document: usize = arguments.next().and_then(|n| n.parse().ok()).unwrap_or(N_TOKENS);
    let n_rounds: usize = arguments.next().and_then(|n| n.parse().ok()).unwrap_or(3);
    let mut decoder = decoder(is_full);
    let batch = batch(document, decoder.config().vocab_size);
    let mut out = std::io::stdout().lock();
    let names: Vec<String> = Recompute::ALL.iter().map(|level| format!("{level:?}")).collect();
    writeln!(out, "documents of {document}: {}", names.join(", "))?;
    for level in Recompute::ALL {
        decoder.set_recompute(level);
        decoder.reserve(N_TOKENS);
        let bytes = decoder.held_bytes().activations as f64;
        writeln!(out, "{level:?}: activations {:.1} MB", bytes / 1e6)?;
    }
    for _ in 0..n_rounds {
        let times = Recompute::ALL.map(|level| time(&mut decoder, level, &batch));
        let seconds = times.map(|time| time.as_secs_f64());
        let parts: Vec<String> =
            seconds.iter().map(|s| format!("{s:.2} s ({:.3})", s / seconds[0])).collect();
        writeln!(out, "{}", parts.join(", "))?;
    }
    Ok(())
}

/// Time of a forward and a backward, its buffers being made.
fn time(decoder: &mut Decoder<Cpu>, level: Recompute, batch: &Batch) -> Duration {
    let pass = |decoder: &mut Decoder<Cpu>| {
        let scale = 1.0 / N_TOKENS as f32;
        decoder.accumulate(batch, scale, Some(1)).expect("the batch fits the model");
    };
    decoder.set_recompute(level);
    // The first pass touches fresh memory.
    pass(decoder);
    let start = Instant::now();
    pass(decoder);
    start.elapsed()
}

fn decoder(is_full: bool) -> Decoder<Cpu> {
    let config = ModelConfig::from_json(CONFIG).expect("the shape above is valid");
    let weights = init_weights(&config, 1);
    let training = if is_full { Training::Full } else { Training::Frozen };
    let mut decoder = Decoder::load(Cpu::new(), &config, &weights, training)
        .expect("the weights were made for the configuration");
    if !is_full {
        let lora = LoraConfig::all_linear(16, 32.0);
        let adapter = Adapter::init(&config, lora, 1).expect("every linear map is there");
        decoder.attach(&adapter, true).expect("the adapter was made for the configuration");
    }
    decoder
}

/// Random documents.
fn batch(document: usize, vocab: usize) -> Batch {
    let id = |i: usize| (rng::mix(7, i as u64) % vocab as u64) as u32;
    let ids: Vec<u32> = (0..N_TOKENS).map(id).collect();
    let lens: Vec<usize> = ids.chunks(document).map(<[u32]>::len).collect();
    Batch::from_pack(&ids, &vec![1.0; ids.len()], &lens)
        .expect("lengths agree and weights are ones")
}
