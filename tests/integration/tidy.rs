//! The invariants of `crates/README.md`, kept.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use hone_testkit::workspace;

/// Crates in `crates/`; a new one gets a row in `crates/README.md`.
const N_CRATES: usize = 18;

/// Programs that are stages, and so never depend on each other.
const STAGES: [&str; 8] = [
    "hone-ingest",
    "hone-template",
    "hone-tokenize",
    "hone-train",
    "hone-merge",
    "hone-eval",
    "hone-fetch",
    "hone-corpus",
];

/// Longest function, in lines.
const FUNCTION_LINES_MAX: usize = 70;

/// Longest file, in lines, up to its test module.
const FILE_LINES_MAX: usize = 500;

/// Files that are tables, or one trait: long and flat.
const LONG_FILES: [&str; 5] = [
    "crates/hone-schema/src/rows.rs",
    // The operators: one trait and its two implementations, a line or two each.
    "crates/hone-kernels/src/backend.rs",
    "crates/hone-kernels/src/cpu/mod.rs",
    // The table that backends are held to.
    "crates/hone-kernels/src/conformance/cases.rs",
    "crates/hone-kernels/src/reference/mod.rs",
];

fn crates() -> Vec<PathBuf> {
    let mut dirs: Vec<PathBuf> = fs::read_dir(workspace().join("crates"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("Cargo.toml").is_file())
        .collect();
    dirs.sort();
    assert_eq!(dirs.len(), N_CRATES, "a crate was added or lost");
    dirs
}

fn name(dir: &Path) -> String {
    dir.file_name().unwrap().to_string_lossy().into_owned()
}

/// Source files of a crate, without those that are tests.
fn sources(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut left = vec![dir.join("src")];
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let is_test = path.file_stem().unwrap().to_string_lossy().contains("test");
            if is_test {
                continue;
            } else if path.is_dir() {
                left.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }
    assert!(!found.is_empty(), "{} has no source", dir.display());
    found.sort();
    found
}

/// The code of a file up to its test module, without comments.
fn code(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap();
    text.lines()
        .take_while(|line| line.trim() != "#[cfg(test)]")
        .map(|line| {
            let comment = line.trim_start().starts_with("//");
            if comment { String::new() } else { line.to_owned() }
        })
        .collect()
}

fn each_source(check: impl Fn(&str, &str, &[String]) -> Vec<String>) {
    let root = workspace();
    let mut faults = Vec::new();
    let mut n_files = 0;
    for dir in crates() {
        for path in sources(&dir) {
            n_files += 1;
            let shown = path.strip_prefix(&root).unwrap().display().to_string();
            faults.extend(check(&name(&dir), &shown, &code(&path)));
        }
    }
    assert!(n_files > 100, "only {n_files} files were looked at");
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

fn lines_with(file: &str, code: &[String], word: &str) -> Vec<String> {
    // At the start of a word: `EventFile::create` is not `File::create`.
    let is_whole = |before: &str| !before.ends_with(|c: char| c.is_alphanumeric() || c == '_');
    let has = |line: &str| line.match_indices(word).any(|(at, _)| is_whole(&line[..at]));
    let hits = code.iter().enumerate().filter(|(_, line)| has(line));
    hits.map(|(idx, line)| format!("{file}:{}: {}", idx + 1, line.trim())).collect()
}

#[test]
fn files_are_the_stores_business_alone() {
    each_source(|krate, file, code| {
        // A mapping takes an open file; the testkit serves tests.
        if matches!(krate, "hone-store" | "hone-testkit") || file.ends_with("mapping.rs") {
            return Vec::new();
        }
        let ways = ["std::fs::", "fs::read", "fs::write", "File::open", "File::create"];
        ways.iter().flat_map(|way| lines_with(file, code, way)).collect()
    });
}

#[test]
fn unsafe_code_stands_with_the_kernels() {
    each_source(|krate, file, code| {
        let ways = ["unsafe {", "unsafe fn", "unsafe impl"];
        if matches!(krate, "hone-kernels" | "hone-sim") {
            return Vec::new();
        }
        ways.iter().flat_map(|way| lines_with(file, code, way)).collect()
    });
}

#[test]
fn nothing_is_left_unwritten() {
    each_source(|_, file, code| {
        let ways = ["todo!(", "unimplemented!(", "dbg!(", "#[ignore", "should_panic"];
        ways.iter().flat_map(|way| lines_with(file, code, way)).collect()
    });
}

#[test]
fn files_and_functions_are_short() {
    each_source(|_, file, code| {
        let mut faults = Vec::new();
        if code.len() > FILE_LINES_MAX && !LONG_FILES.contains(&file) {
            faults.push(format!("{file} has {} lines before its tests", code.len()));
        }
        // rustfmt puts the end of a function at the indent of its start.
        let mut start: Option<(usize, usize)> = None;
        for (idx, line) in code.iter().enumerate() {
            let text = line.trim_start();
            let indent = line.len() - text.len();
            let is_start = text.starts_with("fn ") || text.contains(" fn ") && !text.contains('"');
            if is_start && start.is_none() && !text.ends_with(';') {
                start = Some((idx, indent));
            } else if let Some((from, at)) = start
                && indent == at
                && (text == "}" || text.ends_with(';'))
            {
                if idx - from > FUNCTION_LINES_MAX {
                    faults.push(format!("{file}:{}: {} lines", from + 1, idx - from + 1));
                }
                start = None;
            }
        }
        faults
    });
}

/// Names of the crates of ours that a manifest depends on, tests apart.
fn dependencies(dir: &Path) -> BTreeSet<String> {
    let text = fs::read_to_string(dir.join("Cargo.toml")).unwrap();
    let mut inside = false;
    let mut found = BTreeSet::new();
    for line in text.lines() {
        if line.starts_with('[') {
            inside = line == "[dependencies]";
        } else if inside && line.starts_with("hone-") {
            let end = line.find(['.', ' ', '=']).unwrap_or(line.len());
            found.insert(line[..end].to_owned());
        }
    }
    found
}

#[test]
fn no_stage_depends_on_a_stage() {
    let mut n_stages = 0;
    for dir in crates() {
        if STAGES.contains(&name(&dir).as_str()) {
            n_stages += 1;
            let used = dependencies(&dir);
            let stages: Vec<&String> =
                used.iter().filter(|d| STAGES.contains(&d.as_str())).collect();
            assert!(stages.is_empty(), "{} uses {stages:?}", name(&dir));
        }
    }
    assert_eq!(n_stages, STAGES.len());
}

#[test]
fn the_map_names_every_crate() {
    let map = fs::read_to_string(workspace().join("crates/README.md")).unwrap();
    for dir in crates() {
        assert!(map.contains(&format!("| `{}` |", name(&dir))), "{} is missing", name(&dir));
    }
}
