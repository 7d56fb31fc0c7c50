//! A row: its ids, its weights, and why it is refused when it is.

use std::collections::BTreeSet;
use std::ops::Range;

use hone_schema::{Doc, Kind, Part, Rendered, Split};
use serde::{Deserialize, Serialize};

use crate::certificate::certify;
use crate::encode::{EncodeError, Encoded};
use crate::mask::{TrainOn, bytes, span_weights, token_weights};
use crate::vocab::Vocab;

/// What happens to a row that is longer than a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TooLong {
    /// It is left out.
    Drop,
    /// Its first tokens are kept.
    Truncate,
    /// The whole stage stops.
    Error,
}

/// How rows become tokens.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Longest row, in tokens.
    pub max_len: u32,
    /// What happens to longer ones.
    pub too_long: TooLong,
    /// Which messages are trained.
    pub train_on: TrainOn,
    /// The token that begins a text, by the template.
    pub bos: Option<u32>,
}

/// Why a row is refused, as it stands in the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// Longer than a pack, and the rule is to leave such rows out.
    TooLong,
    /// Longer than a pack, and what fits holds no trained token.
    ResponseCutOff,
    /// Nothing in it is trained.
    NoTrainedToken,
    /// A token that begins a text where no text begins.
    DoubledBos,
    /// A trained response without a stop marker.
    NoStop,
    /// A stop marker that the vocabulary writes with several tokens.
    StopInPieces,
    /// A trained response whose stop token is not trained.
    StopNotTrained,
    /// A trained token with bytes of a header.
    HeaderTrained,
    /// A trained token with bytes of a message that is not to be trained.
    ForeignByteTrained,
    /// The model of the vocabulary itself made a control token of a message's text.
    ForgedControl,
    /// The tokenizer reported an error.
    NotEncodable,
}

impl Reason {
    /// Every reason.
    pub const ALL: [Reason; 11] = [
        Reason::TooLong,
        Reason::ResponseCutOff,
        Reason::NoTrainedToken,
        Reason::DoubledBos,
        Reason::NoStop,
        Reason::StopInPieces,
        Reason::StopNotTrained,
        Reason::HeaderTrained,
        Reason::ForeignByteTrained,
        Reason::ForgedControl,
        Reason::NotEncodable,
    ];

    /// Its name in the ledger and in `rejects.parquet`.
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::TooLong => "too long",
            Reason::ResponseCutOff => "response cut off",
            Reason::NoTrainedToken => "no trained token",
            Reason::DoubledBos => "doubled beginning-of-text token",
            Reason::NoStop => "no stop marker",
            Reason::StopInPieces => "stop marker is not one token",
            Reason::StopNotTrained => "stop token not trained",
            Reason::HeaderTrained => "header trained",
            Reason::ForeignByteTrained => "untrained text trained",
            Reason::ForgedControl => "forged control token",
            Reason::NotEncodable => "not encodable",
        }
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A row that is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}: {detail}")]
pub struct Refusal {
    /// Why.
    pub reason: Reason,
    /// What exactly.
    pub detail: String,
    /// Tokens of the row, as far as it had any.
    pub counts: Counts,
}

impl Refusal {
    /// The refusal of a row that could not be encoded.
    pub fn of_encoding(error: &EncodeError) -> Self {
        Refusal {
            reason: match error {
                EncodeError::Forged { .. } => Reason::ForgedControl,
                EncodeError::Fault(_) => Reason::NotEncodable,
            },
            detail: error.to_string(),
            counts: Counts::default(),
        }
    }
}

/// Tokens of a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// All of them.
    pub tokens: u64,
    /// Those that are trained.
    pub trained: u64,
}

impl Counts {
    fn of(weights: &[f32]) -> Self {
        Counts {
            tokens: weights.len() as u64,
            trained: weights.iter().filter(|w| **w > 0.0).count() as u64,
        }
    }
}

