//! What is meant: the configuration checked and resolved. Opens nothing.

use std::path::PathBuf;

use hone_cli::{Failure, nearest};
use hone_schema::Split;

use crate::args::{Config, Paths, SourceConfig};
use crate::convert::Options;
use crate::read::TableOptions;
use crate::schema::Schema;

/// The stage's work.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) sources: Vec<Source>,
    pub(crate) eval_share: f64,
    pub(crate) test_share: f64,
    pub(crate) replay_share: f64,
    pub(crate) max_reject_share: f64,
    pub(crate) dedup: bool,
    pub(crate) seed: u64,
}

/// One source.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    pub(crate) name: String,
    /// As configured; directories are looked into later.
    pub(crate) paths: Vec<PathBuf>,
    /// `None` to find out.
    pub(crate) schema: Option<Schema>,
    /// `None` for the shares.
    pub(crate) split: Option<Split>,
    pub(crate) weight: f32,
    pub(crate) replay: bool,
    pub(crate) eval_rows: u64,
    pub(crate) limit: Option<u64>,
    pub(crate) table: TableOptions,
    pub(crate) convert: Options,
}

impl Config {
    /// Checks every value, and values against each other.
    ///
    /// # Errors
    /// A usage failure that names the key.
    pub(crate) fn resolve(&self, seed: u64) -> Result<Plan, Failure> {
        for (key, share) in [
            ("eval_share", self.eval_share),
            ("test_share", self.test_share),
            ("replay_share", self.replay_share),
            ("max_reject_share", self.max_reject_share),
        ] {
            if !(0.0..=1.0).contains(&share) {
                return Err(Failure::usage(format!(
                    "[ingest] `{key}` is {share}, not a share from 0 to 1"
                )));
            }
        }
        if self.eval_share + self.test_share >= 1.0 {
            let text = "[ingest] `eval_share` and `test_share` leave no row for training";
            return Err(Failure::usage(text));
        }
        if self.replay_share >= 1.0 {
            return Err(Failure::usage(
                "[ingest] `replay_share` of 1 leaves no room for other rows",
            )
            .hint("to train on these rows alone, leave `replay = true` out"));
        }
        let sources = self.source.iter().enumerate().map(|(idx, source)| source.resolve(idx));
        let sources = sources.collect::<Result<Vec<_>, _>>()?;
        if sources.is_empty() {
            return Err(Failure::usage("[ingest] names no source").hint(
                "add `[[ingest.source]]` with `path = \"rows.jsonl\"` to the pipeline file",
            ));
        }
        if sources.iter().all(|source| source.replay) {
            return Err(Failure::usage(
                "[ingest] every source is a replay source, so there is nothing to mix them into",
            )
            .hint("leave `replay = true` out"));
        }
        for (idx, source) in sources.iter().enumerate() {
            if sources[..idx].iter().any(|other| other.name == source.name) {
                let text = format!("[ingest] two sources are named `{}`", source.name);
                return Err(Failure::usage(text).hint("give each its own `name`"));
            }
        }
        Ok(Plan {
            sources,
            eval_share: self.eval_share,
            test_share: self.test_share,
            replay_share: self.replay_share,
            max_reject_share: self.max_reject_share,
            dedup: self.dedup,
            seed: self.seed.unwrap_or(seed),
        })
    }
}

