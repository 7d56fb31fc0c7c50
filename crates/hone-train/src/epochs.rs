//! Packs in memory, and the order in which they are seen.

use hone_cli::Failure;
use hone_learn::shuffle;
use hone_model::Batch;
use hone_schema::Pack;
use hone_store::Sealed;

/// The packs of a split, ready to compute with.
pub(crate) struct Packs {
    packs: Vec<Pack>,
}

impl Packs {
    /// Reads a split of the packs artefact; none when it has no rows. With `causal`, every token counts 1.
    pub(crate) fn read(sealed: &Sealed, split: &str, causal: bool) -> Result<Self, Failure> {
        let name = format!("{split}.arrow");
        if !sealed.has(&name) {
            return Ok(Packs { packs: Vec::new() });
        }
        let mut packs = Vec::new();
        for batch in sealed.ipc(&name)? {
            let rows = Pack::from_batch(&batch)
                .map_err(|e| Failure::input(format!("{}: {e}", sealed.path(&name).display())))?;
            packs.extend(rows);
        }
        if causal {
            packs.iter_mut().for_each(|pack| pack.loss_weight.fill(1.0));
        }
        Ok(Packs { packs })
    }

    /// Number of packs.
    pub(crate) fn len(&self) -> usize {
        self.packs.len()
    }

    /// Number of tokens.
    pub(crate) fn n_tokens(&self) -> u64 {
        self.packs.iter().map(|pack| pack.input_ids.len() as u64).sum()
    }

    /// Number of tokens that are learned.
    pub(crate) fn n_trained(&self) -> u64 {
        self.packs.iter().map(Pack::n_trained).sum()
    }

    /// Tokens of the largest micro-batch of `n` packs.
    pub(crate) fn tokens_max(&self, n: usize) -> usize {
        let mut lens: Vec<usize> = self.packs.iter().map(|pack| pack.input_ids.len()).collect();
        lens.sort_unstable_by(|a, b| b.cmp(a));
        lens.iter().take(n).sum()
    }

    /// The packs at `idxs` as one batch.
    pub(crate) fn batch(&self, idxs: &[usize]) -> Result<Batch, Failure> {
        let mut batch = Batch::new();
        for pack in idxs.iter().map(|idx| &self.packs[*idx]) {
            let lens: Vec<usize> = pack.docs.iter().map(|doc| doc.len as usize).collect();
            batch
                .push_pack(&pack.input_ids, &pack.loss_weight, &lens)
                .map_err(|e| Failure::input(e.to_string()))?;
        }
        Ok(batch)
    }

    /// All packs in order, `n` at a time.
    pub(crate) fn batches(&self, n: usize) -> Result<Vec<Batch>, Failure> {
        let all: Vec<usize> = (0..self.packs.len()).collect();
        all.chunks(n).map(|idxs| self.batch(idxs)).collect()
    }
}

/// Which packs each step sees: a function of the seed and the step alone, so that a resumed run finds its place by counting.
#[derive(Clone, Debug)]
pub(crate) struct Order {
    n_packs: usize,
    batch_size: usize,
    seed: u64,
    /// The permutation of one epoch, kept while steps stay in it.
    epoch: Option<(u64, Vec<usize>)>,
}

impl Order {
    /// The order over `n_packs` packs, at least one, `batch_size` a step.
    pub(crate) fn new(n_packs: usize, batch_size: usize, seed: u64) -> Self {
        assert!(n_packs > 0 && batch_size > 0, "checked when the run was planned");
        Order { n_packs, batch_size, seed, epoch: None }
    }

    /// Steps of one epoch; the last may be short.
    pub(crate) fn steps_per_epoch(&self) -> u64 {
        self.n_packs.div_ceil(self.batch_size) as u64
    }

    /// The packs of a step, counted from 0.
    pub(crate) fn step(&mut self, step: u64) -> Vec<usize> {
        let epoch = step / self.steps_per_epoch();
        if self.epoch.as_ref().is_none_or(|(at, _)| *at != epoch) {
            self.epoch = Some((epoch, shuffle(self.n_packs, self.seed, epoch)));
        }
        let (_, order) = self.epoch.as_ref().expect("set just above");
        let start = (step % self.steps_per_epoch()) as usize * self.batch_size;
        order[start..(start + self.batch_size).min(order.len())].to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_sees_every_pack_once_and_any_step_can_be_asked_first() {
        let mut order = Order::new(10, 4, 7);
        assert_eq!(order.steps_per_epoch(), 3);
        for epoch in 0..3 {
            let mut seen: Vec<usize> = (0..3).flat_map(|s| order.step(epoch * 3 + s)).collect();
            seen.sort_unstable();
            assert_eq!(seen, (0..10).collect::<Vec<_>>());
        }
        assert_eq!(Order::new(10, 4, 7).step(7), order.step(7));
        assert_ne!(Order::new(10, 4, 8).step(7), order.step(7));
    }
}
