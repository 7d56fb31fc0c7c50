//! Thoughts that the text of an answer opens with: `<think>hm</think>hello`.
//!
//! Most data of models that think is written like this, and models read the marks as the control
//! tokens that they are for their vocabularies. Some templates take such a text apart and write the
//! marks themselves, some write it as it is; what a model learns must not hang on that. So the two
//! marks of one whole thought at the very start of an answer are the frame of the answer, as if the
//! template had written them, and what is between them is what the answer thinks. Where the template
//! opens the thought itself, at the end of its header, the mark that closes it is. Any other mark,
//! further on, in a thought that is not closed, or in what another role says, is text.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use hone_schema::{Part, THOUGHT_MARKS};

use crate::locate::Block;
use crate::placed::Placed;
use crate::python::is_space;
use crate::words::Leaf;

/// The places of a thought's marks in the text of an answer; the first is empty where the template
/// has opened the thought before it.
#[derive(Debug, PartialEq, Eq)]
struct Thought {
    opens: Range<usize>,
    closes: Range<usize>,
}

/// The thought that a text opens with; `before` is what the template wrote before it.
fn thought(before: &str, text: &str) -> Option<Thought> {
    let said = text.trim_start_matches(is_space);
    let start = text.len() - said.len();
    let before = before.trim_end_matches(is_space);
    THOUGHT_MARKS.iter().find_map(|[open, close]| {
        let (inside, open_len) = match said.strip_prefix(open) {
            Some(inside) => (inside, open.len()),
            None if before.ends_with(open) => (said, 0),
            None => return None,
        };
        let end = inside.find(close)?;
        if inside[..end].contains(open) {
            return None;
        }
        let opens = start..start + open_len;
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
    // The first text of the content of each answer; only that may open with a thought.
    let mut first: Vec<bool> = vec![false; leaves.len()];
    let mut seen: HashSet<usize> = HashSet::new();
    for (leaf, is_first) in leaves.iter().zip(&mut first) {
        let message = leaf.message.filter(|_| leaf.key == "content" && is_answer(leaf));
        *is_first = message.is_some_and(|message| seen.insert(message));
    }
    let mut thoughts: HashMap<usize, Option<Thought>> = HashMap::new();
    let mut framed: Vec<Block> = Vec::with_capacity(blocks.len());
    let mut end = 0;
    for block in blocks {
        let leaf = &leaves[block.leaf];
        let before = &text[end..block.at.start];
        end = block.at.end;
        if block.part != Part::Content || !first[block.leaf] {
            framed.push(block);
            continue;
        }
        let found = thoughts.entry(block.leaf).or_insert_with(|| thought(before, &leaf.text));
        match found {
            Some(thought) => cut(block, leaf, text, thought, &mut framed),
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
        check_behind("<|assistant|>", text, picture);
    }

    fn check_behind(before: &str, text: &str, picture: &str) {
        let found = thought(before, text).map(|Thought { opens, closes }| {
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
        check_behind("<a><think>\n", "hm</think>b", "[]hm[</think>]b");
        check_behind("<a><think>\n", "<think>hm</think>b", "[<think>]hm[</think>]b");
        check_behind("<a><think>\n", "hm", "none");
    }
}
