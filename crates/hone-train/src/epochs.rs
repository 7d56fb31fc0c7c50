//! Packs, and the order in which they are seen.

use std::collections::BTreeSet;

use arrow::array::RecordBatch;
use hone_cli::Failure;
use hone_kernels::mapping;
use hone_learn::shuffle;
use hone_model::Batch;
use hone_schema::{Pack, PackColumns, RowError, TEXT};
use hone_store::Sealed;

use crate::args::Shuffle;
use crate::tally::Groups;

/// What is counted of a pack.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Facts {
    /// Its tokens.
    pub(crate) n_tokens: u32,
    /// Those that are learned.
    pub(crate) n_trained: u32,
    /// Those of them that are of replay sources.
    pub(crate) n_replay: u32,
    /// Sum of the weights of those that are learned.
    pub(crate) weight: f64,
}

impl Facts {
    /// Of a pack in which the first token of each document has no weight.
    fn of(pack: &Pack, replay: &BTreeSet<&str>) -> Self {
        let mut facts = Facts { n_tokens: pack.input_ids.len() as u32, ..Facts::default() };
        for (doc, tokens) in pack.documents() {
            let trained = pack.loss_weight[tokens].iter().filter(|w| **w > 0.0);
            let n = trained.clone().count() as u32;
            facts.n_trained += n;
            facts.n_replay += if replay.contains(doc.source.as_str()) { n } else { 0 };
            facts.weight += trained.map(|w| f64::from(*w)).sum::<f64>();
        }
        facts
    }
}

/// The packs of a split: their columns as they lie in the file, and a few numbers of each.
pub(crate) struct Packs {
    batches: Vec<PackColumns>,
    /// Index of the first pack of each batch.
    starts: Vec<usize>,
    facts: Vec<Facts>,
    sources: Groups,
    roles: Groups,
    causal: bool,
}

impl Packs {
    /// Reads a split of the packs artefact; none when it has no rows. With `causal`, every token counts 1, and all is text.
    pub(crate) fn read(sealed: &Sealed, split: &str, causal: bool) -> Result<Self, Failure> {
        let name = format!("{split}.arrow");
        // Mapped: what training computes with is copied when its turn comes, and the rest stays on the disk.
        let batches =
            if sealed.has(&name) { sealed.ipc_mapped(&name, mapping::map)? } else { Vec::new() };
        let replay = sealed.manifest().ledger.replay();
        Packs::new(batches, causal, &replay).map_err(|failure| {
            let message = format!("{}: {failure}", sealed.path(&name).display());
            Failure { message, ..failure }
        })
    }

    /// The packs of these batches, checked; `replay` names the sources that are.
    pub(crate) fn new(
        batches: Vec<RecordBatch>,
        causal: bool,
        replay: &BTreeSet<&str>,
    ) -> Result<Self, Failure> {
        let mut packs = Packs {
            batches: Vec::new(),
            starts: Vec::new(),
            facts: Vec::new(),
            sources: Groups::default(),
            roles: Groups::default(),
            causal,
        };
        for batch in batches {
            packs.starts.push(packs.facts.len());
            // Once as values, so that every pack is checked; after that their columns are enough.
            for pack in Pack::from_batch(&batch).map_err(bad)? {
                packs.count(pack, replay);
            }
            packs.batches.push(PackColumns::of(&batch).map_err(bad)?);
        }
        Ok(packs)
    }

    fn count(&mut self, mut pack: Pack, replay: &BTreeSet<&str>) {
        if self.causal {
            pack.loss_weight.fill(1.0);
        }
        // Nothing stands before the first token of a document that could predict it.
        let firsts: Vec<usize> = pack.documents().map(|(_, tokens)| tokens.start).collect();
        firsts.into_iter().for_each(|first| pack.loss_weight[first] = 0.0);
        let weights = &pack.loss_weight;
        let docs = pack.docs.iter();
        self.sources.push(docs.map(|doc| (doc.source.as_str(), doc.len)), weights);
        if self.causal {
            self.roles.push(std::iter::once((TEXT, weights.len() as u32)), weights);
        } else {
            self.roles.push(pack.roles.runs(), weights);
        }
        self.facts.push(Facts::of(&pack, replay));
    }

    /// Whose rows the tokens are of.
    pub(crate) fn sources(&self) -> &Groups {
        &self.sources
    }

    /// Whose words the trained tokens are.
    pub(crate) fn roles(&self) -> &Groups {
        &self.roles
    }

    /// Number of packs.
    pub(crate) fn len(&self) -> usize {
        self.facts.len()
    }

