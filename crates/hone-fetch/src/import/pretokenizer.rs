//! Pre-tokenizers by the name that `tokenizer.ggml.pre` gives them.
//!
//! A GGUF file does not say how text is split before merging, it only names a scheme that llama.cpp
//! knows. A wrong scheme gives ids that are valid and wrong, so a name that is not in this table is
//! refused.

use serde_json::{Value, json};

/// What the name of a scheme stands for.
#[derive(Debug)]
pub(super) struct Scheme {
    /// `pre_tokenizer` of tokenizer.json.
    pub(super) pre_tokenizer: Value,
    /// `normalizer` of tokenizer.json.
    pub(super) normalizer: Value,
    /// Whether a piece that is a token as a whole stays one, even if no merges lead there.
    pub(super) ignore_merges: bool,
    /// Whether the beginning-of-text token is added when the file does not say.
    pub(super) adds_bos: bool,
}

/// Every name that [`scheme`] knows, for messages.
pub(super) const KNOWN: &[&str] =
    &["smollm", "starcoder", "gpt-2", "llama-bpe", "llama3", "llama-v3", "qwen2", "deepseek-coder"];

/// The scheme of that name.
pub(super) fn scheme(name: &str) -> Option<Scheme> {
    let plain = |pre_tokenizer| Scheme {
        pre_tokenizer,
        normalizer: Value::Null,
        ignore_merges: false,
        adds_bos: false,
    };
    Some(match name {
        // Every digit by itself, then GPT-2's expression. Without the first step "\n\n1." splits
        // differently.
        "smollm" | "starcoder" => plain(sequence(vec![digits(), byte_level(true)])),
        "gpt-2" => plain(byte_level(true)),
        "llama-bpe" | "llama3" | "llama-v3" => Scheme {
            ignore_merges: true,
            adds_bos: true,
            ..plain(sequence(vec![split(&words(r"\p{N}{1,3}")), byte_level(false)]))
        },
        "qwen2" => Scheme {
            normalizer: json!({"type": "NFC"}),
            ..plain(sequence(vec![split(&words(r"\p{N}")), byte_level(false)]))
        },
        "deepseek-coder" => plain(sequence(vec![
            split(r"[\r\n]"),
            split(r"\s?\p{L}+"),
            split(r"\s?\p{P}+"),
            split("[\u{4e00}-\u{9fa5}\u{0800}-\u{4e00}\u{ac00}-\u{d7ff}]+"),
            digits(),
            byte_level(false),
        ])),
        _ => return None,
    })
}

/// Contractions, words with one mark before them, numbers as given, punctuation, line breaks,
/// spaces.
fn words(numbers: &str) -> String {
    let contractions = "(?i:'s|'t|'re|'ve|'m|'ll|'d)";
    let letters = r"[^\r\n\p{L}\p{N}]?\p{L}+";
    let marks = r" ?[^\s\p{L}\p{N}]+[\r\n]*";
    let spaces = r"\s*[\r\n]+|\s+(?!\S)|\s+";
    format!("{contractions}|{letters}|{numbers}|{marks}|{spaces}")
}

fn sequence(steps: Vec<Value>) -> Value {
    json!({"type": "Sequence", "pretokenizers": steps})
}

fn digits() -> Value {
    json!({"type": "Digits", "individual_digits": true})
}

fn split(pattern: &str) -> Value {
    json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
}

/// Bytes as letters, after GPT-2's expression where no step before it has split the text into
/// words.
fn byte_level(use_regex: bool) -> Value {
    json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex
    })
}
