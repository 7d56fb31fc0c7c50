//! Update rules, 8-bit codes, averages, schedules and the loss's options against what PyTorch,
//! transformers and bitsandbytes computed: tests/golden/README.md says how.

use std::path::PathBuf;

use hone_kernels::{Backend, CodeBook, Cpu, LossOptions, MatMut, Reference, rng};
use hone_model::{
    Batch, Decoder, EmbeddingNoise, ModelConfig, ParamInfo, ParamKind, PassOptions, Tensors,
    Training,
};
use serde_json::Value;

use crate::groups::{self, is_muon};
use crate::muon::MuonScratch;
use crate::rule::{Slot, State, StepRates};
use crate::{
    Convention, GroupConfig, Learner, OptimizerConfig, Recipe, ScheduleConfig, ScheduleKind, Warmup,
};

/// Largest difference of a parameter, all being of order one. The references' own f32 is up to 1e-6
/// from their f64 (`yardstick`), and ours rounds at other places.
const PARAMETERS: f64 = 3e-6;

/// Largest difference of a loss or of a logit's gradient, losses being up to ten; the reference's
/// own f32 is up to 1.3e-6 from its f64.
const LOSSES: f64 = 5e-6;

fn root() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden"))
}

fn described() -> Value {
    let text = std::fs::read_to_string(root().join("optim/optim.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn tensors(name: &str) -> Tensors {
    let bytes = std::fs::read(root().join(name)).unwrap();
    Tensors::from_safetensors(&[&bytes]).unwrap()
}

/// Uniform values in +-bound.
fn noise(seed: u64, n: usize, bound: f64) -> Vec<f32> {
    (0..n as u64).map(|i| rng::noise(seed, i, bound)).collect()
}

/// The gradient of tensor `number` at a step.
fn gradient(number: u64, step: u64, n: usize) -> Vec<f32> {
    let scale = |i: usize| 10.0_f64.powf(-3.0 * rng::uniform(3000 + number, i as u64)) as f32;
    let values = noise(2000 + 100 * number + step, n, 1.0);
    values.into_iter().enumerate().map(|(i, x)| x * scale(i)).collect()
}

fn largest(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max)
}

/// Tensors end to end in one buffer: names, shapes, and the number of each in the golden.
type Shapes = [(&'static str, &'static [usize], u64)];

const SMALL: &Shapes = &[("matrix", &[6, 10], 0), ("tall", &[12, 5], 1), ("vector", &[17], 2)];
const LARGE: &Shapes = &[("large", &[20, 211], 10), ("small", &[4095], 11)];

fn infos(shapes: &Shapes) -> Vec<ParamInfo> {
    let mut offset = 0;
    let info = |&(name, shape, _): &(&str, &[usize], u64)| {
        let kind = if shape.len() == 2 { ParamKind::Matrix } else { ParamKind::Bias };
        let info =
            ParamInfo { name: name.to_owned(), shape: shape.to_vec(), kind, buffer: 0, offset };
        offset += info.n_values();
        info
    };
    shapes.iter().map(info).collect()
}

/// Fifty steps; calls `see(step, tensor, values, state)` at those of the golden.
fn run<B: Backend>(
    backend: &B,
    optimizer: &OptimizerConfig,
    (lr, weight_decay): (f64, f64),
    shapes: &Shapes,
    mut see: impl FnMut(u64, &ParamInfo, Vec<f32>, &State<B>),
) {
    let infos = infos(shapes);
    // The references decay every tensor.
    let group = GroupConfig {
        pattern: ".".to_owned(),
        weight_decay: Some(weight_decay),
        ..GroupConfig::default()
    };
    let rates = groups::resolve(&[group], optimizer, lr, &infos).unwrap();
    let sides = infos.iter().filter(|info| is_muon(info));
    let mut scratch = MuonScratch::new(backend, sides.map(|info| (info.shape[0], info.shape[1])));
    let start: Vec<f32> =
        shapes.iter().zip(&infos).flat_map(|(s, i)| noise(1000 + s.2, i.n_values(), 1.0)).collect();
    let mut p = backend.upload(&start);
    let mut slots: Vec<Slot<B>> = infos
        .into_iter()
        .zip(rates)
        .map(|(info, rates)| Slot { state: State::new(backend, optimizer, &info), info, rates })
        .collect();
    for step in 1..=50 {
        let all = shapes.iter().zip(&slots);
        let g: Vec<f32> =
            all.flat_map(|(s, slot)| gradient(s.2, step, slot.info.n_values())).collect();
        let g = backend.upload(&g);
        for slot in &mut slots {
            let rates = StepRates { lr: optimizer.lr(lr, step), step, grad_scale: 1.0 };
            slot.step(backend, optimizer, &mut p, &g, rates, Some(&mut scratch));
            if [1, 10, 50].contains(&step) {
                let mut values = vec![0.0; slot.info.n_values()];
                backend.read(&p, slot.info.offset, &mut values);
                see(step, &slot.info, values, &slot.state);
            }
        }
    }
}

/// Every rule on the small tensors. Returns how many tensors were compared.
fn check_rules<B: Backend>(backend: &B) -> usize {
    let (described, expected) = (described(), tensors("optim/rules.safetensors"));
    let mut n_compared = 0;
    for row in described["rules"].as_array().unwrap() {
        let name = row["name"].as_str().unwrap();
        let mut optimizer: OptimizerConfig =
            serde_json::from_value(row["settings"].clone()).unwrap();
        if let OptimizerConfig::Muon(muon) = &mut optimizer {
            // The vector, which is AdamW's there too.
            muon.adamw.weight_decay = 0.1;
        }
        let rates = (row["lr"].as_f64().unwrap_or(1.0), row["weight_decay"].as_f64().unwrap());
        run(backend, &optimizer, rates, SMALL, |step, info, values, _| {
            let what = format!("{name}.{step}.{}", info.name);
            let off = largest(&values, &expected.get(&what).unwrap().data);
            assert!(off <= PARAMETERS, "{} {what}: off by {off:e}", backend.name());
            n_compared += 1;
        });
    }
    n_compared
}

#[test]
fn fifty_steps_of_every_rule() {
    assert_eq!(check_rules(&Cpu::new()), 12 * 3 * 3);
    assert_eq!(check_rules(&Reference), 12 * 3 * 3);
}

/// Every bit of the values, the codes and the scales is that of the numpy twin; bitsandbytes' own
/// optimizer, coding as exactly, is a rounding apart.
#[test]
fn fifty_steps_in_eight_bits() {
    let (described, expected) = (described(), tensors("optim/eight_bits.safetensors"));
    let row = &described["adamw8bit"];
    let rates = (row["lr"].as_f64().unwrap(), row["weight_decay"].as_f64().unwrap());
    let optimizer: OptimizerConfig = serde_json::from_str(r#""adamw8bit""#).unwrap();
    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let backend = Cpu::new();
    let mut n_compared = 0;
    run(&backend, &optimizer, rates, LARGE, |step, info, values, state| {
        let name = &info.name;
        let golden = |name: String| &expected.get(&name).unwrap().data;
        let theirs = golden(format!("adamw8bit.{step}.{name}"));
        n_compared += 1;
        if name == "small" {
            // Fewer than 4096 values: f32 moments, and AdamW's own order of operations.
            assert!(state.codes.is_empty());
            assert!(largest(&values, theirs) <= PARAMETERS);
            return;
        }
        assert!(bits(&values) == bits(theirs), "step {step}: off by {}", largest(&values, theirs));
        if step < 50 {
            return;
        }
        let off = largest(&values, golden(format!("bitsandbytes.50.{name}")));
        assert!(off <= PARAMETERS, "bitsandbytes is {off:e} away");
        for (i, moment) in ["m", "v"].into_iter().enumerate() {
            let codes: Vec<f32> =
                backend.read_codes(&state.codes[i].1).into_iter().map(f32::from).collect();
            assert!(&codes == golden(format!("codes.{moment}.{name}")), "codes of {moment}");
            let absmax = backend.download(&state.values[i].1);
            assert!(bits(&absmax) == bits(golden(format!("absmax.{moment}.{name}"))));
        }
    });
    assert_eq!(n_compared, 2 * 3);
}

#[test]
fn code_books_are_those_of_bitsandbytes() {
    let expected = tensors("optim/eight_bits.safetensors");
    for (name, book) in [("signed", CodeBook::signed()), ("unsigned", CodeBook::unsigned())] {
        let theirs = &expected.get(&format!("map.{name}")).unwrap().data;
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&book.values), bits(theirs), "{name}");
    }
}

