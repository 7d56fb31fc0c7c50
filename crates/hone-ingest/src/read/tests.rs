//! Files of every form, good and bad, through the reader.

use std::fs;
use std::io::Write;

use super::*;

/// Rows as `line: text` (or `line: ! reason`), and the error that ended them.
fn read(name: &str, bytes: &[u8], options: &TableOptions) -> (Vec<String>, Option<String>) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join(name);
    fs::write(&path, bytes).expect("the file is written");
    let shown = |e: ReadError| e.to_string().replace(&format!("{}/", dir.path().display()), "");
    let rows = match open(&path, options) {
        Ok(rows) => rows,
        Err(e) => return (Vec::new(), Some(shown(e))),
    };
    let mut all = Vec::new();
    for row in rows {
        match row {
            Ok(RawRow { line, bytes, fault: None }) => {
                all.push(format!("{line}: {}", String::from_utf8_lossy(&bytes).trim()));
            }
            Ok(RawRow { line, fault: Some(fault), .. }) => {
                all.push(format!("{line}: ! {}", fault.reason.as_str()));
            }
            Err(e) => return (all, Some(shown(e))),
        }
    }
    (all, None)
}

fn check(name: &str, bytes: &[u8], expect: &[&str]) {
    let (rows, error) = read(name, bytes, &TableOptions::default());
    assert_eq!((rows, error), (expect.iter().map(|s| (*s).to_owned()).collect(), None), "{name}");
}

fn refused(name: &str, bytes: &[u8], text: &str) {
    let (_, error) = read(name, bytes, &TableOptions::default());
    let error = error.unwrap_or_default();
    assert!(error.contains(text), "{name}: {error:?}");
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    out.write_all(bytes).expect("memory takes bytes");
    out.finish().expect("memory takes bytes")
}

fn zst(bytes: &[u8]) -> Vec<u8> {
    zstd::stream::encode_all(bytes, 3).expect("memory takes bytes")
}

#[test]
fn lines() {
    check(
        "a.jsonl",
        b"{\"a\":1}\n\n  \r\n{\"a\":2}\r\n{\"a\":3}",
        &["1: {\"a\":1}", "4: {\"a\":2}", "5: {\"a\":3}"],
    );
    check("a.jsonl", b"\xef\xbb\xbf{}\n", &["1: {}"]);
    check("rows", b"  {}\n", &["1: {}"]);
    check("a.jsonl", b"", &[]);
    check("a.jsonl", b"\n\n", &[]);
    check("a.jsonl", b"broken\n{}", &["1: broken", "2: {}"]);
    refused("a.jsonl", b"\xff\xfe{\0}\0", "UTF-16");
    refused("rows.txt", b"hello", "neither the name nor the content");
    refused("a.arrow", b"ARROW1\0\0", "an Arrow file, not Parquet");
}

#[test]
fn a_line_beyond_the_limit_is_one_reject() {
    let mut bytes = vec![b'x'; ROW_BYTES_MAX + 1];
    bytes.extend_from_slice(b"\n{}\n");
    check("a.jsonl", &bytes, &["1: ! line too long", "2: {}"]);
}

#[test]
fn arrays() {
    check(
        "a.json",
        b" [\n {\"a\":[1,2]},\n\n {\"b\":\"],{\\\"\"} ]\n",
        &["2: {\"a\":[1,2]}", "4: {\"b\":\"],{\\\"\"}"],
    );
    check("a.json", b"[]", &[]);
    check("a.json", b"[1,,2,]", &["1: 1", "1: ", "1: 2"]);
    check("a.jsonl", b"[{}]", &["1: {}"]);
    refused("a.json", b"[{},", "a.json:1: the file ends inside the array, in the row of line 1");
    refused(
        "a.json",
        b"[{}\n,{\"a\":\n",
        "a.json:3: the file ends inside the array, in the row of line 2",
    );
    refused("a.json", b"[{}]\n[{}]", "more text behind the end of the array");
}

#[test]
fn packed() {
    let rows = b"{\"a\":1}\n{\"a\":2}\n";
    let expect = ["1: {\"a\":1}", "2: {\"a\":2}"];
    check("a.jsonl.gz", &gzip(rows), &expect);
    check("a.jsonl.zst", &zst(rows), &expect);
    check("name-says-nothing", &zst(rows), &expect);
    let two = [gzip(b"{\"a\":1}\n"), gzip(b"{\"a\":2}\n")].concat();
    check("a.jsonl.gz", &two, &expect);
    let two = [zst(b"{\"a\":1}\n"), zst(b"{\"a\":2}\n")].concat();
    check("a.jsonl.zst", &two, &expect);
    check("a.csv.gz", &gzip(b"a\n1\n"), &["2: {\"a\":\"1\"}"]);
    refused("a.jsonl.gz", &gzip(&zst(rows)), "compressed twice");
    let long: Vec<u8> = (0..20_000u32)
        .flat_map(|n| format!("{{\"a\":{}}}\n", n.wrapping_mul(2_654_435_761)).into_bytes())
        .collect();
    for (name, bytes) in [("a.jsonl.gz", gzip(&long)), ("a.jsonl.zst", zst(&long))] {
        refused(name, &bytes[..bytes.len() / 2], name);
        let (rows, error) = read(name, &bytes[..bytes.len() / 2], &TableOptions::default());
        assert!(rows.len() > 1000 && error.is_some(), "{name}: {} rows, {error:?}", rows.len());
    }
    for (name, bytes) in [
        ("bomb.jsonl.gz", gzip(&vec![b' '; 64 << 20])),
        ("bomb.jsonl.zst", zst(&vec![b' '; 64 << 20])),
    ] {
        refused(name, &bytes, "times as many");
    }
}

