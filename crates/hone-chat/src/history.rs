//! Templates that rewrite history: what an answer says when it is the last, and leave out once
//! others follow.
//!
//! Models that think are trained so, and served so: the thought of an earlier turn is not in the
//! prompt. A conversation rendered once then lacks those thoughts, and what it trains of an
//! earlier answer (no thought at all, or an empty one) is what the model must never write. So an
//! answer that loses words is looked at twice: if the conversation up to it still has them, the
//! row is expanded, refused or taken as it is, as the user decides. So is an answer behind which
//! stands what a served model reads before it: some templates put the system message or the tools
//! before the last question.
//!
//! Nothing is rendered twice for the rows of templates that keep what messages say.

use std::collections::HashSet;
use std::ops::Range;

use hone_schema::{Message, Part, Share};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::locate::{ANSWER, Block, Found, around, blocks};
use crate::python::is_space;
use crate::template::{ChatTemplate, Given, Located, TemplateError};
use crate::words::Leaf;

/// What becomes of a conversation of which the template rewrites a trained answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Rewritten {
    /// Each such answer is trained in a sample of its own, which ends with it.
    #[default]
    Expand,
    /// It is refused.
    Refuse,
    /// It is trained as it is rendered.
    Accept,
}

/// A conversation, or one answer of it with what goes before.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Index of the answer, where the sample ends with one and trains nothing else.
    pub answer: Option<usize>,
    /// Which of the answers it is there for.
    pub share: Share,
    /// Its text.
    pub located: Located,
}

/// What a report counts of a row that was taken although its history is rewritten.
const REWRITTEN: &str = "history rewritten";

/// What a report counts of a row in which an answer lacks words even when it is the last.
const LEFT_OUT: &str = "part of an answer left out by the template";

impl ChatTemplate {
    /// The samples that train what a row trains, each answer as a served model has to write it:
    /// the conversation itself, and one sample for each answer that it lacks words of. Each message
    /// has its weight in one of them: an answer of a sample of its own weighs nothing in the
    /// conversation, and what others say weighs nothing in such a sample. The conversation is not
    /// among them when nothing that is left of it has a weight.
    ///
    /// # Errors
    /// As [`ChatTemplate::locate`]; [`TemplateError::Rewritten`] and [`TemplateError::Unsaid`].
    pub fn samples(
        &self,
        messages: &[Message],
        given: &Given,
        weight: f32,
        policy: Rewritten,
    ) -> Result<Vec<Sample>, TemplateError> {
        let maps: Vec<&Map<String, Value>> = messages.iter().map(|m| &m.value).collect();
        self.check_names(&maps, given)?;
        let found = blocks(self, &maps, given)?;
        let (served, left_out) = self.rewritten(&found, messages, &maps, given)?;
        let mut note = left_out.then_some(LEFT_OUT);
        let mut whole = messages.to_vec();
        let last = messages.iter().rposition(|m| m.role == ANSWER);
        let mut samples = Vec::new();
        for (answer, served) in served {
            match policy {
                Rewritten::Accept => note = Some(REWRITTEN),
                Rewritten::Refuse => return Err(refusal(answer, &found.text, &served.text)),
                Rewritten::Expand => {
                    silence(&mut whole[answer]);
                    let mut messages = messages[..=answer].to_vec();
                    messages[..answer].iter_mut().for_each(silence);
                    let located = self.spans_of(served, &messages, given, weight)?;
                    let share = if last > Some(answer) { Share::Earlier } else { Share::Main };
                    samples.push(Sample { answer: Some(answer), share, located });
                }
            }
        }
        if samples.is_empty() || whole.iter().any(|m| m.weight > 0.0) {
            // A policy may train other roles than the answers'.
            let has_last = !samples.iter().any(|sample| sample.share == Share::Main);
            let share = match whole.iter().any(is_trained) {
                _ if samples.is_empty() => Share::Main,
                false => Share::Rest,
                true if has_last => Share::Main,
                true => Share::Earlier,
            };
            let mut located = self.spans_of(found, &whole, given, weight)?;
            located.notes.extend(note);
            samples.push(Sample { answer: None, share, located });
        }
        Ok(samples)
    }