/// The average of AdamW's run, as the learner takes it: the first step's values, then a mixture.
#[test]
fn averages_are_those_of_pytorch() {
    let expected = tensors("optim/rules.safetensors");
    let decay = described()["ema_decay"].as_f64().unwrap();
    let backend = Cpu::new();
    let optimizer = OptimizerConfig::default();
    let infos = infos(SMALL);
    let group =
        GroupConfig { pattern: ".".to_owned(), weight_decay: Some(0.1), ..GroupConfig::default() };
    let rates = groups::resolve(&[group], &optimizer, 1e-2, &infos).unwrap();
    let mut n_compared = 0;
    for ((info, rates), (name, _, number)) in infos.into_iter().zip(rates).zip(SMALL) {
        let n = info.n_values();
        let info = ParamInfo { offset: 0, ..info };
        let mut p = backend.upload(&noise(1000 + number, n, 1.0));
        let mut average = backend.zeros(n);
        let mut slot = Slot { state: State::new(&backend, &optimizer, &info), info, rates };
        for step in 1..=50 {
            let g = backend.upload(&gradient(*number, step, n));
            let rates = StepRates { lr: 1e-2, step, grad_scale: 1.0 };
            slot.step(&backend, &optimizer, &mut p, &g, rates, None);
            crate::learner::average_step(&backend, decay, step, &p, &mut average);
            if [1, 10, 50].contains(&step) {
                let theirs = &expected.get(&format!("ema.{step}.{name}")).unwrap().data;
                let off = largest(&backend.download(&average), theirs);
                assert!(off <= PARAMETERS, "{name} {step}: off by {off:e}");
                n_compared += 1;
            }
        }
    }
    assert_eq!(n_compared, 9);
}

