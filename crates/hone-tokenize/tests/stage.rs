//! The program, from a rendered artefact to packs: what it writes, what it says, and what it refuses.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use hone_schema::{
    ArtefactKind, Doc, Kind, Ledger, Pack, Part, Prompt, Reject, Rendered, Span, Split, sha256,
};
use hone_store::{Draft, Seal, Sealed};
use hone_tokens::{VocabSpec, train_vocab};
use serde_json::{Value, json};

/// A place with a model directory, a rendered artefact and a pipeline file.
struct Place {
    dir: tempfile::TempDir,
}

const SPECIALS: [&str; 4] = ["<|bos|>", "<|user|>", "<|assistant|>", "<|end|>"];

/// A chat `user: question, assistant: answer`; or a text, when there is no question.
fn row(id: &str, split: Split, question: &str, answer: &str) -> Rendered {
    let mut row = Rendered {
        id: id.to_owned(),
        source: "s".into(),
        split,
        kind: if question.is_empty() { Kind::Text } else { Kind::Sft },
        text: String::new(),
        spans: Vec::new(),
        share: hone_schema::Share::Main,
        prompt_len: None,
        meta: None,
    };
    let mut add = |text: &str, message: Option<u32>, role: &str, part: Part| {
        let start = row.text.len() as u32;
        row.text.push_str(text);
        row.spans.push(Span {
            start,
            end: row.text.len() as u32,
            message,
            role: role.to_owned(),
            part,
            weight: if part == Part::Scaffold { 0.0 } else { 1.0 },
            chosen: false,
        });
    };
    add("<|bos|>", None, "", Part::Scaffold);
    if question.is_empty() {
        add(answer, None, "text", Part::Content);
        add("<|end|>", None, "text", Part::Stop);
        return row;
    }
    add("<|user|>", Some(0), "user", Part::Scaffold);
    add(question, Some(0), "user", Part::Content);
    add("<|end|>", Some(0), "user", Part::Stop);
    add("<|assistant|>", Some(1), "assistant", Part::Scaffold);
    let prompt_len = "<|bos|><|user|><|end|><|assistant|>".len() + question.len();
    add(answer, Some(1), "assistant", Part::Content);
    add("<|end|>", Some(1), "assistant", Part::Stop);
    row.prompt_len = Some(prompt_len as u32);
    row
}

fn rows() -> Vec<Rendered> {
    let mut rows = vec![
        row("a", Split::Train, "hi", "yo"),
        row("forger", Split::Train, "say <|end|>", "no <|end|> yes"),
        row("text", Split::Train, "", "some plain text"),
        row("long", Split::Train, "q", &"x ".repeat(100)),
        row("e", Split::Eval, "hi", "yo"),
        row("t", Split::Test, "what is 1 + 1?", "2"),
    ];
    rows.extend((0..50).map(|n| row(&format!("r{n}"), Split::Train, &"a".repeat(n % 9 + 1), "b")));
    rows
}

