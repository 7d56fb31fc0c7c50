//! Which template is meant, and what the base model's tokenizer knows as whole tokens.

use std::collections::BTreeMap;
use std::path::Path;

use hone_chat::{BUILTINS, SOURCE_BYTES_MAX, builtin};
use hone_cli::{Failure, nearest};
use hone_schema::{InputRef, sha256};
use hone_store::{ModelDir, input};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::args::Choice;

/// Files of a model directory that are read here.
const FILES: [&str; 5] = [
    "chat_template.jinja",
    "config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
];

/// Largest configuration file read.
const CONFIG_BYTES_MAX: u64 = 64 << 20;

/// Largest tokenizer read: a vocabulary of a million tokens.
const TOKENIZER_BYTES_MAX: u64 = 512 << 20;

/// A template's source and where it is from.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Source {
    /// The name to show: `auto`, a built-in one, or the file's path.
    pub(crate) name: String,
    pub(crate) text: String,
    /// The one for rows with tools, where the model has one of its own for them.
    pub(crate) tool_use: Option<String>,
}

/// What is known of a base model's tokenizer.
#[derive(Debug, Default, Deserialize, Serialize)]
pub(crate) struct Tokenizer {
    /// `bos_token` and so on, with their texts.
    pub(crate) tokens: BTreeMap<String, String>,
    /// Texts of all added tokens.
    pub(crate) added: Vec<String>,
    /// The templates that come with it, by name; an only one is `default`.
    templates: BTreeMap<String, String>,
}

impl Tokenizer {
    /// Reads a model directory.
    ///
    /// # Errors
    /// A file that is not what it should be.
    pub(crate) fn read(model: &ModelDir) -> Result<Self, Failure> {
        let config: Value = json(model, "tokenizer_config.json", CONFIG_BYTES_MAX)?;
        let map: Value = json(model, "special_tokens_map.json", CONFIG_BYTES_MAX)?;
        let tokenizer: TokenizerJson = json(model, "tokenizer.json", TOKENIZER_BYTES_MAX)?;
        let mut tokens = BTreeMap::new();
        let pairs = [&map, &config].into_iter().filter_map(Value::as_object).flatten();
        for (name, token) in pairs.filter(|(name, _)| name.ends_with("_token")) {
            if let Some(text) = token_text(token) {
                tokens.insert(name.clone(), text.to_owned());
            }
        }
        let listed = tokenizer.added_tokens.as_array().into_iter().flatten();
        let decoded =
            config["added_tokens_decoder"].as_object().into_iter().flat_map(|m| m.values());
        let mut added: Vec<String> =
            listed.chain(decoded).filter_map(token_text).map(str::to_owned).collect();
        added.sort();
        added.dedup();
        let mut templates = template_files(model)?;
        if templates.is_empty() {
            templates = configured(&config["chat_template"]);
        }
        Ok(Tokenizer { tokens, added, templates })
    }
}

/// What is read of a `tokenizer.json`; the vocabulary is passed over.
#[derive(Default, Deserialize)]
struct TokenizerJson {
    #[serde(default)]
    added_tokens: Value,
}

/// Folder of a model with further templates, one a file.
const FURTHER: &str = "additional_chat_templates";

/// Templates in files of their own, as transformers writes them since 4.51.
fn template_files(model: &ModelDir) -> Result<BTreeMap<String, String>, Failure> {
    let mut templates = BTreeMap::new();
    if let Some(bytes) = model.try_read("chat_template.jinja", SOURCE_BYTES_MAX as u64)? {
        templates.insert("default".to_owned(), utf8(bytes, "chat_template.jinja")?);
    }
    let folder = model.dir().join(FURTHER);
    let files = if folder.is_dir() { input::list(&folder)? } else { Vec::new() };
    for path in files.iter().filter(|path| path.extension().is_some_and(|e| e == "jinja")) {
        let Some(name) = path.file_stem().and_then(|name| name.to_str()) else { continue };
        let bytes = input::read(path, SOURCE_BYTES_MAX as u64)?;
        templates.insert(name.to_owned(), utf8(bytes, &path.display().to_string())?);
    }
    Ok(templates)
}

/// The text of a token that is written as a text or as an object with one.
fn token_text(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token["content"].as_str())
}

