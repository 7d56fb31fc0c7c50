//! The expressions that real tokenizers split text by, each as a scanner written by hand.
//!
//! A scanner is asked where the word that begins at a place ends, and does what a leftmost-first backtracking engine does with
//! the expression above it. The tests compare each with such an engine on random text, and on every character.

use crate::fast::classes::{
    CLASSES, Classes, LETTER, LOWER, MARK, NEWLINE, NUMBER, PUNCTUATION, SPACE, SYMBOL, UPPER,
};

/// An expression that is known by its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scanner {
    /// GPT-2, and ByteLevel's own.
    Gpt2,
    /// GPT-4 (cl100k), Llama 3, Qwen 2 and 3: so many digits to a word.
    Cl100k(usize),
    /// GPT-4o (o200k) and gpt-oss.
    O200k,
    /// DeepSeek V3's words, after numbers and Chinese were cut away.
    DeepSeek,
    /// `\p{N}{1,3}`
    Numbers,
    /// `[一-龥぀-ゟ゠-ヿ]+`
    Chinese,
}

/// The scanners by the expressions that they stand for.
pub(crate) const KNOWN: [(&str, Scanner); 7] = [
    (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", Scanner::Gpt2),
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        Scanner::Cl100k(1),
    ),
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        Scanner::Cl100k(3),
    ),
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        Scanner::O200k,
    ),
    (
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
        Scanner::DeepSeek,
    ),
    (r"\p{N}{1,3}", Scanner::Numbers),
    ("[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+", Scanner::Chinese),
];

impl Scanner {
    /// The scanner of an expression.
    pub(crate) fn of(expression: &str) -> Option<Self> {
        KNOWN.iter().find(|(known, _)| *known == expression).map(|(_, scanner)| *scanner)
    }

    /// Whether every text is matched from end to end, with nothing between the matches.
    pub(crate) fn covers(self) -> bool {
        matches!(self, Scanner::Gpt2 | Scanner::Cl100k(_) | Scanner::O200k)
    }

    /// Whether a match begins at byte `at` of `text`, a boundary before the end, and where it ends.
    #[inline]
    pub(crate) fn word(self, text: &str, at: usize) -> Option<usize> {
        let scan = Scan { text, classes: &CLASSES };
        match self {
            Scanner::Gpt2 => Some(scan.gpt2(at)),
            Scanner::Cl100k(n) => Some(scan.cl100k(at, n)),
            Scanner::O200k => Some(scan.o200k(at)),
            Scanner::DeepSeek => scan.deepseek(at),
            Scanner::Numbers => Some(scan.numbers(at, 3)).filter(|end| *end > at),
            Scanner::Chinese => Some(scan.chinese(at)).filter(|end| *end > at),
        }
    }
}

struct Scan<'a> {
    text: &'a str,
    classes: &'static Classes,
}

