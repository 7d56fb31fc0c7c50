//! Where in what a template wrote the bytes of a message's text are.

use std::ops::Range;

use crate::json;
use crate::python::is_space;

/// How a piece of a message's text was written: with white space trimmed at its ends, or as JSON.
pub(crate) struct Placed {
    /// The bytes of the text that were written.
    pub(crate) range: Range<usize>,
    is_json: bool,
}

impl Placed {
    pub(crate) fn of(text: &str, range: Range<usize>, written: &str) -> Option<Self> {
        let said = &text[range.clone()];
        if json::escaped(said) == written && said != written {
            return Some(Placed { range, is_json: true });
        }
        let blanks = said.len() - said.trim_start_matches(is_space).len();
        let starts = said.char_indices().map(|(at, _)| at).take_while(|at| *at <= blanks);
        let trimmed = starts.chain([said.len()]).find(|at| said[*at..].starts_with(written))?;
        let start = range.start + trimmed;
        Some(Placed { range: start..start + written.len(), is_json: false })
    }

    /// Where in what was written a byte of the text is.
    pub(crate) fn offset(&self, text: &str, at: usize) -> usize {
        let before = &text[self.range.start..at];
        if self.is_json { json::escaped(before).len() } else { before.len() }
    }
}
