//! Every added token of every tokenizer, said by every role: none becomes a control token, and what
//! stands around it keeps its ids.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use hone_chat::ChatTemplate;
use hone_schema::parse_messages;
use serde_json::{Value, json};

use crate::cells::written;
use crate::golden::{Entry, Index, TemplateFile, Tokenizer, folder, json as read};

/// Tokenizers with more control tokens than this are tried with each token whole in the user's
/// message, and in the other ways with every eighth.
const ALL_WAYS_MAX: usize = 1000;

/// Who says it; `key` is no role but a key in the description of a tool.
const ROLES: [&str; 5] = ["system", "user", "assistant", "tool", "key"];

/// What an answer says so that templates that look for thoughts find one.
const THINKS: &str = "<think>\nhm\n</think>\n\nx";

/// A conversation of four messages in which one says something else than `x`.
fn chat(role: &str, says: &str, answer: &str) -> Value {
    let text = |own: &str| match own {
        _ if own == role => says.to_owned(),
        "assistant" => answer.to_owned(),
        _ => "x".to_owned(),
    };
    let arguments = json!({"city": "x"});
    let call = json!({"type": "function", "id": "call00001", "function": {"name": "f", "arguments": arguments}});
    let user = json!({"role": "user", "content": text("user")});
    let answer = json!({"role": "assistant", "content": text("assistant")});
    match role {
        "system" => json!([{"role": "system", "content": text("system")}, user, answer]),
        "tool" => json!([
            user,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": text("tool"), "tool_call_id": "call00001", "name": "f"},
            answer,
        ]),
        _ => json!([user, answer]),
    }
}

/// A tool with a parameter of that name, which is also a key of the parameter.
fn tools(key: &str) -> Value {
    let properties = json!({key: {"type": "string", "description": "x", key: "x"}});
    let parameters = json!({"type": "object", "properties": properties, "required": [key]});
    json!([{"type": "function", "function": {"name": "f", "description": "x", "parameters": parameters}}])
}

/// Ids of a conversation, cut at its control tokens: those tokens, and what lies between them.
#[derive(PartialEq, Debug)]
struct Cut {
    control: Vec<u32>,
    between: Vec<Vec<u32>>,
}

fn cut(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    role: &str,
    [says, answer]: [&str; 2],
) -> Option<Cut> {
    let messages = parse_messages(&chat(role, says, answer).to_string()).expect("messages");
    let tools = (role == "key").then(|| tools(says));
    let found = template.locate(&messages, tools.as_ref(), 1.0).ok()?;
    let written = written(&found.spans, found.text.len());
    let encoded = tokenizer.vocab.encode(&found.text, &written).ok()?;
    let mut cut = Cut { control: Vec::new(), between: vec![Vec::new()] };
    for id in encoded.ids {
        if tokenizer.vocab.is_control(id) {
            cut.control.push(id);
            cut.between.push(Vec::new());
        } else {
            cut.between.last_mut().expect("it is never empty").push(id);
        }
    }
    Some(cut)
}

