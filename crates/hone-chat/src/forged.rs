//! Control tokens that a template would put together from names that a row chose.
//!
//! What messages say is told from what the template writes; names are not: the template looks keys,
//! roles and types up, and compares the texts of variables. Module `names` refuses a name that holds
//! a control token. But a template that writes `'<' ~ key ~ '>'` makes one of the key `|im_end|`,
//! and one that trims names or replaces blanks in them makes one of what is no piece of it.
//!
//! So a row with names that the template does not know is rendered once more with each of them
//! replaced by characters that nothing else holds. A control token that is in the one text more
//! often than in the other was made of a name. Known are the usual roles, and what the template
//! looks up by attribute or text: in a message, and of the words of JSON schemas in tools and calls.
//! Keys of arguments and of properties are the row's, whatever they are.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};

use aho_corasick::{AhoCorasick, MatchKind};
use hone_schema::REASONING_KEYS;
use serde_json::{Map, Value};

use crate::locate::around;
use crate::symbols::Free;
use crate::template::{ChatTemplate, Given, TemplateError, values};
use crate::words;

/// Roles of which templates make markers, `<|user|>`.
const ROLES: [&str; 9] = [
    "system",
    "developer",
    "user",
    "assistant",
    "tool",
    "function",
    "ipython",
    "observation",
    "model",
];

/// What tools, their schemas and calls of them are described with.
const SCHEMA: [&str; 26] = [
    "$defs",
    "$ref",
    "additionalProperties",
    "allOf",
    "anyOf",
    "arguments",
    "const",
    "default",
    "description",
    "enum",
    "examples",
    "format",
    "function",
    "id",
    "items",
    "name",
    "nullable",
    "oneOf",
    "parameters",
    "properties",
    "required",
    "response",
    "return",
    "strict",
    "title",
    "type",
];

/// Keys of the maps whose keys are the row's own.
const OPEN: [&str; 3] = ["arguments", "properties", "$defs"];

/// Longest piece of a token that is looked for, in bytes.
const PIECE_BYTES_MAX: usize = 64;

/// Stands between the tokens in [`Control::list`], and in none of them.
const BETWEEN: char = '\0';

/// The control tokens of a dialect, to find them in texts.
#[derive(Debug)]
pub(crate) struct Control {
    tokens: Vec<String>,
    search: AhoCorasick,
    /// All of them, each with [`BETWEEN`] on both sides.
    list: String,
}

impl Control {
    /// # Errors
    /// They are too long together to be searched for.
    pub(crate) fn new<'a>(tokens: impl Iterator<Item = &'a String>) -> Result<Self, TemplateError> {
        let tokens: Vec<String> = tokens.filter(|token| !token.is_empty()).cloned().collect();
        let mut search = AhoCorasick::builder();
        let search = search.match_kind(MatchKind::LeftmostLongest).build(&tokens);
        let search = search.map_err(|_| TemplateError::Limit("control tokens"))?;
        let list = tokens.iter().flat_map(|token| [token, "\0"]).collect::<String>();
        Ok(Control { tokens, search, list: format!("{BETWEEN}{list}") })
    }

    /// A control token that a text holds.
    pub(crate) fn find(&self, text: &str) -> Option<&str> {
        self.search.find(text).map(|found| self.tokens[found.pattern()].as_str())
    }

    /// How often each control token is in a text.
    fn counts(&self, text: &str) -> BTreeMap<&str, usize> {
        let mut counts = BTreeMap::new();
        for found in self.search.find_iter(text) {
            *counts.entry(self.tokens[found.pattern()].as_str()).or_insert(0) += 1;
        }
        counts
    }

    /// Whether a text holds a token, could be a piece of one, begins with the end of one, or ends
    /// with the beginning of one.
    pub(crate) fn has_piece(&self, text: &str) -> bool {
        let lens = 1..=text.len().min(PIECE_BYTES_MAX);
        let begins = |len: usize| {
            let end = text.get(text.len() - len..);
            end.is_some_and(|end| self.list.contains(&format!("{BETWEEN}{end}")))
        };
        let ends = |len: usize| {
            let start = text.get(..len);
            start.is_some_and(|start| self.list.contains(&format!("{start}{BETWEEN}")))
        };
        let is_inside = || (1..=PIECE_BYTES_MAX).contains(&text.len()) && self.list.contains(text);
        self.find(text).is_some()
            || is_inside()
            || lens.clone().any(begins)
            || lens.clone().any(ends)
    }
}

