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
    overrides: Vec<Override>,
    /// Keys that [`Pipeline::translate`] put in, and the names that they have in the file.
    renamed: Vec<(String, String)>,
    runs: PathBuf,
}

/// A `--set`.
#[derive(Clone, Debug)]
struct Override {
    /// The key, such as `train.lr`.
    key: String,
    /// As it was typed.
    text: String,
}

impl Override {
    /// How a message names it.
    fn place(&self) -> String {
        format!("`--set {}`", self.text)
    }
}

impl Pipeline {
    /// Reads the pipeline file of `common` (an empty one when none is given), and applies `--set`. A
    /// stage follows, whose key needs the hash of the program: that is begun meanwhile.
    ///
    /// # Errors
    /// It is missing, not TOML, holds unknown top-level keys, or an override does not fit.
    pub fn load(common: &Common) -> Result<Self, Failure> {
        hone_store::program_ahead();
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
        let mut overrides = Vec::new();
        for set in &common.set {
            let key = apply(&mut table, set)?;
            overrides.push(Override { key, text: set.clone() });
        }
        check_top_keys(&file, &text, &table, &overrides)?;
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
            overrides,
            renamed: Vec::new(),
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
        if self.overrides.is_empty() && self.renamed.is_empty() && self.has(stage) {
            return self.read_table(stage).map_err(|e| self.key_failure(stage, self.line(&e), &e));
        }
        let empty = || Value::Table(Table::new());
        let table = self.table.get(stage).cloned().unwrap_or_else(empty);
        table.try_into().map_err(|e: toml::de::Error| {
            // What is wrong in the file already has a line there.
            let in_text = self.has(stage).then(|| self.read_table::<T>(stage).err()).flatten();
            let same = in_text.filter(|other| other.message() == e.message());
            self.key_failure(stage, same.and_then(|other| self.line(&other)), &e)
        })
    }

    /// The pipeline with the table of `stage` rewritten, for keys that go by other names elsewhere. `rewrite` gives the keys that
    /// it put in with the names they had, so that messages keep their places.
    ///
    /// # Errors
    /// What `rewrite` refuses, with the place of the key that its message names first in backticks.
    pub fn translate(
        &self,
        stage: &str,
        rewrite: impl FnOnce(&mut Table) -> Result<Vec<(String, String)>, Failure>,
    ) -> Result<Self, Failure> {
        let mut new = self.clone();
        if let Some(Value::Table(table)) = new.table.get_mut(stage) {
            new.renamed = rewrite(table).map_err(|failure| self.at(stage, failure))?;
        }
        Ok(new)
    }

    /// The name of a key in the file.
    fn written<'a>(&'a self, key: &'a str) -> &'a str {
        let renamed = self.renamed.iter().find(|(own, _)| own == key);
        renamed.map_or(key, |(_, written)| written)
    }

    /// The table of `stage` as it stands in the file, so that an error knows its line.
    fn read_table<T: DeserializeOwned>(&self, stage: &'static str) -> Result<T, toml::de::Error> {
        toml::de::Deserializer::parse(&self.text)
            .and_then(|toml| OneTable { stage, marker: PhantomData }.deserialize(toml))
    }

    fn line(&self, error: &toml::de::Error) -> Option<usize> {
        error.span().map(|span| line_of(&self.text, span.start))
    }

    fn key_failure(&self, stage: &str, line: Option<usize>, error: &toml::de::Error) -> Failure {
        let message = error.message().trim();
        let at = |key: &str| {
            let key = self.written(key);
            let set = self.overrides.iter().rev().find(|set| is_set(set, stage, key));
            let line = line.or_else(|| {
                let is_rewritten = set.is_none() && !self.renamed.is_empty();
                let (line, table) = find_key(&self.text, stage, key);
                if is_rewritten { line.or(table) } else { None }
            });
            match (line, set) {
                (None, Some(set)) => set.place(),
                (Some(line), _) => format!("{}:{line}", self.file),
                (None, None) => self.file.clone(),
            }
        };
        if let Some((word, known)) = unknown_field(message) {
            let text = format!("{}: [{stage}] unknown key `{word}`", at(word));
            return Failure::usage(text).hint(match nearest(word, known.iter().copied()) {
                Some(near) => format!("did you mean `{near}`?"),
                None => format!("known are {}", known.join(", ")),
            });
        }
        if let Some(key) = message.strip_prefix("missing field `").and_then(|m| m.strip_suffix('`'))
        {
            let text = format!("{}: [{stage}] `{key}` is not given", at(key));
            let file = if self.text.is_empty() { "give `--pipeline`" } else { "write it there" };
            return Failure::usage(text)
                .hint(format!("it has no default: {file}, or add `--set {stage}.{key}=...`"));
        }
        // The library names the key only where it has no text to point into.
        let shown = error.to_string();
        let key = shown.split("in `").nth(1).and_then(|rest| rest.split('`').next());
        let what = in_words(message);
        Failure::usage(format!("{}: [{stage}] {what}", at(key.unwrap_or_default())))
    }

