//! What was typed: flags, and the `[template]` table of the pipeline file.

use std::fmt;
use std::path::PathBuf;

use clap::{Parser, Subcommand};
use hone_chat::{Date, Rewritten};
use hone_cli::worker::WORKER;
use hone_cli::{Common, Failure};
use serde::de::{self, MapAccess, Visitor, value::MapAccessDeserializer};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

/// The keys of the table, for `--help`; a test holds it against [`Config`].
const KEYS: &str = "\
The [template] table, with its defaults:
  template = \"auto\"        the base model's (for rows with tools its `tool_use`, if it has one);
                           or { of_model = \"rag\" } for another of several that it has,
                           { file = \"x.jinja\" }, or one of hone's own by name
  date                     what templates see as today, such as \"2026-01-31\"
  variables = {}           further variables of the template: { enable_thinking = false }
  rewritten = \"expand\"     when the template leaves out of an earlier answer what it writes when
                           that is the last (its thought, mostly), or moves behind it what a
                           served model reads before: train it in a sample of its own, named
                           <id>#m<message> (a row whose own id reads so gets a `!` behind it);
                           \"refuse\" rejects the row, \"accept\" trains what is left
  max_reject_share = 0.05  more rejected rows than this: sealed, but exit code 1";

/// Render conversations with a chat template, and know for each byte who wrote it.
///
/// Reads the `[template]` table of the pipeline file and the conversations that `hone-ingest`
/// sealed.
#[derive(Debug, Parser)]
#[command(version, after_long_help = KEYS)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

impl AsRef<Common> for Args {
    fn as_ref(&self) -> &Common {
        &self.common
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Render one conversation and print it on stdout.
    Render(RenderArgs),
    /// Be the worker of a stage.
    #[command(name = WORKER, hide = true)]
    Worker,
}

#[derive(Debug, clap::Args)]
pub(crate) struct RenderArgs {
    /// Name of a built-in template, `auto` for that of the pipeline's base model, or a file.
    #[arg(long, value_name = "NAME|FILE")]
    pub(crate) template: String,
    /// File with the messages: a JSON list of objects with `role` and `content`; or an object that
    /// holds it under `messages`, perhaps beside `tools`, `documents` and `chat_template_kwargs`.
    #[arg(long, value_name = "FILE")]
    pub(crate) messages: PathBuf,
    /// File with the tools: a JSON list.
    #[arg(long, value_name = "FILE")]
    pub(crate) tools: Option<PathBuf>,
    /// File with the documents: a JSON list.
    #[arg(long, value_name = "FILE")]
    pub(crate) documents: Option<PathBuf>,
    /// Further variables of the template, such as `{"enable_thinking": false}`.
    #[arg(long, value_name = "JSON")]
    pub(crate) kwargs: Option<String>,
    /// Go on to where the model is to answer.
    #[arg(long)]
    pub(crate) add_generation_prompt: bool,
    /// Print a JSON object with the text, its spans and the length of the prompt.
    #[arg(long, conflicts_with = "add_generation_prompt")]
    pub(crate) spans: bool,
    /// The token that begins a text, where there is no base model to ask.
    #[arg(long, value_name = "TOKEN")]
    pub(crate) bos_token: Option<String>,
    /// The token that ends a text, where there is no base model to ask.
    #[arg(long, value_name = "TOKEN")]
    pub(crate) eos_token: Option<String>,
}

/// The `[template]` table.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Config {
    /// `auto` (that of the base model; for rows with tools its `tool_use`, where it has one), a
    /// built-in name, `{ file = "x.jinja" }`, or `{ of_model = "rag" }` for one of several that the
    /// base model has.
    pub(crate) template: Choice,
    /// The date that templates see as today, such as `2026-01-31`. Without one, `strftime_now` is
    /// undefined.
    pub(crate) date: Option<String>,
    /// Further variables of the template, such as `enable_thinking = false`.
    pub(crate) variables: Map<String, Value>,
    /// What becomes of a conversation when the template leaves out of an earlier answer what it
    /// writes when that answer is the last (its thought, mostly), or moves behind it what a served
    /// model reads before: `expand` trains such an answer in a sample of its own, which ends with
    /// it and is named `<id>#m<message>` (a row whose own id reads so gets a `!` behind it);
    /// `refuse` rejects the row; `accept` trains the answer as it is left.
    pub(crate) rewritten: Rewritten,
    /// Share of the rows that may be rejected before the stage ends with exit code 1.
    pub(crate) max_reject_share: f64,
}

/// Which template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub(crate) enum Choice {
    /// By name.
    Name(String),
    /// From a file.
    File {
        /// Its path.
        file: PathBuf,
    },
    /// One of several that come with the base model.
    OfModel {
        /// Its name.
        of_model: String,
    },
}

/// A choice that is written as a table.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    file: Option<PathBuf>,
    of_model: Option<String>,
}

