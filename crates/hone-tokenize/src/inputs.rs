//! What the stage reads: the rendered rows, the tokenizer, and the rules that the pipeline file gives.

use std::path::PathBuf;

use arrow::array::RecordBatch;
use hone_cli::{Failure, Pipeline};
use hone_schema::{ArtefactKind, InputRef, Rendered};
use hone_store::{ModelDir, Sealed, StoreError};
use hone_tokens::{Rules, Vocab};
use serde_json::Value;

use crate::args::Config;
use crate::worker::Job;

/// What a model says of itself.
const MODEL: &str = "config.json";

/// Longest file beside the weights of a model that is read, in bytes.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// Rows handed on at a time: enough to keep all threads busy, and little memory.
const ROWS_A_BATCH: usize = 2048;

/// The table of rendered rows.
const RENDERED: &str = "rendered.parquet";

/// The files that the stage reads, open; the tokenizer is bytes still.
pub(crate) struct Files {
    pub(crate) rendered: Sealed,
    pub(crate) tokenizer_json: Vec<u8>,
    /// What its tokenizer's worker has to know, the configuration among it.
    pub(crate) job: Job,
    /// The ids that end a text by the model's own word.
    pub(crate) eos: Vec<u32>,
    pub(crate) refs: Vec<InputRef>,
    /// What to tell people about the configuration.
    pub(crate) notes: Vec<String>,
}

impl Files {
    /// Opens what the pipeline names.
    pub(crate) fn open(pipeline: &Pipeline) -> Result<Self, Failure> {
        let (config, notes) = Config::read(pipeline)?;
        let rendered = Sealed::open(&pipeline.dir("template"), ArtefactKind::Rendered)?;
        let TokenizerFile { path, json, eos, n_embeddings, refs: more } =
            TokenizerFile::open(pipeline, &config)?;
        let job = Job { path, config, n_embeddings, bos: bos_of(&rendered)? };
        let refs = std::iter::once(rendered.input("rendered")).chain(more).collect();
        Ok(Files { rendered, tokenizer_json: json, job, eos, refs, notes })
    }

    /// The rendered rows as tables, a batch at a time.
    pub(crate) fn tables(
        &self,
    ) -> Result<impl Iterator<Item = Result<RecordBatch, StoreError>> + use<>, Failure> {
        Ok(self.rendered.parquet(RENDERED)?.flat_map(slices))
    }

    /// Number of rendered rows.
    pub(crate) fn n_rows(&self) -> u64 {
        self.rendered.manifest().file(RENDERED).and_then(|file| file.rows).unwrap_or(0)
    }
}

/// A batch in pieces: rows as values are several times as large as they are in a batch.
fn slices(batch: Result<RecordBatch, StoreError>) -> Vec<Result<RecordBatch, StoreError>> {
    let batch = match batch {
        Ok(batch) => batch,
        Err(error) => return vec![Err(error)],
    };
    let starts = (0..batch.num_rows()).step_by(ROWS_A_BATCH);
    let len = |start: usize| ROWS_A_BATCH.min(batch.num_rows() - start);
    starts.map(|start| Ok(batch.slice(start, len(start)))).collect()
}

/// What makes tokens of rows.
pub(crate) struct Encoder {
    pub(crate) vocab: Vocab,
    pub(crate) rules: Rules,
}

impl Encoder {
    /// The one of a job, and of a tokenizer's bytes.
    pub(crate) fn new(job: &Job, tokenizer_json: &[u8]) -> Result<Self, Failure> {
        let vocab = vocab_of(&job.path, tokenizer_json, &job.config, job.n_embeddings)?;
        let rules = Rules {
            max_len: job.config.max_len,
            too_long: job.config.too_long,
            policy: job.config.policy(),
            n_embeddings: job.n_embeddings,
            bos: job.bos.as_deref().and_then(|token| vocab.id_of(token)),
        };
        Ok(Encoder { vocab, rules })
    }
}

/// The rendered rows and what makes tokens of them, for whoever looks at a few rows.
pub(crate) struct Inputs {
    pub(crate) files: Files,
    pub(crate) rules: Rules,
    pub(crate) vocab: Vocab,
}