impl SourceConfig {
    fn resolve(&self, idx: usize) -> Result<Source, Failure> {
        let paths = match &self.path {
            Paths::One(path) => vec![path.clone()],
            Paths::Many(paths) => paths.clone(),
        };
        let Some(first) = paths.first().filter(|path| !path.as_os_str().is_empty()) else {
            return Err(Failure::usage(format!("[ingest] source {idx} has no `path`")));
        };
        let name = self.name.clone().unwrap_or_else(|| {
            let name = first.file_name().unwrap_or_default().to_string_lossy();
            name.split('.').next().unwrap_or_default().to_owned()
        });
        let wrong = |what: String| Failure::usage(format!("[ingest] source `{name}`: {what}"));
        if name.is_empty() || name.len() > 100 || name.chars().any(char::is_control) {
            return Err(wrong(
                "the name is empty, longer than 100 bytes or not printable".to_owned(),
            ));
        }
        let schema =
            schema(&self.schema).map_err(|f| Failure { message: wrong(f.message).message, ..f })?;
        let split = match self.split.as_str() {
            "auto" => None,
            word => Some(Split::from_name(word).ok_or_else(|| {
                wrong(format!("`split` is `{word}`, not auto, train, eval or test"))
            })?),
        };
        if self.replay && split.is_some_and(|split| split != Split::Train) {
            return Err(wrong(
                "replay rows are trained on, so `split` cannot hold them out".to_owned(),
            )
            .hint("`eval_rows` holds out so many of them"));
        }
        if self.eval_rows > 0 && !self.replay {
            return Err(wrong("`eval_rows` are held out of replay rows".to_owned())
                .hint("`split` and `eval_share` hold out rows of other sources"));
        }
        if !(self.weight.is_finite() && self.weight >= 0.0) {
            return Err(wrong(format!("`weight` is {}, not a number of at least 0", self.weight)));
        }
        if self.limit == Some(0) {
            return Err(wrong("`limit` of 0 takes no row".to_owned()));
        }
        if self.strip_suffix.as_deref() == Some("") {
            return Err(wrong("`strip_suffix` is empty".to_owned()));
        }
        Ok(Source {
            paths,
            schema,
            split,
            weight: self.weight,
            replay: self.replay,
            eval_rows: self.eval_rows,
            limit: self.limit,
            table: TableOptions {
                columns: self.columns.clone(),
                quoting: self.quoting,
                flan: schema == Some(Schema::Flan),
            },
            convert: Options {
                rename: self.rename.clone(),
                strip_suffix: self.strip_suffix.clone(),
            },
            name,
        })
    }
}

/// The schema of a name; `None` for `auto`.
///
/// # Errors
/// A usage failure with the nearest name.
pub(crate) fn schema(word: &str) -> Result<Option<Schema>, Failure> {
    if word == "auto" {
        return Ok(None);
    }
    Schema::from_name(word).map(Some).ok_or_else(|| {
        let names = || Schema::ALL.into_iter().map(Schema::name);
        let failure = Failure::usage(format!("no schema is named `{word}`"));
        match nearest(word, names()) {
            Some(near) => failure.hint(format!("did you mean `{near}`?")),
            None => {
                failure.hint(format!("known are auto, {}", names().collect::<Vec<_>>().join(", ")))
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(path: &str) -> SourceConfig {
        SourceConfig { path: Paths::One(path.into()), ..SourceConfig::default() }
    }

    fn refused(config: Config, text: &str) {
        let failure = config.resolve(1).unwrap_err();
        assert_eq!(failure.exit, hone_cli::Exit::Usage);
        assert!(failure.message.contains(text), "{}", failure.message);
    }

    #[test]
    fn a_source_is_named_after_its_file() {
        let config = Config { source: vec![source("data/rows.jsonl.gz")], ..Config::default() };
        let plan = config.resolve(7).unwrap();
        assert_eq!((plan.sources[0].name.as_str(), plan.seed), ("rows", 7));
        let config = Config { seed: Some(9), ..config };
        assert_eq!(config.resolve(7).unwrap().seed, 9);
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        let with = |change: fn(&mut SourceConfig)| {
            let mut one = source("a.jsonl");
            change(&mut one);
            Config { source: vec![one], ..Config::default() }
        };
        refused(Config::default(), "names no source");
        refused(with(|s| s.path = Paths::Many(vec![])), "source 0 has no `path`");
        refused(with(|s| s.schema = "alpacca".into()), "source `a`: no schema is named `alpacca`");
        refused(with(|s| s.split = "dev".into()), "`split` is `dev`");
        refused(with(|s| s.weight = -1.0), "`weight` is -1");
        refused(with(|s| s.weight = f32::NAN), "`weight` is NaN");
        refused(with(|s| s.limit = Some(0)), "takes no row");
        refused(with(|s| s.strip_suffix = Some(String::new())), "`strip_suffix` is empty");
        refused(with(|s| s.replay = true), "every source is a replay source");
        refused(
            with(|s| (s.replay, s.split) = (true, "test".into())),
            "replay rows are trained on",
        );
        refused(with(|s| s.eval_rows = 3), "`eval_rows` are held out of replay rows");
        let two =
            Config { source: vec![source("x/a.jsonl"), source("y/a.csv")], ..Config::default() };
        refused(two.clone(), "two sources are named `a`");
        let one = Config { source: vec![source("a.jsonl")], ..Config::default() };
        refused(Config { eval_share: 1.5, ..one.clone() }, "`eval_share` is 1.5");
        refused(
            Config { eval_share: 0.5, test_share: 0.5, ..one.clone() },
            "leave no row for training",
        );
        refused(Config { replay_share: 1.0, ..one }, "leaves no room");
    }
}
