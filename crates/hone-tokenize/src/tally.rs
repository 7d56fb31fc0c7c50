//! What became of every row and token: the ledger and the report.

use std::collections::{BTreeMap, BTreeSet};

use hone_cli::{Context, Failure};
use hone_schema::{Ledger, Pack, Split};
use hone_tokens::{PromptIds, Refusal, Row};
use serde_json::{Value, json};

/// Counts of one split.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct SplitTally {
    rows: u64,
    packs: u64,
    tokens: u64,
    trained: u64,
    longest: u64,
    largest_pack: u64,
}

/// Counts of the stage.
pub(crate) struct Tally {
    /// Rows and tokens by source.
    pub(crate) ledger: Ledger,
    splits: BTreeMap<&'static str, SplitTally>,
    stop_ids: BTreeSet<u32>,
    turns: u64,
    truncated: u64,
    prompts: u64,
    /// Prompts whose ids are not the first ids of their rows, and the first such row.
    off_prompts: u64,
    off_prompt: Option<String>,
}

impl Tally {
    /// Nothing counted; `eos` are ids that end a text by the model's own word.
    pub(crate) fn new(eos: &[u32]) -> Self {
        Tally {
            ledger: Ledger::default(),
            splits: BTreeMap::new(),
            stop_ids: eos.iter().copied().collect(),
            turns: 0,
            truncated: 0,
            prompts: 0,
            off_prompts: 0,
            off_prompt: None,
        }
    }

    /// Counts a row that goes out.
    pub(crate) fn pass(&mut self, row: &Row, prompt: Option<&PromptIds>) {
        let now = row.counts();
        let source = self.ledger.source(&row.source);
        source.pass();
        source.tokens.get_or_insert_default().count(
            (row.before.tokens, row.before.trained),
            (now.tokens, now.trained),
            "truncated",
        );
        let split = self.splits.entry(row.split.as_str()).or_default();
        split.rows += 1;
        split.tokens += now.tokens;
        split.trained += now.trained;
        split.longest = split.longest.max(now.tokens);
        self.stop_ids.extend(&row.stops);
        self.turns += u64::from(row.turns);
        self.truncated += u64::from(now.tokens < row.before.tokens);
        if let Some(prompt) = prompt {
            self.prompts += 1;
            if !prompt.is_prefix {
                self.off_prompts += 1;
                self.off_prompt.get_or_insert_with(|| row.id.clone());
            }
        }
    }

    /// Counts a row that does not.
    pub(crate) fn refuse(&mut self, source: &str, refusal: &Refusal) {
        let account = self.ledger.source(source);
        account.reject(refusal.reason.as_str());
        let Refusal { reason, counts, .. } = refusal;
        account.tokens.get_or_insert_default().count(
            (counts.tokens, counts.trained),
            (0, 0),
            reason.as_str(),
        );
    }

    /// Rows that go out.
    pub(crate) fn rows(&self) -> u64 {
        self.ledger.rows_out()
    }

    /// The ids that end a text, sorted.
    pub(crate) fn stop_ids(&self) -> &BTreeSet<u32> {
        &self.stop_ids
    }

    /// Counts packs as they are written.
    pub(crate) fn packs(&mut self, split: Split, packs: &[Pack]) {
        let tally = self.splits.entry(split.as_str()).or_default();
        tally.packs += packs.len() as u64;
        let largest = packs.iter().map(|pack| pack.input_ids.len() as u64).max();
        tally.largest_pack = tally.largest_pack.max(largest.unwrap_or(0));
    }

    /// What people should not miss.
    pub(crate) fn warn(&self, ctx: &Context, max_len: u32) {
        if let Some(id) = &self.off_prompt {
            ctx.warn(format!(
                "{} of {} prompts end inside a token of their rows (`{id}` is the first): the model is asked in other \
                 tokens than it is trained on",
                self.off_prompts, self.prompts
            ));
        }
        if self.truncated > 0 {
            ctx.warn(format!(
                "{} rows are cut at {max_len} tokens; the ledger counts what is lost",
                self.truncated
            ));
        }
        if self.stop_ids.is_empty() {
            ctx.warn("no token ends a response or a text: generation will run to its limit");
        }
    }

    /// The report.
    pub(crate) fn report(&self, vocab_size: usize, max_len: u32) -> Value {
        let splits: serde_json::Map<String, Value> = self
            .splits
            .iter()
            .map(|(name, split)| {
                let space = split.packs * u64::from(max_len);
                let value = json!({
                    "rows": split.rows,
                    "packs": split.packs,
                    "fill": split.tokens as f64 / space as f64,
                    "tokens": split.tokens,
                    "trained_tokens": split.trained,
                    "longest_row": split.longest,
                    "longest_pack": split.largest_pack,
                });
                ((*name).to_owned(), value)
            })
            .collect();
        json!({
            "splits": splits,
            "truncated_rows": self.truncated,
            "prompts": {"rows": self.prompts, "not_a_prefix": self.off_prompts},
            "stop_ids": self.stop_ids,
            "vocab_size": vocab_size,
            // Every row was looked at; what did not hold is in the ledger by reason.
            "certificate": {
                "rows": self.rows(),
                "trained_turns": self.turns,
                "refused": self.ledger.rejected(),
            },
        })
    }

    /// One line for people.
    pub(crate) fn summary(&self, max_len: u32) -> String {
        let sum = |of: fn(&SplitTally) -> u64| self.splits.values().map(of).sum::<u64>();
        let (packs, tokens) = (sum(|s| s.packs), sum(|s| s.tokens));
        let refused: u64 = self.ledger.rejected().values().sum();
        format!(
            "{} rows ({refused} refused), {tokens} tokens, {} trained, {packs} packs of {max_len}, {:.1} % full",
            self.rows(),
            sum(|s| s.trained),
            100.0 * tokens as f64 / (packs * u64::from(max_len)) as f64,
        )
    }
}

/// Documents in and out of packing, to be compared: rows and tokens of every kind must come out as they went in.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Conserved {
    docs: BTreeMap<String, u64>,
    tokens: u64,
    trained: u64,
}

impl Conserved {
    /// Counts rows before they are packed.
    pub(crate) fn rows(rows: &[Row]) -> Self {
        let mut all = Conserved::default();
        for row in rows {
            *all.docs.entry(row.id.clone()).or_default() += 1;
            all.tokens += row.counts().tokens;
            all.trained += row.counts().trained;
        }
        all
    }

    /// Counts packs.
    pub(crate) fn add(&mut self, packs: &[Pack]) {
        for pack in packs {
            for doc in &pack.docs {
                *self.docs.entry(doc.row_id.clone()).or_default() += 1;
            }
            self.tokens += pack.input_ids.len() as u64;
            self.trained += pack.n_trained();
        }
    }

    /// Whether nothing was lost or doubled.
    pub(crate) fn check(&self, packed: &Conserved, split: Split) -> Result<(), Failure> {
        if self == packed {
            return Ok(());
        }
        let message = format!(
            "packing {split} lost or doubled rows: {} tokens in, {} out",
            self.tokens, packed.tokens
        );
        Err(Failure::environment(message).hint("this is a fault of hone; please report it"))
    }
}
