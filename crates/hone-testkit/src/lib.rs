//! For tests only: run the real programs in temporary trees, and compare what they say.
//!
//! [`Tree`] is a temporary directory with files in it. [`Tree::run`] runs a program of the workspace there and returns its
//! [`Output`], with what differs from run to run filtered out, so that messages can be compared as whole texts.
//! [`Tree::spawn`] starts one that is to be watched, signalled or killed; [`Running::end`] waits for it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

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

    /// Removes a file or a directory with all in it; absent is fine.
    ///
    /// # Panics
    /// It cannot be removed.
    pub fn remove(&self, name: &str) {
        let path = self.path(name);
        if path.is_dir() {
            std::fs::remove_dir_all(&path).expect("a directory of a tree can be removed");
        } else if path.exists() {
            std::fs::remove_file(&path).expect("a file of a tree can be removed");
        }
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
        self.output(self.command(program, args))
    }

    /// Runs a command, such as one from [`Tree::command`] under another program, to its end.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn output(&self, mut command: Command) -> Output {
        let output = command.output().unwrap_or_else(|e| panic!("{command:?} cannot be run: {e}"));
        self.said(output)
    }

    /// Starts a program of the workspace in the tree.
    ///
    /// # Panics
    /// The program was not built: run the tests of the whole workspace.
    pub fn spawn(&self, program: &str, args: &[&str]) -> Running<'_> {
        let mut command = self.command(program, args);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().unwrap_or_else(|e| panic!("{program} cannot be run: {e}"));
        Running { child: Some(child), tree: self }
    }

    fn said(&self, output: std::process::Output) -> Output {
        Output {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: self.filter(&String::from_utf8_lossy(&output.stderr)),
        }
    }

    /// A tree of its own with the same files.
    ///
    /// # Panics
    /// A file cannot be copied.
    pub fn copy(&self) -> Tree {
        let other = Tree::new();
        for (name, bytes) in self.files("") {
            other.write(&name, bytes);
        }
        other
    }

    /// The files at and below `name`, hidden ones too, by their paths in the tree; none when there
    /// is nothing.
    ///
    /// # Panics
    /// One cannot be read.
    pub fn files(&self, name: &str) -> BTreeMap<String, Vec<u8>> {
        let paths = self.paths(name).into_iter().filter(|name| self.path(name).is_file());
        paths
            .map(|name| {
                let bytes = std::fs::read(self.path(&name)).expect("a file of a tree can be read");
                (name, bytes)
            })
            .collect()
    }

    /// The paths of everything at and below `name`, directories too, from the root of the tree.
    /// What goes away meanwhile is left out.
    pub fn paths(&self, name: &str) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        let mut left = vec![self.path(name)];
        while let Some(path) = left.pop() {
            if let Ok(entries) = std::fs::read_dir(&path) {
                left.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
            }
            if path.exists() {
                let name = path.strip_prefix(self.dir.path()).expect("it lies in the tree");
                found.insert(name.display().to_string());
            }
        }
        found
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

/// A program at work in a tree; killed when dropped.
#[derive(Debug)]
pub struct Running<'a> {
    child: Option<Child>,
    tree: &'a Tree,
}

impl Running<'_> {
    fn child(&mut self) -> &mut Child {
        self.child.as_mut().expect("it is taken by `end` alone, which takes all")
    }

    /// Its process id.
    pub fn pid(&mut self) -> u32 {
        self.child().id()
    }

    /// Whether it still runs.
    ///
    /// # Panics
    /// The system does not say.
    pub fn is_running(&mut self) -> bool {
        self.child().try_wait().expect("a child of ours can be waited for").is_none()
    }

    /// Sends a signal by its name, such as `TERM`.
    ///
    /// # Panics
    /// There is no program `kill`.
    pub fn signal(&mut self, name: &str) {
        if name == "KILL" {
            self.child().kill().expect("a child of ours can be killed");
            return;
        }
        let pid = self.pid().to_string();
        let status = Command::new("kill").args([&format!("-{name}"), &pid]).status();
        assert!(status.expect("there is a program `kill`").success(), "no process {pid}");
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// It cannot be waited for.
    pub fn end(mut self) -> Output {
        let child = self.child.take().expect("it is taken here alone");
        self.tree.said(child.wait_with_output().expect("a child of ours can be waited for"))
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Default for Tree {
    fn default() -> Self {
        Self::new()
    }
}

/// A word of a message: a hash of twelve digits or more becomes `[HASH]`.
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
