//! Messages as canonical JSON bytes.
//!
//! A conversation keeps its messages as the JSON text it came with: never as a struct of columns, which would invent a null
//! for every key that another row has. [`parse_messages`] gives the view that stages need; keys it does not know stay in
//! [`Message::value`] for the chat template.
//!
//! A row may weigh its messages, and pieces of their texts:
//!
//! - a message by `train`, `training`, `weight`, `loss`, `loss_scale` or `loss_weight`: true, false, or a number of at least
//!   0. `true` also says that the message is trained whatever the policy makes of its role;
//! - a content that is a list of parts by the same keys on each part. Such a list is there for its weights, so the chat
//!   template sees the texts joined: templates that take lists take texts too, the others only texts. A list without weights
//!   is passed on as it is. Parts that are thoughts become the message's `reasoning_content`, which it must not have as well. A
//!   list in `reasoning_content`, `thinking` or `reasoning` is always joined;
//! - a content by `train_detail`, a list of `{begin_offset, end_offset, train}`: offsets count characters, **the end is the
//!   last character, not the one behind it**, and what no entry trains is not trained.

use std::ops::Range;

use serde_json::{Map, Value};

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// `system`, `user`, `assistant`, `tool` or what the row says.
    pub role: String,
    /// What the row makes of its loss; 1 when it says nothing, 0 when it is not to be trained.
    pub weight: f32,
    /// The row says `true`: this message is trained, whatever the policy makes of its role.
    pub chosen: bool,
    /// What the row says of pieces of its texts; factors to the weight of the message.
    pub marks: Vec<Mark>,
    /// Everything the row said, `role` and `content` included, for the template.
    pub value: Map<String, Value>,
}

/// What a row says of a piece of one of a message's texts.
#[derive(Clone, Debug, PartialEq)]
pub struct Mark {
    /// Key of the text in the message: `content`, `reasoning_content` and its kin.
    pub key: &'static str,
    /// Bytes of the text.
    pub range: Range<usize>,
    /// Factor to the weight of the message.
    pub weight: f32,
    /// The row says that the piece is trained, whatever the policy makes of its role.
    pub chosen: bool,
}

/// Why some JSON is not a list of messages.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MessageError {
    /// Not JSON, or not a list of objects.
    #[error("messages are not a JSON list of objects: {0}")]
    Form(String),
    /// A message without a role.
    #[error("message {index} has no `role`")]
    NoRole {
        /// Its index.
        index: usize,
    },
    /// A weight that is no number of at least 0.
    #[error(
        "message {index} has `{key}` {found}, which is neither true, false nor a number of at least 0"
    )]
    Weight {
        /// Its index.
        index: usize,
        /// The key.
        key: &'static str,
        /// What stood there.
        found: String,
    },
    /// A list of weighed parts with one that is no text.
    #[error("message {index}: a part of `{key}` is no text: {found}")]
    Part {
        /// Its index.
        index: usize,
        /// The key.
        key: &'static str,
        /// What stood there.
        found: String,
    },
    /// Thoughts among the weighed parts of a content, beside a thought of the message's own.
    #[error(
        "message {index} has a thought in `{key}` and others among the weighed parts of its `content`: \
         keep it in one of them"
    )]
    TwoThoughts {
        /// Its index.
        index: usize,
        /// The key.
        key: &'static str,
    },
    /// An entry of `train_detail` that does not lie in the content.
    #[error(
        "message {index} has `train_detail` {found}, but its content has {n_chars} characters, of which \
         an entry names the first and the last from 0 on and says `train`: true or false"
    )]
    Detail {
        /// Its index.
        index: usize,
        /// What stood there.
        found: String,
        /// Characters of the content.
        n_chars: usize,
    },
}

impl Message {
    /// The content when it is a text.
    pub fn text(&self) -> Option<&str> {
        self.value.get("content").and_then(Value::as_str)
    }

    /// Weight of a byte of the text under `key`, and whether the row itself says that it is trained.
    pub fn weight_at(&self, key: &str, byte: usize) -> (f32, bool) {
        let marks = self.marks.iter().filter(|mark| mark.key == key && mark.range.contains(&byte));
        marks.fold((self.weight, self.chosen), |(weight, chosen), mark| {
            (weight * mark.weight, chosen || mark.chosen)
        })
    }
}

