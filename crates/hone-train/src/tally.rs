//! Losses told apart by the source of their rows.

use hone_model::Batch;

/// Sums of some batches, by source.
pub(crate) struct Tally<'a> {
    names: &'a [String],
    /// sum(w L) and sum(w) of each.
    sums: Vec<[f64; 2]>,
}

impl<'a> Tally<'a> {
    /// Nothing yet, of these sources.
    pub(crate) fn new(names: &'a [String]) -> Self {
        Tally { names, sums: vec![[0.0; 2]; names.len()] }
    }

    /// Adds the loss of each of a batch's rows. `sources` gives that of each of its documents.
    pub(crate) fn add(
        &mut self,
        batch: &Batch,
        losses: &[f32],
        sources: &mut impl Iterator<Item = u16>,
    ) {
        let mut rows = batch.rows.iter().zip(losses).peekable();
        let mut end = 0;
        for (len, source) in batch.seq_lens.iter().zip(sources) {
            end += *len;
            let [sum, weights] = &mut self.sums[usize::from(source)];
            while let Some((row, loss)) = rows.next_if(|(row, _)| (**row as usize) < end) {
                let weight = f64::from(batch.weights[*row as usize]);
                *sum += weight * f64::from(*loss);
                *weights += weight;
            }
        }
    }

    /// The loss of each source that had a target; nothing where there is but one source, whose loss is that of all.
    pub(crate) fn losses(&self) -> Vec<(&'a str, f64)> {
        if self.names.len() < 2 {
            return Vec::new();
        }
        let all = self.names.iter().zip(&self.sums).filter(|(_, [_, weight])| *weight > 0.0);
        all.map(|(name, [sum, weight])| (name.as_str(), sum / weight)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_counted_with_their_documents() {
        let mut batch = Batch::new();
        batch.push_pack(&[1; 5], &[1.0, 1.0, 1.0, 1.0, 0.5], &[3, 2]).unwrap();
        batch.push(&[1, 1], &[0.0, 2.0]).unwrap();
        // Two rows of the first document, one of each other.
        assert_eq!(batch.rows, [0, 1, 3, 5]);
        let names = ["a".to_owned(), "b".to_owned(), "c".to_owned()];
        let mut tally = Tally::new(&names);
        tally.add(&batch, &[1.0, 3.0, 5.0, 7.0], &mut [1, 0, 1].into_iter());
        let of_b = (1.0 + 3.0 + 2.0 * 7.0) / 4.0;
        assert_eq!(tally.losses(), [("a", 5.0), ("b", of_b)]);
        assert_eq!(Tally::new(&names[..1]).losses(), []);
    }
}
