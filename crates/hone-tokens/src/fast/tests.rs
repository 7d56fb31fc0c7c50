//! Scanners against the engine that runs the same expressions, classes against the same expressions, merging in both ways.

use std::ops::Range;

use fancy_regex::Regex;
use proptest::prelude::*;

use crate::fast::classes::{CLASSES, EXPRESSIONS};
use crate::fast::merges::{Merges, Word};
use crate::fast::scan::{KNOWN, Scanner};

/// Every character there is.
fn characters() -> impl Iterator<Item = char> {
    '\0'..=char::MAX
}

/// The matches of a scanner, and of the engine with its expression.
fn both(scanner: Scanner, engine: &Regex, text: &str) -> [Vec<Range<usize>>; 2] {
    let found = engine.find_iter(text).map(|found| found.expect("the text is short").range());
    let mut words = Vec::new();
    let mut at = 0;
    while let Some(c) = text[at..].chars().next() {
        match scanner.word(text, at) {
            Some(end) => {
                words.push(at..end);
                at = end;
            }
            None => at += c.len_utf8(),
        }
    }
    [words, found.collect()]
}

fn check(text: &str) {
    for (expression, scanner) in KNOWN {
        let engine = engine(expression);
        let [words, found] = both(scanner, engine, text);
        assert_eq!(words, found, "{scanner:?} {text:?}");
        assert!(!scanner.covers() || words.iter().map(Range::len).sum::<usize>() == text.len());
    }
}

fn engine(expression: &str) -> &'static Regex {
    static ENGINES: std::sync::LazyLock<Vec<Regex>> = std::sync::LazyLock::new(|| {
        KNOWN.iter().map(|(expression, _)| Regex::new(expression).expect("it is one")).collect()
    });
    let idx = KNOWN.iter().position(|(known, _)| *known == expression);
    &ENGINES[idx.expect("it is known")]
}

#[test]
fn classes_are_those_of_the_expressions_on_every_character() {
    let mut n = 0;
    for (class, expression) in EXPRESSIONS {
        let engine = regex::Regex::new(&format!("^{expression}$")).expect("it is one");
        for c in characters() {
            let is_in = CLASSES.of(c) & class != 0;
            assert_eq!(is_in, engine.is_match(c.encode_utf8(&mut [0; 4])), "{expression} {c:?}");
            n += 1;
        }
    }
    assert_eq!(n, 9 * (0x11_0000 - 0x800));
}

/// Characters of every class and of several lengths, and the ones that expressions name.
const INTERESTING: &[&str] = &[
    " ",
    " ",
    "  ",
    "\n",
    "\r",
    "\r\n",
    "\t",
    "\u{a0}",
    "\u{2028}",
    "\u{3000}",
    "\u{85}",
    "'",
    "'s",
    "'S",
    "'ſ",
    "'re",
    "'RE",
    "'Ve",
    "'m",
    "'lL",
    "'D",
    "'t",
    "’",
    "/",
    "//",
    "a",
    "b",
    "Z",
    "É",
    "ß",
    "ſ",
    "İ",
    "ı",
    "K",
    "ǅ",
    "ʰ",
    "中",
    "文",
    "ひ",
    "カ",
    "々",
    "龥",
    "龦",
    "e\u{301}",
    "\u{301}",
    "\u{20dd}",
    "\u{903}",
    "1",
    "23",
    "456",
    "7890",
    "٣",
    "Ⅷ",
    "½",
    "²",
    "𝟘",
    "𝐀",
    "𐐀",
    "𐐨",
    "!",
    "?!",
    ".",
    "-",
    "_",
    "+",
    "<|",
    "|>",
    "$",
    "€",
    "🐈",
    "👩\u{200d}🔬",
    "\u{200b}",
    "\u{feff}",
    "\0",
    "\u{7f}",
    "\u{e000}",
    "\u{10ffff}",
    "\u{fdd0}",
    "\u{378}",
    "한",
    "ᄒ\u{1161}\u{11ab}",
    "ก\u{e33}",
    "हि",
    "שׁ",
    "x",
    "Hello",
    "WORLD",
    "camelCase",
];

#[test]
fn scanners_find_what_the_engine_finds_next_to_everything() {
    let mut n = 0;
    for first in INTERESTING {
        check(first);
        for second in INTERESTING {
            check(&format!("{first}{second}"));
            check(&format!("a {first} {second}\n{first}{second}{first}  "));
            n += 1;
        }
    }
    assert_eq!(n, INTERESTING.len() * INTERESTING.len());
}

#[test]
fn scanners_find_what_the_engine_finds_in_every_character() {
    let all: Vec<char> =
        characters().filter(|c| (*c as u32) < 0x3_2000 || (*c as u32).is_multiple_of(61)).collect();
    for chunk in all.chunks(512) {
        check(&chunk.iter().flat_map(|c| [*c, 'a']).collect::<String>());
        check(&chunk.iter().flat_map(|c| [' ', *c]).collect::<String>());
    }
    assert!(all.len() > 200_000);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]
    #[test]
    fn scanners_find_what_the_engine_finds(
        bits in prop::collection::vec(prop::sample::select(INTERESTING.to_vec()), 0..30),
        noise in prop::collection::vec(any::<char>(), 0..12),
        at in 0usize..30,
    ) {
        let mut text: Vec<char> = bits.concat().chars().collect();
        let at = at.min(text.len());
        text.splice(at..at, noise);
        check(&text.into_iter().collect::<String>());
    }

    /// Both ways of merging give what merging by the definition gives.
    #[test]
    fn merges_in_both_ways(
        word in prop::collection::vec(0u32..4, 0..200),
        pairs in prop::collection::vec((0u32..12, 0u32..12), 0..24),
    ) {
        let mut merges = Merges::with_capacity(pairs.len());
        let mut plain = std::collections::HashMap::new();
        for (rank, (left, right)) in pairs.iter().enumerate() {
            // As in a vocabulary: what a pair becomes is longer than both, and belongs to it alone.
            let id = 4 + rank as u32;
            if *left < id && *right < id && !plain.contains_key(&(*left, *right)) {
                merges.insert(*left, *right, rank as u32, id);
                plain.insert((*left, *right), (rank, id));
            }
        }
        let mut expected: Vec<(u32, u32)> = word.iter().map(|id| (*id, 1)).collect();
        while let Some((rank, at)) = (1..expected.len())
            .filter_map(|i| Some((plain.get(&(expected[i - 1].0, expected[i].0))?, i - 1)))
            .map(|((rank, _), at)| (*rank, at))
            .min()
        {
            let id = 4 + rank as u32;
            let (_, len) = expected.remove(at + 1);
            expected[at] = (id, expected[at].1 + len);
        }
        let symbols: Vec<(u32, u32)> = word.iter().map(|id| (*id, 1)).collect();
        let mut ours = Word::default();
        ours.symbols.clone_from(&symbols);
        ours.merge_scanning(&merges);
        prop_assert_eq!(&ours.symbols, &expected);
        ours.symbols.clone_from(&symbols);
        ours.merge_with_heap(&merges);
        prop_assert_eq!(&ours.symbols, &expected);
    }
}
