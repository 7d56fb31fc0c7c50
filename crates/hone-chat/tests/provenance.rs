//! Odd conversations through every real template: what a message says is never taken for the
//! template's, nor for another message's.
//!
//! Every text of every message holds words that nothing else holds, with markers, blanks, quotes
//! and pieces of the template's own literals between them. Wherever such a word stands in the
//! rendered text, its span has to name its message and its part; and wherever a whole text stands
//! as it came, so has every byte of it, markers included.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use hone_chat::{ChatTemplate, Date, Dialect, Located};
use hone_schema::{Part, parse_messages};
use serde_json::{Value, json};

/// Conversations for each template.
const N_CHATS: usize = 24;

/// Conversations in all; those of which every byte is accounted for, those that the template
/// refuses or fails on, those that hone refuses because it cannot tell.
const COUNTS: [usize; 4] = [2472, 2273, 199, 0];

const TOKENS: [(&str, &str); 4] =
    [("bos_token", "<s>"), ("eos_token", "</s>"), ("pad_token", "<pad>"), ("unk_token", "<unk>")];

/// Added tokens, all of which stand in some message.
const ADDED: [&str; 9] = [
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|end|>",
    "<think>",
    "</think>",
    "<end_of_turn>",
    "<tool_call>",
    "[INST]",
];

const ODD: [&str; 14] = [
    " ",
    "\n",
    "\n\n",
    "\t",
    "é",
    "\u{f0000}",
    "\"",
    "\\",
    "</s>",
    "{{ x }}",
    "<s>assistant\n",
    "\u{85}",
    "😀",
    ": ",
];

/// A generator of numbers that is the same everywhere.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % n
    }
}

/// A text of a message, and where it belongs.
struct Said {
    text: String,
    words: Vec<String>,
    message: usize,
    part: Part,
}

impl Said {
    /// Whether it may be found as that part: a content that opens with a thought is one, too.
    fn is(&self, part: Part) -> bool {
        let thinks = self.part == Part::Content && self.text.contains("</think>");
        part == self.part || (thinks && part == Part::Reasoning)
    }
}

/// Makes conversations and keeps what they say.
struct Maker {
    dice: Dice,
    n_words: usize,
    said: Vec<Said>,
}

impl Maker {
    fn text(&mut self, message: usize, part: Part, odd: bool) -> String {
        let (mut text, mut words) = (String::new(), Vec::new());
        for _ in 0..1 + self.dice.below(4) {
            if odd {
                for _ in 0..self.dice.below(3) {
                    let at = self.dice.below(ODD.len() + ADDED.len());
                    text.push_str(ODD.iter().chain(&ADDED).nth(at).expect("it is below the sum"));
                }
            }
            self.n_words += 1;
            let word = format!("uq{}q", self.n_words);
            text.push_str(&word);
            words.push(word);
        }
        if odd && self.dice.below(3) == 0 {
            text.push_str(ODD[self.dice.below(4)]);
        }
        self.said.push(Said { text: text.clone(), words, message, part });
        text
    }

    fn chat(&mut self) -> Value {
        let mut list = Vec::new();
        if self.dice.below(2) == 0 {
            list.push(json!({"role": "system", "content": self.text(0, Part::Content, true)}));
        }
        for _ in 0..1 + self.dice.below(3) {
            let at = list.len();
            list.push(json!({"role": "user", "content": self.text(at, Part::Content, true)}));
            let content = match self.dice.below(6) {
                0 => String::new(),
                _ => self.text(at + 1, Part::Content, true),
            };
            let mut answer = json!({"role": "assistant", "content": content});
            if self.dice.below(2) == 0 {
                answer["reasoning_content"] = json!(self.text(at + 1, Part::Reasoning, true));
            }
            if self.dice.below(3) == 0 {
                let name = self.text(at + 1, Part::ToolCall, false);
                let arguments = json!({"a": self.text(at + 1, Part::ToolCall, true), "n": 1.5});
                let function = json!({"name": name, "arguments": arguments});
                answer["tool_calls"] = json!([{"type": "function", "function": function}]);
            }
            list.push(answer);
        }
        Value::Array(list)
    }
}

/// Checks the spans of a conversation against what was said.
fn check(found: &Located, said: &[Said], what: &str) {
    let span_at = |byte: usize| {
        let at = found.spans.partition_point(|span| span.end as usize <= byte);
        &found.spans[at]
    };
    for said in said {
        for word in &said.words {
            for (at, _) in found.text.match_indices(word.as_str()) {
                let span = span_at(at);
                let found_in = (span.message, said.is(span.part));
                let expect = (Some(said.message as u32), true);
                assert_eq!(found_in, expect, "{what}: {word}\n{}", found.text);
                assert!(at + word.len() <= span.end as usize, "{what}: {word} is cut");
            }
        }
        let whole = said.text.trim();
        for (at, _) in found.text.match_indices(whole) {
            for byte in at..at + whole.len() {
                let span = span_at(byte);
                // What a template looks for in an answer, it writes itself.
                let is_own =
                    said.is(span.part) || (span.part == Part::Scaffold && span.role == "assistant");
                let whose = (span.message, is_own);
                assert_eq!(
                    whose,
                    (Some(said.message as u32), true),
                    "{what}: {whole:?}\n{}",
                    found.text
                );
            }
        }
    }
}

#[test]
fn odd_conversations_through_every_real_template() {
    let Some(corpus) = std::env::var_os("HONE_CORPUS").map(PathBuf::from) else {
        use std::io::Write;
        let said = writeln!(std::io::stderr(), "skipped: HONE_CORPUS is not set");
        return said.expect("stderr is open");
    };
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/renders.json");
    let golden: Value =
        serde_json::from_str(&std::fs::read_to_string(golden).expect("a golden")).expect("JSON");
    let names = golden["renders"].as_array().expect("a list").iter();
    let names = names.filter_map(|r| r["template"].as_str()).filter(|n| n.ends_with(".jinja"));
    let mut counts = [0; 4];
    let mut unknown = BTreeMap::new();
    for (seed, name) in names.enumerate() {
        let source = std::fs::read_to_string(corpus.join(name)).expect("a template");
        let dialect = Dialect {
            tokens: TOKENS.map(|(name, token)| (name.to_owned(), token.to_owned())).into(),
            added_tokens: ADDED.map(str::to_owned).to_vec(),
            date: Some(Date::parse("2026-01-02").expect("a date")),
            ..Dialect::default()
        };
        let template = ChatTemplate::new(&source, dialect).expect("a valid template");
        for n in 0..N_CHATS {
            let dice = Dice((seed * N_CHATS + n) as u64);
            let mut maker = Maker { dice, n_words: 0, said: Vec::new() };
            let messages = parse_messages(&maker.chat().to_string()).expect("messages");
            counts[0] += 1;
            let Ok(plain) = template.render(&messages, None, false) else {
                counts[2] += 1;
                continue;
            };
            match template.locate(&messages, None, 1.0) {
                Ok(found) => {
                    counts[1] += 1;
                    assert!(found.text.starts_with(plain.trim_end()), "{name} {n}");
                    check(&found, &maker.said, &format!("{name} {n}"));
                }
                Err(error) => {
                    assert_eq!(error.reason(), "provenance unknown", "{name} {n}: {error}");
                    counts[3] += 1;
                    *unknown.entry(name).or_insert(0) += 1;
                }
            }
        }
    }
    assert_eq!(counts, COUNTS, "{unknown:#?}");
}
