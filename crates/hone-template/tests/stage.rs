//! The program, run on small artefacts: exit codes, rows, rejects, the same bytes for any number of
//! threads.

use std::path::Path;
use std::process::Command;

use hone_schema::{
    ArtefactKind, Conversation, Kind, Ledger, Part, Program, Reject, Rendered, Share, Split, sha256,
};
use hone_store::{Draft, Seal, Sealed};
use serde_json::{Value, json};

/// Upper-cases what a shouting message says, so that its bytes cannot be told from the template's.
const SHOUTS: &str = "{% for m in messages %}{{ m.content | upper if m.role == 'shout' else m.content }}\
    {{ eos_token }}{% endfor %}";

fn row(id: &str, kind: Kind, messages: Value, text: Option<&str>) -> Conversation {
    Conversation {
        id: id.to_owned(),
        source: "s".to_owned(),
        source_row: 1,
        split: Split::Train,
        kind,
        messages: messages.to_string(),
        tools: None,
        variables: None,
        text: text.map(str::to_owned),
        weight: 0.5,
        chosen: None,
        rejected: None,
        meta: None,
    }
}

fn chat(user: &str, answer: &str) -> Value {
    json!([{"role": "user", "content": user}, {"role": "assistant", "content": answer}])
}

/// A run with a sealed ingest artefact, a model directory and a pipeline file.
fn prepare(dir: &Path, rows: &[Conversation], template: &str) {
    let model = dir.join("model");
    std::fs::create_dir(&model).unwrap();
    let tokenizer =
        json!({"added_tokens": [{"content": "<|im_start|>"}, {"content": "<|im_end|>"}]});
    let config =
        json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": SHOUTS});
    for (name, value) in [
        ("config.json", &json!({})),
        ("tokenizer.json", &tokenizer),
        ("tokenizer_config.json", &config),
    ] {
        std::fs::write(model.join(name), value.to_string()).unwrap();
    }
    std::fs::write(dir.join("p.toml"), format!("base = 'model'\n[template]\n{template}\n"))
        .unwrap();
    let draft = Draft::open(&dir.join("runs/p/ingest")).unwrap();
    let mut file = draft.parquet("conversations.parquet", Conversation::schema()).unwrap();
    file.write(&Conversation::to_batch(rows).unwrap()).unwrap();
    file.finish().unwrap();
    let mut ledger = Ledger::default();
    let account = ledger.source("s");
    (account.rows_in, account.rows_out) = (rows.len() as u64, rows.len() as u64);
    let seal = Seal {
        kind: ArtefactKind::Conversations,
        stage: "ingest".to_owned(),
        key: sha256(b"key"),
        program: Program { version: "1".to_owned(), sha256: sha256(b"program") },
        config: Value::Null,
        inputs: vec![],
        ledger,
        report: Value::Null,
    };
    draft.seal(seal).unwrap();
}

/// Runs the program, compares its exit code and what its talk holds, and gives what it prints.
fn check(dir: &Path, flags: &[&str], exit: i32, talk: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_hone-template"))
        .args(["--pipeline", "p.toml"])
        .args(flags)
        .current_dir(dir)
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(exit), "{flags:?}: {stderr}");
    for text in talk {
        assert!(stderr.contains(text), "{text:?} is not in {stderr}");
    }
    String::from_utf8(output.stdout).unwrap()
}

fn rendered(dir: &Path) -> (Vec<Rendered>, Vec<Reject>) {
    let sealed = Sealed::open(&dir.join("runs/p/template"), ArtefactKind::Rendered).unwrap();
    let rows = sealed.parquet("rendered.parquet").unwrap().rows(Rendered::from_batch).unwrap();
    let rejects = sealed.parquet("rejects.parquet").unwrap().rows(Reject::from_batch).unwrap();
    (rows, rejects)
}

fn rows() -> Vec<Conversation> {
    let forged = json!([{"role": "<|im_end|>", "content": "a"}]);
    let shout = json!([{"role": "shout", "content": "a"}]);
    vec![
        row("one", Kind::Sft, chat("q", "a<|im_end|>"), None),
        row("text", Kind::Text, json!([]), Some("plain </s>")),
        row("pair", Kind::Preference, chat("q", "a"), None),
        row("forged", Kind::Sft, forged, None),
        row("shout", Kind::Sft, shout, None),
        row("none", Kind::Sft, json!([]), None),
    ]
}

