//! Rows as JSON text: one canonical text a value, and an ordered view of objects that borrows from
//! it.
//!
//! Nothing here builds a tree. [`canonical`] checks a row and writes it again without white space
//! and with one spelling of each string, but leaves the order of keys and the digits of numbers as
//! they came; [`Fields`] and [`Raw`] then hand out slices of that text. So a tool call's `1e2` or a
//! key that no other row has comes out as it went in.

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::fault::{Fault, Reason};

/// Deepest nesting of a row. The stages behind parse with `serde_json`, whose own limit is 128;
/// messages add a few levels.
pub(crate) const DEPTH_MAX: usize = 100;

/// The row's text without white space between tokens, its strings in their shortest spelling.
///
/// # Errors Text that is not one JSON value, escapes that are no character, numbers beyond f64,
/// nesting beyond [`DEPTH_MAX`].
pub(crate) fn canonical(text: &str) -> Result<String, Fault> {
    let whole: &RawValue =
        serde_json::from_str(text).map_err(|e| Fault::new(Reason::NotJson, place(&e)))?;
    let text = whole.get();
    let bytes = text.as_bytes();
    let mut out = String::with_capacity(text.len());
    let (mut at, mut depth) = (0, 0usize);
    while at < bytes.len() {
        let end = match bytes[at] {
            b' ' | b'\t' | b'\r' | b'\n' => {
                at += 1;
                continue;
            }
            b'"' => {
                let end = string_end(bytes, at);
                push_string(&text[at..end], &mut out)?;
                at = end;
                continue;
            }
            b'{' | b'[' => {
                depth += 1;
                if depth > DEPTH_MAX {
                    let detail = format!("more than {DEPTH_MAX} levels of lists and objects");
                    return Err(Fault::new(Reason::TooDeep, detail));
                }
                at + 1
            }
            b'}' | b']' => {
                depth = depth.saturating_sub(1);
                at + 1
            }
            b'-' | b'0'..=b'9' => number_end(text, at)?,
            _ => at + 1,
        };
        out.push_str(&text[at..end]);
        at = end;
    }
    Ok(out)
}

/// What an error of the parser is, without its place.
fn what(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.split_once(" at line ").map_or(text.clone(), |(what, _)| what.to_owned())
}

/// What an error of the parser is, and where in the row: the line in the file is said elsewhere.
fn place(error: &serde_json::Error) -> String {
    match error.line() {
        0 | 1 => format!("{}, column {}", what(error), error.column()),
        n => format!("{}, column {} of its line {n}", what(error), error.column()),
    }
}

/// Behind the closing quote of the string that opens at `at`; the text was checked before.
fn string_end(bytes: &[u8], at: usize) -> usize {
    let mut end = at + 1;
    while end < bytes.len() && bytes[end] != b'"' {
        end += if bytes[end] == b'\\' { 2 } else { 1 };
    }
    (end + 1).min(bytes.len())
}

fn push_string(quoted: &str, out: &mut String) -> Result<(), Fault> {
    if quoted.contains('\\') {
        let decoded: String =
            serde_json::from_str(quoted).map_err(|e| Fault::new(Reason::NotJson, what(&e)))?;
        out.push_str(&quote(&decoded));
    } else {
        out.push_str(quoted);
    }
    Ok(())
}

fn number_end(text: &str, at: usize) -> Result<usize, Fault> {
    let is_number = |b: &u8| matches!(b, b'-' | b'+' | b'.' | b'e' | b'E' | b'0'..=b'9');
    let len = text.as_bytes()[at..].iter().take_while(|b| is_number(b)).count();
    let number = &text[at..at + len];
    match number.parse::<f64>() {
        Ok(value) if value.is_finite() => Ok(at + len),
        _ => Err(Fault::new(Reason::NotJson, format!("the number {number} is out of range"))),
    }
}

/// A text as a JSON string.
pub(crate) fn quote(text: &str) -> String {
    serde_json::to_string(text).expect("a string is always JSON")
}

/// What kind of value a [`Raw`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    Null,
    Bool,
    Number,
    String,
    List,
    Object,
}

impl Shape {
    /// With its article, for messages.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Shape::Null => "null",
            Shape::Bool => "true or false",
            Shape::Number => "a number",
            Shape::String => "a text",
            Shape::List => "a list",
            Shape::Object => "an object",
        }
    }
}

/// A value inside a canonical text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Raw<'a>(pub(crate) &'a str);

impl<'a> Raw<'a> {
    pub(crate) fn shape(self) -> Shape {
        match self.0.as_bytes().first() {
            Some(b'"') => Shape::String,
            Some(b'[') => Shape::List,
            Some(b'{') => Shape::Object,
            Some(b't' | b'f') => Shape::Bool,
            Some(b'n') | None => Shape::Null,
            Some(_) => Shape::Number,
        }
    }

    /// The text of a string.
    pub(crate) fn text(self) -> Option<String> {
        serde_json::from_str(self.0).ok()
    }

    /// The number, when it is one.
    pub(crate) fn number(self) -> Option<f64> {
        (self.shape() == Shape::Number).then(|| self.0.parse().ok()).flatten()
    }

    /// The values of a list.
    pub(crate) fn items(self) -> Option<Vec<Raw<'a>>> {
        let items: Vec<&'a RawValue> = serde_json::from_str(self.0).ok()?;
        Some(items.into_iter().map(|item| Raw(item.get())).collect())
    }

    /// The entries of an object.
    pub(crate) fn fields(self) -> Option<Fields<'a>> {
        serde_json::from_str(self.0).ok()
    }
}

