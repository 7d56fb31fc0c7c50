//! Where in a rendered text the texts of the messages are.
//!
//! 1. Render the conversation. This text is what is trained; nothing below changes a byte of it.
//! 2. Render it with each text of each message replaced (module `words`) and put the texts back: that
//!    has to give the same text, and then it says where each text is. Where it does not, the template
//!    looks inside, and the same is done word by word. Where that does not either, it looks at what
//!    messages say (`'</think>' in content`), or writes them as JSON; then what JSON escapes, and
//!    after that each literal of the template that occurs in a message, is left as it is; texts that
//!    are nothing but such a literal only where all else fails.
//! 3. What lies between two neighbouring words of a message and equals what lies there in the
//!    message belongs to the message.
//! 4. White space at the ends of messages may have been trimmed, or may stand beside white space of
//!    the template. Render with guards that trimming stops at: now the template's own text is known
//!    exactly, and how much of each end is left in the first text follows by comparison. Only rows
//!    that have such ends pay for this.
//!
//! 5. Thoughts that an answer's text opens with are told from it (module `inline`).
//!
//! A row for which this fails is refused if it could make a token of a message look like one of the
//! template; otherwise the white space in question counts as the template's.

use std::borrow::Cow;
use std::collections::HashSet;
use std::ops::Range;

use hone_schema::Part;
use serde_json::{Map, Value};

use crate::fit::fit;
use crate::inline::framed;
use crate::json;
use crate::python::is_space;
use crate::symbols::{self, Free};
use crate::template::{ChatTemplate, Given, TemplateError, values};
use crate::words::{self, Decoded, Guards, Item, Keep, Leaf, Masked, Whole, is_said};

/// Role whose messages are answers.
pub(crate) const ANSWER: &str = "assistant";

/// Bytes of each text that an error shows.
const SHOWN_BYTES: usize = 120;

/// Some consecutive text of one message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    pub(crate) leaf: usize,
    /// Index of the message; `None` for tools and documents.
    pub(crate) message: Option<usize>,
    /// What of the message it is.
    pub(crate) part: Part,
    /// Its bytes in the leaf.
    pub(crate) range: Range<usize>,
    /// Its bytes in the text.
    pub(crate) at: Range<usize>,
    /// Words of the leaf up to and with its last one.
    pub(crate) n_words: usize,
    /// From the first to the last of its words in the text; empty where it has none.
    pub(crate) core: Range<usize>,
}

/// The text of a conversation, and where its messages are in it.
pub(crate) struct Found {
    pub(crate) text: String,
    /// In the order of the text.
    pub(crate) blocks: Vec<Block>,
    /// What generation blocks wrote.
    pub(crate) generated: Vec<Range<usize>>,
    /// What the messages and the tools say.
    pub(crate) leaves: Vec<Leaf>,
    /// The messages as the template is given them.
    pub(crate) given_to: Vec<minijinja::Value>,
}

/// Renders a conversation and finds its messages in the text.
pub(crate) fn blocks(
    template: &ChatTemplate,
    messages: &[&Map<String, Value>],
    given: &Given,
) -> Result<Found, TemplateError> {
    let given_to = values(messages.iter().map(|message| Cow::Borrowed(*message)));
    let mut reserved = template.reserved.clone();
    let maps = messages.iter().copied().chain(given.variables);
    maps.for_each(|map| symbols::reserve_all(map, &mut reserved));
    for value in [given.tools, given.documents].into_iter().flatten() {
        symbols::reserve(value, &mut reserved);
    }
    let (text, generated) = plain(template, given_to.clone(), given, &reserved)?;
    let search = Search { template, messages, given, reserved, text: &text };
    let (blocks, leaves) = search.run()?;
    template.check_made(messages, given, &text, &search.reserved)?;
    let blocks = framed(blocks, &leaves, &text, |leaf| search.is_answer(leaf));
    Ok(Found { text, blocks, generated, leaves, given_to })
}

/// Step 1: the text, and what generation blocks wrote of it, by characters that they put around it.
fn plain(
    template: &ChatTemplate,
    messages: Vec<minijinja::Value>,
    given: &Given,
    reserved: &HashSet<char>,
) -> Result<(String, Vec<Range<usize>>), TemplateError> {
    let mut free = Free::new(reserved);
    let marks = free.next().zip(free.next()).filter(|_| template.has_generation);
    let Some((open, close)) = marks else {
        return Ok((template.render_values(messages, given, false, None)?, Vec::new()));
    };
    let marked = template.render_values(messages, given, false, Some([open, close]))?;
    let mut text = String::with_capacity(marked.len());
    let (mut opened, mut generated) = (Vec::new(), Vec::new());
    let mut rest = marked.as_str();
    while let Some(at) = rest.find([open, close]) {
        text.push_str(&rest[..at]);
        let mark = rest[at..].chars().next();
        match (mark == Some(open), opened.pop()) {
            (true, outer) => {
                opened.extend(outer);
                opened.push(text.len());
            }
            (false, Some(start)) => generated.push(start..text.len()),
            (false, None) => {}
        }
        rest = &rest[at + mark.map_or(0, char::len_utf8)..];
    }
    text.push_str(rest);
    Ok((text, generated))
}

