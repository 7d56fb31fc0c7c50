//! What became of every row and token: the ledger and the report.

use std::collections::{BTreeMap, BTreeSet};

use hone_cli::Context;
use hone_cli::text::grouped;
use hone_schema::{Ledger, Pack, Rendered, Split};
use hone_tokens::{PromptIds, Reason, Refusal, Row, Taken};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Why rows are more than came in.
const PIECES: &str = "pieces of a long row";

/// Why tokens are missing from a row that goes out.
const TRUNCATED: &str = "truncated";

/// Why a token of a piece is not trained any more: nothing stands before it that could predict it.
const FIRST_OF_PIECE: &str = "first of a piece";

/// Counts of one split.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
struct SplitTally {
    rows: u64,
    packs: u64,
    tokens: u64,
    trained: u64,
    /// Trained tokens by the role of the message that they are of.
    trained_by_role: BTreeMap<String, u64>,
    longest: u64,
    largest_pack: u64,
    /// Share of padding in padded batches, by their size; where rows are not packed.
    padding: Vec<(usize, f64)>,
}

/// Counts of the stage, or of a batch.
#[derive(Debug, Default, Deserialize, Serialize)]
pub(crate) struct Tally {
    /// Rows and tokens by source.
    pub(crate) ledger: Ledger,
    splits: BTreeMap<String, SplitTally>,
    stop_ids: BTreeSet<u32>,
    turns: u64,
    truncated: u64,
    /// Rows that do not hold what the certificate asks.
    violations: u64,
    /// Rows that lost something, by source and by reason.
    losses: BTreeMap<String, BTreeMap<String, u64>>,
    prompts: u64,
    /// Prompts whose ids are not the first ids of their rows, and the first such row.
    off_prompts: u64,
    off_prompt: Option<String>,
    /// Rows by the roles that the configuration asks for by name.
    roles: BTreeMap<String, u64>,
}

impl Tally {
    /// Nothing counted; `eos` are ids that end a text by the model's own word.
    pub(crate) fn new(eos: &[u32]) -> Self {
        Tally { stop_ids: eos.iter().copied().collect(), ..Tally::default() }
    }

    /// Adds the counts of rows that come behind.
    pub(crate) fn add(&mut self, other: Tally) {
        self.ledger.add(other.ledger);
        for (name, theirs) in other.splits {
            let ours = self.splits.entry(name).or_default();
            ours.rows += theirs.rows;
            ours.tokens += theirs.tokens;
            ours.trained += theirs.trained;
            for (role, n) in theirs.trained_by_role {
                *ours.trained_by_role.entry(role).or_default() += n;
            }
            ours.longest = ours.longest.max(theirs.longest);
        }
        self.stop_ids.extend(other.stop_ids);
        self.turns += other.turns;
        self.truncated += other.truncated;
        self.violations += other.violations;
        for (source, reasons) in other.losses {
            let ours = self.losses.entry(source).or_default();
            reasons.into_iter().for_each(|(why, n)| *ours.entry(why).or_default() += n);
        }
        self.prompts += other.prompts;
        self.off_prompts += other.off_prompts;
        self.off_prompt = self.off_prompt.take().or(other.off_prompt);
        for (role, n) in other.roles {
            *self.roles.entry(role).or_default() += n;
        }
    }

    /// Notes which of the roles that are asked for by name a row has, whatever becomes of it.
    pub(crate) fn see_roles(&mut self, asked: &[String], row: &Rendered) {
        for role in asked {
            let is_there = row.spans.iter().any(|span| span.role == *role);
            *self.roles.entry(role.clone()).or_default() += u64::from(is_there);
        }
    }

    /// Roles that are to be trained and that nobody has: most likely another spelling.
    pub(crate) fn warn_of_roles(&self, ctx: &Context) {
        for (role, _) in self.roles.iter().filter(|(_, n)| **n == 0) {
            ctx.warn(format!("tokenize.train_on names the role `{role}`, which no row has"));
        }
    }