/// The entries of an object in their order; [`Fields::take`] marks what was used, the rest is what
/// nobody asked for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fields<'a> {
    entries: Vec<(String, Raw<'a>)>,
    used: Vec<bool>,
}

impl<'de: 'a, 'a> Deserialize<'de> for Fields<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Vec<(String, Raw<'de>)>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some((key, value)) = map.next_entry::<String, &'de RawValue>()? {
                    entries.push((key, Raw(value.get())));
                }
                Ok(entries)
            }
        }
        let entries = deserializer.deserialize_map(Entries)?;
        let used = vec![false; entries.len()];
        Ok(Fields { entries, used })
    }
}

impl<'a> Fields<'a> {
    /// A key that stands twice, if there is one: which of its values is meant nobody can know.
    pub(crate) fn repeated(&self) -> Option<&str> {
        let mut keys: Vec<&str> = self.keys().collect();
        keys.sort_unstable();
        keys.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0])
    }

    pub(crate) fn keys(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|(key, _)| key.as_str())
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, Raw<'a>)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), *value))
    }

    /// The value of `key`, unless it is null or not there.
    pub(crate) fn get(&self, key: &str) -> Option<Raw<'a>> {
        let (_, value) = self.entries.iter().find(|(name, _)| name == key)?;
        (value.shape() != Shape::Null).then_some(*value)
    }

    /// [`Fields::get`], and the entry counts as used.
    pub(crate) fn take(&mut self, key: &str) -> Option<Raw<'a>> {
        let idx = self.entries.iter().position(|(name, _)| name == key)?;
        self.used[idx] = true;
        let value = self.entries[idx].1;
        (value.shape() != Shape::Null).then_some(value)
    }

    /// The first of several names that holds a value, and the value.
    pub(crate) fn take_any(&mut self, keys: &[&'static str]) -> Option<(&'static str, Raw<'a>)> {
        let key = keys.iter().find(|key| self.get(key).is_some())?;
        self.take(key).map(|value| (*key, value))
    }

    /// The entries nobody took, as an object; nothing when there are none.
    pub(crate) fn rest(&self) -> Option<String> {
        let entries = self.entries.iter().zip(&self.used).filter(|(_, used)| !**used);
        let parts: Vec<String> =
            entries.map(|((key, value), _)| format!("{}:{}", quote(key), value.0)).collect();
        (!parts.is_empty()).then(|| format!("{{{}}}", parts.join(",")))
    }

    /// Gives columns other names.
    pub(crate) fn rename(&mut self, names: &std::collections::BTreeMap<String, String>) {
        for (key, _) in &mut self.entries {
            if let Some(name) = names.get(key) {
                key.clone_from(name);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expect: Result<&str, Reason>) {
        match (canonical(text), expect) {
            (Ok(found), Ok(expect)) => assert_eq!(found, expect, "{text}"),
            (Err(fault), Err(reason)) => assert_eq!(fault.reason, reason, "{text}: {fault:?}"),
            (found, expect) => panic!("{text}: {found:?}, expected {expect:?}"),
        }
    }

    #[test]
    fn one_spelling_of_text_and_no_other_change() {
        check(
            r#" { "b" : 1.0 , "a" : [ 1e2, -0, 12345678901234567890123 ] } "#,
            Ok(r#"{"b":1.0,"a":[1e2,-0,12345678901234567890123]}"#),
        );
        check(r#"{"a":"\u00e9\/ \n\\"}"#, Ok("{\"a\":\"é/ \\n\\\\\"}"));
        check(r#"{"a b":" c  d "}"#, Ok(r#"{"a b":" c  d "}"#));
        check(r#"{"a":"\ud83d\ude00"}"#, Ok("{\"a\":\"😀\"}"));
        check("[true,false,null]", Ok("[true,false,null]"));
        check(r#"{"a":null,"a":1}"#, Ok(r#"{"a":null,"a":1}"#));
    }

    #[test]
    fn what_is_not_json() {
        for text in [
            "",
            "{",
            "{}{}",
            "{} x",
            "{'a':1}",
            "{\"a\":NaN}",
            "{\"a\":Infinity}",
            "{\"a\":1e400}",
            "{\"a\":\"\\ud800\"}",
            "{\"a\":\"\\udc00 x\"}",
            "{\"a\":\"\u{0}\"}",
            "{\"a\":01}",
            "{,}",
            "[1,]",
        ] {
            check(text, Err(Reason::NotJson));
        }
    }

    #[test]
    fn depth_is_bounded_and_costs_no_stack() {
        let nested = |n: usize| format!("{}{}", "[".repeat(n), "]".repeat(n));
        check(&nested(DEPTH_MAX), Ok(&nested(DEPTH_MAX)));
        check(&nested(DEPTH_MAX + 1), Err(Reason::TooDeep));
        check(&nested(100_000), Err(Reason::TooDeep));
    }

    #[test]
    fn fields_are_taken_once_and_the_rest_stays_in_order() {
        let mut fields = Raw(r#"{"z":1,"a":null,"m":[{"k":2}],"b":"x"}"#).fields().unwrap();
        assert_eq!(fields.take("b").and_then(Raw::text).as_deref(), Some("x"));
        assert_eq!(fields.take("a"), None);
        assert_eq!(fields.rest().as_deref(), Some(r#"{"z":1,"m":[{"k":2}]}"#));
        assert_eq!(Raw(r#"{"a":1,"b":2,"a":3}"#).fields().unwrap().repeated(), Some("a"));
        assert!(Raw("[1]").fields().is_none());
    }
}