    /// A failure of a check of `stage`'s values, with the place of the first key that it names in backticks and that somebody set.
    pub fn at(&self, stage: &str, failure: Failure) -> Failure {
        let words = failure.message.split('`').skip(1).step_by(2);
        let place = words.map(|word| self.written(word)).find_map(|key| {
            let set = self.overrides.iter().rev().find(|set| is_set(set, stage, key));
            let line = || Some(format!("{}:{}", self.file, find_key(&self.text, stage, key).0?));
            set.map(Override::place).or_else(line)
        });
        let place = place.unwrap_or_else(|| match find_key(&self.text, stage, "").1 {
            Some(line) => format!("{}:{line}", self.file),
            None => self.file.clone(),
        });
        Failure { message: format!("{place}: {}", failure.message), ..failure }
    }
}

/// Whether an override sets `key`, a path in the table of `stage` or the end of one.
fn is_set(set: &Override, stage: &str, key: &str) -> bool {
    let inner = set.key.strip_prefix(stage).and_then(|rest| rest.strip_prefix('.'));
    let ends =
        |inner: &str| inner.strip_suffix(key).is_some_and(|r| r.is_empty() || r.ends_with('.'));
    !key.is_empty() && inner.is_some_and(ends)
}

/// The lines of a key in the table of `stage`, and of that table.
fn find_key(text: &str, stage: &str, key: &str) -> (Option<usize>, Option<usize>) {
    let (mut inside, mut table) = (false, None);
    for (idx, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.starts_with('[') {
            let name = line.trim_matches(['[', ']', ' ']);
            inside = name == stage || name.strip_prefix(stage).is_some_and(|r| r.starts_with('.'));
            if inside {
                table = table.or(Some(idx + 1));
            }
        } else if inside
            && !key.is_empty()
            && line.strip_prefix(key).is_some_and(|rest| rest.trim_start().starts_with('='))
        {
            return (Some(idx + 1), table);
        }
    }
    (None, table)
}

