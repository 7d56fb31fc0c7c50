//! Whole runs: the same bytes for any number of threads and after any stop, refusals, the
//! self-test.

use hone_kernels::{Backend, Cpu, Reference, rng};
use hone_learn::{
    AdamWConfig, Convention, LearnError, Learner, OptimizerConfig, Recipe, ScheduleConfig,
    ScheduleKind, Warmup,
};
use hone_model::{
    Adapter, Batch, BnbConfig, CpuDecoder, Decoder, Generator, InitMethod, LoraConfig, Merge,
    ModelConfig, QuantizeOnLoad, StoredType, Targets, TensorSource, Tensors, TokenRows, Training,
    ValueType, init_weights,
};

/// Wide enough that products and attention are cut into several blocks.
fn config() -> ModelConfig {
    let text = r#"{"model_type": "llama", "vocab_size": 301, "hidden_size": 96,
        "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2, "tie_word_embeddings": true, "max_position_embeddings": 256,
        "initializer_range": 0.1}"#;
    ModelConfig::from_json(text).unwrap()
}

fn decoder(lora: bool) -> CpuDecoder {
    let config = config();
    let weights = init_weights(&config, 4);
    if !lora {
        return Decoder::load(Cpu::new(), &config, &weights, Training::Full).unwrap();
    }
    let mut decoder = Decoder::load(Cpu::new(), &config, &weights, Training::Frozen).unwrap();
    let mut settings = LoraConfig::all_linear(8, 16.0);
    settings.lora_dropout = 0.1;
    decoder.attach(&Adapter::init(&config, settings, 2).unwrap(), true).unwrap();
    decoder
}

fn schedule() -> ScheduleConfig {
    ScheduleConfig {
        kind: ScheduleKind::Linear,
        lr: 3e-3,
        warmup: Warmup::Steps(2),
        min_lr_ratio: 0.1,
        n_steps: 12,
        convention: Convention::Transformers,
    }
}

fn learner(lora: bool) -> Learner<Cpu> {
    let adamw = AdamWConfig { weight_decay: 0.1, ..Default::default() };
    Learner::new(decoder(lora), OptimizerConfig::AdamW(adamw), schedule(), 9).unwrap()
}

/// Two ragged micro-batches of step `step`.
fn batches(step: u64) -> [Batch; 2] {
    [0, 1].map(|micro| {
        let mut batch = Batch::new();
        for (n, len) in [70, 3, 130, 1, 41].into_iter().enumerate() {
            let draw = |i: usize| rng::mix(step * 100 + micro * 10 + n as u64, i as u64);
            // A token follows its predecessor by a rule, so that there is something to learn.
            let first = draw(0) % 301;
            let ids: Vec<u32> = (0..len as u64).map(|i| ((first + 7 * i) % 301) as u32).collect();
            let weights: Vec<f32> = (0..len).map(|i| (draw(i + 1) % 3) as f32 / 2.0).collect();
            batch.push(&ids, &weights).unwrap();
        }
        batch
    })
}

/// Steps `from` to `to`; returns their losses.
fn run<B: Backend>(learner: &mut Learner<B>, from: u64, to: u64) -> Vec<f64> {
    (from..to).map(|step| learner.train_step(&batches(step)).unwrap().loss).collect()
}

fn bytes(tensors: &Tensors) -> Vec<u8> {
    tensors.to_safetensors(StoredType::F32).unwrap()
}

#[test]
fn the_loss_of_rows_seen_again_falls() {
    for (lora, at_least) in [(false, 0.5), (true, 0.1)] {
        let mut learner = learner(lora);
        let mut losses = (0..12).map(|_| learner.train_step(&batches(0)).unwrap().loss);
        let (first, last) = (losses.next().unwrap(), losses.last().unwrap());
        assert!(last < first - at_least, "lora {lora}: {first} to {last}");
    }
}

#[test]
fn a_resumed_run_is_the_straight_run() {
    for lora in [false, true] {
        let mut straight = learner(lora);
        let losses = run(&mut straight, 0, 10);
        let mut first = learner(lora);
        assert_eq!(run(&mut first, 0, 5), losses[..5]);
        let (tensors, json) = first.state();
        // As a checkpoint does: through files' bytes.
        let tensors = Tensors::from_safetensors(&[&bytes(&tensors)]).unwrap();
        let json = serde_json::from_str(&json.to_string()).unwrap();
        let mut second = learner(lora);
        // A step under way is forgotten.
        second.accumulate(&batches(3)[0], 1.0).unwrap();
        second.restore(&tensors, &json).unwrap();
        assert_eq!(second.step(), 5);
        assert_eq!(run(&mut second, 5, 10), losses[5..]);
        assert_eq!(bytes(&second.state().0), bytes(&straight.state().0));
        assert_eq!(bytes(&second.decoder().export()), bytes(&straight.decoder().export()));
    }
}

