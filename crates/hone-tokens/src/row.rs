//! A row: its ids, its weights, and why it is refused when it is.

use std::collections::BTreeSet;
use std::ops::Range;

use hone_schema::{Doc, Kind, Rendered, Roles, Split};

use crate::certificate::certify;
use crate::cut::{TooLong, cut};
use crate::encode::{EncodeError, Encoded};
use crate::mask::{Mask, bytes};
use crate::policy::Policy;
use crate::vocab::Vocab;

/// How rows become tokens.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Longest row, in tokens.
    pub max_len: u32,
    /// What happens to longer ones.
    pub too_long: TooLong,
    /// What is trained.
    pub policy: Policy,
    /// The token that begins a text, by the template.
    pub bos: Option<u32>,
    /// Number of rows of the model's embedding, where it is known: no row may have an id beyond them.
    pub n_embeddings: Option<u32>,
}

/// Why a row is refused, as it stands in the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// Longer than a pack, and the rule is to leave such rows out.
    TooLong,
    /// Longer than a pack, and what fits holds no trained token.
    ResponseCutOff,
    /// Longer than a pack, and too long still without anything that is not trained.
    ResponseDoesNotFit,
    /// Longer than a pack, and cut just between a response and its stop token.
    StopCutOff,
    /// A piece of a row that was split, without a trained token.
    UntrainedPiece,
    /// Nothing in it is trained.
    NoTrainedToken,
    /// The same of a sample of an earlier answer, where only the last one of a row is trained.
    NotTheLast,
    /// The same of what is left of a row whose answers are samples of their own.
    TrainedElsewhere,
    /// A token that begins a text where no text begins.
    DoubledBos,
    /// A trained response without a stop marker.
    NoStop,
    /// A stop marker that the vocabulary writes with several tokens.
    StopInPieces,
    /// A trained response whose stop token is not trained.
    StopNotTrained,
    /// A stop token that is trained where the policy trains none.
    StopTrained,
    /// A trained token with bytes of a header.
    HeaderTrained,
    /// A trained token with bytes of a message that is not to be trained.
    ForeignByteTrained,
    /// A trained token that weighs more than the data gives one of its bytes.
    TooHeavy,
    /// A first token that is trained, though nothing predicts it.
    FirstTrained,
    /// An id that the model has no embedding for.
    NotInModel,
    /// Text that is to be trained and is in no token: the vocabulary cannot write it.
    TextLost,
    /// The model of the vocabulary itself made a control token of a message's text.
    ForgedControl,
    /// The tokenizer reported an error.
    NotEncodable,
}

impl Reason {
    /// Every reason.
    pub const ALL: [Reason; 21] = [
        Reason::TooLong,
        Reason::ResponseCutOff,
        Reason::ResponseDoesNotFit,
        Reason::StopCutOff,
        Reason::UntrainedPiece,
        Reason::NoTrainedToken,
        Reason::NotTheLast,
        Reason::TrainedElsewhere,
        Reason::DoubledBos,
        Reason::NoStop,
        Reason::StopInPieces,
        Reason::StopNotTrained,
        Reason::StopTrained,
        Reason::HeaderTrained,
        Reason::ForeignByteTrained,
        Reason::TooHeavy,
        Reason::FirstTrained,
        Reason::NotInModel,
        Reason::TextLost,
        Reason::ForgedControl,
        Reason::NotEncodable,
    ];

