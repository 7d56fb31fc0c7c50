//! Which schema rows have, found by their columns, and why.

use serde::{Deserialize, Serialize};

use crate::json::{Fields, Shape};

/// The shapes of rows that hone reads, the most telling first: a row that fits two is the earlier
/// one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Schema {
    /// `chosen` and `rejected`, with or without a prompt.
    Preference,
    /// `messages`: a list of `role` and `content`.
    Messages,
    /// `conversations`: a list of `from` and `value`.
    Sharegpt,
    /// `instruction`, perhaps `input`, and `output`.
    Alpaca,
    /// `inputs` and `targets`.
    Flan,
    /// `prompt` and `completion`, or `question` and `answer`.
    PromptCompletion,
    /// `text`, learned whole.
    Text,
}

pub(crate) const CHOSEN: [&str; 2] = ["chosen", "chosen_messages"];
pub(crate) const REJECTED: [&str; 2] = ["rejected", "rejected_messages"];
pub(crate) const CONVERSATIONS: [&str; 2] = ["conversations", "conversation"];
pub(crate) const OUTPUT: [&str; 2] = ["output", "response"];
pub(crate) const PROMPT: [&str; 3] = ["prompt", "question", "query"];
pub(crate) const COMPLETION: [&str; 3] = ["completion", "response", "answer"];

impl Schema {
    pub(crate) const ALL: [Schema; 7] = [
        Schema::Preference,
        Schema::Messages,
        Schema::Sharegpt,
        Schema::Alpaca,
        Schema::Flan,
        Schema::PromptCompletion,
        Schema::Text,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Schema::Preference => "preference",
            Schema::Messages => "messages",
            Schema::Sharegpt => "sharegpt",
            Schema::Alpaca => "alpaca",
            Schema::Flan => "flan",
            Schema::PromptCompletion => "prompt-completion",
            Schema::Text => "text",
        }
    }

    /// The schema of that name.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Schema::ALL.into_iter().find(|schema| schema.name() == name)
    }

    /// The columns by which a row has this schema, when it has.
    fn told_by(self, row: &Fields) -> Option<Vec<&'static str>> {
        let any = |keys: &[&'static str]| keys.iter().copied().find(|key| row.get(key).is_some());
        let both = |a: &[&'static str], b: &[&'static str]| Some(vec![any(a)?, any(b)?]);
        // A list, or the text of one, as tables hold it.
        let list = |key: &&'static str| {
            row.get(key)
                .is_some_and(|value| value.shape() == Shape::List || value.0.starts_with("\"["))
        };
        match self {
            Schema::Preference => both(&CHOSEN, &REJECTED),
            Schema::Messages => list(&"messages").then(|| vec!["messages"]),
            Schema::Sharegpt => CONVERSATIONS.into_iter().find(list).map(|key| vec![key]),
            Schema::Alpaca => both(&["instruction"], &["output", "response", "instances"]),
            Schema::Flan => both(&["inputs"], &["targets"]),
            Schema::PromptCompletion => both(&PROMPT, &COMPLETION),
            // A text beside a role is one message of a conversation, not a document.
            Schema::Text => {
                let is_text = row.get("text").is_some_and(|text| text.shape() == Shape::String);
                (is_text && row.get("role").is_none()).then(|| vec!["text"])
            }
        }
    }
}

/// What looking at the first rows of a source found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Detected {
    pub(crate) schema: Schema,
    pub(crate) why: String,
}

