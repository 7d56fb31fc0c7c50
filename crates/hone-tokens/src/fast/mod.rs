//! An encoder for byte-pair vocabularies that gives the ids and offsets of the tokenizers crate, many times faster.
//!
//! What a `tokenizer.json` asks for is compiled once: its normalizer, its pre-tokenizer (the expressions of real families
//! are scanners written by hand, others run on the engine), its merges. What cannot be compiled is left to the tokenizers
//! crate, which is the reference: tests compare both on everything they can think of.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use serde_json::Value;
use serde_json::value::RawValue;
use tokenizers::Tokenizer;

use crate::encode::{EncodeError, Encoded};

use cache::{Cache, Found};
use json::Document;
use merges::Word;
use model::Model;
use normal::Normal;
use split::{Prefix, Splitter};
use texts::Texts;
use view::View;

mod cache;
mod classes;
mod joins;
pub(crate) mod json;
mod merges;
mod model;
mod normal;
mod scan;
mod split;
mod texts;
mod view;

#[cfg(test)]
mod tests;

/// A compiled vocabulary.
pub(crate) struct Fast {
    normal: Normal,
    splitter: Splitter,
    model: Model,
    /// One for each thread that encodes at the same time.
    caches: Mutex<Vec<Cache>>,
}

/// A text on its way.
pub(crate) struct Run {
    /// What was encoded so far.
    pub(crate) encoded: Encoded,
    cache: Cache,
    word: Word,
}

impl Fast {
    /// Compiles a document, or says that it is not of the kind that can be.
    pub(crate) fn new(document: &Document<'_>) -> Option<Self> {
        let value = |part: Option<&RawValue>| {
            part.map_or(Some(Value::Null), |part| serde_json::from_str(part.get()).ok())
        };
        let mut splitter = Splitter::of(&value(document.pre_tokenizer)?)?;
        let normal = Normal::of(&value(document.normalizer)?);
        let mark = match splitter.prefix {
            Prefix::Mark { mark, .. } => Some(mark),
            _ => normal.blank(),
        };
        let mut model = Model::new(&document.model, splitter.by_bytes, mark)?;
        if normal.blank().is_some_and(|blank| blank != ' ') {
            splitter.forget_blanks();
        }
        if let Some(joins) = model.joins.take().filter(|_| splitter.is_whole()) {
            splitter.cut_where_nothing_joins(joins);
        }
        Some(Fast { normal, splitter, model, caches: Mutex::default() })
    }

    /// The tokens of the model.
    pub(crate) fn texts(&self) -> &Texts {
        &self.model.texts
    }

    /// Begins a text of so many bytes.
    pub(crate) fn begin(&self, n_bytes: usize) -> Run {
        let mut caches = self.caches.lock().unwrap_or_else(PoisonError::into_inner);
        let cache = caches.pop();
        drop(caches);
        let n = n_bytes / 3;
        Run {
            encoded: Encoded {
                ids: Vec::with_capacity(n),
                offsets: Vec::with_capacity(n),
                lost: Vec::new(),
            },
            cache: cache.unwrap_or_else(Cache::new),
            word: Word::default(),
        }
    }

    /// Ends a text.
    pub(crate) fn end(&self, run: Run) -> Encoded {
        let mut caches = self.caches.lock().unwrap_or_else(PoisonError::into_inner);
        caches.push(run.cache);
        run.encoded
    }

    /// A piece of a text between added tokens, normalized. `tokenizer` is the one that this was compiled from.
    pub(crate) fn view<'a>(
        &self,
        tokenizer: &Tokenizer,
        text: &'a str,
        piece: Range<usize>,
    ) -> Result<View<'a>, EncodeError> {
        let view = View::plain(text, piece);
        self.normal.apply(tokenizer, view).map_err(|e| EncodeError::Fault(e.to_string()))
    }

    /// Encodes a part of a view that holds no added token.
    pub(crate) fn part(
        &self,
        run: &mut Run,
        view: &View<'_>,
        part: Range<usize>,
    ) -> Result<(), EncodeError> {
        if part.is_empty() {
            return Ok(());
        }
        self.splitter.words(view, part, |view, word| self.word(run, view, word))
    }

    #[inline]
    fn word(&self, run: &mut Run, view: &View<'_>, bytes: Range<usize>) {
        let Range { start, end } = bytes;
        let key = Cache::key(view.text.as_bytes(), start, end);
        match key.map_or(Found::Nothing, |key| run.cache.find(key)) {
            Found::One(id) => {
                run.encoded.push(id, view.original(start..end));
            }
            Found::Several(tokens) => run.encoded.push_all(view, start, tokens),
            Found::Nothing => {
                let is_whole = self.model.tokens(&view.text[start..end], &mut run.word);
                match key {
                    _ if !is_whole => run.encoded.lost.push(view.original(start..end)),
                    Some(key) => run.cache.keep(key, &run.word.symbols),
                    None => {}
                }
                run.encoded.push_all(view, start, &run.word.symbols);
            }
        }
    }
}

impl Encoded {
    /// Adds a token.
    #[inline]
    pub(crate) fn push(&mut self, id: u32, bytes: Range<usize>) {
        self.ids.push(id);
        self.offsets.push(bytes);
    }

    /// Adds tokens that stand for the bytes of a view from `at` on.
    fn push_all(&mut self, view: &View<'_>, mut at: usize, tokens: &[(u32, u32)]) {
        for (id, len) in tokens {
            let end = at + *len as usize;
            self.push(*id, view.original(at..end));
            at = end;
        }
    }
}