impl ChatTemplate {
    /// Refuses a conversation in whose text a name of the row's makes a control token.
    pub(crate) fn check_made(
        &self,
        messages: &[&Map<String, Value>],
        given: &Given,
        text: &str,
        reserved: &HashSet<char>,
    ) -> Result<(), TemplateError> {
        if self.is_plain(messages, given) {
            return Ok(());
        }
        let free = Free::new(reserved);
        let mut names = Names { template: self, free, found: BTreeMap::new(), is_full: false };
        let renamed: Vec<_> =
            messages.iter().map(|message| Cow::Owned(names.message(message))).collect();
        let tools = given.tools.map(|tools| names.schema(tools));
        let documents = given.documents.map(|documents| names.known(documents));
        let variables = given.variables.map(|variables| names.variables(variables));
        if names.is_full {
            return Err(TemplateError::Limit("names"));
        }
        if names.found.is_empty() {
            return Ok(());
        }
        let given = Given {
            tools: tools.as_ref(),
            documents: documents.as_ref(),
            variables: variables.as_ref(),
        };
        let expect = self.control.counts(text);
        let marked = self.render_values(values(renamed.into_iter()), &given, false, None);
        let marked = marked.map_err(|error| TemplateError::Provenance {
            why: "the template does not take the row with other names in it",
            plain: names.found.keys().cloned().collect::<Vec<_>>().join(", "),
            marked: error.to_string(),
        })?;
        let found = self.control.counts(&marked);
        let differs = |token: &&str| expect.get(*token) != found.get(*token);
        match expect.keys().chain(found.keys()).copied().find(|token| differs(token)) {
            None => Ok(()),
            Some(token) => Err(TemplateError::Forged {
                message: "of the row".to_owned(),
                what: "one of the names",
                found: around(&names.found.keys().cloned().collect::<Vec<_>>().join(", "), 0),
                token: token.to_owned(),
            }),
        }
    }
}

impl ChatTemplate {
    /// Whether a conversation is nothing but texts under keys that the template knows, by the usual
    /// roles: most are.
    fn is_plain(&self, messages: &[&Map<String, Value>], given: &Given) -> bool {
        let is_plain = |(key, value): (&String, &Value)| match value {
            Value::String(role) if key == "role" => ROLES.contains(&role.as_str()),
            Value::String(_) => key != "type" && self.own_names.contains(key),
            _ => false,
        };
        given.tools.is_none()
            && given.documents.is_none()
            && given.variables.is_none_or(Map::is_empty)
            && messages.iter().all(|message| message.iter().all(is_plain))
    }
}

/// The names of a row that the template does not know, and what each is replaced with.
struct Names<'a> {
    template: &'a ChatTemplate,
    free: Free<'a>,
    found: BTreeMap<String, char>,
    /// There were more names than characters for them.
    is_full: bool,
}