/// Counts of rows by schema, filled with the first rows of a source.
#[derive(Debug, Default)]
pub(crate) struct Detector {
    n_rows: u64,
    /// For each of [`Schema::ALL`]: rows that have it, and the columns that say so.
    fits: [(u64, Vec<&'static str>); 7],
    columns: Vec<String>,
}

impl Detector {
    pub(crate) fn look(&mut self, row: &Fields) {
        self.n_rows += 1;
        for key in row.keys() {
            if self.columns.len() < 12 && !self.columns.iter().any(|known| known == key) {
                self.columns.push(key.to_owned());
            }
        }
        for (schema, (n, columns)) in Schema::ALL.into_iter().zip(&mut self.fits) {
            if let Some(by) = schema.told_by(row) {
                *n += 1;
                if columns.is_empty() {
                    *columns = by;
                }
            }
        }
    }

    /// The schema that most rows have, of equals the earlier one; `note` says how the columns got
    /// their names, when the file does not name them.
    ///
    /// # Errors
    /// No row has any; the text says what the rows have.
    pub(crate) fn verdict(&self, note: Option<String>) -> Result<Detected, String> {
        let mut best: Option<(Schema, &(u64, Vec<&'static str>))> = None;
        for (schema, fit) in Schema::ALL.into_iter().zip(&self.fits) {
            if fit.0 > best.map_or(0, |(_, best)| best.0) {
                best = Some((schema, fit));
            }
        }
        let Some((schema, (n, columns))) = best else {
            let columns: Vec<String> =
                self.columns.iter().map(|name| format!("`{name}`")).collect();
            return Err(match self.n_rows {
                0 => "none of the first rows is a JSON object".to_owned(),
                n => format!(
                    "no known schema fits the first {n} rows; they have {}",
                    columns.join(", ")
                ),
            });
        };
        let columns: Vec<String> = columns.iter().map(|name| format!("`{name}`")).collect();
        let why = format!("{n} of the first {} rows have {}", self.n_rows, columns.join(" and "));
        let why = note.map_or(why.clone(), |note| format!("{note}; {why}"));
        Ok(Detected { schema, why })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::Raw;

    fn check(rows: &[&str], expect: Result<(Schema, &str), &str>) {
        let mut detector = Detector::default();
        rows.iter().for_each(|row| detector.look(&Raw(row).fields().expect("an object")));
        match (detector.verdict(None), expect) {
            (Ok(found), Ok((schema, why))) => {
                assert_eq!((found.schema, found.why.as_str()), (schema, why), "{rows:?}");
            }
            (Err(found), Err(text)) => assert!(found.contains(text), "{found}"),
            (found, _) => panic!("{rows:?}: {found:?}"),
        }
    }

    #[test]
    fn each_schema_by_its_columns() {
        let one = |row: &str, schema, columns: &str| {
            check(&[row], Ok((schema, &format!("1 of the first 1 rows have {columns}"))));
        };
        one(r#"{"instruction":"a","output":"b"}"#, Schema::Alpaca, "`instruction` and `output`");
        one(
            r#"{"instruction":"a","input":"","response":"b"}"#,
            Schema::Alpaca,
            "`instruction` and `response`",
        );
        one(
            r#"{"instruction":"a","instances":[]}"#,
            Schema::Alpaca,
            "`instruction` and `instances`",
        );
        one(r#"{"conversations":[]}"#, Schema::Sharegpt, "`conversations`");
        one(r#"{"messages":[]}"#, Schema::Messages, "`messages`");
        one(r#"{"messages":"[]"}"#, Schema::Messages, "`messages`");
        one(
            r#"{"prompt":"a","completion":"b"}"#,
            Schema::PromptCompletion,
            "`prompt` and `completion`",
        );
        one(
            r#"{"question":"a","answer":"b"}"#,
            Schema::PromptCompletion,
            "`question` and `answer`",
        );
        one(r#"{"inputs":"a","targets":"b"}"#, Schema::Flan, "`inputs` and `targets`");
        one(r#"{"text":"a"}"#, Schema::Text, "`text`");
        one(r#"{"chosen":"a","rejected":"b"}"#, Schema::Preference, "`chosen` and `rejected`");
    }

    #[test]
    fn a_row_that_fits_two_is_the_more_telling_one() {
        let both = r#"{"messages":[],"text":"a","prompt":"p","completion":"c"}"#;
        check(&[both], Ok((Schema::Messages, "1 of the first 1 rows have `messages`")));
        let predictions = r#"{"prompt":"p","instruction":"i","input":"x","response":"r"}"#;
        check(
            &[predictions],
            Ok((Schema::Alpaca, "1 of the first 1 rows have `instruction` and `response`")),
        );
        let dpo = r#"{"conversations":[],"chosen":{},"rejected":{}}"#;
        check(
            &[dpo],
            Ok((Schema::Preference, "1 of the first 1 rows have `chosen` and `rejected`")),
        );
    }

    #[test]
    fn the_majority_decides_and_nothing_is_said_so() {
        let (a, t) = (r#"{"instruction":"a","output":"b"}"#, r#"{"text":"t"}"#);
        check(
            &[t, a, a],
            Ok((Schema::Alpaca, "2 of the first 3 rows have `instruction` and `output`")),
        );
        check(
            &[r#"{"text":"a","role":"user"}"#],
            Err("no known schema fits the first 1 rows; they have `text`, `role`"),
        );
        check(&[r#"{"prompt":"only"}"#, "{}"], Err("they have `prompt`"));
        check(&[], Err("none of the first rows is a JSON object"));
    }
}
