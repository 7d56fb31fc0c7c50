//! The tokenizer's files, rebuilt from the `tokenizer.ggml.*` metadata.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::{ImportError, pretokenizer};
use crate::gguf::{GgufError, Metadata};

/// Token types of GGUF: a control token, and one that the user's text may contain.
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

/// A rebuilt tokenizer.
#[derive(Debug)]
pub(crate) struct Tokenizer {
    /// The text of tokenizer.json.
    pub(crate) json: String,
    /// The chat template, when the file has one.
    pub(crate) chat_template: Option<String>,
    /// Beginning of text.
    pub(crate) bos: Option<u32>,
    /// Ends of text: of a document first, and of a turn where that is another token.
    pub(crate) eos: Vec<u32>,
    /// Padding.
    pub(crate) pad: Option<u32>,
    /// Number of tokens.
    pub(crate) n_tokens: usize,
    unk: Option<u32>,
    adds_bos: bool,
    adds_eos: bool,
    tokens: Vec<String>,
    added: Vec<Value>,
}

impl Tokenizer {
    /// Rebuilds a byte-level BPE tokenizer, and lets the tokenizers library read it back.
    pub(crate) fn from_metadata(md: &Metadata) -> Result<Self, ImportError> {
        let model = md.str("tokenizer.ggml.model")?;
        if model != "gpt2" {
            let what = format!("the tokenizer model `{model}`");
            let reason = "only `gpt2` (byte-level BPE) can be rebuilt".to_owned();
            return Err(ImportError::Unsupported { what, reason });
        }
        let pre = md.str("tokenizer.ggml.pre")?;
        let Some(scheme) = pretokenizer::scheme(pre) else {
            let what = format!("the pre-tokenizer `{pre}`");
            let reason = format!("known are {}", pretokenizer::KNOWN.join(", "));
            return Err(ImportError::Unsupported { what, reason });
        };
        let tokens = md.strs("tokenizer.ggml.tokens")?;
        refuse_doubles(&tokens)?;
        let id = |key: &str| token_id(md, key, tokens.len());
        let (bos, eos, turn_end) = (id("bos")?, id("eos")?, id("eot")?);
        let (unk, pad) = (id("unknown")?, id("padding")?);
        let adds = |which: &str| md.try_bool(&format!("tokenizer.ggml.add_{which}_token"));
        let mut tokenizer = Tokenizer {
            json: String::new(),
            chat_template: md.try_str("tokenizer.chat_template")?.map(str::to_owned),
            bos,
            eos: eos.into_iter().chain(turn_end.filter(|id| Some(*id) != eos)).collect(),
            pad,
            n_tokens: tokens.len(),
            unk,
            adds_bos: adds("bos")?.unwrap_or(scheme.adds_bos),
            adds_eos: adds("eos")?.unwrap_or(false),
            added: added_tokens(md, &tokens)?,
            tokens: tokens.iter().map(|&token| token.to_owned()).collect(),
        };
        let merges = md.strs("tokenizer.ggml.merges")?;
        tokenizer.json = tokenizer.build(&scheme, &merges).to_string();
        tokenizer.check()?;
        Ok(tokenizer)
    }

