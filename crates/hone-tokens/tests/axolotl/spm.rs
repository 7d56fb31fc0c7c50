//! Llama-2's vocabulary out of the metadata of a GGUF file, as the `tokenizer.json` that its vendor publishes: a SentencePiece
//! model becomes BPE whose merges are all splits of a token into two others, the best-scored token first.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

/// Types of tokens in GGUF.
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;

/// Reads the metadata of a GGUF file: key by key, with the four kinds of list that a vocabulary needs.
struct Reader<'a> {
    bytes: &'a [u8],
}

#[derive(Default)]
struct Lists {
    texts: HashMap<String, Vec<String>>,
    numbers: HashMap<String, Vec<f64>>,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> &'a [u8] {
        let (taken, rest) = self.bytes.split_at(n);
        self.bytes = rest;
        taken
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take(4).try_into().expect("four bytes"))
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take(8).try_into().expect("eight bytes"))
    }

    fn text(&mut self) -> String {
        let n = self.u64() as usize;
        String::from_utf8(self.take(n).to_vec()).expect("GGUF texts are UTF-8")
    }

    /// A value of type `kind` into the list of `key`.
    fn value(&mut self, kind: u32, key: &str, lists: &mut Lists) {
        let number = match kind {
            0 | 7 => f64::from(self.take(1)[0]),
            1 => f64::from(self.take(1)[0] as i8),
            2 | 3 => f64::from(u16::from_le_bytes(self.take(2).try_into().expect("two bytes"))),
            4 => f64::from(self.u32()),
            5 => f64::from(self.u32() as i32),
            6 => f64::from(f32::from_bits(self.u32())),
            8 => {
                let text = self.text();
                lists.texts.entry(key.to_owned()).or_default().push(text);
                return;
            }
            9 => {
                let (kind, n) = (self.u32(), self.u64());
                (0..n).for_each(|_| self.value(kind, key, lists));
                return;
            }
            10..=12 => self.u64() as f64,
            other => panic!("GGUF value of type {other}"),
        };
        lists.numbers.entry(key.to_owned()).or_default().push(number);
    }
}

fn lists(gguf: &[u8]) -> Lists {
    let mut reader = Reader { bytes: gguf };
    assert_eq!(reader.take(4), b"GGUF");
    let (_version, _tensors, n_keys) = (reader.u32(), reader.u64(), reader.u64());
    let mut lists = Lists::default();
    for _ in 0..n_keys {
        let key = reader.text();
        let kind = reader.u32();
        reader.value(kind, &key, &mut lists);
    }
    lists
}

/// The `tokenizer.json`.
pub(crate) fn tokenizer_json(gguf: &[u8]) -> Value {
    let mut lists = lists(gguf);
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let tokens = lists.texts.remove(&key("tokens")).expect("tokens");
    let scores = lists.numbers.remove(&key("scores")).expect("scores");
    let types = lists.numbers.remove(&key("token_type")).expect("types");
    let ids: HashMap<&str, usize> =
        tokens.iter().enumerate().map(|(id, token)| (token.as_str(), id)).collect();
    let mut merges: Vec<(f64, Vec<(usize, usize)>)> = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        let splits = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
        let mut splits: Vec<(usize, usize)> =
            splits.filter_map(|(l, r)| Some((*ids.get(l)?, *ids.get(r)?))).collect();
        splits.sort_unstable();
        merges.push((scores[id], splits));
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0));
    let merges = merges.iter().flat_map(|(_, splits)| splits);
    let merges: Vec<Value> = merges.map(|(l, r)| json!([tokens[*l], tokens[*r]])).collect();
    let special = |id: usize| matches!(types[id] as i64, UNKNOWN | CONTROL);
    let added = (0..tokens.len()).filter(|id| special(*id)).map(|id| {
        json!({"id": id, "content": tokens[id], "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    });
    let vocab: Map<String, Value> =
        tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "fuse_unk": true,
                  "byte_fallback": true, "ignore_merges": false, "vocab": vocab, "merges": merges},
    })
}
