//! Rendered rows in, tokenized rows out.

use hone_schema::{Rendered, Split};
use hone_tokens::{PromptIds, Refusal, Rules, Taken, Vocab, prompt_of, tokenize};

/// What became of a rendered row: its tokens, and what a model is asked when the row is held out; or why it is not taken.
pub(crate) type Made = Result<(Taken, Option<PromptIds>), Refusal>;

/// Tokenizes a row.
pub(crate) fn make(vocab: &Vocab, rules: &Rules, rendered: &Rendered) -> Made {
    let mut taken = tokenize(vocab, rendered, rules)?;
    let prompt = match taken.rows.first() {
        Some(first) if rendered.split != Split::Train => {
            prompt_of(vocab, rendered, first, rules.bos).map_err(|e| Refusal::of_encoding(&e))?
        }
        _ => None,
    };
    // Only pictures need to know which bytes a token stands for.
    taken.rows.iter_mut().for_each(|row| row.offsets = Vec::new());
    Ok((taken, prompt))
}