    /// Answers that lack words which they have when they are the last, or before which words lack,
    /// each with the conversation up to it; and whether an answer lacks words in any case.
    ///
    /// # Errors
    /// Not a word of an answer is in the text: what would be trained is that it has none.
    fn rewritten(
        &self,
        found: &Found,
        messages: &[Message],
        maps: &[&Map<String, Value>],
        given: &Given,
    ) -> Result<(Vec<(usize, Found)>, bool), TemplateError> {
        let (mut rewritten, mut left_out) = (Vec::new(), false);
        let trained = messages.iter().enumerate().filter(|(_, m)| is_trained(m));
        let is_moved = found.is_out_of_order();
        for (answer, _) in trained {
            let lacks = found.lacks(answer);
            let n_late = if is_moved { found.n_late(answer) } else { 0 };
            if lacks.is_empty() && n_late == 0 {
                continue;
            }
            // A conversation that the template does not take cannot be served either.
            let is_last = answer + 1 == messages.len();
            let served = (!is_last).then(|| blocks(self, &maps[..=answer], given).ok()).flatten();
            let differs = |served: &Found| {
                let still = served.lacks(answer);
                served.n_late(answer) < n_late || lacks.iter().any(|leaf| !still.contains(leaf))
            };
            match served.filter(differs) {
                Some(served) => rewritten.push((answer, served)),
                None if lacks.is_empty() => {}
                None if !found.says_any(answer) => {
                    return Err(TemplateError::Unsaid { message: answer });
                }
                None => left_out = true,
            }
        }
        Ok((rewritten, left_out))
    }
}

/// An answer that is to be trained.
fn is_trained(message: &Message) -> bool {
    message.weight > 0.0 && (message.role == ANSWER || message.chosen)
}

/// Makes a message one that is read and not learned.
fn silence(message: &mut Message) {
    message.weight = 0.0;
    message.chosen = false;
    message.marks.clear();
}

fn refusal(message: usize, whole: &str, served: &str) -> TemplateError {
    let same = whole.bytes().zip(served.bytes()).take_while(|(a, b)| a == b).count();
    let (whole, served) = (around(whole, same), around(served, same));
    TemplateError::Rewritten { message, whole, served }
}

impl Found {
    /// Whether a message, the tools or the documents stand behind a later message.
    fn is_out_of_order(&self) -> bool {
        !self.blocks.is_sorted_by_key(|block| block.message)
    }

    /// How many texts of earlier messages, of the tools and the documents stand behind an answer
    /// and not also before it.
    fn n_late(&self, answer: usize) -> usize {
        let is_own = |block: &Block| block.message == Some(answer);
        let Some(first) = self.blocks.iter().position(is_own) else { return 0 };
        let last = self.blocks.iter().rposition(is_own).unwrap_or(first);
        let before: HashSet<usize> = self.blocks[..first].iter().map(|b| b.leaf).collect();
        let behind = self.blocks[last..].iter().filter(|b| b.message < Some(answer));
        let late: HashSet<usize> = behind.map(|b| b.leaf).filter(|l| !before.contains(l)).collect();
        late.len()
    }

    /// Which texts of a message (by their order in it) are not wholly in the text; of its keys
    /// those count under which it speaks, thinks and calls.
    fn lacks(&self, message: usize) -> Vec<usize> {
        let leaves = self.leaves.iter().enumerate();
        let own: Vec<(usize, &Leaf)> = leaves.filter(|(_, l)| l.message == Some(message)).collect();
        let speaks =
            |leaf: &Leaf| !leaf.is_id && (leaf.part != Part::Content || leaf.key == "content");
        let is_whole = |(at, leaf): &(usize, &Leaf)| self.has_all_words(*at, leaf);
        // The same thought may be there under several keys, of which a template knows one.
        let is_known = |leaf: &Leaf| {
            let mut same = own.iter().filter(|(_, l)| l.part == leaf.part && l.text == leaf.text);
            leaf.part == Part::Reasoning && same.any(is_whole)
        };
        let lacking = own
            .iter()
            .enumerate()
            .filter(|(_, leaf)| speaks(leaf.1) && !is_whole(leaf) && !is_known(leaf.1));
        lacking.map(|(order, _)| order).collect()
    }

    /// Whether a word of a message is in the text.
    fn says_any(&self, message: usize) -> bool {
        let mut own = self.blocks.iter().filter(|block| block.message == Some(message));
        own.any(|block| {
            let leaf = &self.leaves[block.leaf];
            let speaks = leaf.part != Part::Content || leaf.key == "content";
            speaks && !leaf.text[block.range.clone()].chars().all(is_space)
        })
    }

    /// Whether every word of a text is in a block, but for literals that the template looks for
    /// (`</think>`), which it writes itself.
    fn has_all_words(&self, at: usize, leaf: &Leaf) -> bool {
        let mut known: Vec<_> =
            self.blocks.iter().filter(|b| b.leaf == at).map(|b| b.range.clone()).collect();
        if known.first() == Some(&(0..leaf.text.len())) {
            return true;
        }
        known.extend(leaf.literals.iter().cloned());
        known.sort_unstable_by_key(|range| range.start);
        let is_blank = |range: Range<usize>| leaf.text[range].chars().all(is_space);
        let mut end = 0;
        for range in known {
            if range.start > end && !is_blank(end..range.start) {
                return false;
            }
            end = end.max(range.end);
        }
        is_blank(end..leaf.text.len())
    }
}