/// A row as tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// The row's id.
    pub id: String,
    /// Its source.
    pub source: String,
    /// Its split.
    pub split: Split,
    /// Its kind.
    pub kind: Kind,
    /// Token ids, at most [`Rules::max_len`].
    pub ids: Vec<u32>,
    /// Weight of each token's loss.
    pub weights: Vec<f32>,
    /// The bytes of the row's text that each token stands for.
    pub offsets: Vec<Range<usize>>,
    /// Tokens before anything was cut.
    pub before: Counts,
    /// The tokens that end its trained responses, or its text.
    pub stops: BTreeSet<u32>,
    /// Trained responses; each one's stop token was seen to be trained before anything was cut.
    pub turns: u32,
}

impl Row {
    /// Its tokens now.
    pub fn counts(&self) -> Counts {
        Counts::of(&self.weights)
    }

    /// Its place in a pack.
    pub fn doc(&self) -> Doc {
        Doc {
            len: self.ids.len() as u32,
            row_id: self.id.clone(),
            source: self.source.clone(),
            kind: self.kind,
            offset: 0,
            truncated: self.ids.len() as u64 != self.before.tokens,
        }
    }
}

/// Everything that is known of a row before it is judged.
pub(crate) struct Work<'a> {
    pub(crate) row: &'a Rendered,
    pub(crate) encoded: Encoded,
    pub(crate) weights: Vec<f32>,
}

/// The ranges of a row's text that the template wrote, up to byte `end`, in order and apart from each other.
pub(crate) fn written(row: &Rendered, end: usize) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    for span in row.spans.iter().filter(|s| s.part != Part::Content) {
        let bytes = bytes(span);
        let bytes = bytes.start.min(end)..bytes.end.min(end);
        match ranges.last_mut() {
            Some(last) if last.end == bytes.start => last.end = bytes.end,
            _ if bytes.is_empty() => {}
            _ => ranges.push(bytes),
        }
    }
    ranges
}

/// A row's tokens and their weights, certified, and cut where the rules say so.
///
/// # Errors
/// The reason why the row is not taken. With [`TooLong::Error`] too long a row is [`Reason::TooLong`] as well, and it is for
/// the caller to stop.
pub fn tokenize(vocab: &Vocab, row: &Rendered, rules: &Rules) -> Result<Row, Refusal> {
    let encoded =
        vocab.encode(&row.text, &written(row, row.text.len())).map_err(|error| Refusal {
            reason: match error {
                EncodeError::Forged { .. } => Reason::ForgedControl,
                EncodeError::Fault(_) => Reason::NotEncodable,
            },
            detail: error.to_string(),
            counts: Counts::default(),
        })?;
    let weights = token_weights(row, &span_weights(row, rules.train_on), &encoded);
    let work = Work { row, encoded, weights };
    let before = Counts::of(&work.weights);
    let refuse = |reason, detail: String| Refusal { reason, detail, counts: before };
    let proof = certify(vocab, &work, rules).map_err(|(reason, detail)| refuse(reason, detail))?;
    let mut row = Row {
        id: row.id.clone(),
        source: row.source.clone(),
        split: row.split,
        kind: row.kind,
        ids: work.encoded.ids,
        weights: work.weights,
        offsets: work.encoded.offsets,
        before,
        stops: proof.stops,
        turns: proof.turns,
    };
    cut(&mut row, rules).map_err(|(reason, detail)| refuse(reason, detail))?;
    Ok(row)
}

fn cut(row: &mut Row, rules: &Rules) -> Result<(), (Reason, String)> {
    let max = rules.max_len as usize;
    if row.ids.len() <= max {
        return Ok(());
    }
    if rules.too_long != TooLong::Truncate {
        let detail = format!("{} tokens, a pack holds {max}", row.ids.len());
        return Err((Reason::TooLong, detail));
    }
    row.ids.truncate(max);
    row.weights.truncate(max);
    row.offsets.truncate(max);
    if row.counts().trained == 0 {
        let detail =
            format!("none of its {} trained tokens is among the first {max}", row.before.trained);
        return Err((Reason::ResponseCutOff, detail));
    }
    Ok(())
}
