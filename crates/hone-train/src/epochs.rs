//! Packs, and the order in which they are seen.

use arrow::array::RecordBatch;
use hone_cli::Failure;
use hone_kernels::mapping;
use hone_learn::shuffle;
use hone_model::Batch;
use hone_schema::{Kind, Pack, PackColumns, RowError};
use hone_store::Sealed;

use crate::args::Shuffle;

/// What is counted of a pack.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Facts {
    /// Its tokens.
    pub(crate) n_tokens: u32,
    /// Those that are learned.
    pub(crate) n_trained: u32,
    /// Those of them that are plain text.
    pub(crate) n_replay: u32,
    /// Sum of the weights of those that are learned.
    pub(crate) weight: f64,
}

impl Facts {
    fn of(pack: &Pack) -> Self {
        let mut facts = Facts { n_tokens: pack.input_ids.len() as u32, ..Facts::default() };
        let mut at = 0;
        for doc in &pack.docs {
            let end = at + doc.len as usize;
            // Nothing stands before the first token of a document that could predict it.
            let trained = pack.loss_weight[at + 1..end].iter().filter(|w| **w > 0.0);
            let n = trained.clone().count() as u32;
            facts.n_trained += n;
            facts.n_replay += if doc.kind == Kind::Text { n } else { 0 };
            facts.weight += trained.map(|w| f64::from(*w)).sum::<f64>();
            at = end;
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
    /// Sources of all documents, in the order in which they come.
    sources: Vec<String>,
    /// Of each pack, the source of each document.
    doc_sources: Vec<Box<[u16]>>,
    causal: bool,
}

/// Most sources told apart; those beyond are counted with the last.
const SOURCES_MAX: usize = 1 << 10;

impl Packs {
    /// Reads a split of the packs artefact; none when it has no rows. With `causal`, every token counts 1.
    pub(crate) fn read(sealed: &Sealed, split: &str, causal: bool) -> Result<Self, Failure> {
        let name = format!("{split}.arrow");
        // Mapped: what training computes with is copied when its turn comes, and the rest stays on the disk.
        let batches =
            if sealed.has(&name) { sealed.ipc_mapped(&name, mapping::map)? } else { Vec::new() };
        Packs::new(batches, causal).map_err(|failure| {
            let message = format!("{}: {failure}", sealed.path(&name).display());
            Failure { message, ..failure }
        })
    }

    /// The packs of these batches, checked.
    pub(crate) fn new(batches: Vec<RecordBatch>, causal: bool) -> Result<Self, Failure> {
        let mut packs = Packs {
            batches: Vec::new(),
            starts: Vec::new(),
            facts: Vec::new(),
            sources: Vec::new(),
            doc_sources: Vec::new(),
            causal,
        };
        for batch in batches {
            packs.starts.push(packs.facts.len());
            // Once as values, so that every pack is checked; after that their columns are enough.
            let values = Pack::from_batch(&batch).map_err(bad)?;
            for pack in &values {
                let of = pack.docs.iter().map(|doc| packs.source_idx(&doc.source)).collect();
                packs.doc_sources.push(of);
            }
            packs.facts.extend(values.into_iter().map(|mut pack| {
                if causal {
                    pack.loss_weight.fill(1.0);
                }
                Facts::of(&pack)
            }));
            packs.batches.push(PackColumns::of(&batch).map_err(bad)?);
        }
        Ok(packs)
    }

    fn source_idx(&mut self, name: &str) -> u16 {
        let found = self.sources.iter().position(|source| source == name);
        let idx = found.unwrap_or_else(|| {
            if self.sources.len() < SOURCES_MAX {
                self.sources.push(name.to_owned());
            }
            self.sources.len() - 1
        });
        idx as u16
    }

    /// Names of the sources.
    pub(crate) fn sources(&self) -> &[String] {
        &self.sources
    }

    /// The source of each document of these packs.
    pub(crate) fn doc_sources(&self, idxs: &[u64]) -> impl Iterator<Item = u16> {
        idxs.iter().flat_map(|idx| self.doc_sources[*idx as usize].iter().copied())
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
    use hone_schema::Doc;

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

    fn pack(n: u32, kinds: &[Kind]) -> Pack {
        let doc = |(row, kind): (usize, &Kind)| Doc {
            len: n,
            row: row as u64,
            row_id: format!("r{row}"),
            source: "s".into(),
            kind: *kind,
            offset: 0,
            truncated: false,
            kept: Vec::new(),
        };
        let len = n * kinds.len() as u32;
        Pack {
            input_ids: (0..len).collect(),
            loss_weight: (0..len).map(|idx| if idx % 3 == 1 { 0.0 } else { 0.5 }).collect(),
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
        let packs = Packs::new(batches(), false).unwrap();
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
        assert_eq!(packs.facts(1).n_replay, 1);
        let causal = Packs::new(batches(), true).unwrap();
        assert_eq!(causal.n_trained(), 25 - 6);
        assert_eq!(causal.batch(&[2, 0]).unwrap().weight(), 12.0 + 4.0);
    }
}
