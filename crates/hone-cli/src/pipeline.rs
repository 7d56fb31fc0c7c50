//! The pipeline file.
//!
//! One TOML file describes a run: `name`, `base`, `seed`, and one table a stage. A program parses the table of its own stage into
//! its configuration type; what it does not know is refused with the line and the nearest known key. `--set a.b=value`
//! overrides a value before that.

use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use serde::Deserializer;
use serde::de::{DeserializeOwned, DeserializeSeed, IgnoredAny, MapAccess, Visitor};
use toml::{Table, Value};

use crate::{Common, Failure, nearest};

/// The stages, in the order in which they run.
pub const STAGES: [&str; 6] = ["ingest", "template", "tokenize", "train", "merge", "eval"];

/// Keys beside the stages' tables.
const TOP_KEYS: [&str; 3] = ["name", "base", "seed"];

/// Longest pipeline file, in bytes: a hundred times the longest in `pipelines/`.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// A pipeline file with its overrides.
#[derive(Clone, Debug)]
pub struct Pipeline {
    /// Name of the run: the file's `name`, else its stem.
    pub name: String,
    /// The base model's directory.
    pub base: Option<PathBuf>,
    /// The seed of everything random.
    pub seed: u64,
    file: String,
    text: String,
    table: Table,
    overridden: Vec<String>,
    runs: PathBuf,
}

impl Pipeline {
    /// Reads the pipeline file of `common` (an empty one when none is given), and applies `--set`.
    ///
    /// # Errors
    /// It is missing, not TOML, holds unknown top-level keys, or an override does not fit.
    pub fn load(common: &Common) -> Result<Self, Failure> {
        let (file, text, stem) = match &common.pipeline {
            None => ("the command line".to_owned(), String::new(), "default".to_owned()),
            Some(path) => {
                let bytes = hone_store::input::read(path, FILE_BYTES_MAX)
                    .map_err(|e| Failure::usage(e.to_string()).hint("pipelines/ has examples"))?;
                let text = String::from_utf8(bytes)
                    .map_err(|_| Failure::usage(format!("{}: not UTF-8", path.display())))?;
                let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
                (path.display().to_string(), text, stem)
            }
        };
        let mut table: Table =
            text.parse().map_err(|e: toml::de::Error| syntax_failure(&file, &text, &e))?;
        let mut overridden = Vec::new();
        for set in &common.set {
            overridden.push(apply(&mut table, set)?);
        }
        check_top_keys(&file, &text, &table)?;
        let name = top(&table, &file, "name", Value::as_str)?.map_or(stem, str::to_owned);
        if !name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')) {
            let message =
                format!("{file}: `name` {name:?} may hold letters, digits, `-`, `_`, `.`");
            return Err(Failure::usage(message));
        }
        let base = top(&table, &file, "base", Value::as_str)?.map(PathBuf::from);
        let seed = top(&table, &file, "seed", |v| v.as_integer().filter(|s| *s >= 0))?;
        Ok(Pipeline {
            name,
            base,
            seed: seed.unwrap_or(0) as u64,
            file,
            text,
            table,
            overridden,
            runs: common.runs.clone(),
        })
    }

    /// The directory of this run: `<runs>/<name>`.
    pub fn run_dir(&self) -> PathBuf {
        self.runs.join(&self.name)
    }

    /// The directory of a stage's artefact: `<runs>/<name>/<stage>`.
    pub fn dir(&self, stage: &str) -> PathBuf {
        self.run_dir().join(stage)
    }

    /// The base model's directory, which this stage cannot do without.
    ///
    /// # Errors
    /// None is given.
    pub fn need_base(&self) -> Result<&Path, Failure> {
        self.base.as_deref().ok_or_else(|| {
            Failure::usage(format!("{}: no base model is given", self.file))
                .hint("set `base = \"<model directory>\"` at the top of the pipeline file")
        })
    }

    /// Whether the file (or an override) has a table for `stage`.
    pub fn has(&self, stage: &str) -> bool {
        self.table.contains_key(stage)
    }

    /// The table of `stage` as a configuration; an absent table is an empty one.
    ///
    /// # Errors
    /// An unknown key, named with its line and the nearest known one; a missing or mistyped value.
    pub fn stage<T: DeserializeOwned>(&self, stage: &'static str) -> Result<T, Failure> {
        let prefix = format!("{stage}.");
        let is_overridden = self.overridden.iter().any(|key| key.starts_with(&prefix));
        if self.text.is_empty() || is_overridden || !self.has(stage) {
            let table =
                self.table.get(stage).cloned().unwrap_or_else(|| Value::Table(Table::new()));
            return table
                .try_into()
                .map_err(|e: toml::de::Error| self.key_failure(stage, None, e.message()));
        }
        // Once more from the text, so that an error knows its line.
        toml::de::Deserializer::parse(&self.text)
            .and_then(|toml| OneTable { stage, marker: PhantomData }.deserialize(toml))
            .map_err(|e| {
                let line = e.span().map(|span| line_of(&self.text, span.start));
                self.key_failure(stage, line, e.message())
            })
    }

    fn key_failure(&self, stage: &str, line: Option<usize>, message: &str) -> Failure {
        let place = line.map_or_else(|| self.file.clone(), |line| format!("{}:{line}", self.file));
        let failure = Failure::usage(format!("{place}: [{stage}] {}", message.trim()));
        match unknown_field(message) {
            Some((word, known)) => match nearest(word, known.iter().copied()) {
                Some(near) => failure.hint(format!("did you mean `{near}`?")),
                None => failure,
            },
            None => failure,
        }
    }
}

