//! What `make.py` wrote, as this test reads it.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use hone_chat::{ChatTemplate, Date, Dialect};
use hone_schema::{Message, parse_messages};
use hone_testkit::workspace;
use hone_tokens::Vocab;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// A folder of `make.py`, and what is in it.
#[derive(Deserialize)]
pub(crate) struct Index {
    pub(crate) versions: BTreeMap<String, String>,
    pub(crate) now: String,
    pub(crate) n_chats: usize,
    pub(crate) tokenizers: Vec<Entry>,
}

/// One tokenizer.
#[derive(Deserialize)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) kind: String,
    pub(crate) tokens: BTreeMap<String, Value>,
    pub(crate) templates: Vec<TemplateFile>,
    /// For each chat, whether nothing in it spells an added token.
    pub(crate) benign: Vec<bool>,
    /// Texts that transformers gives other ids than its own library does with the same file.
    pub(crate) apart: usize,
}

#[derive(Deserialize)]
pub(crate) struct TemplateFile {
    pub(crate) name: String,
    pub(crate) file: String,
}

/// The cells of one template: a line of `golden/<tokenizer>.jsonl`.
#[derive(Deserialize)]
pub(crate) struct Line {
    pub(crate) template: String,
    pub(crate) cells: Vec<Cell>,
}

/// What transformers makes of one chat.
#[derive(Deserialize)]
#[serde(untagged)]
pub(crate) enum Cell {
    /// Text (a hash) and ids.
    Ids { text: String, ids: Vec<u32> },
    /// `refuses` or `fails`.
    Not(String),
}

/// A conversation.
pub(crate) struct Chat {
    pub(crate) name: String,
    pub(crate) messages: Vec<Message>,
    pub(crate) tools: Option<Value>,
}

/// A folder from the environment, from the workspace's root where it is relative: a test runs in the
/// directory of its package. Where it is not set the test says that it was skipped.
pub(crate) fn folder(variable: &str) -> Option<PathBuf> {
    let folder = std::env::var_os(variable).map(|folder| workspace().join(folder));
    if folder.is_none() {
        let said = writeln!(std::io::stderr(), "skipped: {variable} is not set");
        said.expect("stderr is open");
    }
    folder
}

pub(crate) fn json<T: DeserializeOwned>(path: &Path) -> T {
    let bytes = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

pub(crate) fn chats(path: &Path) -> Vec<Chat> {
    let list: Vec<Value> = json(path);
    let chats = list.into_iter().map(|chat| Chat {
        name: chat["name"].as_str().expect("a name").to_owned(),
        messages: parse_messages(&chat["messages"].to_string()).expect("messages"),
        tools: chat.get("tools").cloned(),
    });
    chats.collect()
}

/// A tokenizer as its files have it.
pub(crate) struct Tokenizer {
    pub(crate) vocab: Vocab,
    /// Texts of all its added tokens.
    pub(crate) added: Vec<String>,
    tokens: BTreeMap<String, String>,
}

impl Tokenizer {
    pub(crate) fn read(dir: &Path, tokens: &BTreeMap<String, Value>) -> Self {
        let bytes = fs::read(dir.join("tokenizer.json")).expect("tokenizer.json");
        let file: Value = serde_json::from_slice(&bytes).expect("JSON");
        let listed = file["added_tokens"].as_array().expect("a list").iter();
        let texts = tokens.iter().filter_map(|(name, text)| Some((name, text.as_str()?)));
        Tokenizer {
            vocab: Vocab::from_json(&bytes).expect("a vocabulary"),
            added: listed.filter_map(|t| Some(t["content"].as_str()?.to_owned())).collect(),
            tokens: texts.map(|(name, text)| (name.clone(), text.to_owned())).collect(),
        }
    }

    /// Compiles a template as the template stage does for this tokenizer.
    pub(crate) fn template(&self, source: &str, now: &str) -> Result<ChatTemplate, String> {
        let dialect = Dialect {
            tokens: self.tokens.clone(),
            added_tokens: self.added.clone(),
            date: Some(Date::parse(now).expect("a date")),
            ..Dialect::default()
        };
        ChatTemplate::new(source, dialect).map_err(|e| e.to_string())
    }
}
