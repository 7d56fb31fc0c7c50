//! `diff`: what is not the same in two outputs, and why.

use serde_json::{Value, json};

use crate::support::{Place, chat, check, text};

/// A place with an output `a`, and another, `b`, with those flags.
fn place(flags: &[&str]) -> Place {
    let rows = [
        chat("one", "hi", "yo", 1.0),
        chat("two", "hi", "yo", 0.5),
        chat("long", "q", &"ab".repeat(20), 1.0),
    ];
    let place = Place::new(&rows);
    check(&place.tokenize(&["--out", "a"]), 0, &[]);
    check(&place.tokenize(&[&["--out", "b"], flags].concat()), 0, &[]);
    place
}

/// What is said of `a` and `b`, and with which exit code.
fn found(place: &Place) -> (Option<i32>, Value) {
    let output = place.run(&["diff", "a", "b", "--json"]);
    (output.status.code(), serde_json::from_slice(&output.stdout).unwrap())
}

#[test]
fn the_same_work_is_the_same_however_it_is_packed() {
    let (exit, found) = found(&place(&["--set", "tokenize.packing=\"none\""]));
    assert_eq!((exit, &found["equal"], &found["same"]), (Some(0), &json!(true), &json!(3)));
    assert_eq!(found["why"], json!(["from A to B: `packing` was \"best-fit\" and is \"none\""]));
}

#[test]
fn other_labels_are_counted_and_shown() {
    let place = place(&["--set", "tokenize.train_on=\"every\""]);
    let (exit, found) = found(&place);
    assert_eq!(exit, Some(1));
    let rows = json!({"only_a": 0, "only_b": 0, "other_ids": 0, "other_labels": 3});
    assert_eq!(found["rows"], rows);
    // The questions' five bytes, and the stop token behind each.
    let labels = json!({"trained_in_a_alone": 0, "trained_in_b_alone": 8, "reweighted": 0, "of_these_stop_tokens": 3});
    assert_eq!(found["labels"], labels);
    let said = text(&place.run(&["diff", "a", "b", "--limit", "1"]).stdout);
    assert!(said.contains("from A to B: `train_on` was \"all\" and is \"every\"\n"), "{said}");
    let line = "  train s long  2 tokens weigh otherwise, the first is token 2, \"q\" (84): 0 in A, 1 in B\n";
    assert!(said.contains(line), "{said}");
    assert!(!said.contains("train s one"), "one row of a kind is shown: {said}");
}

#[test]
fn rows_that_one_refuses_have_its_reason() {
    let place = place(&["--set", "tokenize.max_len=16"]);
    let (exit, found) = found(&place);
    assert_eq!(exit, Some(1));
    assert_eq!(found["rows"]["only_a"], 1);
    assert_eq!(found["refused_in_b"], json!({"too long": 1}));
    assert_eq!(found["examples"][0]["id"], "long");
    let said = text(&place.run(&["diff", "b", "a"]).stdout);
    assert!(said.contains("1 rows only in B\n  1 of them A refuses: too long\n"), "{said}");
}

#[test]
fn a_row_in_pieces_or_cut_has_other_tokens() {
    let split = place(&["--set", "tokenize.max_len=16", "--set", "tokenize.too_long=\"split\""]);
    let (_, found_split) = found(&split);
    assert_eq!(found_split["rows"]["other_ids"], 1);
    let cut = ["--set", "tokenize.max_len=16", "--set", "tokenize.too_long={truncate=\"head\"}"];
    let (_, found_cut) = found(&place(&cut));
    let what = found_cut["examples"][0]["what"].as_str().unwrap();
    assert!(what.ends_with(" tokens are in A alone"), "{found_cut}");
    check(&split.run(&["diff", "a", "nowhere"]), 3, &["nowhere"]);
    check(&split.run(&["diff", "a", "runs/p/template"]), 3, &["rendered"]);
}
