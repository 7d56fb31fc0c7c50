//! The program on a model of two layers: what it writes, what it measures, and what it refuses.

use std::path::PathBuf;
use std::process::{Command, Output};

use hone_model::{
    Adapter, BnbConfig, LoraConfig, Merge, ModelConfig, SafetensorsRegions, StoredType, Targets,
    TensorSource, Tensors, ValueType, init_weights, write_bnb_checkpoint,
};
use hone_schema::{ArtefactKind, Doc, InputRef, Kind, Ledger, Pack, Roles, sha256};
use hone_store::{Draft, ModelDir, Seal, Sealed};
use serde_json::{Value, json};

const CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 61,
    "tie_word_embeddings": true, "eos_token_id": 0, "bos_token_id": 0, "torch_dtype": "bfloat16"}"#;

const TEMPLATE: &str = "{{ messages[0].content }}";

/// A run up to `hone-train`.
struct Place {
    dir: tempfile::TempDir,
    model: ModelConfig,
}

impl Place {
    /// With base weights of that type, and documents of that kind.
    fn new(stored: StoredType, kind: Kind) -> Self {
        let model = ModelConfig::from_json(CONFIG).unwrap();
        let place = Place { dir: tempfile::tempdir().unwrap(), model };
        let base = place.path("base");
        std::fs::create_dir(&base).unwrap();
        let weights = init_weights(&place.model, 1).to_safetensors(stored).unwrap();
        for (name, bytes) in [
            ("config.json", CONFIG.as_bytes()),
            ("model.safetensors", &weights),
            ("tokenizer.json", b"{}"),
            ("tokenizer_config.json", br#"{"chat_template": "old", "eos_token": "e"}"#),
            ("generation_config.json", br#"{"eos_token_id": 0, "top_p": 0.9}"#),
        ] {
            std::fs::write(base.join(name), bytes).unwrap();
        }
        place.pipeline("");
        place.seal("template", ArtefactKind::Rendered, vec![], |draft| {
            draft.write("template.jinja", TEMPLATE.as_bytes(), None).unwrap();
        });
        place.packs(kind);
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn stage(&self, stage: &str) -> PathBuf {
        self.path("runs/p").join(stage)
    }

    fn pipeline(&self, table: &str) {
        let text = format!("name = \"p\"\nbase = \"base\"\n\n[merge]\n{table}\n");
        std::fs::write(self.path("p.toml"), text).unwrap();
    }

    fn seal(
        &self,
        stage: &str,
        kind: ArtefactKind,
        inputs: Vec<InputRef>,
        write: impl FnOnce(&Draft),
    ) {
        let draft = Draft::open(&self.stage(stage)).unwrap();
        write(&draft);
        let seal = Seal {
            kind,
            stage: stage.into(),
            key: sha256(b"test"),
            program: hone_store::program("test").unwrap(),
            config: Value::Null,
            inputs,
            ledger: Ledger::default(),
            report: Value::Null,
        };
        draft.seal(seal).unwrap();
    }

    fn packs(&self, kind: Kind) {
        let doc = |n: u32, len| Doc {
            len,
            row: u64::from(n),
            row_id: format!("r{n}"),
            source: "s".into(),
            kind,
            offset: 0,
            truncated: false,
            kept: Vec::new(),
        };
        let pack = |n: u32| Pack {
            input_ids: (0..24).map(|i| (i * 7 + n) % 61).collect(),
            loss_weight: vec![1.0; 24],
            roles: Roles::one("assistant", 24),
            docs: vec![doc(2 * n, 10), doc(2 * n + 1, 14)],
        };
        let rendered = Sealed::open(&self.stage("template"), ArtefactKind::Rendered).unwrap();
        let inputs = vec![rendered.input("rendered")];
        self.seal("tokenize", ArtefactKind::Packs, inputs, |draft| {
            for (name, packs) in [("train", 0..6), ("test", 6..9)] {
                let packs: Vec<Pack> = packs.map(pack).collect();
                let mut file = draft.ipc(&format!("{name}.arrow"), Pack::schema()).unwrap();
                file.write(&Pack::to_batch(&packs).unwrap()).unwrap();
                file.finish().unwrap();
            }
            draft.write("tokenizer.json", b"{}", None).unwrap();
            draft.write("stops.json", br#"{"stop_ids": [0, 2]}"#, None).unwrap();
        });
    }

    fn trained_on(&self) -> Vec<InputRef> {
        let packs = Sealed::open(&self.stage("tokenize"), ArtefactKind::Packs).unwrap();
        let base = ModelDir::open(&self.path("base")).unwrap();
        vec![packs.input("packs"), base.input("base").unwrap()]
    }

    /// An adapter whose B is not zero.
    fn adapter(&self) -> Adapter {
        self.adapter_of(LoraConfig::all_linear(4, 8.0))
    }

    fn adapter_of(&self, config: LoraConfig) -> Adapter {
        let mut adapter = Adapter::init(&self.model, config, 5).unwrap();
        let names: Vec<String> = adapter.tensors.iter().map(|t| t.name.clone()).collect();
        for name in names.iter().filter(|name| name.contains("lora_B")) {
            let data = &mut adapter.tensors.get_mut(name).unwrap().data;
            for (i, value) in data.iter_mut().enumerate() {
                *value = ((i * 37 % 101) as f32 - 50.0) / 500.0;
            }
        }
        self.seal("train", ArtefactKind::Adapter, self.trained_on(), |draft| {
            let bytes = adapter.tensors.to_safetensors(StoredType::F32).unwrap();
            draft.write("adapter_model.safetensors", &bytes, None).unwrap();
            draft.write("adapter_config.json", adapter.config.to_json().as_bytes(), None).unwrap();
        });
        adapter
    }

    fn merge(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_hone-merge"))
            .current_dir(self.dir.path())
            .args(["--pipeline", "p.toml"])
            .args(args)
            .output()
            .unwrap()
    }

    fn merged(&self) -> Sealed {
        Sealed::open(&self.stage("merge"), ArtefactKind::Weights).unwrap()
    }

    fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&self.merged().read(name).unwrap()).unwrap()
    }
}

fn check(output: &Output, exit: i32, says: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(exit), "{stderr}");
    assert!(stderr.contains(says), "{says:?} is not in {stderr}");
}

fn number(value: &Value, path: &str) -> f64 {
    value.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("{path} in {value}"))
}

