//! A small pipeline that goes through the whole chain in a second: forty additions, and a model of
//! random weights beside the tokenizer of the embedded one.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant};

use hone_testkit::{Output, Running, Tree, workspace};
use serde_json::{Value, json};

/// The stages, in their order.
pub(crate) const STAGES: [&str; 6] = ["ingest", "template", "tokenize", "train", "merge", "eval"];

/// The pipeline file. Tests change it by `replace`, so every line is another.
pub(crate) const PIPELINE: &str = r#"base = "base"
seed = 7

[ingest]
eval_share = 0.1
test_share = 0.1

[[ingest.source]]
name = "sums"
path = "rows.jsonl"

[template]
template = "chatml"

[tokenize]
max_len = 64
too_long = "drop"

[train]
rank = 4
batch_size = 2
micro_batch_size = 1
epochs = 20
lr = 1e-2
dropout = 0.1
eval_every = 10
checkpoint_every = 5

[merge]
dtype = "f32"

[eval]
max_new = 8
"#;

/// Longest wait for something that takes a tenth of a second on an idle machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A tree with the fixture.
pub(crate) struct Place {
    pub(crate) tree: Tree,
}

/// Files of an artefact, or of several, by their paths.
pub(crate) type Files = BTreeMap<String, Vec<u8>>;

/// Rows to learn from; of the last two, one is longer than a pack and one has no response.
pub(crate) fn rows(n: usize) -> String {
    let row = |question: String, answer: String| {
        format!("{}\n", json!({"instruction": question, "output": answer}))
    };
    let mut text: String =
        (0..n).map(|i| row(format!("What is {i} and {i}?"), format!("It is {}.", 2 * i))).collect();
    text.push_str(&row("Count to a hundred.".into(), "one two three four ".repeat(30)));
    text.push_str(&row("Say nothing.".into(), String::new()));
    text
}

impl Place {
    /// The fixture, and nothing run yet.
    pub(crate) fn new() -> Self {
        let tree = Tree::new();
        tree.write("p.toml", PIPELINE);
        tree.write("rows.jsonl", rows(40));
        let embedded = workspace().join("data/models/tiny-base");
        for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
            tree.write(&format!("base/{name}"), std::fs::read(embedded.join(name)).unwrap());
        }
        let config = config();
        tree.write("base/config.json", config.to_string());
        tree.write("base/model.safetensors", weights(&config));
        Place { tree }
    }

    /// The fixture with these stages run.
    pub(crate) fn after(stages: &[&str]) -> Self {
        let place = Place::new();
        for stage in stages {
            place.done(stage, &[]);
        }
        place
    }

    /// A copy that can be spoilt.
    pub(crate) fn copy(&self) -> Self {
        Place { tree: self.tree.copy() }
    }

    /// Runs a stage.
    pub(crate) fn run(&self, stage: &str, args: &[&str]) -> Output {
        self.tree.run(&program(stage), &pipeline(args))
    }

    /// Runs a stage, which must succeed.
    pub(crate) fn done(&self, stage: &str, args: &[&str]) -> Output {
        let output = self.run(stage, args);
        assert_eq!(output.code, Some(0), "{stage} {args:?}: {}", output.stderr);
        output
    }

    /// The command that runs a stage.
    pub(crate) fn command(&self, stage: &str, args: &[&str]) -> Command {
        self.tree.command(&program(stage), &pipeline(args))
    }

    /// Starts a stage.
    pub(crate) fn start(&self, stage: &str, args: &[&str]) -> Running<'_> {
        self.tree.spawn(&program(stage), &pipeline(args))
    }

    /// The files of a stage's artefact.
    pub(crate) fn artefact(&self, stage: &str) -> Files {
        self.tree.files(&format!("runs/p/{stage}"))
    }

    /// Everything in the runs that can be seen.
    pub(crate) fn visible(&self) -> Files {
        let mut files = self.tree.files("runs");
        files.retain(|path, _| !path.split('/').any(|part| part.starts_with('.')));
        files
    }

    /// What killed writers left behind.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let paths = self.tree.paths("runs").into_iter();
        paths.filter(|path| path.contains(".draft-")).collect()
    }

    /// A file of the tree as JSON.
    pub(crate) fn json(&self, path: &str) -> Value {
        serde_json::from_slice(&std::fs::read(self.tree.path(path)).unwrap()).unwrap()
    }

    /// Flips a bit in the middle of a file.
    pub(crate) fn flip(&self, path: &str) {
        let mut bytes = std::fs::read(self.tree.path(path)).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        self.tree.write(path, bytes);
    }

    /// Lines of the live metrics of training.
    pub(crate) fn live_lines(&self) -> usize {
        let text = std::fs::read_to_string(self.tree.path("runs/p/logs/train/metrics.jsonl"));
        text.unwrap_or_default().lines().count()
    }
}

