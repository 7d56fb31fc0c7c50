//! What the stage says about its work: accounts while it reads, the gate, the report.

use std::collections::BTreeMap;

use hone_cli::Failure;
use hone_schema::{Ledger, SourceLedger, Split};
use serde_json::{Value, json};

use crate::convert::Row;
use crate::fault::Fault;
use crate::plan::Plan;
use crate::run::Opened;
use crate::select::{Selection, Stats};

/// Different end markers that are counted.
const MARKERS_MAX: usize = 16;

/// The account of a source while it is read.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    /// Rejected rows only; what passed is entered once its fate is known.
    pub(crate) ledger: SourceLedger,
    pub(crate) n_passed: u64,
    /// Rejected rows that are faults, for the gate.
    pub(crate) n_faults: u64,
    /// The first row of each reason.
    first: BTreeMap<&'static str, String>,
    /// Rows by the end-of-text marker with which their answer ends.
    markers: BTreeMap<String, u64>,
    /// Things the user should know about this source.
    pub(crate) notes: Vec<String>,
}

impl Tally {
    pub(crate) fn pass(&mut self, row: &Row) {
        self.n_passed += 1;
        if let Some(marker) = row.end_marker()
            && (self.markers.len() < MARKERS_MAX || self.markers.contains_key(marker))
        {
            *self.markers.entry(marker.to_owned()).or_default() += 1;
        }
    }

    pub(crate) fn reject(&mut self, fault: &Fault, file: &str, line: u64) {
        let reason = fault.reason.as_str();
        self.ledger.reject(reason);
        self.n_faults += u64::from(fault.reason.is_fault());
        self.first.entry(reason).or_insert_with(|| format!("{file}:{line}: {}", fault.detail));
    }

    pub(crate) fn n_rows(&self) -> u64 {
        self.n_passed + self.ledger.rows_in
    }

    /// The reasons with their counts, most frequent first, each with its first row.
    pub(crate) fn reasons(&self) -> Vec<(&'static str, u64, &str)> {
        let count = |reason: &str| self.ledger.rejected.get(reason).copied().unwrap_or_default();
        let mut all: Vec<_> = self
            .first
            .iter()
            .map(|(reason, first)| (*reason, count(reason), first.as_str()))
            .collect();
        all.sort_by_key(|(_, n, _)| std::cmp::Reverse(*n));
        all
    }

    /// The most frequent reason in words.
    fn mostly(&self) -> String {
        match self.reasons().first() {
            Some((reason, n, first)) => format!("{n} of them `{reason}`, the first at {first}"),
            None => String::new(),
        }
    }

    /// # Errors
    /// The source has no row that can be used.
    pub(crate) fn refuse_if_nothing_is_left(&self, opened: &Opened) -> Result<(), Failure> {
        let name = &opened.source.name;
        if self.n_rows() == 0 {
            return Err(Failure::input(format!("source `{name}`: there are no rows in it")));
        }
        if self.n_passed > 0 {
            return Ok(());
        }
        let (n, schema) = (self.n_rows(), opened.detected.schema.name());
        let text = format!(
            "source `{name}`: none of its {n} rows can be used as {schema}; {}",
            self.mostly()
        );
        Err(Failure::input(text).hint(format!(
            "`hone-ingest inspect {}` shows rows and reasons",
            opened.files.first().map(|file| file.display().to_string()).unwrap_or_default()
        )))
    }

    /// Notes what is no fault but rarely meant.
    pub(crate) fn remark(&mut self, opened: &Opened) {
        let often = self.markers.iter().find(|(_, n)| **n * 2 >= self.n_passed);
        if let Some((marker, n)) = often {
            let total = self.n_passed;
            self.notes.push(format!(
                "{n} of {total} answers end in the text `{marker}`, which will be learned as text; \
                 `strip_suffix = \"{marker}\"` takes it off"
            ));
        }
        if let Some(n) = self.ledger.rejected.get(crate::fault::Reason::Undesired.as_str()) {
            let schema = opened.detected.schema.name();
            self.notes.push(format!(
                "{n} {schema} rows are left out: labelled false, so not to be learned"
            ));
        }
    }
}

/// Sources with more rejected rows than the gate lets through, in words.
pub(crate) fn gate(plan: &Plan, sources: &[Opened], tallies: &[Tally]) -> Vec<String> {
    let mut failed = Vec::new();
    for (opened, tally) in sources.iter().zip(tallies) {
        let (faults, rows) = (tally.n_faults, tally.n_rows());
        let share = faults as f64 / rows as f64;
        if share > plan.max_reject_share {
            failed.push(format!(
                "source `{}`: {faults} of {rows} rows are rejected \
                 ({:.1} %, allowed are {:.1} %); {}",
                opened.source.name,
                share * 100.0,
                plan.max_reject_share * 100.0,
                tally.mostly()
            ));
        }
    }
    failed
}

/// The stage's report.
pub(crate) fn report(
    plan: &Plan,
    sources: &[Opened],
    tallies: &[Tally],
    selection: &Selection,
    failed: &[String],
) -> Value {
    let one = |(idx, (opened, tally)): (usize, (&Opened, &Tally))| {
        let stats = |split| selection.stats.get(&(idx as u32, split)).copied().unwrap_or_default();
        let splits: serde_json::Map<String, Value> = [Split::Train, Split::Eval, Split::Test]
            .map(|split| (split.to_string(), counts(stats(split))))
            .into_iter()
            .collect();
        let reasons: Vec<Value> = tally
            .reasons()
            .into_iter()
            .map(|(reason, n, first)| json!({"reason": reason, "rows": n, "first": first}))
            .collect();
        json!({
            "name": opened.source.name,
            "schema": opened.detected.schema.name(),
            "why": opened.detected.why,
            "files": opened.files.len(),
            "rows": tally.n_rows(),
            "replay": opened.source.replay,
            "splits": splits,
            "rejected": reasons,
            "notes": tally.notes,
        })
    };
    let replay = plan.sources.iter().any(|s| s.replay).then(|| {
        json!({
            "share": plan.replay_share,
            "rows_asked": selection.replay.0,
            "rows_there": selection.replay.1,
        })
    });
    json!({
        "sources": sources.iter().zip(tallies).enumerate().map(one).collect::<Vec<_>>(),
        "repeated_ids": selection.repeated_ids,
        "replay": replay,
        "gate": {"max_reject_share": plan.max_reject_share, "failed": failed},
    })
}

fn counts(stats: Stats) -> Value {
    json!({
        "rows": stats.rows,
        "messages": stats.messages,
        "bytes": stats.bytes,
        "longest_row_bytes": stats.longest,
    })
}

/// One line for people.
pub(crate) fn summary(ledger: &Ledger, selection: &Selection) -> String {
    let in_split = |split| -> u64 {
        selection.stats.iter().filter(|((_, s), _)| *s == split).map(|(_, stats)| stats.rows).sum()
    };
    let mut text = format!(
        "{} of {} rows kept: {} train, {} eval, {} test",
        ledger.rows_out(),
        ledger.rows_in(),
        in_split(Split::Train),
        in_split(Split::Eval),
        in_split(Split::Test)
    );
    let reasons = ledger.rejected();
    if !reasons.is_empty() {
        let reasons: Vec<String> =
            reasons.iter().map(|(reason, n)| format!("{n} {reason}")).collect();
        text.push_str(&format!("; not kept: {}", reasons.join(", ")));
    }
    text
}