#[test]
fn schedules_are_those_of_transformers() {
    let described = described();
    let rows = described["schedules"].as_array().unwrap();
    assert_eq!(rows.len(), 22);
    for row in rows {
        let kind: ScheduleKind = serde_json::from_value(row["kind"].clone()).unwrap();
        let schedule = ScheduleConfig {
            kind,
            lr: described["schedule_lr"].as_f64().unwrap(),
            warmup: Warmup::Steps(row["warmup_steps"].as_u64().unwrap()),
            min_lr_ratio: row["min_lr_ratio"].as_f64().unwrap(),
            n_steps: row["n_steps"].as_u64().unwrap(),
            convention: Convention::Transformers,
        };
        schedule.check().unwrap();
        let rates = row["lr"].as_array().unwrap();
        assert_eq!(rates.len() as u64, schedule.n_steps);
        for (step, rate) in rates.iter().enumerate() {
            let (found, rate) = (schedule.lr(step as u64), rate.as_f64().unwrap());
            let off = (found - rate).abs();
            assert!(off <= 1e-12 * schedule.lr, "{row} at {step}: {found}, not {rate}");
        }
    }
}

fn check_losses<B: Backend>(backend: &B, described: &Value) -> usize {
    let (rows, v) = (7, 41);
    let expected = tensors("optim/losses.safetensors");
    let logits = noise(501, rows * v, 6.0);
    let targets: Vec<u32> = (0..rows as u64).map(|i| (rng::mix(502, i) % 41) as u32).collect();
    let weights: Vec<f32> = noise(503, rows, 1.0).into_iter().map(f32::abs).collect();
    let cases = described["losses"].as_array().unwrap();
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let number = |key: &str| case["options"][key].as_f64().map(|x| x as f32);
        let options = LossOptions {
            label_smoothing: number("label_smoothing").unwrap_or_default(),
            z_loss: number("z_loss").unwrap_or_default(),
            reweight: case["options"]["reweight"].as_bool().unwrap_or_default(),
            soft_cap: number("soft_cap"),
        };
        let (mut z, mut row_loss) = (backend.upload(&logits), vec![0.0; rows]);
        let view = MatMut::new(&mut z, rows, v);
        let some = Some(&mut row_loss[..]);
        let sums = backend.cross_entropy_with(view, &targets, &weights, Some(1.0), some, options);
        let golden = |what: &str| &expected.get(&format!("loss.{name}.{what}")).unwrap().data;
        let off = largest(&row_loss, golden("loss"));
        assert!(off <= LOSSES, "{} {name}: losses off by {off:e}", backend.name());
        let off = largest(&backend.download(&z), golden("dlogits"));
        assert!(off <= LOSSES, "{} {name}: gradients off by {off:e}", backend.name());
        let sum = |x: &[f32]| -> f64 {
            x.iter().zip(&weights).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum()
        };
        assert!((sums.weighted_loss - sum(golden("loss"))).abs() <= LOSSES, "{name}");
        assert!((sums.weighted_ce - sum(golden("ce"))).abs() <= LOSSES, "{name}");
    }
    cases.len()
}

#[test]
fn options_of_the_loss_are_pytorchs() {
    let described = described();
    assert_eq!(check_losses(&Cpu::new(), &described), 6);
    assert_eq!(check_losses(&Reference, &described), 6);
}

