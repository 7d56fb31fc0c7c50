//! Whole trainings and generations on the GPU backend, its kernels run on the CPU, beside the processor's own.

#![cfg(not(no_simulator))]

use hone_kernels::gpu::Gpu;
use hone_kernels::quant::ValueType;
use hone_kernels::{Backend, Compute, Cpu, rng};
use hone_learn::{AdamWConfig, Learner, OptimizerConfig, ScheduleConfig};
use hone_model::{
    Adapter, Batch, BnbConfig, Decoder, Generator, LoraConfig, ModelConfig, QuantizeOnLoad,
    Targets, TensorSource, Training, init_weights,
};
use hone_sim::{Schedule, Sim};

const VOCABULARY: usize = 61;

/// Steps of a training.
const N_STEPS: u64 = 4;

/// A model of two layers with grouped heads and a tied head, and what is said besides.
fn config(more: &str) -> ModelConfig {
    let text = format!(
        r#"{{"vocab_size": {VOCABULARY}, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 16, "tie_word_embeddings": true, "initializer_range": 0.2, {more}}}"#
    );
    ModelConfig::from_json(&text).expect("the text above is a configuration")
}

/// How a model is tuned.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Full,
    Lora,
    Qlora,
}

/// A decoder on a backend, as it is when training begins.
fn decoder<B: Backend>(backend: B, config: &ModelConfig, way: Way) -> Decoder<B> {
    let weights = init_weights(config, 1);
    let quant = BnbConfig::qlora(ValueType::Bf16);
    let small = QuantizeOnLoad::new(config, &weights, &quant);
    let source: &dyn TensorSource = if way == Way::Qlora { &small } else { &weights };
    let training = if way == Way::Full { Training::Full } else { Training::Frozen };
    let mut decoder = Decoder::load(backend, config, source, training).expect("a whole model");
    if way != Way::Full {
        let mut lora = LoraConfig::all_linear(4, 8.0);
        lora.target_modules = Targets::AllLinear;
        lora.lora_dropout = 0.1;
        let adapter = Adapter::init(config, lora, 1).expect("every linear map is there");
        decoder.attach(&adapter, true).expect("the adapter was made for the configuration");
    }
    decoder
}

/// Documents of several lengths, of which some tokens are trained.
fn batch(seed: u64) -> Batch {
    let lens = [11, 1, 30, 22];
    let n: usize = lens.iter().sum();
    let id = |i: usize| (rng::mix(seed, i as u64) % VOCABULARY as u64) as u32;
    let ids: Vec<u32> = (0..n).map(id).collect();
    let weights: Vec<f32> = (0..n).map(|i| [0.0, 1.0, 0.5][i % 3]).collect();
    Batch::from_pack(&ids, &weights, &lens).expect("lengths agree")
}

/// Losses and gradient norms of the steps, and the bytes of what was learned.
fn train<B: Backend>(backend: B, config: &ModelConfig, way: Way) -> (Vec<[f64; 2]>, Vec<u32>) {
    let optimizer = OptimizerConfig::AdamW(AdamWConfig::default());
    let schedule = ScheduleConfig::constant(1e-2, 1 << 20);
    let decoder = decoder(backend, config, way);
    let mut learner = Learner::new(decoder, optimizer, schedule, 3).expect("something is trained");
    let mut seen = Vec::new();
    for step in 0..N_STEPS {
        let batches = [batch(2 * step), batch(2 * step + 1)];
        let report = learner.train_step(&batches).expect("random tokens can be learnt from");
        seen.push([report.loss, report.grad_norm]);
    }
    assert_eq!(learner.decoder().backend().take_fault(), None);
    let trained = learner.decoder().trained();
    let names: Vec<String> = trained.iter().map(|tensor| tensor.name.clone()).collect();
    let bits = names.iter().filter_map(|name| trained.get(name));
    (seen, bits.flat_map(|tensor| tensor.data.iter().map(|x| x.to_bits())).collect())
}

/// Trains on the processor and on the simulated GPU; losses and norms of gradients are within `bound` of
/// each other, and those of the GPU have the same bytes under any order of its threads.
fn check(more: &str, way: Way, compute: Compute, bound: f64) {
    let config = config(more);
    let gpu = |schedule| Gpu::new(Sim::new(schedule)).with_compute(compute);
    let (own, _) = train(Cpu::new().with_compute(compute), &config, way);
    let (found, bits) = train(gpu(Schedule::Forward), &config, way);
    for (step, (own, found)) in own.iter().zip(&found).enumerate() {
        for (a, b) in own.iter().zip(found) {
            let apart = (a - b).abs() / a.abs().max(1.0);
            assert!(apart <= bound, "{more} {way:?} {compute:?}, step {step}: {a} and {b}");
        }
    }
    let (_, again) = train(gpu(Schedule::Shuffled(5)), &config, way);
    assert!(bits == again, "{more} {way:?} {compute:?}: other bytes in another order of threads");
}

/// Families that differ in their operators.
const LLAMA: &str = r#""model_type": "llama""#;
const GEMMA: &str = r#""model_type": "gemma2", "sliding_window": 9, "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 4.0"#;
const QWEN: &str = r#""model_type": "qwen3""#;

#[test]
fn trainings_in_f32_are_those_of_the_processor() {
    check(LLAMA, Way::Full, Compute::F32, 2e-5);
    check(GEMMA, Way::Lora, Compute::F32, 2e-5);
    check(QWEN, Way::Lora, Compute::F32, 2e-5);
    check(LLAMA, Way::Qlora, Compute::F32, 2e-5);
}

#[test]
fn trainings_in_bf16_are_near_those_of_the_processor() {
    check(LLAMA, Way::Full, Compute::Bf16, 2e-2);
    check(LLAMA, Way::Lora, Compute::Bf16, 2e-2);
    check(GEMMA, Way::Qlora, Compute::Bf16, 2e-2);
}

#[test]
fn texts_are_those_of_the_processor() {
    let prompts: Vec<Vec<u32>> = vec![vec![3, 1, 4, 1, 5], vec![9, 2, 6], vec![5; 17]];
    for (more, way) in [(LLAMA, Way::Lora), (GEMMA, Way::Lora), (QWEN, Way::Qlora)] {
        let config = config(more);
        let generator = Generator::greedy(12, &[7]);
        let mut own = decoder(Cpu::new(), &config, way);
        let mut gpu = decoder(Gpu::new(Sim::new(Schedule::Backward)), &config, way);
        let own = generator.run(&mut own, &prompts).expect("prompts fit");
        assert_eq!(own, generator.run(&mut gpu, &prompts).expect("prompts fit"), "{more}");
    }
}
