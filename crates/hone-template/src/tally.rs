//! What became of every row: counted where rows are rendered, added up where they are written.

use std::collections::BTreeMap;

use hone_cli::{Context, Exit, Failure, Outcome};
use hone_schema::{Conversation, Ledger, Reject};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::args::Config;
use crate::rows;
use crate::run::DATE_HINT;

/// Counts of some rows.
#[derive(Debug, Default, Deserialize, Serialize)]
pub(crate) struct Tally {
    ledger: Ledger,
    notes: BTreeMap<String, u64>,
    /// The first reject of each reason, for people.
    examples: BTreeMap<String, String>,
    bytes: u64,
}

impl Tally {
    /// Counts a row that was rendered, and the samples that it became.
    pub(crate) fn pass(&mut self, row: &Conversation, done: &[rows::Done]) {
        let account = self.ledger.source(&row.source);
        account.pass();
        let n_added = done.len().saturating_sub(1) as u64;
        if n_added > 0 {
            account.rows_out += n_added;
            *account.added.entry("expanded".to_owned()).or_default() += n_added;
        }
        self.bytes += done.iter().map(|(rendered, _)| rendered.text.len() as u64).sum::<u64>();
        let mut notes: Vec<&str> = done.iter().flat_map(|(_, notes)| notes.clone()).collect();
        notes.sort_unstable();
        notes.dedup();
        notes.into_iter().for_each(|note| *self.notes.entry(note.to_owned()).or_default() += 1);
    }

    /// Counts a row that was not.
    pub(crate) fn reject(&mut self, reject: &Reject) {
        self.ledger.source(&reject.source).reject(&reject.reason);
        self.examples
            .entry(reject.reason.clone())
            .or_insert_with(|| format!("row `{}`: {}", reject.file, reject.detail));
    }

    /// Marks the sources that the conversations have as replay.
    pub(crate) fn mark_replay(&mut self, conversations: &Ledger) {
        self.ledger.mark_replay(conversations);
    }

    /// Adds the counts of rows that come behind.
    pub(crate) fn add(&mut self, other: Tally) {
        self.ledger.add(other.ledger);
        self.bytes += other.bytes;
        for (note, n) in other.notes {
            *self.notes.entry(note).or_default() += n;
        }
        for (reason, example) in other.examples {
            self.examples.entry(reason).or_insert(example);
        }
    }

    /// The report, the gate and what people should not miss.
    ///
    /// # Errors
    /// Not one row was rendered.
    pub(crate) fn outcome(self, ctx: &Context, config: &Config) -> Result<Outcome, Failure> {
        let (n_in, n_out) = (self.ledger.rows_in(), self.ledger.rows_out());
        let n_rejected: u64 = self.ledger.rejected().values().sum();
        for (reason, example) in &self.examples {
            ctx.warn(format!("template: {reason}, for example {example}"));
            if example.contains("strftime_now") {
                ctx.note(DATE_HINT);
            }
        }
        if n_out == 0 && n_in > 0 {
            return Err(Failure::input(format!("none of {n_in} rows can be rendered"))
                .hint("the first row of each reason is shown above"));
        }
        let share = n_rejected as f64 / n_in.max(1) as f64;
        let exit = if share > config.max_reject_share {
            ctx.warn(format!(
                "template: {n_rejected} of {n_in} rows rejected, more than `max_reject_share` = {}",
                config.max_reject_share
            ));
            Exit::GateFailed
        } else {
            Exit::Done
        };
        let n_added: u64 = self.ledger.sources.values().flat_map(|s| s.added.values()).sum();
        let expanded = match n_added {
            0 => String::new(),
            n => format!(" (of them {n} for earlier answers that the template rewrites)"),
        };
        let mut report = json!({
            "rows_in": n_in,
            "rows_out": n_out,
            "rows_added": n_added,
            "rejected": n_rejected,
            "text_bytes": self.bytes,
        });
        report["notes"] = Value::from_iter(self.notes.iter().map(|(k, v)| (k.clone(), *v)));
        let notes: String = self.notes.iter().map(|(note, n)| format!(", {note}: {n}")).collect();
        Ok(Outcome {
            ledger: self.ledger,
            report,
            exit,
            summary: format!("{n_out} rows rendered{expanded}, {n_rejected} rejected{notes}"),
        })
    }
}
