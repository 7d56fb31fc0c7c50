//! A base with new tokens: in its tokenizer, and with rows of the embedding and of the head for
//! them.
//!
//! The tokens are control tokens: no text of a user becomes one. Ids go on where the tokenizer's end;
//! rows that the embedding had beyond them, as padding, are used first and stay what they were. What
//! is new is the mean of all others, so that a new token starts as an average one; transformers'
//! `resize_token_embeddings` does the same but for a noise of 1e-9 of their covariance.

use std::path::{Path, PathBuf};

use hone_cli::{Common, Context, Exit, Failure, Outcome, run_stage};
use hone_model::{
    BnbRegions, ModelConfig, ModelError, ResizedVocab, SafetensorsWriter, StoredType, TensorSource,
};
use hone_store::{Draft, ModelDir};
use serde_json::{Map, Value, json};
use tokenizers::{AddedToken, Tokenizer};

use crate::directory::{self, DirectoryError, SINGLE, SMALL_BYTES_MAX, SMALL_FILES};
use crate::run::{check_stop, outcome, plan};

/// Makes the base, and seals it.
pub(crate) fn add(
    ctx: &Context,
    common: &Common,
    out: PathBuf,
    base: &Path,
    texts: &[String],
    pad_to: u32,
) -> Result<Exit, Failure> {
    let dir = ModelDir::open(base)?;
    let verified = directory::verify(&dir)?;
    let config_json = dir.read("config.json", SMALL_BYTES_MAX)?;
    if directory::config(&config_json)?.1.is_some() {
        let message = format!("{}: its weights lie in 4 bits", base.display());
        return Err(Failure::input(message)
            .hint("add tokens to the model that it was made from, and train that with qlora"));
    }
    let grown = Grown::new(&dir.read("tokenizer.json", SMALL_BYTES_MAX)?, texts)?;
    let rows = grown.end.max(verified.config.vocab_size).next_multiple_of(pad_to as usize);
    let settings = json!({"source": "tokens", "tokens": texts, "pad_to": pad_to});
    let names: Vec<&str> = dir.names().iter().map(String::as_str).collect();
    let inputs = vec![dir.input_of("model", &names)?];
    run_stage(ctx, common, plan(out, settings, inputs), |draft, _| {
        let model = directory::with_tensors(&dir, |tensors| {
            let resized = ResizedVocab::new(&verified.config, tensors, rows)?;
            // Names and shapes were checked: what fails now is the writing.
            Ok(write_weights(ctx, draft, tensors, &resized).map(|()| resized.config().clone()))
        })??;
        grown.write(draft, &dir, &config_json, rows)?;
        Ok(told(&model, verified.n_tensors, &grown, rows))
    })
}

fn told(model: &ModelConfig, n_tensors: usize, grown: &Grown, rows: usize) -> Outcome {
    let ids: Vec<String> = grown.ids.iter().map(|(text, id)| format!("{text} = {id}")).collect();
    let origin: Map<String, Value> =
        grown.ids.iter().map(|(text, id)| (text.clone(), (*id).into())).collect();
    let outcome = outcome(model, n_tensors, json!({"tokens": origin}));
    Outcome { summary: format!("{}; {rows} rows of the embedding", ids.join(", ")), ..outcome }
}

/// Streams all tensors into the file of weights, as exact as they were.
fn write_weights(
    ctx: &Context,
    draft: &Draft,
    stored: &BnbRegions<'_>,
    resized: &ResizedVocab<'_>,
) -> Result<(), Failure> {
    let failed = |error: ModelError| match error {
        ModelError::Write(_) => Failure::environment(error.to_string()),
        other => Failure::input(other.to_string()),
    };
    let stored = if stored.is_all_bf16() { StoredType::Bf16 } else { StoredType::F32 };
    let entries = resized.config().tensors();
    let mut file = draft.file(SINGLE)?;
    let mut progress = ctx.progress(entries.len() as u64, "tensors");
    let mut writer = SafetensorsWriter::new(&mut file, &entries, stored).map_err(failed)?;
    for entry in &entries {
        check_stop(ctx)?;
        let tensor = resized.tensor(&entry.name).map_err(failed)?;
        tensor.check_finite().map_err(failed)?;
        writer.put(&tensor).map_err(failed)?;
        progress.inc(1);
    }
    writer.finish().map_err(failed)?;
    progress.finish();
    Ok(file.finish(None)?)
}

