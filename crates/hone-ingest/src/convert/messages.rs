//! Messages of any of the usual writings, as one: `role` and `content`, every other key as it came.
//!
//! - Role names are mapped ([`ROLES`]); ShareGPT's `from` and `value` become `role` and `content`
//!   in their place.
//! - Content that is a list of parts becomes one text when all parts are text. Parts of reasoning
//!   become `reasoning_content`, parts that are tool calls become `tool_calls`, as does a ShareGPT
//!   message from `function_call`. Anything else (a picture) is refused.
//! - Weights on parts move to the message when each part has the same one under the same key and the
//!   message has none; else the content stays the list of its weighed texts, which the stages behind
//!   read as one text with weights.

use hone_schema::{Message, REASONING_KEYS, parse_messages};

use crate::fault::{Fault, Reason};
use crate::json::{Fields, Raw, Shape, canonical, quote};

/// Names of roles in data, and the role they mean.
const ROLES: [(&str, &[&str]); 5] = [
    ("system", &["system"]),
    ("developer", &["developer"]),
    ("user", &["user", "human", "prompter"]),
    (
        "assistant",
        &["assistant", "gpt", "chatgpt", "model", "bot", "ai", "function_call", "tool_call"],
    ),
    ("tool", &["tool", "observation", "function", "function_response", "tool_response", "ipython"]),
];

/// Roles whose content is a call.
const CALLS: [&str; 2] = ["function_call", "tool_call"];

/// Weights of a message or part, under the names of the ecosystem's tools.
const WEIGHTS: [&str; 6] = ["train", "training", "weight", "loss_weight", "loss_scale", "loss"];

/// Key of what the parts of a content think.
const THOUGHT: &str = "reasoning_content";

/// A message of a role and a text.
pub(super) fn plain(role: &str, content: &str) -> String {
    format!("{{\"role\":{},\"content\":{}}}", quote(role), quote(content))
}

/// The messages of a list (or of the text of a list), as JSON objects.
pub(super) fn list(key: &str, value: Raw) -> Result<Vec<String>, Fault> {
    let wrong = |found: &str| {
        Fault::new(Reason::WrongType, format!("`{key}` is {found}, not a list of messages"))
    };
    let inner = match value.text() {
        Some(text) => canonical(&text).map_err(|_| wrong("a text"))?,
        None => value.0.to_owned(),
    };
    let items = Raw(&inner).items().ok_or_else(|| wrong(Raw(&inner).shape().name()))?;
    items.into_iter().enumerate().map(|(idx, item)| message(idx, item)).collect()
}

/// One message; `idx` is for the message to people.
pub(super) fn message(idx: usize, value: Raw) -> Result<String, Fault> {
    let fields = value.fields().ok_or_else(|| {
        let detail = format!("message {idx} is {}, not an object", value.shape().name());
        Fault::new(Reason::WrongType, detail)
    })?;
    if let Some(key) = fields.repeated() {
        return Err(Fault::new(
            Reason::RepeatedKey,
            format!("message {idx}: `{key}` stands twice"),
        ));
    }
    let (role_key, said) = role(idx, &fields)?;
    let role = mapped(&said).ok_or_else(|| {
        let detail =
            format!("message {idx} is of `{said}`, not of system, user, assistant or tool");
        Fault::new(Reason::UnknownRole, detail)
    })?;
    let content_key = if fields.keys().any(|key| key == "content") { "content" } else { "value" };
    let content = Content::of(
        idx,
        &fields,
        content_key,
        CALLS.contains(&said.to_ascii_lowercase().as_str()),
    )?;
    let mut parts = Vec::new();
    for (key, value) in fields.iter() {
        if key == role_key {
            parts.push(format!("\"role\":{}", quote(role)));
        } else if key == content_key {
            parts.push(format!("\"content\":{}", content.json));
        } else if !(content.has_thought && key == THOUGHT) {
            parts.push(format!("{}:{}", quote(key), value.0));
        }
    }
    parts.extend(content.added);
    Ok(format!("{{{}}}", parts.join(",")))
}

fn role(idx: usize, fields: &Fields) -> Result<(&'static str, String), Fault> {
    let missing = || Fault::new(Reason::MissingField, format!("message {idx} has no `role`"));
    let key =
        ["role", "from"].into_iter().find(|key| fields.get(key).is_some()).ok_or_else(missing)?;
    let value = fields.get(key).ok_or_else(missing)?;
    let text = value.text().ok_or_else(|| {
        let detail = format!("message {idx}: `{key}` is {}, not a text", value.shape().name());
        Fault::new(Reason::WrongType, detail)
    })?;
    Ok((key, text))
}

