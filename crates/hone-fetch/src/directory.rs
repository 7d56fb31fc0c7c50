//! The checks that every model directory passes before it is sealed, wherever it came from.
//!
//! A directory is complete when the decoder accepts its configuration, its tokenizer loads and has
//! no more tokens than the embedding has rows, every shard that the index names is there, and the
//! headers of the shards hold exactly the tensors that the configuration asks for, in their shapes,
//! with their bytes. The weights themselves are only copied, never decoded; of those in 4 bits the
//! descriptions are read.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Seek, SeekFrom};

use hone_cli::Failure;
use hone_kernels::mapping;
use hone_model::{
    BnbConfig, BnbRegions, ModelConfig, ModelError, NamedTensor, TensorEntry, TensorSource,
};
use hone_store::{ModelDir, StoreError};
use serde::Deserialize;
use serde_json::{Map, Value};

/// The files beside the weights that a model directory may have and that are brought along; the one
/// that decides first.
pub(crate) const SMALL_FILES: [&str; 8] = [
    "config.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
];

/// The index of a model whose weights lie in several files.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// The weights of a model that has them in one file.
pub(crate) const SINGLE: &str = "model.safetensors";

/// Largest of the small files: twice the largest tokenizer.json known.
pub(crate) const SMALL_BYTES_MAX: u64 = 64 << 20;

/// Longest header of a safetensors file: room for 100,000 tensors.
const HEADER_BYTES_MAX: u64 = 16 << 20;

/// Why a model directory is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DirectoryError {
    /// A file is missing, too large, or cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No weights that are read.
    #[error("there are no weights in safetensors files: neither `{SINGLE}` nor `{INDEX}`")]
    NoWeights,
    /// The index is not what an index is.
    #[error("`{INDEX}` is not an index of shards: {0}")]
    Index(String),
    /// The index names a file that is not there.
    #[error("`{INDEX}` names the file `{0}`, which is not there")]
    NoShard(String),
    /// A file of weights is damaged.
    #[error("`{file}` is not a whole safetensors file: {reason}")]
    Shard { file: String, reason: String },
    /// The tokenizer does not load, or does not fit the model.
    #[error("`tokenizer.json`: {0}")]
    Tokenizer(String),
    /// The configuration is not one for the decoder, or the weights do not fit it.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A file cannot be read to its end.
    #[error("cannot read `{file}`: {source}")]
    Io { file: String, source: std::io::Error },
}

impl From<DirectoryError> for Failure {
    fn from(error: DirectoryError) -> Self {
        match error {
            DirectoryError::Store(error) => error.into(),
            DirectoryError::Io { .. } => Failure::environment(error.to_string()),
            DirectoryError::NoWeights => Failure::input(error.to_string()).hint(
                "pickled weights are not read, they can run code: take a revision with safetensors",
            ),
            DirectoryError::NoShard(_) | DirectoryError::Shard { .. } => {
                Failure::input(error.to_string())
                    .hint("the model was not copied or downloaded completely: do that again")
            }
            _ => Failure::input(error.to_string()),
        }
    }
}

/// A directory that passed.
#[derive(Debug)]
pub(crate) struct Verified {
    /// Its configuration.
    pub(crate) config: ModelConfig,
    /// Its files of weights, and the index if there is one.
    pub(crate) weight_files: Vec<String>,
    /// Number of tensors.
    pub(crate) n_tensors: usize,
}

/// Checks a whole directory.
pub(crate) fn verify(dir: &ModelDir) -> Result<Verified, DirectoryError> {
    let (config, quant) = config(&dir.read("config.json", SMALL_BYTES_MAX)?)?;
    check_tokenizer(&dir.read("tokenizer.json", SMALL_BYTES_MAX)?, &config)?;
    let index = dir.try_read(INDEX, SMALL_BYTES_MAX)?;
    let shards = shards(index.as_deref(), |name| dir.has(name))?;
    let mut files: BTreeMap<_, _> = dir.weights()?.into_iter().collect();
    let mut headers = Headers { has_codes: quant.is_some(), ..Headers::default() };
    for name in &shards {
        let file = files.remove(name).ok_or_else(|| DirectoryError::NoShard(name.clone()))?;
        headers.add(name, file)?;
    }
    match quant {
        None => config.check_source(&headers)?,
        Some(_) => with_tensors(dir, |tensors| Ok(config.check_source(tensors)?))?,
    }
    let n_tensors = headers.entries.len();
    let weight_files = index.iter().map(|_| INDEX.to_owned()).chain(shards).collect();
    Ok(Verified { config, weight_files, n_tensors })
}

/// Reads `config.json`: the shape, and how the weights are quantised, if they are.
pub(crate) fn config(bytes: &[u8]) -> Result<(ModelConfig, Option<BnbConfig>), DirectoryError> {
    let text = String::from_utf8_lossy(bytes);
    Ok(BnbConfig::read_model_config(&text)?)
}

