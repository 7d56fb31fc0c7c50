//! Control tokens that a template would put together from names that a row chose.
//!
//! What messages say is told from what the template writes; names are not: the template looks keys,
//! roles and types up, and compares the texts of variables. Module `names` refuses a name that holds
//! a control token. But a template that writes `'<' ~ key ~ '>'` makes one of the key `|im_end|`.
//!
//! Names that the template itself holds, and the usual roles, are its own. Of the others those are
//! looked at that could be a piece of a token; few rows have any. Such a row is rendered once more
//! with each of them replaced by as many copies of a character that nothing else holds. Where those
//! stand, the template wrote a name of the row's, and no token may overlap it. Where the rest of the
//! text is not the same, the template looks at such a name, and it is not known what it would do.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};

use hone_schema::REASONING_KEYS;
use serde_json::{Map, Value};

use crate::locate::{Block, around};
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

/// Stands between the tokens in [`Tokens::list`], and in none of them.
const BETWEEN: char = '\0';

/// The control tokens of a dialect, to look names up in.
#[derive(Debug, Default)]
pub(crate) struct Tokens {
    /// All of them, each with [`BETWEEN`] on both sides.
    list: String,
    first: HashSet<char>,
    last: HashSet<char>,
}

impl Tokens {
    pub(crate) fn new<'a>(tokens: impl Iterator<Item = &'a String>) -> Self {
        let mut found = Tokens { list: BETWEEN.to_string(), ..Tokens::default() };
        for token in tokens.filter(|token| !token.is_empty()) {
            found.list.push_str(token);
            found.list.push(BETWEEN);
            found.first.extend(token.chars().next());
            found.last.extend(token.chars().next_back());
        }
        found
    }

    /// Whether a text could hold a token: whether it has the first character of one.
    pub(crate) fn may_be_in(&self, text: &str) -> bool {
        text.chars().any(|c| self.first.contains(&c))
    }

    /// Whether a name could be a piece of a token, begin with the end of one, or end with the
    /// beginning of one.
    fn has_piece(&self, name: &str) -> bool {
        if name.is_empty() || name.contains(BETWEEN) {
            return !name.is_empty();
        }
        let begins = |at: usize| self.list.contains(&format!("{BETWEEN}{}", &name[at..]));
        let ends = |end: usize| self.list.contains(&format!("{}{BETWEEN}", &name[..end]));
        let mut chars = name.char_indices();
        self.list.contains(name)
            || chars.any(|(at, c)| {
                (self.first.contains(&c) && begins(at))
                    || (self.last.contains(&c) && ends(at + c.len_utf8()))
            })
    }
}

impl ChatTemplate {
    /// Refuses a conversation in whose text, outside the blocks, a name of the row's is a piece of a
    /// control token.
    pub(crate) fn check_pieces(
        &self,
        messages: &[&Map<String, Value>],
        given: &Given,
        text: &str,
        blocks: &[Block],
        reserved: &HashSet<char>,
    ) -> Result<(), TemplateError> {
        let mut names = Names { template: self, found: BTreeMap::new() };
        messages.iter().for_each(|message| names.in_map(message));
        [given.tools, given.documents].into_iter().flatten().for_each(|v| names.in_value(v));
        given.variables.into_iter().for_each(|variables| names.in_variables(variables));
        if names.found.is_empty() {
            return Ok(());
        }
        let mut free = Free::new(reserved);
        for symbol in names.found.values_mut() {
            *symbol = free.next().ok_or(TemplateError::Limit("names"))?;
        }
        let renamed = |value: Option<&Value>| value.map(|value| names.renamed(value));
        let variables = given.variables.map(|variables| names.renamed_variables(variables));
        let [tools, documents] = [renamed(given.tools), renamed(given.documents)];
        let given = Given {
            tools: tools.as_ref(),
            documents: documents.as_ref(),
            variables: variables.as_ref(),
        };
        let messages = messages.iter().map(|message| Cow::Owned(names.renamed_map(message)));
        let marked = self.render_values(values(messages), &given, false, None);
        let symbols: HashSet<char> = names.found.values().copied().collect();
        let marked = marked.unwrap_or_default();
        let written =
            written(text, &marked, &symbols).ok_or_else(|| TemplateError::Provenance {
                why: "the template looks at a name that could be a piece of a control token",
                plain: names.found.keys().cloned().collect::<Vec<_>>().join(", "),
                marked: around(&marked, 0),
            })?;
        self.check_gaps(text, blocks, &written)
    }

