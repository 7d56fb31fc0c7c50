//! Text to ids, with control tokens only where the template wrote them.
//!
//! The pipeline is the reference's own: cut at added tokens, normalize, cut again at those that are matched normalized,
//! pre-tokenize, run the model, convert offsets. Vocabularies that can be compiled go through it in `fast`; for the others the
//! parts of the tokenizers crate are called one by one, because it has no switch for where an added token may stand (its
//! `encode_special_tokens` is for the whole text and only for tokens flagged special).

use std::cell::RefCell;
use std::ops::Range;

use tokenizers::tokenizer::normalizer::Range as On;
use tokenizers::{
    Model, NormalizedString, Normalizer, OffsetType, PreTokenizedString, PreTokenizer, Token,
};

use crate::added::{AddedTokens, Piece};
use crate::fast::Fast;
use crate::vocab::Vocab;

/// Ids of a text, and the bytes each stands for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// The ids.
    pub ids: Vec<u32>,
    /// Bytes of the text that each token stands for. A token that holds part of a character has the whole of it; one that the
    /// tokenizer puts before the text has the first character. An added token has its own bytes, without the blanks that it
    /// takes with it.
    pub offsets: Vec<Range<usize>>,
    /// Pieces of the text, as they came to the model, that hold something for which the vocabulary has no token: the ids are
    /// those of the rest, and offsets within the piece may be too early. Usually there are none.
    pub lost: Vec<Range<usize>>,
}

/// Why a text could not be encoded.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum EncodeError {
    /// The model itself, not an added token, made a control token of what a message says.
    #[error("the text at byte {at} became the control token `{token}`")]
    Forged {
        /// First byte.
        at: usize,
        /// The token.
        token: String,
    },
    /// From the tokenizers crate.
    #[error("{0}")]
    Fault(String),
}

type Slices = Vec<(NormalizedString, Option<Vec<Token>>)>;

impl Vocab {
    /// Encodes `text`. Control tokens are taken as such only where all their bytes lie in one of `written`, the ranges that
    /// the template wrote (in order, apart from each other); everywhere else their bytes are ordinary text.
    ///
    /// # Errors
    /// See [`EncodeError`].
    pub fn encode(&self, text: &str, written: &[Range<usize>]) -> Result<Encoded, EncodeError> {
        let may =
            |id: u32, bytes: Range<usize>| !self.control.contains(id) || is_within(&bytes, written);
        let encoded = match &self.fast {
            Some(fast) if text.len() < u32::MAX as usize => self.run_fast(fast, text, &may)?,
            _ => self.run_reference(text, &may)?,
        };
        self.refuse_forged(&encoded, written)?;
        Ok(encoded)
    }

    /// The way of this crate.
    fn run_fast(
        &self,
        fast: &Fast,
        text: &str,
        may: &impl Fn(u32, Range<usize>) -> bool,
    ) -> Result<Encoded, EncodeError> {
        let mut run = fast.begin(text.len());
        for piece in self.raw.cut(text, may) {
            if let Some((id, own)) = piece.token {
                run.encoded.push(id, own);
                continue;
            }
            let view = fast.view(&self.tokenizer, text, piece.range)?;
            if self.normalized.is_empty() {
                fast.part(&mut run, &view, 0..view.text.len())?;
                continue;
            }
            let may = |id, bytes| may(id, view.original(bytes));
            for part in self.normalized.cut(&view.text, may) {
                match part.token {
                    Some((id, own)) => run.encoded.push(id, view.original(own)),
                    None => fast.part(&mut run, &view, part.range)?,
                }
            }
        }
        Ok(fast.end(run))
    }

