//! A vocabulary: what a `tokenizer.json` says.

use std::collections::BTreeSet;

use serde::Deserialize;
use serde_json::{Map, Value};
use tokenizers::{Decoder, Model, ModelWrapper, NormalizedString, Normalizer, Tokenizer};

use crate::added::AddedTokens;
use crate::fast::Fast;
use crate::fast::json::Document;

/// Longest `tokenizer.json` that is parsed: twice the largest one seen (Gemma 3, 33 MB).
const JSON_BYTES_MAX: usize = 64 << 20;

/// Most added tokens: five times what the largest families have.
const ADDED_MAX: usize = 32_768;

/// Longest added token, in bytes: markers are words, not texts.
const ADDED_BYTES_MAX: usize = 1024;

/// Longest text that a normalizer or pre-tokenizer may hold, in bytes: they replace or prepend a character or two, and what is
/// longer makes a megabyte of each blank. Tables of characters are another thing.
const LITERAL_BYTES_MAX: usize = 4096;

/// Most parts of the sequences of a normalizer or of a pre-tokenizer, all depths together: each goes over the whole text, and
/// no family has more than a dozen.
const PARTS_MAX: usize = 64;

/// Keys of those sequences.
const PARTS_KEYS: [&str; 2] = ["normalizers", "pretokenizers"];

/// Key of a normalizer's table of characters.
const TABLE_KEY: &str = "precompiled_charsmap";

/// Highest id: sixty times that of the largest vocabulary in use. Embeddings have a row for each.
const ID_MAX: u32 = 1 << 24;

/// A tokenizer, with its added tokens taken apart.
pub struct Vocab {
    /// Of the tokenizers crate: the whole file, or all but the model where that is compiled.
    pub(crate) tokenizer: Tokenizer,
    /// The model and what stands before it, compiled.
    pub(crate) fast: Option<Fast>,
    /// Added tokens that are looked for in the text as it is.
    pub(crate) raw: AddedTokens,
    /// Added tokens that are looked for in the normalized text.
    pub(crate) normalized: AddedTokens,
    /// Ids of the added tokens that a message must not be able to write.
    pub(crate) control: IdSet,
}

/// Why some bytes are not a vocabulary.
#[derive(Debug, thiserror::Error)]
pub enum VocabError {
    /// Longer than the limit.
    #[error("tokenizer.json has {bytes} bytes, more than {JSON_BYTES_MAX}")]
    TooLarge {
        /// Its length.
        bytes: usize,
    },
    /// Not JSON, or not a tokenizer that the tokenizers crate knows.
    #[error("tokenizer.json is not a tokenizer: {0}")]
    Form(String),
    /// Too many added tokens.
    #[error("tokenizer.json adds {found} tokens, more than {ADDED_MAX}")]
    TooManyAdded {
        /// How many.
        found: usize,
    },
    /// An added token longer than the limit.
    #[error("added token {id} of tokenizer.json has {bytes} bytes, more than {ADDED_BYTES_MAX}")]
    AddedTooLong {
        /// Its id.
        id: u32,
        /// Its length.
        bytes: usize,
    },
    /// An added token that gets another id than the one it is declared with.
    #[error("added token `{content}` of tokenizer.json is declared as {declared}, but is {found}")]
    AddedId {
        /// The token.
        content: String,
        /// The id it is declared with.
        declared: u32,
        /// The id it gets.
        found: String,
    },
    /// A normalizer or pre-tokenizer with a long text in it.
    #[error(
        "a normalizer or pre-tokenizer of tokenizer.json holds a text of {bytes} bytes, more than {LITERAL_BYTES_MAX}"
    )]
    Literal {
        /// Its length.
        bytes: usize,
    },
    /// A normalizer or pre-tokenizer of many parts.
    #[error(
        "a normalizer or pre-tokenizer of tokenizer.json is a sequence of {found} parts, more than {PARTS_MAX}"
    )]
    TooManyParts {
        /// How many.
        found: usize,
    },
    /// An id that no model has an embedding for.
    #[error("tokenizer.json gives a token the id {id}, more than {ID_MAX}")]
    IdTooHigh {
        /// The id.
        id: u32,
    },
    /// Merges are left out at random.
    #[error(
        "tokenizer.json has a dropout of {dropout}: the same text would have other ids each time; set it to null"
    )]
    Dropout {
        /// The probability.
        dropout: f32,
    },
    /// A name that is no added token.
    #[error("`{0}` is not an added token of this tokenizer, so nothing has to be allowed for it")]
    NotAdded(String),
    /// A special token that was to be allowed in messages.
    #[error("`{0}` is a special token of this tokenizer; a message must not be able to write it")]
    Special(String),
}

