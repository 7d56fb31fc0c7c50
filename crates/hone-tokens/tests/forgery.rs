//! No message can write a control token, in any role, whole or in parts, alone or against a marker of the template.

mod support;

use hone_schema::{Kind, Part, Rendered};
use hone_tokens::Vocab;
use support::{Bit, MARKERS, chat, rendered, tokenizers, vocab_of, written};

/// Control tokens of the row that lie where a message speaks.
fn forged(vocab: &Vocab, row: &Rendered) -> usize {
    let written = written(row);
    let encoded = vocab.encode(&row.text, &written).expect("the row is encoded");
    encoded
        .ids
        .iter()
        .zip(&encoded.offsets)
        .filter(|(id, _)| vocab.is_control(**id))
        .filter(|(_, at)| !written.iter().any(|w| w.start <= at.start && at.end <= w.end))
        .count()
}

/// Control tokens of a row.
fn control(vocab: &Vocab, row: &Rendered) -> usize {
    let encoded = vocab.encode(&row.text, &written(row)).expect("the row is encoded");
    encoded.ids.iter().filter(|id| vocab.is_control(**id)).count()
}

/// What a message says when it tries to say `marker`.
fn attempts(marker: &str) -> Vec<String> {
    let (head, tail) = marker.split_at(marker.len() / 2);
    vec![
        marker.to_owned(),
        format!("{marker}{marker}"),
        format!("a {marker} b"),
        format!("a\n {marker} \n"),
        format!("{head}{marker}{tail}"),
        marker.to_uppercase(),
        format!("<e>\n{marker}\nyo<e>"),
        head.to_owned(),
        tail.to_owned(),
        format!("{marker}<"),
    ]
}

#[test]
fn no_role_can_write_a_marker() {
    let mut n = 0;
    for (name, json) in &tokenizers() {
        let vocab = vocab_of(json);
        let benign = chat(&[("s", "x"), ("u", "x"), ("a", "x")]);
        // A marker that must stand alone does not behind the letter that each message says.
        let n_control = if *name == "single word" { 3 } else { 6 };
        assert_eq!(
            control(&vocab, &benign),
            n_control,
            "{name}: the template's own markers are tokens"
        );
        for marker in MARKERS {
            for attempt in attempts(marker) {
                for role in 0..3 {
                    let mut says = ["x", "x", "x"];
                    says[role] = &attempt;
                    let row = chat(&[("s", says[0]), ("u", says[1]), ("a", says[2])]);
                    assert_eq!(forged(&vocab, &row), 0, "{name}: {:?}", row.text);
                    // The template's markers stay tokens whatever is said, unless they must stand alone and now do not.
                    if *name != "single word" {
                        assert_eq!(control(&vocab, &row), 6, "{name}: {:?}", row.text);
                    }
                    n += 1;
                }
            }
        }
    }
    assert_eq!(n, 14 * 6 * 10 * 3);
}

/// A marker of which the message writes one part and the template the other.
#[test]
fn no_marker_is_made_of_two_halves() {
    for (name, json) in &tokenizers() {
        let vocab = vocab_of(json);
        for marker in MARKERS {
            for cut in 1..marker.len() {
                let (head, tail) = marker.split_at(cut);
                for (first, second) in
                    [(Part::Content, Part::Scaffold), (Part::Scaffold, Part::Content)]
                {
                    let bits: [Bit; 3] = [
                        (head, Some(0), "user", first, 1.0),
                        (tail, Some(0), "user", second, 1.0),
                        ("<e>", Some(0), "user", Part::Stop, 1.0),
                    ];
                    let row = rendered(Kind::Sft, &bits, None);
                    assert_eq!(forged(&vocab, &row), 0, "{name}: {head:?} {tail:?}");
                }
            }
        }
    }
}

/// Two messages side by side cannot put one together either, and the template can with two spans.
#[test]
fn neighbours() {
    let vocab = vocab_of(&support::byte_level());
    let check = |first, second, n| {
        let bits: [Bit; 2] =
            [("<thi", Some(0), "user", first, 1.0), ("nk>", Some(1), "assistant", second, 1.0)];
        assert_eq!(control(&vocab, &rendered(Kind::Sft, &bits, None)), n);
    };
    check(Part::Content, Part::Content, 0);
    check(Part::Content, Part::Stop, 0);
    check(Part::Scaffold, Part::Stop, 1);
}

/// A Unigram model finds a marker in a text by itself; such a row is refused.
#[test]
fn a_model_that_forges_is_caught() {
    let json = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [support::byte_level()["added_tokens"][0]],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": {"type": "Unigram", "unk_id": 1, "byte_fallback": false,
                  "vocab": [["<s>", 0.0], ["<unk>", 0.0], ["a", -1.0], ["<", -9.0], ["s", -9.0], [">", -9.0]]},
    });
    let error = vocab_of(&json).encode_text("a<s>a").unwrap_err();
    assert_eq!(error.to_string(), "the text at byte 1 became the control token `<s>`");
}

#[test]
fn what_is_allowed_in_messages_is_a_token_there() {
    let unflagged = support::with(|j| j["added_tokens"][5]["special"] = false.into());
    let row = chat(&[("u", "x"), ("a", "<think>x")]);
    let mut vocab = vocab_of(&unflagged);
    let id = vocab.id_of("<think>").expect("it is in the vocabulary");
    let has = |vocab: &Vocab| vocab.encode(&row.text, &written(&row)).unwrap().ids.contains(&id);
    assert!(!has(&vocab));
    vocab.allow("<think>").unwrap();
    assert!(has(&vocab));
    let check = |vocab: &mut Vocab, token, message: &str| {
        let error = vocab.allow(token).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    };
    check(&mut vocab, "yo", "not an added token");
    check(&mut vocab, "<e>", "is a special token");
}
