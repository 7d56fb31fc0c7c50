//! Characters that stand for something in a text: private-use ones that the row does not hold.

use std::collections::HashSet;

use serde_json::{Map, Value};

/// Private-use characters, the rarest first.
const SYMBOLS: [std::ops::RangeInclusive<char>; 3] =
    ['\u{f0000}'..='\u{ffffd}', '\u{100000}'..='\u{10fffd}', '\u{e000}'..='\u{f8ff}'];

/// The characters that may stand for something, in the order in which they are taken, but for those
/// that something else holds.
pub(crate) struct Free<'a> {
    reserved: &'a HashSet<char>,
    /// Those of the first range first.
    rest: [std::ops::RangeInclusive<char>; 3],
}

impl<'a> Free<'a> {
    pub(crate) fn new(reserved: &'a HashSet<char>) -> Self {
        Free { reserved, rest: SYMBOLS }
    }
}

impl Iterator for Free<'_> {
    type Item = char;

    fn next(&mut self) -> Option<char> {
        let mut free = self.rest.iter_mut().flatten();
        match self.reserved.is_empty() {
            true => free.next(),
            false => free.find(|c| !self.reserved.contains(c)),
        }
    }
}

/// What a symbol stands for.
#[derive(Clone, Copy)]
pub(crate) struct Symbol {
    /// Its text.
    pub(crate) leaf: usize,
    /// Its bytes in the leaf.
    pub(crate) start: usize,
    pub(crate) end: usize,
    /// How often it stands there for one occurrence of the word; 0 for a guard.
    pub(crate) n_chars: usize,
    /// Words of this leaf before it.
    pub(crate) n_before: usize,
}

/// What each symbol stands for, by its place among [`SYMBOLS`].
#[derive(Default)]
pub(crate) struct Symbols {
    slots: Vec<Option<Symbol>>,
}

impl Symbols {
    pub(crate) fn insert(&mut self, c: char, symbol: Symbol) {
        let place = place(c).expect("symbols are taken from the ranges");
        if self.slots.len() <= place {
            self.slots.resize(place + 1, None);
        }
        self.slots[place] = Some(symbol);
    }

    pub(crate) fn get(&self, c: char) -> Option<Symbol> {
        self.slots.get(place(c)?).copied().flatten()
    }
}

/// The place of a private-use character among [`SYMBOLS`].
fn place(c: char) -> Option<usize> {
    let mut before = 0;
    for range in &SYMBOLS {
        if range.contains(&c) {
            return Some(before + (c as usize - *range.start() as usize));
        }
        before += *range.end() as usize - *range.start() as usize + 1;
    }
    None
}

/// The lowest of the bytes with which private-use characters begin; shorter characters, and most of
/// those of three bytes, begin with lower ones.
const PRIVATE_USE_BYTE: u8 = 0xee;

/// Length of the text before the first byte with which a private-use character might begin.
pub(crate) fn plain_len(text: &str) -> usize {
    text.bytes().position(|byte| byte >= PRIVATE_USE_BYTE).unwrap_or(text.len())
}

/// Private-use characters of a text: what may not be used to replace a word.
pub(crate) fn private_use(text: &str, into: &mut HashSet<char>) {
    let from = plain_len(text);
    into.extend(text[from..].chars().filter(|c| place(*c).is_some()));
}

/// Private-use characters of every text and key of a value.
pub(crate) fn reserve(value: &Value, into: &mut HashSet<char>) {
    match value {
        Value::String(text) => private_use(text, into),
        Value::Array(items) => items.iter().for_each(|item| reserve(item, into)),
        Value::Object(map) => reserve_all(map, into),
        _ => {}
    }
}

/// Private-use characters of every key and value of a map.
pub(crate) fn reserve_all(map: &Map<String, Value>, into: &mut HashSet<char>) {
    for (key, value) in map {
        private_use(key, into);
        reserve(value, into);
    }
}