    /// Its name in the ledger and in `rejects.parquet`.
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::TooLong => "too long",
            Reason::ResponseCutOff => "response cut off",
            Reason::ResponseDoesNotFit => "response does not fit",
            Reason::StopCutOff => "stop token cut off",
            Reason::UntrainedPiece => "piece without a trained token",
            Reason::NoTrainedToken => "no trained token",
            Reason::NotTheLast => "not the last answer",
            Reason::TrainedElsewhere => "trained in other samples",
            Reason::DoubledBos => "doubled beginning-of-text token",
            Reason::NoStop => "no stop marker",
            Reason::StopInPieces => "stop marker is not one token",
            Reason::StopNotTrained => "stop token not trained",
            Reason::StopTrained => "stop token trained",
            Reason::HeaderTrained => "header trained",
            Reason::ForeignByteTrained => "untrained text trained",
            Reason::TooHeavy => "weight above the data's",
            Reason::FirstTrained => "first token trained",
            Reason::NotInModel => "id beyond the model's vocabulary",
            Reason::TextLost => "text that the vocabulary cannot write",
            Reason::ForgedControl => "forged control token",
            Reason::NotEncodable => "not encodable",
        }
    }

    /// Whether the row is too long, which is for the pipeline to decide about, and no violation of what the certificate asks.
    pub fn is_about_length(self) -> bool {
        matches!(
            self,
            Reason::TooLong
                | Reason::ResponseCutOff
                | Reason::ResponseDoesNotFit
                | Reason::StopCutOff
                | Reason::UntrainedPiece
        )
    }

    /// Whether the row does not hold what the certificate asks. Else it is too long, or another sample of the same row is the
    /// one that trains what the policy asks for.
    pub fn is_violation(self) -> bool {
        !self.is_about_length() && !matches!(self, Reason::NotTheLast | Reason::TrainedElsewhere)
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
    pub(crate) fn of(weights: &[f32]) -> Self {
        Counts {
            tokens: weights.len() as u64,
            trained: weights.iter().filter(|w| **w > 0.0).count() as u64,
        }
    }
}

/// A row as tokens, or a part of one.
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
    /// Whose words its trained tokens are.
    pub roles: Roles,
    /// The bytes of the row's text that each token stands for.
    pub offsets: Vec<Range<usize>>,
    /// Which of the whole row's tokens these are: ranges in order, apart from each other; one range where nothing was cut out.
    pub kept: Vec<Range<u32>>,
    /// Tokens of the whole row.
    pub n_whole: u32,
    /// Tokens that this is to account for: those of the whole row, or of its piece where it was split.
    pub before: Counts,
    /// The tokens that end the whole row's trained responses, or its text.
    pub stops: BTreeSet<u32>,
    /// Trained responses of the whole row, each certified before anything was cut; 0 for a piece behind the first.
    pub turns: u32,
}

impl Row {
    /// Its tokens now.
    pub fn counts(&self) -> Counts {
        Counts::of(&self.weights)
    }

    /// Whether tokens of the row are missing from it.
    pub fn is_cut(&self) -> bool {
        self.ids.len() != self.n_whole as usize
    }

    /// Index in the whole row of its first token.
    pub fn offset(&self) -> u32 {
        self.kept.first().map_or(0, |range| range.start)
    }

    /// Its place in a pack; `row` is the index of the whole row among the rendered ones.
    pub fn doc(&self, row: u64) -> Doc {
        Doc {
            len: self.ids.len() as u32,
            row,
            row_id: self.id.clone(),
            source: self.source.clone(),
            kind: self.kind,
            offset: self.offset(),
            truncated: self.is_cut(),
            kept: if self.kept.len() > 1 { self.kept.clone() } else { Vec::new() },
        }
    }
}

/// What became of a row that is taken.
#[derive(Clone, Debug, PartialEq)]
pub struct Taken {
    /// The row, or its pieces in order where it was split; at least one.
    pub rows: Vec<Row>,
    /// Its pieces that are not taken.
    pub refused: Vec<Refusal>,
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
    for span in row.spans.iter().filter(|s| !s.part.is_said()) {
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
pub fn tokenize(vocab: &Vocab, row: &Rendered, rules: &Rules) -> Result<Taken, Refusal> {
    let encoded = vocab
        .encode(&row.text, &written(row, row.text.len()))
        .map_err(|error| Refusal::of_encoding(&error))?;
    let weights = Mask::new(row, &rules.policy).token_weights(vocab, row, &encoded);
    let work = Work { row, encoded, weights };
    let before = Counts::of(&work.weights);
    let refuse = |(reason, detail)| Refusal { reason, detail, counts: before };
    let proof = certify(vocab, &work, rules).map_err(refuse)?;
    cut(vocab, work, proof, rules).map_err(refuse)
}
