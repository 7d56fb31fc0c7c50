//! Bytes that a decoder holds, counted buffer by buffer: what [`crate::MemoryPlan`] says
//! beforehand.

use hone_kernels::Backend;

use crate::Decoder;
use crate::layer::Layer;
use crate::lora::TokenPatch;

/// Bytes of a value of weights and gradients, and of buffers that are not rounded: f32.
pub(crate) const VALUE_BYTES: u64 = 4;

/// Bytes that a decoder holds, by purpose. Not in them are lists of ids and rotary tables, which
/// are as long as a batch and narrow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeldBytes {
    /// Base weights, in whatever form, and adapters.
    pub weights: u64,
    /// Gradients of what is trained.
    pub gradients: u64,
    /// Activations, residual streams and the buffers of the passes; 0 before the first.
    pub activations: u64,
    /// The chunk of logits, and the head's other buffers; 0 before the first pass.
    pub head: u64,
}

impl<B: Backend> Decoder<B> {
    /// Bytes held now. [`Decoder::reserve`] makes the buffers of the passes.
    pub fn held_bytes(&self) -> HeldBytes {
        let backend = self.backend();
        let (mut values, mut gradients) = (0, 0);
        self.visit(&mut |param| {
            values += param.n_bytes(backend);
            gradients += param.grad.as_ref().map_or(0, |grad| backend.len(grad));
        });
        values += self.stash.n_bytes(backend);
        let originals = self.embed_tokens.as_ref().map_or(0, TokenPatch::n_originals);
        let linears = self.layers.iter().flat_map(Layer::linears);
        let packed: u64 = linears.map(|linear| linear.other_bytes(backend)).sum();
        let workspace = self.workspace.as_ref();
        let bytes = |n: usize| VALUE_BYTES * n as u64;
        HeldBytes {
            weights: values + bytes(originals) + packed + self.head.other_bytes(backend),
            gradients: bytes(gradients),
            activations: workspace.map_or(0, |space| space.n_bytes(backend)),
            head: workspace.map_or(0, |space| space.head_bytes(backend)),
        }
    }
}
