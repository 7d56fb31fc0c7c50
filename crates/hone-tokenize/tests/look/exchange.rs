//! `export` and `import`: labels to other trainers and back.

use std::path::Path;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Int64Array, ListArray, RecordBatch};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Int32Type, Schema};
use hone_schema::{ArtefactKind, Pack};
use hone_store::{ForeignTable, Sealed, output};
use serde_json::{Value, json};

use crate::support::{Place, chat, check};

fn place(weight: f32) -> Place {
    let rows: Vec<_> =
        (0..12).map(|n| chat(&format!("r{n}"), &"q".repeat(n + 1), "yo", weight)).collect();
    let place = Place::new(&rows);
    check(&place.tokenize(&[]), 0, &[]);
    place
}

/// A list column of the first batch of a table.
fn column(path: &Path, name: &str) -> Vec<Vec<i32>> {
    let batch = ForeignTable::open(path).unwrap().next().unwrap().unwrap();
    let list = batch.column_by_name(name).unwrap().as_list::<i32>().clone();
    assert_eq!(list.data_type().to_string(), "List(Int32)", "{name}");
    list.iter().map(|row| row.unwrap().as_primitive::<Int32Type>().values().to_vec()).collect()
}

/// What training sees of packs: the ids, weights and documents, whatever they are called.
fn seen(packs: &[Pack], is_sorted: bool) -> Vec<(Vec<u32>, Vec<f32>)> {
    let mut docs = Vec::new();
    for pack in packs {
        let mut at = 0;
        for doc in &pack.docs {
            let range = at..at + doc.len as usize;
            at = range.end;
            docs.push((pack.input_ids[range.clone()].to_vec(), pack.loss_weight[range].to_vec()));
        }
    }
    if is_sorted {
        docs.sort_by(|a, b| a.0.cmp(&b.0));
    }
    docs
}

#[test]
fn a_pack_is_a_row_of_labels_and_documents() {
    let place = place(1.0);
    check(
        &place.tokenize(&["export", "--to", "x.parquet", "--attention-mask"]),
        0,
        &["12 documents"; 0],
    );
    let packs = place.packs("runs/p/tokenize");
    let read = |name: &str| column(&place.path("x.parquet"), name);
    let (ids, labels) = (read("input_ids"), read("labels"));
    let (positions, lengths, mask) =
        (read("position_ids"), read("seq_lengths"), read("attention_mask"));
    assert_eq!(ids.len(), packs.len());
    for (n, pack) in packs.iter().enumerate() {
        let mut at = 0;
        assert_eq!(lengths[n], pack.docs.iter().map(|d| d.len as i32).collect::<Vec<_>>());
        for (nr, doc) in pack.docs.iter().enumerate() {
            for token in at..at + doc.len as usize {
                let id = pack.input_ids[token] as i32;
                let trained = pack.loss_weight[token] > 0.0;
                assert_eq!(ids[n][token], id);
                assert_eq!(labels[n][token], if trained { id } else { -100 });
                assert_eq!(positions[n][token], (token - at) as i32);
                assert_eq!(mask[n][token], nr as i32 + 1);
            }
            at += doc.len as usize;
        }
    }
    check(&place.tokenize(&["export", "--to", "r.parquet", "--rows"]), 0, &["12 rows"]);
    assert_eq!(column(&place.path("r.parquet"), "seq_lengths").len(), 12);
    let none = place.tokenize(&["export", "--to", "t.parquet", "--split", "test"]);
    check(&none, 3, &["has no row of split test"]);
}

