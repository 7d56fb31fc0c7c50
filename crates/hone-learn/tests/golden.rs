//! Our numbers against PyTorch's, transformers' and PEFT's: tests/golden/README.md says what the
//! files hold and how they were made.

mod rows;

use std::path::PathBuf;

use hone_kernels::{Backend, Cpu, Reference};
use hone_learn::{
    AdamWConfig, Convention, Learner, OptimizerConfig, Recipe, ScheduleConfig, ScheduleKind, Warmup,
};
use hone_model::{
    Adapter, Batch, Decoder, Generator, Merge, ModelConfig, Recompute, TensorSource, Tensors,
    Training,
};
use rows::{all, batch, floats, integers};
use serde_json::Value;

/// Largest absolute difference of a logit or a loss.
const LOGITS: f64 = 1e-5;
/// Largest difference of a gradient over the tensor's largest gradient.
const GRADIENTS: f64 = 1e-5;
/// Largest relative difference of a gradient norm.
const NORMS: f64 = 1e-4;
/// Largest absolute difference of a parameter after a run.
const PARAMETERS: f64 = 1e-4;

/// The files of one variant.
struct Golden {
    variant: &'static str,
    dir: PathBuf,
    config: ModelConfig,
    weights: Tensors,
    json: Value,
}

fn root() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/llama"))
}

fn json(path: PathBuf) -> Value {
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path:?}: {e}"));
    serde_json::from_str(&text).unwrap()
}

impl Golden {
    fn open(variant: &'static str) -> Self {
        let dir = root().join(variant);
        let text = std::fs::read_to_string(dir.join("config.json")).unwrap();
        let config = ModelConfig::from_json(&text).unwrap();
        let json = json(dir.join("golden.json"));
        let mut golden = Golden { variant, dir, config, weights: Tensors::new(), json };
        golden.weights = golden.tensors("model");
        golden
    }

    fn tensors(&self, name: &str) -> Tensors {
        let bytes = std::fs::read(self.dir.join(format!("{name}.safetensors"))).unwrap();
        Tensors::from_safetensors(&[&bytes]).unwrap()
    }

    fn adapter(&self, name: &str) -> Adapter {
        let text = std::fs::read_to_string(self.dir.join(name).join("adapter_config.json"));
        let tensors = self.tensors(&format!("{name}/adapter_model"));
        Adapter::from_parts(&text.unwrap(), tensors).unwrap()
    }

    fn decoder<B: Backend>(&self, backend: B, training: Training) -> Decoder<B> {
        Decoder::load(backend, &self.config, &self.weights, training).unwrap()
    }
}

/// Asserts |a - b| <= bound for all values.
fn assert_close(what: &str, found: &[f32], expected: &[f32], bound: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let difference = |(a, b): (&f32, &f32)| f64::from((a - b).abs());
    let worst = found.iter().zip(expected).map(difference).fold(0.0, f64::max);
    assert!(worst <= bound, "{what}: off by {worst:e}, the bound is {bound:e}");
}

/// Asserts that two sets of tensors agree; with `relative`, to each tensor's largest value.
fn assert_tensors(what: &str, found: &Tensors, expected: &Tensors, bound: f64, relative: bool) {
    assert_eq!(found.len(), expected.len(), "{what}: number of tensors");
    for tensor in expected.iter() {
        let name = &tensor.name;
        let other = found.get(name).unwrap_or_else(|| panic!("{what}: no {name}"));
        assert_eq!(other.shape, tensor.shape, "{what}: {name}");
        let largest = tensor.data.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
        let scale = if relative { f64::from(largest) } else { 1.0 };
        assert_close(&format!("{what}: {name}"), &other.data, &tensor.data, bound * scale);
    }
}

fn assert_number(what: &str, found: f64, expected: &Value, bound: f64) {
    let expected = expected.as_f64().unwrap();
    let off = (found - expected).abs();
    assert!(off <= bound, "{what}: {found}, not {expected}: off by {off:e}");
}

/// Calls a generic check with both backends.
macro_rules! both {
    ($check:ident($($argument:expr),*)) => {
        $check(Cpu::new(), $($argument),*);
        $check(Reference, $($argument),*);
    };
}

// ---------------------------------------------------------------------- forward