impl Scan<'_> {
    #[inline]
    fn byte(&self, at: usize) -> u8 {
        self.text.as_bytes().get(at).copied().unwrap_or(0)
    }

    #[inline]
    fn gpt2(&self, at: usize) -> usize {
        if let Some(end) = self.contraction(at, false) {
            return end;
        }
        let from = at + usize::from(self.byte(at) == b' ');
        let (bits, len) = self.classes.at(self.text, from);
        if bits & LETTER != 0 {
            return self.classes.run(self.text, from + len, LETTER, 0);
        }
        if bits & NUMBER != 0 {
            return self.classes.run(self.text, from + len, NUMBER, 0);
        }
        if len > 0 && bits & SPACE == 0 {
            return self.classes.run(self.text, from + len, 0, SPACE | LETTER | NUMBER);
        }
        self.blanks(at)
    }

    #[inline]
    fn cl100k(&self, at: usize, n_digits: usize) -> usize {
        let (bits, len) = self.classes.at(self.text, at);
        if bits & LETTER != 0 {
            return self.classes.run(self.text, at + len, LETTER, 0);
        }
        if bits & NUMBER != 0 {
            return self.numbers(at, n_digits);
        }
        if let Some(end) = self.contraction(at, true) {
            return end;
        }
        let (after, after_len) = self.classes.at(self.text, at + len);
        if bits & NEWLINE == 0 && after & LETTER != 0 {
            return self.classes.run(self.text, at + len + after_len, LETTER, 0);
        }
        self.marks(at, SPACE | LETTER | NUMBER).map_or_else(
            || self.blanks_with_lines(at),
            |end| self.classes.run(self.text, end, NEWLINE, 0),
        )
    }

    fn o200k(&self, at: usize) -> usize {
        let (bits, len) = self.classes.at(self.text, at);
        if bits & NUMBER != 0 {
            return self.numbers(at, 3);
        }
        // A mark may be the character before a word, and a word itself; the engine tries the first first.
        let before = bits & (NEWLINE | LETTER | NUMBER) == 0;
        let word = before.then(|| self.cased(at + len)).flatten().or_else(|| self.cased(at));
        if let Some(end) = word.or_else(|| before.then(|| self.upper(at + len)).flatten()) {
            return self.contraction(end, true).unwrap_or(end);
        }
        if let Some(end) = self.upper(at) {
            return self.contraction(end, true).unwrap_or(end);
        }
        match self.marks(at, SPACE | LETTER | NUMBER) {
            Some(mut end) => {
                while matches!(self.byte(end), b'\r' | b'\n' | b'/') {
                    end += 1;
                }
                end
            }
            None => self.blanks_with_lines(at),
        }
    }

    /// `U*V+` where a character may be both: the longest run of U that leaves a V behind it, and the Vs from there.
    fn cased(&self, at: usize) -> Option<usize> {
        let upper = self.classes.run(self.text, at, UPPER, 0);
        let end = self.classes.run(self.text, upper, LOWER, 0);
        if end > upper {
            return Some(end);
        }
        // None follows the run, so one of its own is given back: the last that can be a V.
        let run = &self.text[at..upper];
        let last = run.char_indices().rev().find(|(_, c)| self.classes.of(*c) & LOWER != 0);
        last.map(|(idx, c)| at + idx + c.len_utf8())
    }

    /// `U+V*`, asked where [`Scan::cased`] found nothing, so that no V follows.
    fn upper(&self, at: usize) -> Option<usize> {
        Some(self.classes.run(self.text, at, UPPER, 0)).filter(|end| *end > at)
    }

    fn deepseek(&self, at: usize) -> Option<usize> {
        let (bits, len) = self.classes.at(self.text, at);
        let ascii_letters = |from: usize| {
            let bytes = &self.text.as_bytes()[from..];
            from + bytes.iter().take_while(|b| b.is_ascii_alphabetic()).count()
        };
        if self.byte(at).is_ascii_punctuation() && ascii_letters(at + 1) > at + 1 {
            return Some(ascii_letters(at + 1));
        }
        if bits & (NEWLINE | LETTER | PUNCTUATION | SYMBOL) == 0 {
            let end = self.classes.run(self.text, at + len, LETTER | MARK, 0);
            if end > at + len {
                return Some(end);
            }
        }
        let end = self.classes.run(self.text, at, LETTER | MARK, 0);
        if end > at {
            return Some(end);
        }
        let from = at + usize::from(self.byte(at) == b' ');
        let end = self.classes.run(self.text, from, PUNCTUATION | SYMBOL, 0);
        if end > from {
            return Some(self.classes.run(self.text, end, NEWLINE, 0));
        }
        (bits & SPACE != 0).then(|| self.blanks_with_lines(at))
    }

    fn chinese(&self, at: usize) -> usize {
        let is_one = |c: &char| matches!(*c, '\u{4e00}'..='\u{9fa5}' | '\u{3040}'..='\u{309f}' | '\u{30a0}'..='\u{30ff}');
        at + self.text[at..].chars().take_while(is_one).map(char::len_utf8).sum::<usize>()
    }

    /// Up to `n` digits.
    #[inline]
    fn numbers(&self, mut at: usize, n: usize) -> usize {
        for _ in 0..n {
            let (bits, len) = self.classes.at(self.text, at);
            if bits & NUMBER == 0 {
                break;
            }
            at += len;
        }
        at
    }

    /// ` ?[^…]+`: characters of none of these classes, with a space before them.
    #[inline]
    fn marks(&self, at: usize, none: u16) -> Option<usize> {
        let from = at + usize::from(self.byte(at) == b' ');
        Some(self.classes.run(self.text, from, 0, none)).filter(|end| *end > from)
    }

    /// `'s|'t|'re|'ve|'m|'ll|'d`. Of these letters only `s` has a third form, the long one.
    #[inline]
    fn contraction(&self, at: usize, any_case: bool) -> Option<usize> {
        if self.byte(at) != b'\'' {
            return None;
        }
        let fold = |b: u8| if any_case { b.to_ascii_lowercase() } else { b };
        match (fold(self.byte(at + 1)), fold(self.byte(at + 2))) {
            (b's' | b't' | b'm' | b'd', _) => Some(at + 2),
            (b'r', b'e') | (b'v', b'e') | (b'l', b'l') => Some(at + 3),
            _ if any_case && self.text[at + 1..].starts_with('ſ') => Some(at + 1 + 'ſ'.len_utf8()),
            _ => None,
        }
    }

    /// `\s*[\r\n]+|\s+(?!\S)|\s+`: up to the last line end of the blanks; without one all blanks but the last, which belongs
    /// to the word behind it; all of them where nothing follows.
    #[inline]
    fn blanks_with_lines(&self, at: usize) -> usize {
        let end = self.classes.run(self.text, at, SPACE, 0);
        let last_line =
            self.text.as_bytes()[at..end].iter().rposition(|b| matches!(b, b'\r' | b'\n'));
        match last_line {
            Some(idx) => at + idx + 1,
            None => self.all_but_one(at, end),
        }
    }

    /// `\s+(?!\S)|\s+`
    #[inline]
    fn blanks(&self, at: usize) -> usize {
        self.all_but_one(at, self.classes.run(self.text, at, SPACE, 0))
    }

    fn all_but_one(&self, at: usize, end: usize) -> usize {
        if end == self.text.len() {
            return end;
        }
        let last = self.text[at..end].char_indices().next_back();
        match last {
            Some((idx, _)) if idx > 0 => at + idx,
            _ => end,
        }
    }
}
