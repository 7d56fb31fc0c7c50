//! What the expressions of tokenizers ask about a character, as one table.
//!
//! The classes come from regex-syntax, where the expressions themselves get theirs.

use std::sync::LazyLock;

use regex_syntax::hir::{Class, HirKind};

/// `\p{L}`
pub(crate) const LETTER: u16 = 1;
/// `\p{N}`
pub(crate) const NUMBER: u16 = 1 << 1;
/// `\s`
pub(crate) const SPACE: u16 = 1 << 2;
/// `[\r\n]`
pub(crate) const NEWLINE: u16 = 1 << 3;
/// `[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]`
pub(crate) const UPPER: u16 = 1 << 4;
/// `[\p{Ll}\p{Lm}\p{Lo}\p{M}]`
pub(crate) const LOWER: u16 = 1 << 5;
/// `\p{M}`
pub(crate) const MARK: u16 = 1 << 6;
/// `\p{P}`
pub(crate) const PUNCTUATION: u16 = 1 << 7;
/// `\p{S}`
pub(crate) const SYMBOL: u16 = 1 << 8;

/// The expression of each class.
pub(crate) const EXPRESSIONS: [(u16, &str); 9] = [
    (LETTER, r"\p{L}"),
    (NUMBER, r"\p{N}"),
    (SPACE, r"\s"),
    (NEWLINE, r"[\r\n]"),
    (UPPER, r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"),
    (LOWER, r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"),
    (MARK, r"\p{M}"),
    (PUNCTUATION, r"\p{P}"),
    (SYMBOL, r"\p{S}"),
];

/// Characters that share a page of the table.
const PAGE: usize = 256;

/// Classes by character, in pages of which equal ones are stored once.
pub(crate) struct Classes {
    ascii: [u16; 128],
    page_of: Vec<u16>,
    pages: Vec<[u16; PAGE]>,
}

/// The table; made once, in a few milliseconds.
pub(crate) static CLASSES: LazyLock<Classes> = LazyLock::new(Classes::new);

impl Classes {
    fn new() -> Self {
        let mut flat = vec![0u16; char::MAX as usize + 1];
        for (class, expression) in EXPRESSIONS {
            let hir = regex_syntax::parse(expression).expect("the expressions are constants");
            let HirKind::Class(Class::Unicode(ranges)) = hir.kind() else {
                unreachable!("each expression is one class of characters");
            };
            for range in ranges.ranges() {
                flat[range.start() as usize..=range.end() as usize]
                    .iter_mut()
                    .for_each(|bits| *bits |= class);
            }
        }
        let mut table = Classes { ascii: [0; 128], page_of: Vec::new(), pages: Vec::new() };
        table.ascii.copy_from_slice(&flat[..128]);
        for page in flat.chunks_exact(PAGE) {
            let known = table.pages.iter().rposition(|p| p == page);
            table.page_of.push(known.unwrap_or(table.pages.len()) as u16);
            if known.is_none() {
                table.pages.push(page.try_into().expect("the chunks have that length"));
            }
        }
        table
    }

    /// The classes of a character.
    pub(crate) fn of(&self, c: char) -> u16 {
        let c = c as usize;
        self.pages[self.page_of[c / PAGE] as usize][c % PAGE]
    }

    /// The classes of the character at byte `at`, and its length; nothing and 0 behind the end.
    #[inline]
    pub(crate) fn at(&self, text: &str, at: usize) -> (u16, usize) {
        match text.as_bytes().get(at) {
            None => (0, 0),
            Some(byte) if *byte < 128 => (self.ascii[*byte as usize], 1),
            Some(_) => self.wide(text, at),
        }
    }

    #[inline(never)]
    fn wide(&self, text: &str, at: usize) -> (u16, usize) {
        let c = text[at..].chars().next().expect("`at` is before the end");
        (self.of(c), c.len_utf8())
    }

    /// The end of the characters from `at` on that have one of the classes `any` and none of `none`.
    #[inline]
    pub(crate) fn run(&self, text: &str, mut at: usize, any: u16, none: u16) -> usize {
        loop {
            let (bits, len) = self.at(text, at);
            if len == 0 || bits & none != 0 || bits & any == 0 && any != 0 {
                return at;
            }
            at += len;
        }
    }
}
