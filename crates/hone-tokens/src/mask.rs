//! Which bytes of a row are trained, and from them which tokens.
//!
//! Bytes first. A message is trained when the policy takes its role and the data gives it weight. Of a trained message:
//!
//! - its content;
//! - the stop marker behind it, because a response that is learned without its end never ends;
//! - what the template writes between the two: the model has to write it as well to get from one to the other;
//! - what the template writes between the prompt that a served model is given ([`Rendered::prompt_len`]) and the content, and
//!   the same bytes before earlier responses; for most templates that is nothing, for some a space or an empty thought.
//!
//! Headers, other roles and separators never are. A text row is trained whole, but for its beginning-of-text token.
//!
//! Then tokens. **A token that holds any untrained byte is not trained.** One exception: blanks of the template at its start do
//! not count, because many vocabularies write the space before a word and the word as one token. Where a token holds bytes
//! of several weights it has the smallest. The first token of a row is predicted by nothing and never trained.

use std::ops::Range;

use hone_schema::{Kind, Part, Rendered, Span};
use serde::{Deserialize, Serialize};

use crate::encode::Encoded;

/// Role of the messages that are responses.
pub(crate) const RESPONSE: &str = "assistant";

/// Which messages are trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrainOn {
    /// Every response.
    #[default]
    Assistant,
    /// The last response.
    Last,
    /// What every role says; still no header.
    All,
}

/// Some bytes of a row and the weight of their loss.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Segment {
    /// The bytes.
    pub(crate) bytes: Range<usize>,
    /// The weight; 0 = not trained.
    pub(crate) weight: f32,
    /// Index of the row's span that they lie in.
    pub(crate) span: usize,
}

/// The row's bytes with their weights under a policy; the segments cover the text in order.
pub(crate) fn segments(row: &Rendered, train_on: TrainOn) -> Vec<Segment> {
    let mut segments: Vec<Segment> = (0..row.spans.len())
        .map(|span| Segment { bytes: bytes(&row.spans[span]), weight: 0.0, span })
        .collect();
    if row.kind == Kind::Text {
        for (segment, span) in segments.iter_mut().zip(&row.spans) {
            if span.part != Part::Scaffold {
                segment.weight = span.weight;
            }
        }
        return segments;
    }
    let lead = lead(row);
    let mut leads = Vec::new();
    for message in trained_messages(row, train_on) {
        let own: Vec<usize> =
            (0..row.spans.len()).filter(|idx| row.spans[*idx].message == Some(message)).collect();
        let weights = message_weights(&row.spans, &own);
        for (idx, weight) in &weights {
            segments[*idx].weight = *weight;
        }
        let first = weights.first().filter(|(_, weight)| *weight > 0.0);
        if let (Some((first, weight)), Some(lead)) = (first, lead)
            && row.spans[*first].role == RESPONSE
        {
            leads.push((lead_bytes(row, *first, lead), *weight));
        }
    }
    for (bytes, weight) in leads {
        raise(&mut segments, &bytes, weight);
    }
    segments
}

/// Bytes of a span.
pub(crate) fn bytes(span: &Span) -> Range<usize> {
    span.start as usize..span.end as usize
}

fn trained_messages(row: &Rendered, train_on: TrainOn) -> Vec<u32> {
    let mut messages: Vec<u32> = row
        .spans
        .iter()
        .filter(|span| train_on == TrainOn::All || span.role == RESPONSE)
        .filter_map(|span| span.message)
        .collect();
    messages.sort_unstable();
    messages.dedup();
    if train_on == TrainOn::Last {
        messages.drain(..messages.len().saturating_sub(1));
    }
    messages
}

