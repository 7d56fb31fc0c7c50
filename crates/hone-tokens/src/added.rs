//! Added tokens: which there are, and where they stand in a text.
//!
//! The reference (`AddedVocabulary` of the tokenizers crate) cuts a text at every added token before anything else looks at
//! it. [`AddedTokens::cut`] does the same with one question more: whoever calls it says whether a token may stand where it
//! was found. A token that may not is no token there, and a shorter one at the same place is tried instead.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::LazyLock;

use regex::Regex;
use tokenizers::AddedToken;

/// A letter, digit or mark of a word, as the reference has it.
static WORD: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"^\w$").expect("the pattern is a constant and valid"));

/// One added token, as far as finding it goes.
#[derive(Clone, Debug)]
struct Pattern {
    id: u32,
    /// Only as a word of its own.
    single_word: bool,
    /// With the blanks before it.
    lstrip: bool,
    /// With the blanks behind it.
    rstrip: bool,
}

/// Added tokens that are looked for in the same form of a text: as it came, or normalized.
#[derive(Clone, Debug, Default)]
pub(crate) struct AddedTokens {
    patterns: HashMap<Box<str>, Pattern>,
    /// For each first byte the lengths of the tokens that begin with it, longest first; empty until there is a token.
    lens: Vec<Vec<usize>>,
}

/// A piece of a text between cuts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Its bytes, blanks that an added token takes with it included.
    pub(crate) range: Range<usize>,
    /// For an added token its id and its own bytes.
    pub(crate) token: Option<(u32, Range<usize>)>,
}

impl AddedTokens {
    /// Adds a token under the text it is found by.
    pub(crate) fn insert(&mut self, text: &str, id: u32, token: &AddedToken) {
        let Some(first) = text.bytes().next() else {
            return;
        };
        self.lens.resize(256, Vec::new());
        let lens = &mut self.lens[first as usize];
        if let Err(at) = lens.binary_search_by(|len| text.len().cmp(len)) {
            lens.insert(at, text.len());
        }
        let pattern = Pattern {
            id,
            single_word: token.single_word,
            lstrip: token.lstrip,
            rstrip: token.rstrip,
        };
        self.patterns.insert(text.into(), pattern);
    }

    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.patterns.is_empty()
    }

    /// Cuts `text` at its added tokens: the leftmost first, the longest of those that begin at one place, and only where
    /// `may(id, bytes)` holds. The pieces cover the text.
    pub(crate) fn cut(&self, text: &str, may: impl Fn(u32, Range<usize>) -> bool) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let mut done = 0;
        let mut at = 0;
        // Most texts hold few bytes that a token begins with, so the search goes from one of them to the next.
        let begins = |b: &u8| self.lens.get(*b as usize).is_some_and(|lens| !lens.is_empty());
        while let Some(next) = text.as_bytes()[at..].iter().position(begins) {
            at += next;
            let Some((pattern, found)) = self.longest(text, at, &may) else {
                at += 1;
                continue;
            };
            at = found.end;
            if pattern.single_word && !stands_alone(text, &found) {
                continue;
            }
            let range = with_blanks(pattern, text, &found, done);
            if done < range.start {
                pieces.push(Piece { range: done..range.start, token: None });
            }
            done = range.end;
            // The reference goes on behind the token itself, not behind the blanks that it took; a token of blanks that
            // was taken already is one it has no case for, and here it is passed over.
            at = at.max(done);
            pieces.push(Piece { range, token: Some((pattern.id, found)) });
        }
        if done < text.len() {
            pieces.push(Piece { range: done..text.len(), token: None });
        }
        pieces
    }

    fn longest(
        &self,
        text: &str,
        at: usize,
        may: &impl Fn(u32, Range<usize>) -> bool,
    ) -> Option<(&Pattern, Range<usize>)> {
        let lens = self.lens.get(text.as_bytes()[at] as usize)?;
        lens.iter().find_map(|len| {
            let range = at..at + len;
            let pattern = self.patterns.get(text.get(range.clone())?)?;
            may(pattern.id, range.clone()).then_some((pattern, range))
        })
    }
}

fn stands_alone(text: &str, found: &Range<usize>) -> bool {
    let is_word = |c: Option<char>| c.is_some_and(|c| WORD.is_match(c.encode_utf8(&mut [0; 4])));
    !is_word(text[..found.start].chars().next_back()) && !is_word(text[found.end..].chars().next())
}

/// The bytes that the token takes away from its neighbours: its own, and the blanks beside it where its flags say so.
fn with_blanks(pattern: &Pattern, text: &str, found: &Range<usize>, done: usize) -> Range<usize> {
    let mut range = found.clone();
    if pattern.lstrip {
        range.start = text[..found.start].trim_end().len().max(done);
    }
    if pattern.rstrip {
        range.end = text.len() - text[found.end..].trim_start().len();
    }
    range
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> AddedTokens {
        let mut table = AddedTokens::default();
        let plain = AddedToken::default();
        table.insert("<a>", 1, &plain);
        table.insert("<a><b>", 2, &plain);
        table.insert("<l>", 3, &plain.clone().lstrip(true));
        table.insert("<r>", 4, &plain.clone().rstrip(true));
        table.insert("word", 5, &plain.clone().single_word(true));
        table.insert("  ", 6, &plain);
        table
    }

    /// Pieces as text: `(…)` around ordinary ones, the id before what a token took.
    fn check(text: &str, never: &[u32], picture: &str) {
        let pieces = table().cut(text, |id, _| !never.contains(&id));
        let shown: Vec<String> = pieces
            .iter()
            .map(|piece| match &piece.token {
                Some((id, _)) => format!("{id}{:?}", &text[piece.range.clone()]),
                None => format!("({})", &text[piece.range.clone()]),
            })
            .collect();
        assert_eq!(shown.join(" "), picture);
        let whole: String = pieces.iter().map(|p| &text[p.range.clone()]).collect();
        assert_eq!(whole, text, "the pieces cover the text");
    }

    #[test]
    fn the_leftmost_and_then_the_longest_token_wins() {
        check("", &[], "");
        check("x", &[], "(x)");
        check("x<a>y", &[], r#"(x) 1"<a>" (y)"#);
        check("<a><b><a>", &[], r#"2"<a><b>" 1"<a>""#);
        check("é<a>é", &[], r#"(é) 1"<a>" (é)"#);
    }

    #[test]
    fn where_a_token_may_not_stand_a_shorter_one_is_tried() {
        check("<a><b>", &[2], r#"1"<a>" (<b>)"#);
        check("<a><b>", &[1, 2], "(<a><b>)");
    }

    #[test]
    fn blanks_and_words_are_as_the_flags_say() {
        check("x  \n<l> y", &[6], r#"(x) 3"  \n<l>" ( y)"#);
        check("x<r>  y", &[6], r#"(x) 4"<r>  " (y)"#);
        check("<r> <l>", &[], r#"4"<r> " 3"<l>""#);
        check("a word, swordfish word", &[], r#"(a ) 5"word" (, swordfish ) 5"word""#);
    }
}