fn check_neftune<B: Backend>(backend: B) {
    let row = &described()["neftune"];
    let read = |name: &str| std::fs::read_to_string(root().join("llama/plain").join(name)).unwrap();
    let config = ModelConfig::from_json(&read("config.json")).unwrap();
    let weights = tensors("llama/plain/model.safetensors");
    let mut decoder = Decoder::load(backend, &config, &weights, Training::Full).unwrap();
    let golden: Value = serde_json::from_str(&read("golden.json")).unwrap();
    let numbers = |value: &Value| -> Vec<f64> {
        value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
    };
    let mut batch = Batch::new();
    for row in golden["rows"].as_array().unwrap() {
        let ids: Vec<u32> = numbers(&row["input_ids"]).iter().map(|&x| x as u32).collect();
        let weights: Vec<f32> = numbers(&row["weights"]).iter().map(|&x| x as f32).collect();
        batch.push(&ids, &weights).unwrap();
    }
    let noise = EmbeddingNoise {
        alpha: row["alpha"].as_f64().unwrap() as f32,
        seed: row["seed"].as_u64().unwrap(),
        first_document: 0,
    };
    let options = PassOptions { dropout_seed: None, noise: Some(noise) };
    let scale = (1.0 / batch.weight()) as f32;
    let sums = decoder.accumulate_with(&batch, scale, options).unwrap();
    let (loss, expected) = (sums.weighted_loss / sums.weight, row["loss"].as_f64().unwrap());
    assert!((loss - expected).abs() <= 1e-5, "{loss}, not {expected}");
    let silent = decoder.loss(&batch, None).unwrap();
    assert!((silent.weighted_loss / silent.weight - expected).abs() > 1e-3, "the noise shows");
    let gradients = decoder.gradients();
    let mut n_compared = 0;
    for tensor in tensors("optim/losses.safetensors").iter() {
        let Some(name) = tensor.name.strip_prefix("neftune.") else { continue };
        let found = &gradients.get(name).unwrap().data;
        let top = tensor.data.iter().fold(0.0_f32, |top, x| top.max(x.abs()));
        let off = largest(found, &tensor.data) / f64::from(top);
        assert!(off <= 1e-5, "{name}: off by {off:e}");
        n_compared += 1;
    }
    assert_eq!(n_compared, 3);
}

#[test]
fn noise_on_embeddings_is_that_of_the_golden() {
    check_neftune(Cpu::new());
    check_neftune(Reference);
}

/// The learner's step on a model, whose tensors lie together in buffers (q, k and v; gate and up),
/// is the step of each tensor by itself.
#[test]
fn the_learner_updates_each_tensor_by_itself() {
    let text = std::fs::read_to_string(root().join("llama/plain/config.json")).unwrap();
    let config = ModelConfig::from_json(&text).unwrap();
    let weights = tensors("llama/plain/model.safetensors");
    let ids: Vec<u32> = (0..20).map(|i| i * 7 % 64).collect();
    let batch = Batch::from_pack(&ids, &[1.0; 20], &[20]).unwrap();
    let schedule = ScheduleConfig::constant(1e-2, 10);
    let mut n_compared = 0;
    for name in OptimizerConfig::NAMES {
        let optimizer: OptimizerConfig = serde_json::from_value(name.into()).unwrap();
        let recipe = Recipe { max_grad_norm: None, ..Recipe::from(optimizer) };
        let backend = Cpu::new();
        let decoder = Decoder::load(backend, &config, &weights, Training::Full).unwrap();
        let mut learner = Learner::new(decoder, recipe, schedule, 0).unwrap();
        learner.accumulate(&batch, batch.weight()).unwrap();
        let gradients = learner.decoder().gradients();
        learner.apply().unwrap();
        let found = learner.decoder().trained();
        for (info, rates) in learner.rates() {
            let info = ParamInfo { offset: 0, ..info.clone() };
            let mut p = backend.upload(&weights.get(&info.name).unwrap().data);
            let g = backend.upload(&gradients.get(&info.name).unwrap().data);
            let sides = is_muon(&info).then(|| (info.shape[0], info.shape[1])).into_iter();
            let mut scratch = MuonScratch::new(&backend, sides);
            let state = State::new(&backend, &optimizer, &info);
            let mut slot = Slot { info, rates, state };
            let step = StepRates { lr: 1e-2, step: 1, grad_scale: 1.0 };
            slot.step(&backend, &optimizer, &mut p, &g, step, Some(&mut scratch));
            let moved = &found.get(&slot.info.name).unwrap().data;
            assert_eq!(&backend.download(&p), moved, "{name}: {}", slot.info.name);
            assert_ne!(&weights.get(&slot.info.name).unwrap().data, moved);
            n_compared += 1;
        }
    }
    assert_eq!(n_compared, OptimizerConfig::NAMES.len() * weights.len());
}
