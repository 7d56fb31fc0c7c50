//! What Jinja2 and transformers make of real templates, against what this crate makes of them.
//!
//! `tests/golden/README.md` says how the goldens are made. The templates themselves are read in
//! place, from `HONE_CORPUS`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use hone_chat::{BUILTINS, ChatTemplate, Date, Dialect, Located, TemplateError, builtin};
use hone_schema::{Message, Part, Span, THOUGHT_MARKS, parse_messages, sha256};
use serde_json::Value;

/// Conversations for each byte of which it is known who wrote it: all that render.
const LOCATED: usize = 1175;

/// Their messages, and those of them whose content stands in the text once and as a whole, white
/// space at its ends aside. The others are left out by the template (a system message, a thought of
/// an earlier turn), or are blank.
const MESSAGES: [usize; 2] = [4195, 4062];

/// Conversations rendered by a template that marks what the model writes: those bytes are trained
/// and no others. Of them those of whose answers no word is in the text, because they are blank or
/// because the template takes contents in parts only: there hone trains nothing.
const GENERATED: [usize; 2] = [241, 16];

fn golden(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name);
    let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&bytes).expect("JSON")
}

fn corpus() -> Option<PathBuf> {
    let corpus = std::env::var_os("HONE_CORPUS").map(PathBuf::from);
    if corpus.is_none() {
        use std::io::Write;
        let said = writeln!(std::io::stderr(), "skipped: HONE_CORPUS is not set");
        said.expect("stderr is open");
    }
    corpus
}

fn source(corpus: &Path, template: &str) -> String {
    let text = std::fs::read_to_string(corpus.join(template)).expect("a template");
    if !template.ends_with(".json") {
        return text;
    }
    let config: Value = serde_json::from_str(&text).expect("JSON");
    config["chat_template"].as_str().expect("a template").to_owned()
}

fn chats() -> Vec<(String, Vec<Message>)> {
    let chats = golden("chats.json");
    let chats = chats.as_array().expect("a list").iter().map(|chat| {
        let messages = parse_messages(&chat["messages"].to_string()).expect("messages");
        (chat["name"].as_str().expect("a name").to_owned(), messages)
    });
    chats.collect()
}

fn compile(source: &str, renders: &Value, now: &str) -> Result<ChatTemplate, TemplateError> {
    let tokens: BTreeMap<String, String> =
        serde_json::from_value(renders["tokens"].clone()).expect("tokens");
    let dialect = Dialect {
        added_tokens: [
            "<|im_start|>",
            "<|im_end|>",
            "<|eot_id|>",
            "<think>",
            "</think>",
            "<end_of_turn>",
        ]
        .map(str::to_owned)
        .to_vec(),
        tokens,
        date: Some(Date::parse(now).expect("a date")),
        ..Dialect::default()
    };
    ChatTemplate::new(source, dialect)
}

fn without_last_answer(messages: &[Message]) -> &[Message] {
    match messages.split_last() {
        Some((last, before)) if last.role == "assistant" => before,
        _ => messages,
    }
}

/// The bytes that are an answer's and have a weight, neighbours joined.
fn trained(found: &Located) -> Vec<[usize; 2]> {
    let mut ranges: Vec<[usize; 2]> = Vec::new();
    for span in found.spans.iter().filter(|s| s.role == "assistant" && s.weight > 0.0) {
        let range = [span.start as usize, span.end as usize];
        match ranges.last_mut() {
            Some(last) if last[1] == range[0] => last[1] = range[1],
            _ => ranges.push(range),
        }
    }
    ranges
}

/// The spans that transformers finds for the generation blocks of a template, neighbours joined.
fn generated(cell: &Value) -> Vec<[usize; 2]> {
    let mut ranges: Vec<[usize; 2]> = Vec::new();
    let spans: Vec<[usize; 2]> = serde_json::from_value(cell[2].clone()).expect("ranges of bytes");
    for range in spans.into_iter().filter(|range| range[0] < range[1]) {
        match ranges.last_mut() {
            Some(last) if last[1] == range[0] => last[1] = range[1],
            _ => ranges.push(range),
        }
    }
    ranges
}

/// What is different between an outcome and its golden.
fn difference(golden: &Value, found: &Result<String, TemplateError>) -> Option<String> {
    match (golden, found) {
        (Value::Array(cell), Ok(text)) => {
            let is_same = cell[0] == sha256(text.as_bytes()).as_str() && cell[1] == text.len();
            (!is_same).then(|| format!("golden has {} bytes, found {text:?}", cell[1]))
        }
        (Value::Object(map), Err(TemplateError::Raised(message))) if map.contains_key("error") => {
            (map["error"] != message.as_str()).then(|| format!("{golden} but {message:?}"))
        }
        (Value::Object(map), Err(TemplateError::Failed { .. })) if map.contains_key("fails") => {
            None
        }
        (golden, found) => Some(format!("golden {golden}, found {found:?}")),
    }
}

/// Whether the bytes that are said to be a message's are its text; where a thought opens that, its
/// marks are the template's, and may stand beside more of it.
fn has_content(found: &Located, message: &Message, idx: usize) -> bool {
    let text = message.text().unwrap_or("").trim();
    let thinks =
        message.role == "assistant" && THOUGHT_MARKS.iter().any(|[open, _]| text.starts_with(open));
    let own = |span: &&Span| {
        span.message == Some(idx as u32)
            && (span.part == Part::Content || (thinks && span.part != Part::Stop))
    };
    let spans = found.spans.iter().filter(own);
    let said: String =
        spans.map(|span| &found.text[span.start as usize..span.end as usize]).collect();
    said.trim() == text || (thinks && said.contains(text))
}

