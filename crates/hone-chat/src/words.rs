//! A conversation with its words replaced by characters that nothing else holds, and the way back.
//!
//! Each word of each text of a message becomes as many copies of one private-use character as it
//! has characters, so that lengths stay what they are. White space stays, because templates trim
//! and split at it. Most templates do neither inside a text: for them a text is one word, whatever it
//! holds, and that one character ([`Keep::Ends`]). A guard is one such character between two characters of a text: trimming stops
//! at it.

use std::borrow::Cow;
use std::collections::HashSet;
use std::ops::Range;

use hone_schema::{Part, REASONING_KEYS};
use serde_json::{Map, Value};

use crate::python::is_space;
use crate::symbols::{Free, Symbol, Symbols, plain_len};
use crate::template::{Given, values};

/// Keys whose texts templates compare with their own.
const PLAIN_KEYS: [&str; 2] = ["role", "type"];

/// Whether texts under a key of a map are names: templates compare them, so that they stay as they
/// are and count as the template's. Those that a JSON schema requires are keys of its `properties`.
pub(crate) fn is_name(key: &str, map: &Map<String, Value>) -> bool {
    let is_schema = || map.get("properties").is_some_and(Value::is_object);
    PLAIN_KEYS.contains(&key) || (key == "required" && is_schema())
}

/// Keys of a message under which it calls tools, and types of parts that do.
const CALL_KEYS: [&str; 4] = ["tool_calls", "function_call", "tool_call", "tool_use"];

/// What of a text is kept as it is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keep<'a> {
    /// White space at the ends of texts; no length.
    Ends,
    /// White space.
    Space,
    /// Also what JSON escapes, or Python where it shows a text.
    Json,
    /// Also every text that stands in the template as a literal, but for texts that are nothing
    /// else where they are of that kind.
    Literals(&'a [String], Whole),
}

/// Which texts that are nothing but one literal are words for all that: no guard fits around such
/// a literal, so that where it was kept it is not known where it is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Whole {
    /// All.
    Words,
    /// Contents and thoughts; names, channels and the like are kept.
    SaidWords,
    /// None.
    Kept,
}

/// Where guards are put.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Guards {
    /// Nowhere.
    None,
    /// At both ends of every text that is not blank, and beside every literal that was kept.
    Filled,
    /// Also around blank texts.
    All,
    /// Also between a literal and the white space at its ends: what a template that takes it away
    /// writes instead, with white space of its own, differs from it then.
    Close,
    /// So, but not between two literals with nothing else than white space between them, which a
    /// template may take for nothing: `<think></think>`.
    Around,
}

/// One text of a message, of the tools or of the documents.
pub(crate) struct Leaf {
    /// Index of its message; `None` for tools and documents.
    pub(crate) message: Option<usize>,
    /// Key of the message under which it lies; empty for tools and documents.
    pub(crate) key: String,
    /// Whether it is content, a thought or a call of a tool.
    pub(crate) part: Part,
    /// Whether it is only a name for a call, which many templates leave out.
    pub(crate) is_id: bool,
    /// The text.
    pub(crate) text: String,
    /// Ranges of literals that were kept.
    pub(crate) literals: Vec<Range<usize>>,
}

impl Leaf {
    /// Whether it is nothing but one literal that was kept.
    pub(crate) fn is_literal(&self) -> bool {
        matches!(&self.literals[..], [literal] if *literal == (0..self.text.len()))
    }

    /// Whether one of its literals lies in `range`.
    pub(crate) fn has_literal_in(&self, range: Range<usize>) -> bool {
        self.literals.iter().any(|l| l.start < range.end && range.start < l.end)
    }
}

/// A conversation in disguise.
pub(crate) struct Masked {
    /// The messages.
    pub(crate) messages: Vec<minijinja::Value>,
    /// The tools.
    pub(crate) tools: Option<Value>,
    /// The documents.
    pub(crate) documents: Option<Value>,
    /// All texts that were replaced.
    pub(crate) leaves: Vec<Leaf>,
    symbols: Symbols,
}

/// A word or a guard, found in a rendered text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Item {
    pub(crate) leaf: usize,
    /// Its bytes in the leaf.
    pub(crate) range: Range<usize>,
    /// Its bytes in the text.
    pub(crate) at: Range<usize>,
    pub(crate) n_before: usize,
    pub(crate) is_guard: bool,
}

/// A rendered text with the words put back.
pub(crate) struct Decoded {
    pub(crate) text: String,
    pub(crate) items: Vec<Item>,
}

