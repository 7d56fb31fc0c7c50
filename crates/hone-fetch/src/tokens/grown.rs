//! A tokenizer with new tokens.
//!
//! Ids go on where the tokenizer's end. The tokenizers library does not read the ids that
//! `tokenizer.json` writes beside its `added_tokens`: it looks a text up in the model's vocabulary,
//! and numbers what is not there from that vocabulary's size on. Where the vocabulary leaves out
//! ids, this number is another token's; there the new tokens are written into the vocabulary too,
//! which holds for every reader. Whichever way they came in, the result is read again and compared
//! before anything is written.

use std::collections::HashMap;

use hone_cli::Failure;
use hone_store::ModelDir;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokenizers::{AddedToken, Tokenizer};

use crate::directory::{DirectoryError, SMALL_BYTES_MAX};

/// Tokens of the old tokenizer whose texts must have the ids that they had.
const PROBES: usize = 4096;

/// The lists of tokens that a model may have beside `tokenizer.json`.
const ADDED: &str = "added_tokens.json";
const CONFIG: &str = "tokenizer_config.json";

/// A tokenizer with new tokens.
pub(super) struct Grown {
    /// Its `tokenizer.json`.
    pub(super) json: String,
    /// The new tokens, and their ids.
    pub(super) ids: Vec<(String, u32)>,
    /// One more than the largest id before.
    pub(super) before: usize,
}

/// Refuses texts that are no tokens, whatever the tokenizer.
pub(super) fn check_texts(texts: &[String]) -> Result<(), Failure> {
    for (at, text) in texts.iter().enumerate() {
        if text.trim().is_empty() {
            return Err(Failure::usage("`--add` is given no token"));
        }
        if texts[..at].contains(text) {
            return Err(Failure::usage(format!("`--add {text}` is given twice")));
        }
    }
    Ok(())
}

impl Grown {
    pub(super) fn new(dir: &ModelDir, texts: &[String]) -> Result<Self, Failure> {
        let bytes = dir.read("tokenizer.json", SMALL_BYTES_MAX)?;
        let old = load(&bytes)?;
        for text in texts {
            if let Some(id) = old.token_to_id(text) {
                let message = format!("`--add {text}`: it is a token already, the one of id {id}");
                return Err(Failure::usage(message).hint("leave it out, or write it otherwise"));
            }
        }
        check_declared(&bytes, &old)?;
        let vocab = old.get_vocab(true);
        let before = vocab.values().max().map_or(0, |&id| id + 1);
        check_lists(dir, before)?;
        let ids: Vec<(String, u32)> = texts.iter().cloned().zip(before..).collect();
        let json = match by_library(&bytes, &ids)? {
            Some(json) => json,
            None => by_hand(&bytes, &ids)?,
        };
        check_grown(&old, &vocab, &load(json.as_bytes())?, &ids)?;
        Ok(Grown { json, ids, before: before as usize })
    }

    /// One more than the largest id.
    pub(super) fn end(&self) -> usize {
        self.before + self.ids.len()
    }

    /// Adds the tokens to the lists that a file has of them; one that it lacks is read from
    /// `tokenizer.json`.
    pub(super) fn list(&self, name: &str, map: &mut Map<String, Value>) {
        if name == ADDED {
            map.extend(self.ids.iter().map(|(text, id)| (text.clone(), (*id).into())));
        }
        for key in ["additional_special_tokens", "extra_special_tokens"] {
            if let Some(list) = map.get_mut(key).and_then(Value::as_array_mut) {
                list.extend(self.ids.iter().map(|(text, _)| text.clone().into()));
            }
        }
        if let Some(tokens) = map.get_mut("added_tokens_decoder").and_then(Value::as_object_mut) {
            tokens.extend(self.ids.iter().map(|(text, id)| (id.to_string(), described(text))));
        }
    }
}

/// A token as the lists describe it.
fn described(text: &str) -> Value {
    json!({
        "content": text, "lstrip": false, "normalized": false, "rstrip": false,
        "single_word": false, "special": true
    })
}

fn wrong(error: impl std::fmt::Display) -> DirectoryError {
    DirectoryError::Tokenizer(error.to_string())
}

fn load(bytes: &[u8]) -> Result<Tokenizer, DirectoryError> {
    Tokenizer::from_bytes(bytes).map_err(wrong)
}

/// Refuses ids of `added_tokens` that are not those that the library gives: it is not known which
/// of the two the model was trained with.
fn check_declared(bytes: &[u8], old: &Tokenizer) -> Result<(), Failure> {
    #[derive(Deserialize)]
    struct Declared {
        #[serde(default)]
        added_tokens: Vec<Token>,
    }
    #[derive(Deserialize)]
    struct Token {
        id: u32,
        content: String,
    }
    let declared: Declared = serde_json::from_slice(bytes).map_err(wrong)?;
    for Token { id, content } in declared.added_tokens {
        let found = old.token_to_id(&content);
        if let Some(found) = found.filter(|found| *found != id) {
            return Err(Failure::input(format!(
                "`tokenizer.json`: `added_tokens` gives `{content}` the id {id}, the tokenizers \
                 library reads it as {found}"
            ))
            .hint("give all ids before it a token, or write the id there that is right"));
        }
    }
    Ok(())
}