type Places = (Vec<Block>, Vec<Leaf>);

struct Search<'a> {
    template: &'a ChatTemplate,
    messages: &'a [&'a Map<String, Value>],
    given: &'a Given<'a>,
    reserved: HashSet<char>,
    text: &'a str,
}

impl Search<'_> {
    fn run(&self) -> Result<Places, TemplateError> {
        let kept = |whole| Keep::Literals(&self.template.literals, whole);
        let literals = [Whole::Words, Whole::SaidWords, Whole::Kept].map(kept);
        let mut marked = String::new();
        for keep in [Keep::Ends, Keep::Space, Keep::Json].into_iter().chain(literals) {
            let Some((masked, decoded)) = self.marked(keep, Guards::None) else {
                continue;
            };
            if decoded.text == self.text {
                self.check_whole(&masked.leaves)?;
                return self.with_ends(keep, masked, decoded);
            }
            marked = decoded.text;
        }
        Err(self.unknown("the text changes when the words of the messages do", &marked))
    }

    /// The conversation rendered with its words marked, and put back.
    fn marked(&self, keep: Keep<'_>, guards: Guards) -> Option<(Masked, Decoded)> {
        let masked = words::mask(self.messages, self.given, &self.reserved, keep, guards)?;
        let given = Given {
            tools: masked.tools.as_ref(),
            documents: masked.documents.as_ref(),
            variables: self.given.variables,
        };
        let messages = masked.messages.clone();
        let rendered = self.template.render_values(messages, &given, false, None).ok()?;
        let decoded = masked.decode(&rendered)?;
        Some((masked, decoded))
    }

    /// Step 4.
    fn with_ends(
        &self,
        keep: Keep<'_>,
        masked: Masked,
        decoded: Decoded,
    ) -> Result<Places, TemplateError> {
        let blocks = merged(&decoded.items, &masked.leaves, self.text, false);
        if !self.has_open_ends(&blocks, &masked.leaves) {
            return Ok((blocks, masked.leaves));
        }
        let words: Vec<Item> = decoded.items;
        for guards in [Guards::Close, Guards::All, Guards::Filled, Guards::Around] {
            let Some((guarded_mask, guarded)) = self.marked(keep, guards) else {
                continue;
            };
            let same_words = guarded
                .items
                .iter()
                .filter(|item| !item.is_guard)
                .map(|item| (item.leaf, &item.range))
                .eq(words.iter().map(|item| (item.leaf, &item.range)));
            let leaves = &guarded_mask.leaves;
            let found = merged(&guarded.items, leaves, &guarded.text, true);
            if same_words && let Some(blocks) = fit(&found, &guarded.text, &words, self.text) {
                let blocks = rejoined(blocks, leaves, self.text);
                if !self.loses_a_piece(leaves, &blocks) {
                    return Ok((blocks, masked.leaves));
                }
            }
        }
        // White space in question counts as the template's. In an answer so do literals such as
        // `</think>`, which a template that looks for them writes itself; in what others say they
        // could be forged.
        if self.loses_a_piece(&masked.leaves, &blocks) {
            let why = "a message holds a piece of a control token that the template looks for";
            return Err(self.unknown(why, self.text));
        }
        Ok((blocks, masked.leaves))
    }

    /// Whether what somebody else than the model says is in no block, and could be a piece of a
    /// control token.
    fn loses_a_piece(&self, leaves: &[Leaf], blocks: &[Block]) -> bool {
        let mut owned: Vec<Vec<Range<usize>>> = vec![Vec::new(); leaves.len()];
        blocks.iter().for_each(|block| owned[block.leaf].push(block.range.clone()));
        leaves.iter().zip(owned).any(|(leaf, owned)| {
            let is_piece = |run: Range<usize>| {
                self.template.control.has_piece(leaf.text[run].trim_matches(is_space))
            };
            !self.is_answer(leaf) && unowned(leaf, owned).into_iter().any(is_piece)
        })
    }

    /// Refuses texts that are nothing but a literal and had to be kept, where they could be taken
    /// for the template's: of those there is no telling where they are.
    fn check_whole(&self, leaves: &[Leaf]) -> Result<(), TemplateError> {
        let is_open = |leaf: &&Leaf| {
            let control = self.template.control.find(&leaf.text).is_some();
            match self.is_answer(leaf) && leaf.part != Part::ToolCall {
                // What a template looks for in an answer it writes itself.
                true => is_said(leaf.message, &leaf.key) && !control,
                false => is_said(leaf.message, &leaf.key) || control,
            }
        };
        match leaves.iter().filter(|leaf| leaf.is_literal()).find(is_open) {
            Some(leaf) => {
                let why = "a text is nothing but what the template looks for";
                Err(TemplateError::Provenance {
                    why,
                    plain: around(self.text, 0),
                    marked: around(&leaf.text, 0),
                })
            }
            None => Ok(()),
        }
    }

    fn is_answer(&self, leaf: &Leaf) -> bool {
        let role = leaf.message.and_then(|at| self.messages[at].get("role"));
        role.and_then(Value::as_str) == Some(ANSWER)
    }

    /// Whether there is text of messages that no word bounds.
    fn has_open_ends(&self, blocks: &[Block], leaves: &[Leaf]) -> bool {
        let is_blank = |leaf: &Leaf| leaf.text.chars().all(is_space);
        blocks.iter().any(|b| b.range != (0..leaves[b.leaf].text.len()))
            || leaves.iter().any(|l| is_blank(l) && (self.is_answer(l) || !l.text.is_empty()))
            || leaves.iter().any(|l| !l.literals.is_empty())
    }

    fn unknown(&self, why: &'static str, marked: &str) -> TemplateError {
        let same = self.text.bytes().zip(marked.bytes()).take_while(|(a, b)| a == b).count();
        TemplateError::Provenance {
            why,
            plain: around(self.text, same),
            marked: around(marked, same),
        }
    }
}

