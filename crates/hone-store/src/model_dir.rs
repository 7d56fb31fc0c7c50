//! Hugging Face model directories.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use hone_schema::{InputRef, Manifest, sha256};
use serde::Deserialize;

use crate::{Sealed, StoreError, input};

/// A model directory: sealed by hone, or foreign (then links are followed, as hub caches are made of them).
#[derive(Debug)]
pub struct ModelDir {
    dir: PathBuf,
    sealed: Option<Sealed>,
    names: Vec<String>,
}

/// The index of a model whose weights lie in several files.
const INDEX: &str = "model.safetensors.index.json";

/// Longest index read.
const INDEX_BYTES_MAX: u64 = 64 << 20;

/// The weights of a model that has them in one file.
const SINGLE: &str = "model.safetensors";

/// What is read of an index.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

fn is_weights(name: &str) -> bool {
    name.ends_with(".safetensors")
}

/// Files that say what a model is; others (cards, images) do not count into its identity.
fn is_model_file(name: &str) -> bool {
    is_weights(name)
        || name.ends_with(".jinja")
        || (name.ends_with(".json") && name != Manifest::FILE)
}

impl ModelDir {
    /// Opens the model directory at `dir`.
    ///
    /// # Errors
    /// It is missing, not a directory, has no `config.json`, or was sealed and changed since.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let lacks =
            |what: &str| StoreError::NotModel { path: dir.to_owned(), what: what.to_owned() };
        if !dir.is_dir() {
            return Err(lacks(if dir.exists() { "it is a file" } else { "it does not exist" }));
        }
        let names: Vec<String> = input::list(dir)?
            .iter()
            .filter_map(|path| path.file_name())
            .map(|name| name.to_string_lossy().into_owned())
            .filter(|name| is_model_file(name))
            .collect();
        let sealed =
            if dir.join(Manifest::FILE).is_file() { Some(Sealed::open_any(dir)?) } else { None };
        let mut model = ModelDir { dir: dir.to_owned(), sealed, names };
        if !model.has("config.json") {
            return Err(lacks("it has no `config.json`"));
        }
        model.leave_other_weights();
        Ok(model)
    }

    /// Leaves out files of weights that are not the model's: beside the files that the index names, or beside
    /// `model.safetensors` where there is no index, lie the same weights in their first form, or an adapter.
    fn leave_other_weights(&mut self) {
        // An index that cannot be read is an error only for those who want the weights.
        let Ok(named) = self.named_weights() else { return };
        let has_single = self.has(SINGLE);
        self.names.retain(|name| match &named {
            _ if !is_weights(name) => true,
            Some(named) => named.contains(name),
            None => !has_single || name == SINGLE,
        });
    }

    /// The files of weights that the index names; `None` when there is no index.
    fn named_weights(&self) -> Result<Option<BTreeSet<String>>, StoreError> {
        let Some(bytes) = self.try_read(INDEX, INDEX_BYTES_MAX)? else { return Ok(None) };
        let index: Index = serde_json::from_slice(&bytes)
            .map_err(|error| self.not_model(format!("`{INDEX}` is no index: {error}")))?;
        Ok(Some(index.weight_map.into_values().collect()))
    }

    fn not_model(&self, what: String) -> StoreError {
        StoreError::NotModel { path: self.dir.clone(), what }
    }

    fn no_file(&self, name: &str) -> StoreError {
        StoreError::NoFile { path: self.dir.clone(), name: name.to_owned() }
    }

    /// Where it lies.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its files, sorted: configuration, tokenizer, template, weights (those that [`ModelDir::weights`] gives).
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Whether it has a file of that name.
    pub fn has(&self, name: &str) -> bool {
        self.names.iter().any(|n| n == name)
    }

    /// A file of at most `bytes_max` bytes.
    ///
    /// # Errors
    /// It is missing, too large, or was sealed and changed since.
    pub fn read(&self, name: &str, bytes_max: u64) -> Result<Vec<u8>, StoreError> {
        if !self.has(name) {
            return Err(self.no_file(name));
        }
        match &self.sealed {
            Some(sealed) => {
                let bytes = sealed.manifest().file(name).map_or(0, |entry| entry.bytes);
                if bytes > bytes_max {
                    let path = self.dir.join(name);
                    return Err(StoreError::TooLarge { path, bytes, max: bytes_max });
                }
                sealed.read(name)
            }
            None => input::read(&self.dir.join(name), bytes_max),
        }
    }

    /// As [`ModelDir::read`]; `None` when there is no such file.
    ///
    /// # Errors
    /// It is too large, or was sealed and changed since.
    pub fn try_read(&self, name: &str, bytes_max: u64) -> Result<Option<Vec<u8>>, StoreError> {
        if self.has(name) { self.read(name, bytes_max).map(Some) } else { Ok(None) }
    }

    /// The files of weights, open, in the order of their names; at least one: those that the index names, else
    /// `model.safetensors`, else all there are.
    ///
    /// # Errors
    /// There is none, one that the index names is missing, or one cannot be opened, or was sealed and changed since.
    pub fn weights(&self) -> Result<Vec<(String, File)>, StoreError> {
        let named = self.named_weights()?.unwrap_or_default();
        if let Some(name) = named.iter().find(|name| !self.has(name)) {
            let what = format!("`{INDEX}` names the file `{name}`, which is not there");
            return Err(self.not_model(what));
        }
        let names = self.names.iter().filter(|name| is_weights(name));
        let files: Vec<(String, File)> = names
            .map(|name| {
                let file = match &self.sealed {
                    Some(sealed) => sealed.file(name)?,
                    None => input::open(&self.dir.join(name))?,
                };
                Ok((name.clone(), file))
            })
            .collect::<Result<_, StoreError>>()?;
        if files.is_empty() {
            return Err(self.not_model("it has no weights (`*.safetensors`)".to_owned()));
        }
        Ok(files)
    }

    /// The files of weights by their names, as what `map` makes of each.
    ///
    /// # Errors
    /// As [`ModelDir::weights`], or one cannot be mapped.
    pub fn mapped_weights<B>(
        &self,
        map: impl Fn(&File) -> io::Result<B>,
    ) -> Result<Vec<(String, B)>, StoreError> {
        let mapped = |(name, file): (String, File)| match map(&file) {
            Ok(bytes) => Ok((name, bytes)),
            Err(error) => Err(StoreError::io("map", &self.dir().join(name), error)),
        };
        self.weights()?.into_iter().map(mapped).collect()
    }

    /// The whole model as an input of a stage.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn input(&self, role: &str) -> Result<InputRef, StoreError> {
        let names: Vec<&str> = self.names.iter().map(String::as_str).collect();
        self.input_of(role, &names)
    }

    /// The named files (those of them that exist) as an input of a stage that reads no others.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn input_of(&self, role: &str, names: &[&str]) -> Result<InputRef, StoreError> {
        let mut lines = String::new();
        for name in names.iter().filter(|name| self.has(name)) {
            let known = self.sealed.as_ref().and_then(|s| s.manifest().file(name));
            let hash = match known {
                Some(entry) => entry.sha256.clone(),
                None => input::hash(&self.dir.join(name))?.0,
            };
            lines.push_str(&format!("{hash} {name}\n"));
        }
        Ok(InputRef { role: role.to_owned(), sha256: sha256(lines.as_bytes()) })
    }
}
