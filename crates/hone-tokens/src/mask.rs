//! Which bytes of a row are trained, and from them which tokens.
//!
//! Bytes first. The spans of a row come with weights: those of the data, and 0 where the template writes a header, a separator
//! or anything else that a served model is given. Scaffold with a weight lies inside a response (a space, an empty thought, the
//! marks around a tool call), and the model has to write it as well. Of that, trained are
//!
//! - the spans of the messages that the policy takes, with their weights;
//! - the stop marker of a response of which anything is trained, whatever its own weight: a response that is learned without
//!   its end never ends.
//!
//! A text row is trained whole, but for its beginning-of-text token.
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

impl TrainOn {
    /// Whether the policy takes the message that a span belongs to.
    pub(crate) fn takes(self, row: &Rendered, span: &Span) -> bool {
        if row.kind == Kind::Text {
            return span.part != Part::Scaffold;
        }
        let is_response = |span: &&Span| span.role == RESPONSE && span.message.is_some();
        match self {
            TrainOn::Assistant => is_response(&span),
            TrainOn::Last => {
                let last = row.spans.iter().filter(is_response).filter_map(|s| s.message).max();
                is_response(&span) && span.message == last
            }
            TrainOn::All => span.message.is_some(),
        }
    }
}

/// Bytes of a span.
pub(crate) fn bytes(span: &Span) -> Range<usize> {
    span.start as usize..span.end as usize
}

/// The weight of each span under a policy.
pub(crate) fn span_weights(row: &Rendered, train_on: TrainOn) -> Vec<f32> {
    row.spans
        .iter()
        .map(|span| match (train_on.takes(row, span), span.part) {
            (false, _) => 0.0,
            (true, Part::Stop) if row.kind != Kind::Text => stop_weight(row, span),
            (true, _) => span.weight,
        })
        .collect()
}

/// A stop marker is trained when anything of its message is, or when there is nothing else of it.
fn stop_weight(row: &Rendered, stop: &Span) -> f32 {
    let mut rest = row
        .spans
        .iter()
        .filter(|span| span.message == stop.message && span.part != Part::Stop)
        .peekable();
    let is_empty = rest.peek().is_none();
    match rest.map(|span| span.weight).rfind(|weight| *weight > 0.0) {
        None if is_empty => stop.weight,
        None => 0.0,
        Some(_) if stop.weight > 0.0 => stop.weight,
        Some(weight) => weight,
    }
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

/// Weight of each token of `encoded`, from the weights of the row's spans.
pub(crate) fn token_weights(row: &Rendered, weights: &[f32], encoded: &Encoded) -> Vec<f32> {
    let mut weights: Vec<f32> =
        encoded.offsets.iter().map(|bytes| token_weight(row, weights, bytes)).collect();
    if let Some(first) = weights.first_mut() {
        *first = 0.0;
    }
    weights
}

fn token_weight(row: &Rendered, weights: &[f32], token: &Range<usize>) -> f32 {
    let is_blank = |idx: &usize| {
        let span = bytes(&row.spans[*idx]);
        let shared = span.start.max(token.start)..span.end.min(token.end);
        row.spans[*idx].part == Part::Scaffold && row.text[shared].chars().all(char::is_whitespace)
    };
    touched(&row.spans, token)
        .skip_while(|idx| weights[*idx] == 0.0 && is_blank(idx))
        .map(|idx| weights[idx])
        .reduce(f32::min)
        // A token of nothing but the template's blanks has no trained byte to be trained for.
        .unwrap_or(0.0)
}

/// Indexes of the spans that share a byte with `token`; for an empty one, of the span that holds the byte behind it.
pub(crate) fn touched(spans: &[Span], token: &Range<usize>) -> Range<usize> {
    let from =
        spans.partition_point(|s| s.end as usize <= token.start).min(spans.len().saturating_sub(1));
    let end = token.end.max(token.start + 1);
    from..from + spans[from..].partition_point(|s| (s.start as usize) < end)
}
