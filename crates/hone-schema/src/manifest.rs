//! The manifest: the last file of a sealed directory, and what makes it one.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{FileName, Ledger, LedgerError, SCHEMA_VERSION, Sha256Hex};

/// Most files in one sealed directory: a model in a thousand shards still fits.
const FILES_MAX: usize = 10_000;

/// What a sealed directory holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ArtefactKind {
    /// `hone-ingest`: conversations.
    Conversations,
    /// `hone-template`: text with spans.
    Rendered,
    /// `hone-tokenize`: token packs with loss weights.
    Packs,
    /// `hone-train` with an adapter method: an adapter in PEFT's layout.
    Adapter,
    /// A Hugging Face model directory.
    Weights,
    /// `hone-train`, on the way: what a resumed run needs.
    Checkpoint,
    /// `hone-eval`: a report.
    Report,
    /// Files that are none of these: a generated corpus, a vocabulary.
    Files,
}

impl std::fmt::Display for ArtefactKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            ArtefactKind::Conversations => "conversations",
            ArtefactKind::Rendered => "rendered",
            ArtefactKind::Packs => "packs",
            ArtefactKind::Adapter => "adapter",
            ArtefactKind::Weights => "weights",
            ArtefactKind::Checkpoint => "checkpoint",
            ArtefactKind::Report => "report",
            ArtefactKind::Files => "files",
        })
    }
}

/// The program that sealed a directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Program {
    /// Its version.
    pub version: String,
    /// SHA-256 of its executable file.
    pub sha256: Sha256Hex,
}

/// Something a stage read, by content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InputRef {
    /// What it was to the stage: `packs`, `base`, `source instructions`.
    pub role: String,
    /// SHA-256 of its manifest when it is an artefact, of its bytes when it is a file.
    pub sha256: Sha256Hex,
}

/// A file of a sealed directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Its name.
    pub name: FileName,
    /// Its length in bytes.
    pub bytes: u64,
    /// Its hash.
    pub sha256: Sha256Hex,
    /// Its rows, where it has rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<u64>,
}

/// `manifest.json`. Holds no time and no path, so that equal work has equal bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`SCHEMA_VERSION`] of the writer.
    pub schema: u32,
    /// What the directory holds.
    pub kind: ArtefactKind,
    /// The stage that wrote it.
    pub stage: String,
    /// The key; see [`crate::stage_key`].
    pub key: Sha256Hex,
    /// The program that wrote it.
    pub program: Program,
    /// The resolved configuration of the stage.
    pub config: Value,
    /// What was read.
    pub inputs: Vec<InputRef>,
    /// The other files, sorted by name.
    pub files: Vec<FileEntry>,
    /// Where every row went.
    pub ledger: Ledger,
    /// What the stage has to say about its work; free in form, the same for the same work.
    pub report: Value,
}

/// Why some bytes are not a manifest this program can trust.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Not JSON, or not this form.
    #[error("the manifest is not one of hone's: {0}")]
    Form(#[from] serde_json::Error),
    /// Another schema version.
    #[error("the manifest has schema {found}, this program reads {SCHEMA_VERSION}")]
    Schema {
        /// Its version.
        found: u64,
    },
    /// Too many files.
    #[error("the manifest names {found} files, more than {FILES_MAX}")]
    TooManyFiles {
        /// How many.
        found: usize,
    },
    /// Names that are not in order, or twice the same.
    #[error("the manifest's files are not in the order of their names, at `{name}`")]
    Order {
        /// The first name out of order.
        name: FileName,
    },
    /// A ledger that does not balance.
    #[error("the ledger does not balance: {0}")]
    Ledger(#[from] LedgerError),
}

impl Manifest {
    /// Name of the manifest's own file.
    pub const FILE: &'static str = "manifest.json";

    /// Reads and checks a manifest: schema, order and names of files, ledger.
    ///
    /// # Errors
    /// See [`ManifestError`].
    pub fn from_json(bytes: &[u8]) -> Result<Self, ManifestError> {
        let value: Value = serde_json::from_slice(bytes)?;
        if let Some(found) = value.get("schema").and_then(Value::as_u64)
            && found != u64::from(SCHEMA_VERSION)
        {
            return Err(ManifestError::Schema { found });
        }
        let manifest: Manifest = serde_json::from_value(value)?;
        manifest.check()?;
        Ok(manifest)
    }

    /// The checks of [`Manifest::from_json`], for a writer to make before it seals.
    ///
    /// # Errors
    /// See [`ManifestError`].
    pub fn check(&self) -> Result<(), ManifestError> {
        if self.schema != SCHEMA_VERSION {
            return Err(ManifestError::Schema { found: u64::from(self.schema) });
        }
        if self.files.len() > FILES_MAX {
            return Err(ManifestError::TooManyFiles { found: self.files.len() });
        }
        let mut seen = BTreeSet::new();
        for file in &self.files {
            if seen.last().is_some_and(|last| *last >= &file.name) {
                return Err(ManifestError::Order { name: file.name.clone() });
            }
            seen.insert(&file.name);
        }
        self.ledger.check()?;
        Ok(())
    }

    /// The bytes of `manifest.json`.
    pub fn to_json(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(self).expect("a manifest has only string keys");
        bytes.push(b'\n');
        bytes
    }

    /// The entry of the file `name`.
    pub fn file(&self, name: &str) -> Option<&FileEntry> {
        self.files.iter().find(|file| file.name.as_str() == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{sha256, stage_key};
    use serde_json::json;

    fn manifest() -> Manifest {
        let program = Program { version: "0.1.0".into(), sha256: sha256(b"program") };
        let config = json!({"seed": 7});
        let file = |name: &str| FileEntry {
            name: FileName::try_from(name).unwrap(),
            bytes: 3,
            sha256: sha256(b"abc"),
            rows: Some(1),
        };
        Manifest {
            schema: SCHEMA_VERSION,
            kind: ArtefactKind::Packs,
            stage: "tokenize".into(),
            key: stage_key("tokenize", &config, &[], &program),
            program,
            config,
            inputs: vec![],
            files: vec![file("eval.arrow"), file("train.arrow")],
            ledger: Ledger::default(),
            report: Value::Null,
        }
    }

    #[test]
    fn reads_back() {
        let manifest = manifest();
        assert_eq!(Manifest::from_json(&manifest.to_json()).unwrap(), manifest);
    }

    fn check(edit: impl FnOnce(&mut Value), message: &str) {
        let mut value: Value = serde_json::from_slice(&manifest().to_json()).unwrap();
        edit(&mut value);
        let error = Manifest::from_json(value.to_string().as_bytes()).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }

    #[test]
    fn edits_are_refused() {
        check(|m| m["schema"] = json!(999), "has schema 999");
        check(|m| m["files"][0]["name"] = json!("../x"), "letters, digits");
        check(|m| m["files"][0]["name"] = json!("train.arrow"), "not in the order");
        check(|m| m["files"][0]["sha256"] = json!("0"), "not a SHA-256");
        check(|m| m["surprise"] = json!(1), "unknown field `surprise`");
        check(|m| m["ledger"]["sources"]["a"] = json!({"rows_in": 1, "rows_out": 0}), "balance");
    }
}