#[test]
fn what_is_exported_comes_back() {
    let place = place(1.0);
    check(&place.tokenize(&["export", "--to", "x.parquet", "--ids"]), 0, &[]);
    let before = place.packs("runs/p/tokenize");
    let report = place.says(&["import", "x.parquet", "--out", "back", "--json"]);
    let back = place.packs("back");
    let plain = |packs: &[Pack]| -> Vec<_> {
        let pack = |p: &Pack| {
            (
                p.input_ids.clone(),
                p.loss_weight.clone(),
                p.docs
                    .iter()
                    .map(|d| (d.len, d.row_id.clone(), d.source.clone(), d.kind))
                    .collect::<Vec<_>>(),
            )
        };
        packs.iter().map(pack).collect()
    };
    assert_eq!(plain(&before), plain(&back), "packs, documents and names are as they were");
    let report: Value = serde_json::from_str(&report).unwrap();
    assert!(report["report"]["certificate"].as_str().unwrap().starts_with("none"), "{report}");
    assert_eq!(report["report"]["stop_ids"], json!([3]));
    // A table does not say which rows are replay; whoever imports it does.
    assert_eq!(report["ledger"]["sources"]["s"]["replay"], Value::Null);
    let args = ["import", "x.parquet", "--out", "mixed", "--json", "--replay", "s"];
    let report: Value = serde_json::from_str(&place.says(&args)).unwrap();
    assert_eq!(report["ledger"]["sources"]["s"]["replay"], true);
    let other = place.tokenize(&["import", "x.parquet", "--out", "no", "--replay", "r"]);
    check(
        &other,
        2,
        &["`--replay r`: no row is of a source of that name", "rows are there of `s`"],
    );
    assert!(!place.path("no").exists(), "nothing half-written");
    // Rows of one document each, packed anew.
    check(&place.tokenize(&["export", "--to", "r.parquet", "--rows"]), 0, &[]);
    check(&place.tokenize(&["import", "r.parquet", "--out", "anew", "--unpack"]), 0, &["12 rows"]);
    let anew = place.packs("anew");
    assert_eq!(seen(&before, true), seen(&anew, true));
    assert!(anew.len() <= before.len());
    let sealed = Sealed::open(&place.path("anew"), ArtefactKind::Packs).unwrap();
    for file in ["prompts.parquet", "rejects.parquet", "stops.json", "tokenizer.json"] {
        assert!(sealed.has(file), "{file}");
    }
    assert_eq!(place.run(&["diff", "runs/p/tokenize", "back"]).status.code(), Some(0));
    let said = place.says(&["explain", "0:1", "--out", "anew"]);
    assert!(said.contains("not known: the labels were imported"), "{said}");
}

#[test]
fn weights_that_labels_cannot_say_are_a_decision() {
    let place = place(0.5);
    let refused = place.tokenize(&["export", "--to", "x.parquet"]);
    check(&refused, 3, &["labels cannot say the weights of ", "hint: `--weights drop`"]);
    assert!(!place.path("x.parquet").exists(), "nothing half-written");
    let dropped = place.tokenize(&["export", "--to", "x.parquet", "--weights", "drop"]);
    check(&dropped, 0, &["warning: 36 tokens have a weight other than 0 and 1"]);
    check(&place.tokenize(&["export", "--to", "w.parquet", "--weights", "column"]), 0, &[]);
    check(&place.tokenize(&["import", "w.parquet", "--out", "back"]), 0, &[]);
    assert_eq!(seen(&place.packs("runs/p/tokenize"), false), seen(&place.packs("back"), false));
}

/// A table with `input_ids` and `labels` of 64 bits, as the ecosystem's libraries write them.
fn table(path: &Path, rows: &[(&[i64], &[i64])]) {
    let list = |values: Vec<&[i64]>| -> ArrayRef {
        let offsets = OffsetBuffer::from_lengths(values.iter().map(|v| v.len()));
        let field = Arc::new(Field::new("item", DataType::Int64, true));
        Arc::new(ListArray::new(field, offsets, Arc::new(Int64Array::from(values.concat())), None))
    };
    let columns = vec![
        list(rows.iter().map(|row| row.0).collect()),
        list(rows.iter().map(|row| row.1).collect()),
    ];
    let field = |n: usize, name: &str| Field::new(name, columns[n].data_type().clone(), false);
    let schema = Arc::new(Schema::new(vec![field(0, "input_ids"), field(1, "labels")]));
    let mut file = output::Table::create(path, schema.clone()).unwrap();
    file.write(&RecordBatch::try_new(schema, columns).unwrap()).unwrap();
    file.finish().unwrap();
}