impl<'de> Deserialize<'de> for Choice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ChoiceVisitor)
    }
}

struct ChoiceVisitor;

impl<'de> Visitor<'de> for ChoiceVisitor {
    type Value = Choice;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of a template, `{ file = \"x.jinja\" }` or `{ of_model = \"rag\" }`")
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<Choice, E> {
        Ok(Choice::Name(name.to_owned()))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Choice, A::Error> {
        match Table::deserialize(MapAccessDeserializer::new(map))? {
            Table { file: Some(file), of_model: None } => Ok(Choice::File { file }),
            Table { file: None, of_model: Some(of_model) } => Ok(Choice::OfModel { of_model }),
            Table { file: Some(_), of_model: Some(_) } => Err(de::Error::custom(
                "a template is from a `file` or one `of_model`, and both are given",
            )),
            Table { file: None, of_model: None } => Err(de::Error::invalid_length(0, &self)),
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Config {
            template: Choice::Name("auto".to_owned()),
            date: None,
            variables: Map::new(),
            rewritten: Rewritten::Expand,
            max_reject_share: 0.05,
        }
    }
}

impl Config {
    /// Checks what can be checked without opening anything, and reads the date.
    pub(crate) fn date(&self) -> Result<Option<Date>, Failure> {
        if !(0.0..=1.0).contains(&self.max_reject_share) {
            let share = self.max_reject_share;
            return Err(Failure::usage(format!(
                "[template] `max_reject_share` is {share}, which is not between 0 and 1"
            )));
        }
        let date = self.date.as_deref().map(Date::parse).transpose();
        date.map_err(|message| Failure::usage(format!("[template] `date`: {message}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(json: &str, expect: Result<Choice, &str>) {
        match (serde_json::from_str::<Choice>(json), expect) {
            (Ok(found), Ok(expect)) => {
                assert_eq!(found, expect);
                let again = serde_json::to_string(&found).expect("a choice is plain data");
                assert_eq!(serde_json::from_str::<Choice>(&again).expect("it reads back"), found);
            }
            (Err(e), Err(part)) => assert!(e.to_string().contains(part), "{e}"),
            (found, expect) => panic!("{json}: {found:?}, not {expect:?}"),
        }
    }

    #[test]
    fn one_template_is_chosen() {
        check(r#""chatml""#, Ok(Choice::Name("chatml".to_owned())));
        check(r#"{"file": "x.jinja"}"#, Ok(Choice::File { file: "x.jinja".into() }));
        check(r#"{"of_model": "rag"}"#, Ok(Choice::OfModel { of_model: "rag".to_owned() }));
        check(r#"{"file": "x.jinja", "of_model": "b"}"#, Err("and both are given"));
        check(r#"{"file": "x.jinja", "fiel": "b"}"#, Err("unknown field `fiel`"));
        check("{}", Err("expected the name of a template, `{ file ="));
        check("3", Err("invalid type: integer `3`, expected the name of a template"));
    }

    #[test]
    fn the_help_names_every_key() {
        let Ok(Value::Object(config)) = serde_json::to_value(Config::default()) else {
            panic!("an object");
        };
        for key in config.keys() {
            assert!(KEYS.contains(&format!("\n  {key} ")), "{key}");
        }
    }
}
