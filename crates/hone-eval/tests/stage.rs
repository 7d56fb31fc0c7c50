//! The program on models of one layer: what it measures, what it says, and what it refuses.

use std::path::PathBuf;
use std::process::{Command, Output};

use arrow::array::{BooleanArray, LargeStringArray};
use hone_kernels::{Backend, Cpu};
use hone_model::{Batch, Compute, Decoder, ModelConfig, StoredType, Training, init_weights};
use hone_schema::{ArtefactKind, Doc, InputRef, Kind, Ledger, Pack, Prompt, Roles, Split, sha256};
use hone_store::{Draft, Seal, Sealed};
use hone_tokens::{Vocab, VocabSpec, train_vocab};
use serde_json::Value;

const CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 300,
    "tie_word_embeddings": true, "max_position_embeddings": 64}"#;

/// A run up to `hone-merge`.
struct Place {
    dir: tempfile::TempDir,
    model: ModelConfig,
    vocab: Vocab,
}

impl Place {
    fn new() -> Self {
        let json = train_vocab(["x x"], &VocabSpec::new(260, vec!["<|end|>".into()]).unwrap());
        let place = Place {
            dir: tempfile::tempdir().unwrap(),
            model: ModelConfig::from_json(CONFIG).unwrap(),
            vocab: Vocab::from_json(&json).unwrap(),
        };
        let base = place.path("base");
        std::fs::create_dir(&base).unwrap();
        std::fs::write(base.join("config.json"), CONFIG).unwrap();
        std::fs::write(base.join("model.safetensors"), place.weights(1)).unwrap();
        place.pipeline("max_new = 4");
        place.packs(&json);
        place.seal("train", ArtefactKind::Adapter, vec![], |draft| {
            let lines = "{\"step\": 1, \"loss\": 4.5}\n{\"step\": 2, \"loss\": 2.5}\n";
            draft.write("metrics.jsonl", lines.as_bytes(), None).unwrap();
        });
        place.tuned(2);
        place
    }

    fn weights(&self, seed: u64) -> Vec<u8> {
        init_weights(&self.model, seed).to_safetensors(StoredType::F32).unwrap()
    }

    fn tuned(&self, seed: u64) {
        self.tuned_with(seed, &[("chat_template.jinja", "{{ messages }}")]);
    }

