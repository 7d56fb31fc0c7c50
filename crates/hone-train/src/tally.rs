//! Losses told apart: by the source of a row, and by the role of the message that a token is of.

use hone_model::Batch;
use serde_json::Value;

use crate::epochs::Packs;

/// Most groups told apart; those beyond are counted with the last.
const GROUPS_MAX: usize = 1 << 10;

/// Neighbouring tokens of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    group: u16,
    n_tokens: u32,
}

/// The groups that the tokens of some packs are in.
#[derive(Clone, Debug, Default)]
pub(crate) struct Groups {
    /// In the order in which they come.
    names: Vec<String>,
    /// Trained tokens of each.
    trained: Vec<u64>,
    packs: Vec<Box<[Run]>>,
}

impl Groups {
    /// Adds a pack: its tokens in runs of one name, and the weight of each as a target.
    pub(crate) fn push<'a>(
        &mut self,
        named: impl Iterator<Item = (&'a str, u32)>,
        weights: &[f32],
    ) {
        let mut runs: Vec<Run> = Vec::new();
        let mut rest = weights;
        for (name, n_tokens) in named {
            let (own, behind) = rest.split_at(n_tokens as usize);
            rest = behind;
            let group = self.group(name);
            self.trained[usize::from(group)] += own.iter().filter(|w| **w > 0.0).count() as u64;
            match runs.last_mut() {
                Some(last) if last.group == group => last.n_tokens += n_tokens,
                _ => runs.push(Run { group, n_tokens }),
            }
        }
        self.packs.push(runs.into());
    }

    fn group(&mut self, name: &str) -> u16 {
        let found = self.names.iter().position(|known| known == name);
        let idx = found.unwrap_or_else(|| {
            if self.names.len() < GROUPS_MAX {
                self.names.push(name.to_owned());
                self.trained.push(0);
            }
            self.names.len() - 1
        });
        idx as u16
    }

    /// Trained tokens of each group that has any.
    pub(crate) fn trained(&self) -> impl Iterator<Item = (&str, u64)> {
        let all = self.names.iter().zip(&self.trained);
        all.filter(|(_, n)| **n > 0).map(|(name, n)| (name.as_str(), *n))
    }

    fn runs(&self, packs: &[u64]) -> impl Iterator<Item = Run> {
        packs.iter().flat_map(|idx| self.packs[*idx as usize].iter().copied())
    }
}

/// Losses by name.
pub(crate) type Named<'a> = Vec<(&'a str, f64)>;

/// The losses of some packs, told apart. Empty where there is but one group, whose loss is that of
/// all.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Losses<'a> {
    pub(crate) by_source: Named<'a>,
    pub(crate) by_role: Named<'a>,
}

impl Losses<'_> {
    /// Puts them into an object, under `key` and a longer name.
    pub(crate) fn write(&self, object: &mut Value, key: &str) {
        for (key, named) in [(key, &self.by_source), (&format!("{key}_by_role"), &self.by_role)] {
            if !named.is_empty() {
                object[key] = named.iter().copied().collect();
            }
        }
    }
}

/// Adds up the losses of some packs by source and by role.
pub(crate) struct Tally<'a> {
    sources: Sums<'a>,
    roles: Sums<'a>,
}

impl<'a> Tally<'a> {
    /// Nothing yet, of these packs, whose batches come in their order.
    pub(crate) fn over(packs: &'a Packs, idxs: &[u64]) -> Self {
        Tally { sources: Sums::over(packs.sources(), idxs), roles: Sums::over(packs.roles(), idxs) }
    }

    /// Adds the loss of each row of the next batch.
    pub(crate) fn add(&mut self, batch: &Batch, losses: &[f32]) {
        self.sources.add(batch, losses);
        self.roles.add(batch, losses);
    }

    /// The losses so far.
    pub(crate) fn losses(&self) -> Losses<'a> {
        Losses { by_source: self.sources.losses(), by_role: self.roles.losses() }
    }
}

/// Sums of the batches so far, by group.
struct Sums<'a> {
    groups: &'a Groups,
    runs: std::vec::IntoIter<Run>,
    /// sum(w L) and sum(w) of each.
    sums: Vec<[f64; 2]>,
}