    /// Looks for tokens in the template's own text that overlap the bytes of a name.
    fn check_gaps(
        &self,
        text: &str,
        blocks: &[Block],
        written: &[(usize, usize)],
    ) -> Result<(), TemplateError> {
        let starts = std::iter::once(0).chain(blocks.iter().map(|block| block.at.end));
        let ends = blocks.iter().map(|block| block.at.start).chain([text.len()]);
        let tokens = || self.dialect.added_tokens.iter().chain(self.dialect.tokens.values());
        for (start, end) in starts.zip(ends) {
            let inside = |(s, e): &&(usize, usize)| *s < end && start < *e;
            if !written.iter().any(|name| inside(&name)) {
                continue;
            }
            for token in tokens().filter(|token| !token.is_empty()) {
                for (at, _) in text[start..end].match_indices(token.as_str()) {
                    let at = start + at;
                    let overlaps = |(s, e): &&(usize, usize)| *s < at + token.len() && at < *e;
                    if let Some((s, e)) = written.iter().find(overlaps) {
                        return Err(TemplateError::Forged {
                            message: "of the row".to_owned(),
                            what: "name",
                            found: text[*s..*e].to_owned(),
                            token: token.clone(),
                        });
                    }
                }
            }
        }
        Ok(())
    }
}

/// The bytes of `text` that names are in, when `marked` is the same but for them.
fn written(text: &str, marked: &str, symbols: &HashSet<char>) -> Option<Vec<(usize, usize)>> {
    let mut found: Vec<(usize, usize)> = Vec::new();
    let mut marked = marked.chars();
    for (at, c) in text.char_indices() {
        let other = marked.next()?;
        if symbols.contains(&other) {
            let end = at + c.len_utf8();
            match found.last_mut() {
                Some(last) if last.1 == at => last.1 = end,
                _ => found.push((at, end)),
            }
        } else if other != c {
            return None;
        }
    }
    marked.next().is_none().then_some(found)
}

/// The names of a row that could be pieces of tokens, and what each is replaced with.
struct Names<'a> {
    template: &'a ChatTemplate,
    found: BTreeMap<String, char>,
}

impl Names<'_> {
    fn add(&mut self, name: &str, is_role: bool) {
        // Thoughts are given under names that the row did not choose.
        let is_own = self.template.own_names.contains(name)
            || REASONING_KEYS.contains(&name)
            || (is_role && ROLES.contains(&name));
        if !is_own && !self.found.contains_key(name) && self.template.control.has_piece(name) {
            self.found.insert(name.to_owned(), BETWEEN);
        }
    }

    fn in_value(&mut self, value: &Value) {
        match value {
            Value::Array(items) => items.iter().for_each(|item| self.in_value(item)),
            Value::Object(map) => self.in_map(map),
            _ => {}
        }
    }

    fn in_map(&mut self, map: &Map<String, Value>) {
        for (key, value) in map {
            self.add(key, false);
            match words::is_name(key, map) {
                true => self.in_kept(value, key == "role"),
                false => self.in_value(value),
            }
        }
    }

    fn in_kept(&mut self, value: &Value, is_role: bool) {
        match value {
            Value::String(text) => self.add(text, is_role),
            Value::Array(items) => items.iter().for_each(|item| self.in_kept(item, is_role)),
            other => self.in_value(other),
        }
    }

    fn in_variables(&mut self, variables: &Map<String, Value>) {
        variables.values().for_each(|value| self.in_variable(value));
    }

    fn in_variable(&mut self, value: &Value) {
        match value {
            Value::String(text) => self.add(text, false),
            Value::Array(items) => items.iter().for_each(|item| self.in_variable(item)),
            Value::Object(map) => map.iter().for_each(|(key, value)| {
                self.add(key, false);
                self.in_variable(value);
            }),
            _ => {}
        }
    }

    fn name(&self, name: &str) -> String {
        match self.found.get(name) {
            Some(symbol) => std::iter::repeat_n(*symbol, name.chars().count()).collect(),
            None => name.to_owned(),
        }
    }

    fn renamed(&self, value: &Value) -> Value {
        match value {
            Value::Array(items) => items.iter().map(|item| self.renamed(item)).collect(),
            Value::Object(map) => Value::Object(self.renamed_map(map)),
            other => other.clone(),
        }
    }

    fn renamed_map(&self, map: &Map<String, Value>) -> Map<String, Value> {
        let rename = |(key, value): (&String, &Value)| {
            let value = match words::is_name(key, map) {
                true => self.renamed_kept(value),
                false => self.renamed(value),
            };
            (self.name(key), value)
        };
        map.iter().map(rename).collect()
    }

    fn renamed_kept(&self, value: &Value) -> Value {
        match value {
            Value::String(text) => Value::String(self.name(text)),
            Value::Array(items) => items.iter().map(|item| self.renamed_kept(item)).collect(),
            other => self.renamed(other),
        }
    }

    fn renamed_variables(&self, variables: &Map<String, Value>) -> Map<String, Value> {
        let rename = |(key, value): (&String, &Value)| (key.clone(), self.renamed_variable(value));
        variables.iter().map(rename).collect()
    }

    fn renamed_variable(&self, value: &Value) -> Value {
        match value {
            Value::String(text) => Value::String(self.name(text)),
            Value::Array(items) => items.iter().map(|item| self.renamed_variable(item)).collect(),
            Value::Object(map) => {
                let rename = |(key, value): (&String, &Value)| {
                    (self.name(key), self.renamed_variable(value))
                };
                Value::Object(map.iter().map(rename).collect())
            }
            other => other.clone(),
        }
    }
}