#[test]
fn real_templates_render_as_in_python() {
    let Some(corpus) = corpus() else { return };
    let golden = golden("renders.json");
    let chats = chats();
    let now = golden["now"].as_str().expect("a date");
    let (mut n, mut different, mut located) = (0, Vec::new(), 0);
    let (mut unlocated, mut n_messages) = (Vec::new(), [0, 0]);
    let (mut n_generated, mut n_wordless, mut otherwise) = (0, 0, Vec::new());
    for renders in golden["renders"].as_array().expect("a list") {
        let name = renders["template"].as_str().expect("a name");
        let template =
            compile(&source(&corpus, name), renders, now).unwrap_or_else(|e| panic!("{name}: {e}"));
        for (at, (chat, messages)) in chats.iter().enumerate() {
            let whole = template.render(messages, None, false);
            let prompt = template.render(without_last_answer(messages), None, true);
            for (what, found) in [("whole", &whole), ("prompt", &prompt)] {
                n += 1;
                let golden = &renders[what][at];
                if let Some(difference) = difference(golden, found) {
                    different.push((name, chat.as_str(), what, difference));
                }
            }
            let Ok(whole) = whole else { continue };
            match template.locate(messages, None, 1.0) {
                Ok(found) => {
                    located += 1;
                    for (at, message) in messages.iter().enumerate() {
                        n_messages[0] += 1;
                        n_messages[1] += usize::from(has_content(&found, message, at));
                    }
                    assert!(found.text.starts_with(whole.trim_end()), "{name} {chat}");
                    let cell = &renders["whole"][at];
                    if cell[2].is_array() {
                        n_generated += 1;
                        let (ours, theirs) = (trained(&found), generated(cell));
                        if ours.is_empty() && !theirs.is_empty() {
                            n_wordless += 1;
                        } else if ours != theirs {
                            otherwise.push(format!(
                                "{name} {chat}: {ours:?} not {theirs:?} in {:?}",
                                found.text
                            ));
                        }
                    }
                }
                Err(e) => unlocated.push(format!("{name} {chat}: {e}")),
            }
        }
    }
    let list = |lines: &[String]| lines.join("\n");
    assert_eq!(n, golden["count"].as_u64().expect("a count") as usize);
    let lines: Vec<String> =
        different.iter().map(|(t, c, w, d)| format!("{t} {c} {w}: {d}")).collect();
    assert!(lines.is_empty(), "{} of {n}:\n{}", lines.len(), list(&lines));
    assert_eq!(located, LOCATED, "{}", list(&unlocated));
    assert_eq!(n_messages, MESSAGES);
    assert_eq!(otherwise, Vec::<String>::new(), "{} of {n_generated}", otherwise.len());
    assert_eq!([n_generated, n_wordless], GENERATED);
}

/// Whether a full text is what Jinja2 renders.
fn check_text(golden: &Value, found: &Result<String, TemplateError>, what: &str) {
    match (golden.get("text"), found) {
        (Some(text), Ok(found)) => assert_eq!(text, found, "{what}"),
        (None, Err(TemplateError::Raised(message))) => {
            assert_eq!(golden["error"], message.as_str(), "{what}");
        }
        (_, found) => panic!("{what}: golden {golden}, found {found:?}"),
    }
}

#[test]
fn built_in_templates_render_as_in_python() {
    let golden = golden("builtin_renders.json");
    let chats = chats();
    let list = golden["renders"].as_array().expect("a list");
    assert_eq!(list.len(), BUILTINS.len(), "a template was added or lost");
    let mut n = 0;
    for renders in list {
        let file = renders["template"].as_str().expect("a name");
        let source = builtin(file.trim_end_matches(".jinja")).expect("a built-in template");
        let sha256 = sha256(source.as_bytes());
        assert_eq!(renders["sha256"], sha256.as_str(), "{file} changed: run make_tokens.py");
        let template = compile(source, &golden, "2026-01-02").expect("a valid template");
        for (at, (name, messages)) in chats.iter().enumerate() {
            let whole = template.render(messages, None, false);
            let prompt = template.render(without_last_answer(messages), None, true);
            check_text(&renders["whole"][at], &whole, &format!("{file} {name} whole"));
            check_text(&renders["prompt"][at], &prompt, &format!("{file} {name} prompt"));
            n += 2;
            let Ok(whole) = whole else { continue };
            let found = template.locate(messages, None, 1.0).expect("every byte has an author");
            assert_eq!(found.text, whole, "{file} {name}");
            // What a served model is given is how the text begins, and every answer has an end.
            assert_eq!(found.notes, Vec::<&str>::new(), "{file} {name}");
            let is_answer = |m: &Message| m.role == "assistant";
            assert_eq!(found.prompt_len.is_some(), messages.last().is_some_and(is_answer));
            let n_stops = found.spans.iter().filter(|s| s.part == Part::Stop).count();
            let n_answers = messages.iter().filter(|m| is_answer(m)).count();
            assert_eq!(n_stops, n_answers, "{file} {name}");
        }
    }
    assert_eq!(n, golden["count"].as_u64().expect("a count") as usize);
}
