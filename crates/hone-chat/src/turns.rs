//! How a template begins and ends an answer, learned from small conversations.
//!
//! The text between an answer and what follows it is known to be the template's own (module
//! `locate`), so looking for control tokens in it finds none that a message holds.
//!
//! What ends an answer is, in this order:
//! 1. the first control token behind it (an added token of the tokenizer, or `eos_token`;
//!    `bos_token` begins and never ends);
//! 2. where there is none, the first line that the template writes behind the answer, when it does
//!    so in the middle of a conversation and at its end: a marker that this tokenizer has no token
//!    for;
//! 3. where there is nothing, nothing: then `eos_token` is appended to the last answer of a
//!    conversation, because a model that never sees an end never stops.

use std::borrow::Cow;

use hone_schema::THOUGHT_MARKS;
use serde_json::{Map, Value, json};

use crate::locate::{Block, Found, blocks};
use crate::template::{ChatTemplate, Given, TemplateError, values};

/// What was learned.
#[derive(Clone, Debug, Default)]
pub(crate) struct Turns {
    /// What `add_generation_prompt` adds.
    pub(crate) header: Option<String>,
    /// What stands between that and an answer.
    pub(crate) lead: Option<String>,
    /// What ends an answer, the longest first.
    pub(crate) stops: Vec<String>,
    /// Control tokens that make the frame of a conversation: those that begin it, stand in its
    /// headers or end an answer.
    pub(crate) frame: Vec<String>,
    /// Nothing ends the last answer, and there is an `eos_token`.
    pub(crate) appends_eos: bool,
    /// Control tokens, the longest first, none empty; without `bos_token` unless it is the same as
    /// `eos_token`.
    control: Vec<String>,
}

impl Turns {
    /// Renders the small conversations; a template that takes none of them teaches nothing but its
    /// `eos_token`.
    pub(crate) fn learn(template: &ChatTemplate) -> Result<Self, TemplateError> {
        let eos = template.token("eos_token").map(str::to_owned);
        let bos = template.token("bos_token").map(str::to_owned);
        let mut control = template.dialect.added_tokens.clone();
        control.retain(|token| bos.as_ref() != Some(token));
        control.extend(eos.clone());
        longest_first(&mut control);
        let mut turns = Turns { control, ..Turns::default() };
        within_limits(template)?;
        turns.header = header(template);
        turns.lead = lead(template);
        let last = behind_answer(template, 1);
        let middle = behind_answer(template, 2);
        let mut stops: Vec<String> = Vec::new();
        let found_last = last.as_deref().and_then(|text| turns.first_control(text));
        let found_middle = middle.as_deref().and_then(|text| turns.first_control(text));
        stops.extend(
            [found_last, found_middle].into_iter().flatten().map(|(_, token)| token.to_owned()),
        );
        if found_last.is_none()
            && let Some(line) = last.as_deref().and_then(|text| text.trim().lines().next())
            && middle.is_none_or(|text| text.trim_start().starts_with(line.trim_end()))
        {
            stops.push(line.trim_end().to_owned());
        } else if found_last.is_none() {
            turns.appends_eos = eos.is_some() && last.is_some();
        }
        stops.extend(eos);
        longest_first(&mut stops);
        let before = before_question(template).unwrap_or_default();
        turns.frame = stops.iter().chain(&bos).cloned().collect();
        turns.frame.extend(turns.control.iter().filter(|t| before.contains(*t)).cloned());
        // Only the first of the header, and no mark of a thought, which many headers end with: a
        // template may look for that in an answer.
        let header = turns.header.as_deref().unwrap_or_default();
        let is_mark = |token: &str| THOUGHT_MARKS.iter().flatten().any(|mark| *mark == token);
        let first = turns.first_control(header).map(|(_, token)| token.to_owned());
        turns.frame.extend(first.filter(|token| !is_mark(token)));
        turns.stops = stops;
        Ok(turns)
    }

    /// Where in the template's text behind an answer the marker that ends it stands, and the
    /// marker.
    pub(crate) fn stop_in<'a>(&'a self, text: &str) -> Option<(usize, &'a str)> {
        first_of(text, &self.stops).or_else(|| self.first_control(text))
    }

    fn first_control<'a>(&'a self, text: &str) -> Option<(usize, &'a str)> {
        first_of(text, &self.control)
    }
}