/// The part of a `tokenizer.json` that is compared with what the tokenizers crate made of it.
#[derive(Deserialize)]
struct Declared {
    #[serde(default)]
    added_tokens: Vec<DeclaredToken>,
}

#[derive(Deserialize)]
struct DeclaredToken {
    id: u32,
    content: String,
}

impl Vocab {
    /// Reads the bytes of a `tokenizer.json`.
    ///
    /// # Errors
    /// See [`VocabError`].
    pub fn from_json(bytes: &[u8]) -> Result<Self, VocabError> {
        if bytes.len() > JSON_BYTES_MAX {
            return Err(VocabError::TooLarge { bytes: bytes.len() });
        }
        check_writers(bytes)?;
        Vocab::compiled(bytes).map_or_else(|| Vocab::reference(bytes), Ok)
    }

    /// Whether this vocabulary runs in this crate's own encoder, and not in the tokenizers crate.
    pub fn is_compiled(&self) -> bool {
        self.fast.is_some()
    }

    /// A file of the usual kind, with its model compiled. Whatever is unusual or wrong is left to [`Vocab::reference`].
    fn compiled(bytes: &[u8]) -> Option<Self> {
        let document: Document = serde_json::from_slice(bytes).ok()?;
        let declared: Vec<DeclaredToken> = document.added_tokens().ok()?;
        check_declared(&declared).ok()?;
        if document.model.vocab.0.iter().any(|(_, id)| *id > ID_MAX) {
            return None;
        }
        let fast = Fast::new(&document)?;
        // The ids that the reference gives: those of the model, and from there on in order.
        let mut next = document.model.vocab.0.len() as u32;
        let mut known = Map::new();
        for token in declared.into_iter().filter(|t| !t.content.is_empty()) {
            let id = fast.texts().id(&token.content).unwrap_or_else(|| {
                next += 1;
                next - 1
            });
            let was_known = known.insert(token.content, Value::from(id)).is_some();
            if id != token.id || was_known {
                return None;
            }
        }
        let tokenizer = Tokenizer::from_bytes(document.shell(known)).ok()?;
        Vocab::new(tokenizer, Some(fast)).ok()
    }

    /// As [`Vocab::from_json`], with all work left to the tokenizers crate: what the encoder of this crate is compared with.
    ///
    /// # Errors
    /// See [`VocabError`].
    pub fn reference(bytes: &[u8]) -> Result<Self, VocabError> {
        if bytes.len() > JSON_BYTES_MAX {
            return Err(VocabError::TooLarge { bytes: bytes.len() });
        }
        let form = |e: &dyn std::fmt::Display| VocabError::Form(e.to_string());
        let declared: Declared = serde_json::from_slice(bytes).map_err(|e| form(&e))?;
        check_declared(&declared.added_tokens)?;
        let tokenizer = Tokenizer::from_bytes(bytes).map_err(|e| form(&e))?;
        for token in declared.added_tokens.iter().filter(|t| !t.content.is_empty()) {
            let found = tokenizer.token_to_id(&token.content);
            if found != Some(token.id) {
                return Err(VocabError::AddedId {
                    content: token.content.clone(),
                    declared: token.id,
                    found: found.map_or("none".to_owned(), |id| id.to_string()),
                });
            }
        }
        if let ModelWrapper::BPE(model) = tokenizer.get_model()
            && let Some(dropout) = model.dropout.filter(|dropout| *dropout > 0.0)
        {
            return Err(VocabError::Dropout { dropout });
        }
        match tokenizer.get_vocab(true).into_values().max() {
            Some(id) if id > ID_MAX => Err(VocabError::IdTooHigh { id }),
            _ => Vocab::new(tokenizer, None),
        }
    }

