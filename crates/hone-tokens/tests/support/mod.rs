//! Small tokenizers, rows written as text, and pictures of masks.

#![allow(dead_code, reason = "each test file uses its own part")]

pub(crate) mod gguf;

use std::ops::Range;

use hone_schema::{Kind, Part, Rendered, Span, Split};
use hone_tokens::{
    Policy, Refusal, Row, Rules, Taken, TooLong, Vocab, VocabSpec, tokenize, train_vocab,
};
use serde_json::{Value, json};

/// Markers of the tokenizers here.
pub(crate) const MARKERS: [&str; 6] = ["<s>", "<e>", "<u>", "<a>", "<sys>", "<think>"];

/// Bytes of a `tokenizer.json`: byte-level, with merges from a few words.
pub(crate) fn byte_level() -> Value {
    let texts = ["yo yo yo no no hello hello there there yo .. .. don't don't 12 12\n\n"; 4];
    let specials = MARKERS.map(str::to_owned).to_vec();
    let spec = VocabSpec::new(300, specials).expect("300 tokens hold 256 bytes and six markers");
    serde_json::from_slice(&train_vocab(texts, &spec)).expect("train_vocab writes JSON")
}

/// As [`byte_level`], with other parts.
pub(crate) fn with(edit: impl FnOnce(&mut Value)) -> Value {
    let mut json = byte_level();
    edit(&mut json);
    json
}

/// A SentencePiece-like BPE over printable ASCII, blanks written as `▁`.
pub(crate) fn pieces(normalizer: Value, pre_tokenizer: Value) -> Value {
    let mut tokens: Vec<String> = MARKERS.map(str::to_owned).to_vec();
    tokens.push("<unk>".to_owned());
    tokens.push("▁".to_owned());
    tokens.push("\n".to_owned());
    tokens.extend((33u8..127).map(|b| char::from(b).to_string()));
    let merges = [["▁", "y"], ["▁y", "o"], ["y", "o"], ["h", "e"], ["▁", "▁"], ["l", "l"]];
    tokens.extend(merges.iter().map(|m| m.concat()));
    let vocab: serde_json::Map<String, Value> =
        tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": byte_level()["added_tokens"],
        "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
        "post_processor": null, "decoder": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "fuse_unk": true,
                  "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": merges},
    })
}

/// Every kind of tokenizer that the tests know, by name.
pub(crate) fn tokenizers() -> Vec<(&'static str, Value)> {
    let metaspace = |scheme: &str| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": true});
    let llama = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]});
    let qwen = json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "behavior": "Isolated", "invert": false, "pattern": {"Regex":
            r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"}},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false}]});
    let flag = |json: &mut Value, name: &str| {
        for token in json["added_tokens"].as_array_mut().expect("a list") {
            token[name] = json!(true);
        }
    };
    vec![
        ("byte level", byte_level()),
        ("prefix space", with(|j| j["pre_tokenizer"]["add_prefix_space"] = json!(true))),
        (
            "qwen",
            with(|j| {
                j["pre_tokenizer"] = qwen;
                j["normalizer"] = json!({"type": "NFC"});
            }),
        ),
        ("metaspace first", pieces(Value::Null, metaspace("first"))),
        ("metaspace always", pieces(Value::Null, metaspace("always"))),
        ("metaspace never", pieces(Value::Null, metaspace("never"))),
        ("llama", pieces(llama, Value::Null)),
        ("lstrip", with(|j| flag(j, "lstrip"))),
        ("rstrip", with(|j| flag(j, "rstrip"))),
        (
            "both strips",
            with(|j| {
                flag(j, "lstrip");
                flag(j, "rstrip");
            }),
        ),
        ("single word", with(|j| flag(j, "single_word"))),
        (
            "normalized",
            with(|j| {
                flag(j, "normalized");
                j["normalizer"] = json!({"type": "Lowercase"});
            }),
        ),
        (
            "not special",
            with(|j| {
                for token in j["added_tokens"].as_array_mut().expect("a list") {
                    token["special"] = json!(false);
                }
            }),
        ),
        (
            "blanks",
            with(|j| {
                let id = j["model"]["vocab"].as_object().map(|vocab| vocab.len());
                let blank = json!({"id": id, "content": "  ", "single_word": false, "lstrip": false,
                               "rstrip": false, "normalized": false, "special": false});
                j["added_tokens"].as_array_mut().expect("a list").push(blank);
            }),
        ),
    ]
}

