//! The buffers of a pass, made once and kept from step to step.

use hone_kernels::Backend;

use crate::buffers::{ActSets, BackScratch, Dims, NActs, Scratch};
use crate::head::{HeadActs, HeadBack};
use crate::linear::LoraNeeds;

/// How many of the buffers a decoder needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Copies of the residual stream: every layer's input and the last one's output, or two to go
    /// back and forth between.
    pub(crate) n_streams: usize,
    /// Sets of activations.
    pub(crate) n_acts: NActs,
    /// Whether there is a backward.
    pub(crate) trains: bool,
    /// Sizes of the adapters' buffers.
    pub(crate) lora: LoraNeeds,
    /// Those of the head's.
    pub(crate) head_lora: LoraNeeds,
}

/// Buffers of the backward.
pub(crate) struct Back<B: Backend> {
    /// Gradient of the residual stream (T, D).
    pub(crate) dx: B::Buf,
    pub(crate) layer: BackScratch<B>,
    pub(crate) head: HeadBack<B>,
}

/// All buffers for up to `rows` tokens.
pub(crate) struct Workspace<B: Backend> {
    pub(crate) rows: usize,
    pub(crate) streams: Vec<B::Buf>,
    pub(crate) acts: ActSets<B>,
    pub(crate) scratch: Scratch<B>,
    pub(crate) head: HeadActs<B>,
    pub(crate) back: Option<Back<B>>,
}

impl<B: Backend> Workspace<B> {
    pub(crate) fn new(backend: &B, dims: &Dims, layout: Layout, rows: usize) -> Self {
        let stream = |_| backend.zeros(rows * dims.d);
        Workspace {
            rows,
            streams: (0..layout.n_streams).map(stream).collect(),
            acts: ActSets::new(backend, dims, layout.n_acts, rows),
            scratch: Scratch::new(backend, dims, layout.lora, rows),
            head: HeadActs::new(backend, dims, rows, layout.head_lora),
            back: layout.trains.then(|| Back {
                dx: backend.zeros(rows * dims.d),
                layer: BackScratch::new(backend, dims, rows),
                head: HeadBack::new(backend, dims, rows),
            }),
        }
    }

    /// Index of the residual stream that layer `layer` reads; it writes the one of `layer + 1`.
    pub(crate) fn stream(&self, layer: usize) -> usize {
        layer % self.streams.len()
    }
    /// Values of the buffers beside the head's.
    pub(crate) fn n_values(&self, backend: &B) -> usize {
        let streams: usize = self.streams.iter().map(|buf| backend.len(buf)).sum();
        let back = self.back.as_ref();
        let back = back.map_or(0, |back| backend.len(&back.dx) + back.layer.n_values(backend));
        streams + self.acts.n_values(backend) + self.scratch.n_values(backend) + back
    }

    /// Values of the head's buffers, with those of its targets' list and their weights.
    pub(crate) fn head_values(&self, backend: &B) -> usize {
        let back = self.back.as_ref().map_or(0, |back| back.head.n_values(backend));
        self.head.n_values(backend) + back
    }
}
