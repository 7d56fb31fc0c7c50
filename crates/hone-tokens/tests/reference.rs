//! Ids are those of the tokenizers library wherever the template alone writes control tokens.

mod support;

use std::ops::Range;

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