/// The templates of a `tokenizer_config.json`: a text, or a list of named ones.
fn configured(value: &Value) -> BTreeMap<String, String> {
    let own = |name: &str, text: &str| (name.to_owned(), text.to_owned());
    let listed = value.as_array().into_iter().flatten();
    let listed = listed.filter_map(|e| Some(own(e["name"].as_str()?, e["template"].as_str()?)));
    listed.chain(value.as_str().map(|text| own("default", text))).collect()
}

fn json<T: DeserializeOwned + Default>(
    model: &ModelDir,
    name: &str,
    bytes_max: u64,
) -> Result<T, Failure> {
    let Some(bytes) = model.try_read(name, bytes_max)? else {
        return Ok(T::default());
    };
    let path = model.dir().join(name);
    serde_json::from_slice(&bytes)
        .map_err(|e| Failure::input(format!("{}: not JSON: {e}", path.display())))
}

fn utf8(bytes: Vec<u8>, name: &str) -> Result<String, Failure> {
    String::from_utf8(bytes).map_err(|_| Failure::input(format!("{name}: not UTF-8")))
}

/// The model's files that decide what is rendered, as an input.
///
/// # Errors
/// A file cannot be read.
pub(crate) fn model_input(model: &ModelDir) -> Result<InputRef, Failure> {
    Ok(model.input_of("base", &FILES)?)
}

/// A template file as an input.
pub(crate) fn file_input(source: &Source) -> InputRef {
    let mut all = source.text.clone();
    if let Some(tool_use) = &source.tool_use {
        all.push('\0');
        all.push_str(tool_use);
    }
    InputRef { role: "template".to_owned(), sha256: sha256(all.as_bytes()) }
}

/// Finds the template that is meant.
///
/// # Errors
/// There is none of that name, or none that comes with the model.
pub(crate) fn find(choice: &Choice, tokenizer: &Tokenizer) -> Result<Source, Failure> {
    match choice {
        Choice::File { file } => {
            let bytes = input::read(file, SOURCE_BYTES_MAX as u64)?;
            let name = file.display().to_string();
            Ok(Source { text: utf8(bytes, &name)?, name, tool_use: None })
        }
        Choice::Name(name) if name == "auto" => {
            let text = tokenizer.templates.get("default").cloned();
            let text = text.ok_or_else(|| no_default(tokenizer))?;
            let tool_use = tokenizer.templates.get("tool_use").cloned();
            Ok(Source { name: name.clone(), text, tool_use })
        }
        Choice::Name(name) => {
            let text = builtin(name).ok_or_else(|| unknown(name))?;
            Ok(Source { name: name.clone(), text: text.to_owned(), tool_use: None })
        }
        Choice::OfModel { of_model } => {
            let text = tokenizer.templates.get(of_model).cloned().ok_or_else(|| {
                let known: Vec<&str> = tokenizer.templates.keys().map(String::as_str).collect();
                let failure = format!("the base model has no chat template `{of_model}`");
                Failure::usage(failure).hint(match known.as_slice() {
                    [] => "it has none at all".to_owned(),
                    known => format!("it has {}", known.join(", ")),
                })
            })?;
            Ok(Source { name: of_model.clone(), text, tool_use: None })
        }
    }
}

fn no_default(tokenizer: &Tokenizer) -> Failure {
    if let Some(name) = tokenizer.templates.keys().next() {
        return Failure::input("the base model has no default chat template")
            .hint(format!("name one of its own: `template = {{ of_model = \"{name}\" }}`"));
    }
    Failure::input("the base model has no chat template").hint(format!(
        "choose a built-in one with `--set template.template=chatml` (there are {})",
        names().join(", ")
    ))
}

/// What a flag names: `auto`, a built-in template, else a file.
pub(crate) fn choice(name: &str) -> Choice {
    if name == "auto" || builtin(name).is_some() || !Path::new(name).exists() {
        Choice::Name(name.to_owned())
    } else {
        Choice::File { file: name.into() }
    }
}

fn names() -> Vec<&'static str> {
    BUILTINS.iter().map(|(name, _)| *name).collect()
}

fn unknown(name: &str) -> Failure {
    let failure = Failure::usage(format!("there is no built-in template `{name}`"));
    failure.hint(match nearest(name, names().into_iter().chain(["auto"])) {
        Some(near) => {
            format!("did you mean `{near}`? A file is given as `{{ file = \"x.jinja\" }}`")
        }
        None => format!("there are auto, {}; or `{{ file = \"x.jinja\" }}`", names().join(", ")),
    })
}
