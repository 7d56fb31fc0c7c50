//! The buffers of the head's passes.

use hone_kernels::{Backend, Compute, rng};

use crate::buffers::{Dims, Width, exact, held_bytes, planned_bytes, rounded};
use crate::held::VALUE_BYTES;
use crate::linear::{LoraNeeds, LoraScratch};

/// Logits held at once, as far as [`CHUNK_ROWS_MIN`] allows: 48 MiB, and half as much again where their
/// gradient is rounded. Each chunk reads the head's matrix from memory, forward and back, for which
/// chunks of a few MiB waited longer than they multiplied.
const CHUNK_VALUES: usize = 12 << 20;

/// Fewest rows of a chunk: below it the product with the head is bound by reading the head.
const CHUNK_ROWS_MIN: usize = 64;

/// Most rows of a chunk: what a small vocabulary saves is not worth more.
const CHUNK_ROWS_MAX: usize = 512;

/// Rows of a chunk are a multiple of it, as those of blocks of a product.
const CHUNK_ROWS_ALIGN: usize = 16;

/// Rows of logits of one chunk.
pub(super) fn chunk_rows(vocab: usize) -> usize {
    let rows = CHUNK_VALUES / vocab / CHUNK_ROWS_ALIGN * CHUNK_ROWS_ALIGN;
    rows.clamp(CHUNK_ROWS_MIN, CHUNK_ROWS_MAX)
}

/// Buffers of the head for up to N rows.
pub(crate) struct HeadActs<B: Backend> {
    /// The rows' hidden states (N, D).
    pub(super) gathered: B::Buf,
    /// Scales of the norm (N).
    pub(super) r: B::Buf,
    /// After the norm (N, D).
    pub(super) normed: B::Buf,
    /// Logits of a chunk, then their gradient where that is not rounded.
    pub(super) logits: B::Buf,
    /// Targets and weights of the rows.
    pub(super) targets: Vec<u32>,
    pub(super) weights: Vec<f32>,
    /// Buffers of its adapter.
    pub(super) lora: LoraScratch<B>,
    /// Turns the adapter's dropout on for this pass.
    pub(crate) dropout_seed: Option<u64>,
}

/// Buffers of the head's backward.
pub(crate) struct HeadBack<B: Backend> {
    /// Gradient of a chunk's logits, where products round it; empty where they do not.
    pub(super) dlogits: B::Buf,
    /// Gradient after the norm (N, D).
    pub(super) dnormed: B::Buf,
    /// Gradient before the norm (N, D).
    pub(super) dgathered: B::Buf,
}

impl<B: Backend> HeadActs<B> {
    pub(crate) fn new(backend: &B, dims: &Dims, rows: usize, lora: LoraNeeds) -> Self {
        let (sizes, chunk) = Self::sizes(dims, rows);
        let [gathered, r, normed, logits] = sizes.map(|width| width.make(backend, 1));
        HeadActs {
            gathered,
            r,
            normed,
            logits,
            targets: Vec::with_capacity(rows),
            weights: Vec::with_capacity(rows),
            lora: LoraScratch::new(backend, chunk, lora),
            dropout_seed: None,
        }
    }

    /// Each buffer as one row, and rows of a chunk.
    fn sizes(dims: &Dims, rows: usize) -> ([Width; 4], usize) {
        let chunk = chunk_rows(dims.v).min(rows);
        let [gathered, normed] = [exact, rounded].map(|width| width(rows * dims.d));
        ([gathered, exact(rows), normed, exact(chunk * dims.v)], chunk)
    }

    /// Bytes of all buffers and of both lists for `rows` rows.
    pub(crate) fn planned_bytes(
        dims: &Dims,
        rows: usize,
        lora: LoraNeeds,
        compute: Compute,
    ) -> u64 {
        let (sizes, chunk) = Self::sizes(dims, rows);
        let lists = VALUE_BYTES * 2 * rows as u64;
        planned_bytes(&sizes, compute, 1) + lists + lora.n_bytes(compute, chunk)
    }

    /// Bytes of all buffers and of both lists.
    pub(crate) fn n_bytes(&self, backend: &B) -> u64 {
        let HeadActs { gathered, r, normed, logits, targets, weights, lora, .. } = self;
        let lists = VALUE_BYTES * (targets.capacity() + weights.capacity()) as u64;
        held_bytes(backend, [gathered, r, normed, logits]) + lists + lora.n_bytes(backend)
    }

    /// The seed of the chunk of rows from `start`.
    pub(super) fn chunk_seed(&self, start: usize) -> Option<u64> {
        self.dropout_seed.map(|seed| rng::mix(seed, start as u64))
    }
}

impl<B: Backend> HeadBack<B> {
    pub(crate) fn new(backend: &B, dims: &Dims, rows: usize) -> Self {
        let sizes = Self::sizes(dims, rows, backend.compute());
        let [dlogits, dnormed, dgathered] = sizes.map(|width| width.make(backend, 1));
        HeadBack { dlogits, dnormed, dgathered }
    }

    /// Each buffer as one row.
    fn sizes(dims: &Dims, rows: usize, compute: Compute) -> [Width; 3] {
        let dlogits = match compute {
            Compute::F32 => 0,
            Compute::Bf16 => chunk_rows(dims.v).min(rows) * dims.v,
        };
        let d = rows * dims.d;
        [rounded(dlogits), exact(d), exact(d)]
    }

    /// Where the gradient of logits goes, if not in their place.
    pub(super) fn dlogits_mut(&mut self, backend: &B) -> Option<&mut B::Buf> {
        (backend.len(&self.dlogits) > 0).then_some(&mut self.dlogits)
    }

    /// Bytes of all buffers for `rows` rows.
    pub(crate) fn planned_bytes(dims: &Dims, rows: usize, compute: Compute) -> u64 {
        planned_bytes(&Self::sizes(dims, rows, compute), compute, 1)
    }

    /// Bytes of all buffers.
    pub(crate) fn n_bytes(&self, backend: &B) -> u64 {
        held_bytes(backend, [&self.dlogits, &self.dnormed, &self.dgathered])
    }
}
