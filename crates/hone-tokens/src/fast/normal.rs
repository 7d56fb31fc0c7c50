//! Normalizers: the ones that leave most text as it is are asked whether they would, the rest are run.

use serde_json::Value;
use tokenizers::tokenizer::normalizer::Range as On;
use tokenizers::{NormalizedString, Normalizer, Tokenizer};
use unicode_normalization_alignments::{IsNormalized, is_nfc_quick, is_nfkc_quick};

use crate::fast::view::View;

/// What is done to a piece of text before it is split.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Normal {
    /// Nothing.
    Nothing,
    /// Characters are composed.
    Nfc,
    /// Characters are composed, and lose what only concerns their look.
    Nfkc,
    /// Something is put before it, and blanks are written as something else: SentencePiece's way.
    Marked {
        /// What is put before a piece that is not empty.
        mark: Option<String>,
        /// What a blank is written as.
        blank: char,
    },
    /// Something else, which the tokenizers crate does.
    Other,
}

impl Normal {
    /// The normalizer that a `tokenizer.json` names.
    pub(crate) fn of(value: &Value) -> Self {
        let steps: Vec<&Value> = match (value, value["type"].as_str(), &value["normalizers"]) {
            (Value::Null, ..) => Vec::new(),
            (_, Some("Sequence"), Value::Array(steps)) => steps.iter().collect(),
            _ => vec![value],
        };
        let kinds: Vec<&str> = steps.iter().filter_map(|s| s["type"].as_str()).collect();
        let marked = |mark: Option<String>, replace: &Value| {
            let mut content = replace["content"].as_str()?.chars();
            let blank = content.next().filter(|_| content.next().is_none())?;
            let is_blank = replace["pattern"]["String"] == " ";
            let keeps_mark = mark.as_ref().is_none_or(|m| !m.is_empty() && !m.contains(' '));
            (is_blank && keeps_mark).then_some(Normal::Marked { mark, blank })
        };
        let known = match kinds[..] {
            _ if kinds.len() != steps.len() => None,
            [] => Some(Normal::Nothing),
            ["NFC"] => Some(Normal::Nfc),
            ["NFKC"] => Some(Normal::Nfkc),
            ["Replace"] => marked(None, steps[0]),
            ["Prepend", "Replace"] => {
                let mark = steps[0]["prepend"].as_str();
                mark.and_then(|mark| marked(Some(mark.to_owned()), steps[1]))
            }
            _ => None,
        };
        known.unwrap_or(Normal::Other)
    }

    /// What a blank becomes, if it does not stay one.
    pub(crate) fn blank(&self) -> Option<char> {
        match self {
            Normal::Marked { blank, .. } => Some(*blank),
            _ => None,
        }
    }

    /// The piece as the normalizer of `tokenizer`, which this is, writes it.
    pub(crate) fn apply<'a>(
        &self,
        tokenizer: &Tokenizer,
        piece: View<'a>,
    ) -> tokenizers::Result<View<'a>> {
        let leaves_it = match self {
            Normal::Nothing => true,
            Normal::Nfc => {
                is_low(&piece.text) || is_nfc_quick(piece.text.chars()) == IsNormalized::Yes
            }
            Normal::Nfkc => {
                piece.text.is_ascii() || is_nfkc_quick(piece.text.chars()) == IsNormalized::Yes
            }
            Normal::Marked { mark, blank } => {
                return Ok(piece.rewritten(0..piece.text.len(), mark.as_deref(), Some(*blank)));
            }
            Normal::Other => false,
        };
        match tokenizer.get_normalizer() {
            Some(normalizer) if !leaves_it => run(normalizer, &piece),
            _ => Ok(piece),
        }
    }
}

/// Whether all characters are below U+0300, where none changes under NFC and none combines with the one before it. A character
/// is of that kind if its first byte is below 0xCC.
fn is_low(text: &str) -> bool {
    text.bytes().all(|b| b < 0xcc)
}

fn run<'a>(normalizer: &impl Normalizer, piece: &View<'a>) -> tokenizers::Result<View<'a>> {
    let mut written = NormalizedString::from(&*piece.text);
    normalizer.normalize(&mut written)?;
    let mut map = Vec::with_capacity(written.get().len());
    for at in 0..written.get().len() {
        let bytes = written.convert_offsets(On::Normalized(at..at + 1));
        let bytes = bytes.ok_or("a byte of a normalized text stands for none of the text")?;
        map.push((bytes.start as u32, bytes.end as u32));
    }
    let from = piece.original_start();
    Ok(View::mapped(written.get().to_owned(), from, map))
}