fn mapped(said: &str) -> Option<&'static str> {
    let names = |names: &[&str]| names.iter().any(|name| name.eq_ignore_ascii_case(said));
    ROLES.iter().find(|(_, all)| names(all)).map(|(role, _)| *role)
}

/// What becomes of a message's content: its JSON, and entries that are added to the message.
struct Content {
    json: String,
    added: Vec<String>,
    /// Whether what its parts think is among what is added; a null that stands for it goes.
    has_thought: bool,
}

impl Content {
    fn new(json: impl Into<String>, added: Vec<String>) -> Self {
        Content { json: json.into(), added, has_thought: false }
    }
}

impl Content {
    fn of(idx: usize, fields: &Fields, key: &str, is_call: bool) -> Result<Self, Fault> {
        let has_calls = fields.get("tool_calls").is_some() || fields.get("function_call").is_some();
        let Some((_, value)) = fields.iter().find(|(name, _)| *name == key) else {
            // A call needs no content; none is invented.
            return if has_calls {
                Ok(Content::new("", Vec::new()))
            } else {
                Err(Fault::new(Reason::MissingField, format!("message {idx} has no `content`")))
            };
        };
        match value.shape() {
            Shape::String if is_call => {
                let calls = calls(idx, &value.text().unwrap_or_default())?;
                let added = vec![format!("\"tool_calls\":[{}]", calls.join(","))];
                Ok(Content::new("\"\"", added))
            }
            Shape::String => Ok(Content::new(value.0, Vec::new())),
            Shape::Null if has_calls => Ok(Content::new("null", Vec::new())),
            Shape::List => Parts::of(idx, value)?.content(idx, fields),
            other => {
                let detail = format!("message {idx}: the content is {}, not a text", other.name());
                Err(Fault::new(Reason::WrongType, detail))
            }
        }
    }
}

/// A content of parts, taken apart.
#[derive(Default)]
struct Parts {
    text: String,
    reasoning: String,
    calls: Vec<String>,
    /// Of each part that has weights, under which keys.
    weights: Vec<Vec<(&'static str, String)>>,
    /// Whether a call has a weight, which a list of texts cannot hold.
    has_weighed_call: bool,
    /// The parts that are text, as JSON.
    texts: Vec<String>,
    n_parts: usize,
}

impl Parts {
    fn of(idx: usize, value: Raw) -> Result<Self, Fault> {
        let mut parts = Parts::default();
        for item in value.items().unwrap_or_default() {
            parts.n_parts += 1;
            match item.fields() {
                Some(fields) => parts.add(idx, item, &fields)?,
                None => {
                    let text = item.text().ok_or_else(|| not_text(idx, item.shape().name()))?;
                    parts.text.push_str(&text);
                    parts.texts.push(item.0.to_owned());
                }
            }
        }
        Ok(parts)
    }

    fn add(&mut self, idx: usize, part: Raw, fields: &Fields) -> Result<(), Fault> {
        let kind = fields.get("type").and_then(Raw::text).unwrap_or_default();
        let keys = ["text", "value", "content", "thinking", "reasoning"];
        let text = keys.iter().find_map(|key| fields.get(key)).and_then(Raw::text);
        let weights = WEIGHTS.into_iter();
        let weights = weights.filter_map(|key| Some((key, fields.get(key)?.0.to_owned())));
        let weights: Vec<_> = weights.collect();
        let is_weighed = !weights.is_empty();
        self.weights.extend(is_weighed.then_some(weights));
        match (kind.as_str(), text) {
            ("text" | "output_text" | "input_text", Some(text)) => {
                self.text.push_str(&text);
                self.texts.push(part.0.to_owned());
            }
            ("reasoning" | "thinking", Some(text)) => {
                self.reasoning.push_str(&text);
                self.texts.push(part.0.to_owned());
            }
            ("tool_call", Some(text)) => {
                self.calls.extend(calls(idx, &text)?);
                self.has_weighed_call |= is_weighed;
            }
            (kind, _) => return Err(not_text(idx, &format!("a part of type `{kind}`"))),
        }
        Ok(())
    }