    fn new(tokenizer: Tokenizer, fast: Option<Fast>) -> Result<Self, VocabError> {
        let (mut raw, mut normalized) = (AddedTokens::default(), AddedTokens::default());
        let mut control = IdSet::default();
        for (id, token) in tokenizer.get_added_vocabulary().get_added_tokens_decoder() {
            if token.normalized {
                let mut text = NormalizedString::from(token.content.as_str());
                if let Some(normalizer) = tokenizer.get_normalizer() {
                    normalizer.normalize(&mut text).map_err(|e| VocabError::Form(e.to_string()))?;
                }
                normalized.insert(text.get(), *id, token);
            } else {
                raw.insert(&token.content, *id, token);
            }
            // Runs of blanks are added tokens of some families (GPT-NeoX; Gemma, which writes them `▁`): text, and no marker.
            let is_blank = token.content.chars().all(|c| c.is_whitespace() || c == '▁');
            if token.special || !is_blank {
                control.insert(*id);
            }
        }
        Ok(Vocab { tokenizer, fast, raw, normalized, control })
    }

    /// Lets messages write `token` as one token, as the reference does: for markers that are part of what a model says, such
    /// as `<think>`.
    ///
    /// # Errors
    /// A text that is no added token; a special token.
    pub fn allow(&mut self, token: &str) -> Result<(), VocabError> {
        let added = self.tokenizer.get_added_vocabulary();
        let Some(id) = added.get_vocab().get(token) else {
            return Err(VocabError::NotAdded(token.to_owned()));
        };
        if added.is_special_token(token) {
            return Err(VocabError::Special(token.to_owned()));
        }
        self.control.remove(*id);
        Ok(())
    }

    /// The id of a token by its text, added or not.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        let id = self.tokenizer.token_to_id(token);
        id.or_else(|| self.fast.as_ref()?.texts().id(token))
    }

    /// The text of a token as the vocabulary has it; bytes of a byte-level vocabulary in its own alphabet.
    pub fn token(&self, id: u32) -> Option<String> {
        let token = self.tokenizer.id_to_token(id);
        token.or_else(|| Some(self.fast.as_ref()?.texts().text(id)?.to_owned()))
    }

    /// Text of some ids; control tokens are left out when `skip_special` and they are flagged special.
    ///
    /// # Errors
    /// What the decoder has to say; the ones in use have nothing.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, DecodeError> {
        let added = self.tokenizer.get_added_vocabulary();
        let is_left_out = |token: &String| skip_special && added.is_special_token(token);
        let tokens = ids.iter().filter_map(|id| self.token(*id)).filter(|t| !is_left_out(t));
        match self.tokenizer.get_decoder() {
            Some(decoder) => {
                decoder.decode(tokens.collect()).map_err(|e| DecodeError(e.to_string()))
            }
            None => Ok(tokens.collect::<Vec<_>>().join(" ")),
        }
    }

    /// Whether this is an added token that no message can write.
    pub fn is_control(&self, id: u32) -> bool {
        self.control.contains(id)
    }

    /// Whether this is an added token that the tokenizer flags as special.
    pub fn is_special(&self, id: u32) -> bool {
        let added = self.tokenizer.get_added_vocabulary().get_added_tokens_decoder();
        added.get(&id).is_some_and(|token| token.special)
    }

    /// The control tokens, by id.
    pub fn control_tokens(&self) -> impl Iterator<Item = (u32, String)> + '_ {
        self.control.ids.iter().filter_map(|id| Some((*id, self.token(*id)?)))
    }

    /// Number of rows an embedding needs: the highest id and one.
    pub fn size(&self) -> usize {
        let added = self.tokenizer.get_added_vocabulary();
        let highest = added.get_added_tokens_decoder().keys().max();
        let of_added = highest.map_or(0, |id| *id as usize + 1);
        let of_model = match &self.fast {
            Some(fast) => fast.texts().size(),
            None => {
                let model = self.tokenizer.get_model().get_vocab();
                model.values().max().map_or(0, |id| *id as usize + 1)
            }
        };
        of_added.max(of_model)
    }
}

