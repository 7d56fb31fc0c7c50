//! Preferences: a prompt, a chosen answer and a rejected one.
//!
//! The prompt is given (as text, as messages, as ShareGPT's `conversations`) or it is what the two
//! have in common: the longest common run of messages at the beginning, in lists and in transcripts
//! (`\n\nHuman: ...\n\nAssistant: ...`).

use hone_schema::Kind;

use super::{Row, asked, messages, system, text_of};
use crate::fault::{Fault, Reason};
use crate::json::{Fields, Raw, Shape};
use crate::schema::{CHOSEN, PROMPT, REJECTED};

/// How turns of a transcript begin.
const TURNS: [(&str, &str); 2] = [("\n\nHuman:", "user"), ("\n\nAssistant:", "assistant")];

pub(super) fn convert(fields: &mut Fields) -> Result<Row, Fault> {
    let chosen = fields.take_any(&CHOSEN).ok_or_else(|| Fault::missing(CHOSEN[0]))?;
    let rejected = fields.take_any(&REJECTED).ok_or_else(|| Fault::missing(REJECTED[0]))?;
    let mut prompt: Vec<String> = system(fields)?.into_iter().collect();
    let given = given_prompt(fields)?;
    let is_given = given.is_some();
    prompt.extend(given.unwrap_or_default());
    let (mut chosen, mut rejected) = (answer(chosen, is_given)?, answer(rejected, is_given)?);
    // Lists repeat the prompt, whether it is given beside them or not; the answers begin where they
    // part.
    let n_same = chosen.iter().zip(&rejected).take_while(|(a, b)| a == b).count();
    if n_same == chosen.len() && n_same == rejected.len() {
        return Err(Fault::new(Reason::SameAnswers, "the two answers are equal"));
    }
    let common: Vec<String> = chosen.drain(..n_same).collect();
    rejected.drain(..n_same);
    if !is_given || !prompt.ends_with(&common) {
        prompt.extend(common);
    }
    if prompt.is_empty() {
        return Err(Fault::new(Reason::EmptyPrompt, "there is nothing to respond to"));
    }
    messages::readable(&prompt).map_err(|fault| named("prompt", fault))?;
    messages::check(&chosen).map_err(|fault| named("chosen", fault))?;
    messages::check(&rejected).map_err(|fault| named("rejected", fault))?;
    let mut row = Row::new(Kind::Preference, &prompt);
    row.chosen = Some(format!("[{}]", chosen.join(",")));
    row.rejected = Some(format!("[{}]", rejected.join(",")));
    Ok(row)
}

fn named(which: &str, fault: Fault) -> Fault {
    Fault { detail: format!("`{which}`: {}", fault.detail), ..fault }
}

fn given_prompt(fields: &mut Fields) -> Result<Option<Vec<String>>, Fault> {
    let keys = ["prompt", "conversations", "conversation", "messages", PROMPT[1], PROMPT[2]];
    if let Some((key, value)) = fields.take_any(&keys) {
        return match value.shape() {
            Shape::List => messages::list(key, value).map(Some),
            _ => {
                let text = text_of(key, value)?;
                Ok(Some(transcript(&text).map_or_else(|| asked(&text).map(|m| vec![m]), Ok)?))
            }
        };
    }
    let Some(value) = fields.take("instruction") else { return Ok(None) };
    let instruction = text_of("instruction", value)?;
    let input = fields.take("input").map(|value| text_of("input", value)).transpose()?;
    let text = match input.filter(|input| !input.is_empty()) {
        Some(input) => format!("{instruction}\n{input}"),
        None => instruction,
    };
    Ok(Some(vec![asked(&text)?]))
}

/// An answer: a text, a message, or a list of messages.
fn answer((key, value): (&str, Raw), has_prompt: bool) -> Result<Vec<String>, Fault> {
    match value.shape() {
        Shape::List => messages::list(key, value),
        Shape::Object => {
            messages::message(0, value).map(|message| vec![message]).map_err(|f| named(key, f))
        }
        _ => {
            let text = text_of(key, value)?;
            match transcript(&text) {
                Some(turns) => Ok(turns),
                None if has_prompt => Ok(vec![messages::plain("assistant", &text)]),
                None => Err(Fault::new(
                    Reason::MissingField,
                    format!("`{key}` is a text without turns, and there is no `prompt`"),
                )),
            }
        }
    }
}

/// The turns of a transcript, when the text is one.
fn transcript(text: &str) -> Option<Vec<String>> {
    let first = |text: &str| {
        let found = TURNS.iter().filter_map(|(mark, role)| Some((text.find(mark)?, *mark, *role)));
        found.min_by_key(|(at, ..)| *at)
    };
    let mut turns = Vec::new();
    let mut rest = text;
    while let Some((at, mark, role)) = first(rest) {
        if at != 0 {
            return None;
        }
        let behind = &rest[mark.len()..];
        let end = first(behind).map_or(behind.len(), |(at, ..)| at);
        let content = behind[..end].strip_prefix(' ').unwrap_or(&behind[..end]);
        turns.push(messages::plain(role, content));
        rest = &behind[end..];
    }
    (!turns.is_empty()).then_some(turns)
}
