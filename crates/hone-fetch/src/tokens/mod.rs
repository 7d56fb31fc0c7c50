//! A base with new tokens: in its tokenizer, and with rows of the embedding and of the head for
//! them.
//!
//! The tokens are control tokens: no text of a user becomes one. Ids go on where the tokenizer's
//! end. The row of a new token is the mean of the rows of the old ones, so that it starts as an
//! average token; transformers' `resize_token_embeddings` does the same but for a noise of 1e-9 of
//! their covariance, on a base without padding. Where the embedding has rows beyond the tokenizer's
//! end, as padding, these are used first, and those that become a token's get the mean too: they
//! were never trained, and weight decay has left some of them next to zero (transformers resizes
//! nothing then, and a new token starts as whatever lies there). Padding that stays padding stays
//! what it was.

mod grown;

use std::path::{Path, PathBuf};

use hone_cli::{Common, Context, Exit, Failure, Outcome, run_stage};
use hone_model::{
    BnbRegions, ModelConfig, ModelError, NamedTensor, ResizedVocab, SafetensorsWriter, StoredType,
    TensorSource,
};
use hone_store::{Draft, ModelDir};
use serde_json::{Map, Value, json};

use crate::directory::{self, SINGLE, SMALL_BYTES_MAX, SMALL_FILES};
use crate::run::{check_stop, outcome, plan};
use crate::tokens::grown::{Grown, check_texts};

/// The matrices that have a row for each token.
const VOCABULARY: [&str; 2] = ["model.embed_tokens.weight", "lm_head.weight"];

/// Makes the base, and seals it.
pub(crate) fn add(
    ctx: &Context,
    common: &Common,
    out: PathBuf,
    base: &Path,
    texts: &[String],
    pad_to: u32,
) -> Result<Exit, Failure> {
    check_texts(texts)?;
    let dir = ModelDir::open(base)?;
    let verified = directory::verify(&dir)?;
    let config_json = dir.read("config.json", SMALL_BYTES_MAX)?;
    if directory::config(&config_json)?.1.is_some() {
        let message = format!("{}: its weights lie in 4 bits", base.display());
        return Err(Failure::input(message)
            .hint("add tokens to the model that it was made from, and train that with qlora"));
    }
    let grown = Grown::new(&dir, texts)?;
    let old_rows = verified.config.vocab_size;
    let rows = grown.end().max(old_rows).next_multiple_of(pad_to as usize);
    let settings = json!({"source": "tokens", "tokens": texts, "pad_to": pad_to});
    let names: Vec<&str> = dir.names().iter().map(String::as_str).collect();
    let inputs = vec![dir.input_of("model", &names)?];
    run_stage(ctx, common, plan(out, settings, inputs), |draft, _| {
        let model = directory::with_tensors(&dir, |tensors| {
            let resized = ResizedVocab::new(&verified.config, tensors, rows)?;
            let average =
                |tensor: &mut NamedTensor| average(tensor, grown.before, grown.end(), old_rows);
            // Names and shapes were checked: what fails now is the writing.
            Ok(write_weights(ctx, draft, tensors, &resized, average)
                .map(|()| resized.config().clone()))
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

/// Makes the rows of new tokens, from `before` up to `end`, the mean of those before them, and rows
/// that the matrix did not have, from `old_rows` on, too.
fn average(matrix: &mut NamedTensor, before: usize, end: usize, old_rows: usize) {
    let d = matrix.shape[1];
    let mut sum = vec![0.0_f64; d];
    for row in matrix.data.chunks(d).take(before) {
        sum.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x));
    }
    let mean: Vec<f32> = sum.iter().map(|sum| (sum / before as f64) as f32).collect();
    let is_new = |row: usize| (before..end).contains(&row) || row >= old_rows;
    let rows = matrix.data.chunks_mut(d).enumerate();
    rows.filter(|(row, _)| is_new(*row)).for_each(|(_, row)| row.copy_from_slice(&mean));
}

/// Streams all tensors into the file of weights, as exact as they were; the embedding and the head
/// go through `average`.
fn write_weights(
    ctx: &Context,
    draft: &Draft,
    stored: &BnbRegions<'_>,
    resized: &ResizedVocab<'_>,
    average: impl Fn(&mut NamedTensor),
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
        let mut tensor = resized.tensor(&entry.name).map_err(failed)?;
        if VOCABULARY.contains(&entry.name.as_str()) {
            average(&mut tensor);
        }
        tensor.check_finite().map_err(failed)?;
        writer.put(&tensor).map_err(failed)?;
        progress.inc(1);
    }
    writer.finish().map_err(failed)?;
    progress.finish();
    Ok(file.finish(None)?)
}

impl Grown {
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