    /// Counts a row that goes out, whole, cut or in pieces.
    pub(crate) fn pass(&mut self, taken: &Taken, prompt: Option<&PromptIds>) {
        let Some(first) = taken.rows.first() else {
            return;
        };
        let account = self.ledger.source(&first.source);
        account.rows_in += 1;
        account.rows_out += taken.rows.len() as u64;
        let n_more = (taken.rows.len() + taken.refused.len() - 1) as u64;
        if n_more > 0 {
            *account.added.entry(PIECES.to_owned()).or_default() += n_more;
        }
        for refusal in &taken.refused {
            let reason = refusal.reason.as_str().to_owned();
            *self.ledger.source(&first.source).rejected.entry(reason).or_default() += 1;
            self.lose(&first.source, refusal);
        }
        taken.rows.iter().for_each(|row| self.count(row));
        if let Some(prompt) = prompt {
            self.prompts += 1;
            if !prompt.is_prefix {
                self.off_prompts += 1;
                self.off_prompt.get_or_insert_with(|| first.id.clone());
            }
        }
    }

    /// Counts the tokens of a row or of a piece of one.
    fn count(&mut self, row: &Row) {
        let now = row.counts();
        let lost = if now.tokens < row.before.tokens { TRUNCATED } else { FIRST_OF_PIECE };
        self.ledger.source(&row.source).tokens.get_or_insert_default().count(
            (row.before.tokens, row.before.trained),
            (now.tokens, now.trained),
            lost,
        );
        if now != row.before {
            self.lost(&row.source, lost);
        }
        let split = self.splits.entry(row.split.to_string()).or_default();
        split.rows += 1;
        split.tokens += now.tokens;
        split.trained += now.trained;
        for (role, n) in row.roles.trained(&row.weights).filter(|(_, n)| *n > 0) {
            match split.trained_by_role.get_mut(role) {
                Some(sum) => *sum += n,
                None => _ = split.trained_by_role.insert(role.to_owned(), n),
            }
        }
        split.longest = split.longest.max(now.tokens);
        self.stop_ids.extend(&row.stops);
        self.turns += u64::from(row.turns);
        self.truncated += u64::from(lost == TRUNCATED);
    }

    /// Counts a row that does not.
    pub(crate) fn refuse(&mut self, source: &str, refusal: &Refusal) {
        self.ledger.source(source).reject(refusal.reason.as_str());
        self.violations += u64::from(refusal.reason.is_violation());
        self.lose(source, refusal);
    }

    /// Counts the tokens of what does not go out.
    fn lose(&mut self, source: &str, Refusal { reason, counts, .. }: &Refusal) {
        self.ledger.source(source).tokens.get_or_insert_default().count(
            (counts.tokens, counts.trained),
            (0, 0),
            reason.as_str(),
        );
        self.lost(source, reason.as_str());
    }

    fn lost(&mut self, source: &str, reason: &str) {
        let reasons = self.losses.entry(source.to_owned()).or_default();
        *reasons.entry(reason.to_owned()).or_default() += 1;
    }

