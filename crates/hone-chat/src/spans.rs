//! From where the messages are in a text to spans: answers, the markers that end them, the prompt.

use std::ops::Range;

use hone_schema::{Message, Part, Span};
use serde_json::{Map, Value};

use crate::locate::{ANSWER, Block, Found, blocks};
use crate::placed::Placed;
use crate::python::is_space;
use crate::template::{ChatTemplate, Given, Located, TemplateError};
use crate::words::Leaf;

impl ChatTemplate {
    /// Renders a conversation and says for each byte who wrote it. `weight` is that of the row; the
    /// weight of a span is it times the message's own and that of the piece of its text, and 0 for
    /// what belongs to no message.
    ///
    /// Scaffold with a message's index is what the template writes inside an answer: the model has
    /// to write it too.
    ///
    /// # Errors
    /// What the template refuses or fails on, its limits, and rows for which it is not known who
    /// wrote what.
    pub fn locate(
        &self,
        messages: &[Message],
        tools: Option<&Value>,
        weight: f32,
    ) -> Result<Located, TemplateError> {
        self.locate_with(messages, &Given::tools(tools), weight)
    }

    /// The same with all that a row may give.
    ///
    /// # Errors
    /// As [`ChatTemplate::locate`].
    pub fn locate_with(
        &self,
        messages: &[Message],
        given: &Given,
        weight: f32,
    ) -> Result<Located, TemplateError> {
        let maps: Vec<&Map<String, Value>> = messages.iter().map(|m| &m.value).collect();
        self.check_names(&maps, given)?;
        let found = blocks(self, &maps, given)?;
        self.spans_of(found, messages, given, weight)
    }

    /// The spans of a conversation whose messages were found.
    pub(crate) fn spans_of(
        &self,
        found: Found,
        messages: &[Message],
        given: &Given,
        weight: f32,
    ) -> Result<Located, TemplateError> {
        let Found { text, blocks, generated, leaves, mut given_to } = found;
        let notes = Vec::new();
        let mut writer =
            Writer { template: self, messages, weight, text, blocks, generated, leaves, notes };
        writer.end_last_answer();
        given_to.truncate(messages.len().saturating_sub(1));
        let prompt_len = writer.prompt_len(given_to, given);
        let spans = writer.spans(prompt_len)?;
        Ok(Located {
            text: writer.text,
            spans,
            prompt_len: prompt_len.and_then(|len| u32::try_from(len).ok()),
            notes: writer.notes,
        })
    }
}

/// Whose some bytes are, and what they weigh.
#[derive(Clone, Copy, PartialEq)]
struct Owner<'a> {
    message: Option<usize>,
    role: &'a str,
    part: Part,
    weight: f32,
    chosen: bool,
}

impl Owner<'_> {
    /// The template's own.
    const NONE: Owner<'static> =
        Owner { message: None, role: "", part: Part::Scaffold, weight: 0.0, chosen: false };
}

struct Writer<'a> {
    template: &'a ChatTemplate,
    messages: &'a [Message],
    weight: f32,
    text: String,
    blocks: Vec<Block>,
    generated: Vec<Range<usize>>,
    leaves: Vec<Leaf>,
    notes: Vec<&'static str>,
}

impl<'a> Writer<'a> {
    /// The message of a block, when it is an answer.
    fn answer(&self, block: usize) -> Option<usize> {
        let message = self.blocks.get(block)?.message?;
        (self.messages[message].role == ANSWER).then_some(message)
    }

    /// Puts `eos_token` behind the last answer, where the template ends it with nothing.
    fn end_last_answer(&mut self) {
        let Some(last) = self.blocks.len().checked_sub(1) else {
            return;
        };
        let Some(eos) = self.template.token("eos_token") else {
            return;
        };
        let end = self.blocks[last].at.end;
        let is_last = self.answer(last) == self.messages.len().checked_sub(1);
        let is_open = self.template.turns.stop_in(&self.text[end..]).is_none();
        if self.template.appends_eos() && self.answer(last).is_some() && is_last && is_open {
            if self.text[end..].chars().all(is_space) {
                self.text.truncate(end);
            }
            self.text.push_str(eos);
            self.notes.push("end-of-text token appended");
        }
    }

