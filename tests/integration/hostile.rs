//! Templates and tokenizers that mean harm, or are merely broken: refused with a message, in bounded
//! time and memory, and nothing half-written; or harmless, and the rows come out.
//!
//! Every program here, worker included, runs with a limit on its memory from outside
//! ([`MEMORY_KIB`]): whoever needed more would abort, which is no exit code of hone's.

use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::fixture::Place;

/// What one process may allocate; a worker gives itself less.
const MEMORY_KIB: u64 = 3 << 20;

/// Longest that a refusal may take on a busy machine; the deadlines of workers are what bounds it.
const PATIENCE: Duration = Duration::from_secs(90);

/// Runs a stage with a limit on its memory.
fn run(place: &Place, stage: &str) -> (Option<i32>, String, Duration) {
    let program = place.command(stage, &[]);
    let mut command = Command::new("sh");
    let limited = format!("ulimit -d {MEMORY_KIB}; exec \"$0\" \"$@\"");
    command.arg("-c").arg(limited).arg(program.get_program()).args(program.get_args());
    command.current_dir(place.tree.path(""));
    let start = Instant::now();
    let output = place.tree.output(command);
    (output.code, output.stderr, start.elapsed())
}

/// What a case has to say: its exit code, and words on stderr.
type Said = (i32, &'static str);

/// Compares what is said, and sees that nothing but an output that is whole appears.
fn check(place: &Place, stage: &str, name: &str, said: Said, faults: &mut Vec<String>) {
    let (code, stderr, time) = run(place, stage);
    if time > PATIENCE {
        faults.push(format!("{name}: took {time:?}"));
    }
    if code != Some(said.0) || !stderr.contains(said.1) {
        let shown: String = stderr.chars().take(600).collect();
        faults.push(format!("{name}: expected {said:?}, code {code:?}, said:\n{shown}"));
    }
    let is_sealed = place.tree.path(&format!("runs/p/{stage}/manifest.json")).exists();
    let is_done = matches!(code, Some(0 | 1));
    if is_sealed != is_done || !place.leftovers().is_empty() {
        faults.push(format!("{name}: sealed {is_sealed}, leftovers {:?}", place.leftovers()));
    }
}

/// A template that asks for more and more.
const DOUBLING: &str = "{% set ns = namespace(t='aaaaaaaa') %}{% for i in range(60) %}\
    {% set ns.t = ns.t + ns.t %}{% endfor %}{{ ns.t }}";

/// Name, template, what is said.
const TEMPLATES: &[(&str, &str, Said)] = &[
    ("empty", "", (3, "writes nothing of what message 1 says")),
    ("unclosed tag", "{{ messages", (3, "line 1")),
    ("unclosed block", "{% for m in messages %}x", (3, "line 1")),
    ("unclosed comment", "{# x", (3, "")),
    ("unknown statement", "{% explode %}", (3, "unknown statement")),
    ("unknown filter", "{{ messages|explode }}", (3, "filter")),
    ("unknown test", "{{ messages is explode }}", (3, "test")),
    ("unknown function", "{{ explode() }}", (3, "explode")),
    ("unknown method", "{{ messages[0].content.explode() }}", (3, "explode")),
    ("include", "{% include 'x' %}", (3, "x")),
    ("import", "{% from 'x' import y %}{{ y() }}", (3, "")),
    ("extends itself", "{% extends 'chat_template' %}", (3, "")),
    ("nested parentheses", "PARENTHESES", (3, "")),
    ("endless macro", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", (3, "")),
    ("endless call", "{% macro m() %}{% call m() %}{% endcall %}{% endmacro %}{{ m() }}", (3, "")),
    (
        "nested ranges",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        (3, "instructions"),
    ),
    ("a wide range", "{{ range(1000000000)|list }}", (3, "range")),
    ("repeated text", "{{ 'a' * 3000000000 }}", (3, "too large")),
    ("repeated list", "{{ [0] * 1000000000 }}", (3, "too large")),
    ("repeated message", "{{ messages[0].content * 100000000 }}", (3, "")),
    ("doubled text", DOUBLING, (3, "")),
    (
        "doubled list",
        "{% set ns = namespace(t=[0]) %}{% for i in range(60) %}{% set ns.t = ns.t + ns.t %}{% endfor %}x",
        (3, ""),
    ),
    ("wide indent", "{{ 'x'|indent(1000000000, true) }}", (3, "")),
    ("wide format", "{{ '%1000000000d'|format(1) }}", (3, "")),
    ("wide center", "{{ 'x'.center(1000000000) }}", (3, "")),
    ("wide ljust", "{{ 'x'.ljust(1000000000) }}", (3, "")),
    ("wide rjust", "{{ 'x'.rjust(1000000000) }}", (3, "")),
    ("wide zfill", "{{ 'x'.zfill(1000000000) }}", (3, "")),
    ("wide center filter", "{{ 'x'|center(1000000000) }}", (3, "")),
    ("wide JSON", "{{ messages|tojson(indent=1000000000) }}", (3, "indent")),
    (
        "JSON separators",
        "{{ [0,0]|tojson(separators=['a'*9000000, 'b']) * 9 }}",
        (3, "output bytes"),
    ),
    ("replaced text", "{% set a = 'a' * 1000000 %}{{ a|replace('a', a) }}", (3, "")),
    ("replaced by nothing", "{% set a = 'a' * 1000000 %}{{ a.replace('', a) }}", (3, "")),
    ("joined text", "{% set a = 'a' * 1000000 %}{{ range(99999)|join(a) }}", (3, "")),
    ("many batches", "{{ range(9999)|batch(1, 'x')|list|length }}", (3, "writes nothing")),
    ("wide batch", "{{ range(9)|batch(1000000000, 'x')|list }}", (3, "")),
    ("many slices", "{{ range(9)|slice(1000000000)|list }}", (3, "")),
    ("expanded tabs", "{{ '\t'.expandtabs(1000000000) }}", (3, "")),
    ("a long refusal", "{{ raise_exception('a' * 2000000) }}", (3, "")),
    ("a strange date", "{{ strftime_now('%Q') }}", (3, "date")),
    ("division by nothing", "{{ 1 // 0 }}", (3, "")),
    ("a large power", "{{ 9 ** 9 ** 9 ** 9 }}", (3, "")),
    (
        "drops the answers",
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
        (3, "writes nothing"),
    ),
    (
        "repeats content",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
        (0, ""),
    ),
    ("reverses messages", "{% for m in messages[::-1] %}{{ m.content }}{% endfor %}", (0, "")),
    ("upper case", "{% for m in messages %}{{ m.content|upper }}{% endfor %}", (3, "cannot tell")),
    (
        "only a length",
        "{% for m in messages %}{{ m.content|length }}{% endfor %}",
        (3, "writes nothing"),
    ),
    (
        "reversed text",
        "{% for m in messages %}{{ m.content[::-1] }}{% endfor %}",
        (3, "cannot tell"),
    ),
    ("private use", "{% for m in messages %}\u{f0000}\u{e000}{{ m.content }}{% endfor %}", (0, "")),
];

#[test]
fn hostile_templates_are_refused_in_bounds() {
    let place = Place::after(&["ingest"]);
    let set = "template = { file = \"x.jinja\" }";
    let pipeline = crate::fixture::PIPELINE.replace("template = \"chatml\"", set);
    place.tree.write("p.toml", pipeline);
    let mut faults = Vec::new();
    for (name, template, said) in TEMPLATES {
        let place = place.copy();
        let template = match *template {
            "PARENTHESES" => format!("{{{{ {}1{} }}}}", "(".repeat(100_000), ")".repeat(100_000)),
            template => template.to_owned(),
        };
        place.tree.write("x.jinja", template);
        check(&place, "template", name, *said, &mut faults);
    }
    for (name, bytes, said) in [
        ("not UTF-8", vec![0xff, 0xfe], (3, "UTF-8")),
        ("two megabytes", vec![b'x'; 2 << 20], (3, "x.jinja")),
        ("NUL", b"\0{{ messages[0].content }}{{ messages[1].content }}".to_vec(), (0, "")),
    ] {
        let place = place.copy();
        place.tree.write("x.jinja", bytes);
        check(&place, "template", name, said, &mut faults);
    }
    assert!(TEMPLATES.len() + 3 >= 45);
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
}

#[test]
fn a_hostile_template_does_not_take_render_down() {
    let place = Place::new();
    place.tree.write("chat.json", r#"[{"role": "user", "content": "Hi"}]"#);
    for (name, template, said) in [
        ("doubled text", DOUBLING, 3),
        ("endless macro", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", 3),
        ("harmless", "{{ messages[0].content }}", 0),
    ] {
        place.tree.write("x.jinja", template);
        let args = ["render", "--template", "x.jinja", "--messages", "chat.json"];
        let output = place.tree.run("hone-template", &args);
        assert_eq!(output.code, Some(said), "{name}: {}", output.stderr);
    }
}

/// Changes a `tokenizer.json`.
type Edit = fn(&mut Value);

fn split_at(pattern: &str) -> Value {
    let split = json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    json!({"type": "Sequence", "pretokenizers": [split, bytes]})
}

fn added(id: u64, content: String) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
           "normalized": false, "special": true})
}

fn push_added(json: &mut Value, token: Value) {
    json["added_tokens"].as_array_mut().expect("a list of added tokens").push(token);
}

/// Name, change, what is said.
const TOKENIZERS: &[(&str, Edit, Said)] = &[
    ("no model", |j| j["model"] = Value::Null, (3, "tokenizer.json")),
    ("unknown model", |j| j["model"]["type"] = json!("Oracle"), (3, "tokenizer.json")),
    (
        "a merge of nothing",
        |j| j["model"]["merges"] = json!([["zz9", "qq8"]]),
        (3, "tokenizer.json"),
    ),
    (
        "a merge of three",
        |j| j["model"]["merges"] = json!([["a", "b", "c"]]),
        (3, "tokenizer.json"),
    ),
    ("a vocabulary of texts", |j| j["model"]["vocab"] = json!("a"), (3, "tokenizer.json")),
    (
        "an empty vocabulary",
        |j| {
            j["model"]["vocab"] = json!({});
            j["model"]["merges"] = json!([]);
        },
        (3, "text that the vocabulary cannot write"),
    ),
    ("an id below 0", |j| j["model"]["vocab"]["zzz"] = json!(-1), (3, "tokenizer.json")),
    (
        "an id beyond 32 bits",
        |j| j["model"]["vocab"]["zzz"] = json!(1u64 << 40),
        (3, "tokenizer.json"),
    ),
    (
        "an id of four thousand million",
        |j| j["model"]["vocab"]["zzz"] = json!(4_000_000_000u32),
        (3, "more than 16777216"),
    ),
    ("two tokens of one id", |j| j["model"]["vocab"]["zzz"] = json!(300), (0, "")),
    ("an empty added token", |j| push_added(j, added(2047, String::new())), (0, "")),
    (
        "an added token of a megabyte",
        |j| push_added(j, added(2048, "x".repeat(1 << 20))),
        (3, "1048576 bytes"),
    ),
    ("an added token beyond the vocabulary", |j| push_added(j, added(2048, "<x>".into())), (0, "")),
    ("an added token of another id", |j| push_added(j, added(7, "<x>".into())), (3, "")),
    (
        "forty thousand added tokens",
        |j| {
            for id in 0..40_000 {
                push_added(j, added(2048 + id, format!("<{id}>")));
            }
        },
        (3, "40"),
    ),
    ("added tokens that are no list", |j| j["added_tokens"] = json!("x"), (3, "tokenizer.json")),
    ("a pattern that backtracks", |j| j["pre_tokenizer"] = split_at("(a|aa)+$"), (0, "")),
    ("a pattern that backtracks more", |j| j["pre_tokenizer"] = split_at("(x+x+)+y"), (0, "")),
    ("a pattern of words", |j| j["pre_tokenizer"] = split_at(r"(\w+\s?)*:"), (0, "")),
    ("an invalid pattern", |j| j["pre_tokenizer"] = split_at("(a"), (3, "tokenizer.json")),
    ("an empty pattern", |j| j["pre_tokenizer"] = split_at(""), (0, "")),
    (
        "a pattern of great repetition",
        |j| j["pre_tokenizer"] = split_at("((a{1000}){1000}){1000}"),
        (3, "tokenizer.json"),
    ),
    (
        "an unknown pre-tokenizer",
        |j| j["pre_tokenizer"] = json!({"type": "Oracle"}),
        (3, "tokenizer.json"),
    ),
    (
        "an unknown normalizer",
        |j| j["normalizer"] = json!({"type": "Oracle"}),
        (3, "tokenizer.json"),
    ),
    (
        "a prefix of ten megabytes",
        |j| j["normalizer"] = json!({"type": "Prepend", "prepend": "x".repeat(10 << 20)}),
        (3, ""),
    ),
    (
        "a normalizer that grows text",
        |j| {
            j["normalizer"] = json!({"type": "Replace", "pattern": {"String": " "}, "content": "x".repeat(1 << 20)})
        },
        (3, ""),
    ),
    ("a normalizer that splits letters", |j| j["normalizer"] = json!({"type": "NFKD"}), (0, "")),
    (
        "a normalizer that takes all away",
        |j| {
            j["normalizer"] =
                json!({"type": "Replace", "pattern": {"Regex": "(?s)."}, "content": ""})
        },
        (3, "text that the vocabulary cannot write"),
    ),
    (
        "a post-processor of a missing id",
        |j| j["post_processor"] = json!({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}], "pair": [], "special_tokens": {}}),
        (0, ""),
    ),
    (
        "truncation",
        |j| {
            j["truncation"] = json!({"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"})
        },
        (0, ""),
    ),
    (
        "padding",
        |j| j["padding"] = json!({"strategy": {"Fixed": 4000}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}),
        (0, ""),
    ),
    ("dropout", |j| j["model"]["dropout"] = json!(0.5), (3, "dropout")),
    (
        "a Unigram of nothing",
        |j| j["model"] = json!({"type": "Unigram", "unk_id": 0, "vocab": []}),
        (3, ""),
    ),
    (
        "a word level without unknown",
        |j| j["model"] = json!({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}),
        (3, ""),
    ),
    (
        "a byte missing",
        |j| {
            j["model"]["merges"] = json!([]);
            j["model"]["vocab"].as_object_mut().expect("a vocabulary").remove(".");
        },
        (3, "text that the vocabulary cannot write"),
    ),
    (
        "a byte missing that merges need",
        |j| {
            j["model"]["vocab"].as_object_mut().expect("a vocabulary").remove(".");
        },
        (3, "out of vocabulary"),
    ),
];

#[test]
fn hostile_tokenizers_are_refused_in_bounds() {
    let place = Place::after(&["ingest", "template"]);
    let text = std::fs::read(place.tree.path("base/tokenizer.json")).expect("the fixture has one");
    let whole: Value = serde_json::from_slice(&text).expect("it is JSON");
    let mut faults = Vec::new();
    for (name, edit, said) in TOKENIZERS {
        let place = place.copy();
        let mut json = whole.clone();
        edit(&mut json);
        place.tree.write("base/tokenizer.json", json.to_string());
        check(&place, "tokenize", name, *said, &mut faults);
    }
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    for (name, bytes) in [
        ("empty", Vec::new()),
        ("half", text[..text.len() / 2].to_vec()),
        ("not UTF-8", vec![0xff; 100]),
        ("a list", b"[]".to_vec()),
        ("deep lists", deep.into_bytes()),
    ] {
        let place = place.copy();
        place.tree.write("base/tokenizer.json", bytes);
        check(&place, "tokenize", name, (3, "tokenizer.json"), &mut faults);
    }
    assert!(TOKENIZERS.len() + 5 >= 35);
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
}
