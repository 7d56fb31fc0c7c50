//! One chat under one template and one tokenizer: what hone makes of it.

use std::ops::Range;

use hone_chat::{ChatTemplate, Located, TemplateError};
use hone_schema::Span;
use hone_tokens::Vocab;

use crate::golden::Chat;

/// What hone makes of a chat.
pub(crate) enum Ours {
    /// The text that the template renders, and its ids.
    Ids(String, Vec<u32>),
    /// The template itself refuses the conversation.
    Refused,
    /// The template fails on it.
    Failed(String),
    /// It renders, and hone does not take it: the reason, and what it says.
    NotTaken(&'static str, String),
}

/// Renders a chat, tells who wrote what, and encodes it with control tokens where the template wrote
/// them.
pub(crate) fn ours(template: &ChatTemplate, vocab: &Vocab, chat: &Chat) -> Ours {
    let text = match template.render(&chat.messages, chat.tools.as_ref(), false) {
        Ok(text) => text,
        Err(TemplateError::Raised(_)) => return Ours::Refused,
        Err(e @ TemplateError::Failed { .. }) => return Ours::Failed(e.to_string()),
        Err(e) => return Ours::NotTaken(e.reason(), e.to_string()),
    };
    match template.locate(&chat.messages, chat.tools.as_ref(), 1.0) {
        Ok(found) => match encode(vocab, &text, &found) {
            Ok(ids) => Ours::Ids(text, ids),
            Err(e) => Ours::NotTaken("not encoded", e),
        },
        Err(e) => Ours::NotTaken(e.reason(), e.to_string()),
    }
}

/// Ids of the rendered text. Where a template ends an answer with nothing, or with white space, hone
/// puts the end-of-text token there: what was cut off for it is the template's.
fn encode(vocab: &Vocab, text: &str, found: &Located) -> Result<Vec<u32>, String> {
    let same = text.bytes().zip(found.text.bytes()).take_while(|(a, b)| a == b).count();
    assert!(text.trim_end().len() <= same, "locate renders {:?}, render {text:?}", found.text);
    let mut written = written(&found.spans, same);
    if same < text.len() {
        match written.last_mut() {
            Some(last) if last.end == same => last.end = text.len(),
            _ => written.push(same..text.len()),
        }
    }
    vocab.encode(text, &written).map(|e| e.ids).map_err(|e| e.to_string())
}

/// The ranges that the template wrote up to byte `end`, in order and apart from each other.
pub(crate) fn written(spans: &[Span], end: usize) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    for span in spans.iter().filter(|s| !s.part.is_said()) {
        let bytes = (span.start as usize).min(end)..(span.end as usize).min(end);
        match ranges.last_mut() {
            Some(last) if last.end == bytes.start => last.end = bytes.end,
            _ if bytes.is_empty() => {}
            _ => ranges.push(bytes),
        }
    }
    ranges
}
