//! A row's tokens with their reasons, for pictures and questions: made by the mask's own functions, before anything is judged
//! or cut, so that a row that is refused can be looked at as well.

use std::ops::Range;

use hone_schema::Rendered;

use crate::encode::{EncodeError, Encoded};
use crate::mask::{Mask, touched};
use crate::row::{Rules, written};
use crate::vocab::Vocab;

/// A row as the mask sees it.
#[derive(Clone, Debug)]
pub struct Look {
    /// Its ids, and the bytes each stands for.
    pub encoded: Encoded,
    /// Weight of each token's loss.
    pub weights: Vec<f32>,
    /// Weight of each span's loss under the policy.
    pub span_weights: Vec<f32>,
    /// Bytes of thoughts that the policy masks, whatever their spans weigh; in order and apart from each other.
    pub masked: Vec<Range<usize>>,
    /// Indexes of the spans that each token has bytes of.
    pub touched: Vec<Range<usize>>,
}

/// The tokens of `row` under `rules`, whatever the certificate makes of them.
///
/// # Errors
/// See [`EncodeError`].
pub fn look(vocab: &Vocab, row: &Rendered, rules: &Rules) -> Result<Look, EncodeError> {
    let encoded = vocab.encode(&row.text, &written(row, row.text.len()))?;
    let mask = Mask::new(row, &rules.policy);
    let weights = mask.token_weights(vocab, row, &encoded);
    let touched = encoded.offsets.iter().map(|token| touched(&row.spans, token)).collect();
    Ok(Look { encoded, weights, span_weights: mask.spans, masked: mask.masked, touched })
}