/// Calls `work` with the tensors of all files of weights, which are mapped meanwhile.
pub(crate) fn with_tensors<T>(
    dir: &ModelDir,
    work: impl FnOnce(&BnbRegions<'_>) -> Result<T, DirectoryError>,
) -> Result<T, DirectoryError> {
    let maps = dir.mapped_weights(mapping::map)?;
    let regions: Vec<&[u8]> = maps.iter().map(|(_, map)| map.as_ref()).collect();
    work(&BnbRegions::new(&regions)?)
}

/// Loads a tokenizer, and checks that every token has a row in the embedding.
fn check_tokenizer(bytes: &[u8], config: &ModelConfig) -> Result<(), DirectoryError> {
    let tokenizer = tokenizers::Tokenizer::from_bytes(bytes)
        .map_err(|error| DirectoryError::Tokenizer(format!("it does not load: {error}")))?;
    let largest = tokenizer.get_vocab(true).into_values().max();
    let rows = config.vocab_size;
    match largest {
        None => Err(DirectoryError::Tokenizer("it has no tokens".to_owned())),
        Some(id) if id as usize >= rows => {
            let what = format!("it has a token with the id {id}, the embedding only {rows} rows");
            Err(DirectoryError::Tokenizer(what))
        }
        Some(_) => Ok(()),
    }
}

/// The files of weights: those that the index names, else the single one. Sorted.
pub(crate) fn shards(
    index: Option<&[u8]>,
    has: impl Fn(&str) -> bool,
) -> Result<Vec<String>, DirectoryError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let Some(bytes) = index else {
        let single = has(SINGLE).then(|| vec![SINGLE.to_owned()]);
        return single.ok_or(DirectoryError::NoWeights);
    };
    let index: Index =
        serde_json::from_slice(bytes).map_err(|e| DirectoryError::Index(e.to_string()))?;
    let names: BTreeSet<String> = index.weight_map.into_values().collect();
    if names.is_empty() {
        return Err(DirectoryError::Index("it names no files".to_owned()));
    }
    if let Some(name) = names.iter().find(|name| !name.ends_with(".safetensors")) {
        return Err(DirectoryError::Index(format!(
            "it names `{name}`, which is no safetensors file"
        )));
    }
    match names.iter().find(|name| !has(name)) {
        Some(name) => Err(DirectoryError::NoShard(name.clone())),
        None => Ok(names.into_iter().collect()),
    }
}

/// Names and shapes of the tensors of several safetensors files, from their headers alone.
#[derive(Debug, Default)]
struct Headers {
    entries: BTreeMap<String, Vec<usize>>,
    /// Whether tensors may be codes of quantised weights.
    has_codes: bool,
}

/// What a safetensors header says of one tensor.
#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

impl Headers {
    /// Adds the header of one file, and checks that the file has all the bytes that its header
    /// promises.
    fn add(&mut self, name: &str, mut file: impl Read + Seek) -> Result<(), DirectoryError> {
        let refuse = |reason: String| DirectoryError::Shard { file: name.to_owned(), reason };
        let io = |source| DirectoryError::Io { file: name.to_owned(), source };
        let len = file.seek(SeekFrom::End(0)).map_err(io)?;
        if len < 8 {
            return Err(refuse(format!("it has only {len} bytes")));
        }
        file.rewind().map_err(io)?;
        let mut prefix = [0; 8];
        file.read_exact(&mut prefix).map_err(io)?;
        let header_len = u64::from_le_bytes(prefix);
        if header_len > HEADER_BYTES_MAX || header_len > len - 8 {
            return Err(refuse(format!("its header claims {header_len} bytes of {len}")));
        }
        let mut header = vec![0; usize::try_from(header_len).expect("bounded above")];
        file.read_exact(&mut header).map_err(io)?;
        let map: Map<String, Value> = serde_json::from_slice(&header)
            .map_err(|error| refuse(format!("its header is no JSON object: {error}")))?;
        let mut spans = Vec::new();
        for (tensor, value) in map.into_iter().filter(|(tensor, _)| tensor != "__metadata__") {
            let entry: Entry = serde_json::from_value(value)
                .map_err(|error| refuse(format!("tensor `{tensor}`: {error}")))?;
            check_entry(&entry, self.has_codes)
                .map_err(|what| refuse(format!("tensor `{tensor}`: {what}")))?;
            spans.push(entry.data_offsets);
            if self.entries.insert(tensor.clone(), entry.shape).is_some() {
                return Err(refuse(format!("tensor `{tensor}` is also in another file")));
            }
        }
        check_cover(spans, len - 8 - header_len).map_err(refuse)
    }
}

/// A tensor's type must be one that is read, and its bytes must fill its shape.
fn check_entry(entry: &Entry, has_codes: bool) -> Result<(), String> {
    let n_bytes: usize = match entry.dtype.as_str() {
        "F32" => 4,
        "F16" | "BF16" => 2,
        "U8" if has_codes => 1,
        other => return Err(format!("it is stored as {other}, not as F32, F16 or BF16")),
    };
    let (start, end) = entry.data_offsets;
    let expected = entry.shape.iter().try_fold(n_bytes, |n, &size| n.checked_mul(size));
    if expected.map(|n| n as u64) != end.checked_sub(start) {
        return Err(format!("bytes {start} to {end} do not fill the shape {:?}", entry.shape));
    }
    Ok(())
}

/// Tensors must lie end to end and fill the file: a gap, an overlap or a rest means that the file
/// is not what was written.
fn check_cover(mut spans: Vec<(u64, u64)>, n_bytes: u64) -> Result<(), String> {
    spans.sort_unstable();
    let mut end = 0;
    for (start, next) in spans {
        if start != end {
            return Err(format!("a tensor begins at byte {start}, where {end} was due"));
        }
        end = next;
    }
    if end == n_bytes {
        return Ok(());
    }
    Err(format!("its header promises {end} bytes of tensors, the file has {n_bytes}"))
}

/// The part of a source that the check of names and shapes needs.
impl TensorSource for Headers {
    fn entries(&self) -> Vec<TensorEntry> {
        let entry = |(name, shape): (&String, &Vec<usize>)| TensorEntry {
            name: name.clone(),
            shape: shape.clone(),
        };
        self.entries.iter().map(entry).collect()
    }

    fn tensor(&self, name: &str) -> Result<NamedTensor, ModelError> {
        Err(ModelError::NoTensor(name.to_owned()))
    }
}