#[test]
fn states_of_other_runs_are_refused() {
    let mut learner = learner(true);
    let (tensors, json) = learner.state();
    let mut check = |tensors: &Tensors, json: &serde_json::Value, expected: &str| {
        let message = learner.restore(tensors, json).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    };
    check(&tensors, &serde_json::json!({"version": 2, "step": 1}), "its version is not 1");
    check(&tensors, &serde_json::json!({"version": 1}), "no step");
    check(&self::learner(false).state().0, &json, "tensors, this run has");
    let name = tensors.iter().next().unwrap().name.clone();
    let mut lacking = tensors.clone();
    let mut tensor = lacking.remove(&name).unwrap();
    check(&lacking, &json, "83 tensors, this run has 84");
    tensor.data[0] = f32::INFINITY;
    lacking.insert(tensor.clone());
    check(&lacking, &json, "not finite");
    tensor.shape.reverse();
    lacking.insert(tensor);
    check(&lacking, &json, "has shape");
}

#[test]
fn any_number_of_threads_gives_the_same_bytes() {
    let all = |lora: bool| {
        let mut learner = learner(lora);
        let losses = run(&mut learner, 0, 3);
        let evaluation = learner.evaluate(&batches(20)).unwrap().unwrap();
        let prompts: Vec<Vec<u32>> = (1..6).map(|n| (0..n * 9).collect()).collect();
        let sampled = Generator::sampled(20, &[7], 1.0, 0.95, 3);
        let ids = sampled.run(learner.decoder_mut(), &prompts).unwrap();
        (losses, evaluation, ids, bytes(&learner.state().0))
    };
    for lora in [false, true] {
        let with = |n: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
            pool.install(|| all(lora))
        };
        let one = with(1);
        for n in [2, 3, 8] {
            assert!(with(n) == one, "{n} threads");
        }
    }
}

#[test]
fn the_self_test_knows_what_must_be_zero() {
    for lora in [false, true] {
        let mut learner = learner(lora);
        let micro = batches(0);
        let weight = micro.iter().map(Batch::weight).sum();
        assert!(!learner.self_test().passed(), "there are no gradients yet");
        for step in 0..4 {
            for batch in &micro {
                learner.accumulate(batch, weight).unwrap();
            }
            let test = learner.self_test();
            assert!(test.passed(), "step {step}: {:?}", test.failures().collect::<Vec<_>>());
            // B is zero until the first update with a rate above 0, which is step 1.
            let n_zero = test.rows.iter().filter(|row| row.expects_zero).count();
            assert_eq!(n_zero, if lora && step < 2 { 14 } else { 0 });
            assert_eq!(test.rows.len(), if lora { 28 } else { 20 });
            assert_eq!(test.n_frozen > 0, lora);
            learner.apply().unwrap();
        }
    }
}

/// SmolLM3 with biases: the second layer has no rotary positions.
fn biased() -> (ModelConfig, Tensors) {
    let text = r#"{"model_type": "smollm3", "vocab_size": 301, "hidden_size": 48,
        "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "attention_bias": true, "no_rope_layers": [1, 0, 1],
        "max_position_embeddings": 256, "initializer_range": 0.1}"#;
    let config = ModelConfig::from_json(text).unwrap();
    let mut weights = init_weights(&config, 4);
    let names: Vec<String> = weights.iter().map(|t| t.name.clone()).collect();
    for name in names.iter().filter(|name| name.ends_with(".bias")) {
        let bias = &mut weights.get_mut(name).unwrap().data;
        bias.iter_mut().enumerate().for_each(|(i, b)| *b = rng::normal(9, i as u64) as f32);
    }
    (config, weights)
}

fn key_bias(layer: usize) -> String {
    format!("model.layers.{layer}.self_attn.k_proj.bias")
}

/// In f64: without rotary positions a shift of all keys is no change of the loss, and the gradient
/// is rounding; with them it is one.
#[test]
fn keys_that_nothing_rotates_need_no_bias() {
    let (config, weights) = biased();
    let micro = batches(0);
    let weight = micro[0].weight();
    let run = |weights: &Tensors| {
        let mut decoder = Decoder::load(Reference, &config, weights, Training::Full).unwrap();
        let sums = decoder.accumulate(&micro[0], (1.0 / weight) as f32, None).unwrap();
        (sums.weighted_loss / weight, decoder.gradients())
    };
    let (loss, gradients) = run(&weights);
    for layer in 0..3 {
        let gradient = gradients.get(&key_bias(layer)).unwrap();
        let size = gradient.data.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
        let mut shifted = weights.clone();
        let bias = &mut shifted.get_mut(&key_bias(layer)).unwrap().data;
        bias.iter_mut().enumerate().for_each(|(i, b)| *b += 0.5 + (i % 3) as f32);
        let change = (run(&shifted).0 - loss).abs();
        if layer == 1 {
            assert!(size < 1e-15 && change < 1e-13, "{layer}: {size:e} {change:e}");
        } else {
            assert!(size > 1e-6 && change > 1e-6, "{layer}: {size:e} {change:e}");
        }
    }
}