    /// What is counted of a pack.
    pub(crate) fn facts(&self, idx: usize) -> &Facts {
        &self.facts[idx]
    }

    /// Number of tokens.
    pub(crate) fn n_tokens(&self) -> u64 {
        self.facts.iter().map(|facts| u64::from(facts.n_tokens)).sum()
    }

    /// Number of tokens that are learned.
    pub(crate) fn n_trained(&self) -> u64 {
        self.facts.iter().map(|facts| u64::from(facts.n_trained)).sum()
    }

    /// Number of those of them that are of replay sources.
    pub(crate) fn n_replay(&self) -> u64 {
        self.facts.iter().map(|facts| u64::from(facts.n_replay)).sum()
    }

    /// Refuses packs without a token to learn from.
    pub(crate) fn need_trained(&self, sealed: &Sealed) -> Result<(), Failure> {
        if self.n_trained() > 0 {
            return Ok(());
        }
        let at = sealed.dir().display();
        Err(Failure::input(format!("{at}: there is no trained token to learn from"))
            .hint("look at it with `hone-tokenize show`; `tokenize.train_on` and splits decide"))
    }

    /// Tokens of the largest batch, where the packs at `idxs` are cut into batches of `n`.
    pub(crate) fn tokens_max(&self, idxs: &[usize], n: usize) -> usize {
        let tokens = |idx: &usize| self.facts[*idx].n_tokens as usize;
        idxs.chunks(n).map(|batch| batch.iter().map(tokens).sum()).max().unwrap_or_default()
    }

    /// The packs at `idxs` as one batch.
    pub(crate) fn batch(&self, idxs: &[u64]) -> Result<Batch, Failure> {
        let mut batch = Batch::new();
        for idx in idxs {
            let idx = *idx as usize;
            let at = self.starts.partition_point(|start| *start <= idx) - 1;
            let row = idx - self.starts[at];
            let columns = &self.batches[at];
            let ids = columns.input_ids(row).map_err(bad)?;
            let weights = columns.loss_weight(row).map_err(bad)?;
            let lens = columns.seq_lens(row).map_err(bad)?;
            let ones: Vec<f32>;
            let weights = if self.causal {
                ones = vec![1.0; weights.len()];
                &ones[..]
            } else {
                weights.values()
            };
            let lens: Vec<usize> = lens.values().iter().map(|len| *len as usize).collect();
            batch
                .push_pack(ids.values(), weights, &lens)
                .map_err(|e| Failure::input(e.to_string()))?;
        }
        Ok(batch)
    }

    /// The packs at `idxs` as batches of `n`.
    pub(crate) fn batches(&self, idxs: &[u64], n: usize) -> Result<Vec<Batch>, Failure> {
        idxs.chunks(n).map(|idxs| self.batch(idxs)).collect()
    }
}

fn bad(error: RowError) -> Failure {
    Failure::input(error.to_string())
}

/// Which packs each step sees: a function of the seed and the step alone, so that a resumed run finds its place by counting.
#[derive(Clone, Debug)]
pub(crate) struct Order {
    n_packs: usize,
    batch_size: usize,
    seed: u64,
    shuffled: Shuffle,
    /// The permutation of one epoch, of packs or of batches, kept while steps stay in it.
    epoch: Option<(u64, Vec<usize>)>,
}

impl Order {
    /// The order over `n_packs` packs, at least one, `batch_size` a step.
    pub(crate) fn new(n_packs: usize, batch_size: usize, seed: u64, shuffled: Shuffle) -> Self {
        assert!(n_packs > 0 && batch_size > 0, "checked when the run was planned");
        Order { n_packs, batch_size, seed, shuffled, epoch: None }
    }

    /// Steps of one epoch; one of them may be short.
    pub(crate) fn steps_per_epoch(&self) -> u64 {
        self.n_packs.div_ceil(self.batch_size) as u64
    }

    /// The packs of a step, counted from 0.
    pub(crate) fn step(&mut self, step: u64) -> Vec<usize> {
        let at = (step % self.steps_per_epoch()) as usize;
        let epoch = step / self.steps_per_epoch();
        match self.shuffled {
            Shuffle::Packs => {
                let range = self.batch(at);
                self.epoch(epoch, self.n_packs)[range].to_vec()
            }
            Shuffle::Batches => {
                let n_batches = self.steps_per_epoch() as usize;
                let batch = self.epoch(epoch, n_batches)[at];
                self.batch(batch).collect()
            }
            Shuffle::None => self.batch(at).collect(),
        }
    }

