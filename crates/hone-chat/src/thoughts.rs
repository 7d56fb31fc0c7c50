//! What a message thinks, under every name that templates read it by.
//!
//! Templates do not agree on the name: most read `reasoning_content`, those of gpt-oss `thinking`.
//! Transformers gives a thought under both, and a template would otherwise leave out without a word
//! what a row says under the other one. Messages are masked first (module `words`) and given their
//! names then, so that a thought is one text to find, whichever of them the template writes, and
//! has the weights that the row gave it.

use std::borrow::Cow;

use serde_json::{Map, Value};

/// Names of a thought; the first that is not null is what the others are copies of.
const NAMES: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// A message as templates are given it, with keys in the order that Python gives them:
/// `{"thinking": thought, **message, "reasoning_content": thought}`.
pub(crate) fn under_all_names(message: Cow<'_, Map<String, Value>>) -> Cow<'_, Map<String, Value>> {
    let said = |name: &&str| message.get(*name).filter(|value| !value.is_null());
    let Some(thought) = NAMES.iter().find_map(said).cloned() else {
        return message;
    };
    let mut message = message.into_owned();
    // A key keeps its place when its value changes, but for `thinking`, which is always first.
    let thinking = message.shift_remove("thinking").unwrap_or_else(|| thought.clone());
    message.shift_insert(0, "thinking".to_owned(), thinking);
    message.insert("reasoning_content".to_owned(), thought);
    Cow::Owned(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(message: &str, expect: &str) {
        let message = Cow::Owned(serde_json::from_str(message).expect("an object"));
        let found = Value::Object(under_all_names(message).into_owned()).to_string();
        assert_eq!(found, expect);
    }

    #[test]
    fn names_and_their_order_are_those_of_transformers() {
        check(r#"{"role":"a","content":"b"}"#, r#"{"role":"a","content":"b"}"#);
        check(r#"{"role":"a","thinking":null}"#, r#"{"role":"a","thinking":null}"#);
        check(
            r#"{"role":"a","reasoning_content":"t","content":"b"}"#,
            r#"{"thinking":"t","role":"a","reasoning_content":"t","content":"b"}"#,
        );
        check(
            r#"{"role":"a","thinking":"t","content":"b"}"#,
            r#"{"thinking":"t","role":"a","content":"b","reasoning_content":"t"}"#,
        );
        check(
            r#"{"role":"a","reasoning":"t"}"#,
            r#"{"thinking":"t","role":"a","reasoning":"t","reasoning_content":"t"}"#,
        );
        check(
            r#"{"role":"a","reasoning_content":null,"thinking":"","reasoning":"t"}"#,
            r#"{"thinking":"","role":"a","reasoning_content":"","reasoning":"t"}"#,
        );
        // What a row says under `thinking`, even nothing, stays.
        check(
            r#"{"reasoning_content":"t","thinking":null}"#,
            r#"{"thinking":null,"reasoning_content":"t"}"#,
        );
        check(
            r#"{"reasoning_content":"t","thinking":"u"}"#,
            r#"{"thinking":"u","reasoning_content":"t"}"#,
        );
    }
}
