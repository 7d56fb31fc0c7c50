//! Between which characters a word can be cut without a change of ids.
//!
//! SentencePiece's vocabularies come without a pre-tokenizer: the whole text is one word. But a merge over the place between
//! two characters has a left part that ends with the first and a right part that begins with the second, and where there is no
//! such merge the text falls into words as good as any: short, and most of them said before.

use crate::fast::json;
use crate::fast::texts::Texts;

/// Characters that are looked at: ASCII, and the one that blanks are written as.
const N: usize = 129;

/// Pairs of characters that some merge joins, or that no one knows about.
pub(crate) struct Joins {
    mark: char,
    table: Box<[bool]>,
}

impl Joins {
    /// The pairs of a model, of which every character becomes some token: nothing is dropped. `mark` is what blanks are
    /// written as.
    pub(crate) fn new(model: &json::Model<'_>, texts: &Texts, mark: char) -> Self {
        let mut joins = Joins { mark, table: vec![false; N * N].into() };
        let is_byte = |token: &str| token.len() == 6 && token.starts_with("<0x");
        let bytes = (0..=255).map(|b| texts.id(&format!("<0x{b:02X}>")));
        // With a token for every byte nothing is unknown; without, only characters of the vocabulary are sure to stand alone.
        let mut falls_back = model.byte_fallback == Some(true) && bytes.flatten().count() == 256;
        for (left, right) in &model.merges.0 {
            falls_back &= !is_byte(left) && !is_byte(right);
            let ends = left.chars().next_back().and_then(|c| joins.index(c));
            if let (Some(end), Some(start)) =
                (ends, right.chars().next().and_then(|c| joins.index(c)))
            {
                joins.table[end * N + start] = true;
            }
        }
        for idx in 0..N {
            let c = if idx < 128 { char::from(idx as u8) } else { mark };
            if !falls_back && texts.id(c.encode_utf8(&mut [0; 4])).is_none() {
                (0..N).for_each(|other| joins.table[idx * N + other] = true);
                (0..N).for_each(|other| joins.table[other * N + idx] = true);
            }
        }
        joins
    }

    fn index(&self, c: char) -> Option<usize> {
        if c.is_ascii() { Some(c as usize) } else { (c == self.mark).then_some(128) }
    }

    /// Where the word that begins at byte `at` ends: at the first place that no merge goes over, or at the end.
    pub(crate) fn word(&self, text: &str, at: usize) -> usize {
        let mut before: Option<usize> = None;
        for (idx, c) in text[at..].char_indices() {
            let index = self.index(c);
            if let (Some(before), Some(index)) = (before, index)
                && !self.table[before * N + index]
            {
                return at + idx;
            }
            before = index;
        }
        text.len()
    }
}