impl Names<'_> {
    /// What stands for a name that is not known.
    fn other(&mut self, name: &str) -> String {
        let symbol = match self.found.get(name) {
            Some(symbol) => *symbol,
            None => {
                let symbol = self.free.next();
                self.is_full |= symbol.is_none();
                *self.found.entry(name.to_owned()).or_insert(symbol.unwrap_or(BETWEEN))
            }
        };
        std::iter::repeat_n(symbol, name.chars().count()).collect()
    }

    fn is_known(&self, name: &str) -> bool {
        self.template.own_names.contains(name)
    }

    /// A message: the keys that the template looks up are its own, and those of thoughts.
    fn message(&mut self, message: &Map<String, Value>) -> Map<String, Value> {
        let mut renamed = Map::with_capacity(message.len());
        for (key, value) in message {
            let is_known = self.is_known(key) || REASONING_KEYS.contains(&key.as_str());
            let value = match key.as_str() {
                "role" => self.kept(value, true),
                "tool_calls" | "function_call" | "tools" => self.schema(value),
                _ if words::is_name(key, message) => self.kept(value, false),
                _ => self.known(value),
            };
            renamed.insert(if is_known { key.clone() } else { self.other(key) }, value);
        }
        renamed
    }

    /// A value in which the keys that the template looks up are its own.
    fn known(&mut self, value: &Value) -> Value {
        match value {
            Value::Array(items) => items.iter().map(|item| self.known(item)).collect(),
            Value::Object(map) => Value::Object(self.message(map)),
            other => other.clone(),
        }
    }

    /// Tools, or calls of them.
    fn schema(&mut self, value: &Value) -> Value {
        match value {
            Value::Array(items) => items.iter().map(|item| self.schema(item)).collect(),
            Value::Object(map) => Value::Object(self.described(map)),
            other => other.clone(),
        }
    }

    fn described(&mut self, map: &Map<String, Value>) -> Map<String, Value> {
        let mut renamed = Map::with_capacity(map.len());
        for (key, value) in map {
            let is_known = SCHEMA.contains(&key.as_str());
            let value = match value {
                Value::Object(inner) if OPEN.contains(&key.as_str()) => {
                    let own =
                        |(key, value): (&String, &Value)| (self.other(key), self.schema(value));
                    Value::Object(inner.iter().map(own).collect())
                }
                // What is required are keys of `properties`, which are all replaced.
                _ if key == "required" && words::is_name(key, map) => self.all(value),
                _ if words::is_name(key, map) => self.kept(value, key == "role"),
                _ => self.schema(value),
            };
            renamed.insert(if is_known { key.clone() } else { self.other(key) }, value);
        }
        renamed
    }

    /// Every text of a list.
    fn all(&mut self, value: &Value) -> Value {
        match value {
            Value::String(text) => Value::String(self.other(text)),
            Value::Array(items) => items.iter().map(|item| self.all(item)).collect(),
            other => other.clone(),
        }
    }

    /// Texts that are names: roles and types.
    fn kept(&mut self, value: &Value, is_role: bool) -> Value {
        match value {
            Value::String(text) => {
                let is_known = self.is_known(text)
                    || (is_role && ROLES.contains(&text.as_str()))
                    || (!is_role && TYPES.contains(&text.as_str()));
                Value::String(if is_known { text.clone() } else { self.other(text) })
            }
            Value::Array(items) => items.iter().map(|item| self.kept(item, is_role)).collect(),
            other => self.known(other),
        }
    }

    /// Variables keep their names, which are not written; their texts are names.
    fn variables(&mut self, variables: &Map<String, Value>) -> Map<String, Value> {
        let rename = |(key, value): (&String, &Value)| (key.clone(), self.variable(value));
        variables.iter().map(rename).collect()
    }

    fn variable(&mut self, value: &Value) -> Value {
        match value {
            Value::String(text) if self.is_known(text) => value.clone(),
            Value::String(text) => Value::String(self.other(text)),
            Value::Array(items) => items.iter().map(|item| self.variable(item)).collect(),
            Value::Object(map) => {
                let rename = |(key, value): (&String, &Value)| {
                    let name = if self.is_known(key) { key.clone() } else { self.other(key) };
                    (name, self.variable(value))
                };
                Value::Object(map.iter().map(rename).collect())
            }
            other => other.clone(),
        }
    }
}

/// Types of JSON values, of parts of a message and of tools.
const TYPES: [&str; 10] = [
    "array", "boolean", "function", "image", "integer", "null", "number", "object", "string",
    "text",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_tokens_are_known() {
        let tokens = ["<|im_end|>", "</think>"].map(str::to_owned);
        let control = Control::new(tokens.iter()).expect("few tokens");
        for piece in ["<|im_end|>", "x<|im_end|>y", "im", "|>", "> x", "x <", "x<|im", "think>y"] {
            assert!(control.has_piece(piece), "{piece}");
        }
        for other in ["x", "end of", "é", "", "thinks"] {
            assert!(!control.has_piece(other), "{other}");
        }
        assert_eq!(control.find("a</think>"), Some("</think>"));
        assert_eq!(control.find("a</ think>"), None);
    }
}