/// Refuses tokens that only the lists have and that lie where the new ones would.
fn check_lists(dir: &ModelDir, before: u32) -> Result<(), Failure> {
    let object = |name: &str| -> Result<Map<String, Value>, Failure> {
        let bytes = dir.try_read(name, SMALL_BYTES_MAX)?;
        let map = bytes.map_or(Ok(Map::new()), |bytes| serde_json::from_slice(&bytes));
        map.map_err(|error| Failure::input(format!("`{name}` is not a JSON object: {error}")))
    };
    let refuse = |name: &str, id: u64| {
        Failure::input(format!("`{name}` has a token of id {id}, which `tokenizer.json` lacks"))
            .hint("load the tokenizer with transformers and save it, then both have it")
    };
    let before = u64::from(before);
    if let Some(id) = object(ADDED)?.values().filter_map(Value::as_u64).find(|id| *id >= before) {
        return Err(refuse(ADDED, id));
    }
    let config = object(CONFIG)?;
    let tokens = config.get("added_tokens_decoder").and_then(Value::as_object);
    let ids = tokens.into_iter().flat_map(Map::keys).filter_map(|id| id.parse::<u64>().ok());
    ids.filter(|id| *id >= before).min().map_or(Ok(()), |id| Err(refuse(CONFIG, id)))
}

/// The tokens as the library adds them; nothing when they would have other ids, now or when the
/// result is read, which numbers them once more.
fn by_library(bytes: &[u8], ids: &[(String, u32)]) -> Result<Option<String>, DirectoryError> {
    let mut tokenizer = load(bytes)?;
    let tokens = ids.iter().map(|(text, _)| AddedToken::from(text.clone(), true));
    tokenizer.add_special_tokens(tokens).map_err(wrong)?;
    let json = tokenizer.to_string(false).map_err(wrong)?;
    let has_them = |of: &Tokenizer| ids.iter().all(|(text, id)| of.token_to_id(text) == Some(*id));
    Ok((has_them(&tokenizer) && has_them(&load(json.as_bytes())?)).then_some(json))
}

/// The tokens in the vocabulary of the model as well, under the ids that they are to have.
///
/// No text gets to them there when the model is a plain BPE: of what is longer than a character it
/// makes only what its merges name.
fn by_hand(bytes: &[u8], ids: &[(String, u32)]) -> Result<String, Failure> {
    let mut tokenizer: Map<String, Value> = serde_json::from_slice(bytes).map_err(wrong)?;
    let model = tokenizer.get("model").unwrap_or(&Value::Null);
    let is_set = |key: &str| {
        !matches!(model.get(key), None | Some(Value::Null | Value::Bool(false))) && model[key] != ""
    };
    let is_plain = model["merges"].is_array()
        && model["vocab"].is_object()
        && !["ignore_merges", "continuing_subword_prefix", "end_of_word_suffix"]
            .into_iter()
            .any(is_set);
    if !is_plain || ids.iter().any(|(text, _)| text.chars().count() < 2) {
        let message = "`tokenizer.json`: the ids of its vocabulary have gaps, so that a new token \
                       would get the id of another";
        let hint = "only a plain BPE with gaps, and no token of one character, can be added to";
        return Err(Failure::input(message).hint(hint));
    }
    let added = tokenizer.entry("added_tokens").or_insert_with(|| json!([]));
    let added = added.as_array_mut().ok_or_else(|| wrong("`added_tokens` is not a list"))?;
    for (text, id) in ids {
        let mut entry = json!({"id": id});
        if let (Some(entry), Value::Object(token)) = (entry.as_object_mut(), described(text)) {
            entry.extend(token);
        }
        added.push(entry);
    }
    if let Some(vocab) = tokenizer["model"]["vocab"].as_object_mut() {
        vocab.extend(ids.iter().map(|(text, id)| (text.clone(), (*id).into())));
    }
    Ok(Value::Object(tokenizer).to_string())
}

/// Shows that the old tokens are what they were, and that the new ones are read.
fn check_grown(
    old: &Tokenizer,
    vocab: &HashMap<String, u32>,
    new: &Tokenizer,
    ids: &[(String, u32)],
) -> Result<(), Failure> {
    let refuse = |what: String| {
        Failure::input(format!("`tokenizer.json`: tokens cannot be added to it: {what}"))
    };
    let found = new.get_vocab(true);
    if let Some((text, id)) = vocab.iter().find(|(text, id)| found.get(*text) != Some(id)) {
        let what = format!("`{text}`, which is {id}, would be {:?}", found.get(text));
        return Err(refuse(what));
    }
    let (old, new) = (plain(old)?, plain(new)?);
    for (text, id) in ids {
        let found = encoded(&new, text)?;
        if found != [*id] {
            return Err(refuse(format!("`{text}` is to be {id} and is read as {found:?}")));
        }
    }
    let mut texts: Vec<(&String, &u32)> = vocab.iter().collect();
    texts.sort_by_key(|(text, id)| (**id, *text));
    for (text, _) in texts.iter().step_by(texts.len() / PROBES + 1) {
        let has_new = ids.iter().any(|(new, _)| text.contains(new.as_str()));
        if !has_new && encoded(&old, text)? != encoded(&new, text)? {
            return Err(refuse(format!("the text `{text}` would have other ids")));
        }
    }
    Ok(())
}

/// A tokenizer that gives the ids of a text alone.
fn plain(tokenizer: &Tokenizer) -> Result<Tokenizer, DirectoryError> {
    let mut tokenizer = tokenizer.clone();
    tokenizer.with_padding(None).with_truncation(None).map_err(wrong)?;
    Ok(tokenizer)
}

fn encoded(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, DirectoryError> {
    Ok(tokenizer.encode_fast(text, false).map_err(wrong)?.get_ids().to_vec())
}