#[test]
fn rows_are_rendered_or_rejected_with_a_reason() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    prepare(dir, &rows(), "max_reject_share = 1.0");
    let talk = ["2 rows rendered, 4 rejected", "provenance unknown, for example row `shout`"];
    check(dir, &[], 0, &talk);
    let (good, bad) = rendered(dir);
    let texts: Vec<&str> = good.iter().map(|r| r.text.as_str()).collect();
    assert_eq!(texts, ["q</s>a<|im_end|></s>", "<s>plain </s></s>"]);
    let parts: Vec<(Part, f32)> = good[1].spans.iter().map(|s| (s.part, s.weight)).collect();
    assert_eq!(parts, [(Part::Scaffold, 0.0), (Part::Content, 0.5), (Part::Stop, 0.5)]);
    let reasons: Vec<&str> = bad.iter().map(|r| r.reason.as_str()).collect();
    let expect = [
        "preference rows are not supported",
        "forged control token",
        "provenance unknown",
        "bad messages",
    ];
    assert_eq!(reasons, expect);
    check(dir, &[], 0, &["template: fresh"]);
    let json = check(dir, &["--set", "template.template=chatml", "--json"], 0, &["`template`"]);
    let report: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(report["ledger"]["sources"]["s"]["rows_out"], 3);
    let facts = std::fs::read(dir.join("runs/p/template/template.json")).unwrap();
    let facts: Value = serde_json::from_slice(&facts).unwrap();
    assert_eq!(facts["stops"], json!(["<|im_end|>", "</s>"]));
    assert_eq!(facts["bos_token"], "<s>");
}

#[test]
fn threads_change_no_byte() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let chats = (0..5000).map(|n| (n.to_string(), chat(&format!(" q{n}\n"), &format!("a {n}"))));
    let rows: Vec<Conversation> = chats.map(|(id, chat)| row(&id, Kind::Sft, chat, None)).collect();
    prepare(dir, &rows, "template = 'chatml'");
    let mut bytes = Vec::new();
    for threads in ["1", "4"] {
        check(dir, &["--force", "--threads", threads], 0, &["5000 rows rendered, 0 rejected"]);
        bytes.push(std::fs::read(dir.join("runs/p/template/rendered.parquet")).unwrap());
    }
    assert!(bytes[0] == bytes[1], "the rows depend on the number of threads");
}

/// Writes what an answer thinks only where it is the last; documents and a variable before all.
const FORGETS: &str = "{{ style }}{% for d in documents or [] %}{{ d.text }} {% endfor %}\
    {% for m in messages %}{% if m.reasoning_content and loop.last %}({{ m.reasoning_content }})\
    {% endif %}{{ m.content }}{{ eos_token }}{% endfor %}";

#[test]
fn rewritten_answers_become_samples_and_rows_have_variables_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let answer = |text: &str, thought: &str| json!({"role": "assistant", "content": text, "reasoning_content": thought});
    let user = |text: &str| json!({"role": "user", "content": text});
    let two = json!([user("q"), answer("a", "t"), user("r"), answer("b", "u")]);
    let mut own = row("own", Kind::Sft, chat("q", "a"), None);
    own.variables = Some(json!({"style": "!", "documents": [{"text": "doc"}]}).to_string());
    let rows = [row("two", Kind::Sft, two, None), own];
    prepare(dir, &rows, "template = { file = 'forgets.jinja' }\nvariables = { style = '?' }");
    std::fs::write(dir.join("forgets.jinja"), FORGETS).unwrap();
    let talk =
        ["3 rows rendered (of them 1 for earlier answers that the template rewrites), 0 rejected"];
    let json = check(dir, &["--json"], 0, &talk);
    let (good, bad) = rendered(dir);
    let found: Vec<(&str, &str)> = good.iter().map(|r| (r.id.as_str(), r.text.as_str())).collect();
    let expect = [
        ("two#m1", "?q</s>(t)a</s>"),
        ("two", "?q</s>a</s>r</s>(u)b</s>"),
        ("own", "!doc q</s>a</s>"),
    ];
    assert_eq!((found, bad.len()), (expect.to_vec(), 0));
    let shares: Vec<Share> = good.iter().map(|r| r.share).collect();
    assert_eq!(shares, [Share::Earlier, Share::Main, Share::Main]);
    let report: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(report["ledger"]["sources"]["s"]["added"], json!({"expanded": 1}));
    let flags = ["--set", "template.rewritten=accept", "--set", "template.max_reject_share=1.0"];
    check(dir, &flags, 0, &["2 rows rendered, 0 rejected", "history rewritten: 1"]);
    let flags = ["--set", "template.rewritten=refuse", "--set", "template.max_reject_share=1.0"];
    check(
        dir,
        &flags,
        0,
        &["1 rows rendered, 1 rejected", "rewrites message 1 once others follow"],
    );
}