/// What of a text that is written is in no block, `owned` being what is: of one without a block, its
/// literals.
fn unowned(leaf: &Leaf, mut owned: Vec<Range<usize>>) -> Vec<Range<usize>> {
    if owned.is_empty() {
        let runs = leaf.literals.chunk_by(|a, b| a.end == b.start);
        return runs.filter_map(|run| Some(run.first()?.start..run.last()?.end)).collect();
    }
    owned.sort_unstable_by_key(|range| range.start);
    let starts = std::iter::once(0).chain(owned.iter().map(|range| range.end));
    let ends = owned.iter().map(|range| range.start).chain([leaf.text.len()]);
    starts.zip(ends).filter(|(start, end)| start < end).map(|(start, end)| start..end).collect()
}

/// The text around a place.
pub(crate) fn around(text: &str, at: usize) -> String {
    let boundary = |mut at: usize| {
        while !text.is_char_boundary(at) {
            at -= 1;
        }
        at
    };
    let start = boundary(at.min(text.len()).saturating_sub(SHOWN_BYTES / 2));
    let end = boundary((start + SHOWN_BYTES).min(text.len()));
    text[start..end].to_owned()
}

/// Step 3: joins neighbouring items of a leaf that have between them what the leaf has there; with
/// `apart`, not across a literal that was kept, because a template that looks for it may trim what
/// stands beside it.
fn merged(items: &[Item], leaves: &[Leaf], text: &str, apart: bool) -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    for item in items {
        let n_words = item.n_before + usize::from(!item.is_guard);
        let core = if item.is_guard { item.at.start..item.at.start } else { item.at.clone() };
        if let Some(last) = blocks.last_mut()
            && last.leaf == item.leaf
            && last.n_words == item.n_before
            && last.range.end <= item.range.start
            && !(apart && leaves[item.leaf].has_literal_in(last.range.end..item.range.start))
            && is_same(
                &leaves[item.leaf].text[last.range.end..item.range.start],
                &text[last.at.end..item.at.start],
            )
        {
            last.range.end = item.range.end;
            last.at.end = item.at.end;
            last.n_words = n_words;
            if last.core.is_empty() {
                last.core = core;
            } else if !item.is_guard {
                last.core.end = core.end;
            }
            continue;
        }
        blocks.push(Block {
            leaf: item.leaf,
            message: leaves[item.leaf].message,
            part: leaves[item.leaf].part,
            range: item.range.clone(),
            at: item.at.clone(),
            n_words,
            core,
        });
    }
    blocks
}

/// Joins blocks across literals that stand in the text as they stand in the message, and gives
/// blocks the literals that begin or end their message: what equals the message's text is the
/// message's, so that no token can be forged.
fn rejoined(blocks: Vec<Block>, leaves: &[Leaf], text: &str) -> Vec<Block> {
    let mut joined: Vec<Block> = Vec::new();
    for mut block in blocks {
        let leaf = &leaves[block.leaf];
        let free = joined.last().map_or(0, |last| last.at.end)..block.at.start;
        let head = leaf.text[..block.range.start].trim_start_matches(is_space);
        if !head.is_empty() && text[free].ends_with(head) {
            block.at.start -= head.len();
            block.range.start = 0;
        }
        match joined.last_mut() {
            Some(last)
                if last.leaf == block.leaf
                    && last.range.end <= block.range.start
                    && last.at.end <= block.at.start
                    && is_same(
                        &leaf.text[last.range.end..block.range.start],
                        &text[last.at.end..block.at.start],
                    ) =>
            {
                last.at.end = block.at.end;
                last.range.end = block.range.end;
            }
            _ => joined.push(block),
        }
    }
    for at in 0..joined.len() {
        let end = joined.get(at + 1).map_or(text.len(), |next| next.at.start);
        let block = &mut joined[at];
        let tail = leaves[block.leaf].text[block.range.end..].trim_end_matches(is_space);
        if !tail.is_empty() && text[block.at.end..end].starts_with(tail) {
            block.at.end += tail.len();
            block.range.end += tail.len();
        }
    }
    joined
}

/// Whether the template wrote `kept` as it is, or as JSON writes it.
fn is_same(kept: &str, written: &str) -> bool {
    kept == written || json::escaped(kept) == written
}
