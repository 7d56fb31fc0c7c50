//! File names inside a sealed directory.

use serde::{Deserialize, Serialize};

/// Longest file name in a sealed directory, in bytes: half of what common file systems allow.
const NAME_BYTES_MAX: usize = 128;

/// A file name inside a sealed directory: ASCII letters, digits, `.`, `_` and `-`, not starting with a dot.
///
/// No separator, no `..`, no device name of another system, no two names that differ only in Unicode form can be written
/// with that alphabet, so a manifest cannot point outside its directory.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FileName(String);

/// Why a text is not a file name of a sealed directory.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NameError {
    /// The empty text.
    #[error("a file name is empty")]
    Empty,
    /// Longer than the limit.
    #[error("file name of {len} bytes is longer than {NAME_BYTES_MAX}")]
    TooLong {
        /// Its length in bytes.
        len: usize,
    },
    /// A character outside the alphabet, or a leading dot.
    #[error("file name {name:?} has {found:?}; letters, digits, `.`, `_` and `-` may stand there")]
    Character {
        /// The name.
        name: String,
        /// The first character that may not stand where it does.
        found: char,
    },
}

impl FileName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for FileName {
    type Error = NameError;

    fn try_from(name: String) -> Result<Self, NameError> {
        if name.is_empty() {
            return Err(NameError::Empty);
        }
        if name.len() > NAME_BYTES_MAX {
            return Err(NameError::TooLong { len: name.len() });
        }
        let fits = |(idx, c): (usize, char)| {
            c.is_ascii_alphanumeric() || c == '_' || (idx > 0 && (c == '.' || c == '-'))
        };
        match name.chars().enumerate().find(|&at| !fits(at)) {
            Some((_, found)) => Err(NameError::Character { name, found }),
            None => Ok(FileName(name)),
        }
    }
}

impl TryFrom<&str> for FileName {
    type Error = NameError;

    fn try_from(name: &str) -> Result<Self, NameError> {
        FileName::try_from(name.to_owned())
    }
}

impl From<FileName> for String {
    fn from(name: FileName) -> String {
        name.0
    }
}

impl std::fmt::Display for FileName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &str, ok: bool) {
        assert_eq!(FileName::try_from(name).is_ok(), ok, "{name:?}");
    }

    #[test]
    fn plain_names_pass() {
        for name in ["a", "train.arrow", "model-00001-of-00002.safetensors", "_x", "A.b-c_d"] {
            check(name, true);
        }
    }

    #[test]
    fn everything_that_could_leave_the_directory_fails() {
        for name in ["", ".", "..", "../x", "/etc/passwd", "a/b", ".hidden", "-flag", "a\0b", "é"]
        {
            check(name, false);
        }
        check(&"x".repeat(128), true);
        check(&"x".repeat(129), false);
    }
}