impl<'a> Sums<'a> {
    fn over(groups: &'a Groups, packs: &[u64]) -> Self {
        let runs: Vec<Run> = groups.runs(packs).collect();
        Sums { groups, runs: runs.into_iter(), sums: vec![[0.0; 2]; groups.names.len()] }
    }

    fn add(&mut self, batch: &Batch, losses: &[f32]) {
        let mut rows = batch.rows.iter().zip(losses).peekable();
        let mut end = 0;
        while end < batch.n_tokens() {
            let run = self.runs.next().expect("the runs of a pack are all its tokens");
            end += run.n_tokens as usize;
            let [sum, weights] = &mut self.sums[usize::from(run.group)];
            // A row predicts the token behind it, and that token has the role.
            while let Some((row, loss)) = rows.next_if(|(row, _)| (**row as usize) + 1 < end) {
                let weight = f64::from(batch.weights[*row as usize]);
                *sum += weight * f64::from(*loss);
                *weights += weight;
            }
        }
    }

    fn losses(&self) -> Named<'a> {
        if self.groups.trained().count() < 2 {
            return Vec::new();
        }
        let all = self.groups.names.iter().zip(&self.sums).filter(|(_, [_, weight])| *weight > 0.0);
        all.map(|(name, [sum, weight])| (name.as_str(), sum / weight)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two packs of 5 and 2 tokens.
    fn batches() -> [Batch; 2] {
        let one = Batch::from_pack(&[1; 5], &[1.0, 1.0, 1.0, 1.0, 0.5], &[3, 2]).unwrap();
        [one, Batch::from_pack(&[1, 1], &[0.0, 2.0], &[2]).unwrap()]
    }

    /// The runs of a pack, and the weights of its tokens.
    type Told<'a> = (&'a [(&'a str, u32)], &'a [f32]);

    fn groups(packs: &[Told]) -> Groups {
        let mut groups = Groups::default();
        packs.iter().for_each(|(runs, weights)| groups.push(runs.iter().copied(), weights));
        groups
    }

    fn losses<'a>(groups: &'a Groups, losses: &[&[f32]]) -> Named<'a> {
        let mut sums = Sums::over(groups, &[0, 1]);
        batches().iter().zip(losses).for_each(|(batch, losses)| sums.add(batch, losses));
        sums.losses()
    }

    const WEIGHTS: [&[f32]; 2] = [&[0.0, 1.0, 1.0, 0.0, 0.5], &[0.0, 2.0]];

    #[test]
    fn rows_are_counted_with_the_group_of_what_they_predict() {
        // Rows 0, 1 and 3 of the first pack, and row 0 of the second.
        let rows: [&[f32]; 2] = [&[1.0, 3.0, 5.0], &[7.0]];
        let sources =
            groups(&[(&[("b", 3), ("a", 2)], WEIGHTS[0]), (&[("b", 2)], WEIGHTS[1]), (&[], &[])]);
        let of_b = (1.0 + 3.0 + 2.0 * 7.0) / 4.0;
        assert_eq!(losses(&sources, &rows), [("b", of_b), ("a", 5.0)]);
        assert_eq!(sources.trained().collect::<Vec<_>>(), [("b", 3), ("a", 1)]);
        // A border inside a document: the row before it predicts what is behind it.
        let roles = groups(&[(&[("b", 2), ("a", 3)], WEIGHTS[0]), (&[("c", 2)], WEIGHTS[1])]);
        let of_a = (3.0 + 0.5 * 5.0) / 1.5;
        assert_eq!(losses(&roles, &rows), [("b", 1.0), ("a", of_a), ("c", 7.0)]);
    }

    #[test]
    fn one_group_is_not_told_apart() {
        let rows: [&[f32]; 2] = [&[1.0, 3.0, 5.0], &[7.0]];
        let one = groups(&[(&[("b", 5)], WEIGHTS[0]), (&[("b", 2)], WEIGHTS[1])]);
        assert_eq!(losses(&one, &rows), []);
        // Nor from one of which nothing is trained.
        let untrained = groups(&[
            (&[("b", 3), ("a", 1), ("b", 1)], WEIGHTS[0]),
            (&[("a", 1), ("b", 1)], WEIGHTS[1]),
        ]);
        assert_eq!(losses(&untrained, &rows), []);
    }
}
