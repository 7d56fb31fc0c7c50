//! Messages as canonical JSON bytes.
//!
//! A conversation keeps its messages as the JSON text it came with: never as a struct of columns, which would invent a null
//! for every key that another row has. [`parse_messages`] gives the view that stages need; keys it does not know stay in
//! [`Message::value`] for the chat template.

use serde_json::{Map, Value};

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// `system`, `user`, `assistant`, `tool` or what the row says.
    pub role: String,
    /// Whether this message may be trained: the row's `train` (or `weight`, `loss`) said otherwise than 0; 1 when it said nothing.
    pub weight: f32,
    /// Everything the row said, `role` and `content` included, for the template.
    pub value: Map<String, Value>,
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
}

impl Message {
    /// The content when it is a text.
    pub fn text(&self) -> Option<&str> {
        self.value.get("content").and_then(Value::as_str)
    }
}

/// Keys of a message that say whether it is trained, under the names of the ecosystem's tools.
const WEIGHT_KEYS: [&str; 5] = ["train", "weight", "loss", "loss_scale", "loss_weight"];

/// Reads the JSON list of a row.
///
/// # Errors
/// See [`MessageError`].
pub fn parse_messages(json: &str) -> Result<Vec<Message>, MessageError> {
    let items: Vec<Map<String, Value>> =
        serde_json::from_str(json).map_err(|e| MessageError::Form(e.to_string()))?;
    items.into_iter().enumerate().map(|(index, value)| message(index, value)).collect()
}

fn message(index: usize, value: Map<String, Value>) -> Result<Message, MessageError> {
    let role = value.get("role").and_then(Value::as_str).ok_or(MessageError::NoRole { index })?;
    let mut weight = 1.0;
    for key in WEIGHT_KEYS {
        weight *= match value.get(key) {
            None | Some(Value::Null) => 1.0,
            Some(Value::Bool(train)) => f32::from(u8::from(*train)),
            Some(other) => other
                .as_f64()
                .filter(|w| w.is_finite() && *w >= 0.0)
                .map(|w| w as f32)
                .ok_or_else(|| MessageError::Weight { index, key, found: other.to_string() })?,
        };
    }
    Ok(Message { role: role.to_owned(), weight, value })
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
}
