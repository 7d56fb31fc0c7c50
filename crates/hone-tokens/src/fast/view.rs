//! A piece of a text as the model sees it, with the way back to the text.

use std::borrow::Cow;
use std::ops::Range;

/// A piece of a text, perhaps written differently.
pub(crate) struct View<'a> {
    /// What the model sees.
    pub(crate) text: Cow<'a, str>,
    /// Where the piece begins in the text.
    from: usize,
    /// For each byte of `text` the bytes of the piece that it stands for; `None` where it stands for itself, which is for the
    /// whole of its character.
    map: Option<Vec<(u32, u32)>>,
}

impl<'a> View<'a> {
    /// The piece as it is.
    pub(crate) fn plain(text: &'a str, range: Range<usize>) -> Self {
        View { text: Cow::Borrowed(&text[range.clone()]), from: range.start, map: None }
    }

    /// The piece that begins at byte `from`, written as `text`.
    pub(crate) fn mapped(text: String, from: usize, map: Vec<(u32, u32)>) -> Self {
        View { text: Cow::Owned(text), from, map: Some(map) }
    }

    /// Where the piece begins in the text.
    pub(crate) fn original_start(&self) -> usize {
        self.from
    }

    /// The bytes of the text that some bytes of the view, at least one, stand for.
    #[inline]
    pub(crate) fn original(&self, bytes: Range<usize>) -> Range<usize> {
        match &self.map {
            Some(map) => {
                let (start, end) = (map[bytes.start].0, map[bytes.end - 1].1);
                self.from + start as usize..self.from + end as usize
            }
            None => {
                let Range { mut start, mut end } = bytes;
                while !self.text.is_char_boundary(start) {
                    start -= 1;
                }
                while !self.text.is_char_boundary(end) {
                    end += 1;
                }
                self.from + start..self.from + end
            }
        }
    }

    /// A part of the view with `mark` before it and each blank written as `blank`. What is put before the text stands for its
    /// first character, as in the reference.
    pub(crate) fn rewritten(
        &self,
        part: Range<usize>,
        mark: Option<&str>,
        blank: Option<char>,
    ) -> View<'static> {
        let of = |start: usize, end: usize| {
            let bytes = self.original(start..end);
            ((bytes.start - self.from) as u32, (bytes.end - self.from) as u32)
        };
        let source = &self.text[part.clone()];
        let mut text = String::with_capacity(source.len() * 5 / 4 + 3);
        let mut map = Vec::with_capacity(source.len() * 5 / 4 + 3);
        if let (Some(mark), Some(first)) = (mark, source.chars().next()) {
            text.push_str(mark);
            map.resize(mark.len(), of(part.start, part.start + first.len_utf8()));
        }
        for (idx, c) in source.char_indices() {
            let at = part.start + idx;
            let bytes = of(at, at + c.len_utf8());
            match blank {
                Some(blank) if c == ' ' => text.push(blank),
                _ => text.push(c),
            }
            map.resize(text.len(), bytes);
        }
        View::mapped(text, self.from, map)
    }
}