/// Reads one table of the file and lets the others pass.
struct OneTable<T> {
    stage: &'static str,
    marker: PhantomData<T>,
}

impl<'de, T: DeserializeOwned> DeserializeSeed<'de> for OneTable<T> {
    type Value = T;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<T, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de, T: DeserializeOwned> Visitor<'de> for OneTable<T> {
    type Value = T;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a pipeline with a table [{}]", self.stage)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<T, A::Error> {
        let mut found = None;
        while let Some(key) = map.next_key::<String>()? {
            if key == self.stage {
                found = Some(map.next_value()?);
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        found.ok_or_else(|| serde::de::Error::missing_field(self.stage))
    }
}

fn syntax_failure(file: &str, text: &str, error: &toml::de::Error) -> Failure {
    let line = error.span().map_or(1, |span| line_of(text, span.start));
    Failure::usage(format!("{file}:{line}: {}", error.message().trim().replace('\n', ", ")))
}

fn line_of(text: &str, at: usize) -> usize {
    text.as_bytes()[..at.min(text.len())].iter().filter(|b| **b == b'\n').count() + 1
}

fn check_top_keys(file: &str, text: &str, table: &Table) -> Result<(), Failure> {
    let known = || TOP_KEYS.into_iter().chain(STAGES);
    for key in table.keys() {
        if known().any(|k| k == key) {
            continue;
        }
        let is_key = |line: &str| {
            let line = line.trim_start_matches(['[', ' ']);
            line.strip_prefix(key.as_str())
                .is_some_and(|rest| rest.starts_with(['=', ' ', ']', '.', '\t']))
        };
        let line = text.lines().position(is_key).map_or(String::new(), |l| format!(":{}", l + 1));
        let failure = Failure::usage(format!("{file}{line}: unknown key or table `{key}`"));
        return Err(match nearest(key, known()) {
            Some(near) => failure.hint(format!("did you mean `{near}`?")),
            None => {
                let all: Vec<&str> = known().collect();
                failure.hint(format!("known are {}", all.join(", ")))
            }
        });
    }
    Ok(())
}

fn top<'a, T>(
    table: &'a Table,
    file: &str,
    key: &str,
    take: impl Fn(&'a Value) -> Option<T>,
) -> Result<Option<T>, Failure> {
    match table.get(key) {
        None => Ok(None),
        Some(value) => take(value).map(Some).ok_or_else(|| {
            let want = if key == "seed" { "an integer of at least 0" } else { "a text" };
            Failure::usage(format!("{file}: `{key}` is {value}, which is not {want}"))
        }),
    }
}

/// Applies `key=value` to the table and returns the key. The value is TOML; what is not, is a text.
fn apply(table: &mut Table, set: &str) -> Result<String, Failure> {
    let wrong = |why: &str| {
        Failure::usage(format!("`--set {set}`: {why}")).hint("write it as `--set train.lr=2e-4`")
    };
    let (key, value) = set.split_once('=').ok_or_else(|| wrong("there is no `=`"))?;
    let key = key.trim();
    let parsed: Option<Table> = format!("value = {value}").parse().ok();
    let value = parsed
        .and_then(|mut t| t.remove("value"))
        .unwrap_or_else(|| Value::String(value.trim().to_owned()));
    let parts: Vec<&str> = key.split('.').collect();
    if parts.iter().any(|part| part.is_empty()) {
        return Err(wrong("a part of the key is empty"));
    }
    let (last, path) = parts.split_last().expect("split gives at least one part");
    let mut whole = Value::Table(std::mem::take(table));
    let mut at = &mut whole;
    for part in path {
        at = step(at, part).ok_or_else(|| wrong(&format!("`{part}` is not a table or a list")))?;
    }
    match at {
        Value::Table(inner) => {
            inner.insert((*last).to_owned(), value);
        }
        Value::Array(items) => {
            let slot = last.parse().ok().and_then(|idx: usize| items.get_mut(idx));
            *slot.ok_or_else(|| wrong(&format!("`{last}` is not an index of the list")))? = value;
        }
        _ => return Err(wrong(&format!("`{last}` does not lie in a table"))),
    }
    if let Value::Table(inner) = whole {
        *table = inner;
    }
    Ok(key.to_owned())
}

fn step<'a>(at: &'a mut Value, part: &str) -> Option<&'a mut Value> {
    match at {
        Value::Table(inner) => {
            Some(inner.entry(part.to_owned()).or_insert_with(|| Value::Table(Table::new())))
        }
        Value::Array(items) => items.get_mut(part.parse::<usize>().ok()?),
        _ => None,
    }
}