    /// Length of what a served model is given; `before` are the messages before the last.
    fn prompt_len(&mut self, before: Vec<minijinja::Value>, given: &Given) -> Option<usize> {
        if self.messages.last()?.role != ANSWER {
            return None;
        }
        let first = self.blocks.iter().position(|b| b.message == Some(before.len()));
        let prompt = self.template.render_values(before, given, true, None).ok();
        let fits = |prompt: &String| {
            self.text.starts_with(prompt.as_str())
                && first.is_none_or(|first| prompt.len() <= self.blocks[first].at.start)
        };
        let len = prompt.filter(fits).map(|prompt| prompt.len());
        if len.is_none() {
            self.notes.push("prompt is not a prefix");
        }
        len
    }

    fn spans(&mut self, prompt_len: Option<usize>) -> Result<Vec<Span>, TemplateError> {
        let mut spans = Spans::default();
        for at in 0..self.blocks.len() {
            self.gap_before(at, prompt_len, &mut spans);
            self.said(at, &mut spans)?;
        }
        self.gap_before(self.blocks.len(), prompt_len, &mut spans);
        Ok(spans.list)
    }

    /// What a message says in a block, in pieces where the row weighs pieces of it.
    fn said(&self, at: usize, spans: &mut Spans) -> Result<(), TemplateError> {
        let block = &self.blocks[at];
        let leaf = &self.leaves[block.leaf];
        let owner = self.owner(block.message, block.part);
        let message = block.message.map(|at| &self.messages[at]);
        let has_marks = |m: &&Message| m.marks.iter().any(|mark| mark.key == leaf.key);
        let Some(message) = message.filter(has_marks) else {
            self.push(spans, block.at.end, owner);
            return Ok(());
        };
        let written = &self.text[block.at.clone()];
        let placed = Placed::of(&leaf.text, block.range.clone(), written).ok_or_else(|| {
            TemplateError::Provenance {
                why: "the row weighs pieces of a text that the template rewrites",
                plain: written.to_owned(),
                marked: leaf.text[block.range.clone()].to_owned(),
            }
        })?;
        let marks = message.marks.iter().filter(|mark| mark.key == leaf.key);
        let mut cuts: Vec<usize> = marks.flat_map(|m| [m.range.start, m.range.end]).collect();
        cuts.retain(|cut| placed.range.contains(cut));
        cuts.extend([placed.range.start, placed.range.end]);
        cuts.sort_unstable();
        cuts.dedup();
        for piece in cuts.windows(2) {
            let (weight, chosen) = message.weight_at(&leaf.key, piece[0]);
            let end = block.at.start + placed.offset(&leaf.text, piece[1]);
            self.push(spans, end, Owner { weight: weight * self.weight, chosen, ..owner });
        }
        Ok(())
    }

    /// The template's text before a block, or at the end.
    fn gap_before(&mut self, at: usize, prompt_len: Option<usize>, spans: &mut Spans) {
        let start = spans.end;
        let end = self.blocks.get(at).map_or(self.text.len(), |block| block.at.start);
        let before = at.checked_sub(1).and_then(|before| self.answer(before));
        let after = self.answer(at);
        if before.is_some() && before == after {
            self.push(spans, end, self.owner(before, Part::Scaffold));
            return;
        }
        if let Some(message) = before {
            match self.template.turns.stop_in(&self.text[start..end]) {
                Some((offset, stop)) => {
                    let stop_end = start + offset + stop.len();
                    self.push(spans, start + offset, self.owner(before, Part::Scaffold));
                    self.push(spans, stop_end, self.owner(before, Part::Stop));
                }
                None if self.messages[message].weight > 0.0 => self.notes.push("no stop marker"),
                None => {}
            }
            // The template says itself that the model writes what stands behind the marker.
            let open = |at: usize| {
                let goes_on = |r: &&Range<usize>| r.start <= at && r.end > at && r.end <= end;
                self.generated.iter().find(goes_on).map(|range| range.end)
            };
            while let Some(more) = open(spans.end) {
                self.push(spans, more, self.owner(before, Part::Scaffold));
            }
        }
        if after.is_some() {
            let turn = self.turn_start(spans.end..end, after, prompt_len);
            self.push(spans, turn, Owner::NONE);
            self.push(spans, end, self.owner(after, Part::Scaffold));
        }
        self.push(spans, end, Owner::NONE);
    }

