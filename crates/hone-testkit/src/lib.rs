//! For tests only: run the real programs in temporary trees, and compare what they say.
//!
//! [`Tree`] is a temporary directory with files in it. [`Tree::run`] runs a program of the workspace there and returns its
//! [`Output`], with what differs from run to run filtered out, so that messages can be compared as whole texts.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A temporary directory that goes away with the value.
#[derive(Debug)]
pub struct Tree {
    dir: tempfile::TempDir,
    bin: PathBuf,
}

/// What a program said and how it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Its exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// Its stdout.
    pub stdout: String,
    /// Its stderr, filtered.
    pub stderr: String,
}

impl Output {
    /// Exit code and stderr in one text, for snapshots.
    pub fn said(&self) -> String {
        let code = self.code.map_or("none".to_owned(), |code| code.to_string());
        format!("exit {code}\n{}", self.stderr)
    }
}

/// The directory of the workspace's programs: where the test itself was built, one folder up.
///
/// # Panics
/// The test's own path has no such folder, which cargo never does.
pub fn bin_dir() -> PathBuf {
    let test = std::env::current_exe().expect("a running test has a path");
    let deps = test.parent().expect("cargo puts tests into a folder");
    deps.parent().expect("that folder lies in the profile's").to_owned()
}

/// The root of the workspace.
pub fn workspace() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).expect("this crate lies two folders below the root").to_owned()
}

impl Tree {
    /// An empty tree.
    ///
    /// # Panics
    /// No temporary directory can be made.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory can be made");
        Tree { dir, bin: bin_dir() }
    }

    /// The path of the tree, or of something in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a file, making its directories.
    ///
    /// # Panics
    /// The file cannot be written.
    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        let parent = path.parent().expect("a file of a tree lies in a directory");
        std::fs::create_dir_all(parent).expect("a directory of a tree can be made");
        std::fs::write(&path, bytes).expect("a file of a tree can be written");
        path
    }

    /// Makes a link `name` to a path of the workspace, such as `data`.
    ///
    /// # Panics
    /// The link cannot be made.
    pub fn link(&self, name: &str) {
        let target = workspace().join(name);
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().expect("it lies in the tree"))
            .expect("a directory of a tree can be made");
        std::os::unix::fs::symlink(target, path).expect("a link in a tree can be made");
    }

    /// A program of the workspace, to be run in the tree with a clean environment.
    pub fn command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new(self.bin.join(program));
        command.args(args).current_dir(self.dir.path()).stdin(Stdio::null());
        for name in ["HONE_LOG", "HF_HOME", "HF_TOKEN", "HF_ENDPOINT", "RAYON_NUM_THREADS"] {
            command.env_remove(name);
        }
        command
    }

    /// Runs a program of the workspace in the tree.
    ///
    /// # Panics
    /// The program was not built: run the tests of the whole workspace.
    pub fn run(&self, program: &str, args: &[&str]) -> Output {
        let output = self.command(program, args).output();
        let output = output.unwrap_or_else(|e| panic!("{program} cannot be run: {e}"));
        Output {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: self.filter(&String::from_utf8_lossy(&output.stderr)),
        }
    }

    /// Takes out of a text what differs from run to run: the tree's path, hashes, rates.
    fn filter(&self, text: &str) -> String {
        let root = self.dir.path().display().to_string();
        let mut out = String::new();
        for line in text.replace(&root, "[TREE]").lines() {
            let words: Vec<String> = line.split(' ').map(word).collect();
            out.push_str(&words.join(" "));
            out.push('\n');
        }
        out
    }
}

impl Default for Tree {
    fn default() -> Self {
        Self::new()
    }
}

/// A word of a message; a hash of twelve digits or more becomes `[HASH]`, a process id after `process` is handled by the caller.
fn word(word: &str) -> String {
    let bare = word.trim_end_matches([',', ')', '.', ';']);
    let is_hash = bare.len() >= 12
        && bare.bytes().all(|b| b.is_ascii_hexdigit())
        && bare.bytes().any(|b| b.is_ascii_digit());
    if is_hash { word.replace(bare, "[HASH]") } else { word.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_and_paths_are_filtered() {
        let tree = Tree::new();
        let text = format!("its hash was 0123456789ab, at {}/x", tree.path("").display());
        assert_eq!(tree.filter(&text), "its hash was [HASH], at [TREE]//x\n");
        assert_eq!(word("deadbeefface"), "deadbeefface");
    }
}
