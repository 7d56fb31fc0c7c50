//! The vocabulary of a GGUF file, as far as the tests need it.

use std::path::Path;

use serde_json::{Map, Value, json};

/// Reads the metadata of a file: its strings and lists of strings.
pub(crate) struct Gguf {
    bytes: Vec<u8>,
    at: usize,
}

impl Gguf {
    fn take(&mut self, n: usize) -> &[u8] {
        self.at += n;
        &self.bytes[self.at - n..self.at]
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take(4).try_into().expect("four bytes"))
    }

    fn u64(&mut self) -> usize {
        u64::from_le_bytes(self.take(8).try_into().expect("eight bytes")) as usize
    }

    fn string(&mut self) -> String {
        let len = self.u64();
        String::from_utf8(self.take(len).to_vec()).expect("the file's strings are UTF-8")
    }

    fn value(&mut self, kind: u32) -> Value {
        match kind {
            0 | 1 | 7 => self.take(1).to_vec().into(),
            2 | 3 => self.take(2).to_vec().into(),
            4..=6 => self.take(4).to_vec().into(),
            8 => self.string().into(),
            9 => {
                let (kind, n) = (self.u32(), self.u64());
                (0..n).map(|_| self.value(kind)).collect()
            }
            10..=12 => self.take(8).to_vec().into(),
            _ => panic!("there is no kind {kind}"),
        }
    }

    /// A byte-level `tokenizer.json` with the file's tokens and merges, and this pre-tokenizer.
    pub(crate) fn tokenizer(path: &Path, pre_tokenizer: &Value) -> Value {
        let bytes = std::fs::read(path).expect("the corpus has the file");
        let mut file = Gguf { bytes, at: 16 };
        let n = file.u64();
        let mut metadata = Map::new();
        for _ in 0..n {
            let (key, kind) = (file.string(), file.u32());
            let value = file.value(kind);
            metadata.insert(key, value);
        }
        let list = |key: &str| metadata[key].as_array().expect("a list").iter().enumerate();
        let token = |v: &Value| v.as_str().expect("a string").to_owned();
        let vocab: Map<String, Value> =
            list("tokenizer.ggml.tokens").map(|(id, v)| (token(v), json!(id))).collect();
        let merges: Vec<String> = list("tokenizer.ggml.merges").map(|(_, v)| token(v)).collect();
        json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": null, "pre_tokenizer": pre_tokenizer,
            "post_processor": null, "decoder": null,
            "model": {"type": "BPE", "vocab": vocab, "merges": merges},
        })
    }
}