    /// Notes how much padding a split's rows would need that are not packed.
    pub(crate) fn padding(&mut self, split: Split, shares: &[(usize, f64)]) {
        self.splits.entry(split.to_string()).or_default().padding = shares.to_vec();
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
        let tally = self.splits.entry(split.to_string()).or_default();
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

    /// What is wrong when more than `max_share` of the rows do not hold what the certificate asks.
    pub(crate) fn gate(&self, max_share: f64) -> Option<String> {
        let rows = self.ledger.rows_in();
        let share = self.violations as f64 / rows.max(1) as f64;
        (share > max_share).then(|| {
            let by_reason: Vec<String> = self
                .ledger
                .rejected()
                .iter()
                .filter(|(reason, _)| is_violation(reason))
                .map(|(reason, n)| format!("{} `{reason}`", grouped(*n)))
                .collect();
            format!(
                "{} of {} rows do not hold what the certificate asks ({:.1} %, at most {:.1} % may): {}; \
                 `hone-tokenize show` prints a row with the reason, tokenize.max_violation_share is the bar",
                grouped(self.violations),
                grouped(rows),
                100.0 * share,
                100.0 * max_share,
                by_reason.join(", ")
            )
        })
    }

    /// The report; `failed` is what the gate says.
    pub(crate) fn report(&self, vocab_size: usize, max_len: u32, failed: Option<&str>) -> Value {
        let splits: serde_json::Map<String, Value> = self
            .splits
            .iter()
            .map(|(name, split)| {
                let space = split.packs * u64::from(max_len);
                let mut value = json!({
                    "rows": split.rows,
                    "packs": split.packs,
                    "fill": split.tokens as f64 / space as f64,
                    "tokens": split.tokens,
                    "trained_tokens": split.trained,
                    "trained_tokens_by_role": split.trained_by_role,
                    "longest_row": split.longest,
                    "longest_pack": split.largest_pack,
                });
                if !split.padding.is_empty() {
                    let shares = split.padding.iter().map(|(n, share)| (n.to_string(), *share));
                    value["padding_by_batch_size"] = shares.collect();
                }
                (name.clone(), value)
            })
            .collect();
        json!({
            "gate": {"failed": failed.into_iter().collect::<Vec<_>>()},
            "splits": splits,
            "truncated_rows": self.truncated,
            "prompts": {"rows": self.prompts, "not_a_prefix": self.off_prompts},
            "stop_ids": self.stop_ids,
            "rows_by_trained_role": self.roles,
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
            "{} rows ({refused} refused), {tokens} tokens, {} trained, {packs} packs of {max_len}, {:.1} % full{}",
            self.rows(),
            sum(|s| s.trained),
            100.0 * tokens as f64 / (packs * u64::from(max_len)) as f64,
            self.largest_loss().unwrap_or_default(),
        )
    }

    /// Where most trained tokens were lost, and why, in words.
    fn largest_loss(&self) -> Option<String> {
        let of = |lost: &BTreeMap<String, u64>, reason: &str| lost.get(reason).copied();
        let losses = self
            .losses
            .iter()
            .flat_map(|(source, reasons)| reasons.iter().map(move |(why, n)| (source, why, n)));
        let losses = losses.map(|(source, reason, rows)| {
            let account = self.ledger.sources.get(source).and_then(|s| s.tokens.as_ref());
            let tokens = account.and_then(|t| of(&t.tokens_lost, reason)).unwrap_or(0);
            let trained = account.and_then(|t| of(&t.trained_lost, reason)).unwrap_or(0);
            (trained, tokens, *rows, source, reason)
        });
        let (trained, tokens, rows, source, reason) =
            losses.max_by_key(|(trained, tokens, rows, ..)| (*trained, *tokens, *rows))?;
        Some(format!(
            "; source {source}: {} rows, {} tokens, {} trained tokens lost to `{reason}`",
            grouped(rows),
            grouped(tokens),
            grouped(trained)
        ))
    }
}

fn is_violation(reason: &str) -> bool {
    Reason::ALL.iter().any(|known| known.as_str() == reason && known.is_violation())
}

#[cfg(test)]
mod tests {
    use super::*;
    use hone_tokens::Counts;

    fn refuse(tally: &mut Tally, source: &str, reason: Reason, tokens: u64, trained: u64) {
        let counts = Counts { tokens, trained };
        tally.refuse(source, &Refusal { reason, detail: String::new(), counts });
    }

    #[test]
    fn the_largest_loss_is_the_one_of_most_trained_tokens() {
        let mut tally = Tally::new(&[]);
        assert_eq!(tally.largest_loss(), None);
        refuse(&mut tally, "b", Reason::NoTrainedToken, 9000, 0);
        refuse(&mut tally, "a", Reason::TooLong, 4000, 3000);
        refuse(&mut tally, "a", Reason::TooLong, 310, 1);
        let text = "; source a: 2 rows, 4,310 tokens, 3,001 trained tokens lost to `too long`";
        assert_eq!(tally.largest_loss().as_deref(), Some(text));
        assert!(tally.ledger.check().is_ok());
    }

    #[test]
    fn too_many_violations_fail_and_long_rows_are_none() {
        let mut tally = Tally::new(&[]);
        for reason in [Reason::TooLong, Reason::NotTheLast, Reason::TrainedElsewhere] {
            (0..3).for_each(|_| refuse(&mut tally, "a", reason, 9, 9));
        }
        assert_eq!(tally.gate(0.0), None);
        refuse(&mut tally, "a", Reason::NoStop, 9, 9);
        assert_eq!(tally.gate(0.1), None);
        let failed = tally.gate(0.05).unwrap();
        assert!(failed.starts_with("1 of 10 rows do not hold"), "{failed}");
        assert!(failed.contains("(10.0 %, at most 5.0 % may): 1 `no stop marker`"), "{failed}");
    }
}
