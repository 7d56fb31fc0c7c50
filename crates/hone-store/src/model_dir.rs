//! Hugging Face model directories.

use std::fs::File;
use std::path::{Path, PathBuf};

use hone_schema::{InputRef, Manifest, sha256};

use crate::{Sealed, StoreError, input};

/// A model directory: sealed by hone, or foreign (then links are followed, as hub caches are made of them).
#[derive(Debug)]
pub struct ModelDir {
    dir: PathBuf,
    sealed: Option<Sealed>,
    names: Vec<String>,
}

/// Files that say what a model is; others (cards, images) do not count into its identity.
fn is_model_file(name: &str) -> bool {
    name.ends_with(".safetensors")
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
        let model = ModelDir { dir: dir.to_owned(), sealed, names };
        if !model.has("config.json") {
            return Err(lacks("it has no `config.json`"));
        }
        Ok(model)
    }

    fn no_file(&self, name: &str) -> StoreError {
        StoreError::NoFile { path: self.dir.clone(), name: name.to_owned() }
    }

    /// Where it lies.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its files, sorted: configuration, tokenizer, template, weights.
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

    /// The safetensors files, open, in the order of their names; at least one.
    ///
    /// # Errors
    /// There is none, or one cannot be opened, or was sealed and changed since.
    pub fn weights(&self) -> Result<Vec<(String, File)>, StoreError> {
        let names = self.names.iter().filter(|name| name.ends_with(".safetensors"));
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
            let what = "it has no weights (`*.safetensors`)".to_owned();
            return Err(StoreError::NotModel { path: self.dir.clone(), what });
        }
        Ok(files)
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
