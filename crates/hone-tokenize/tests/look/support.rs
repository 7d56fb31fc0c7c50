//! A place to run the program in: a model directory, a rendered artefact and a pipeline file.

use std::path::PathBuf;
use std::process::{Command, Output};

use hone_schema::{ArtefactKind, Kind, Ledger, Pack, Part, Rendered, Span, Split, sha256};
use hone_store::{Draft, Seal, Sealed};
use hone_tokens::{VocabSpec, train_vocab};
use serde_json::{Value, json};

/// A temporary tree.
pub(crate) struct Place {
    dir: tempfile::TempDir,
}

/// Added tokens, from id 0 on; the 256 bytes follow.
pub(crate) const SPECIALS: [&str; 4] = ["<|bos|>", "<|user|>", "<|assistant|>", "<|end|>"];

/// A piece of a row's text: the text, its message and role, the part that wrote it, its weight.
pub(crate) type Bit<'a> = (&'a str, Option<u32>, &'a str, Part, f32);

/// A row of such pieces.
pub(crate) fn row(id: &str, split: Split, bits: &[Bit<'_>]) -> Rendered {
    let mut row = Rendered {
        id: id.to_owned(),
        source: "s".into(),
        split,
        kind: Kind::Sft,
        text: String::new(),
        spans: Vec::new(),
        share: hone_schema::Share::Main,
        prompt_len: None,
        meta: None,
    };
    for (text, message, role, part, weight) in bits {
        let start = row.text.len() as u32;
        row.text.push_str(text);
        row.spans.push(Span {
            start,
            end: row.text.len() as u32,
            message: *message,
            role: (*role).to_owned(),
            part: *part,
            weight: *weight,
            chosen: false,
        });
    }
    row
}

/// A chat `user: question, assistant: answer` whose answer has that weight.
pub(crate) fn chat(id: &str, question: &str, answer: &str, weight: f32) -> Rendered {
    let bits = [
        ("<|bos|>", None, "", Part::Scaffold, 0.0),
        ("<|user|>", Some(0), "user", Part::Scaffold, 0.0),
        (question, Some(0), "user", Part::Content, 1.0),
        ("<|end|>", Some(0), "user", Part::Stop, 1.0),
        ("<|assistant|>", Some(1), "assistant", Part::Scaffold, 0.0),
        (answer, Some(1), "assistant", Part::Content, weight),
        ("<|end|>", Some(1), "assistant", Part::Stop, weight),
    ];
    row(id, Split::Train, &bits)
}

impl Place {
    /// A place whose rendered artefact holds `rows`.
    pub(crate) fn new(rows: &[Rendered]) -> Self {
        let place = Place { dir: tempfile::tempdir().unwrap() };
        let base = place.path("base");
        std::fs::create_dir(&base).unwrap();
        let specials = SPECIALS.map(str::to_owned).to_vec();
        let vocab = train_vocab(["x x x x"], &VocabSpec::new(300, specials).unwrap());
        std::fs::write(base.join("tokenizer.json"), vocab).unwrap();
        std::fs::write(base.join("config.json"), "{}").unwrap();
        std::fs::write(base.join("generation_config.json"), r#"{"eos_token_id": 3}"#).unwrap();
        place.pipeline("max_len = 64\ntoo_long = \"drop\"");
        place.render(rows);
        place
    }

    /// A path in it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes the pipeline file with that table for this program.
    pub(crate) fn pipeline(&self, table: &str) {
        let text = format!("name = \"p\"\nbase = \"base\"\n\n[tokenize]\n{table}\n");
        std::fs::write(self.path("p.toml"), text).unwrap();
    }

    fn render(&self, rows: &[Rendered]) {
        let draft = Draft::open(&self.path("runs/p/template")).unwrap();
        let mut file = draft.parquet("rendered.parquet", Rendered::schema()).unwrap();
        file.write(&Rendered::to_batch(rows).unwrap()).unwrap();
        file.finish().unwrap();
        let facts = json!({"name": "test", "bos_token": "<|bos|>"}).to_string();
        draft.write("template.json", facts.as_bytes(), None).unwrap();
        let mut ledger = Ledger::default();
        rows.iter().for_each(|row| ledger.source(&row.source).pass());
        let seal = Seal {
            kind: ArtefactKind::Rendered,
            stage: "template".into(),
            key: sha256(b"test"),
            program: hone_store::program("test").unwrap(),
            config: Value::Null,
            inputs: vec![],
            ledger,
            report: Value::Null,
        };
        draft.seal(seal).unwrap();
    }

    /// Runs the program.
    pub(crate) fn run(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_hone-tokenize"))
            .current_dir(self.dir.path())
            .args(args)
            .output()
            .unwrap()
    }

    /// Runs the program with the pipeline file.
    pub(crate) fn tokenize(&self, args: &[&str]) -> Output {
        self.run(&[args, &["--pipeline", "p.toml"]].concat())
    }

    /// Runs it and gives what it printed; it must end well.
    pub(crate) fn says(&self, args: &[&str]) -> String {
        let output = self.tokenize(args);
        check(&output, 0, &[]);
        text(&output.stdout)
    }

    /// The packs of a sealed output.
    pub(crate) fn packs(&self, dir: &str) -> Vec<Pack> {
        let sealed = Sealed::open(&self.path(dir), ArtefactKind::Packs).unwrap();
        let batches = sealed.ipc("train.arrow").unwrap();
        batches.iter().flat_map(|batch| Pack::from_batch(batch).unwrap()).collect()
    }
}

/// Bytes as text.
pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Exit code, and what stderr holds.
pub(crate) fn check(output: &Output, exit: i32, says: &[&str]) {
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(exit), "{stderr}");
    for part in says {
        assert!(stderr.contains(part), "{part:?} is not in {stderr}");
    }
}