/// Keys that say whether something is trained, under the names of the ecosystem's tools.
const WEIGHT_KEYS: [&str; 6] = ["train", "training", "weight", "loss", "loss_scale", "loss_weight"];

/// Keys of what a message thinks before it speaks.
pub const REASONING_KEYS: [&str; 4] = ["reasoning_content", "thinking", "reasoning", "thought"];

/// What opens and closes a thought in a text, by families of models.
pub const THOUGHT_MARKS: [[&str; 2]; 5] = [
    ["<think>", "</think>"],
    ["<thinking>", "</thinking>"],
    ["<seed:think>", "</seed:think>"],
    ["[THINK]", "[/THINK]"],
    ["<|START_THINKING|>", "<|END_THINKING|>"],
];

/// Types of parts that are thoughts.
const REASONING_TYPES: [&str; 2] = ["thinking", "reasoning"];

/// Reads the JSON list of a row.
///
/// # Errors
/// See [`MessageError`].
pub fn parse_messages(json: &str) -> Result<Vec<Message>, MessageError> {
    let items: Vec<Map<String, Value>> =
        serde_json::from_str(json).map_err(|e| MessageError::Form(e.to_string()))?;
    items.into_iter().enumerate().map(|(index, value)| message(index, value)).collect()
}

fn message(index: usize, mut value: Map<String, Value>) -> Result<Message, MessageError> {
    let role = value.get("role").and_then(Value::as_str).ok_or(MessageError::NoRole { index })?;
    let role = role.to_owned();
    let (weight, chosen) = weight_of(index, &value)?.unwrap_or((1.0, false));
    let mut marks = Vec::new();
    if value.get("content").is_some_and(is_weighed) {
        let said = Joined::of(index, "content", &value["content"])?;
        if let Some(thought) = said.thought {
            let is_said = |key: &&str| value.get(*key).is_some_and(|own| !own.is_null());
            if let Some(key) = REASONING_KEYS.into_iter().find(is_said) {
                return Err(MessageError::TwoThoughts { index, key });
            }
            value.insert("reasoning_content".to_owned(), Value::String(thought));
        }
        value.insert("content".to_owned(), Value::String(said.text));
        marks.extend(said.marks);
    }
    for key in REASONING_KEYS {
        if let Some(list @ Value::Array(_)) = value.get(key) {
            let said = Joined::of(index, key, list)?;
            value.insert(key.to_owned(), Value::String(said.text));
            marks.extend(said.marks);
        }
    }
    if let Some(details) = value.get("train_detail").filter(|v| !v.is_null()) {
        let content = value.get("content").and_then(Value::as_str).unwrap_or_default();
        marks.extend(details_of(index, details, content)?);
    }
    Ok(Message { role, weight, chosen, marks, value })
}

/// The product of what the flags of a message or a part say, and whether one says `true`; `None` where none is there.
fn weight_of(
    index: usize,
    value: &Map<String, Value>,
) -> Result<Option<(f32, bool)>, MessageError> {
    let mut said = None;
    for key in WEIGHT_KEYS {
        let weight = match value.get(key) {
            None | Some(Value::Null) => continue,
            Some(Value::Bool(train)) => f32::from(u8::from(*train)),
            Some(other) => other
                .as_f64()
                .map(|w| w as f32)
                .filter(|w| w.is_finite() && *w >= 0.0)
                .ok_or_else(|| MessageError::Weight { index, key, found: other.to_string() })?,
        };
        let (product, chosen) = said.unwrap_or((1.0, false));
        said = Some((product * weight, chosen || value[key] == Value::Bool(true)));
    }
    Ok(said)
}

/// Whether a content is a list in which a part has a weight.
fn is_weighed(content: &Value) -> bool {
    let has_weight = |part: &Value| {
        WEIGHT_KEYS.iter().any(|key| part.get(key).is_some_and(|weight| !weight.is_null()))
    };
    content.as_array().is_some_and(|parts| parts.iter().any(has_weight))
}

/// A list of parts as one text.
#[derive(Default)]
struct Joined {
    text: String,
    /// Parts of a content that are thoughts.
    thought: Option<String>,
    marks: Vec<Mark>,
}