#[test]
fn tables() {
    check(
        "a.csv",
        b"p,c\n\"a \"\"b\"\",\n\",x\n\n1,2\n",
        &["2: {\"p\":\"a \\\"b\\\",\\n\",\"c\":\"x\"}", "5: {\"p\":\"1\",\"c\":\"2\"}"],
    );
    check(
        "a.csv",
        b"p,c\n1\n1,2,3\n",
        &["2: ! wrong number of columns", "3: ! wrong number of columns"],
    );
    check("a.csv", b"p,c\n\xff,2\n", &["2: ! not utf-8"]);
    check(
        "a.csv",
        b"p\r\n\"a\r\nb\"\r\n\r\nc\r\nd",
        &["2: {\"p\":\"a\\r\\nb\"}", "5: {\"p\":\"c\"}", "6: {\"p\":\"d\"}"],
    );
    check("a.csv", b"p\na\nb", &["2: {\"p\":\"a\"}", "3: {\"p\":\"b\"}"]);
    check("a.csv", b"", &[]);
    check("a.tsv", b"p\tc\n\"a\tb\n", &["2: {\"p\":\"\\\"a\",\"c\":\"b\"}"]);
    check(
        "a.tsv",
        b"Is it?\\nYes\tno\tbecause\n",
        &["1: {\"inputs\":\"Is it?\\nYes\",\"targets\":\"no\",\"rationale\":\"because\"}"],
    );
    refused("a.csv", b"a,a\n1,2\n", "a.csv:1: the header names the column `a` twice");
    refused("a.csv", b"What is it?,That.\n", "does not look like a header");
    let named =
        TableOptions { columns: Some(vec!["p".into(), "c".into()]), ..TableOptions::default() };
    let (rows, _) = read("a.csv", b"What is it?,That.\n", &named);
    assert_eq!(rows, ["1: {\"p\":\"What is it?\",\"c\":\"That.\"}"]);
    let quoted = TableOptions { quoting: Some(true), ..TableOptions::default() };
    let (rows, _) = read("a.tsv", b"p\tc\n\"a\tb\"\tc\n", &quoted);
    assert_eq!(rows, ["2: {\"p\":\"a\\tb\",\"c\":\"c\"}"]);
}

#[test]
fn a_quotation_mark_that_is_never_closed_is_found_early() {
    let mut bytes = b"p,c\n\"a,b\n".to_vec();
    bytes.resize(ROW_BYTES_MAX + (1 << 20), b'x');
    refused("a.csv", &bytes, "is a quotation mark missing?");
}

#[test]
fn parquet_cells_become_json_without_invented_nulls() {
    use arrow::array::{
        ArrayRef, BinaryArray, Float64Array, Int64Array, ListArray, StringArray, StructArray,
    };
    use arrow::buffer::OffsetBuffer;
    use arrow::datatypes::{DataType, Field, Fields};
    use std::sync::Arc;

    let fields = Fields::from(vec![
        Field::new("role", DataType::Utf8, true),
        Field::new("content", DataType::Utf8, true),
        Field::new("name", DataType::Utf8, true),
    ]);
    let roles: ArrayRef = Arc::new(StringArray::from(vec!["user", "assistant"]));
    let contents: ArrayRef = Arc::new(StringArray::from(vec!["é\"", "b"]));
    let names: ArrayRef = Arc::new(StringArray::from(vec![None, Some("n")]));
    let structs = StructArray::new(fields.clone(), vec![roles, contents, names], None);
    let item = Arc::new(Field::new("item", DataType::Struct(fields), true));
    let messages =
        ListArray::new(item, OffsetBuffer::from_lengths([2, 0]), Arc::new(structs), None);
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("messages", Arc::new(messages)),
        ("n", Arc::new(Int64Array::from(vec![Some(1), None]))),
        ("x", Arc::new(Float64Array::from(vec![0.5, f64::NAN]))),
        ("bytes", Arc::new(BinaryArray::from(vec![b"text".as_ref(), &[0xff, 0xfe]]))),
    ];
    let batch = RecordBatchOf::try_from_iter(columns).expect("columns of one length");
    let mut bytes = Vec::new();
    let mut writer =
        ::parquet::arrow::ArrowWriter::try_new(&mut bytes, batch.schema(), None).expect("a writer");
    writer.write(&batch).expect("a batch of its schema");
    writer.close().expect("memory takes bytes");
    check(
        "any-name",
        &bytes,
        &[
            r#"1: {"messages":[{"role":"user","content":"é\""},{"role":"assistant","content":"b","name":"n"}],"n":1,"x":0.5,"bytes":"text"}"#,
            r#"2: {"messages":[],"x":null,"bytes":"<2 bytes>"}"#,
        ],
    );
    refused("cut.parquet", &bytes[..bytes.len() / 2], "cut.parquet");
    refused("a.parquet", b"hello", "no Parquet file");
}

use arrow::array::RecordBatch as RecordBatchOf;

#[test]
fn what_is_no_file() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let error =
        |path: &Path| open(path, &TableOptions::default()).err().expect("refused").to_string();
    assert!(error(&dir.path().join("none.jsonl")).contains("does not exist"));
    assert!(error(dir.path()).contains("directory"));
    assert!(error(Path::new("/dev/zero")).contains("a pipe or a device"));
    let pipe = dir.path().join("pipe.jsonl");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status();
    assert!(made.expect("mkfifo runs").success());
    assert!(error(&pipe).contains("a pipe or a device"), "and it does not wait for a writer");
}