    fn tuned_with(&self, seed: u64, files: &[(&str, &str)]) {
        let train = Sealed::open_any(&self.stage("train")).unwrap();
        self.seal("merge", ArtefactKind::Weights, vec![train.input("trained")], |draft| {
            draft.write("config.json", CONFIG.as_bytes(), None).unwrap();
            draft.write("model.safetensors", &self.weights(seed), None).unwrap();
            for (name, text) in files {
                draft.write(name, text.as_bytes(), None).unwrap();
            }
        });
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn stage(&self, stage: &str) -> PathBuf {
        self.path("runs/p").join(stage)
    }

    fn pipeline(&self, table: &str) {
        let text = format!("name = \"p\"\nbase = \"base\"\n\n[eval]\n{table}\n");
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

    fn pack(&self, n: u32) -> Pack {
        let doc = |len, kind| Doc {
            len,
            row: u64::from(n),
            row_id: format!("r{n}"),
            source: format!("{kind} rows"),
            kind,
            offset: 0,
            truncated: false,
            kept: Vec::new(),
        };
        Pack {
            input_ids: (0..24).map(|i| (i * 11 + n) % 260).collect(),
            loss_weight: (0..24).map(|i| if i % 3 == 0 { 0.0 } else { 0.5 }).collect(),
            roles: Roles::one("assistant", 24),
            docs: vec![doc(10, Kind::Sft), doc(14, Kind::Text)],
        }
    }

    fn prompt(&self, n: usize, split: Split) -> Prompt {
        let question = format!("q{n} <script>alert(1)</script>");
        let group = if n.is_multiple_of(2) { "even" } else { "odd" };
        let ids: Vec<u32> = question.bytes().map(|byte| 1 + u32::from(byte) % 250).collect();
        Prompt {
            id: format!("p{n}"),
            source: "s".into(),
            split,
            bare_ids: ids[..2].to_vec(),
            prompt_ids: ids,
            prompt: question.clone(),
            question,
            reference: r#"{"a": 1}"#.into(),
            meta: Some(format!(r#"{{"parity": "{group}", "name": "n{n}"}}"#)),
        }
    }

    fn packs(&self, tokenizer: &[u8]) {
        let mut prompts: Vec<Prompt> = (0..40).map(|n| self.prompt(n, Split::Test)).collect();
        prompts.push(self.prompt(40, Split::Eval));
        self.seal("tokenize", ArtefactKind::Packs, vec![], |draft| {
            let packs: Vec<Pack> = (0..5).map(|n| self.pack(n)).collect();
            let mut file = draft.ipc("test.arrow", Pack::schema()).unwrap();
            file.write(&Pack::to_batch(&packs).unwrap()).unwrap();
            file.finish().unwrap();
            let mut file = draft.parquet("prompts.parquet", Prompt::schema()).unwrap();
            file.write(&Prompt::to_batch(&prompts).unwrap()).unwrap();
            file.finish().unwrap();
            draft.write("tokenizer.json", tokenizer, None).unwrap();
            draft.write("stops.json", br#"{"stop_ids": [0]}"#, None).unwrap();
        });
    }

    fn eval(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_hone-eval"))
            .current_dir(self.dir.path())
            .args(["--pipeline", "p.toml"])
            .args(args)
            .output()
            .unwrap()
    }

    fn sealed(&self) -> Sealed {
        Sealed::open(&self.stage("eval"), ArtefactKind::Report).unwrap()
    }

    fn results(&self) -> Value {
        serde_json::from_slice(&self.sealed().read("results.json").unwrap()).unwrap()
    }

    /// A model, computed with in `compute`.
    fn decoder(&self, seed: u64, compute: Compute) -> Decoder<Cpu> {
        let (cpu, weights) = (Cpu::new().with_compute(compute), init_weights(&self.model, seed));
        Decoder::load(cpu, &self.model, &weights, Training::Frozen).unwrap()
    }

    /// Mean loss of one kind of documents, computed document by document.
    fn expected_loss(&self, seed: u64, kind: Kind, compute: Compute) -> f64 {
        let mut decoder = self.decoder(seed, compute);
        let (mut loss, mut weight) = (0.0, 0.0);
        for pack in (0..5).map(|n| self.pack(n)) {
            let part = if kind == Kind::Sft { 0..10 } else { 10..24 };
            let mut batch = Batch::new();
            batch.push(&pack.input_ids[part.clone()], &pack.loss_weight[part]).unwrap();
            let sums = decoder.loss(&batch, None).unwrap();
            (loss, weight) = (loss + sums.weighted_loss, weight + sums.weight);
        }
        loss / weight
    }
}

fn check(output: &Output, exit: i32, says: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(exit), "{stderr}");
    for part in says {
        assert!(stderr.contains(part), "{part:?} is not in {stderr}");
    }
}

fn number(value: &Value, path: &str) -> f64 {
    value.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("{path} in {value}"))
}

#[test]
fn both_models_are_measured_on_the_same_rows() {
    let place = Place::new();
    check(&place.eval(&[]), 0, &["exact match", "plain perplexity", "report.html"]);
    let results = place.results();
    for (model, seed) in [("base", 1), ("tuned", 2)] {
        let at = |path: &str| number(&results, &format!("/{model}/{path}"));
        for (kind, name) in [(Kind::Sft, "sft"), (Kind::Text, "text")] {
            let expected = place.expected_loss(seed, kind, Compute::F32);
            for breakdown in [format!("by_kind/{name}"), format!("by_source/{name} rows")] {
                let loss = at(&format!("{breakdown}/loss"));
                assert!((loss - expected).abs() < 1e-6, "{model} {breakdown}: {loss} {expected}");
            }
        }
        let plain = place.expected_loss(seed, Kind::Text, Compute::F32).exp();
        assert!((at("plain_perplexity") / plain - 1.0).abs() < 1e-6);
        let counts = ["n_prompts", "n_test_docs", "n_plain_docs", "n_test_tokens"].map(at);
        // Of a document's tokens two thirds count, its first never.
        assert_eq!(counts, [40.0, 10.0, 5.0, 5.0 * (6.0 + 9.0)]);
        assert_eq!(at("by_field/parity/odd/n_prompts"), 20.0);
        assert_eq!(results[model]["by_field"].as_object().unwrap().len(), 1);
    }
    let rise =
        number(&results, "/tuned/plain_perplexity") / number(&results, "/base/plain_perplexity");
    assert!(
        (number(&results, "/change/plain_perplexity_percent") - 100.0 * (rise - 1.0)).abs() < 1e-9
    );
    check(&place.eval(&["--json"]), 0, &["fresh", "exact match"]);

    let page = String::from_utf8(place.sealed().read("report.html").unwrap()).unwrap();
    assert!(page.contains("q0 &lt;script&gt;") && !page.contains("<script"), "text is escaped");
    for outside in ["http:", "https:", "url(", "@import", " src=", "<link"] {
        assert!(!page.contains(outside), "{outside} in the page");
    }
    assert!(page.contains("training loss, last 2.5000"));
    let bytes = ["report.html", "results.json", "rows.parquet"]
        .map(|name| place.sealed().read(name).unwrap());
    check(&place.eval(&["--force", "--threads", "1"]), 0, &[]);
    let again = ["report.html", "results.json", "rows.parquet"]
        .map(|name| place.sealed().read(name).unwrap());
    assert!(bytes == again, "the same bytes for one thread");
}

#[test]
fn the_chat_template_is_told_in_whichever_form_it_is_there() {
    let place = Place::new();
    place.pipeline("max_new = 1\nmax_prompts = 1\nsamples = 1\nsampled = 0");
    let hash = sha256(b"{{ messages }}").to_string();
    let said = format!(r#"{{"template": "{hash}"}}"#);
    let other = ("chat_template.jinja", "{{ other }}");
    let jinja = ("chat_template.jinja", "{{ messages }}");
    let one = ("tokenizer_config.json", r#"{"chat_template": "{{ messages }}"}"#);
    let two = (
        "tokenizer_config.json",
        r#"{"chat_template": [{"name": "tool_use", "template": "{{ tools }}"},
                              {"name": "default", "template": "{{ messages }}"}]}"#,
    );
    let none = ("tokenizer_config.json", r#"{"eos_token": "e"}"#);
    let silent = ("merge.json", r#"{"template": null}"#);
    let check_files = |files: &[(&str, &str)], expected: Option<&str>| {
        place.tuned_with(2, files);
        check(&place.eval(&[]), 0, &[]);
        assert_eq!(place.results()["template_sha256"].as_str(), expected, "{files:?}");
    };
    check_files(&[("merge.json", &said), other], Some(&hash));
    check_files(&[("merge.json", &said), two], Some(&hash));
    check_files(&[silent, jinja], Some(&hash));
    check_files(&[one], Some(&hash));
    check_files(&[silent, two], Some(&hash));
    check_files(&[none], None);
    check_files(&[], None);
    place.tuned_with(2, &[("merge.json", "{")]);
    check(&place.eval(&[]), 3, &["merge.json`: EOF while parsing"]);
}

#[test]
fn rows_hold_what_was_generated() {
    let place = Place::new();
    place.pipeline("max_new = 4\nbatch_size = 7\nmax_prompts = 10\nformat = \"json\"");
    check(&place.eval(&[]), 0, &["valid JSON", "fields right"]);
    let rows: Vec<_> = place.sealed().parquet("rows.parquet").unwrap().collect();
    let rows = rows[0].as_ref().unwrap();
    assert_eq!(rows.num_rows(), 10);
    let text = |name: &str| {
        rows.column_by_name(name)
            .unwrap()
            .as_any()
            .downcast_ref::<LargeStringArray>()
            .unwrap()
            .clone()
    };
    let ids: Vec<String> = text("id").iter().flatten().map(str::to_owned).collect();
    assert_eq!(ids, ["p0", "p4", "p8", "p12", "p16", "p20", "p24", "p28", "p32", "p36"]);
    let stopped = rows.column_by_name("tuned_stopped").unwrap();
    let stopped = stopped.as_any().downcast_ref::<BooleanArray>().unwrap();

    let mut decoder = place.decoder(2, Compute::F32);
    let generator = hone_model::Generator::greedy(4, &[0]);
    for (row, n) in (0..40).step_by(4).enumerate() {
        let prompt = place.prompt(n, Split::Test);
        let made = generator.run(&mut decoder, &[prompt.prompt_ids]).unwrap().remove(0);
        let expected = place.vocab.decode(&made.ids, false).unwrap();
        assert_eq!(text("tuned_text").value(row), expected);
        assert_eq!(stopped.value(row), made.stopped());
    }
}

/// Both models, what they score and what they generate, are those of a decoder that computes in bf16.
#[test]
fn in_bf16_both_models_are_what_the_engine_computes_in_bf16() {
    let place = Place::new();
    place.pipeline("max_new = 4\nsampled = 0\ncompute = \"bf16\"");
    let output = place.eval(&[]);
    check(&output, 0, &[]);
    let is_noted = String::from_utf8_lossy(&output.stderr).contains("no instructions for bf16");
    assert_eq!(is_noted, !Cpu::has_bf16());
    let results = place.results();
    assert_eq!(results["compute"], "bf16");
    for (model, seed) in [("base", 1), ("tuned", 2)] {
        for (kind, name) in [(Kind::Sft, "sft"), (Kind::Text, "text")] {
            let found = number(&results, &format!("/{model}/by_kind/{name}/loss"));
            let [rounded, exact] =
                [Compute::Bf16, Compute::F32].map(|c| place.expected_loss(seed, kind, c));
            assert!((found - rounded).abs() < 1e-6, "{model} {name}: {found} {rounded}");
            assert!(rounded != exact, "{model} {name}: {exact}");
        }
    }
    let rows: Vec<_> = place.sealed().parquet("rows.parquet").unwrap().collect();
    let rows = rows[0].as_ref().unwrap();
    let mut decoder = place.decoder(2, Compute::Bf16);
    let generator = hone_model::Generator::greedy(4, &[0]);
    let prompts: Vec<_> = (0..40).map(|n| place.prompt(n, Split::Test).prompt_ids).collect();
    let made = generator.run(&mut decoder, &prompts).unwrap();
    let expected: Vec<String> =
        made.iter().map(|made| place.vocab.decode(&made.ids, false).unwrap()).collect();
    let texts = rows.column_by_name("tuned_text").unwrap();
    let texts = texts.as_any().downcast_ref::<LargeStringArray>().unwrap();
    assert_eq!(texts.iter().flatten().collect::<Vec<_>>(), expected);
}

#[test]
fn a_gate_that_fails_is_named_and_fails_again_when_fresh() {
    let place = Place::new();
    place.pipeline("max_new = 2\nmin_exact_match = 0.5\nmax_base_exact_match = 0.5");
    check(&place.eval(&[]), 1, &["these gates failed: min_exact_match\n"]);
    check(&place.eval(&[]), 1, &["fresh", "FAILED", "these gates failed: min_exact_match\n"]);
    check(&place.eval(&["--why"]), 0, &["fresh"]);
    let results = place.results();
    assert_eq!(results["passed"], false);
    assert_eq!(results["gates"][1]["passed"], true, "{results}");
    for (set, says) in [
        ("eval.min_exact_match=95", "is a share, from 0 to 1"),
        ("eval.min_json_valid=0.5", "measures JSON answers"),
        ("eval.temperature=0.0", "is not above 0"),
        ("eval.compute=bfloat16", "unknown variant `bfloat16`, expected `f32` or `bf16`"),
        ("eval.max_nwe=3", "did you mean `max_new`?"),
    ] {
        check(&place.eval(&["--set", set]), 2, &[says]);
    }
}

#[test]
fn a_model_that_is_not_of_this_training_gets_no_curve() {
    let place = Place::new();
    place.seal("train", ArtefactKind::Adapter, vec![], |draft| {
        draft.write("metrics.jsonl", b"{\"step\": 9}\n", None).unwrap();
    });
    check(&place.eval(&[]), 0, &["was not made from", "no loss curve"]);
    let page = String::from_utf8(place.sealed().read("report.html").unwrap()).unwrap();
    assert!(!page.contains("training loss"));
    std::fs::remove_dir_all(place.stage("merge")).unwrap();
    check(&place.eval(&[]), 3, &["does not exist"]);
}