fn program(stage: &str) -> String {
    format!("hone-{stage}")
}

fn pipeline<'a>(args: &[&'a str]) -> Vec<&'a str> {
    [&["--pipeline", "p.toml"], args].concat()
}

/// Waits until `is_so`, and says whether it came before `running` ended.
pub(crate) fn wait_until(running: &mut Running<'_>, mut is_so: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    while !is_so() {
        if !running.is_running() {
            return false;
        }
        assert!(start.elapsed() < PATIENCE, "nothing happened");
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

/// Names of the files that differ or are missing on one side.
pub(crate) fn differing(one: &Files, other: &Files) -> Vec<String> {
    let names: std::collections::BTreeSet<&String> = one.keys().chain(other.keys()).collect();
    names.into_iter().filter(|name| one.get(*name) != other.get(*name)).cloned().collect()
}

/// Shape of the model: two layers of the embedded one's kind.
fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": true,
        "vocab_size": 2048,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    })
}

/// A safetensors file of small numbers without a pattern, and ones for the norms.
fn weights(config: &Value) -> Vec<u8> {
    let size = |key: &str| config[key].as_u64().unwrap() as usize;
    let (d, inner, v) = (size("hidden_size"), size("intermediate_size"), size("vocab_size"));
    let kv = size("num_key_value_heads") * size("head_dim");
    let mut shapes = vec![("model.embed_tokens".to_owned(), vec![v, d])];
    for layer in 0..size("num_hidden_layers") {
        let matrices = [
            ("self_attn.q_proj", vec![d, d]),
            ("self_attn.k_proj", vec![kv, d]),
            ("self_attn.v_proj", vec![kv, d]),
            ("self_attn.o_proj", vec![d, d]),
            ("mlp.gate_proj", vec![inner, d]),
            ("mlp.up_proj", vec![inner, d]),
            ("mlp.down_proj", vec![d, inner]),
            ("input_layernorm", vec![d]),
            ("post_attention_layernorm", vec![d]),
        ];
        shapes
            .extend(matrices.map(|(name, shape)| (format!("model.layers.{layer}.{name}"), shape)));
    }
    shapes.push(("model.norm".to_owned(), vec![d]));

    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    let mut state = 1u64;
    for (name, shape) in shapes {
        let start = data.len();
        for _ in 0..shape.iter().product() {
            // Knuth's MMIX generator; the upper bits are good enough for weights.
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let small = (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
            let value = if shape.len() == 1 { 1.0 } else { small };
            data.extend(value.to_le_bytes());
        }
        let entry = json!({"dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]});
        header.insert(format!("{name}.weight"), entry);
    }
    let mut text = Value::Object(header).to_string();
    text.push_str(&" ".repeat(text.len().wrapping_neg() % 8));
    [&(text.len() as u64).to_le_bytes(), text.as_bytes(), &data].concat()
}

/// Name of a tensor, its entry in the header, its bytes.
pub(crate) type Part = (String, Value, Vec<u8>);

/// Tensors of a safetensors file by name, each with its type and shape.
pub(crate) fn tensors(bytes: &[u8]) -> Vec<Part> {
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
    let data = &bytes[8 + len..];
    let entries = header.as_object().unwrap().iter().filter(|(name, _)| *name != "__metadata__");
    let part = |(name, entry): (&String, &Value)| {
        let at = |idx: usize| entry["data_offsets"][idx].as_u64().unwrap() as usize;
        (name.clone(), entry.clone(), data[at(0)..at(1)].to_vec())
    };
    entries.map(part).collect()
}

/// Such a file.
pub(crate) fn file_of(tensors: Vec<Part>) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, mut entry, bytes) in tensors {
        entry["data_offsets"] = vec![data.len(), data.len() + bytes.len()].into();
        data.extend(bytes);
        header.insert(name, entry);
    }
    let text = Value::Object(header).to_string();
    [&(text.len() as u64).to_le_bytes(), text.as_bytes(), &data].concat()
}
