//! What a training pass has that others have not: its options, and what it keeps for its backward.

use hone_kernels::Backend;

use crate::Decoder;

/// What the backward finds and what it computes again; the gradients are the same bytes. Every
/// level keeps each layer's input, and makes outputs of norms and of the gated activation again,
/// which costs next to nothing.
///
/// What else is kept is chosen by its price: the multiply-adds that one value costs when it is
/// computed again. What a map gives costs the width of the map's input; attention's output costs as
/// much as a query sees keys, and a softmax. So attention's output goes last, and
/// [`Recompute::Attention`] gives up the maps around it, as in selective recomputation (Korthikanti
/// et al. 2022) turned round: theirs held T x T scores, which a tiled attention never has. Values a
/// token a layer, and the share of a layer's forward products that is done twice, of SmolLM2-135M
/// with documents of 1024 tokens:
///
/// | level | values | twice |
/// |---|---:|---:|
/// | none | 5771 | 0 |
/// | attention | 4234 | 21 % |
/// | layer | 576 | 79 % |
///
/// An adapter keeps what lies between its factors as well, R values for each map, but at the last level.
///
/// In bf16 the values around attention and the gates and ups have 2 bytes each, 4608 of the first
/// row's and 3648 of the second's; the streams between and behind the halves have 4.
///
/// To keep the stream between the halves and run attention again would hold 4225 values at 28 %,
/// and with documents of 8192 tokens at 64 % instead of 11 %.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recompute {
    /// Nothing that a matrix product has to be done for: the fastest.
    #[default]
    None,
    /// The linear maps of the attention half: queries, keys and values with their norms and
    /// rotation, and attention's way back into the residual stream. Attention's own output and the
    /// feed-forward's gates and ups are kept.
    Attention,
    /// Everything but the last map of the feed-forward, whose output no backward reads: a fraction
    /// of the memory.
    Layer,
}

impl Recompute {
    /// All levels, each slower and smaller than the one before.
    pub const ALL: [Recompute; 3] = [Recompute::None, Recompute::Attention, Recompute::Layer];
}

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
