//! Every family and rotary scaling against transformers, PEFT and PyTorch: tests/golden/README.md
//! says what the files hold and how they were made.

#[path = "families/bf16.rs"]
mod bf16;
mod rows;

use std::io::Write;
use std::path::PathBuf;

use hone_kernels::{Backend, Cpu, Reference};
use hone_learn::{
    AdamWConfig, Convention, Learner, OptimizerConfig, Recipe, ScheduleConfig, ScheduleKind, Warmup,
};
use hone_model::{
    Activation, Adapter, Batch, Decoder, Generator, LayerRope, Merge, ModelConfig, NamedTensor,
    Recompute, Rope, RopeScaling, ScoreScale, Tensors, Training,
};
use rows::{all, batch, integers};
use serde_json::Value;

/// Largest absolute difference of a logit or a loss.
const LOGITS: f64 = 1e-5;
/// Largest difference of a gradient over the tensor's largest gradient.
const GRADIENTS: f64 = 1e-5;
/// Largest relative difference of a gradient norm.
const NORMS: f64 = 1e-4;
/// Largest absolute difference of a parameter after a run.
const PARAMETERS: f64 = 1e-4;

/// Number of variants in the index.
const N_VARIANTS: usize = 14;

fn root() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/families"))
}

fn json(path: PathBuf) -> Value {
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path:?}: {e}"));
    serde_json::from_str(&text).unwrap()
}

/// The files of one variant.
struct Golden {
    variant: String,
    config: ModelConfig,
    json: Value,
    all: Tensors,
}

impl Golden {
    fn open(variant: &str) -> Self {
        let dir = root().join(variant);
        let text = std::fs::read_to_string(dir.join("config.json")).unwrap();
        let config = ModelConfig::from_json(&text).unwrap_or_else(|e| panic!("{variant}: {e}"));
        let bytes = std::fs::read(dir.join("tensors.safetensors")).unwrap();
        Golden {
            variant: variant.to_owned(),
            config,
            json: json(dir.join("golden.json")),
            all: Tensors::from_safetensors(&[&bytes]).unwrap(),
        }
    }

    /// The tensors of one part, without its name.
    fn part(&self, part: &str) -> Tensors {
        let prefix = format!("{part}/");
        let named = self.all.iter().filter_map(|t| {
            let name = t.name.strip_prefix(&prefix)?;
            Some(NamedTensor::new(name, t.shape.clone(), t.data.clone()))
        });
        named.collect()
    }

    fn logits(&self, name: &str) -> &[f32] {
        &self.all.get(&format!("logits/{name}")).unwrap().data
    }

    fn adapter(&self) -> Adapter {
        let text = self.json["adapter_config"].to_string();
        Adapter::from_parts(&text, self.part("adapter")).unwrap()
    }

    fn decoder<B: Backend>(&self, backend: B, training: Training) -> Decoder<B> {
        Decoder::load(backend, &self.config, &self.part("model"), training).unwrap()
    }
}

fn every_row(batch: &Batch) -> Vec<u32> {
    (0..batch.n_tokens() as u32).collect()
}