    fn build(&self, scheme: &pretokenizer::Scheme, merges: &[&str]) -> Value {
        let ids = self.tokens.iter().enumerate();
        let vocab: Map<String, Value> = ids.map(|(id, token)| (token.clone(), json!(id))).collect();
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": self.added,
            "normalizer": scheme.normalizer,
            "pre_tokenizer": scheme.pre_tokenizer,
            "post_processor": self.post_processor(),
            "decoder": {
                "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
                "use_regex": true
            },
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null,
                "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
                "byte_fallback": false, "ignore_merges": scheme.ignore_merges, "vocab": vocab,
                "merges": merges
            }
        })
    }

    /// Adds the tokens that belong around every text, if any do.
    fn post_processor(&self) -> Value {
        let bos = self.bos.filter(|_| self.adds_bos);
        let eos = self.eos.first().copied().filter(|_| self.adds_eos);
        if bos.is_none() && eos.is_none() {
            return Value::Null;
        }
        let special = |id: u32| json!({"SpecialToken": {"id": self.token(id), "type_id": 0}});
        let around = |texts: &[&str]| {
            let mut steps = Vec::new();
            for text in texts {
                steps.extend(bos.map(special));
                steps.push(json!({"Sequence": {"id": text, "type_id": 0}}));
                steps.extend(eos.map(special));
            }
            steps
        };
        let entry = |id: u32| {
            let token = self.token(id);
            (token.to_owned(), json!({"id": token, "ids": [id], "tokens": [token]}))
        };
        let special_tokens: Map<String, Value> = bos.into_iter().chain(eos).map(entry).collect();
        json!({
            "type": "TemplateProcessing", "single": around(&["A"]), "pair": around(&["A", "B"]),
            "special_tokens": special_tokens
        })
    }

    fn token(&self, id: u32) -> &str {
        &self.tokens[id as usize]
    }

    /// Reads the file back as any user of it will: it loads, and every added token is one token
    /// with its own id.
    fn check(&self) -> Result<(), ImportError> {
        let failed = |error: tokenizers::Error| {
            ImportError::Inconsistent(format!("the rebuilt tokenizer cannot be used: {error}"))
        };
        let tokenizer = tokenizers::Tokenizer::from_bytes(&self.json).map_err(failed)?;
        for added in &self.added {
            let content = added["content"].as_str().expect("it was written as a text");
            let id = added["id"].as_u64().expect("it was written as a number");
            let found = tokenizer.encode(content, false).map_err(failed)?;
            if !found.get_ids().iter().map(|&id| u64::from(id)).eq([id]) {
                let found = found.get_ids();
                let what = format!("the special token {content:?} has the id {id}");
                let what = format!("{what}, but the rebuilt tokenizer makes {found:?} of it");
                return Err(ImportError::Inconsistent(what));
            }
        }
        Ok(())
    }

    /// tokenizer_config.json.
    pub(crate) fn config(&self, context_len: usize) -> Value {
        let decoder: Map<String, Value> = self
            .added
            .iter()
            .map(|added| {
                let mut value = added.clone();
                let fields = value.as_object_mut().expect("it was written as an object");
                let id = fields.shift_remove("id").expect("it was written with an id");
                (id.to_string(), value)
            })
            .collect();
        let mut config = Map::new();
        let mut put = |key: &str, value: Value| config.insert(key.to_owned(), value);
        put("add_bos_token", json!(self.adds_bos));
        put("add_eos_token", json!(self.adds_eos));
        put("add_prefix_space", json!(false));
        put("added_tokens_decoder", Value::Object(decoder));
        for (role, id) in self.roles() {
            put(role, json!(self.token(id)));
        }
        if let Some(template) = &self.chat_template {
            put("chat_template", json!(template));
        }
        put("clean_up_tokenization_spaces", json!(false));
        put("model_max_length", json!(context_len));
        // The general class: classes of single families rebuild parts of tokenizer.json in their
        // own way.
        put("tokenizer_class", json!("PreTrainedTokenizerFast"));
        Value::Object(config)
    }

    /// special_tokens_map.json.
    pub(crate) fn special_tokens_map(&self) -> Value {
        let entry = |(role, id): (&str, u32)| {
            let value = json!({
                "content": self.token(id), "lstrip": false, "normalized": false, "rstrip": false,
                "single_word": false
            });
            (role.to_owned(), value)
        };
        Value::Object(self.roles().map(entry).collect())
    }

    /// generation_config.json: where generation begins and stops.
    pub(crate) fn generation_config(&self) -> Value {
        let mut config = Map::new();
        config.insert("_from_model_config".to_owned(), json!(true));
        if let Some(bos) = self.bos {
            config.insert("bos_token_id".to_owned(), json!(bos));
        }
        match self.eos.as_slice() {
            [] => {}
            [one] => _ = config.insert("eos_token_id".to_owned(), json!(one)),
            many => _ = config.insert("eos_token_id".to_owned(), json!(many)),
        }
        if let Some(pad) = self.pad {
            config.insert("pad_token_id".to_owned(), json!(pad));
        }
        Value::Object(config)
    }

    fn roles(&self) -> impl Iterator<Item = (&'static str, u32)> {
        [
            ("bos_token", self.bos),
            ("eos_token", self.eos.first().copied()),
            ("pad_token", self.pad),
            ("unk_token", self.unk),
        ]
        .into_iter()
        .filter_map(|(role, id)| id.map(|id| (role, id)))
    }
}

fn refuse_doubles(tokens: &[&str]) -> Result<(), GgufError> {
    let mut seen = BTreeSet::new();
    match tokens.iter().find(|token| !seen.insert(**token)) {
        None => Ok(()),
        Some(token) => {
            let reason = format!("the token {token:?} is there twice");
            Err(GgufError::Key { key: "tokenizer.ggml.tokens".to_owned(), reason })
        }
    }
}

fn token_id(md: &Metadata, role: &str, n_tokens: usize) -> Result<Option<u32>, GgufError> {
    let key = format!("tokenizer.ggml.{role}_token_id");
    let Some(id) = md.try_u64(&key)? else { return Ok(None) };
    match u32::try_from(id) {
        Ok(id) if (id as usize) < n_tokens => Ok(Some(id)),
        _ => {
            let reason = format!("there is no token {id}, only {n_tokens} tokens");
            Err(GgufError::Key { key, reason })
        }
    }
}

/// Entries of `added_tokens`: tokens that are found in a text before it is split.
fn added_tokens(md: &Metadata, tokens: &[&str]) -> Result<Vec<Value>, GgufError> {
    const KEY: &str = "tokenizer.ggml.token_type";
    let types = md.try_u64s(KEY)?.ok_or_else(|| GgufError::NoKey(KEY.to_owned()))?;
    if types.len() != tokens.len() {
        let reason = format!("it has {} values for {} tokens", types.len(), tokens.len());
        return Err(GgufError::Key { key: KEY.to_owned(), reason });
    }
    let is_added = |&(_, kind): &(usize, u64)| kind == CONTROL || kind == USER_DEFINED;
    let entry = |(id, kind): (usize, u64)| {
        json!({
            "id": id, "content": tokens[id], "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": kind == CONTROL
        })
    };
    Ok(types.into_iter().enumerate().filter(is_added).map(entry).collect())
}