    /// The way of the tokenizers crate, part by part.
    fn run_reference(
        &self,
        text: &str,
        may: &impl Fn(u32, Range<usize>) -> bool,
    ) -> Result<Encoded, EncodeError> {
        let fault = |e: tokenizers::Error| EncodeError::Fault(e.to_string());
        let mut work = PreTokenizedString::from(text);
        if !self.raw.is_empty() {
            work.split(|_, piece| cut(&self.raw, piece, may)).map_err(fault)?;
        }
        let normalizer = self.tokenizer.get_normalizer();
        work.split(|_, mut piece| {
            if let Some(normalizer) = normalizer {
                normalizer.normalize(&mut piece)?;
            }
            cut(&self.normalized, piece, may)
        })
        .map_err(fault)?;
        if let Some(pre_tokenizer) = self.tokenizer.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut work).map_err(fault)?;
        }
        let model = self.tokenizer.get_model();
        let lost = RefCell::new(Vec::new());
        work.tokenize(|piece| {
            let tokens = model.tokenize(piece.get())?;
            // A model that drops something counts on as if it had not been there, so that its last token ends too early.
            if tokens.last().map_or(0, |token| token.offsets.1) < piece.get().len() {
                lost.borrow_mut().push(original(piece, 0..piece.get().len()).ok_or(NO_ORIGIN)?);
            }
            Ok(tokens)
        })
        .map_err(fault)?;
        let encoding = work.into_encoding(None, 0, OffsetType::Byte).map_err(fault)?;
        Ok(Encoded {
            ids: encoding.get_ids().to_vec(),
            offsets: encoding.get_offsets().iter().map(|(s, e)| *s..*e).collect(),
            lost: lost.into_inner(),
        })
    }

    /// Encodes `text` as text: nothing in it becomes a control token.
    ///
    /// # Errors
    /// See [`EncodeError`].
    pub fn encode_text(&self, text: &str) -> Result<Vec<u32>, EncodeError> {
        Ok(self.encode(text, &[])?.ids)
    }

    /// A Unigram or word-level model may know a control token as a word and find it in a text by itself.
    fn refuse_forged(
        &self,
        encoded: &Encoded,
        written: &[Range<usize>],
    ) -> Result<(), EncodeError> {
        let forged = encoded
            .ids
            .iter()
            .zip(&encoded.offsets)
            .find(|(id, bytes)| self.control.contains(**id) && !is_within(bytes, written));
        match forged {
            Some((id, bytes)) => Err(EncodeError::Forged {
                at: bytes.start,
                token: self.token(*id).unwrap_or_default(),
            }),
            None => Ok(()),
        }
    }
}

fn is_within(bytes: &Range<usize>, written: &[Range<usize>]) -> bool {
    let idx = written.partition_point(|range| range.end <= bytes.start);
    bytes.start < bytes.end
        && written
            .get(idx)
            .is_some_and(|range| range.start <= bytes.start && bytes.end <= range.end)
}

const NO_ORIGIN: &str = "a piece of a normalized text stands for none of the text";

/// The bytes of the whole text that some bytes of a piece stand for.
fn original(piece: &NormalizedString, bytes: Range<usize>) -> Option<Range<usize>> {
    let shift = piece.offsets_original().0;
    let bytes = piece.convert_offsets(On::Normalized(bytes))?;
    Some(shift + bytes.start..shift + bytes.end)
}

/// Cuts a piece of the text at added tokens; `may` is asked about bytes of the original text.
fn cut(
    tokens: &AddedTokens,
    piece: NormalizedString,
    may: &impl Fn(u32, Range<usize>) -> bool,
) -> tokenizers::Result<Slices> {
    if tokens.is_empty() {
        return Ok(vec![(piece, None)]);
    }
    let pieces = tokens
        .cut(piece.get(), |id, range| original(&piece, range).is_some_and(|bytes| may(id, bytes)));
    pieces.into_iter().map(|part| slice(&piece, part)).collect()
}

fn slice(
    whole: &NormalizedString,
    Piece { range, token }: Piece,
) -> tokenizers::Result<(NormalizedString, Option<Vec<Token>>)> {
    let start = range.start;
    let part =
        whole.slice(On::Normalized(range)).ok_or("a cut between two characters is not one")?;
    let tokens = token.map(|(id, own)| {
        let text = whole.get()[own.clone()].to_owned();
        vec![Token::new(id, text, (own.start - start, own.end - start))]
    });
    Ok((part, tokens))
}