/// Logits of each row alone, of all rows packed, and the loss of `rows` (and `fractional`).
fn check_forward<B: Backend>(backend: B, variant: &'static str) {
    let golden = Golden::open(variant);
    let what = |part: &str| format!("{} {variant} {part}", backend.name());
    let expected = golden.tensors("logits");
    let mut decoder = golden.decoder(backend.clone(), Training::Frozen);
    for part in ["rows", "fractional"] {
        let rows = &golden.json[part];
        for i in all(rows) {
            let batch = batch(rows, &[i]);
            let positions: Vec<u32> = (0..batch.n_tokens() as u32).collect();
            let logits = decoder.logits(&batch, &positions).unwrap();
            let name = format!("{part}.{i}");
            assert_close(&what(&name), &logits, &expected.get(&name).unwrap().data, LOGITS);
        }
        check_losses(&what(part), &mut decoder, rows, &golden.json["loss"][part]);
    }
    let packed = &golden.json["packed"];
    let ids = integers(&packed["input_ids"]);
    let lens: Vec<usize> = integers(&packed["seq_lens"]).iter().map(|&n| n as usize).collect();
    let batch = Batch::from_pack(&ids, &floats(&packed["weights"]), &lens).unwrap();
    assert_eq!(batch.positions, integers(&packed["position_ids"]));
    let positions: Vec<u32> = (0..ids.len() as u32).collect();
    let logits = decoder.logits(&batch, &positions).unwrap();
    assert_close(&what("packed"), &logits, &expected.get("packed").unwrap().data, LOGITS);
}

fn check_losses<B: Backend>(what: &str, decoder: &mut Decoder<B>, rows: &Value, loss: &Value) {
    let mut losses = Vec::new();
    let batch = batch(rows, &all(rows));
    let sums = decoder.loss(&batch, Some(&mut losses)).unwrap();
    assert_number(what, sums.weighted_loss / sums.weight, &loss["loss"], LOGITS);
    assert_number(what, sums.weight, &loss["weight_sum"], 1e-9);
    assert_eq!(sums.n_rows, loss["n_targets"].as_u64().unwrap(), "{what}: targets");
    assert_eq!(sums.n_correct, loss["n_correct"].as_u64().unwrap(), "{what}: correct");
    let weighted = losses.iter().zip(&batch.rows);
    let total: f64 =
        weighted.map(|(l, &r)| f64::from(*l) * f64::from(batch.weights[r as usize])).sum();
    assert!((total - sums.weighted_loss).abs() < 1e-3, "{what}: row losses sum to {total}");
}

#[test]
fn forward_plain() {
    both!(check_forward("plain"));
}

#[test]
fn forward_tied() {
    both!(check_forward("tied"));
}

#[test]
fn forward_bias() {
    both!(check_forward("bias"));
}

#[test]
fn forward_mlpbias() {
    both!(check_forward("mlpbias"));
}

// ---------------------------------------------------------------------- gradients

/// Gradients of all weights, whole and in micro-batches of every size, kept and recomputed.
fn check_gradients<B: Backend>(backend: B, variant: &'static str) {
    let golden = Golden::open(variant);
    let mut decoder = golden.decoder(backend.clone(), Training::Full);
    for (part, file) in [("rows", "grads"), ("fractional", "grads_fractional")] {
        let rows = &golden.json[part];
        let expected = golden.tensors(file);
        let weight = batch(rows, &all(rows)).weight();
        for size in [1, 2, 4, 8] {
            for recompute in Recompute::ALL {
                decoder.set_recompute(recompute);
                decoder.zero_gradients();
                let mut loss = 0.0;
                for chosen in all(rows).chunks(size) {
                    let batch = batch(rows, chosen);
                    let sums = decoder.accumulate(&batch, (1.0 / weight) as f32, None).unwrap();
                    loss += sums.weighted_loss / weight;
                }
                let what = format!("{} {variant} {part} by {size}", backend.name());
                assert_number(&what, loss, &golden.json["loss"][part]["loss"], LOGITS);
                assert_tensors(&what, &decoder.gradients(), &expected, GRADIENTS, true);
            }
        }
    }
}

#[test]
fn gradients_plain() {
    both!(check_gradients("plain"));
}

#[test]
fn gradients_tied() {
    both!(check_gradients("tied"));
}

#[test]
fn gradients_bias() {
    both!(check_gradients("bias"));
}

#[test]
fn gradients_mlpbias() {
    both!(check_gradients("mlpbias"));
}

// ---------------------------------------------------------------------- adapters

