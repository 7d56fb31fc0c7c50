//! Whether an answer is right.

use serde_json::{Map, Value};

/// What an answer is worth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Score {
    /// It is the reference, blanks at both ends aside, and it ended by itself.
    pub(crate) is_exact: bool,
    /// It ended by itself.
    pub(crate) is_stopped: bool,
    /// How it fares as JSON, where JSON was asked for.
    pub(crate) json: Option<JsonScore>,
}

/// What an answer is worth as a JSON object.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct JsonScore {
    /// It is one JSON object with exactly the reference's keys in their order, and nothing else.
    pub(crate) is_valid: bool,
    /// Keys of the reference whose value is the same; of an answer that is no JSON object, none.
    pub(crate) n_right: u64,
    /// Keys of the reference.
    pub(crate) n_fields: u64,
}

/// Scores an answer.
pub(crate) fn score(text: &str, is_stopped: bool, reference: &str, is_json: bool) -> Score {
    let is_exact = is_stopped && text.trim() == reference.trim();
    let json = if is_json { json_score(text, reference) } else { None };
    Score { is_exact, is_stopped, json }
}

/// `None` when the reference itself is no JSON object.
fn json_score(text: &str, reference: &str) -> Option<JsonScore> {
    let reference = object(reference)?;
    let n_fields = reference.len() as u64;
    let Some(found) = object(text) else {
        return Some(JsonScore { is_valid: false, n_right: 0, n_fields });
    };
    let n_right = reference.iter().filter(|(key, value)| found.get(*key) == Some(value)).count();
    let is_valid = found.keys().eq(reference.keys());
    Some(JsonScore { is_valid, n_right: n_right as u64, n_fields })
}

fn object(text: &str) -> Option<Map<String, Value>> {
    serde_json::from_str(text.trim()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, reference: &str, is_valid: bool, n_right: u64) {
        let found = json_score(text, reference).unwrap();
        assert_eq!((found.is_valid, found.n_right), (is_valid, n_right), "{text}");
    }

    #[test]
    fn an_answer_is_exact_when_it_is_the_reference_and_ends() {
        let exact = |text, stopped| score(text, stopped, "Paris.", false).is_exact;
        assert!(exact("Paris.", true));
        assert!(exact(" Paris.\n", true));
        assert!(!exact("Paris.", false));
        assert!(!exact("Paris", true));
        assert!(!exact("Paris. And", true));
    }

    #[test]
    fn json_has_the_keys_asked_for_in_their_order() {
        let reference = r#"{"a": "x", "b": 2}"#;
        check(r#"{"a": "x", "b": 2}"#, reference, true, 2);
        check(r#" {"a":"x","b":3} "#, reference, true, 1);
        check(r#"{"b": 2, "a": "x"}"#, reference, false, 2);
        check(r#"{"a": "x", "b": 2, "c": 1}"#, reference, false, 2);
        check(r#"{"a": "x"}"#, reference, false, 1);
        check(r#"{"a": "x", "b": "2"}"#, reference, true, 1);
        check(r#"{"a": "x", "b": 2} done"#, reference, false, 0);
        check(r#"Sure: {"a": "x", "b": 2}"#, reference, false, 0);
        check(r#"[1]"#, reference, false, 0);
        assert_eq!(json_score("{}", "no json"), None);
    }
}
