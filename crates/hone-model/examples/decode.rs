//! How fast prompts are continued, greedily, and with what.
//!
//! `cargo run --release -p hone-model --example decode -- MODEL_DIR PROMPTS.json N_NEW f32|bf16 [REPEATS]`
//! takes a list of prompts, each a list of ids, and prints one JSON line: the seconds to the first new
//! token and to the last of each repeat, and the new ids. No token ends a sequence. `just bench` lays it
//! beside other decoders; `RAYON_NUM_THREADS` sets the threads.

use std::error::Error;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::Instant;

use hone_kernels::{Backend, Cpu, mapping};
use hone_model::{
    BnbConfig, BnbRegions, Compute, Decoder, Generation, Generator, ModelError, Training,
};
use serde_json::{Value, json};

type Failure = Box<dyn Error + Send + Sync>;

fn load(dir: &Path, compute: Compute) -> Result<Decoder<Cpu>, Failure> {
    let text = fs::read_to_string(dir.join("config.json"))?;
    let (config, _) = BnbConfig::read_model_config(&text)?;
    let map = mapping::map(&File::open(dir.join("model.safetensors"))?)?;
    let source = BnbRegions::new(&[map.as_ref()])?;
    Ok(Decoder::load(Cpu::new().with_compute(compute), &config, &source, Training::Frozen)?)
}

fn ids(prompt: &Value) -> Option<Vec<u32>> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    prompt.as_array()?.iter().map(id).collect()
}

fn main() -> Result<(), Failure> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [dir, prompts, n_new, compute, rest @ ..] = &args[..] else {
        return Err("usage: decode MODEL_DIR PROMPTS.json N_NEW f32|bf16 [REPEATS]".into());
    };
    let compute = match compute.as_str() {
        "f32" => Compute::F32,
        "bf16" => Compute::Bf16,
        other => return Err(format!("`{other}` is neither f32 nor bf16").into()),
    };
    let n_new: usize = n_new.parse()?;
    let repeats: usize = rest.first().map_or(Ok(3), |n| n.parse())?;
    let list: Value = serde_json::from_slice(&fs::read(prompts)?)?;
    let prompts = list.as_array().and_then(|list| list.iter().map(ids).collect());
    let prompts: Vec<Vec<u32>> = prompts.ok_or("the prompts are no lists of ids")?;
    let mut decoder = load(Path::new(dir), compute)?;
    let mut run = |max_new: usize| -> Result<(f64, Vec<Generation>), ModelError> {
        let begun = Instant::now();
        let new = Generator::greedy(max_new, &[]).run(&mut decoder, &prompts)?;
        Ok((begun.elapsed().as_secs_f64(), new))
    };
    let (mut first, mut whole, mut new) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..repeats {
        first.push(run(1)?.0);
        let (seconds, generations) = run(n_new)?;
        whole.push(seconds);
        new = generations.into_iter().map(|generation| generation.ids).collect();
    }
    let report = json!({"first_s": first, "whole_s": whole, "ids": new});
    writeln!(std::io::stdout(), "{report}")?;
    Ok(())
}
