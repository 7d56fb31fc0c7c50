//! The ledger: where every row and every token went.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

/// Accounts of one stage, by source name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ledger {
    /// One account a source.
    pub sources: BTreeMap<String, SourceLedger>,
}

/// Rows of one source: `rows_in + sum(added) = rows_out + sum(rejected)`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceLedger {
    /// Its rows are replay: mixed in so that what was learned before is not forgotten, whatever their form.
    #[serde(default, skip_serializing_if = "is_false")]
    pub replay: bool,
    /// Rows that came in.
    pub rows_in: u64,
    /// Rows that came into being here, by reason: a conversation as one sample a turn, a long row in pieces.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub added: BTreeMap<String, u64>,
    /// Rows that went out.
    pub rows_out: u64,
    /// Rows that did not, by reason.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub rejected: BTreeMap<String, u64>,
    /// Tokens, once there are tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<TokenLedger>,
}

/// Tokens of one source: in = out + sum(lost), for all tokens and for trained ones.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenLedger {
    /// Tokens of all rows that came in.
    pub tokens_in: u64,
    /// Tokens in the packs.
    pub tokens_out: u64,
    /// Tokens that are not, by reason.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tokens_lost: BTreeMap<String, u64>,
    /// Tokens with a loss weight above 0, of all rows that came in.
    pub trained_in: u64,
    /// Tokens with a loss weight above 0, in the packs.
    pub trained_out: u64,
    /// Trained tokens that are not in the packs, by reason.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub trained_lost: BTreeMap<String, u64>,
}

/// An account that does not add up.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "source `{source_name}`: {n_in} {what} in, but {n_out} out and {n_lost} accounted for as lost"
)]
pub struct LedgerError {
    /// The source.
    pub source_name: String,
    /// `rows`, `tokens` or `trained tokens`.
    pub what: &'static str,
    /// How many came in.
    pub n_in: u64,
    /// How many went out.
    pub n_out: u64,
    /// How many have a reason for not going out.
    pub n_lost: u64,
}

impl Ledger {
    /// The account of `source`, made when it is not there.
    pub fn source(&mut self, source: &str) -> &mut SourceLedger {
        self.sources.entry(source.to_owned()).or_default()
    }

    /// Adds the accounts of other rows.
    pub fn add(&mut self, other: Ledger) {
        for (name, theirs) in other.sources {
            let ours = self.source(&name);
            ours.replay |= theirs.replay;
            ours.rows_in += theirs.rows_in;
            ours.rows_out += theirs.rows_out;
            add_all(&mut ours.added, theirs.added);
            add_all(&mut ours.rejected, theirs.rejected);
            if let Some(theirs) = theirs.tokens {
                let ours = ours.tokens.get_or_insert_default();
                ours.tokens_in += theirs.tokens_in;
                ours.tokens_out += theirs.tokens_out;
                add_all(&mut ours.tokens_lost, theirs.tokens_lost);
                ours.trained_in += theirs.trained_in;
                ours.trained_out += theirs.trained_out;
                add_all(&mut ours.trained_lost, theirs.trained_lost);
            }
        }
    }

    /// Names of the sources whose rows are replay.
    pub fn replay(&self) -> BTreeSet<&str> {
        let replay = self.sources.iter().filter(|(_, source)| source.replay);
        replay.map(|(name, _)| name.as_str()).collect()
    }

    /// Marks as replay the sources that the stage before has as replay, where rows of them came in.
    pub fn mark_replay(&mut self, before: &Ledger) {
        for name in before.replay() {
            if let Some(source) = self.sources.get_mut(name) {
                source.replay = true;
            }
        }
    }

    /// Whether every account adds up.
    ///
    /// # Errors
    /// The first account that does not.
    pub fn check(&self) -> Result<(), LedgerError> {
        for (name, source) in &self.sources {
            let check = |what, n_in: u64, n_out: u64, lost: &BTreeMap<String, u64>| {
                let n_lost = lost.values().fold(0u64, |sum, n| sum.saturating_add(*n));
                if n_out.checked_add(n_lost) == Some(n_in) {
                    Ok(())
                } else {
                    Err(LedgerError { source_name: name.clone(), what, n_in, n_out, n_lost })
                }
            };
            let n_added = source.added.values().fold(0u64, |sum, n| sum.saturating_add(*n));
            let n_in = source.rows_in.saturating_add(n_added);
            check("rows", n_in, source.rows_out, &source.rejected)?;
            if let Some(t) = &source.tokens {
                check("tokens", t.tokens_in, t.tokens_out, &t.tokens_lost)?;
                check("trained tokens", t.trained_in, t.trained_out, &t.trained_lost)?;
            }
        }
        Ok(())
    }

    /// Rows that went out, over all sources.
    pub fn rows_out(&self) -> u64 {
        self.sources.values().map(|s| s.rows_out).sum()
    }

    /// Rows that came in, over all sources.
    pub fn rows_in(&self) -> u64 {
        self.sources.values().map(|s| s.rows_in).sum()
    }