    /// The weight that all parts have, where each has one under the same key.
    fn weight(&self) -> Option<String> {
        let first = self.weights.first()?;
        let is_same = self.weights.len() == self.n_parts && self.weights.iter().all(|w| w == first);
        match first.as_slice() {
            [(key, value)] if is_same => Some(format!("{}:{value}", quote(key))),
            _ => None,
        }
    }

    fn content(self, idx: usize, fields: &Fields) -> Result<Content, Fault> {
        let said = |key: &&str| fields.get(key).is_some_and(|own| own.shape() != Shape::Null);
        let mut content = Content::new(quote(&self.text), Vec::new());
        let own_weight = WEIGHTS.iter().any(|key| fields.get(key).is_some());
        match self.weight() {
            Some(weight) if !own_weight => content.added.push(weight),
            _ if self.weights.is_empty() => {}
            _ if self.has_weighed_call => {
                let detail =
                    format!("message {idx}: a call has another weight than what is beside it");
                return Err(Fault::new(Reason::ToolCall, detail));
            }
            _ => content.json = format!("[{}]", self.texts.join(",")),
        }
        if !self.reasoning.is_empty() {
            if let Some(key) = REASONING_KEYS.into_iter().find(said) {
                let detail = format!("message {idx} thinks in its content and in `{key}`");
                return Err(Fault::new(Reason::TwoThoughts, detail));
            }
            // A list that stays holds its thoughts itself.
            if !content.json.starts_with('[') {
                content.added.push(format!("\"{THOUGHT}\":{}", quote(&self.reasoning)));
                content.has_thought = true;
            }
        }
        if !self.calls.is_empty() {
            if fields.get("tool_calls").is_some() {
                let detail = format!("message {idx} has calls in its content and in `tool_calls`");
                return Err(Fault::new(Reason::ToolCall, detail));
            }
            content.added.push(format!("\"tool_calls\":[{}]", self.calls.join(",")));
        }
        Ok(content)
    }
}

fn not_text(idx: usize, found: &str) -> Fault {
    Fault::new(Reason::NotText, format!("message {idx} holds {found}, not text"))
}

/// Calls written as the JSON text of `{"name", "arguments"}` or of a list of such, in the form
/// templates know.
fn calls(idx: usize, text: &str) -> Result<Vec<String>, Fault> {
    let wrong = || {
        let detail =
            format!("message {idx}: a call is not `{{\"name\": .., \"arguments\": ..}}` as JSON");
        Fault::new(Reason::ToolCall, detail)
    };
    let json = canonical(text).map_err(|_| wrong())?;
    let items = match Raw(&json).shape() {
        Shape::List => Raw(&json).items().unwrap_or_default(),
        _ => vec![Raw(&json)],
    };
    let one = |item: Raw| {
        let is_call = item.fields().is_some_and(|f| f.get("name").and_then(Raw::text).is_some());
        is_call
            .then(|| format!("{{\"type\":\"function\",\"function\":{}}}", item.0))
            .ok_or_else(wrong)
    };
    if items.is_empty() {
        return Err(wrong());
    }
    items.into_iter().map(one).collect()
}

/// The messages as the stages behind will read them.
pub(super) fn readable(list: &[String]) -> Result<Vec<Message>, Fault> {
    parse_messages(&format!("[{}]", list.join(",")))
        .map_err(|e| Fault::new(Reason::WrongType, e.to_string()))
}

/// Whether a conversation can be learned from: it has messages, a response, and no trained response
/// is empty.
pub(super) fn check(list: &[String]) -> Result<(), Fault> {
    if list.is_empty() {
        return Err(Fault::new(Reason::EmptyConversation, "there are no messages"));
    }
    let messages = readable(list)?;
    let mut responses =
        messages.iter().enumerate().filter(|(_, m)| m.role == "assistant").peekable();
    if responses.peek().is_none() {
        return Err(Fault::new(Reason::NoResponse, "no message is of the assistant"));
    }
    for (idx, message) in responses {
        let has_call = ["tool_calls", "function_call"].iter().any(|key| {
            message.value.get(*key).is_some_and(|calls| {
                !calls.is_null() && calls.as_array().is_none_or(|c| !c.is_empty())
            })
        });
        let is_empty = message.text().is_none_or(|text| text.trim().is_empty());
        if is_empty && !has_call && message.weight > 0.0 {
            return Err(Fault::new(Reason::EmptyResponse, format!("message {idx} is empty")));
        }
    }
    Ok(())
}