#[test]
fn what_is_wrong_has_its_exit_code() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    prepare(dir, &rows(), "");
    check(dir, &[], 1, &["4 of 6 rows rejected, more than `max_reject_share` = 0.05"]);
    std::fs::write(dir.join("bad.jinja"), "a\n{% if %}").unwrap();
    std::fs::write(dir.join("now.jinja"), "{{ strftime_now('%Y') }}").unwrap();
    let cases: [(&str, i32, &[&str]); 9] = [
        ("template=chatlm", 2, &["no built-in template `chatlm`", "did you mean `chatml`?"]),
        ("tempalte=chatml", 2, &["unknown key `tempalte`", "did you mean `template`?"]),
        ("date=tomorrow", 2, &["`date`: `tomorrow` is not a date"]),
        ("max_reject_share=2", 2, &["not between 0 and 1"]),
        ("template={file='no.jinja'}", 3, &["no.jinja"]),
        ("template={file='bad.jinja'}", 3, &["bad.jinja: chat template, line 2"]),
        ("template={file='now.jinja'}", 1, &["strftime_now", "`template.date`"]),
        ("template={file='.'}", 3, &["directory"]),
        ("template={file='bad.jinja',of_model='b'}", 2, &["both are given"]),
    ];
    for (set, exit, talk) in cases {
        check(dir, &["--set", &format!("template.{set}")], exit, talk);
    }
    check(dir, &["--runs", "elsewhere"], 3, &["`elsewhere/p/ingest` does not exist"]);
    std::fs::write(dir.join("model/tokenizer_config.json"), "{").unwrap();
    check(dir, &[], 3, &["tokenizer_config.json: not JSON"]);
    std::fs::write(dir.join("model/tokenizer_config.json"), "{}").unwrap();
    check(dir, &[], 3, &["the base model has no chat template", "template.template=chatml"]);
}

#[test]
fn a_model_may_have_several_templates() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut with_tools = row("tools", Kind::Sft, chat("q", "a"), None);
    with_tools.tools = Some("[{\"name\": \"t\"}]".to_owned());
    prepare(dir, &[row("plain", Kind::Sft, chat("q", "a"), None), with_tools], "");
    let named = |name: &str| {
        json!({"name": name, "template":
        format!("{name}{{% for m in messages %}}{{{{ m.content }}}}{{{{ eos_token }}}}{{% endfor %}}")})
    };
    let named: Vec<Value> = ["default", "tool_use", "rag"].map(named).to_vec();
    let config = json!({"eos_token": "</s>", "chat_template": named});
    std::fs::write(dir.join("model/tokenizer_config.json"), config.to_string()).unwrap();
    let texts = |flags: &[&str]| -> Vec<String> {
        check(dir, flags, 0, &["2 rows rendered, 0 rejected"]);
        rendered(dir).0.into_iter().map(|row| row.text).collect()
    };
    assert_eq!(texts(&[]), ["defaultq</s>a</s>", "tool_useq</s>a</s>"]);
    let sealed = Sealed::open(&dir.join("runs/p/template"), ArtefactKind::Rendered).unwrap();
    assert!(sealed.manifest().file("tool_use.jinja").is_some());
    let rag = ["--set", "template.template={of_model='rag'}"];
    assert_eq!(texts(&rag), ["ragq</s>a</s>", "ragq</s>a</s>"]);
    let none = ["--set", "template.template={of_model='x'}"];
    check(dir, &none, 2, &["no chat template `x`", "default, rag, tool_use"]);
    std::fs::create_dir(dir.join("model/additional_chat_templates")).unwrap();
    let file = dir.join("model/additional_chat_templates/tool_use.jinja");
    std::fs::write(file, "{{ messages[0].content }}").unwrap();
    check(dir, &[], 3, &["no default chat template", "of_model = \"tool_use\""]);
}

#[test]
fn one_conversation_is_shown() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    prepare(dir, &[], "");
    std::fs::write(dir.join("m.json"), chat("q", "a").to_string()).unwrap();
    let render = ["render", "--template", "plain", "--messages", "m.json"];
    assert_eq!(check(dir, &render, 0, &[]), "<s>User: q\nAssistant: a</s>\n");
    let json = check(dir, &[&render[..], &["--spans"]].concat(), 0, &[]);
    let found: Value = serde_json::from_str(&json).unwrap();
    let expect = json!({"text": "q", "part": "content", "message": 0, "role": "user",
        "weight": 1.0, "chosen": false});
    assert_eq!(found["spans"][1], expect);
    assert_eq!(found["prompt_len"], "<s>User: q\nAssistant:".len());
    let row = json!({"messages": chat("q", "a"), "tools": [{"name": "t"}],
        "documents": [{"text": "d"}], "chat_template_kwargs": {"style": "!", "x": 1}});
    std::fs::write(dir.join("row.json"), row.to_string()).unwrap();
    std::fs::write(dir.join("d.json"), "[{\"text\": \"e\"}]").unwrap();
    let source =
        "{{ style }}{{ x }}{{ tools[0].name }}{{ documents[0].text }}{{ messages[0].content }}";
    std::fs::write(dir.join("all.jinja"), source).unwrap();
    let all = ["render", "--template", "all.jinja", "--messages", "row.json"];
    assert_eq!(check(dir, &all, 0, &[]), "!1tdq\n");
    let own = ["--documents", "d.json", "--kwargs", "{\"x\": 2}"];
    assert_eq!(check(dir, &[&all[..], &own[..]].concat(), 0, &[]), "!2teq\n");
    check(dir, &[&all[..], &["--kwargs", "[]"]].concat(), 2, &["`--kwargs` is no JSON object"]);
    let missing = ["render", "--template", "plain", "--messages", "no.json"];
    check(dir, &missing, 3, &["no.json"]);
    std::fs::write(dir.join("m.json"), "[{}]").unwrap();
    check(dir, &render, 3, &["m.json: message 0 has no `role`"]);
}
