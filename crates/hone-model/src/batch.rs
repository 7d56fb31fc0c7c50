//! Packed documents as the decoder takes them.

use crate::{ModelConfig, ModelError};

/// Documents laid end to end, with the target of each token and its weight.
///
/// Position i of a document predicts token i + 1 of the same document; the last token of a document
/// predicts nothing. Lengths: the first four fields T, `seq_lens` the number of documents, `rows`
/// N.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Token ids (T).
    pub input_ids: Vec<u32>,
    /// Positions, from 0 in each document (T).
    pub positions: Vec<u32>,
    /// Lengths of the documents; they sum to T.
    pub seq_lens: Vec<usize>,
    /// Id of the token that each position predicts (T); 0 where it predicts nothing.
    pub targets: Vec<u32>,
    /// Loss weight of each position's target (T); 0 where it predicts nothing.
    pub weights: Vec<f32>,
    /// The positions with a weight above 0, rising (N): all that the head sees.
    pub rows: Vec<u32>,
}

impl Batch {
    /// No documents.
    pub fn new() -> Self {
        Self::default()
    }

    /// One pack: `loss_weights[i]` is the weight of token i **as a target**, so that of a
    /// document's first token counts for nothing.
    pub fn from_pack(
        input_ids: &[u32],
        loss_weights: &[f32],
        seq_lens: &[usize],
    ) -> Result<Self, ModelError> {
        let mut batch = Batch::new();
        batch.push_pack(input_ids, loss_weights, seq_lens)?;
        Ok(batch)
    }

    /// Adds a pack behind the documents that are there. Errors: lengths that do not agree, a weight
    /// that is negative or not finite.
    pub fn push_pack(
        &mut self,
        input_ids: &[u32],
        loss_weights: &[f32],
        seq_lens: &[usize],
    ) -> Result<(), ModelError> {
        let total: usize = seq_lens.iter().sum();
        if input_ids.len() != loss_weights.len() || total != input_ids.len() {
            return Err(ModelError::Batch(format!(
                "{} ids, {} loss weights, documents of {total} tokens in all",
                input_ids.len(),
                loss_weights.len()
            )));
        }
        let mut start = 0;
        for &len in seq_lens {
            self.push(&input_ids[start..start + len], &loss_weights[start..start + len])?;
            start += len;
        }
        Ok(())
    }

    /// Adds one document; see [`Batch::from_pack`] for the weights. An empty document is left out.
    pub fn push(&mut self, ids: &[u32], loss_weights: &[f32]) -> Result<(), ModelError> {
        if ids.len() != loss_weights.len() {
            let what = format!("{} ids with {} loss weights", ids.len(), loss_weights.len());
            return Err(ModelError::Batch(what));
        }
        if let Some(weight) = loss_weights.iter().find(|w| !(w.is_finite() && **w >= 0.0)) {
            return Err(ModelError::Batch(format!("loss weight {weight} is not 0 or more")));
        }
        if ids.is_empty() {
            return Ok(());
        }
        let start = self.input_ids.len();
        self.input_ids.extend_from_slice(ids);
        self.positions.extend(0..ids.len() as u32);
        self.seq_lens.push(ids.len());
        self.targets.extend_from_slice(&ids[1..]);
        self.targets.push(0);
        self.weights.extend_from_slice(&loss_weights[1..]);
        self.weights.push(0.0);
        let has_target = |i: &usize| self.weights[*i] > 0.0;
        self.rows.extend((start..self.input_ids.len()).filter(has_target).map(|i| i as u32));
        Ok(())
    }

    /// Empties the batch and keeps its memory.
    pub fn clear(&mut self) {
        self.input_ids.clear();
        self.positions.clear();
        self.seq_lens.clear();
        self.targets.clear();
        self.weights.clear();
        self.rows.clear();
    }

    /// T.
    pub fn n_tokens(&self) -> usize {
        self.input_ids.len()
    }

    /// Sum of the weights in f64: this batch's part of the step's normaliser.
    pub fn weight(&self) -> f64 {
        self.rows.iter().map(|&row| f64::from(self.weights[row as usize])).sum()
    }

    /// Checks the batch against a model: ids inside the vocabulary, documents inside the context.
    pub(crate) fn check(&self, config: &ModelConfig) -> Result<(), ModelError> {
        let t = self.input_ids.len();
        let lengths = [self.positions.len(), self.targets.len(), self.weights.len()];
        if lengths != [t; 3] || self.seq_lens.iter().sum::<usize>() != t {
            return Err(ModelError::Batch("its fields do not have one length".to_owned()));
        }
        if u32::try_from(t).is_err() || self.rows.iter().any(|&row| row as usize >= t) {
            return Err(ModelError::Batch("a row lies outside".to_owned()));
        }
        let vocab = config.vocab_size;
        let ids = self.input_ids.iter().chain(&self.targets);
        if let Some(id) = ids.copied().find(|&id| id as usize >= vocab) {
            let what = format!("token id {id} is not below the vocabulary's {vocab}");
            return Err(ModelError::Batch(what));
        }
        let longest = self.positions.iter().copied().max().map_or(0, |p| p as usize + 1);
        let context = config.context();
        if longest > context {
            let what = format!("a document has {longest} tokens, the model is made for {context}");
            return Err(ModelError::Batch(what));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_shifted_inside_each_document() {
        let ids = [5, 6, 7, 8, 9];
        let batch = Batch::from_pack(&ids, &[1.0, 0.0, 0.5, 1.0, 1.0], &[3, 2]).unwrap();
        assert_eq!(batch.positions, [0, 1, 2, 0, 1]);
        assert_eq!(batch.targets, [6, 7, 0, 9, 0]);
        assert_eq!(batch.weights, [0.0, 0.5, 0.0, 1.0, 0.0]);
        assert_eq!(batch.rows, [1, 3]);
        assert_eq!(batch.weight(), 1.5);
    }

    #[test]
    fn bad_packs_are_refused() {
        assert!(Batch::from_pack(&[1, 2], &[1.0], &[2]).is_err());
        assert!(Batch::from_pack(&[1, 2], &[1.0, 1.0], &[3]).is_err());
        assert!(Batch::from_pack(&[1, 2], &[1.0, -1.0], &[2]).is_err());
        assert!(Batch::from_pack(&[1, 2], &[1.0, f32::NAN], &[2]).is_err());
        assert_eq!(Batch::from_pack(&[], &[], &[]).unwrap(), Batch::new());
        assert_eq!(Batch::from_pack(&[4], &[1.0], &[1]).unwrap().rows, [0_u32; 0]);
    }
}
