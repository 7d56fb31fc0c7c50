//! Thoughts that the text of an answer opens with: `<think>hm</think>hello`.
//!
//! Most data of models that think is written like this, and models read the marks as the control
//! tokens that they are for their vocabularies. Some templates take such a text apart and write the
//! marks themselves, some write it as it is; what a model learns must not hang on that. So the two
//! marks of one whole thought at the very start of an answer are the frame of the answer, as if the
//! template had written them, and what is between them is what the answer thinks. Any other mark,
//! further on, in a thought that is not closed, or in what another role says, is text.

use std::ops::Range;

use hone_schema::{Part, THOUGHT_MARKS};

use crate::locate::Block;
use crate::placed::Placed;
use crate::python::is_space;
use crate::words::Leaf;

/// The places of a thought in the text of an answer.
#[derive(Debug, PartialEq, Eq)]
struct Thought {
    opens: Range<usize>,
    closes: Range<usize>,
}

/// The thought that a text opens with.
fn thought(text: &str) -> Option<Thought> {
    let said = text.trim_start_matches(is_space);
    let start = text.len() - said.len();
    THOUGHT_MARKS.iter().find_map(|[open, close]| {
        let inside = said.strip_prefix(open)?;
        let end = inside.find(close)?;
        if inside[..end].contains(open) {
            return None;
        }
        let opens = start..start + open.len();
        let closes = opens.end + end..opens.end + end + close.len();
        Some(Thought { opens, closes })
    })
}

/// Cuts the blocks of answers at the thought that they open with.
pub(crate) fn framed(
    blocks: Vec<Block>,
    leaves: &[Leaf],
    text: &str,
    is_answer: impl Fn(&Leaf) -> bool,
) -> Vec<Block> {
    let mut framed = Vec::with_capacity(blocks.len());
    for block in blocks {
        let leaf = &leaves[block.leaf];
        let is_said = block.part == Part::Content && leaf.key == "content" && is_answer(leaf);
        let first = || leaves.iter().find(|l| l.message == leaf.message && l.key == leaf.key);
        let opens = is_said && first().is_some_and(|first| std::ptr::eq(first, leaf));
        match opens.then(|| thought(&leaf.text)).flatten() {
            Some(thought) => cut(block, leaf, text, &thought, &mut framed),
            None => framed.push(block),
        }
    }
    framed
}

/// Cuts a block at the marks of a thought, as far as it holds them.
fn cut(block: Block, leaf: &Leaf, text: &str, thought: &Thought, into: &mut Vec<Block>) {
    let Some(placed) = Placed::of(&leaf.text, block.range.clone(), &text[block.at.clone()]) else {
        return into.push(block);
    };
    let Thought { opens, closes } = thought;
    let parts = [
        (0..opens.start, Part::Content),
        (opens.clone(), Part::Scaffold),
        (opens.end..closes.start, Part::Reasoning),
        (closes.clone(), Part::Scaffold),
        (closes.end..leaf.text.len(), Part::Content),
    ];
    for (range, part) in parts {
        let start = range.start.max(placed.range.start);
        let end = range.end.min(placed.range.end);
        if start < end {
            let at = |at: usize| block.at.start + placed.offset(&leaf.text, at);
            let (range, at) = (start..end, at(start)..at(end));
            into.push(Block { part, range, at, ..block.clone() });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The text with its marks in brackets.
    fn check(text: &str, picture: &str) {
        let found = thought(text).map(|Thought { opens, closes }| {
            let [before, open] = [&text[..opens.start], &text[opens.clone()]];
            let [inside, close] = [&text[opens.end..closes.start], &text[closes.clone()]];
            format!("{before}[{open}]{inside}[{close}]{}", &text[closes.end..])
        });
        assert_eq!(found.as_deref().unwrap_or("none"), picture, "{text:?}");
    }

    #[test]
    fn only_a_whole_thought_at_the_start_is_one() {
        check("<think>hm</think>hello", "[<think>]hm[</think>]hello");
        check("\n<think>\nhm\n</think>\n\nb</think>", "\n[<think>]\nhm\n[</think>]\n\nb</think>");
        check("<think></think>", "[<think>][</think>]");
        check("[THINK]hm[/THINK]b", "[[THINK]]hm[[/THINK]]b");
        check("a<think>hm</think>b", "none");
        check("<think>hm", "none");
        check("hm</think>b", "none");
        check("<think><think></think>", "none");
        check("<think>hm</thinking>", "none");
        check("", "none");
    }
}
