//! What a training pass has that others have not.

use hone_kernels::Backend;

use crate::Decoder;

/// Options of one training pass; see [`crate::Decoder::accumulate_with`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PassOptions {
    /// Turns the adapters' dropout on.
    pub dropout_seed: Option<u64>,
    /// Noise on the embeddings.
    pub noise: Option<EmbeddingNoise>,
}

/// Uniform noise on the embeddings of a training pass (Jain et al. 2023: NEFTune), up to alpha /
/// sqrt(L D) for a document of L tokens.
///
/// The noise of a document is a function of `seed` and its number alone, so that it is the same
/// however the documents are packed or cut into batches, as long as they are counted alike.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EmbeddingNoise {
    /// Its size; 5, 10 and 15 are its paper's.
    pub alpha: f32,
    /// Of the step.
    pub seed: u64,
    /// Number of the batch's first document, in the step.
    pub first_document: u64,
}

impl<B: Backend> Decoder<B> {
    /// Keeps the loss of each of a training batch's rows from now on; see [`Decoder::row_losses`].
    pub fn keep_row_losses(&mut self) {
        self.row_losses = Some(Vec::new());
    }

    /// The loss of each of [`crate::Batch::rows`] in the last training pass, with all that is added
    /// to it; empty unless they are kept.
    pub fn row_losses(&self) -> &[f32] {
        self.row_losses.as_deref().unwrap_or_default()
    }
}