impl Inputs {
    /// Opens what the pipeline names.
    pub(crate) fn open(pipeline: &Pipeline) -> Result<Self, Failure> {
        let files = Files::open(pipeline)?;
        let Encoder { vocab, rules } = Encoder::new(&files.job, &files.tokenizer_json)?;
        Ok(Inputs { files, rules, vocab })
    }

    /// The rendered rows, a batch at a time.
    pub(crate) fn batches(
        &self,
    ) -> Result<impl Iterator<Item = Result<Vec<Rendered>, Failure>> + use<>, Failure> {
        let path = self.files.rendered.path(RENDERED);
        Ok(self.files.tables()?.map(move |batch| {
            let rows = Rendered::from_batch(&batch?);
            rows.map_err(|e| Failure::input(format!("{}: {e}", path.display())))
        }))
    }
}

/// The tokenizer that a pipeline names, as bytes, and what the model says of its ids.
struct TokenizerFile {
    path: String,
    json: Vec<u8>,
    eos: Vec<u32>,
    n_embeddings: Option<u32>,
    refs: Vec<InputRef>,
}

impl TokenizerFile {
    fn open(pipeline: &Pipeline, config: &Config) -> Result<Self, Failure> {
        let source = TokenizerSource::open(pipeline, config)?;
        let json = source.read("tokenizer.json")?.ok_or_else(|| {
            Failure::input(format!("{}: there is no tokenizer.json", source.dir.display()))
                .hint("hone needs the tokenizer in the form of the tokenizers library")
        })?;
        let path = source.dir.join("tokenizer.json").display().to_string();
        let n_embeddings = n_embeddings(pipeline)?;
        let mut refs = vec![source.input()?];
        if let (Some(_), Some(base)) = (n_embeddings, &pipeline.base) {
            refs.push(ModelDir::open(base)?.input_of("model", &[MODEL])?);
        }
        Ok(TokenizerFile { path, json, eos: source.eos()?, n_embeddings, refs })
    }
}

/// The vocabulary of a `tokenizer.json`, if it fits the model and the configuration.
fn vocab_of(
    path: &str,
    json: &[u8],
    config: &Config,
    n_embeddings: Option<u32>,
) -> Result<Vocab, Failure> {
    let wrong = |e: &dyn std::fmt::Display| Failure::input(format!("{path}: {e}"));
    let mut vocab = Vocab::from_json(json).map_err(|e| wrong(&e))?;
    for token in &config.allow_in_messages {
        vocab
            .allow(token)
            .map_err(|e| Failure::usage(format!("tokenize.allow_in_messages: {e}")))?;
    }
    if let Some(n) = n_embeddings {
        fits(&vocab, n).map_err(|e| {
            wrong(&e).hint("give the tokenizer that belongs to the base model, or its own base")
        })?;
    }
    Ok(vocab)
}

/// The tokenizer that a pipeline names, for whoever has no rendered rows.
pub(crate) struct Tokenizer {
    pub(crate) vocab: Vocab,
    pub(crate) json: Vec<u8>,
    /// The ids that end a text by the model's own word.
    pub(crate) eos: Vec<u32>,
    pub(crate) n_embeddings: Option<u32>,
    pub(crate) refs: Vec<InputRef>,
}

impl Tokenizer {
    /// Opens it.
    pub(crate) fn open(pipeline: &Pipeline, config: &Config) -> Result<Self, Failure> {
        let TokenizerFile { path, json, eos, n_embeddings, refs } =
            TokenizerFile::open(pipeline, config)?;
        let vocab = vocab_of(&path, &json, config, n_embeddings)?;
        Ok(Tokenizer { vocab, json, eos, n_embeddings, refs })
    }
}

/// Where the tokenizer lies: the base model, or a directory of its own.
struct TokenizerSource {
    dir: PathBuf,
    model: Option<ModelDir>,
}

impl TokenizerSource {
    fn open(pipeline: &Pipeline, config: &Config) -> Result<Self, Failure> {
        match &config.tokenizer {
            Some(dir) => Ok(TokenizerSource { dir: dir.clone(), model: None }),
            None => {
                let model = ModelDir::open(pipeline.need_base()?)?;
                Ok(TokenizerSource { dir: model.dir().to_owned(), model: Some(model) })
            }
        }
    }