    /// Rejected rows by reason, over all sources.
    pub fn rejected(&self) -> BTreeMap<&str, u64> {
        let mut all = BTreeMap::new();
        for (reason, n) in self.sources.values().flat_map(|s| &s.rejected) {
            *all.entry(reason.as_str()).or_default() += n;
        }
        all
    }
}

fn is_false(value: &bool) -> bool {
    !value
}

fn add_all(ours: &mut BTreeMap<String, u64>, theirs: BTreeMap<String, u64>) {
    for (reason, n) in theirs {
        *ours.entry(reason).or_default() += n;
    }
}

impl SourceLedger {
    /// Counts one row that came in and does not go out.
    pub fn reject(&mut self, reason: &str) {
        self.rows_in += 1;
        *self.rejected.entry(reason.to_owned()).or_default() += 1;
    }

    /// Counts one row that came in and goes out.
    pub fn pass(&mut self) {
        self.rows_in += 1;
        self.rows_out += 1;
    }
}

impl TokenLedger {
    /// Counts a document of `n` tokens, `trained` of them trained, that came in and of which `kept` and `trained_kept` go out;
    /// what does not is lost for `reason`.
    pub fn count(
        &mut self,
        (n, trained): (u64, u64),
        (kept, trained_kept): (u64, u64),
        reason: &str,
    ) {
        self.tokens_in += n;
        self.tokens_out += kept;
        self.trained_in += trained;
        self.trained_out += trained_kept;
        if n > kept {
            *self.tokens_lost.entry(reason.to_owned()).or_default() += n - kept;
        }
        if trained > trained_kept {
            *self.trained_lost.entry(reason.to_owned()).or_default() += trained - trained_kept;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_balanced_ledger_passes_and_counts() {
        let mut ledger = Ledger::default();
        ledger.source("a").pass();
        ledger.source("a").reject("empty response");
        ledger.source("b").reject("empty response");
        assert_eq!(ledger.check(), Ok(()));
        assert_eq!((ledger.rows_in(), ledger.rows_out()), (3, 1));
        assert_eq!(ledger.rejected(), BTreeMap::from([("empty response", 2)]));
    }

    #[test]
    fn accounts_of_other_rows_are_added() {
        let mut tokens = TokenLedger::default();
        tokens.count((10, 4), (8, 3), "truncated");
        let mut one = Ledger::default();
        one.source("a").pass();
        one.source("a").tokens = Some(tokens.clone());
        let mut both = one.clone();
        both.source("b").reject("empty response");
        both.add(one);
        assert_eq!(both.check(), Ok(()));
        assert_eq!((both.rows_in(), both.rows_out()), (3, 2));
        tokens.count((10, 4), (8, 3), "truncated");
        assert_eq!(both.source("a").tokens, Some(tokens));
    }

    #[test]
    fn replay_stays_replay_from_stage_to_stage() {
        let mut before = Ledger::default();
        for name in ["a", "b", "none left"] {
            before.source(name).pass();
            before.source(name).replay = name != "a";
        }
        let mut ledger = Ledger::default();
        ["a", "b"].into_iter().for_each(|name| ledger.source(name).pass());
        assert_eq!(ledger.replay(), BTreeSet::new());
        ledger.mark_replay(&before);
        assert_eq!(ledger.replay(), BTreeSet::from(["b"]));
        let mut sum = Ledger::default();
        sum.add(ledger.clone());
        assert_eq!(sum, ledger);
        // An account says it where it is so, and is read where it says nothing.
        let json = serde_json::to_value(&ledger).unwrap();
        assert_eq!(json["sources"]["b"]["replay"], true);
        assert!(json["sources"]["a"].get("replay").is_none());
        assert_eq!(serde_json::from_value::<Ledger>(json).unwrap(), ledger);
    }

    #[test]
    fn a_lost_row_is_found() {
        let mut ledger = Ledger::default();
        ledger.source("a").pass();
        ledger.source("a").rows_in += 1;
        let error = ledger.check().unwrap_err();
        assert_eq!(
            error.to_string(),
            "source `a`: 2 rows in, but 1 out and 0 accounted for as lost"
        );
    }

    #[test]
    fn an_added_row_has_a_reason() {
        let mut ledger = Ledger::default();
        ledger.source("a").pass();
        ledger.source("a").rows_out += 2;
        assert!(ledger.check().is_err());
        ledger.source("a").added.insert("pieces".into(), 2);
        assert_eq!(ledger.check(), Ok(()));
    }

    #[test]
    fn a_lost_trained_token_is_found() {
        let mut ledger = Ledger::default();
        let mut tokens = TokenLedger::default();
        tokens.count((10, 4), (8, 3), "truncated");
        ledger.source("a").tokens = Some(tokens.clone());
        assert_eq!(ledger.check(), Ok(()));
        tokens.trained_out += 1;
        ledger.source("a").tokens = Some(tokens);
        assert_eq!(ledger.check().unwrap_err().what, "trained tokens");
    }
}
