//! Hashes, canonical JSON, and the key of a stage.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::{InputRef, Program, SCHEMA_VERSION};

/// A SHA-256 as 64 lower-case hexadecimal digits.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Sha256Hex(String);

impl Sha256Hex {
    /// The digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The first twelve digits, for messages to people.
    pub fn short(&self) -> &str {
        &self.0[..12]
    }

    /// The digits of a finished hash.
    pub fn from_digest(digest: &[u8]) -> Self {
        assert_eq!(digest.len(), 32, "a SHA-256 has 32 bytes");
        Sha256Hex(digest.iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

impl TryFrom<String> for Sha256Hex {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let is_hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if text.len() == 64 && text.bytes().all(is_hex) {
            Ok(Sha256Hex(text))
        } else {
            Err(format!("{text:?} is not a SHA-256 in lower-case hexadecimal"))
        }
    }
}

impl From<Sha256Hex> for String {
    fn from(hash: Sha256Hex) -> String {
        hash.0
    }
}

impl std::fmt::Debug for Sha256Hex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::fmt::Display for Sha256Hex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// SHA-256 of some bytes.
pub fn sha256(bytes: &[u8]) -> Sha256Hex {
    Sha256Hex::from_digest(&Sha256::digest(bytes))
}

/// JSON with the keys of every object sorted and no space: one value, one text.
pub fn canonical_json(value: &Value) -> String {
    fn sorted(value: &Value) -> Value {
        match value {
            Value::Object(map) => {
                let mut keys: Vec<&String> = map.keys().collect();
                keys.sort();
                Value::Object(keys.into_iter().map(|k| (k.clone(), sorted(&map[k]))).collect())
            }
            Value::Array(items) => Value::Array(items.iter().map(sorted).collect()),
            other => other.clone(),
        }
    }
    sorted(value).to_string()
}

/// The key of a stage: a hash over everything that decides its output bytes. Two runs with equal keys write equal bytes.
pub fn stage_key(stage: &str, config: &Value, inputs: &[InputRef], program: &Program) -> Sha256Hex {
    let what = json!({
        "schema": SCHEMA_VERSION,
        "stage": stage,
        "config": config,
        "inputs": inputs,
        "program": program.sha256,
    });
    sha256(canonical_json(&what).as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_json_sorts_at_every_depth() {
        let value = json!({"b": 1, "a": [{"d": null, "c": "x"}]});
        assert_eq!(canonical_json(&value), r#"{"a":[{"c":"x","d":null}],"b":1}"#);
    }

    #[test]
    fn a_hash_reads_back_and_nothing_else_does() {
        let hash = sha256(b"abc");
        assert_eq!(
            hash.as_str(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(Sha256Hex::try_from(hash.to_string()), Ok(hash.clone()));
        assert!(Sha256Hex::try_from(hash.to_string().to_uppercase()).is_err());
        assert!(Sha256Hex::try_from("ba78".to_owned()).is_err());
    }

    #[test]
    fn each_part_of_a_key_changes_it() {
        let program = |text: &[u8]| Program { version: "1".into(), sha256: sha256(text) };
        let input = |text: &[u8]| InputRef { role: "rows".into(), sha256: sha256(text) };
        let config = json!({"lr": 1.0});
        let key = stage_key("train", &config, &[input(b"a")], &program(b"p"));
        assert_eq!(key, stage_key("train", &config, &[input(b"a")], &program(b"p")));
        for other in [
            stage_key("merge", &config, &[input(b"a")], &program(b"p")),
            stage_key("train", &json!({"lr": 2.0}), &[input(b"a")], &program(b"p")),
            stage_key("train", &config, &[input(b"b")], &program(b"p")),
            stage_key("train", &config, &[input(b"a")], &program(b"q")),
        ] {
            assert_ne!(key, other);
        }
    }
}