    /// Where in the template's text before an answer the model takes over: where the template says
    /// so, else behind what a served model is given.
    fn turn_start(
        &self,
        gap: Range<usize>,
        message: Option<usize>,
        prompt_len: Option<usize>,
    ) -> usize {
        let begins = |r: &&Range<usize>| gap.contains(&r.start) && r.end > gap.end;
        if let Some(range) = self.generated.iter().find(begins) {
            return range.start;
        }
        let is_last = message == self.messages.len().checked_sub(1);
        if let Some(len) = prompt_len.filter(|len| is_last && gap.contains(len)) {
            return len;
        }
        let before = &self.text[gap.clone()];
        let header = self.template.generation_prompt().filter(|header| !header.is_empty());
        let behind_header = header.and_then(|header| Some(before.rfind(header)? + header.len()));
        let lead = self.template.turns.lead.as_deref().filter(|lead| before.ends_with(lead));
        let offset = behind_header.or_else(|| lead.map(|lead| before.len() - lead.len()));
        gap.start + offset.unwrap_or(before.len())
    }

    /// What a part of a message is by what the row says of the whole message.
    fn owner(&self, message: Option<usize>, part: Part) -> Owner<'a> {
        let Some(at) = message else { return Owner { part, ..Owner::NONE } };
        let Message { role, weight, chosen, .. } = &self.messages[at];
        Owner { message, role, part, weight: weight * self.weight, chosen: *chosen }
    }

    /// Adds a span up to `end`, unless it is empty; where the template says what it generates, the
    /// rest of an answer has no weight.
    fn push(&self, spans: &mut Spans, end: usize, owner: Owner) {
        let start = spans.end;
        if owner.role != ANSWER || self.generated.is_empty() {
            return spans.push(end, owner);
        }
        let inside = |at: usize| self.generated.iter().any(|range| range.contains(&at));
        let mut cuts: Vec<usize> = vec![start, end];
        let bounds = self.generated.iter().flat_map(|range| [range.start, range.end]);
        cuts.extend(bounds.filter(|at| (start + 1..end).contains(at)));
        cuts.sort_unstable();
        cuts.dedup();
        for pair in cuts.windows(2) {
            let weight = if inside(pair[0]) { owner.weight } else { 0.0 };
            spans.push(pair[1], Owner { weight, ..owner });
        }
    }
}

#[derive(Default)]
struct Spans {
    list: Vec<Span>,
    end: usize,
}

impl Spans {
    fn push(&mut self, end: usize, owner: Owner) {
        if end <= self.end {
            return;
        }
        let Owner { role, part, weight, chosen, .. } = owner;
        let message = owner.message.and_then(|m| u32::try_from(m).ok());
        let (start, stop) = (self.end as u32, end as u32);
        self.end = end;
        if let Some(last) = self.list.last_mut()
            && (last.message, last.role.as_str(), last.part, last.weight, last.chosen)
                == (message, role, part, weight, chosen)
        {
            last.end = stop;
            return;
        }
        let role = role.to_owned();
        self.list.push(Span { start, end: stop, message, role, part, weight, chosen });
    }
}
