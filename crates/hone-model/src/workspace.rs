//! The buffers of a pass, made once and kept from step to step.

use hone_kernels::Backend;

use crate::Decoder;
use crate::buffers::{ActSets, BackScratch, Dims, NActs, Scratch, StreamGrad};
use crate::head::{HeadActs, HeadBack};
use crate::layer::{Layer, N_SITES};
use crate::linear::{Linear, LoraNeeds};
use crate::lora::EmbedLora;

/// How many of the buffers a decoder needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// The layers.
    pub(crate) n_layers: usize,
    /// The first layer that a backward goes through: nothing below it is trained. The number of
    /// layers where there is no such layer.
    pub(crate) first: usize,
    /// Sets of activations.
    pub(crate) n_acts: NActs,
    /// Whether there is a backward.
    pub(crate) trains: bool,
    /// Sizes of the adapters' buffers.
    pub(crate) lora: LoraNeeds,
    /// Those of the head's.
    pub(crate) head_lora: LoraNeeds,
}

/// Copies of the residual stream: the input of every layer from `first` on and the last one's
/// output; and one more to go back and forth with below.
pub(crate) fn n_streams(n_layers: usize, first: usize) -> usize {
    n_layers - first + 1 + usize::from(first > 0)
}

/// Buffers of the backward.
pub(crate) struct Back<B: Backend> {
    pub(crate) dx: StreamGrad<B>,
    pub(crate) layer: BackScratch<B>,
    pub(crate) head: HeadBack<B>,
}

/// All buffers for up to `rows` tokens.
pub(crate) struct Workspace<B: Backend> {
    pub(crate) rows: usize,
    /// See [`Layout::first`].
    pub(crate) first: usize,
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
            first: layout.first,
            streams: (0..n_streams(layout.n_layers, layout.first)).map(stream).collect(),
            acts: ActSets::new(backend, dims, layout.n_acts, rows),
            scratch: Scratch::new(backend, dims, layout.lora, rows),
            head: HeadActs::new(backend, dims, rows, layout.head_lora),
            back: layout.trains.then(|| Back {
                dx: StreamGrad::new(backend, dims, rows),
                layer: BackScratch::new(backend, dims, rows),
                head: HeadBack::new(backend, dims, rows),
            }),
        }
    }

    /// Index of the residual stream that layer `layer` reads; it writes the one of `layer + 1`.
    pub(crate) fn stream(&self, layer: usize) -> usize {
        match layer.checked_sub(self.first) {
            Some(kept) => kept,
            None if (self.first - layer).is_multiple_of(2) => 0,
            None => self.streams.len() - 1,
        }
    }

    /// Index of the activations of layer `layer`, as far as there are so many.
    pub(crate) fn acts_idx(&self, layer: usize) -> usize {
        layer.saturating_sub(self.first)
    }

    /// Bytes of the buffers beside the head's.
    pub(crate) fn n_bytes(&self, backend: &B) -> u64 {
        let streams: u64 = self.streams.iter().map(|buf| backend.buf_bytes(buf)).sum();
        let back = self.back.as_ref();
        let back = back.map_or(0, |back| back.dx.n_bytes(backend) + back.layer.n_bytes(backend));
        streams + self.acts.n_bytes(backend) + self.scratch.n_bytes(backend) + back
    }

    /// Bytes of the head's buffers, with those of its targets' list and their weights.
    pub(crate) fn head_bytes(&self, backend: &B) -> u64 {
        let back = self.back.as_ref().map_or(0, |back| back.head.n_bytes(backend));
        self.head.n_bytes(backend) + back
    }
}

impl<B: Backend> Decoder<B> {
    /// The buffers that the passes need as things stand.
    pub(crate) fn layout(&self) -> Layout {
        let n_layers = self.layers.len();
        let mut trains = false;
        self.visit(&mut |param| trains |= param.grad.is_some());
        let first = self.first_trained();
        let linears = self.layers.iter().flat_map(Layer::linears);
        let lora = linears.map(Linear::lora_needs).fold(LoraNeeds::default(), LoraNeeds::max);
        let embed_rank = self.embed_lora.as_ref().map_or(0, |lora| lora.rank);
        let lora = lora.max(LoraNeeds { rank: embed_rank, ..LoraNeeds::default() });
        let widest = |inner: [usize; N_SITES], layer: &Layer<B>| {
            let mut widths = layer.linears().map(Linear::inner_width).into_iter();
            inner.map(|width| width.max(widths.next().unwrap_or(0)))
        };
        let inner = self.layers.iter().fold([0; N_SITES], widest);
        Layout {
            n_layers,
            first,
            n_acts: NActs::kept(self.recompute, n_layers - first, inner),
            trains,
            lora,
            head_lora: self.head.lora_needs(self.dims.d),
        }
    }

    /// Whether the embedding, its adapter or rows of it are trained.
    pub(crate) fn trains_embedding(&self) -> bool {
        let lora_is_trained = self.embed_lora.as_ref().is_some_and(EmbedLora::is_trained);
        let rows = self.embed_tokens.as_ref().or(self.head.tied_tokens());
        let rows_are_trained = rows.is_some_and(|tokens| tokens.rows.grad.is_some());
        self.embed.grad.is_some() || lora_is_trained || rows_are_trained
    }

    /// The first layer that a backward goes through; the number of layers where nothing is trained
    /// in them or below.
    fn first_trained(&self) -> usize {
        if self.trains_embedding() {
            return 0;
        }
        let is_trained = |layer: &Layer<B>| {
            let mut found = false;
            layer.visit(&mut |param| found |= param.grad.is_some());
            found
        };
        self.layers.iter().position(is_trained).unwrap_or(self.layers.len())
    }
}
