//! The buffers of a pass, made once and kept from step to step.

use hone_kernels::Backend;

use crate::buffers::{Acts, BackScratch, Dims, Scratch};
use crate::head::{HeadActs, HeadBack};
use crate::linear::{LoraNeeds, LoraScratch};

/// How many of the buffers a decoder needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Copies of the residual stream: every layer's input and the last one's output, or two to go
    /// back and forth between.
    pub(crate) n_streams: usize,
    /// Sets of activations: one a layer, or one for all.
    pub(crate) n_acts: usize,
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
    pub(crate) acts: Vec<Acts<B>>,
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
            acts: (0..layout.n_acts).map(|_| Acts::new(backend, dims, rows)).collect(),
            scratch: scratch(backend, dims, layout, rows),
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
}

/// The forward's shared buffers.
pub(crate) fn scratch<B: Backend>(
    backend: &B,
    dims: &Dims,
    layout: Layout,
    rows: usize,
) -> Scratch<B> {
    Scratch { h: backend.zeros(rows * dims.i), lora: LoraScratch::new(backend, rows, layout.lora) }
}