    fn batch(&self, at: usize) -> std::ops::Range<usize> {
        let start = at * self.batch_size;
        start..(start + self.batch_size).min(self.n_packs)
    }

    /// The permutation of `n` things in an epoch.
    fn epoch(&mut self, epoch: u64, n: usize) -> &[usize] {
        if self.epoch.as_ref().is_none_or(|(at, _)| *at != epoch) {
            self.epoch = Some((epoch, shuffle(n, self.seed, epoch)));
        }
        let (_, order) = self.epoch.as_ref().expect("set just above");
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tally::{Losses, Tally};
    use hone_schema::{Doc, Kind, Roles};

    #[test]
    fn an_epoch_sees_every_pack_once_and_any_step_can_be_asked_first() {
        for shuffled in [Shuffle::Packs, Shuffle::Batches, Shuffle::None] {
            let mut order = Order::new(10, 4, 7, shuffled);
            assert_eq!(order.steps_per_epoch(), 3);
            for epoch in 0..3 {
                let mut seen: Vec<usize> = (0..3).flat_map(|s| order.step(epoch * 3 + s)).collect();
                seen.sort_unstable();
                assert_eq!(seen, (0..10).collect::<Vec<_>>());
            }
            assert_eq!(Order::new(10, 4, 7, shuffled).step(7), order.step(7));
            let other: Vec<_> = (0..9).map(|s| Order::new(10, 4, 8, shuffled).step(s)).collect();
            let ours: Vec<_> = (0..9).map(|s| order.step(s)).collect();
            assert_eq!(other == ours, shuffled == Shuffle::None);
        }
    }

    #[test]
    fn batches_stay_together_when_only_they_are_shuffled() {
        let mut order = Order::new(10, 4, 7, Shuffle::Batches);
        let mut steps: Vec<Vec<usize>> = (0..3).map(|step| order.step(step)).collect();
        steps.sort();
        assert_eq!(steps, [vec![0, 1, 2, 3], vec![4, 5, 6, 7], vec![8, 9]]);
        assert_eq!(Order::new(10, 4, 7, Shuffle::None).step(4), [4, 5, 6, 7]);
    }

    /// Sources of the documents of a pack, in turn.
    const SOURCES: [&str; 2] = ["tuned", "replay"];

    fn pack(n: u32, kinds: &[Kind]) -> Pack {
        let doc = |(row, kind): (usize, &Kind)| Doc {
            len: n,
            row: row as u64,
            row_id: format!("r{row}"),
            source: SOURCES[row % 2].into(),
            kind: *kind,
            offset: 0,
            truncated: false,
            kept: Vec::new(),
        };
        let len = n * kinds.len() as u32;
        Pack {
            input_ids: (0..len).collect(),
            loss_weight: (0..len).map(|idx| if idx % 3 == 1 { 0.0 } else { 0.5 }).collect(),
            roles: Roles::one("assistant", len),
            docs: kinds.iter().enumerate().map(doc).collect(),
        }
    }

    #[test]
    fn packs_come_out_of_their_columns_as_they_went_in() {
        let values = [
            pack(5, &[Kind::Sft]),
            pack(2, &[Kind::Text, Kind::Sft, Kind::Text]),
            pack(7, &[Kind::Sft, Kind::Text]),
        ];
        let batches =
            || vec![Pack::to_batch(&values[..2]).unwrap(), Pack::to_batch(&values[2..]).unwrap()];
        let replay = BTreeSet::from(["replay"]);
        let packs = Packs::new(batches(), false, &replay).unwrap();
        assert_eq!((packs.len(), packs.n_tokens(), packs.tokens_max(&[0, 2, 1], 2)), (3, 25, 19));
        let trained: u64 = values.iter().map(Pack::n_trained).sum();
        assert_eq!(packs.n_trained(), trained);
        for (idx, pack) in values.iter().enumerate() {
            let lens: Vec<usize> = pack.docs.iter().map(|doc| doc.len as usize).collect();
            let expect = Batch::from_pack(&pack.input_ids, &pack.loss_weight, &lens).unwrap();
            let batch = packs.batch(&[idx as u64]).unwrap();
            assert_eq!(batch, expect);
            let facts = packs.facts(idx);
            assert_eq!(facts.weight, expect.weight());
            assert_eq!(
                (facts.n_tokens, facts.n_trained),
                (pack.input_ids.len() as u32, expect.rows.len() as u32)
            );
        }
        // The second documents, whatever their kind: of 2 tokens and of 7, of which the first is no target and two more have
        // no weight.
        assert_eq!((packs.facts(1).n_replay, packs.n_replay()), (1, 5));
        let causal = Packs::new(batches(), true, &replay).unwrap();
        assert_eq!((causal.n_trained(), causal.n_replay()), (25 - 6, 1 + 6));
        assert_eq!(Packs::new(batches(), true, &BTreeSet::new()).unwrap().n_replay(), 0);
        assert_eq!(causal.batch(&[2, 0]).unwrap().weight(), 12.0 + 4.0);
    }

    /// A document: source, kind, and of each token its id, its weight and its role.
    type Told<'a> = (&'a str, Kind, &'a [(u32, f32, &'a str)]);

    fn told(docs: &[Told]) -> Pack {
        let mut pack = Pack::with_capacity(0);
        for (row, (source, kind, tokens)) in docs.iter().enumerate() {
            for (id, weight, role) in *tokens {
                pack.input_ids.push(*id);
                pack.loss_weight.push(*weight);
                pack.roles.push(role, 1);
            }
            pack.docs.push(Doc {
                len: tokens.len() as u32,
                row: row as u64,
                row_id: format!("r{row}"),
                source: (*source).to_owned(),
                kind: *kind,
                offset: 0,
                truncated: false,
                kept: Vec::new(),
            });
        }
        pack
    }

    /// Computed by hand: every role trained, and replay of weight 0.5 in the same packs.
    #[test]
    fn replay_and_roles_in_one_pack_have_the_losses_that_they_have_by_hand() {
        let chat: &[(u32, f32, &str)] = &[
            (1, 0.0, "user"),
            (2, 1.0, "user"),
            (3, 0.0, "user"),
            (4, 1.0, "assistant/reasoning"),
            (5, 1.0, "assistant"),
            (6, 2.0, "assistant"),
        ];
        // The first token of a document is no target, whatever its weight.
        let text: &[(u32, f32, &str)] = &[(7, 0.5, "text"), (8, 0.5, "text"), (9, 0.5, "text")];
        let values = [
            told(&[("tuned", Kind::Sft, chat), ("replay", Kind::Text, text)]),
            told(&[("replay", Kind::Text, text), ("tuned", Kind::Sft, &chat[3..])]),
        ];
        let mixed_in = BTreeSet::from(["replay"]);
        let batch = || vec![Pack::to_batch(&values).unwrap()];
        let packs = Packs::new(batch(), false, &mixed_in).unwrap();
        assert_eq!((packs.n_trained(), packs.n_replay()), (4 + 2 + 2 + 2, 4));
        let weight: f64 = [0, 1].map(|idx| packs.facts(idx).weight).iter().sum();
        assert_eq!(weight, (5.0 + 1.0) + (1.0 + 3.0));
        let count = |named: &[(&str, u64)], groups: &Groups| {
            assert_eq!(groups.trained().collect::<Vec<_>>(), named);
        };
        count(&[("tuned", 6), ("replay", 4)], packs.sources());
        let roles = [("user", 1), ("assistant/reasoning", 1), ("assistant", 4), ("text", 4)];
        count(&roles, packs.roles());

        // The first step sees pack 1, then pack 0, a batch each.
        let mut tally = Tally::over(&packs, &[1, 0]);
        for (idx, losses) in [(1, [1.0, 3.0, 4.0, 8.0]), (0, [6.0, 2.0, 0.5, 0.25])] {
            let batch = packs.batch(&[idx]).unwrap();
            // Pack 0 has two more targets, both of its text.
            let losses =
                if idx == 0 { [&losses[..], &[10.0, 20.0]].concat() } else { losses.to_vec() };
            assert_eq!(batch.rows.len(), losses.len());
            tally.add(&batch, &losses);
        }
        let replay = (0.5 * 1.0 + 0.5 * 3.0 + 0.5 * 10.0 + 0.5 * 20.0) / 2.0;
        let tuned = (4.0 + 2.0 * 8.0) + (6.0 + 2.0 + 0.5 + 2.0 * 0.25);
        let assistant = (4.0 + 2.0 * 8.0 + 0.5 + 2.0 * 0.25) / 6.0;
        let by_source = vec![("tuned", tuned / 8.0), ("replay", replay)];
        let by_role = vec![
            ("user", 6.0),
            ("assistant/reasoning", 2.0),
            ("assistant", assistant),
            ("text", replay),
        ];
        assert_eq!(tally.losses(), Losses { by_source, by_role });

        // In pre-training all is text.
        let causal = Packs::new(batch(), true, &mixed_in).unwrap();
        assert_eq!(causal.roles().trained().collect::<Vec<_>>(), [("text", 5 + 2 + 2 + 2)]);
    }
}