/// Largest differences seen, by what they are of; printed, so that a run says how near the bounds
/// it came.
#[derive(Default)]
struct Seen(std::collections::BTreeMap<&'static str, f64>);

impl Seen {
    fn note(&mut self, kind: &'static str, what: &str, off: f64, bound: f64) {
        assert!(off <= bound, "{what} {kind}: off by {off:e}, the bound is {bound:e}");
        let worst = self.0.entry(kind).or_default();
        *worst = worst.max(off);
    }

    /// |a - b| of all values.
    fn values(&mut self, kind: &'static str, what: &str, found: &[f32], wanted: &[f32]) {
        assert_eq!(found.len(), wanted.len(), "{what} {kind}");
        let off = found.iter().zip(wanted).map(|(a, b)| f64::from((a - b).abs()));
        self.note(kind, what, off.fold(0.0, f64::max), LOGITS);
    }

    /// |a - b| of all tensors; with `relative`, over each tensor's largest value.
    fn tensors(
        &mut self,
        kind: &'static str,
        what: &str,
        (found, wanted): (&Tensors, &Tensors),
        (bound, relative): (f64, bool),
    ) {
        assert_eq!(found.len(), wanted.len(), "{what} {kind}: number of tensors");
        for tensor in wanted.iter() {
            let name = &tensor.name;
            let other = found.get(name).unwrap_or_else(|| panic!("{what} {kind}: no {name}"));
            assert_eq!(other.shape, tensor.shape, "{what} {kind}: {name}");
            let largest = tensor.data.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
            assert!(largest > 0.0, "{what} {kind}: {name} is all zeros, which tests nothing");
            let off = tensor.data.iter().zip(&other.data).map(|(a, b)| f64::from((a - b).abs()));
            let off = off.fold(0.0, f64::max) / if relative { f64::from(largest) } else { 1.0 };
            self.note(kind, &format!("{what} {name}"), off, bound);
        }
    }

    fn number(&mut self, kind: &'static str, what: &str, found: f64, wanted: &Value, bound: f64) {
        self.note(kind, what, (found - wanted.as_f64().unwrap()).abs(), bound);
    }
}

/// Logits of every row alone and packed, and the loss.
fn check_forward<B: Backend>(seen: &mut Seen, golden: &Golden, decoder: &mut Decoder<B>, of: &str) {
    let what = format!("{} {}", golden.variant, decoder.backend().name());
    let rows = &golden.json["rows"];
    let mut wanted = Vec::new();
    for i in all(rows) {
        let alone = batch(rows, &[i]);
        let expected = golden.logits(&format!("{of}.{i}"));
        let found = decoder.logits(&alone, &every_row(&alone)).unwrap();
        seen.values("logits", &format!("{what} {of} {i}"), &found, expected);
        wanted.extend_from_slice(expected);
    }
    let packed = batch(rows, &all(rows));
    let found = decoder.logits(&packed, &every_row(&packed)).unwrap();
    seen.values("logits", &format!("{what} {of} packed"), &found, &wanted);
    let golden_loss = &golden.json[if of == "rows" { "loss" } else { "lora" }];
    let sums = decoder.loss(&packed, None).unwrap();
    seen.number("loss", &what, sums.weighted_loss / sums.weight, &golden_loss["loss"], LOGITS);
    assert_eq!(sums.n_correct, golden_loss["n_correct"].as_u64().unwrap(), "{what}");
}

/// Gradients of the rows in one batch and one by one, kept and recomputed.
fn check_gradients<B: Backend>(
    seen: &mut Seen,
    golden: &Golden,
    decoder: &mut Decoder<B>,
    part: &str,
) {
    let what = format!("{} {} {part}", golden.variant, decoder.backend().name());
    let rows = &golden.json["rows"];
    let weight = batch(rows, &all(rows)).weight();
    let wanted = golden.part(part);
    for (size, recompute) in [(5, Recompute::None), (1, Recompute::Layer), (2, Recompute::None)] {
        decoder.set_recompute(recompute);
        decoder.zero_gradients();
        for chosen in all(rows).chunks(size) {
            decoder.accumulate(&batch(rows, chosen), (1.0 / weight) as f32, None).unwrap();
        }
        let pair = (&decoder.gradients(), &wanted);
        seen.tensors("gradients", &format!("{what} by {size}"), pair, (GRADIENTS, true));
    }
}

/// The learner of a golden's run, and the run's steps.
fn learner<B: Backend>(run: &Value, decoder: Decoder<B>) -> (Learner<B>, &[Value]) {
    let number = |key: &str| run["optimizer"][key].as_f64().unwrap();
    let adamw = AdamWConfig {
        beta1: number("beta1"),
        beta2: number("beta2"),
        eps: number("eps"),
        weight_decay: number("weight_decay"),
    };
    let optimizer = Recipe {
        max_grad_norm: Some(number("max_norm")),
        ..Recipe::from(OptimizerConfig::AdamW(adamw))
    };
    let steps = run["steps"].as_array().unwrap();
    assert_eq!(steps.len(), 20);
    let schedule = ScheduleConfig {
        kind: ScheduleKind::Cosine,
        lr: number("base_lr"),
        warmup: Warmup::Steps(run["optimizer"]["warmup_steps"].as_u64().unwrap()),
        min_lr_ratio: 0.0,
        n_steps: steps.len() as u64,
        convention: Convention::Transformers,
    };
    (Learner::new(decoder, optimizer, schedule, 0).unwrap(), steps)
}

/// A run of twenty steps: losses, norms, final parameters.
fn check_training<B: Backend>(seen: &mut Seen, golden: &Golden, decoder: Decoder<B>, method: &str) {
    let what = format!("{} {} {method}", golden.variant, decoder.backend().name());
    let (mut learner, steps) = learner(&golden.json["train"][method], decoder);
    for step in steps {
        let chosen: Vec<usize> = integers(&step["rows"]).iter().map(|&row| row as usize).collect();
        let rows = batch(&golden.json["train_rows"], &chosen);
        let report = learner.train_step(&[rows]).unwrap();
        seen.number("run's losses", &what, report.loss, &step["loss"], LOGITS);
        let norm = step["grad_norm"].as_f64().unwrap();
        let off = (report.grad_norm - norm).abs() / norm;
        seen.note("run's norms", &what, off, NORMS);
    }
    let wanted = golden.part(&format!("{method}_final"));
    let pair = (&learner.decoder().trained(), &wanted);
    seen.tensors("run's parameters", &what, pair, (PARAMETERS, false));
}

/// Greedy ids with the cache, side by side and one by one; and the logits that chose each.
fn check_generation<B: Backend>(seen: &mut Seen, golden: &Golden, decoder: &mut Decoder<B>) {
    let what = format!("{} {}", golden.variant, decoder.backend().name());
    let cases = golden.json["generate"].as_array().unwrap();
    let prompts: Vec<Vec<u32>> = cases.iter().map(|case| integers(&case["prompt"])).collect();
    let wanted: Vec<Vec<u32>> = cases.iter().map(|case| integers(&case["new_ids"])).collect();
    assert_eq!(wanted.len(), 3);
    for batch_size in [1, 2, 3] {
        let generator = Generator { batch_size, ..Generator::greedy(12, &[]) };
        let found = generator.run(decoder, &prompts).unwrap();
        let found: Vec<_> = found.into_iter().map(|generation| generation.ids).collect();
        assert_eq!(found, wanted, "{what} by {batch_size}");
    }
    for (i, (prompt, new)) in prompts.iter().zip(&wanted).enumerate() {
        let expected = golden.logits(&format!("generate.{i}"));
        for (n, expected) in expected.chunks(golden.config.vocab_size).enumerate() {
            // A scaling may depend on how long the text was when the token was chosen.
            let ids = [prompt, &new[..n]].concat();
            let text = Batch::from_pack(&ids, &vec![0.0; ids.len()], &[ids.len()]).unwrap();
            let found = decoder.logits(&text, &[ids.len() as u32 - 1]).unwrap();
            seen.values("logits", &format!("{what} generated"), &found, expected);
        }
    }
}

fn check<B: Backend>(seen: &mut Seen, golden: &Golden, backend: B) {
    let frozen = || golden.decoder(backend.clone(), Training::Frozen);
    let full = || golden.decoder(backend.clone(), Training::Full);
    check_forward(seen, golden, &mut frozen(), "rows");
    check_gradients(seen, golden, &mut full(), "grads");
    check_generation(seen, golden, &mut frozen());
    let adapted = || {
        let mut decoder = frozen();
        decoder.attach(&golden.adapter(), true).unwrap();
        decoder
    };
    check_forward(seen, golden, &mut adapted(), "lora");
    check_gradients(seen, golden, &mut adapted(), "adapter_grads");
    if !golden.json["train"].is_null() {
        check_training(seen, golden, full(), "full");
        check_training(seen, golden, adapted(), "lora");
    }
}

/// Both backends on one variant; what an export, a merge and a rewritten configuration hold.
fn check_variant(variant: &str) {
    let golden = Golden::open(variant);
    let mut seen = Seen::default();
    check(&mut seen, &golden, Cpu::new());
    check(&mut seen, &golden, Reference);

    let weights = golden.part("model");
    assert_eq!(golden.decoder(Cpu::new(), Training::Frozen).export(), weights);
    let adapter = golden.adapter();
    assert_eq!(adapter.tensors.len(), 2 * weights_of_linears(&golden));
    let merge = Merge::new(&golden.config, &weights, &adapter).unwrap();
    let mut merged = Decoder::load(Cpu::new(), &golden.config, &merge, Training::Frozen).unwrap();
    check_forward(&mut seen, &golden, &mut merged, "lora");
    let again = ModelConfig::from_json(&golden.config.to_json()).unwrap();
    assert_eq!(again, golden.config, "{variant}");
    let mut log = std::io::stderr().lock();
    writeln!(log, "{variant}: {:?}", seen.0).unwrap();
}

/// Number of linear maps in all layers.
fn weights_of_linears(golden: &Golden) -> usize {
    golden.config.num_hidden_layers * golden.config.linear_names().len()
}

#[test]
fn all_variants_are_compared() {
    let index = json(root().join("index.json"));
    let variants: Vec<_> =
        index["variants"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    assert_eq!(variants.len(), N_VARIANTS, "a variant was added or lost");
    assert_eq!(variants, VARIANTS.map(|(name, _)| name));
    for (name, model_type) in VARIANTS {
        assert_eq!(Golden::open(name).config.family.model_type(), model_type);
    }
}

/// A change of a configuration that leaves its tensors as they are.
type Change = fn(&mut ModelConfig);

/// Knobs of the variants, each turned to another value.
const TURNED: [(&str, &str, Change); 27] = [
    ("smollm3", "rotary positions everywhere", |c| c.knobs.layers[1].rope = LayerRope::Main),
    ("smollm3", "no window", |c| c.knobs.layers[1].window = None),
    ("mistral", "a window of one more", |c| c.knobs.layers[0].window = Some(6)),
    ("mistral", "a window of one less", |c| c.knobs.layers[1].window = Some(4)),
    ("qwen2", "a window on layer 0", |c| c.knobs.layers[0].window = Some(5)),
    ("qwen2", "another base", |c| c.rope_theta = 1e4),
    ("qwen3", "another eps", |c| c.rms_norm_eps = 1e-2),
    ("gemma2", "weights not plus one", |c| c.knobs.norm_plus_one = false),
    ("gemma2", "another activation", |c| c.knobs.activation = Activation::Silu),
    ("gemma2", "no cap on scores", |c| c.knobs.score_soft_cap = None),
    ("gemma2", "no cap on logits", |c| c.knobs.logit_soft_cap = None),
    ("gemma2", "the usual score scale", |c| c.knobs.score_scale = ScoreScale::HeadDim),
    ("gemma2", "embeddings as they are", |c| c.knobs.embedding_scale = None),
    ("gemma2", "windows on the other layers", |c| c.knobs.layers.rotate_left(1)),
    ("gemma3", "no linear scaling", |c| c.knobs.rope_scaling = RopeScaling::None),
    ("gemma3", "one base for all layers", |c| {
        c.knobs.local_rope = Some(Rope { theta: c.rope_theta, scaling: RopeScaling::None });
    }),
    ("phi3", "no windows", |c| c.knobs.layers.clear()),
    ("granite", "no residual multiplier", |c| c.knobs.residual_scale = None),
    ("granite", "no embedding multiplier", |c| c.knobs.embedding_scale = None),
    ("granite", "no logit divisor", |c| c.knobs.logit_divisor = None),
    ("granite", "the usual score scale", |c| c.knobs.score_scale = ScoreScale::HeadDim),
    ("llama-linear", "no scaling", |c| c.knobs.rope_scaling = RopeScaling::None),
    ("llama-dynamic", "no scaling", |c| {
        c.max_position_embeddings = 64;
        c.knobs.rope_scaling = RopeScaling::None;
    }),
    ("llama-llama3", "linear scaling", |c| {
        c.knobs.rope_scaling = RopeScaling::Linear { factor: 4.0 };
    }),
    ("qwen2-yarn", "no attention factor", |c| {
        let RopeScaling::Yarn { attention_factor, .. } = &mut c.knobs.rope_scaling else {
            panic!("{c:?}");
        };
        *attention_factor = 1.0;
    }),
    ("phi3-longrope", "short divisors alone", |c| {
        let RopeScaling::LongRope { original, .. } = &mut c.knobs.rope_scaling else {
            panic!("{c:?}");
        };
        *original = 64;
    }),
    ("phi3-longrope", "no attention factor", |c| {
        let RopeScaling::LongRope { attention_factor, .. } = &mut c.knobs.rope_scaling else {
            panic!("{c:?}");
        };
        *attention_factor = 1.0;
    }),
];

/// A golden that a wrong decoder would meet too tests nothing: every knob turned moves the logits
/// far beyond the bound.
#[test]
fn every_knob_shows_in_the_goldens() {
    for (variant, what, turn) in TURNED {
        let mut golden = Golden::open(variant);
        turn(&mut golden.config);
        let mut decoder = golden.decoder(Cpu::new(), Training::Frozen);
        let longest = batch(&golden.json["rows"], &[3]);
        let found = decoder.logits(&longest, &every_row(&longest)).unwrap();
        let pairs = found.iter().zip(golden.logits("rows.3"));
        let off = pairs.map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
        assert!(off > 100.0 * LOGITS, "{variant} with {what}: logits move by {off:e} only");
    }
}

/// Declares one test a variant, so that they run side by side.
macro_rules! variants {
    ($($test:ident: $name:literal is $model_type:literal),* $(,)?) => {
        /// Every variant and its `model_type`.
        const VARIANTS: [(&str, &str); N_VARIANTS] = [$(($name, $model_type)),*];

        $(#[test]
        fn $test() {
            check_variant($name);
        })*
    };
}

variants! {
    smollm3: "smollm3" is "smollm3",
    mistral: "mistral" is "mistral",
    qwen2: "qwen2" is "qwen2",
    qwen3: "qwen3" is "qwen3",
    gemma2: "gemma2" is "gemma2",
    gemma3: "gemma3" is "gemma3_text",
    phi3: "phi3" is "phi3",
    granite: "granite" is "granite",
    olmo2: "olmo2" is "olmo2",
    llama_linear: "llama-linear" is "llama",
    llama_dynamic: "llama-dynamic" is "llama",
    llama_llama3: "llama-llama3" is "llama",
    qwen2_yarn: "qwen2-yarn" is "qwen2",
    phi3_longrope: "phi3-longrope" is "phi3",
}