    fn read(&self, name: &str) -> Result<Option<Vec<u8>>, Failure> {
        match &self.model {
            Some(model) => Ok(model.try_read(name, FILE_BYTES_MAX)?),
            None => {
                let path = self.dir.join(name);
                let is_there = hone_store::input::is_file(&path);
                let read = || hone_store::input::read(&path, FILE_BYTES_MAX);
                Ok(is_there.then(read).transpose()?)
            }
        }
    }

    fn input(&self) -> Result<InputRef, Failure> {
        let role = "tokenizer".to_owned();
        match &self.model {
            Some(model) => {
                Ok(model.input_of(&role, &["tokenizer.json", "generation_config.json"])?)
            }
            None => {
                let (sha256, _) = hone_store::input::hash(&self.dir.join("tokenizer.json"))?;
                Ok(InputRef { role, sha256 })
            }
        }
    }

    /// The ids that `generation_config.json` ends a text with.
    fn eos(&self) -> Result<Vec<u32>, Failure> {
        if self.model.is_none() {
            return Ok(Vec::new());
        }
        let name = "generation_config.json";
        let Some(bytes) = self.read(name)? else {
            return Ok(Vec::new());
        };
        let path = self.dir.join(name);
        let wrong = |what: String| Failure::input(format!("{}: {what}", path.display()));
        let config: Value = serde_json::from_slice(&bytes).map_err(|e| wrong(e.to_string()))?;
        let ids = match config.get("eos_token_id") {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(ids)) => ids.clone(),
            Some(id) => vec![id.clone()],
        };
        ids.iter()
            .map(|id| {
                let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
                id.ok_or_else(|| wrong("`eos_token_id` is neither an id nor a list of ids".into()))
            })
            .collect()
    }
}

/// Number of rows of the base model's embedding, where a base is given and its configuration says so.
fn n_embeddings(pipeline: &Pipeline) -> Result<Option<u32>, Failure> {
    let Some(base) = &pipeline.base else { return Ok(None) };
    let model = ModelDir::open(base)?;
    let bytes = model.read(MODEL, FILE_BYTES_MAX)?;
    let path = model.dir().join(MODEL);
    let wrong = |what: String| Failure::input(format!("{}: {what}", path.display()));
    let config: Value = serde_json::from_slice(&bytes).map_err(|e| wrong(e.to_string()))?;
    // Models that see as well keep it with the part that speaks.
    let n = config.get("vocab_size").or_else(|| config.pointer("/text_config/vocab_size"));
    let Some(n) = n.filter(|n| !n.is_null()) else { return Ok(None) };
    let n = n.as_u64().and_then(|n| u32::try_from(n).ok());
    n.map(Some).ok_or_else(|| wrong("`vocab_size` is not a number of tokens".to_owned()))
}

/// Whether a model with `n` embeddings can read what the vocabulary writes. Added tokens beyond them are allowed: some families
/// carry markers that only their larger sisters know. A row that uses one is refused.
fn fits(vocab: &Vocab, n: u32) -> Result<(), String> {
    let beyond = n..u32::try_from(vocab.size()).unwrap_or(u32::MAX);
    let mut tokens = beyond.filter(|id| !vocab.is_control(*id));
    match tokens.find_map(|id| Some((id, vocab.token(id)?))) {
        Some((id, token)) => {
            Err(format!("token {token:?} has id {id}, but the base model has {n} embeddings"))
        }
        None => Ok(()),
    }
}

/// The token that begins a text, by the template.
fn bos_of(rendered: &Sealed) -> Result<Option<String>, Failure> {
    let name = "template.json";
    let facts: Value = serde_json::from_slice(&rendered.read(name)?)
        .map_err(|e| Failure::input(format!("{}: {e}", rendered.path(name).display())))?;
    Ok(facts
        .get("bos_token")
        .and_then(Value::as_str)
        .filter(|token| !token.is_empty())
        .map(str::to_owned))
}