pub(crate) fn vocab_of(json: &Value) -> Vocab {
    Vocab::from_json(json.to_string().as_bytes()).expect("the test's tokenizer is one")
}

/// A row from spans: (text, message, role, part, weight).
pub(crate) type Bit<'a> = (&'a str, Option<u32>, &'a str, Part, f32);

pub(crate) fn rendered(kind: Kind, bits: &[Bit], prompt_len: Option<usize>) -> Rendered {
    let mut text = String::new();
    let mut spans = Vec::new();
    for (bit, message, role, part, weight) in bits.iter().filter(|b| !b.0.is_empty()) {
        let start = text.len() as u32;
        text.push_str(bit);
        spans.push(Span {
            start,
            end: text.len() as u32,
            message: *message,
            role: (*role).to_owned(),
            part: *part,
            weight: *weight,
            chosen: false,
        });
    }
    let row = Rendered {
        id: "r".into(),
        source: "s".into(),
        split: Split::Train,
        kind,
        text,
        spans,
        share: hone_schema::Share::Main,
        prompt_len: prompt_len.map(|len| len as u32),
        meta: None,
    };
    row.check(0).expect("the test's row is one");
    row
}

/// A conversation under a template in the manner of ChatML: `<u>\n` or `<a>\n` or `<sys>\n`, content, `<e>`, `\n`. The spans are
/// those that hone-chat writes: headers and separators belong to no message, stop markers to responses alone.
pub(crate) fn chat(messages: &[(&str, &str)]) -> Rendered {
    let mut bits: Vec<Bit> = Vec::new();
    let mut prompt_len = None;
    let mut len = 0;
    for (idx, (role, content)) in messages.iter().enumerate() {
        let (role, header) = match *role {
            "u" => ("user", "<u>\n"),
            "a" => ("assistant", "<a>\n"),
            _ => ("system", "<sys>\n"),
        };
        let message = Some(idx as u32);
        bits.push((header, None, "", Part::Scaffold, 0.0));
        bits.push((content, message, role, Part::Content, 1.0));
        bits.push(match role {
            "assistant" => ("<e>", message, role, Part::Stop, 1.0),
            _ => ("<e>", None, "", Part::Scaffold, 0.0),
        });
        bits.push(("\n", None, "", Part::Scaffold, 0.0));
        prompt_len = (role == "assistant").then_some(len + header.len());
        len += header.len() + content.len() + "<e>\n".len();
    }
    rendered(Kind::Sft, &bits, prompt_len)
}

pub(crate) fn rules() -> Rules {
    Rules {
        max_len: 1000,
        too_long: TooLong::Drop,
        policy: Policy::default(),
        bos: None,
        n_embeddings: None,
    }
}

/// The tokens of a row: a trained one as its text (and its weight where that is not 1), a run of others as `·`. Line ends are `⏎`.
pub(crate) fn picture(rendered: &Rendered, row: &Row) -> String {
    let mut out = String::new();
    for (bytes, weight) in row.offsets.iter().zip(&row.weights) {
        if *weight == 0.0 {
            if !out.ends_with('·') {
                out.push('·');
            }
            continue;
        }
        let text = rendered.text[bytes.clone()].replace('\n', "⏎");
        out.push_str(&text);
        if *weight != 1.0 {
            out.push_str(&format!("({weight})"));
        }
    }
    out
}

/// What becomes of a row, as text; pieces of it with ` | ` between them.
pub(crate) fn outcome(vocab: &Vocab, row: &Rendered, rules: &Rules) -> String {
    match tokenize(vocab, row, rules) {
        Ok(Taken { rows, refused }) => {
            let pictures: Vec<String> = rows.iter().map(|piece| picture(row, piece)).collect();
            let refused = refused.iter().map(|r| format!("refused: {}", r.reason));
            pictures.into_iter().chain(refused).collect::<Vec<_>>().join(" | ")
        }
        Err(Refusal { reason, .. }) => format!("refused: {reason}"),
    }
}

/// The ranges that the template wrote.
pub(crate) fn written(row: &Rendered) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    for span in row.spans.iter().filter(|s| !s.part.is_said()) {
        let (start, end) = (span.start as usize, span.end as usize);
        match ranges.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => ranges.push(start..end),
        }
    }
    ranges
}