#[test]
fn a_stop_is_what_ends_the_last_trained_tokens() {
    let place = place(1.0);
    // Of the added tokens 0 to 3, one is a marker in text as `<think>` is: not special.
    let path = place.path("base/tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!((&tokenizer["added_tokens"][1]["id"]), &json!(1));
    tokenizer["added_tokens"][1]["special"] = json!(false);
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    let stops = |eos: Value, ids: &[i64], labels: &[i64]| {
        let generation = json!({"eos_token_id": eos}).to_string();
        std::fs::write(place.path("base/generation_config.json"), generation).unwrap();
        table(&place.path("t.parquet"), &[(ids, labels)]);
        check(&place.tokenize(&["import", "t.parquet", "--out", "t", "--force"]), 0, &[]);
        let sealed = Sealed::open(&place.path("t"), ArtefactKind::Packs).unwrap();
        let stops: Value = serde_json::from_slice(&sealed.read("stops.json").unwrap()).unwrap();
        stops["stop_ids"].clone()
    };
    // A thought that is masked after its marker, whether the tokenizer calls that special or not.
    for marker in [1, 2] {
        let (ids, labels) =
            ([0, 9, marker, 20, 21, 30, 3], [-100, -100, marker, -100, -100, 30, 3]);
        assert_eq!(stops(Value::Null, &ids, &labels), json!([3]), "marker {marker}");
        // Nothing of the answer is trained: a marker in text is no stop.
        let cut = stops(json!(0), &ids[..5], &labels[..5]);
        assert_eq!(cut, if marker == 1 { json!([0]) } else { json!([0, 2]) });
    }
    // Where the answer ends in text, the model's own word is left, special or not.
    let (ids, labels) = ([0, 9, 20, 21, 3, 10], [-100, -100, -100, 21, 3, 10]);
    assert_eq!(stops(json!([1, 0]), &ids, &labels), json!([0, 1]));
}

#[test]
fn rows_of_other_tools_are_checked() {
    let place = place(1.0);
    let import = |rows: &[(&[i64], &[i64])], more: &[&str]| {
        table(&place.path("t.parquet"), rows);
        place.tokenize(&[&["import", "t.parquet", "--out", "t", "--force"], more].concat())
    };
    let good: (&[i64], &[i64]) = (&[0, 10, 11, 3], &[-100, -100, 11, 3]);
    check(&import(&[good], &[]), 0, &["1 rows (0 refused), 4 tokens, 2 trained"]);
    let text: (&[i64], &[i64]) = (&[0, 10], &[0, 10]);
    check(&import(&[good, text], &[]), 0, &["1 documents have a label on their first token"]);
    let long = vec![9; 65];
    let bad: [(&[i64], &[i64]); 3] =
        [(&[1, 2], &[-100, -100]), (&[1, 99_999], &[-100, 99_999]), (&long, &long)];
    check(&import(&[&[good][..], &bad].concat(), &[]), 0, &["1 rows (3 refused)"]);
    let rejects = Sealed::open(&place.path("t"), ArtefactKind::Packs).unwrap();
    let ledger = &rejects.manifest().ledger.rejected();
    assert_eq!(ledger.len(), 3, "{ledger:?}");
    check(&import(&bad, &[]), 3, &["no row of it can be trained"]);
    let error = ["--set", "tokenize.too_long=error"];
    check(&import(&[(&long, &long)], &error), 3, &["row 0: 65 tokens, a pack holds 64"]);
    let shifted: (&[i64], &[i64]) = (&[1, 2, 3], &[2, 3, -100]);
    check(
        &import(&[good, shifted], &[]),
        3,
        &["t.parquet, row 1: token 0 has the id 1 and the label 2", "not shifted"],
    );
    let cut = ["--set", "tokenize.too_long=split"];
    check(&import(&[good], &cut), 2, &["are not cut"]);
    std::fs::write(place.path("n.parquet"), "PAR1 no").unwrap();
    check(&place.tokenize(&["import", "n.parquet", "--out", "n"]), 3, &["n.parquet"]);
    check(&place.tokenize(&["import", "none.parquet", "--out", "n"]), 3, &["none.parquet"]);
    check(
        &place.tokenize(&["import", "runs/p/template/rendered.parquet", "--out", "n"]),
        3,
        &["no column `input_ids`"],
    );
}