/// Logits, loss and gradients with an adapter on; the base is frozen.
fn check_adapter<B: Backend>(backend: B, variant: &'static str, name: &str) {
    let golden = Golden::open(variant);
    let adapter = golden.adapter(name);
    let what = |part: &str| format!("{} {variant} {name} {part}", backend.name());
    let mut decoder = golden.decoder(backend.clone(), Training::Frozen);
    decoder.attach(&adapter, true).unwrap();
    let rows = &golden.json["rows"];
    check_losses(&what("loss"), &mut decoder, rows, &golden.json["loss"][name]);
    let logits = golden.tensors("logits");
    for i in all(rows) {
        let Some(expected) = logits.get(&format!("{name}.{i}")) else { continue };
        let batch = batch(rows, &[i]);
        let positions: Vec<u32> = (0..batch.n_tokens() as u32).collect();
        let found = decoder.logits(&batch, &positions).unwrap();
        assert_close(&what(&expected.name), &found, &expected.data, LOGITS);
    }
    let batch = batch(rows, &all(rows));
    decoder.accumulate(&batch, (1.0 / batch.weight()) as f32, None).unwrap();
    let expected = golden.tensors(&format!("{name}_grads"));
    assert_tensors(&what("gradients"), &decoder.gradients(), &expected, GRADIENTS, true);
}

#[test]
fn adapters() {
    for variant in ["plain", "tied", "bias"] {
        both!(check_adapter(variant, "lora"));
    }
    both!(check_adapter("plain", "rslora"));
}

/// The merged weights are PEFT's, and give the logits of base and adapter.
#[test]
fn merged() {
    let golden = Golden::open("plain");
    let adapter = golden.adapter("lora");
    let merge = Merge::new(&golden.config, &golden.weights, &adapter).unwrap();
    let found: Tensors =
        merge.entries().iter().map(|entry| merge.tensor(&entry.name).unwrap()).collect();
    assert_tensors("merged", &found, &golden.tensors("merged"), 1e-6, false);
    assert!(merge.changes("model.layers.1.mlp.up_proj.weight"));
    assert!(!merge.changes("model.norm.weight"));

    let mut with_adapter = golden.decoder(Cpu::new(), Training::Frozen);
    with_adapter.attach(&adapter, false).unwrap();
    let config = &golden.config;
    let mut merged = Decoder::load(Cpu::new(), config, &merge, Training::Frozen).unwrap();
    let batch = batch(&golden.json["rows"], &all(&golden.json["rows"]));
    let positions: Vec<u32> = (0..batch.n_tokens() as u32).collect();
    let expected = with_adapter.logits(&batch, &positions).unwrap();
    assert_close("merged logits", &merged.logits(&batch, &positions).unwrap(), &expected, LOGITS);
}

// ---------------------------------------------------------------------- twenty steps

/// A run of twenty steps: rates, losses, norms, clipping, final parameters.
fn check_training<B: Backend>(backend: B, variant: &'static str, method: &str) {
    let golden = Golden::open(variant);
    let run = json(golden.dir.join(format!("train_{method}.json")));
    let mut decoder = match method {
        "full" => golden.decoder(backend.clone(), Training::Full),
        _ => golden.decoder(backend.clone(), Training::Frozen),
    };
    if method == "lora" {
        decoder.attach(&golden.adapter("lora"), true).unwrap();
    }
    let number = |section: &str, key: &str| run[section][key].as_f64().unwrap();
    let adamw = AdamWConfig {
        beta1: number("optimizer", "beta1"),
        beta2: number("optimizer", "beta2"),
        eps: number("optimizer", "eps"),
        weight_decay: number("optimizer", "weight_decay"),
    };
    let optimizer = Recipe {
        max_grad_norm: Some(number("optimizer", "max_norm")),
        ..Recipe::from(OptimizerConfig::AdamW(adamw))
    };
    let schedule = ScheduleConfig {
        kind: ScheduleKind::Cosine,
        lr: number("schedule", "base_lr"),
        warmup: Warmup::Steps(run["schedule"]["warmup_steps"].as_u64().unwrap()),
        min_lr_ratio: 0.0,
        n_steps: run["schedule"]["total_steps"].as_u64().unwrap(),
        convention: Convention::Transformers,
    };
    let mut learner = Learner::new(decoder, optimizer, schedule, 0).unwrap();
    let steps = run["steps"].as_array().unwrap();
    assert_eq!(steps.len(), 20);
    for step in steps {
        let micro_batches = step["micro_batches"].as_array().unwrap().iter();
        let to_rows = |ids: &Value| integers(ids).iter().map(|&id| id as usize).collect::<Vec<_>>();
        let batches: Vec<Batch> =
            micro_batches.map(|ids| batch(&run["rows"], &to_rows(ids))).collect();
        let report = learner.train_step(&batches).unwrap();
        let what = format!("{} {variant} {method} step {}", backend.name(), report.step);
        assert_number(&what, report.loss, &step["loss"], LOGITS);
        assert_number(&what, report.lr, &step["lr"], 1e-9 * schedule.lr);
        assert_number(&what, report.weight, &step["weight_sum"], 1e-9);
        let norm = step["grad_norm"].as_f64().unwrap();
        assert_number(&what, report.grad_norm, &step["grad_norm"], NORMS * norm);
        assert_number(&what, report.clip, &step["clip"], NORMS);
    }
    let expected = golden.tensors(&format!("train_{method}_final"));
    let what = format!("{} {variant} {method} final", backend.name());
    assert_tensors(&what, &learner.decoder().trained(), &expected, PARAMETERS, false);
}