/// The unknown field of a serde message, and the fields it lists as known.
fn unknown_field(message: &str) -> Option<(&str, Vec<&str>)> {
    let rest = message.split("unknown field `").nth(1)?;
    let (word, rest) = rest.split_once('`')?;
    let known = rest.split('`').skip(1).step_by(2).collect();
    Some((word, known))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Train {
        lr: f64,
        #[serde(default)]
        rank: u32,
        #[serde(default)]
        source: Vec<Source>,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Source {
        path: String,
    }

    const FILE: &str =
        "name = \"p\"\nseed = 3\n\n[train]\nlr = 0.5\n\n[[train.source]]\npath = \"a\"\n";

    fn load(text: &str, set: &[&str]) -> Result<Pipeline, Failure> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.toml");
        std::fs::write(&path, text).unwrap();
        let set = set.iter().map(|s| (*s).to_owned()).collect();
        Pipeline::load(&Common { pipeline: Some(path), set, ..Common::default() })
    }

    fn check(text: &str, set: &[&str], message: &str, hint: Option<&str>) {
        let failure = load(text, set).and_then(|p| p.stage::<Train>("train")).unwrap_err();
        assert_eq!(failure.exit, crate::Exit::Usage);
        assert!(failure.message.contains(message), "{}", failure.message);
        assert_eq!(failure.hint.as_deref(), hint);
    }

    #[test]
    fn a_table_is_read_and_overridden() {
        let pipeline = load(FILE, &[]).unwrap();
        assert_eq!((pipeline.name.as_str(), pipeline.seed), ("p", 3));
        assert_eq!(pipeline.stage::<Train>("train").unwrap().lr, 0.5);
        let set = ["train.lr=2e-4", "train.source.0.path=b c", "seed=9", "train.rank = 4"];
        let pipeline = load(FILE, &set).unwrap();
        let train: Train = pipeline.stage("train").unwrap();
        let source = vec![Source { path: "b c".into() }];
        assert_eq!(train, Train { lr: 2e-4, rank: 4, source });
        assert_eq!(pipeline.seed, 9);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        let near = Some("did you mean `rank`?");
        check(
            &FILE.replace("lr = 0.5", "lr = 0.5\nrnak = 3"),
            &[],
            "p.toml:6: [train] unknown field `rnak`",
            near,
        );
        check(FILE, &["train.rnak=3"], "[train] unknown field `rnak`", near);
        check(
            &FILE.replace("[train]", "[trian]"),
            &[],
            "p.toml:4: unknown key or table `trian`",
            Some("did you mean `train`?"),
        );
        check(&FILE.replace("lr = 0.5", "lr = 'x'"), &[], "p.toml:5: [train] invalid type", None);
        check(&FILE.replace("lr = 0.5", "lr = "), &[], "p.toml:5: ", None);
        check(&FILE.replace("seed = 3", "seed = -3"), &[], "`seed` is -3", None);
        let how = Some("write it as `--set train.lr=2e-4`");
        check(FILE, &["train.lr"], "there is no `=`", how);
        check(FILE, &["train.source.7.path=a"], "`7` is not a table or a list", how);
    }
}
