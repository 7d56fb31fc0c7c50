//! How much of the white space at the ends of messages a template left.
//!
//! The guarded text says exactly what is the template's own, with nothing of the messages trimmed.
//! The plain text has the same words in the same order; between two of them stand the template's
//! own text and what is left of the messages' ends.

use std::ops::Range;

use crate::locate::Block;
use crate::python::is_space;
use crate::words::Item;

/// Steps that the search for trimmed ends may take: more are needed by no conversation that was
/// seen.
const STEPS_MAX: usize = 10_000;

/// Some text between two words: the template's own, or the end of a block, which may have been
/// trimmed.
struct Piece<'a> {
    text: &'a str,
    /// The block, for the end of one.
    block: Option<usize>,
    trim_start: bool,
    trim_end: bool,
}

/// Step 4: the blocks of the guarded text as they lie in the plain one.
pub(crate) fn fit(
    found: &[Block],
    guarded: &str,
    words: &[Item],
    text: &str,
) -> Option<Vec<Block>> {
    let mut blocks: Vec<Block> = found.to_vec();
    let mut pieces: Vec<Piece<'_>> = Vec::new();
    let (mut guarded_at, mut text_at) = (0, 0);
    let mut n_words = 0;
    let end = |guarded_at: usize| Piece {
        text: &guarded[guarded_at..],
        block: None,
        trim_start: false,
        trim_end: false,
    };
    for (idx, block) in found.iter().enumerate() {
        let own = Piece {
            text: &guarded[guarded_at..block.at.start],
            block: None,
            trim_start: false,
            trim_end: false,
        };
        pieces.push(own);
        guarded_at = block.at.end;
        if block.core.is_empty() {
            let whole = &guarded[block.at.clone()];
            pieces.push(Piece { text: whole, block: Some(idx), trim_start: true, trim_end: true });
            continue;
        }
        let head = &guarded[block.at.start..block.core.start];
        pieces.push(Piece { text: head, block: Some(idx), trim_start: true, trim_end: false });
        let n = words[n_words..]
            .iter()
            .take_while(|w| w.leaf == block.leaf && w.range.start < block.range.end)
            .scan(None, |before: &mut Option<usize>, w| {
                // A block never goes back in its leaf: the same words again are another block.
                let goes_on = before.is_none_or(|before| before < w.n_before);
                *before = Some(w.n_before);
                goes_on.then_some(())
            })
            .count();
        let own_words = words.get(n_words..n_words + n).filter(|words| !words.is_empty())?;
        n_words += n;
        let core = own_words[0].at.start..own_words[n - 1].at.end;
        if text[core.clone()] != guarded[block.core.clone()] {
            return None;
        }
        place(&mut blocks, &pieces, text.get(text_at..core.start)?, text_at)?;
        text_at = core.end;
        blocks[idx].at.end = core.end;
        blocks[idx].core = core;
        pieces.clear();
        let tail = &guarded[block.core.end..block.at.end];
        pieces.push(Piece { text: tail, block: Some(idx), trim_start: false, trim_end: true });
    }
    pieces.push(end(guarded_at));
    place(&mut blocks, &pieces, &text[text_at..], text_at)?;
    Some(blocks)
}

/// Finds how much of each piece is left in `gap`, which begins at `at` of the plain text, and moves
/// the blocks there.
fn place(blocks: &mut [Block], pieces: &[Piece<'_>], gap: &str, at: usize) -> Option<()> {
    let full: Vec<Range<usize>> = pieces.iter().map(|p| 0..p.text.len()).collect();
    let trimmed: Vec<Range<usize>> = pieces.iter().map(|p| trimmed(p, usize::MAX)).collect();
    let fits = |ranges: &[Range<usize>]| {
        let left = pieces.iter().zip(ranges).map(|(p, range)| &p.text[range.clone()]);
        left.collect::<String>() == gap
    };
    let ranges = if fits(&full) {
        full
    } else if fits(&trimmed) {
        trimmed
    } else {
        let mut steps = STEPS_MAX;
        let mut ranges = Vec::with_capacity(pieces.len());
        search(pieces, gap, &mut ranges, &mut steps).then_some(ranges)?
    };
    let mut start = at;
    for (piece, range) in pieces.iter().zip(ranges) {
        let end = start + range.len();
        if let Some(block) = piece.block {
            let block = &mut blocks[block];
            match (piece.trim_start, piece.trim_end) {
                (true, true) => block.at = start..end,
                (true, false) => block.at.start = start,
                _ => block.at.end = end,
            }
        }
        start = end;
    }
    Some(())
}

/// What is left of a piece when at most `n` characters of white space are trimmed at each side that
/// may be.
fn trimmed(piece: &Piece<'_>, n: usize) -> Range<usize> {
    let (mut start, mut end) = (0, piece.text.len());
    if piece.trim_start {
        let spaces = piece.text.chars().take_while(|c| is_space(*c)).take(n);
        start = spaces.map(char::len_utf8).sum();
    }
    if piece.trim_end {
        let spaces = piece.text[start..].chars().rev().take_while(|c| is_space(*c)).take(n);
        end -= spaces.map(char::len_utf8).sum::<usize>();
    }
    start..end
}

/// Tries every way to trim, depth first, the least trimmed first.
fn search(
    pieces: &[Piece<'_>],
    gap: &str,
    ranges: &mut Vec<Range<usize>>,
    steps: &mut usize,
) -> bool {
    let Some((piece, rest)) = pieces.split_first() else {
        return gap.is_empty();
    };
    let is_elastic = piece.trim_start || piece.trim_end;
    let n_max = if is_elastic { piece.text.chars().count() } else { 0 };
    let mut last = None;
    for n in 0..=n_max {
        if *steps == 0 {
            return false;
        }
        *steps -= 1;
        let range = trimmed(piece, n);
        if last.as_ref() == Some(&range) {
            break;
        }
        if let Some(gap) = gap.strip_prefix(&piece.text[range.clone()]) {
            ranges.push(range.clone());
            if search(rest, gap, ranges, steps) {
                return true;
            }
            ranges.pop();
        }
        last = Some(range);
    }
    false
}