#[test]
fn an_adapter_becomes_a_model_directory() {
    let place = Place::new(StoredType::F32, Kind::Sft);
    let adapter = place.adapter();
    check(&place.merge(&[]), 0, "14 tensors merged");
    let base = std::fs::read(place.path("base/model.safetensors")).unwrap();
    let base = SafetensorsRegions::new(&[&base]).unwrap();
    let merge = Merge::new(&place.model, &base, &adapter).unwrap();
    let names = place.model.tensors();
    let expected: Tensors = names.iter().map(|t| merge.tensor(&t.name).unwrap()).collect();
    let found = place.merged().read("model.safetensors").unwrap();
    assert_eq!(Tensors::from_safetensors(&[&found]).unwrap(), expected);
    let report = place.json("merge.json");
    let diff = number(&report, "/check/exact/max_logit_diff");
    assert!(diff > 0.0 && diff < 1e-5, "{diff}");
    assert_eq!(number(&report, "/check/n_positions"), 8.0 * 12.0);
    assert_eq!(report, place.merged().manifest().report);

    assert_eq!(
        place.json("generation_config.json"),
        json!({
            "eos_token_id": [0, 2], "top_p": 0.9, "bos_token_id": 0
        })
    );
    assert_eq!(place.json("config.json")["torch_dtype"], "float32");
    assert_eq!(place.json("tokenizer_config.json")["chat_template"], TEMPLATE);
    assert_eq!(place.merged().read("chat_template.jinja").unwrap(), TEMPLATE.as_bytes());

    check(&place.merge(&[]), 0, "fresh");
    place.pipeline("dtype = \"bf16\"");
    check(&place.merge(&["--threads", "1"]), 0, "`dtype` was \"base\" and is \"bf16\"");
    let report = place.json("merge.json");
    let written = number(&report, "/check/written/max_logit_diff");
    assert_eq!(number(&report, "/check/exact/max_logit_diff"), diff, "the same for one thread");
    assert!(written > 10.0 * diff, "{written}");
    let kl = number(&report, "/check/written/mean_kl");
    assert!(kl > 0.0 && kl < 0.01, "{kl}");
}

/// The head is then no longer the embedding: it gets a matrix, and the configuration says so.
#[test]
fn an_adapter_of_a_tied_head_unties_it() {
    let place = Place::new(StoredType::F32, Kind::Sft);
    let targets = Targets::Names(vec!["lm_head".to_owned()]);
    place.adapter_of(LoraConfig { target_modules: targets, ..LoraConfig::all_linear(4, 8.0) });
    check(&place.merge(&[]), 0, "1 tensors merged");
    assert_eq!(place.json("config.json")["tie_word_embeddings"], false);
    let found = place.merged().read("model.safetensors").unwrap();
    let found = Tensors::from_safetensors(&[&found]).unwrap();
    let head = found.get("lm_head.weight").unwrap();
    assert_ne!(head.data, found.get("model.embed_tokens.weight").unwrap().data);
    let diff = number(&place.json("merge.json"), "/check/exact/max_logit_diff");
    assert!(diff < 1e-5, "{diff}");
}