/// That bias is excused whatever rounding leaves of its gradient; what else gets none fails, its
/// like in other layers too.
#[test]
fn the_self_test_excuses_what_no_softmax_sees_and_nothing_else() {
    let (config, mut weights) = biased();
    let failures = |weights: &Tensors| {
        let decoder = Decoder::load(Cpu::new(), &config, weights, Training::Full).unwrap();
        let mut learner = Learner::new(decoder, OptimizerConfig::default(), schedule(), 9).unwrap();
        let micro = batches(0);
        learner.accumulate(&micro[0], micro[0].weight()).unwrap();
        let test = learner.self_test();
        let excused = test.rows.iter().filter(|row| row.may_be_zero.is_some());
        assert_eq!(excused.map(|row| row.name.as_str()).collect::<Vec<_>>(), [key_bias(1)]);
        test.failures().map(|row| row.name.clone()).collect::<Vec<_>>()
    };
    assert_eq!(failures(&weights), [""; 0]);
    // With a way back of zeros, queries, keys and values get no gradient at all.
    for layer in 0..2 {
        let name = format!("model.layers.{layer}.self_attn.o_proj.weight");
        weights.get_mut(&name).unwrap().data.fill(0.0);
    }
    let mut expected: Vec<String> = Vec::new();
    for layer in 0..2 {
        for part in ["weight", "bias"] {
            for map in ["q_proj", "k_proj", "v_proj"] {
                expected.push(format!("model.layers.{layer}.self_attn.{map}.{part}"));
            }
        }
        expected.push(format!("model.layers.{layer}.input_layernorm.weight"));
    }
    expected.retain(|name| *name != key_bias(1));
    let mut found = failures(&weights);
    expected.sort();
    found.sort();
    assert_eq!(found, expected);
}

/// Where B is not zero at the start, A has a gradient from the first step on; where it is, only
/// then has it none.
#[test]
fn every_start_is_expected_as_it_is() {
    let config = config();
    let weights = init_weights(&config, 4);
    let plain = LoraConfig::all_linear(4, 8.0);
    let dora = |init| LoraConfig { use_dora: true, init, ..plain.clone() };
    let starts = [
        (plain.clone(), 14),
        (LoraConfig { init: InitMethod::Gaussian, ..plain.clone() }, 14),
        (LoraConfig { init: InitMethod::Pissa, ..plain.clone() }, 0),
        (LoraConfig { init: InitMethod::Loftq, ..plain.clone() }, 0),
        (dora(InitMethod::Default), 14),
        (dora(InitMethod::Pissa), 0),
        (dora(InitMethod::Loftq), 0),
    ];
    for (settings, n_zero) in starts {
        let what = format!("{:?}, DoRA {}", settings.init, settings.use_dora);
        let quant = BnbConfig::qlora(ValueType::F32);
        let small = QuantizeOnLoad::new(&config, &weights, &quant);
        let is_loftq = settings.init == InitMethod::Loftq;
        let base: &dyn TensorSource = if is_loftq { &small } else { &weights };
        let adapter = Adapter::init_from(&config, settings, base, 2).unwrap();
        let load = |base: &dyn TensorSource| {
            Decoder::load(Cpu::new(), &config, base, Training::Frozen).unwrap()
        };
        let mut decoder = match adapter.config.init {
            InitMethod::Pissa => load(&Merge::residual(&config, base, &adapter).unwrap()),
            _ => load(base),
        };
        decoder.attach(&adapter, true).unwrap();
        let mut learner = Learner::new(decoder, OptimizerConfig::default(), schedule(), 9).unwrap();
        let micro = batches(0);
        learner.accumulate(&micro[0], micro[0].weight()).unwrap();
        let test = learner.self_test();
        assert!(test.passed(), "{what}: {:?}", test.failures().collect::<Vec<_>>());
        let zeros = test.rows.iter().filter(|row| row.expects_zero);
        assert!(zeros.clone().all(|row| row.name.contains(".lora_A.") && row.grad_norm == 0.0));
        assert_eq!(zeros.count(), n_zero, "{what}");
        assert!(test.rows.iter().all(|row| row.may_be_zero.is_none()), "{what}");
        assert_eq!(test.rows.len(), if adapter.config.use_dora { 42 } else { 28 }, "{what}");
    }
}

