//! Thoughts that open a response, found between the marks that families of models write them in.
//!
//! Looked at are only the bytes of a response itself, and only where it begins: what a response quotes further on is no thought.

use std::ops::Range;

use hone_schema::{Part, Rendered, Span, THOUGHT_MARKS};

use crate::mask::bytes;
use crate::policy::RESPONSE;

/// A thought at the start of a response.
pub(crate) struct Thought {
    /// With its marks, as far as the response holds them, and the blanks behind it.
    pub(crate) whole: Range<usize>,
    /// Between its marks.
    pub(crate) inside: Range<usize>,
    /// Whether it holds nothing but blanks.
    pub(crate) is_empty: bool,
}

/// The thoughts of a row's responses, in order.
pub(crate) fn thoughts(row: &Rendered) -> Vec<Thought> {
    responses(&row.spans).into_iter().filter_map(|response| thought(&row.text, response)).collect()
}

/// The bytes of each response, without its stop marker.
fn responses(spans: &[Span]) -> Vec<Range<usize>> {
    let mut all: Vec<(Option<u32>, Range<usize>)> = Vec::new();
    for span in spans.iter().filter(|s| s.message.is_some() && s.part != Part::Stop) {
        if span.role != RESPONSE {
            continue;
        }
        match all.last_mut() {
            Some((message, response)) if *message == span.message => response.end = bytes(span).end,
            _ => all.push((span.message, bytes(span))),
        }
    }
    all.into_iter().map(|(_, response)| response).collect()
}

fn thought(text: &str, response: Range<usize>) -> Option<Thought> {
    let said = &text[response.clone()];
    let blanks = said.len() - said.trim_start().len();
    let header = text[..response.start].trim_end();
    let (open, start, close) = THOUGHT_MARKS.iter().find_map(|[open, close]| {
        if said[blanks..].starts_with(open) {
            Some((blanks + open.len(), blanks, close))
        } else {
            // The header has opened it: the response begins inside.
            header.ends_with(open).then_some((0, 0, close))
        }
    })?;
    let end = open + said[open..].find(close)?;
    let behind = &said[end + close.len()..];
    let whole = end + close.len() + (behind.len() - behind.trim_start().len());
    let at = response.start;
    Some(Thought {
        whole: at + start..at + whole,
        inside: at + open..at + end,
        is_empty: said[open..end].trim().is_empty(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A response behind its header; the thought with its marks in `()`, what is inside in `[]`.
    fn check(header: &str, response: &str, expect: &str) {
        let text = format!("{header}{response}");
        let found = thought(&text, header.len()..text.len()).map(|thought| {
            let Thought { whole, inside, is_empty } = thought;
            format!(
                "({}[{}]{}){}{}",
                &text[whole.start..inside.start],
                &text[inside.clone()],
                &text[inside.end..whole.end],
                &text[whole.end..],
                if is_empty { " empty" } else { "" }
            )
        });
        assert_eq!(found.as_deref().unwrap_or("none"), expect, "{text:?}");
    }

    #[test]
    fn a_thought_opens_a_response() {
        check("<a>", "<think>hm</think>yo", "(<think>[hm]</think>)yo");
        check("<a>", "\n<think>\nhm\n</think>\n\nyo", "(<think>[\nhm\n]</think>\n\n)yo");
        check("<a>", "<think>\n\n</think>\n\nyo", "(<think>[\n\n]</think>\n\n)yo empty");
        check("<a>", "[THINK]hm[/THINK]yo", "([THINK][hm][/THINK])yo");
        check("<a><think>\n", "hm</think>yo", "([hm]</think>)yo");
        check("<a><think>\n", "\n</think>\n\nyo", "([\n]</think>\n\n)yo empty");
        check("<a>", "yo <think>hm</think>", "none");
        check("<a>", "<think>hm", "none");
        check("<a>", "yo", "none");
        check("<a>", "", "none");
    }
}