/// The text that stands first in `text`; of two at the same place the longer.
fn first_of<'a>(text: &str, wanted: &'a [String]) -> Option<(usize, &'a str)> {
    let found = wanted.iter().filter_map(|w| Some((text.find(w.as_str())?, w.as_str())));
    found.min_by_key(|(at, w)| (*at, usize::MAX - w.len()))
}

fn longest_first(texts: &mut Vec<String>) {
    texts.retain(|text| !text.is_empty());
    texts.sort_by(|a, b| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
    texts.dedup();
}

/// Questions and answers in turn, with a system message before them or not, content as a text or as
/// parts.
fn small(n_answers: usize, system: bool, parts: bool) -> Vec<Map<String, Value>> {
    let message = |role: &str, text: &str| {
        let content = match parts {
            true => json!([{"type": "text", "text": text}]),
            false => json!(text),
        };
        Map::from_iter([("role".to_owned(), json!(role)), ("content".to_owned(), content)])
    };
    let turns =
        (0..n_answers).flat_map(|_| [message("user", "Question"), message("assistant", "Answer")]);
    system.then(|| message("system", "System")).into_iter().chain(turns).collect()
}

fn render(
    template: &ChatTemplate,
    messages: &[Map<String, Value>],
    add_generation_prompt: bool,
) -> Result<String, TemplateError> {
    let messages = values(messages.iter().map(Cow::Borrowed));
    template.render_values(messages, &Given::default(), add_generation_prompt, None)
}

fn found(template: &ChatTemplate, messages: &[Map<String, Value>]) -> Option<Found> {
    let messages: Vec<&Map<String, Value>> = messages.iter().collect();
    blocks(template, &messages, &Given::default()).ok()
}

const SHAPES: [(bool, bool); 4] = [(false, false), (true, false), (false, true), (true, true)];

/// What the template writes behind the first of `n_answers` answers.
fn behind_answer(template: &ChatTemplate, n_answers: usize) -> Option<String> {
    SHAPES.into_iter().find_map(|(system, parts)| {
        let messages = small(n_answers, system, parts);
        let answer = usize::from(system) + 1;
        let Found { text, blocks, .. } = found(template, &messages)?;
        let at = blocks.iter().rposition(|block: &Block| block.message == Some(answer))?;
        let end = blocks.get(at + 1).map_or(text.len(), |next| next.at.start);
        Some(text[blocks[at].at.end..end].to_owned())
    })
}

/// Refuses a template for which even a small conversation is too much: no other will be less, and
/// each would take as long.
fn within_limits(template: &ChatTemplate) -> Result<(), TemplateError> {
    match render(template, &small(1, false, false), false) {
        Err(error @ TemplateError::Limit(_)) => Err(error),
        _ => Ok(()),
    }
}

/// What the template writes between the prompt and an answer.
fn lead(template: &ChatTemplate) -> Option<String> {
    SHAPES.into_iter().find_map(|(system, parts)| {
        let messages = small(1, system, parts);
        let Found { text, blocks, .. } = found(template, &messages)?;
        let answer = messages.len() - 1;
        let prompt = render(template, &messages[..answer], true).ok()?;
        let first = blocks.iter().find(|block| block.message == Some(answer))?;
        Some(text[..first.at.start].strip_prefix(prompt.as_str())?.to_owned())
    })
}

/// What the template writes before the first question.
fn before_question(template: &ChatTemplate) -> Option<String> {
    SHAPES.into_iter().find_map(|(system, parts)| {
        let Found { text, blocks, .. } = found(template, &small(1, system, parts))?;
        let first = blocks.iter().find(|block| block.message == Some(usize::from(system)))?;
        Some(text[..first.at.start].to_owned())
    })
}

/// What `add_generation_prompt` adds behind a question.
fn header(template: &ChatTemplate) -> Option<String> {
    SHAPES.into_iter().find_map(|(system, parts)| {
        let mut messages = small(1, system, parts);
        messages.pop();
        let without = render(template, &messages, false).ok()?;
        let with = render(template, &messages, true).ok()?;
        Some(with.strip_prefix(&without)?.to_owned())
    })
}
