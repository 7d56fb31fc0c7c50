//! The program as a user runs it: exit codes, messages, and what lies on the disk afterwards.

#[allow(dead_code, reason = "the unit tests use all of it")]
#[path = "../../src/fixture.rs"]
mod fixture;
mod hub;
mod local;
mod server;
mod tokens;

use std::path::Path;
use std::process::Command;

/// How a run ended.
#[derive(Debug)]
struct Ended {
    code: i32,
    stdout: String,
    stderr: String,
}

/// Runs the program with no variables but those given.
fn fetch(args: &[&str], variables: &[(&str, &str)]) -> Ended {
    let output = Command::new(env!("CARGO_BIN_EXE_hone-fetch"))
        .args(args)
        .env_clear()
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    Ended {
        code: output.status.code().unwrap(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

impl Ended {
    /// Checks the exit code and a part of what was said.
    fn check(&self, code: i32, said: &str) {
        assert_eq!(self.code, code, "{}", self.stderr);
        assert!(self.stderr.contains(said), "{}\nnot: {said}", self.stderr);
    }
}

/// Files of a directory, sorted; empty when there is none.
fn names(dir: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let name = |entry: std::io::Result<std::fs::DirEntry>| {
        entry.unwrap().file_name().into_string().unwrap()
    };
    let mut names: Vec<String> = entries.map(name).collect();
    names.sort();
    names
}

/// A sealed tiny model, brought in from a GGUF file.
fn tiny_model(dir: &Path) -> std::path::PathBuf {
    let file = dir.join("tiny.gguf");
    std::fs::write(&file, fixture::tiny().bytes()).unwrap();
    let out = dir.join("model");
    let (file, target) = (file.to_str().unwrap(), out.to_str().unwrap());
    fetch(&["model", file, "--out", target], &[]).check(0, "2440 weights in 11 tensors");
    out
}

/// The files of a model that came from a GGUF file.
const MODEL_FILES: [&str; 8] = [
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "manifest.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
];