/// What is written is plain, in the type that the 4 bits stand for.
#[test]
fn an_adapter_of_a_4bit_base_is_merged_into_its_values() {
    let place = Place::new(StoredType::Bf16, Kind::Sft);
    let quant = BnbConfig::qlora(ValueType::Bf16);
    let (weights, mut bytes) = (init_weights(&place.model, 1), Vec::new());
    write_bnb_checkpoint(&mut bytes, &place.model, &weights, &quant, StoredType::Bf16).unwrap();
    std::fs::write(place.path("base/model.safetensors"), bytes).unwrap();
    let config = quant.into_model_config(CONFIG).unwrap();
    std::fs::write(place.path("base/config.json"), config).unwrap();
    place.adapter();
    check(&place.merge(&[]), 0, "14 tensors merged");
    let report = place.json("merge.json");
    assert_eq!(report["dtype"], "bf16");
    let diff = number(&report, "/check/exact/max_logit_diff");
    assert!(diff < 1e-5, "{diff}");
    assert_eq!(place.json("config.json").get("quantization_config"), None);
    let found = place.merged().read("model.safetensors").unwrap();
    let names: Vec<_> = Tensors::from_safetensors(&[&found]).unwrap().entries();
    assert_eq!(names, place.model.tensors());
}

#[test]
fn rows_with_tools_keep_the_template_of_their_own() {
    let place = Place::new(StoredType::F32, Kind::Sft);
    place.seal("template", ArtefactKind::Rendered, vec![], |draft| {
        draft.write("template.jinja", TEMPLATE.as_bytes(), None).unwrap();
        draft.write("tool_use.jinja", b"{{ tools }}", None).unwrap();
    });
    place.packs(Kind::Sft);
    place.adapter();
    check(&place.merge(&[]), 0, "14 tensors merged");
    let tokenizer = place.json("tokenizer_config.json");
    let templates = json!([
        {"name": "default", "template": TEMPLATE},
        {"name": "tool_use", "template": "{{ tools }}"},
    ]);
    assert_eq!(tokenizer, json!({"chat_template": templates, "eos_token": "e"}));
    // Loaders would take it for the only template.
    assert!(!place.merged().has("chat_template.jinja"));
}

#[test]
fn a_merge_above_its_bound_is_sealed_and_says_so() {
    let place = Place::new(StoredType::Bf16, Kind::Sft);
    place.adapter();
    check(&place.merge(&["--set", "merge.max_kl=1e-12"]), 1, "more than max_kl = 0.000000000001");
    assert_eq!(place.json("merge.json")["dtype"], "bf16");
    assert_eq!(place.json("merge.json")["check"]["passed"], false);
    check(&place.merge(&["--set", "merge.max_logit_diff=0.0"]), 1, "more than max_logit_diff = 0");
    check(&place.merge(&["--set", "merge.check_rows=0"]), 2, "`check_rows` is 0");
}

#[test]
fn full_weights_are_exported_as_they_are() {
    let place = Place::new(StoredType::Bf16, Kind::Text);
    let weights = init_weights(&place.model, 9).to_safetensors(StoredType::Bf16).unwrap();
    place.seal("train", ArtefactKind::Weights, place.trained_on(), |draft| {
        draft.write("model.safetensors", &weights, None).unwrap();
        draft.write("config.json", place.model.to_json().as_bytes(), None).unwrap();
    });
    check(&place.merge(&[]), 0, "exported, logits differ by at most 0.0e0");
    assert_eq!(place.merged().read("model.safetensors").unwrap(), weights);
    assert!(!place.merged().has("chat_template.jinja"), "no conversation was trained");
    // The base's own weights do not matter: the export may lie in their place.
    std::fs::remove_file(place.path("base/model.safetensors")).unwrap();
    check(&place.merge(&[]), 0, "fresh");
}

#[test]
fn what_does_not_belong_together_is_refused() {
    let place = Place::new(StoredType::F32, Kind::Sft);
    check(&place.merge(&[]), 3, "does not exist");
    place.adapter();
    std::fs::write(place.path("base/generation_config.json"), "{}").unwrap();
    check(&place.merge(&[]), 3, "made from other base than those in `base`");
    place.adapter();
    place.packs(Kind::Text);
    check(&place.merge(&[]), 3, "hint: run `hone-train` again");
    place.seal("train", ArtefactKind::Files, place.trained_on(), |_| ());
    check(&place.merge(&[]), 3, "holds files, nothing that was trained");
    assert!(!place.stage("merge").exists());
}