/// A message of the TOML library without the names of Rust's types.
fn in_words(message: &str) -> String {
    // What it says of a value of another type where one of a few names is due.
    if message.ends_with("unit variant, expected string only") {
        return "one of its names, in quotes, is expected".to_owned();
    }
    let Some((found, expected)) = message.rsplit_once("expected ") else {
        return message.to_owned();
    };
    let expected = match expected {
        "f32" | "f64" => "a number",
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number of at least 0",
        "i32" | "i64" => "a whole number",
        other => other,
    };
    format!("{found}expected {expected}")
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

fn check_top_keys(
    file: &str,
    text: &str,
    table: &Table,
    overrides: &[Override],
) -> Result<(), Failure> {
    let known = || TOP_KEYS.into_iter().chain(STAGES);
    for key in table.keys() {
        if known().any(|k| k == key) {
            continue;
        }
        let starts = |text: &str| {
            text.strip_prefix(key.as_str())
                .is_some_and(|rest| rest.is_empty() || rest.starts_with(['=', ' ', ']', '.', '\t']))
        };
        let line = text.lines().position(|line| starts(line.trim_start_matches(['[', ' '])));
        let place = match (line, overrides.iter().find(|set| starts(&set.key))) {
            (Some(line), _) => format!("{file}:{}", line + 1),
            (None, Some(set)) => set.place(),
            (None, None) => file.to_owned(),
        };
        let failure = Failure::usage(format!("{place}: unknown key or table `{key}`"));
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

/// Whether a key has its default value: one that came after the first release is then left out of the record of a run
/// (`skip_serializing_if`), so that the run's key stays what it was.
pub fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
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
    fn a_check_of_values_gets_the_place_of_its_key() {
        let at = |set: &[&str], message: &str| {
            load(FILE, set).unwrap().at("train", Failure::usage(message)).message
        };
        let place = |set: &[&str], message: &str| {
            at(set, message).split(": ").next().unwrap().rsplit('/').next().unwrap().to_owned()
        };
        assert_eq!(place(&[], "`lr` is too large"), "p.toml:5");
        assert_eq!(place(&[], "`path` is empty"), "p.toml:8");
        assert_eq!(place(&[], "`rank` is 0"), "p.toml:4");
        assert_eq!(place(&["train.rank=0"], "`rank` is 0"), "`--set train.rank=0`");
    }

    #[test]
    fn a_rewritten_table_keeps_its_places() {
        let rewrite = |table: &mut Table| {
            let value = table.remove("learning_rate").expect("the test writes it");
            table.insert("lr".to_owned(), value);
            Ok(vec![("lr".to_owned(), "learning_rate".to_owned())])
        };
        let read = |text: &str, set: &[&str]| {
            let pipeline = load(text, set).unwrap().translate("train", rewrite).unwrap();
            pipeline.stage::<Train>("train").map_err(|failure| {
                failure.message.rsplit('/').next().unwrap_or_default().to_owned()
            })
        };
        let text = FILE.replace("lr = 0.5", "rank = 2\nlearning_rate = 0.5");
        assert_eq!(read(&text, &[]).unwrap().lr, 0.5);
        let wrong = text.replace("0.5", "true");
        let message = "[train] invalid type: boolean `true`, expected a number";
        assert_eq!(read(&wrong, &[]).unwrap_err(), format!("p.toml:6: {message}"));
        let message = "[train] unknown key `rnak`";
        let unknown = text.replace("rank", "rnak");
        assert_eq!(read(&unknown, &[]).unwrap_err(), format!("p.toml:5: {message}"));
        let set = read(&text, &["train.learning_rate=x"]).unwrap_err();
        assert!(set.starts_with("`--set train.learning_rate=x`: "), "{set}");
        let pipeline = load(&text, &[]).unwrap();
        let refused = pipeline
            .translate("train", |_| Err(Failure::usage("[train] `learning_rate` is odd")))
            .unwrap_err();
        assert!(refused.message.ends_with("p.toml:6: [train] `learning_rate` is odd"));
        let pipeline = pipeline.translate("train", rewrite).unwrap();
        let checked = pipeline.at("train", Failure::usage("[train] `lr` is too large"));
        assert!(checked.message.ends_with("p.toml:6: [train] `lr` is too large"));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        let near = Some("did you mean `rank`?");
        check(
            &FILE.replace("lr = 0.5", "lr = 0.5\nrnak = 3"),
            &[],
            "p.toml:6: [train] unknown key `rnak`",
            near,
        );
        check(FILE, &["train.rnak=3"], "`--set train.rnak=3`: [train] unknown key `rnak`", near);
        check(
            &FILE.replace("lr = 0.5", "lr = 0.5\nrnak = 3"),
            &["train.rank=3"],
            "p.toml:6: [train] unknown key `rnak`",
            near,
        );
        check(
            FILE,
            &["train.lr=fast"],
            "`--set train.lr=fast`: [train] invalid type: string \"fast\", expected a number",
            None,
        );
        check(
            &FILE.replace("lr = 0.5", ""),
            &[],
            "p.toml:4: [train] `lr` is not given",
            Some("it has no default: write it there, or add `--set train.lr=...`"),
        );
        check(
            &FILE.replace("[train]", "[trian]"),
            &[],
            "p.toml:4: unknown key or table `trian`",
            Some("did you mean `train`?"),
        );
        check(&FILE.replace("lr = 0.5", "lr = 'x'"), &[], "p.toml:5: [train] invalid type", None);
        let all = "known are name, base, seed, ingest, template, tokenize, train, merge, eval";
        check(FILE, &["x=1"], "`--set x=1`: unknown key or table `x`", Some(all));
        check(&FILE.replace("lr = 0.5", "lr = "), &[], "p.toml:5: ", None);
        check(&FILE.replace("seed = 3", "seed = -3"), &[], "`seed` is -3", None);
        let how = Some("write it as `--set train.lr=2e-4`");
        check(FILE, &["train.lr"], "there is no `=`", how);
        check(FILE, &["train.source.7.path=a"], "`7` is not a table or a list", how);
    }
}
