//! Fifty steps of small models, on the GPU and on the processor.

use hone_kernels::gpu::Gpu;
use hone_kernels::gpu::cuda::Cuda;
use hone_kernels::quant::ValueType;
use hone_kernels::{Backend, Compute, Cpu, rng};
use hone_learn::{AdamWConfig, Learner, OptimizerConfig, ScheduleConfig};
use hone_model::{
    Adapter, Batch, BnbConfig, Decoder, LoraConfig, ModelConfig, QuantizeOnLoad, TensorSource,
    Training, init_weights,
};

use crate::Check;

const VOCABULARY: usize = 2048;
const N_STEPS: u64 = 50;

/// Tokens of the documents of a step.
const LENS: [usize; 4] = [190, 1, 64, 257];

/// How a model is tuned.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Full,
    Lora,
    Qlora,
}

/// Every way in both arithmetics: losses beside the processor's, and the same bytes twice.
pub(crate) fn run(gpu: &Gpu<Cuda>) -> Vec<Check> {
    let mut checks = Vec::new();
    for compute in [Compute::F32, Compute::Bf16] {
        for way in [Way::Full, Way::Lora, Way::Qlora] {
            checks.push(check(gpu, way, compute));
        }
    }
    checks
}

fn check(gpu: &Gpu<Cuda>, way: Way, compute: Compute) -> Check {
    let name = format!("{N_STEPS} steps, {way:?}, {}", compute.name());
    let bound = if compute == Compute::F32 { 1e-4 } else { 2e-2 };
    let own = train(Cpu::new().with_compute(compute), way);
    let (first, second) =
        (train(gpu.with_compute(compute), way), train(gpu.with_compute(compute), way));
    let (Ok(own), Ok(first), Ok(second)) = (own, first, second) else {
        return Check { name, passed: false, found: "a run failed".to_owned() };
    };
    let pairs = own.iter().zip(&first);
    let apart = pairs.map(|(a, b)| (a - b).abs()).fold(0.0_f64, f64::max);
    let same = first.iter().zip(&second).all(|(a, b)| a.to_bits() == b.to_bits());
    let found = format!(
        "losses {:.3} to {:.3}, at most {apart:.1e} apart of {bound:.0e}; twice the same bytes: {same}",
        own[0],
        own[own.len() - 1]
    );
    Check { name, passed: apart <= bound && same, found }
}

/// The losses of all steps.
fn train<B: Backend>(backend: B, way: Way) -> Result<Vec<f64>, String> {
    let config = ModelConfig::from_json(&format!(
        r#"{{"model_type": "llama", "vocab_size": {VOCABULARY}, "hidden_size": 256,
            "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 64, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": true, "max_position_embeddings": 512}}"#
    ))
    .map_err(|e| e.to_string())?;
    let weights = init_weights(&config, 1);
    let quant = BnbConfig::qlora(ValueType::Bf16);
    let small = QuantizeOnLoad::new(&config, &weights, &quant);
    let source: &dyn TensorSource = if way == Way::Qlora { &small } else { &weights };
    let training = if way == Way::Full { Training::Full } else { Training::Frozen };
    let mut decoder =
        Decoder::load(backend, &config, source, training).map_err(|e| e.to_string())?;
    if way != Way::Full {
        let lora = LoraConfig::all_linear(8, 16.0);
        let adapter = Adapter::init(&config, lora, 1).map_err(|e| e.to_string())?;
        decoder.attach(&adapter, true).map_err(|e| e.to_string())?;
    }
    let optimizer = OptimizerConfig::AdamW(AdamWConfig::default());
    let schedule = ScheduleConfig::constant(1e-3, 1 << 20);
    let mut learner = Learner::new(decoder, optimizer, schedule, 0).map_err(|e| e.to_string())?;
    let mut losses = Vec::new();
    for step in 0..N_STEPS {
        let report = learner.train_step(&[batch(step % 8)]).map_err(|e| e.to_string())?;
        losses.push(report.loss);
    }
    match learner.decoder().backend().take_fault() {
        Some(fault) => Err(fault),
        None => Ok(losses),
    }
}

/// Random documents, two thirds of whose tokens are trained.
fn batch(seed: u64) -> Batch {
    let n: usize = LENS.iter().sum();
    let id = |i: usize| (rng::mix(seed, i as u64) % VOCABULARY as u64) as u32;
    let ids: Vec<u32> = (0..n).map(id).collect();
    let weights: Vec<f32> = (0..n).map(|i| [0.0, 1.0, 0.5][i % 3]).collect();
    Batch::from_pack(&ids, &weights, &LENS).expect("lengths agree")
}
