//! From where the messages are in a text to spans: answers, the markers that end them, the prompt.

use std::ops::Range;

use hone_schema::{Message, Part, Span};
use serde_json::{Map, Value};

use crate::locate::{ANSWER, Block, blocks};
use crate::python::is_space;
use crate::template::{ChatTemplate, Located, TemplateError};

impl ChatTemplate {
    /// Renders a conversation and says for each byte who wrote it. `weight` is that of the row; the
    /// weight of a span is it times the message's own, and 0 for what belongs to no message.
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
        let maps: Vec<Map<String, Value>> = messages.iter().map(|m| m.value.clone()).collect();
        self.check_names(&maps, tools)?;
        let (text, blocks, generated) = blocks(self, &maps, tools)?;
        let mut writer =
            Writer { template: self, messages, weight, text, blocks, generated, notes: Vec::new() };
        writer.end_last_answer();
        let prompt_len = writer.prompt_len(tools);
        let spans = writer.spans(prompt_len);
        Ok(Located {
            text: writer.text,
            spans,
            prompt_len: prompt_len.and_then(|len| u32::try_from(len).ok()),
            notes: writer.notes,
        })
    }
}

struct Writer<'a> {
    template: &'a ChatTemplate,
    messages: &'a [Message],
    weight: f32,
    text: String,
    blocks: Vec<Block>,
    generated: Vec<Range<usize>>,
    notes: Vec<&'static str>,
}

impl Writer<'_> {
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

    /// What a served model is given.
    fn prompt_len(&mut self, tools: Option<&Value>) -> Option<usize> {
        let (last, before) = self.messages.split_last()?;
        if last.role != ANSWER {
            return None;
        }
        let first = self.blocks.iter().position(|b| b.message == Some(before.len()));
        let prompt = self.template.render(before, tools, true).ok();
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

    fn spans(&mut self, prompt_len: Option<usize>) -> Vec<Span> {
        let mut spans = Spans::default();
        for at in 0..self.blocks.len() {
            let block = self.blocks[at].clone();
            self.gap_before(at, prompt_len, &mut spans);
            let (role, weight) = self.role_and_weight(block.message);
            self.push(&mut spans, block.at.end, block.message, &role, Part::Content, weight);
        }
        self.gap_before(self.blocks.len(), prompt_len, &mut spans);
        spans.list
    }

    /// The template's text before a block, or at the end.
    fn gap_before(&mut self, at: usize, prompt_len: Option<usize>, spans: &mut Spans) {
        let start = spans.end;
        let end = self.blocks.get(at).map_or(self.text.len(), |block| block.at.start);
        let before = at.checked_sub(1).and_then(|before| self.answer(before));
        let after = self.answer(at);
        if before.is_some() && before == after {
            let (role, weight) = self.role_and_weight(before);
            self.push(spans, end, before, &role, Part::Scaffold, weight);
            return;
        }
        if let Some(message) = before {
            let (role, weight) = self.role_and_weight(before);
            match self.template.turns.stop_in(&self.text[start..end]) {
                Some((offset, stop)) => {
                    let stop_end = start + offset + stop.len();
                    self.push(spans, start + offset, before, &role, Part::Scaffold, weight);
                    self.push(spans, stop_end, before, &role, Part::Stop, weight);
                }
                None if self.messages[message].weight > 0.0 => self.notes.push("no stop marker"),
                None => {}
            }
        }
        if after.is_some() {
            let turn = self.turn_start(spans.end..end, after, prompt_len);
            self.push(spans, turn, None, "", Part::Scaffold, 0.0);
            let (role, weight) = self.role_and_weight(after);
            self.push(spans, end, after, &role, Part::Scaffold, weight);
        }
        self.push(spans, end, None, "", Part::Scaffold, 0.0);
    }

    /// Where in the template's text before an answer the model takes over.
    fn turn_start(
        &self,
        gap: Range<usize>,
        message: Option<usize>,
        prompt_len: Option<usize>,
    ) -> usize {
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

    fn role_and_weight(&self, message: Option<usize>) -> (String, f32) {
        message.map_or((String::new(), 0.0), |at| {
            let message = &self.messages[at];
            (message.role.clone(), message.weight * self.weight)
        })
    }

    /// Adds a span up to `end`, unless it is empty; where the template says what it generates, the
    /// rest of an answer has no weight.
    fn push(
        &self,
        spans: &mut Spans,
        end: usize,
        message: Option<usize>,
        role: &str,
        part: Part,
        weight: f32,
    ) {
        let start = spans.end;
        let is_answer = role == ANSWER && !self.generated.is_empty();
        let inside = |at: usize| self.generated.iter().any(|range| range.contains(&at));
        let mut cuts: Vec<usize> = vec![start, end];
        if is_answer {
            let bounds = self.generated.iter().flat_map(|range| [range.start, range.end]);
            cuts.extend(bounds.filter(|at| (start + 1..end).contains(at)));
            cuts.sort_unstable();
            cuts.dedup();
        }
        for pair in cuts.windows(2) {
            let weight = if is_answer && !inside(pair[0]) { 0.0 } else { weight };
            spans.push(pair[1], message, role, part, weight);
        }
    }
}

#[derive(Default)]
struct Spans {
    list: Vec<Span>,
    end: usize,
}

impl Spans {
    fn push(&mut self, end: usize, message: Option<usize>, role: &str, part: Part, weight: f32) {
        if end <= self.end {
            return;
        }
        let message = message.and_then(|m| u32::try_from(m).ok());
        let (start, stop) = (self.end as u32, end as u32);
        self.end = end;
        if let Some(last) = self.list.last_mut()
            && (last.message, last.role.as_str(), last.part, last.weight)
                == (message, role, part, weight)
        {
            last.end = stop;
            return;
        }
        let role = role.to_owned();
        self.list.push(Span { start, end: stop, message, role, part, weight, chosen: false });
    }
}