impl Place {
    fn new(rows: &[Rendered]) -> Self {
        let place = Place { dir: tempfile::tempdir().unwrap() };
        let base = place.path("base");
        std::fs::create_dir(&base).unwrap();
        let specials = SPECIALS.map(str::to_owned).to_vec();
        let vocab = train_vocab(["x x"], &VocabSpec::new(300, specials).unwrap());
        std::fs::write(base.join("tokenizer.json"), vocab).unwrap();
        std::fs::write(base.join("config.json"), "{}").unwrap();
        std::fs::write(base.join("generation_config.json"), r#"{"eos_token_id": [3, 7]}"#).unwrap();
        place.pipeline("max_len = 64\ntoo_long = \"drop\"");
        place.render(rows);
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn pipeline(&self, table: &str) {
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

    fn run(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_hone-tokenize"))
            .current_dir(self.dir.path())
            .args(args)
            .output()
            .unwrap()
    }

    fn tokenize(&self, args: &[&str]) -> Output {
        self.run(&[&["--pipeline", "p.toml"], args].concat())
    }

    fn sealed(&self) -> Sealed {
        Sealed::open(&self.path("runs/p/tokenize"), ArtefactKind::Packs).unwrap()
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Exit code, and what stderr holds.
fn check(output: &Output, exit: i32, says: &[&str]) {
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(exit), "{stderr}");
    for part in says {
        assert!(stderr.contains(part), "{part:?} is not in {stderr}");
    }
}

fn packs(sealed: &Sealed, name: &str) -> Vec<Pack> {
    let batches = sealed.ipc(name).unwrap();
    batches.iter().flat_map(|batch| Pack::from_batch(batch).unwrap()).collect()
}

#[test]
fn packs_prompts_stops_and_rejects() {
    let place = Place::new(&rows());
    check(&place.tokenize(&[]), 0, &["55 rows (1 refused)"]);
    let sealed = place.sealed();
    let train = packs(&sealed, "train.arrow");
    let mut ids: Vec<&str> =
        train.iter().flat_map(|p| &p.docs).map(|d| d.row_id.as_str()).collect();
    ids.sort_unstable();
    let mut expect: Vec<String> = (0..50).map(|n| format!("r{n}")).collect();
    expect.extend(["a", "forger", "text"].map(str::to_owned));
    expect.sort_unstable();
    assert_eq!(ids, expect);
    assert!(train.iter().all(|pack| pack.input_ids.len() <= 64));
    assert!(train.len() <= 10, "{} packs for 53 short rows", train.len());
    assert_eq!(packs(&sealed, "eval.arrow").len(), 1);

    // <|end|> is id 3: the forger's row has the template's two, and none of its own.
    let (pack, doc) = train
        .iter()
        .find_map(|p| Some((p, p.docs.iter().position(|d| d.row_id == "forger")?)))
        .unwrap();
    let start: u32 = pack.docs[..doc].iter().map(|d| d.len).sum();
    let range = start as usize..(start + pack.docs[doc].len) as usize;
    assert_eq!(pack.input_ids[range].iter().filter(|id| **id == 3).count(), 2);

    let prompts = sealed.parquet("prompts.parquet").unwrap().rows(Prompt::from_batch).unwrap();
    let shown: Vec<(&str, &str, &str)> = prompts
        .iter()
        .map(|p| (p.id.as_str(), p.question.as_str(), p.reference.as_str()))
        .collect();
    assert_eq!(shown, [("e", "hi", "yo"), ("t", "what is 1 + 1?", "2")]);
    let hi: Vec<u32> = "hi".bytes().map(|b| u32::from(b) - 33 + 4).collect();
    assert_eq!(prompts[0].bare_ids, [&[0][..], &hi].concat());
    assert_eq!(prompts[0].prompt_ids, [&[0, 1][..], &hi, &[3, 2]].concat());

    let rejects = sealed.parquet("rejects.parquet").unwrap().rows(Reject::from_batch).unwrap();
    assert_eq!(rejects.len(), 1);
    assert_eq!((rejects[0].file.as_str(), rejects[0].reason.as_str()), ("long", "too long"));
    assert_eq!(text(&sealed.read("stops.json").unwrap()), "{\"stop_ids\":[3,7]}\n");
    let vocab = std::fs::read(place.path("base/tokenizer.json")).unwrap();
    assert_eq!(sealed.read("tokenizer.json").unwrap(), vocab);
}

#[test]
fn the_report_and_the_ledger_count_tokens() {
    let place = Place::new(&rows());
    let output = place.tokenize(&["--json", "--quiet"]);
    check(&output, 0, &[]);
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    let tokens = &json["ledger"]["sources"]["s"]["tokens"];
    let train = &json["report"]["splits"]["train"];
    assert_eq!(train["rows"], 53);
    assert_eq!(json["report"]["splits"]["eval"]["tokens"], 9);
    assert_eq!(json["report"]["splits"]["eval"]["trained_tokens"], 3);
    assert_eq!(json["report"]["prompts"], json!({"rows": 2, "not_a_prefix": 0}));
    assert_eq!(json["report"]["certificate"]["refused"], json!({"too long": 1}));
    // bos, <|user|>, q, <|end|>, <|assistant|>, 200 bytes (`x x` gave merges), <|end|>.
    assert!(tokens["tokens_lost"]["too long"].as_u64().is_some_and(|n| n > 64));
    assert!(train["fill"].as_f64().is_some_and(|fill| fill > 0.8 && fill <= 1.0));
}

#[test]
fn equal_bytes_for_any_number_of_threads() {
    let hash = |threads: &str| {
        let place = Place::new(&rows());
        check(&place.tokenize(&["--threads", threads]), 0, &[]);
        place.sealed().manifest().files.clone()
    };
    assert_eq!(hash("1"), hash("3"));
}

#[test]
fn a_second_run_is_fresh_and_a_changed_value_is_not() {
    let place = Place::new(&rows());
    check(&place.tokenize(&[]), 0, &["no sealed output yet"]);
    check(&place.tokenize(&[]), 0, &["fresh"]);
    let one_each = place.tokenize(&["--set", "tokenize.pack=false"]);
    check(&one_each, 0, &["`packing` was \"best-fit\" and is \"none\"", "55 packs of 64"]);
}

#[test]
fn long_rows_are_cut_or_stop_the_stage_as_the_pipeline_says() {
    let place = Place::new(&rows());
    let docs = |id: &str| {
        let train = packs(&place.sealed(), "train.arrow");
        let mut docs: Vec<Doc> = train.into_iter().flat_map(|p| p.docs).collect();
        docs.retain(|doc| doc.row_id == id);
        docs.sort_by_key(|doc| doc.offset);
        docs
    };
    let cut = place.tokenize(&["--set", "tokenize.too_long={ truncate = \"head\" }"]);
    let lost = "trained tokens lost to `truncated`";
    check(&cut, 0, &["warning: 1 rows are cut at 64 tokens", "56 rows (0 refused)", lost]);
    let long = &docs("long")[0];
    assert_eq!((long.len, long.row, long.truncated, long.offset), (64, 3, true, 0));
    let tail = place.tokenize(&["--set", "tokenize.too_long={ truncate = \"tail\" }"]);
    check(&tail, 0, &["warning: 1 rows are cut at 64 tokens"]);
    let long = &docs("long")[0];
    let n = long.kept[1].end;
    assert_eq!((long.kept.clone(), long.truncated), (vec![0..1, n - 63..n], true));
    let split = place.tokenize(&["--set", "tokenize.too_long=split"]);
    check(&split, 0, &["59 rows (0 refused)", "3 trained tokens lost to `first of a piece`"]);
    let offsets: Vec<u32> = docs("long").iter().map(|doc| doc.offset).collect();
    assert_eq!(offsets, [0, 64, 128, 192]);
    let stop = place.tokenize(&["--set", "tokenize.too_long=error"]);
    check(&stop, 3, &["row `long` of `s`: ", "a pack holds 64", "hint: raise tokenize.max_len"]);
}

#[test]
fn rows_are_packed_as_the_pipeline_says() {
    let place = Place::new(&rows());
    let run = |args: &[&str]| {
        let output = place.tokenize(&[&["--json", "--quiet"], args].concat());
        check(&output, 0, &[]);
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let rows = packs(&place.sealed(), "train.arrow");
        let rows: Vec<Vec<u64>> =
            rows.iter().map(|p| p.docs.iter().map(|d| d.row).collect()).collect();
        (report["report"]["splits"]["train"].clone(), rows)
    };
    let in_order: Vec<u64> = (0..56).filter(|row| ![3, 4, 5].contains(row)).collect();
    let (report, rows) = run(&[]);
    let n_best = rows.len();
    assert!(report["fill"].as_f64().is_some_and(|fill| fill > 0.9), "{report}");
    assert_ne!(rows.concat(), in_order);
    let (_, rows) = run(&["--set", "tokenize.packing=sequential"]);
    assert_eq!(rows.concat(), in_order);
    assert!(rows.len() >= n_best && rows.len() < 20, "{}", rows.len());
    let none = ["--set", "tokenize.packing=none"];
    let (report, rows) = run(&none);
    assert_eq!((rows.len(), rows.concat()), (53, in_order.clone()));
    let padding = |report: &Value| report["padding_by_batch_size"]["8"].as_f64().unwrap();
    let plain = padding(&report);
    let (report, rows) = run(&[&none[..], &["--set", "tokenize.length_buckets=true"]].concat());
    let mut sorted = rows.concat();
    sorted.sort_unstable();
    assert_eq!(sorted, in_order);
    assert!(padding(&report) < plain / 2.0, "{plain} and {report}");
    let both = place.tokenize(&["--set", "tokenize.length_buckets=true"]);
    check(&both, 2, &["`length_buckets` sorts rows that are not packed", "packing = \"none\""]);
}

#[test]
fn too_many_rows_that_cannot_be_certified_fail_the_stage() {
    let mut rows = rows();
    for row in &mut rows[6..12] {
        row.spans.iter_mut().for_each(|span| span.weight = 0.0);
    }
    let place = Place::new(&rows);
    let bar = "6 of 56 rows do not hold what the certificate asks (10.7 %, at most 5.0 % may)";
    check(&place.tokenize(&[]), 1, &[bar, "6 `no trained token`"]);
    check(&place.tokenize(&[]), 1, &["fresh", "a gate failed when this was made", bar]);
    check(&place.tokenize(&["--set", "tokenize.max_violation_share=0.2"]), 0, &["7 refused"]);
}

#[test]
fn roles_and_stops_are_trained_as_the_pipeline_says() {
    let place = Place::new(&rows());
    let run = |set: &[&str]| {
        let set: Vec<&str> = set.iter().flat_map(|set| ["--set", *set]).collect();
        let output = place.tokenize(&[&["--json"], &set[..]].concat());
        check(&output, 0, &[]);
        let json: Value = serde_json::from_slice(&output.stdout).unwrap();
        let report = json["report"].clone();
        (
            report["splits"]["train"]["trained_tokens"].as_u64().unwrap(),
            report,
            text(&output.stderr),
        )
    };
    let (responses, report, _) = run(&[]);
    assert_eq!(report["rows_by_trained_role"], json!({}));
    let by_role = |report: &Value| report["splits"]["train"]["trained_tokens_by_role"].clone();
    let plain = by_role(&report)["text"].as_u64().unwrap();
    assert_eq!(by_role(&report), json!({"assistant": responses - plain, "text": plain}));
    // 52 chats, each with one stop token that goes untrained.
    let (without, ..) = run(&["tokenize.train_on_stop=none"]);
    assert_eq!(responses - without, 52);
    let (both, report, stderr) = run(&[r#"tokenize.train_on=["assistant", "user", "tool"]"#]);
    assert_eq!(report["rows_by_trained_role"], json!({"assistant": 55, "tool": 0, "user": 55}));
    assert!(stderr.contains("names the role `tool`, which no row has"), "{stderr}");
    let (every, report, _) = run(&["tokenize.train_on=every"]);
    assert_eq!(both, every);
    assert!(every > responses);
    let user = every - responses;
    let all = json!({"assistant": responses - plain, "text": plain, "user": user});
    assert_eq!(by_role(&report), all);
}

#[test]
fn settings_of_other_tools_are_taken_for_what_they_mean() {
    let place = Place::new(&rows());
    let with = |table: &str, args: &[&str]| {
        place.pipeline(table);
        place.tokenize(args)
    };
    check(&with("max_len = 64\ntoo_long = \"drop\"\ntrain_on = \"all\"", &[]), 0, &[]);
    let theirs = "sequence_len = 64\nexcess_length_strategy = \"drop\"\ntrain_on_inputs = false";
    check(
        &with(theirs, &[]),
        0,
        &[
            "`sequence_len = 64` is `max_len = 64`",
            "`excess_length_strategy = \"drop\"` is `too_long = \"drop\"`",
            "`train_on_inputs = false` is `train_on = \"all\"`",
            "fresh",
        ],
    );
    let both = format!("{theirs}\nmask_history = true\ntrain_on_prompt = true");
    let contradicts =
        "p.toml:7: [tokenize] `train_on_inputs` is false and `train_on_prompt` is true";
    check(&with(&both, &[]), 2, &[contradicts, "hint: one is `train_on = \"all\"`"]);
    let short = theirs.replace("64", "1");
    check(&with(&short, &[]), 2, &["p.toml:5: [tokenize] `max_len` is 1"]);
    let typed = with(theirs, &["--set", "tokenize.sequence_len=1"]);
    check(&typed, 2, &["`--set tokenize.sequence_len=1`: [tokenize] `max_len` is 1"]);
    let unknown = format!("{theirs}\ntran_on = \"all\"");
    check(&with(&unknown, &[]), 2, &["p.toml:8: [tokenize] unknown key `tran_on`", "`train_on`?"]);
    let wrapped = format!("{theirs}\npacking_strategy = \"wrapped\"");
    let place_of = "p.toml:8: [tokenize] `packing_strategy` is \"wrapped\", which has no";
    check(&with(&wrapped, &[]), 2, &[place_of, "hint: a document is never wrapped"]);
}

#[test]
fn a_tokenizer_that_does_not_fit_the_model_is_refused() {
    let place = Place::new(&rows());
    let model = |json: &str| {
        std::fs::write(place.path("base/config.json"), json).unwrap();
        place.tokenize(&[])
    };
    let bytes = std::fs::read(place.path("base/tokenizer.json")).unwrap();
    let mut json: Value = serde_json::from_slice(&bytes).unwrap();
    let n = json["model"]["vocab"].as_object().unwrap().len();
    let last = n - 1;
    check(&model(&format!(r#"{{"vocab_size": {n}}}"#)), 0, &[]);
    let message = format!("has id {last}, but the base model has {last} embeddings");
    let small = format!(r#"{{"vocab_size": {last}}}"#);
    check(&model(&small), 3, &["base/tokenizer.json: token ", &message]);
    let inner = r#"{"text_config": {"vocab_size": 9}}"#;
    check(&model(inner), 3, &["has id 9, but the base model has 9 embeddings"]);
    check(&model(r#"{"vocab_size": "9"}"#), 3, &["config.json: `vocab_size` is not a number"]);
    // A marker that the model does not know: no fault of rows that do not use it.
    let added = json["added_tokens"].as_array_mut().unwrap();
    added.push(json!({"id": n, "content": "<|image|>", "special": true, "single_word": false,
                      "lstrip": false, "rstrip": false, "normalized": false}));
    std::fs::write(place.path("base/tokenizer.json"), json.to_string()).unwrap();
    check(&model(&format!(r#"{{"vocab_size": {n}}}"#)), 0, &["55 rows (1 refused)"]);
}

#[test]
fn what_cannot_be_done_is_said() {
    let place = Place::new(&rows());
    let with = |table: &str| {
        place.pipeline(table);
        place.tokenize(&[])
    };
    check(&with("too_long = \"drop\""), 2, &["`max_len` is not given"]);
    check(&with("max_len = 64"), 2, &["`too_long` is not given"]);
    check(&with("max_len = 1\ntoo_long = \"drop\""), 2, &["[tokenize] `max_len` is 1"]);
    check(
        &with("max_lenght = 64\ntoo_long = \"drop\""),
        2,
        &["p.toml:5", "did you mean `max_len`?"],
    );
    check(&with("max_len = 64\ntoo_long = \"squeeze\""), 2, &["squeeze"]);
    let allowed = "max_len = 64\ntoo_long = \"drop\"\nallow_in_messages = [\"<|end|>\"]";
    check(&with(allowed), 2, &["`<|end|>` is a special token"]);
    let tiny = "max_len = 3\ntoo_long = \"drop\"";
    check(&with(tiny), 3, &["none of 56 rows can be trained: 56 of them for `too long`"]);
    assert!(!place.path("runs/p/tokenize").exists(), "nothing half-written");
    place.pipeline("max_len = 64\ntoo_long = \"drop\"");
    std::fs::write(place.path("base/tokenizer.json"), "{}").unwrap();
    check(&place.tokenize(&[]), 3, &["base/tokenizer.json: tokenizer.json is not a tokenizer"]);
    std::fs::remove_file(place.path("base/tokenizer.json")).unwrap();
    check(&place.tokenize(&[]), 3, &["there is no tokenizer.json"]);
}

#[test]
fn a_row_is_shown_with_its_mask() {
    let place = Place::new(&rows());
    let show = |args: &[&str]| {
        let output = place.run(&[&["show", "--pipeline", "p.toml"], args].concat());
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let (code, shown, _) = show(&["--id", "forger"]);
    assert_eq!(code, Some(0));
    let picture = "<|bos|><|user|>say <|end|><|end|><|assistant|>[no <|end|> yes]{<|end|>}";
    assert!(shown.ends_with(&format!("{picture}\n")), "{shown}");
    let (_, colored, _) = show(&["--split", "test", "--color", "always"]);
    assert!(colored.contains("\x1b[32m2\x1b[0m\x1b[1;30;42m<|end|>\x1b[0m"), "{colored}");
    let (_, refused, _) = show(&["--row", "3"]);
    assert!(refused.contains("not taken: too long: "), "{refused}");
    let (code, _, stderr) = show(&["--row", "99"]);
    assert_eq!(code, Some(3));
    assert!(stderr.contains("split train has 54 rows, counted from 0"), "{stderr}");
}

fn vocab(dir: &Path, lines: &str, args: &[&str]) -> Output {
    std::fs::write(dir.join("c.jsonl"), lines).unwrap();
    Command::new(env!("CARGO_BIN_EXE_hone-tokenize"))
        .current_dir(dir)
        .args([&["vocab", "--input", "c.jsonl", "--specials", "<|a|>,<|b|>"], args].concat())
        .output()
        .unwrap()
}

#[test]
fn a_vocabulary_is_trained_and_sealed() {
    let dir = tempfile::tempdir().unwrap();
    let lines = "{\"text\":\"the cat sat on the mat\"}\n\n{\"text\":\"the hat\",\"more\":1}\n";
    let args = ["--out", "v", "--size", "261"];
    check(&vocab(dir.path(), lines, &args), 0, &["261 tokens from 2 texts"]);
    let sealed = Sealed::open(&dir.path().join("v"), ArtefactKind::Files).unwrap();
    let json: Value = serde_json::from_slice(&sealed.read("tokenizer.json").unwrap()).unwrap();
    assert_eq!(json["model"]["vocab"]["<|b|>"], 1);
    check(&vocab(dir.path(), lines, &args), 0, &["fresh"]);
    check(&vocab(dir.path(), lines, &["--size", "9999", "--out", "w"]), 0, &["tokens only"]);
    check(&vocab(dir.path(), lines, &["--size", "261"]), 2, &["needs `--out DIR`"]);
    check(&vocab(dir.path(), lines, &["--size", "9", "--out", "x"]), 2, &["cannot hold 256 bytes"]);
    check(&vocab(dir.path(), "{\"text\":1}", &args), 3, &["c.jsonl:1: ", "hint: each line is"]);
}
