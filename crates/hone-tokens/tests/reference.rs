//! Ids are those of the tokenizers library wherever the template alone writes control tokens.

mod support;

use std::ops::Range;

use hone_tokens::Vocab;
use proptest::prelude::*;
use serde_json::Value;
use support::{MARKERS, tokenizers, vocab_of};
use tokenizers::Tokenizer;

/// The library's ids and byte offsets.
fn reference(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    let encoding = tokenizer.encode(text, false).expect("the reference encodes");
    encoding.get_ids().to_vec()
}

fn check(name: &str, json: &Value, text: &str) {
    let tokenizer = Tokenizer::from_bytes(json.to_string()).expect("the test's tokenizer is one");
    let all = 0..text.len();
    let ours = vocab_of(json).encode(text, std::slice::from_ref(&all)).expect("we encode");
    assert_eq!(ours.ids, reference(&tokenizer, text), "{name}: {text:?}");
    let bounded = |bytes: &Range<usize>| text.get(bytes.clone()).is_some();
    assert!(ours.offsets.iter().all(bounded), "{name}: offsets lie in {text:?}");
    assert!(
        ours.offsets.windows(2).all(|w| w[0].start <= w[1].start && w[0].end <= w[1].end),
        "{name}: offsets of {text:?} are in order: {:?}",
        ours.offsets
    );
}

#[test]
fn texts_that_are_all_template() {
    let texts = [
        "",
        " ",
        "yo",
        " yo",
        "<s>",
        "<s>yo <e>",
        "<u>\nhello there<e>\n<a>\nyo<e>\n",
        "a <u> b<e>c   <a>   d",
        "word<u>word <u> <u>",
        "<<s>s><s><e><e>",
        "Hello THERE <U> é e\u{301} 日本 🐈",
        "  two  four    yo",
    ];
    let all = tokenizers();
    assert_eq!(all.len(), 14, "a tokenizer was added or lost");
    for (name, json) in &all {
        texts.iter().for_each(|text| check(name, json, text));
    }
}

fn text() -> impl Strategy<Value = String> {
    let word = prop_oneof![
        3 => "[a-z]{1,4}",
        2 => "[ \n\t]{1,3}",
        2 => prop::sample::select(MARKERS.to_vec()).prop_map(str::to_owned),
        1 => "[A-Z0-9'.,<>|]{1,3}",
        1 => prop::sample::select(vec!["é", "e\u{301}", "日", "🐈", "yo", "hello", "▁", "\u{a0}"])
            .prop_map(str::to_owned),
    ];
    prop::collection::vec(word, 0..24).prop_map(|words| words.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn any_text_that_is_all_template(text in text()) {
        for (name, json) in &tokenizers() {
            check(name, json, &text);
        }
    }
}

/// A real tokenizer, where there is one.
fn qwen3() -> Option<Vec<u8>> {
    let Some(corpus) = std::env::var_os("HONE_CORPUS") else {
        println!("skipped: HONE_CORPUS is not set, so there is no real tokenizer to compare with");
        return None;
    };
    let path = std::path::Path::new(&corpus).join("tokenizers/qwen3/tokenizer.json");
    Some(std::fs::read(path).expect("the corpus has qwen3's tokenizer"))
}

/// Chats of `tests/golden` that hold text spelling a control token: there transformers itself would forge one.
const FORGING: [&str; 2] = ["control_markers", "markup"];

#[test]
fn ids_are_those_of_transformers_on_a_real_tokenizer() {
    let Some(json) = qwen3() else { return };
    let vocab = Vocab::from_json(&json).unwrap();
    let golden = include_str!("../../../tests/golden/tokens.json");
    let golden: Value = serde_json::from_str(golden).unwrap();
    let chats = include_str!("../../../tests/golden/chats.json");
    let chats: Vec<Value> = serde_json::from_str(chats).unwrap();
    let mut n = 0;
    for render in golden["renders"].as_array().unwrap() {
        for form in ["whole", "prompt"] {
            for (chat, row) in chats.iter().zip(render[form].as_array().unwrap()) {
                if FORGING.contains(&chat["name"].as_str().unwrap()) {
                    continue;
                }
                let ids: Vec<u32> = serde_json::from_value(row["ids"].clone()).unwrap();
                let text = vocab.decode(&ids, false).unwrap();
                let written = outside(&text, &chat["messages"]);
                assert_eq!(vocab.encode(&text, &written).unwrap().ids, ids, "{}", chat["name"]);
                n += 1;
            }
        }
    }
    assert_eq!(n, 2 * 2 * 10, "a golden was added or lost");
}

/// The bytes of `text` that no message wrote. Messages are found in order, trimmed as the template trims them.
fn outside(text: &str, messages: &Value) -> Vec<Range<usize>> {
    let mut at = 0;
    let mut ranges = Vec::new();
    for message in messages.as_array().unwrap() {
        let content = message["content"].as_str().unwrap().trim();
        // Behind this message's marker: a word of it may stand in a header as well.
        let from = text[at..].find("<|im_start|>").map_or(at, |marker| at + marker + 12);
        let from = text[from..].find('\n').map_or(from, |line| from + line);
        if let Some(start) = text[from..].find(content).filter(|_| !content.is_empty()) {
            ranges.push(at..from + start);
            at = from + start + content.len();
        }
    }
    ranges.push(at..text.len());
    ranges
}
