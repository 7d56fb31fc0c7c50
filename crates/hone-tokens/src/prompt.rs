//! What a model is asked in evaluation, and what it should say.

use hone_schema::{Kind, Part, Prompt, Rendered};

use crate::encode::EncodeError;
use crate::mask::first_of_last_response;
use crate::row::{Row, written};
use crate::vocab::Vocab;

/// A prompt, and how its ids compare with the row's.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptIds {
    /// The prompt.
    pub prompt: Prompt,
    /// Whether its ids are the first ids of the whole row: the model is asked in just the tokens it was trained on.
    pub is_prefix: bool,
}

/// The prompt of a row whose last message is a response; `None` for every other row. `tokens` are the row's, as far as they were
/// taken, `bos` is the token that begins a text.
///
/// # Errors
/// See [`EncodeError`].
pub fn prompt_of(
    vocab: &Vocab,
    row: &Rendered,
    tokens: &Row,
    bos: Option<u32>,
) -> Result<Option<PromptIds>, EncodeError> {
    let (Kind::Sft, Some(len), Some(first)) =
        (row.kind, row.prompt_len, first_of_last_response(row))
    else {
        return Ok(None);
    };
    let len = len as usize;
    let prompt = &row.text[..len];
    let prompt_ids = vocab.encode(prompt, &written(row, len))?.ids;
    let asked = row.spans.iter().rev().find(|s| s.role == "user");
    let question = asked.map_or_else(String::new, |span| content(row, span.message));
    let mut bare_ids: Vec<u32> = bos.into_iter().collect();
    bare_ids.extend(vocab.encode_text(&question)?);
    // Of a row that was cut, what stands before the first cut can be compared.
    let n = tokens.kept.first().filter(|range| range.start == 0).map_or(0, |range| range.end);
    let is_prefix = tokens.ids.iter().take(n as usize).zip(&prompt_ids).all(|(a, b)| a == b);
    let prompt = Prompt {
        id: row.id.clone(),
        source: row.source.clone(),
        split: row.split,
        prompt_ids,
        bare_ids,
        prompt: prompt.to_owned(),
        question,
        reference: answer(row, row.spans[first].message),
        meta: row.meta.clone(),
    };
    Ok(Some(PromptIds { prompt, is_prefix }))
}

/// What a response says; where it only calls tools, the calls.
fn answer(row: &Rendered, message: Option<u32>) -> String {
    let content = content(row, message);
    if content.is_empty() { said(row, message, Part::ToolCall) } else { content }
}

/// What a message says.
fn content(row: &Rendered, message: Option<u32>) -> String {
    said(row, message, Part::Content)
}

fn said(row: &Rendered, message: Option<u32>, part: Part) -> String {
    row.spans
        .iter()
        .filter(|span| span.message == message && span.part == part)
        .map(|span| &row.text[span.start as usize..span.end as usize])
        .collect()
}