#[test]
fn twenty_steps_of_full_training() {
    both!(check_training("plain", "full"));
    both!(check_training("tied", "full"));
}

#[test]
fn twenty_steps_of_lora() {
    both!(check_training("plain", "lora"));
}

/// The rates of every schedule in schedules.json.
#[test]
fn schedules() {
    let file = json(root().join("schedules.json"));
    let cases = file["schedules"].as_array().unwrap();
    assert_eq!(cases.len(), SCHEDULES);
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let kind = match name {
            "constant" | "constant_with_warmup" => ScheduleKind::Constant,
            "linear" => ScheduleKind::Linear,
            "cosine" | "cosine_with_min_lr" => ScheduleKind::Cosine,
            other => panic!("{other}"),
        };
        let schedule = ScheduleConfig {
            kind,
            lr: case["base_lr"].as_f64().unwrap(),
            warmup: Warmup::Steps(case["warmup_steps"].as_u64().unwrap_or(0)),
            min_lr_ratio: case["min_lr_ratio"].as_f64().unwrap_or(0.0),
            n_steps: case["total_steps"].as_u64().unwrap(),
            convention: Convention::Transformers,
        };
        let rates = case["lr"].as_array().unwrap();
        assert_eq!(rates.len() as u64, schedule.n_steps);
        for (step, expected) in rates.iter().enumerate() {
            let bound = 1e-9 * schedule.lr;
            assert_number(&format!("{name} {step}"), schedule.lr(step as u64), expected, bound);
        }
    }
}

/// Number of schedules in the file.
const SCHEDULES: usize = 9;

// ---------------------------------------------------------------------- generation

/// Greedy ids with the cache, side by side and one by one, with and without stop tokens; and the
/// logits of the whole forward.
fn check_generation<B: Backend>(backend: B, variant: &'static str) {
    let golden = Golden::open(variant);
    let mut decoder = golden.decoder(backend.clone(), Training::Frozen);
    let cases = golden.json["generate"].as_array().unwrap();
    assert!(!cases.is_empty());
    let prompts: Vec<Vec<u32>> = cases.iter().map(|case| integers(&case["prompt"])).collect();
    for batch_size in [1, 2, prompts.len()] {
        let generator = Generator { batch_size, ..Generator::greedy(12, &[]) };
        let found = generator.run(&mut decoder, &prompts).unwrap();
        for (case, found) in cases.iter().zip(found) {
            assert_eq!(found.ids, integers(&case["new_ids"]), "{} {variant}", golden.variant);
            assert!(!found.stopped());
        }
    }
    let logits = golden.tensors("logits");
    for (i, case) in cases.iter().enumerate() {
        let mut generator = Generator::greedy(12, &integers(&case["stop_ids"]));
        let mut found = generator.run(&mut decoder, &prompts[i..=i]).unwrap().remove(0);
        found.ids.extend(found.stop_id);
        assert_eq!(found.ids, integers(&case["stopped_ids"]), "{variant}: stop");
        generator.stop_ids.clear();
        // The logits that chose each token, from one forward over prompt and answer.
        let ids = [prompts[i].clone(), integers(&case["new_ids"])].concat();
        let first = prompts[i].len() - 1;
        let batch = Batch::from_pack(&ids, &vec![0.0; ids.len()], &[ids.len()]).unwrap();
        let rows: Vec<u32> = (first as u32..first as u32 + 12).collect();
        let expected = &logits.get(&format!("generate.{i}")).unwrap().data;
        assert_close("generation", &decoder.logits(&batch, &rows).unwrap(), expected, LOGITS);
    }
}

#[test]
fn generation() {
    for variant in ["plain", "tied", "bias", "mlpbias"] {
        both!(check_generation(variant));
    }
}

/// Every file that the index lists is there, and no variant is left out above.
#[test]
fn all_variants_are_compared() {
    let index = json(root().join("index.json"));
    let variants = index["variants"].as_object().unwrap();
    assert_eq!(variants.keys().collect::<Vec<_>>(), ["plain", "tied", "bias", "mlpbias"]);
    let mut n_files = 0;
    for (variant, files) in variants {
        for file in files.as_array().unwrap() {
            assert!(root().join(variant).join(file.as_str().unwrap()).is_file(), "{file}");
            n_files += 1;
        }
    }
    assert_eq!(n_files, 43);
}