/// Weights of a message's spans from its first content (or stop) on: content as the data has it, the stop with the response
/// before it, and what the template wrote between them with the content before it.
fn message_weights(spans: &[Span], own: &[usize]) -> Vec<(usize, f32)> {
    let begins = own.iter().position(|idx| spans[*idx].part != Part::Scaffold);
    let ends = own.iter().rposition(|idx| spans[*idx].part != Part::Scaffold);
    let (Some(begins), Some(ends)) = (begins, ends) else {
        return Vec::new();
    };
    let own = &own[begins..=ends];
    let content = |idx: &&usize| spans[**idx].part == Part::Content;
    let trained =
        own.iter().filter(content).map(|idx| spans[*idx].weight).rfind(|weight| *weight > 0.0);
    let is_empty = !own.iter().any(|idx| content(&idx));
    let mut before = 0.0;
    own.iter()
        .map(|idx| {
            let span = &spans[*idx];
            let weight = match span.part {
                Part::Content => {
                    before = span.weight;
                    span.weight
                }
                Part::Scaffold => before,
                Part::Stop if is_empty || (trained.is_some() && span.weight > 0.0) => span.weight,
                Part::Stop => trained.unwrap_or(0.0),
            };
            (*idx, weight)
        })
        .collect()
}

/// What the template writes between the prompt and the last response.
fn lead(row: &Rendered) -> Option<&str> {
    let prompt_len = row.prompt_len? as usize;
    let first = first_of_last_response(row)?;
    let start = row.spans[first].start as usize;
    (prompt_len < start).then(|| &row.text[prompt_len..start])
}

/// The span in which the row's last message begins to speak, when it is a response.
pub(crate) fn first_of_last_response(row: &Rendered) -> Option<usize> {
    let last = row.spans.iter().filter_map(|span| span.message).max()?;
    let first = row
        .spans
        .iter()
        .position(|span| span.message == Some(last) && span.part != Part::Scaffold)?;
    (row.spans[first].role == RESPONSE).then_some(first)
}

/// The bytes of `lead` right before the span `first`, if the template wrote them there.
fn lead_bytes(row: &Rendered, first: usize, lead: &str) -> Range<usize> {
    let end = row.spans[first].start as usize;
    let scaffold = row.spans[..first]
        .iter()
        .rev()
        .take_while(|span| span.part == Part::Scaffold)
        .last()
        .map_or(end, |span| span.start as usize);
    if row.text[scaffold..end].ends_with(lead) { end - lead.len()..end } else { end..end }
}

/// Gives `bytes` a weight, cutting segments where they begin.
fn raise(segments: &mut Vec<Segment>, bytes: &Range<usize>, weight: f32) {
    if bytes.is_empty() {
        return;
    }
    let at = segments.partition_point(|s| s.bytes.end <= bytes.start);
    if segments[at].bytes.start < bytes.start {
        let mut head = segments[at].clone();
        head.bytes.end = bytes.start;
        segments[at].bytes.start = bytes.start;
        segments.insert(at, head);
    }
    for segment in segments
        .iter_mut()
        .skip_while(|s| s.bytes.start < bytes.start)
        .take_while(|s| s.bytes.end <= bytes.end)
    {
        segment.weight = weight;
    }
}

/// Weight of each token of `encoded`.
pub(crate) fn token_weights(row: &Rendered, segments: &[Segment], encoded: &Encoded) -> Vec<f32> {
    let mut weights: Vec<f32> =
        encoded.offsets.iter().map(|bytes| token_weight(row, segments, bytes)).collect();
    if let Some(first) = weights.first_mut() {
        *first = 0.0;
    }
    weights
}

fn token_weight(row: &Rendered, segments: &[Segment], bytes: &Range<usize>) -> f32 {
    let touched = touched(segments, bytes);
    let is_blank = |segment: &Segment| {
        let start = segment.bytes.start.max(bytes.start);
        let end = segment.bytes.end.min(bytes.end);
        row.spans[segment.span].part == Part::Scaffold
            && row.text[start..end].chars().all(char::is_whitespace)
    };
    let heads =
        touched.iter().take_while(|segment| segment.weight == 0.0 && is_blank(segment)).count();
    // A token of nothing but the template's blanks has no trained byte to be trained for.
    touched[heads..].iter().map(|segment| segment.weight).reduce(f32::min).unwrap_or(0.0)
}

/// Segments that share a byte with `bytes`; for an empty range the one that holds the byte behind it.
fn touched<'a>(segments: &'a [Segment], bytes: &Range<usize>) -> &'a [Segment] {
    let from = segments
        .partition_point(|s| s.bytes.end <= bytes.start)
        .min(segments.len().saturating_sub(1));
    let n = segments[from..].partition_point(|s| s.bytes.start < bytes.end.max(bytes.start + 1));
    &segments[from..from + n]
}