#[test]
fn a_step_that_cannot_be_taken_changes_nothing() {
    let mut learner = learner(false);
    run(&mut learner, 0, 3);
    let before = bytes(&learner.state().0);
    assert!(matches!(learner.apply(), Err(LearnError::NoTarget { step: 3, .. })));
    let silent = Batch::from_pack(&[1, 2, 3], &[0.0; 3], &[3]).unwrap();
    assert!(matches!(learner.train_step(&[silent]), Err(LearnError::NoTarget { .. })));
    let batch = &batches(3)[0];
    // A normaliser of a hair makes gradients that no f32 holds.
    learner.accumulate(batch, 1e-44).unwrap();
    assert!(matches!(learner.apply(), Err(LearnError::NotFinite { step: 3, .. })));
    assert_eq!(bytes(&learner.state().0), before);
}

#[test]
fn bad_settings_are_refused() {
    let good = Recipe::default();
    let adamw = AdamWConfig::default();
    let with = |adamw| Recipe::from(OptimizerConfig::AdamW(adamw));
    let check = |optimizer: Recipe, schedule: ScheduleConfig, expected: &str| {
        let message = Learner::new(decoder(true), optimizer, schedule, 0).err().unwrap();
        assert!(message.to_string().contains(expected), "{message}");
    };
    check(with(AdamWConfig { beta1: 1.0, ..adamw }), schedule(), "`beta1` = 1 is not");
    check(with(AdamWConfig { eps: 0.0, ..adamw }), schedule(), "`eps`");
    check(with(AdamWConfig { weight_decay: -0.1, ..adamw }), schedule(), "`weight_decay`");
    check(Recipe { max_grad_norm: Some(0.0), ..good.clone() }, schedule(), "`max_grad_norm`");
    check(good.clone(), ScheduleConfig { lr: f64::NAN, ..schedule() }, "`lr`");
    check(good.clone(), ScheduleConfig { min_lr_ratio: 2.0, ..schedule() }, "`min_lr_ratio`");
    check(
        good.clone(),
        ScheduleConfig { warmup: Warmup::Ratio(-0.1), ..schedule() },
        "`warmup_ratio`",
    );
    let weights = init_weights(&config(), 4);
    let frozen = Decoder::load(Cpu::new(), &config(), &weights, Training::Frozen).unwrap();
    let refused = Learner::new(frozen, good, schedule(), 0);
    assert!(matches!(refused.err(), Some(LearnError::NothingTrained)));
}

/// Adapters of every kind on a 4-bit base.
fn kinds() -> Vec<(&'static str, LoraConfig)> {
    let plain = || LoraConfig { lora_dropout: 0.1, ..LoraConfig::all_linear(4, 8.0) };
    let names = |names: &[&str]| -> Targets {
        names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>().into()
    };
    let tokens = TokenRows { embed_tokens: vec![300, 7, 8], lm_head: vec![] };
    vec![
        ("plain", plain()),
        ("dora", LoraConfig { use_dora: true, ..plain() }),
        ("head", LoraConfig { target_modules: names(&["lm_head", "q_proj"]), ..plain() }),
        (
            "embedding",
            LoraConfig { target_modules: names(&["embed_tokens", "up_proj"]), ..plain() },
        ),
        ("saved", LoraConfig { modules_to_save: vec!["lm_head".to_owned()], ..plain() }),
        ("tokens", LoraConfig { trainable_tokens: tokens, ..plain() }),
    ]
}

/// On 4-bit weights, every kind learns, passes the self-test at step 0, and gives the same bytes
/// with any number of threads.
#[test]
fn every_kind_learns_on_4bit_weights() {
    let config = config();
    let weights = init_weights(&config, 4);
    for (name, settings) in kinds() {
        let all = || {
            let quant = BnbConfig::qlora(ValueType::F32);
            let base = QuantizeOnLoad::new(&config, &weights, &quant);
            let adapter = Adapter::init_from(&config, settings.clone(), &base, 2).unwrap();
            let mut decoder = Decoder::load(Cpu::new(), &config, &base, Training::Frozen).unwrap();
            decoder.attach(&adapter, true).unwrap();
            let mut learner =
                Learner::new(decoder, OptimizerConfig::default(), schedule(), 9).unwrap();
            let micro = batches(0);
            let weight = micro.iter().map(Batch::weight).sum();
            for batch in &micro {
                learner.accumulate(batch, weight).unwrap();
            }
            let test = learner.self_test();
            assert!(test.passed(), "{name}: {:?}", test.failures().collect::<Vec<_>>());
            learner.decoder_mut().zero_gradients();
            let losses: Vec<f64> =
                (0..8).map(|_| learner.train_step(&batches(0)).unwrap().loss).collect();
            assert!(losses[7] < losses[0], "{name}: {losses:?}");
            (losses, bytes(&learner.decoder().trained()))
        };
        let with =
            |n: usize| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap().install(all);
        let one = with(1);
        for n in [2, 8] {
            assert!(with(n) == one, "{name}: {n} threads");
        }
    }
}