/// Replaces the words; `None` when there are more words than characters to replace them with.
pub(crate) fn mask(
    messages: &[&Map<String, Value>],
    given: &Given,
    reserved: &HashSet<char>,
    keep: Keep<'_>,
    guards: Guards,
) -> Option<Masked> {
    let mut masker = Masker {
        free: Free::new(reserved),
        keep,
        guards,
        message: None,
        key: String::new(),
        part: Part::Content,
        is_id: false,
        leaves: Vec::new(),
        symbols: Symbols::default(),
    };
    let mut list = Vec::with_capacity(messages.len());
    for (at, message) in messages.iter().enumerate() {
        masker.message = Some(at);
        list.push(Cow::Owned(masker.message(message)?));
    }
    masker.message = None;
    masker.key.clear();
    masker.part = Part::Content;
    let mut other = |value: Option<&Value>| match value {
        Some(value) => Some(Some(masker.value(value)?)),
        None => Some(None),
    };
    let (tools, documents) = (other(given.tools)?, other(given.documents)?);
    Some(Masked {
        messages: values(list.into_iter()),
        tools,
        documents,
        leaves: masker.leaves,
        symbols: masker.symbols,
    })
}

struct Masker<'a> {
    free: Free<'a>,
    keep: Keep<'a>,
    guards: Guards,
    message: Option<usize>,
    key: String,
    part: Part,
    is_id: bool,
    leaves: Vec<Leaf>,
    symbols: Symbols,
}

/// What the texts under a key of a message are, or those of a part of that type.
fn part_of(name: &str) -> Part {
    if REASONING_KEYS.contains(&name) {
        Part::Reasoning
    } else if CALL_KEYS.contains(&name) {
        Part::ToolCall
    } else {
        Part::Content
    }
}

/// Whether a text is content or a thought, by its message and the key that it lies under.
pub(crate) fn is_said(message: Option<usize>, key: &str) -> bool {
    message.is_some() && (key == "content" || REASONING_KEYS.contains(&key))
}

impl Masker<'_> {
    fn message(&mut self, message: &Map<String, Value>) -> Option<Map<String, Value>> {
        let masked = message.iter().map(|(key, value)| {
            key.clone_into(&mut self.key);
            self.part = part_of(key);
            let value = match (is_name(key, message), value) {
                (true, _) => self.plain(value)?,
                (false, Value::Array(parts)) if self.part == Part::Content => {
                    Value::Array(parts.iter().map(|part| self.part(part)).collect::<Option<_>>()?)
                }
                (false, value) => self.value(value)?,
            };
            Some((key.clone(), value))
        });
        masked.collect()
    }

    /// A part of a content: what it is its type says, or the key under which it has its text.
    fn part(&mut self, part: &Value) -> Option<Value> {
        let kind = part["type"].as_str().map(part_of);
        let keys = || part.as_object().into_iter().flat_map(Map::keys).map(|key| part_of(key));
        self.part = kind
            .filter(|kind| *kind != Part::Content)
            .unwrap_or_else(|| keys().find(|kind| *kind != Part::Content).unwrap_or(Part::Content));
        let masked = self.value(part);
        self.part = Part::Content;
        masked
    }

    fn map(&mut self, map: &Map<String, Value>) -> Option<Map<String, Value>> {
        map.iter()
            .map(|(key, value)| {
                let value = match is_name(key, map) {
                    true => self.plain(value)?,
                    false => {
                        self.is_id = key == "id";
                        self.value(value)?
                    }
                };
                self.is_id = false;
                Some((key.clone(), value))
            })
            .collect()
    }

    /// A value that is a name ([`is_name`]): texts stay, alone or in a list; anything else is what a
    /// row calls so, such as a tool's parameter. Module `names` checks what stays.
    fn plain(&mut self, value: &Value) -> Option<Value> {
        Some(match value {
            Value::String(_) => value.clone(),
            Value::Array(items) => {
                Value::Array(items.iter().map(|v| self.plain(v)).collect::<Option<_>>()?)
            }
            other => self.value(other)?,
        })
    }

    fn value(&mut self, value: &Value) -> Option<Value> {
        Some(match value {
            Value::String(text) => Value::String(self.text(text)?),
            Value::Array(items) => {
                Value::Array(items.iter().map(|v| self.value(v)).collect::<Option<_>>()?)
            }
            Value::Object(map) => Value::Object(self.map(map)?),
            other => other.clone(),
        })
    }

    fn text(&mut self, text: &str) -> Option<String> {
        let leaf = self.leaves.len();
        let mut literals = literals(text, self.keep, self.guards);
        if literals.first() == Some(&(0..text.len())) && self.is_whole_a_word() {
            literals.clear();
        }
        let cuts = cuts(text, &literals, self.guards);
        let mut out = String::with_capacity(text.len() * 2);
        let (mut at, mut n_before) = (0, 0);
        let mut cuts = cuts.into_iter().peekable();
        let mut ahead = literals.iter().peekable();
        loop {
            if cuts.next_if_eq(&at).is_some() {
                let symbol = self.free.next()?;
                out.push(symbol);
                let guard = Symbol { leaf, start: at, end: at, n_chars: 0, n_before };
                self.symbols.insert(symbol, guard);
            }
            if at == text.len() {
                break;
            }
            if let Some(literal) = ahead.next_if(|literal| literal.start == at) {
                out.push_str(&text[literal.clone()]);
                at = literal.end;
                continue;
            }
            let limit = ahead.peek().map_or(text.len(), |literal| literal.start);
            let end = at + self.word_len(&text[at..limit]);
            if end == at {
                let kept = text[at..].chars().next()?;
                out.push(kept);
                at += kept.len_utf8();
                continue;
            }
            let symbol = self.free.next()?;
            let n_chars = match self.keep {
                Keep::Ends => 1,
                _ => text[at..end].chars().count(),
            };
            out.extend(std::iter::repeat_n(symbol, n_chars));
            self.symbols.insert(symbol, Symbol { leaf, start: at, end, n_chars, n_before });
            n_before += 1;
            at = end;
        }
        self.leaves.push(Leaf {
            message: self.message,
            key: self.key.clone(),
            part: self.part,
            is_id: self.is_id,
            text: text.to_owned(),
            literals,
        });
        Some(out)
    }

    /// Whether a text that is nothing but one literal is a word here.
    fn is_whole_a_word(&self) -> bool {
        match self.keep {
            Keep::Literals(_, Whole::Words) => true,
            Keep::Literals(_, Whole::SaidWords) => is_said(self.message, &self.key),
            _ => false,
        }
    }

    /// Length of the word that `text` begins with: 0 when it begins with something that is kept.
    fn word_len(&self, text: &str) -> usize {
        if self.keep == Keep::Ends {
            let starts_blank = text.starts_with(is_space);
            return if starts_blank { 0 } else { text.trim_end_matches(is_space).len() };
        }
        let json = self.keep != Keep::Space;
        let is_kept =
            |c: char| is_space(c) || (json && (matches!(c, '"' | '\'' | '\\') || c < ' '));
        text.find(is_kept).unwrap_or(text.len())
    }
}

