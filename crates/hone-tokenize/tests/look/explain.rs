//! `explain`: the answer to why a token is trained, or not.

use hone_schema::Part;
use serde_json::Value;

use crate::support::{Place, chat, check};

/// The facts of a token of row `id`.
fn facts(place: &Place, id: &str, token: &str, more: &[&str]) -> Value {
    let said = place.says(&[&["explain", "--id", id, "--token", token, "--json"], more].concat());
    serde_json::from_str(&said).unwrap()
}

#[test]
fn a_token_has_its_row_its_part_and_its_rule() {
    let place = Place::new(&[chat("a", "hi", "yo", 0.5), chat("off", "hi", "yo", 0.0)]);
    let check = |id: &str, token: &str, more: &[&str], rule: &str| {
        let facts = facts(&place, id, token, more);
        assert_eq!(facts["rule"], rule, "{facts}");
    };
    check("a", "0", &[], "not trained: the first token of a row is predicted by nothing");
    check("a", "1", &[], "not trained: text of the template, message 0 (user)");
    let policy = "not trained: the policy does not take the content of message 0 (user)";
    check("a", "2", &[], policy);
    let every = ["--set", "tokenize.train_on=\"every\""];
    check("a", "2", &every, "trained: content of message 0 (user), weight 1");
    check("a", "6", &[], "trained: content of message 1 (assistant), weight 0.5");
    check("a", "8", &[], "trained: it ends message 1 (assistant), weight 0.5");
    check("off", "6", &[], "not trained: the row gives message 1 (assistant) the weight 0");
    let facts = facts(&place, "off", "6", &[]);
    assert_eq!(facts["message"], "1, role assistant, part content");
    assert_eq!(facts["around"], "<|bos|><|user|>hi<|end|><|assistant|>⟦y⟧o<|end|>");
    assert_eq!(
        facts["refused"],
        "the row is not taken: no trained token: 9 tokens, none of them trained"
    );
}

#[test]
fn a_straddling_token_says_what_it_holds() {
    // ` x` is one token of the vocabulary, and the border between two messages lies in it.
    let bits = [
        ("<|bos|>", None, "", Part::Scaffold, 0.0),
        ("a ", Some(0), "user", Part::Content, 1.0),
        ("x x", Some(1), "assistant", Part::Content, 1.0),
        ("<|end|>", Some(1), "assistant", Part::Stop, 1.0),
    ];
    let place = Place::new(&[crate::support::row("r", hone_schema::Split::Train, &bits)]);
    let tokens = place.says(&["show", "--id", "r", "--tokens"]);
    let n = tokens.lines().find(|line| line.contains("straddles")).expect("one straddles");
    let n = n.split_whitespace().next().unwrap();
    let facts = facts(&place, "r", n, &[]);
    assert_eq!(facts["straddles"], "\" \" of user content and \"x\" of assistant content");
    assert!(facts["rule"].as_str().unwrap().contains("straddles trained bytes"), "{facts}");
}

#[test]
fn a_token_of_a_pack_is_found_in_its_row() {
    let rows = [chat("a", "hi", "yo", 1.0), chat("long", "q", &"x ".repeat(60), 1.0)];
    let place = Place::new(&rows);
    place.pipeline("max_len = 16\ntoo_long = \"split\"");
    check(&place.tokenize(&[]), 0, &[]);
    let packs = place.packs("runs/p/tokenize");
    let mut n_pieces = 0;
    for (n, pack) in packs.iter().enumerate() {
        let mut at = 0;
        for doc in &pack.docs {
            let said = place.says(&["explain", &format!("{n}:{at}"), "--json"]);
            let facts: Value = serde_json::from_str(&said).unwrap();
            assert_eq!(facts["row"], doc.row_id.as_str());
            assert_eq!(facts["id"], pack.input_ids[at]);
            let row_token = format!("{} of ", doc.offset);
            assert!(facts["token"].as_str().unwrap().starts_with(&row_token), "{facts}");
            n_pieces += usize::from(doc.offset > 0);
            assert_eq!(facts["packed"].is_string(), doc.offset > 0, "{facts}");
            at += doc.len as usize;
        }
    }
    assert!(n_pieces > 1, "the long row is in pieces");
    check(&place.tokenize(&["explain", "0:9999"]), 3, &["pack 0 has ", "counted from 0"]);
    check(&place.tokenize(&["explain", "x"]), 2, &["as in `3:217`"]);
    let many = ["explain", "--id", "a", "--token", "99"];
    check(&place.tokenize(&many), 3, &["row `a` has 9 tokens, counted from 0"]);
    // Under other rules the row makes other weights, and the program does not guess.
    let other = place.says(&["explain", "0:3", "--set", "tokenize.train_on=[\"user\"]"]);
    assert!(other.contains("not known: with today's configuration"), "{other}");
}