impl Joined {
    fn of(index: usize, key: &'static str, list: &Value) -> Result<Self, MessageError> {
        let mut joined = Joined::default();
        for part in list.as_array().into_iter().flatten() {
            let kind = part["type"].as_str().unwrap_or("text");
            let is_thought = REASONING_TYPES.contains(&kind);
            let keys = ["text", "value", "content", "thinking", "reasoning"];
            let text = part.as_str().or_else(|| keys.iter().find_map(|key| part[*key].as_str()));
            let is_text = ["text", "output_text", "input_text"].contains(&kind) || is_thought;
            let text = text.filter(|_| is_text).ok_or_else(|| {
                let found = part.to_string().chars().take(80).collect();
                MessageError::Part { index, key, found }
            })?;
            let said = part.as_object().map(|part| weight_of(index, part)).transpose()?.flatten();
            let (into, key) = match is_thought && key == "content" {
                true => (joined.thought.get_or_insert_default(), REASONING_KEYS[0]),
                false => (&mut joined.text, key),
            };
            let start = into.len();
            into.push_str(text);
            if let Some((weight, chosen)) = said {
                joined.marks.push(Mark { key, range: start..into.len(), weight, chosen });
            }
        }
        Ok(joined)
    }
}

/// Marks that cover a content: each piece is trained where an entry says so, and nowhere else.
fn details_of(index: usize, details: &Value, content: &str) -> Result<Vec<Mark>, MessageError> {
    let starts: Vec<usize> =
        content.char_indices().map(|(at, _)| at).chain([content.len()]).collect();
    let n_chars = starts.len() - 1;
    let wrong = |found: &Value| MessageError::Detail { index, found: found.to_string(), n_chars };
    let mut trained = vec![false; n_chars];
    for detail in details.as_array().ok_or_else(|| wrong(details))? {
        let offset = |key: &str| {
            let offset = detail[key].as_u64().and_then(|n| usize::try_from(n).ok());
            offset.filter(|n| *n < n_chars).ok_or_else(|| wrong(detail))
        };
        let (begin, end) = (offset("begin_offset")?, offset("end_offset")?);
        if begin > end {
            return Err(wrong(detail));
        }
        if detail["train"].as_bool().ok_or_else(|| wrong(detail))? {
            trained[begin..=end].fill(true);
        }
    }
    let mut at = 0;
    let runs = trained.chunk_by(|a, b| a == b).map(|run| {
        let range = starts[at]..starts[at + run.len()];
        at += run.len();
        let weight = f32::from(u8::from(run[0]));
        Mark { key: "content", range, weight, chosen: run[0] }
    });
    Ok(runs.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(json: &str, expect: Result<&[(&str, f32)], &str>) {
        let found = parse_messages(json);
        match expect {
            Ok(list) => {
                let found = found.unwrap();
                let found: Vec<(&str, f32)> =
                    found.iter().map(|m| (m.role.as_str(), m.weight)).collect();
                assert_eq!(found, list);
            }
            Err(text) => {
                let error = found.unwrap_err().to_string();
                assert!(error.contains(text), "{error}");
            }
        }
    }

    #[test]
    fn roles_and_weights() {
        check(r#"[{"role":"user","content":"a"}]"#, Ok(&[("user", 1.0)]));
        check(
            r#"[{"role":"a","train":false},{"role":"b","weight":0.5},{"role":"c","train":true}]"#,
            Ok(&[("a", 0.0), ("b", 0.5), ("c", 1.0)]),
        );
        check("[]", Ok(&[]));
    }

    #[test]
    fn faults_are_named() {
        check("{}", Err("not a JSON list"));
        check(r#"[{"content":"a"}]"#, Err("message 0 has no `role`"));
        check(r#"[{"role":"a","weight":-1}]"#, Err("`weight` -1"));
        check(r#"[{"role":"a","weight":"x"}]"#, Err("`weight` \"x\""));
    }

    /// Each text of the first message, its pieces as `[weight text]`, with `!` where the row chose them.
    fn check_marks(message: &str, expect: &str) {
        let found = parse_messages(&format!("[{message}]"));
        let found = match found {
            Ok(messages) => {
                let message = &messages[0];
                let keys = ["content", "reasoning_content"];
                let texts = keys.iter().filter_map(|key| Some((*key, message.value.get(*key)?)));
                let mut out = String::new();
                for (key, text) in texts {
                    let text = text.as_str().unwrap_or("(list)");
                    let mut last = None;
                    for (at, c) in text.char_indices() {
                        let said = message.weight_at(key, at);
                        if last != Some(said) {
                            out.push_str(&format!("|{}{}:", said.0, if said.1 { "!" } else { "" }));
                        }
                        last = Some(said);
                        out.push(c);
                    }
                    out.push('|');
                }
                out
            }
            Err(error) => error.to_string(),
        };
        assert_eq!(found, expect, "{message}");
    }

    #[test]
    fn pieces_have_weights() {
        let content = |parts: &str| format!(r#"{{"role":"a","weight":0.5,"content":[{parts}]}}"#);
        check_marks(&content(r#"{"type":"text","text":"ab"}"#), "|0.5:(list)|");
        check_marks(
            &content(r#"{"type":"text","text":"é ","train":false},{"text":"b","weight":0.5},"c""#),
            "|0:é |0.25:b|0.5:c|",
        );
        check_marks(
            &content(r#"{"type":"thinking","thinking":"t","train":true},{"text":"b"}"#),
            "|0.5:b||0.5!:t|",
        );
        check_marks(
            r#"{"role":"a","content":"b","reasoning_content":[{"text":"x","train":false},{"text":"y","loss_weight":2}]}"#,
            "|1:b||0:x|2:y|",
        );
        check_marks(r#"{"role":"a","content":"ab","training":true}"#, "|1!:ab|");
        check_marks(
            &content(r#"{"type":"image","train":true}"#),
            "message 0: a part of `content` is no text: {\"type\":\"image\",\"train\":true}",
        );
        check_marks(
            &content(r#"{"text":"b","weight":-1}"#),
            "message 0 has `weight` -1, which is neither true, false nor a number of at least 0",
        );
    }

    #[test]
    fn a_message_has_its_thought_in_one_place() {
        let message = |own: &str, part: &str| {
            format!(r#"{{"role":"a",{own},"content":[{part},{{"text":"b","weight":1}}]}}"#)
        };
        let thought = r#"{"type":"thinking","thinking":"t"}"#;
        let twice = |key: &str| {
            format!(
                "message 0 has a thought in `{key}` and others among the weighed parts of its `content`: \
                 keep it in one of them"
            )
        };
        let own = r#""reasoning_content":"mine""#;
        check_marks(&message(own, thought), &twice("reasoning_content"));
        check_marks(&message(r#""thinking":"mine""#, thought), &twice("thinking"));
        check_marks(&message(r#""reasoning_content":null"#, thought), "|1:b||1:t|");
        check_marks(&message(own, r#"{"text":"a","weight":1}"#), "|1:ab||1:mine|");
    }

    #[test]
    fn the_end_of_a_detail_is_its_last_character() {
        let detail = |entries: &str| {
            format!(r#"{{"role":"user","content":"héllo world","train_detail":{entries}}}"#)
        };
        check_marks(
            &detail(
                r#"[{"begin_offset":0,"end_offset":4,"train":false},{"begin_offset":5,"end_offset":6,"train":true}]"#,
            ),
            "|0:héllo|1!: w|0:orld|",
        );
        check_marks(&detail("[]"), "|0:héllo world|");
        check_marks(&detail("null"), "|1:héllo world|");
        let wrong = |entry: &str| {
            format!(
                "message 0 has `train_detail` {entry}, but its content has 11 characters, of which an entry names the \
                 first and the last from 0 on and says `train`: true or false"
            )
        };
        for entry in [
            r#"{"begin_offset":0,"end_offset":11,"train":true}"#,
            r#"{"begin_offset":3,"end_offset":2,"train":true}"#,
            r#"{"begin_offset":-1,"end_offset":2,"train":true}"#,
            r#"{"begin_offset":0,"end_offset":2,"train":1}"#,
        ] {
            check_marks(&detail(&format!("[{entry}]")), &wrong(entry));
        }
        check_marks(&detail("3"), &wrong("3"));
    }
}