/// Where literals stand in a text; of two that overlap, the one that begins first, then the longer.
fn literals(text: &str, keep: Keep<'_>, guards: Guards) -> Vec<Range<usize>> {
    let Keep::Literals(literals, _) = keep else {
        return Vec::new();
    };
    let mut found: Vec<Range<usize>> = literals
        .iter()
        .filter(|literal| !literal.chars().all(is_space))
        .flat_map(|literal| text.match_indices(literal.as_str()))
        .map(|(at, literal)| at..at + literal.len())
        .collect();
    found.sort_by_key(|range| (range.start, usize::MAX - range.end));
    let mut end = 0;
    found.retain(|range| {
        let is_free = range.start >= end;
        if is_free {
            end = range.end;
        }
        is_free
    });
    if matches!(guards, Guards::Close | Guards::Around) {
        for range in &mut found {
            let literal = &text[range.clone()];
            let start = range.start + literal.len() - literal.trim_start_matches(is_space).len();
            *range = start..start + literal.trim_matches(is_space).len();
        }
    }
    found
}

/// Where guards stand: at the ends of the text and of its literals, but not before a literal that
/// begins the text and not behind one that ends it, so that a template still finds them there.
fn cuts(text: &str, literals: &[Range<usize>], guards: Guards) -> Vec<usize> {
    let is_blank = text.chars().all(is_space);
    if guards == Guards::None || (is_blank && guards == Guards::Filled) {
        return Vec::new();
    }
    let begins = literals.iter().any(|literal| literal.start == 0);
    let ends = literals.iter().any(|literal| literal.end == text.len());
    let blank = |pair: &[Range<usize>]| text[pair[0].end..pair[1].start].chars().all(is_space);
    let is_between = |at: usize| {
        let next = literals.partition_point(|literal| literal.start < at);
        let pairs = [
            next.checked_sub(1).map(|one| one..one + 2),
            next.checked_sub(2).map(|one| one..one + 2),
        ];
        pairs
            .into_iter()
            .flatten()
            .filter_map(|pair| literals.get(pair))
            .any(|pair| (at == pair[0].end || at == pair[1].start) && blank(pair))
    };
    let mut cuts: Vec<usize> = literals
        .iter()
        .flat_map(|literal| [literal.start, literal.end])
        .chain([0, text.len()])
        .filter(|at| (*at > 0 || !begins) && (*at < text.len() || !ends))
        .filter(|at| guards != Guards::Around || !is_between(*at))
        .collect();
    cuts.sort_unstable();
    cuts.dedup();
    // A blank text has one place for both ends when it is empty; one guard is enough to find it.
    cuts
}

