//! Greedy decoding with candle-transformers' Llama and its cache.
//!
//!   decode MODEL_DIR PROMPTS.json N_NEW f32|f16 [REPEATS]
//!
//! PROMPTS.json and the JSON line printed are those of `peers/torch_generate.py`.

use std::time::Instant;

use bench_candle::{Failure, ids, json};
use candle_core::{D, DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::llama::{Cache, Config, Llama, LlamaConfig};

/// New tokens of every prompt; prompts have one length.
fn generate(
    model: &Llama,
    config: &Config,
    dtype: DType,
    prompts: &[Vec<u32>],
    n_new: usize,
) -> candle_core::Result<Vec<Vec<u32>>> {
    let mut cache = Cache::new(true, dtype, config, &Device::Cpu)?;
    let mut next = Tensor::new(prompts.to_vec(), &Device::Cpu)?;
    let (mut at, mut new) = (0, vec![Vec::new(); prompts.len()]);
    for _ in 0..n_new {
        let logits = model.forward(&next, at, &mut cache)?;
        at += next.dim(1)?;
        next = logits.argmax(D::Minus1)?.unsqueeze(1)?;
        for (ids, row) in new.iter_mut().zip(next.to_vec2::<u32>()?) {
            ids.push(row[0]);
        }
    }
    Ok(new)
}

fn main() -> Result<(), Failure> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [dir, prompts, n_new, dtype, rest @ ..] = &args[..] else {
        return Err("usage: decode MODEL_DIR PROMPTS.json N_NEW f32|f16 [REPEATS]".into());
    };
    let dtype = match dtype.as_str() {
        "f32" => DType::F32,
        "f16" => DType::F16,
        other => return Err(format!("`{other}` is neither f32 nor f16").into()),
    };
    let repeats: usize = rest.first().map_or(Ok(3), |n| n.parse())?;
    let list = json(prompts)?;
    let prompts = list.as_array().ok_or("no list of prompts")?;
    let prompts = prompts.iter().map(ids).collect::<Result<Vec<_>, _>>()?;
    let mut settings = json(&format!("{dir}/config.json"))?;
    // Newer files have it in `rope_parameters`, which candle does not read.
    if settings.get("rope_theta").is_none() {
        settings["rope_theta"] = settings["rope_parameters"]["rope_theta"].clone();
    }
    let config = serde_json::from_value::<LlamaConfig>(settings)?.into_config(false);
    // Read, not mapped: mapping is unsafe, and the file is read whole on the other sides too.
    let weights = std::fs::read(format!("{dir}/model.safetensors"))?;
    let builder = VarBuilder::from_buffered_safetensors(weights, dtype, &Device::Cpu)?;
    let model = Llama::load(builder, &config)?;
    let (mut first, mut whole, mut new) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..repeats {
        let begun = Instant::now();
        generate(&model, &config, dtype, &prompts, 1)?;
        first.push(begun.elapsed().as_secs_f64());
        let begun = Instant::now();
        new = generate(&model, &config, dtype, &prompts, n_new.parse()?)?;
        whole.push(begun.elapsed().as_secs_f64());
    }
    let report = serde_json::json!({"first_s": first, "whole_s": whole, "ids": new});
    println!("{report}");
    Ok(())
}