/// A tokenizer with new tokens.
struct Grown {
    /// Its `tokenizer.json`.
    json: String,
    /// The new tokens, and their ids.
    ids: Vec<(String, u32)>,
    /// One more than its largest id.
    end: usize,
}

impl Grown {
    fn new(tokenizer_json: &[u8], texts: &[String]) -> Result<Self, Failure> {
        let wrong = |error: tokenizers::Error| DirectoryError::Tokenizer(error.to_string());
        let mut tokenizer = Tokenizer::from_bytes(tokenizer_json).map_err(wrong)?;
        for text in texts {
            if text.trim().is_empty() {
                return Err(Failure::usage("`--add` is given no token"));
            }
            if let Some(id) = tokenizer.token_to_id(text) {
                let message = format!("`--add {text}`: it is a token already, the one of id {id}");
                return Err(Failure::usage(message).hint("leave it out, or write it otherwise"));
            }
            tokenizer.add_special_tokens([AddedToken::from(text.clone(), true)]).map_err(wrong)?;
        }
        let id_of = |text: &String| tokenizer.token_to_id(text).map(|id| (text.clone(), id));
        let ids = texts.iter().filter_map(id_of).collect();
        let end = tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        let json = tokenizer.to_string(false).map_err(wrong)?;
        Ok(Grown { json, ids, end })
    }

    /// Writes all files but the weights.
    fn write(
        &self,
        draft: &Draft,
        dir: &ModelDir,
        config_json: &[u8],
        rows: usize,
    ) -> Result<(), Failure> {
        for name in SMALL_FILES.into_iter().filter(|name| dir.has(name)) {
            let bytes = match name {
                "config.json" => edited(name, config_json, |map| {
                    map.insert("vocab_size".to_owned(), rows.into());
                })?,
                "tokenizer.json" => self.json.clone().into_bytes(),
                _ => {
                    let bytes = dir.read(name, SMALL_BYTES_MAX)?;
                    match name {
                        "added_tokens.json"
                        | "special_tokens_map.json"
                        | "tokenizer_config.json" => {
                            edited(name, &bytes, |map| self.list(name, map))?
                        }
                        _ => bytes,
                    }
                }
            };
            draft.write(name, &bytes, None)?;
        }
        Ok(())
    }

    /// Adds the tokens to the lists that a file has of them; one that it lacks is read from
    /// `tokenizer.json`.
    fn list(&self, name: &str, map: &mut Map<String, Value>) {
        if name == "added_tokens.json" {
            map.extend(self.ids.iter().map(|(text, id)| (text.clone(), (*id).into())));
        }
        for key in ["additional_special_tokens", "extra_special_tokens"] {
            if let Some(list) = map.get_mut(key).and_then(Value::as_array_mut) {
                list.extend(self.ids.iter().map(|(text, _)| text.clone().into()));
            }
        }
        if let Some(tokens) = map.get_mut("added_tokens_decoder").and_then(Value::as_object_mut) {
            for (text, id) in &self.ids {
                let token = json!({
                    "content": text, "lstrip": false, "normalized": false, "rstrip": false,
                    "single_word": false, "special": true
                });
                tokens.insert(id.to_string(), token);
            }
        }
    }
}

/// A JSON object with something changed, indented as transformers writes it.
fn edited(
    name: &str,
    bytes: &[u8],
    edit: impl FnOnce(&mut Map<String, Value>),
) -> Result<Vec<u8>, Failure> {
    let mut map: Map<String, Value> = serde_json::from_slice(bytes)
        .map_err(|error| Failure::input(format!("`{name}` is not a JSON object: {error}")))?;
    edit(&mut map);
    let text = serde_json::to_string_pretty(&map).expect("JSON values have only string keys");
    Ok(format!("{text}\n").into_bytes())
}