impl std::fmt::Debug for Vocab {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Vocab({} tokens, {} control)", self.size(), self.control.ids.len())
    }
}

/// A set of ids that is asked about every token.
#[derive(Debug, Default)]
pub(crate) struct IdSet {
    ids: BTreeSet<u32>,
    /// Bits of the ids that are not too high for that.
    bits: Vec<u64>,
}

impl IdSet {
    /// Ids from here on are looked up in the tree.
    const BITS_MAX: u32 = 1 << 22;

    fn insert(&mut self, id: u32) {
        self.ids.insert(id);
        self.set(id, true);
    }

    fn remove(&mut self, id: u32) {
        self.ids.remove(&id);
        self.set(id, false);
    }

    fn set(&mut self, id: u32, is_in: bool) {
        if id < Self::BITS_MAX {
            let (word, bit) = (id as usize / 64, 1 << (id % 64));
            if self.bits.len() <= word {
                self.bits.resize(word + 1, 0);
            }
            self.bits[word] = self.bits[word] & !bit | if is_in { bit } else { 0 };
        }
    }

    /// Whether an id is in the set.
    #[inline]
    pub(crate) fn contains(&self, id: u32) -> bool {
        match id < Self::BITS_MAX {
            true => self.bits.get(id as usize / 64).is_some_and(|bits| bits >> (id % 64) & 1 == 1),
            false => self.ids.contains(&id),
        }
    }
}

/// What the decoder reported.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct DecodeError(String);

/// The parts of a `tokenizer.json` that write into texts.
#[derive(Deserialize)]
struct Writers {
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
}

/// Refuses long texts and long sequences in what writes into texts, and files that name it twice: the tokenizers crate takes
/// the later one.
fn check_writers(bytes: &[u8]) -> Result<(), VocabError> {
    let Writers { normalizer, pre_tokenizer } =
        serde_json::from_slice(bytes).map_err(|e| VocabError::Form(e.to_string()))?;
    for writer in [&normalizer, &pre_tokenizer] {
        match (longest(writer), parts(writer)) {
            (bytes, _) if bytes > LITERAL_BYTES_MAX => return Err(VocabError::Literal { bytes }),
            (_, found) if found > PARTS_MAX => return Err(VocabError::TooManyParts { found }),
            _ => {}
        }
    }
    Ok(())
}

/// Parts of the sequences in a value, at any depth.
fn parts(value: &Value) -> usize {
    match value {
        Value::Array(items) => items.iter().map(parts).sum(),
        Value::Object(map) => {
            map.iter().map(|(key, value)| parts(value) + own_parts(key, value)).sum()
        }
        _ => 0,
    }
}

fn own_parts(key: &str, value: &Value) -> usize {
    value.as_array().filter(|_| PARTS_KEYS.contains(&key)).map_or(0, Vec::len)
}

/// Bytes of the longest text in a value.
fn longest(value: &Value) -> usize {
    let all = |values: &mut dyn Iterator<Item = &Value>| values.map(longest).max().unwrap_or(0);
    match value {
        Value::String(text) => text.len(),
        Value::Array(items) => all(&mut items.iter()),
        Value::Object(map) => {
            all(&mut map.iter().filter(|(key, _)| *key != TABLE_KEY).map(|(_, value)| value))
        }
        _ => 0,
    }
}

fn check_declared(tokens: &[DeclaredToken]) -> Result<(), VocabError> {
    if tokens.len() > ADDED_MAX {
        return Err(VocabError::TooManyAdded { found: tokens.len() });
    }
    match tokens.iter().find(|t| t.content.len() > ADDED_BYTES_MAX) {
        Some(token) => Err(VocabError::AddedTooLong { id: token.id, bytes: token.content.len() }),
        None => Ok(()),
    }
}
