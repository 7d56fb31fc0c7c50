//! The program as a user meets it: exit codes, files, and what it says.

use std::path::Path;
use std::process::{Command, Output};

use hone_corpus::World;
use hone_corpus::documents::{Stream, document};
use hone_corpus::files::small_files;

fn run(dir: &Path, flags: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_hone-corpus"))
        .args(flags)
        .current_dir(dir)
        .output()
        .expect("the program was built with this test")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn writes_every_file_once_and_is_fresh_after_that() {
    let dir = tempfile::tempdir().expect("a place for temporary files");
    let first = run(dir.path(), &["--documents", "2500", "--out", "corpus"]);
    assert_eq!(first.status.code(), Some(0), "{}", said(&first));
    let read = |name: &str| std::fs::read(dir.path().join("corpus").join(name)).expect(name);
    let world = World::load().expect("the compiled-in tables parse");
    let files = small_files(&world, 1);
    for file in &files {
        assert!(read(file.name) == file.bytes, "{}", file.name);
    }
    let plain = String::from_utf8(read("plain.jsonl")).expect("ASCII");
    assert_eq!(plain.lines().count(), 2500);
    for (idx, line) in plain.lines().enumerate().step_by(499) {
        let row: serde_json::Value = serde_json::from_str(line).expect("one JSON value a line");
        let text = document(&world, 1, Stream::Plain, idx as u64).text;
        assert_eq!(row, serde_json::json!({ "text": text }));
    }
    let names = std::fs::read_dir(dir.path().join("corpus")).expect("just written").count();
    assert_eq!(names, files.len() + 2, "the small files, plain.jsonl and manifest.json");

    let second = run(dir.path(), &["--documents", "2500", "--out", "corpus"]);
    assert_eq!(second.status.code(), Some(0));
    assert!(said(&second).contains("fresh"), "{}", said(&second));
}

#[test]
fn wrong_flags_are_refused_and_nothing_is_written() {
    let dir = tempfile::tempdir().expect("a place for temporary files");
    let check = |flags: &[&str], words: &str| {
        let output = run(dir.path(), flags);
        assert_eq!(output.status.code(), Some(2), "{}", said(&output));
        assert!(said(&output).contains(words), "{}", said(&output));
    };
    check(&["--documents", "0"], "`--documents 0` is not from 1 to 9600000");
    check(&["--documents", "many"], "invalid value");
    check(&["--set", "corpus.seed=2"], "reads no pipeline file");
    check(&["--pipeline", "x.toml"], "reads no pipeline file");
    assert_eq!(std::fs::read_dir(dir.path()).expect("the directory is ours").count(), 0);
}