impl Masked {
    /// Puts the words back into a rendered text; `None` when a word is there in part.
    pub(crate) fn decode(&self, rendered: &str) -> Option<Decoded> {
        let mut text = String::with_capacity(rendered.len());
        let mut items = Vec::new();
        let mut rest = rendered;
        loop {
            let (plain, coded) = rest.split_at(plain_len(rest));
            text.push_str(plain);
            let mut chars = coded.chars();
            let Some(c) = chars.next() else {
                break;
            };
            if let Some(symbol) = self.symbols.get(c) {
                if !(1..symbol.n_chars).all(|_| chars.next() == Some(c)) {
                    return None;
                }
                let (start, range) = (text.len(), symbol.start..symbol.end);
                text.push_str(&self.leaves[symbol.leaf].text[range.clone()]);
                items.push(Item {
                    leaf: symbol.leaf,
                    range,
                    at: start..text.len(),
                    n_before: symbol.n_before,
                    is_guard: symbol.n_chars == 0,
                });
            } else {
                text.push(c);
            }
            rest = chars.as_str();
        }
        Some(Decoded { text, items })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::symbols::private_use;

    fn content(masked: &Masked) -> String {
        let content = masked.messages[0].get_attr("content").expect("a content");
        content.as_str().expect("a text").to_owned()
    }

    fn check(says: &str, keep: Keep<'_>, guards: Guards, picture: &str) {
        let Value::Object(message) = json!({"role": "user", "content": says}) else {
            panic!("an object");
        };
        let masked =
            mask(&[&message], &Given::default(), &HashSet::new(), keep, guards).expect("few words");
        let text = content(&masked);
        let letters: String = text
            .chars()
            .map(|c| match masked.symbols.get(c) {
                Some(symbol) if symbol.n_chars == 0 => '|',
                Some(_) => 'w',
                None => c,
            })
            .collect();
        assert_eq!(letters, picture);
        let role = masked.messages[0].get_attr("role").expect("a role");
        assert_eq!(role.as_str(), Some("user"));
        let decoded = masked.decode(&format!("<{text}>")).expect("whole words");
        assert_eq!(decoded.text, format!("<{says}>"));
    }

    #[test]
    fn words_are_replaced_and_come_back() {
        let literals = ["</think>".to_owned(), "a".to_owned(), "\n".to_owned()];
        let kept = Keep::Literals(&literals, Whole::Kept);
        let words = Keep::Literals(&literals, Whole::SaidWords);
        check(" häb \n\"c\" ", Keep::Space, Guards::None, " www \nwww ");
        check(" häb \n\"c\" ", Keep::Ends, Guards::None, " w ");
        check(" b \n\"c\" ", Keep::Json, Guards::All, "| w \n\"w\" |");
        check("xy</think>\nz", kept, Guards::None, "ww</think>\nw");
        check("xy</think>\nz", kept, Guards::All, "|ww|</think>|\nw|");
        check("</think>za", kept, Guards::All, "</think>|w|a");
        let wide = ["\n</think>\n".to_owned()];
        let wide = Keep::Literals(&wide, Whole::Kept);
        check("x\n</think>\ny", wide, Guards::All, "|w|\n</think>\n|w|");
        check("x\n</think>\ny", wide, Guards::Close, "|w\n|</think>|\nw|");
        check("</think>", kept, Guards::All, "</think>");
        check("</think>", words, Guards::All, "|wwwwwwww|");
        check("</think>a", words, Guards::All, "</think>|a");
        check("", Keep::Space, Guards::All, "|");
        check(" \n", Keep::Space, Guards::All, "| \n|");
        check(" \n", Keep::Space, Guards::Filled, " \n");
    }

    #[test]
    fn symbols_avoid_what_is_there() {
        let mut reserved = HashSet::new();
        private_use("a\u{f0000}\u{f0001}\u{e000}", &mut reserved);
        assert_eq!(reserved.len(), 3);
        let masked =
            mask(&[], &Given::default(), &reserved, Keep::Space, Guards::None).expect("no words");
        assert_eq!(masked.leaves.len(), 0);
        assert_eq!(Free::new(&reserved).next(), Some('\u{f0002}'));
    }

    #[test]
    fn a_word_in_part_is_noticed() {
        let Value::Object(message) = json!({"role": "user", "content": "abc"}) else {
            panic!("an object");
        };
        let masked =
            mask(&[&message], &Given::default(), &HashSet::new(), Keep::Space, Guards::None);
        let masked = masked.expect("few words");
        let text = content(&masked);
        let short: String = text.chars().skip(1).collect();
        assert!(masked.decode(&short).is_none());
    }
}