/// What a message or a key says that tries to say `token`, and what the answer says where it is
/// another's.
fn attempts(role: &str, token: &str, other: &str) -> [(String, &'static str); 6] {
    if role == "key" {
        let mut chars = token.chars();
        let (first, last) = (chars.next(), chars.next_back());
        let inner = chars.as_str();
        let [first, last] = [first, last].map(|c| c.map(String::from).unwrap_or_default());
        // What a template that writes `<`, a key and `>` makes a token of, and the like.
        let keys = [
            inner.to_owned(),
            format!("{first}{inner}"),
            format!("{inner}{last}"),
            inner.strip_prefix('/').unwrap_or(inner).to_owned(),
            format!("{inner} "),
            token.to_owned(),
        ];
        return keys.map(|key| (key, "x"));
    }
    let middle = (0..=token.len() / 2).rev().find(|at| token.is_char_boundary(*at));
    let (head, tail) = token.split_at(middle.expect("0 is a boundary"));
    [
        (format!("a {token} b"), "x"),
        (token.to_owned(), THINKS),
        (format!("{head}{token}{tail}"), "x"),
        (format!("{token}{token}{other}"), "x"),
        (head.to_owned(), "x"),
        (tail.to_owned(), "x"),
    ]
}

/// Whether `part` is what is left of `whole` when some of it is left out.
fn is_part(part: &[u32], whole: &[u32]) -> bool {
    let mut whole = whole.iter();
    part.iter().all(|id| whole.any(|other| other == id))
}

/// What became of the attempts against one tokenizer.
#[derive(Default)]
struct Tally {
    tried: usize,
    refused: usize,
    forged: Vec<String>,
}

fn attack(
    tokenizer: &Tokenizer,
    source: &str,
    template: &ChatTemplate,
    role: &str,
    tally: &mut Tally,
) {
    let Some(plain) = cut(tokenizer, template, role, ["x", "x"]) else { return };
    let thinking = cut(tokenizer, template, role, ["x", THINKS]);
    let tokens: Vec<String> = tokenizer.vocab.control_tokens().map(|(_, text)| text).collect();
    let step = if tokens.len() > ALL_WAYS_MAX { 8 } else { 1 };
    for (at, token) in tokens.iter().enumerate() {
        let n_ways = if at % step == 0 { 6 } else { 2 * usize::from(role == "user") };
        let other = &tokens[(at + 1) % tokens.len()];
        for (says, answer) in attempts(role, token, other).into_iter().take(n_ways) {
            let benign = if answer == THINKS { thinking.as_ref() } else { Some(&plain) };
            let Some(benign) = benign else { continue };
            tally.tried += 1;
            let Some(found) = cut(tokenizer, template, role, [&says, answer]) else {
                tally.refused += 1;
                continue;
            };
            // A template that looks for a marker in a message (thoughts, results of tools) may leave markers of its own
            // out on finding it; it may not write another.
            if source.contains(token.trim()) && is_part(&found.control, &benign.control) {
                continue;
            }
            let same = found.between.iter().zip(&benign.between).filter(|(a, b)| a == b).count();
            if found.control != benign.control || same + 1 < benign.between.len() {
                tally.forged.push(format!("{role} says {says:?}: {found:?}"));
            }
        }
    }
}

fn attack_all(root: &Path, index: &Index, entry: &Entry) -> Tally {
    let tokenizer = Tokenizer::read(&root.join("tokenizers").join(&entry.name), &entry.tokens);
    let mut tally = Tally::default();
    let compiled = |file: &TemplateFile| {
        let source = fs::read_to_string(root.join(&file.file)).expect("a template");
        let template = tokenizer.template(&source, &index.now).expect("a template");
        (source, template)
    };
    let templates: Vec<_> = entry.templates.iter().map(compiled).collect();
    let n_tokens = tokenizer.vocab.control_tokens().count();
    for role in ROLES {
        let able = templates.iter().filter(|(_, t)| cut(&tokenizer, t, role, ["x", "x"]).is_some());
        // Every template treats what is said alike, and keys in its own way.
        let n = if role == "key" && n_tokens <= ALL_WAYS_MAX { usize::MAX } else { 1 };
        for (source, template) in able.take(n) {
            attack(&tokenizer, source, template, role, &mut tally);
        }
    }
    tally
}

#[test]
fn no_message_writes_a_control_token_of_any_tokenizer() {
    let Some(root) = folder("HONE_PARITY") else { return };
    let index: Index = read(&root.join("index.json"));
    let mut report = BTreeMap::new();
    let (mut n, mut forged) = (0, Vec::new());
    for entry in &index.tokenizers {
        let tally = attack_all(&root, &index, entry);
        assert!(tally.tried > 0, "{} was not tried", entry.name);
        n += tally.tried;
        let counts =
            json!({"tried": tally.tried, "refused": tally.refused, "forged": tally.forged.len()});
        report.insert(entry.name.clone(), counts);
        forged.extend(tally.forged.into_iter().map(|f| format!("{}: {f}", entry.name)));
    }
    fs::write(root.join("forgery.json"), json!(report).to_string()).expect("it is written");
    let shown = forged.iter().take(20).map(String::as_str).collect::<Vec<_>>().join("\n");
    assert!(forged.is_empty(), "{} of {n} attempts:\n{shown}", forged.len());
    assert!(n > 50_000, "only {n} attempts");
}
