//! Sizes and constants of a model's layers, and the buffers of their passes.

use hone_kernels::{Backend, Compute, Cpu, Heads, RmsNorm};

use crate::config::{Activation, QkNorm, ScoreScale};
use crate::held::VALUE_BYTES;
use crate::layer::N_SITES;
use crate::linear::{LoraNeeds, LoraScratch};
use crate::{ModelConfig, Recompute};

/// A buffer to be made: values of a row, and how they are kept.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Width {
    n: usize,
    is_rounded: bool,
}

/// Rows of f32: what is added up, such as the residual stream and its gradient, and scales.
pub(crate) fn exact(n: usize) -> Width {
    Width { n, is_rounded: false }
}

/// Rows of values that are rounded to what products compute in: factors of products, and what a
/// backward reads once more ([`Backend::zeros_rounded`]).
pub(crate) fn rounded(n: usize) -> Width {
    Width { n, is_rounded: true }
}

impl Width {
    /// The buffer, of so many rows.
    pub(crate) fn make<B: Backend>(self, backend: &B, rows: usize) -> B::Buf {
        let n = rows * self.n;
        if self.is_rounded { backend.zeros_rounded(n) } else { backend.zeros(n) }
    }

    /// Its bytes.
    pub(crate) fn n_bytes(self, compute: Compute, rows: usize) -> u64 {
        let value = if self.is_rounded { compute.value_bytes() as u64 } else { VALUE_BYTES };
        value * (rows * self.n) as u64
    }
}

/// Bytes of buffers of so many rows.
pub(crate) fn planned_bytes(widths: &[Width], compute: Compute, rows: usize) -> u64 {
    widths.iter().map(|width| width.n_bytes(compute, rows)).sum()
}

/// Bytes of buffers that are there.
pub(crate) fn held_bytes<B: Backend, const N: usize>(backend: &B, bufs: [&B::Buf; N]) -> u64 {
    bufs.iter().map(|buf| backend.buf_bytes(buf)).sum()
}

/// Sizes and constants that every layer shares.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dims {
    /// D.
    pub(crate) d: usize,
    /// I.
    pub(crate) i: usize,
    /// V.
    pub(crate) v: usize,
    pub(crate) heads: Heads,
    /// R.
    pub(crate) rotary: usize,
    pub(crate) norm: RmsNorm,
    /// Whether there are norms before and after the halves.
    pub(crate) norm_before: bool,
    pub(crate) norm_after: bool,
    pub(crate) qk_norm: QkNorm,
    pub(crate) activation: Activation,
    /// Factor on the scores.
    pub(crate) scale: f32,
    pub(crate) score_cap: Option<f32>,
    /// Factor on a half before it is added; `None` is 1.
    pub(crate) residual: Option<f32>,
    /// Factor on embeddings; `None` is 1.
    pub(crate) embedding: Option<f32>,
    /// Factor on logits; `None` is 1.
    pub(crate) logit_factor: Option<f32>,
    pub(crate) logit_cap: Option<f32>,
}

impl Dims {
    pub(crate) fn new(config: &ModelConfig) -> Self {
        let heads = Heads {
            n_q: config.num_attention_heads,
            n_kv: config.num_key_value_heads,
            dim: config.head_dim,
        };
        let knobs = &config.knobs;
        let scale = match knobs.score_scale {
            ScoreScale::HeadDim => 1.0 / (config.head_dim as f64).sqrt(),
            ScoreScale::RootOf(scalar) => 1.0 / scalar.sqrt(),
            ScoreScale::Value(factor) => factor,
        };
        let factor = |factor: Option<f64>| {
            factor.filter(|factor| *factor != 1.0).map(|factor| factor as f32)
        };
        Dims {
            d: config.hidden_size,
            i: config.intermediate_size,
            v: config.vocab_size,
            heads,
            rotary: config.rotary_dim(),
            norm: RmsNorm {
                eps: config.rms_norm_eps as f32,
                offset: if knobs.norm_plus_one { 1.0 } else { 0.0 },
            },
            norm_before: knobs.norm_places.before(),
            norm_after: knobs.norm_places.after(),
            qk_norm: knobs.qk_norm,
            activation: knobs.activation,
            scale: scale as f32,
            score_cap: knobs.score_soft_cap.map(|cap| cap as f32),
            residual: factor(knobs.residual_scale),
            embedding: factor(knobs.embedding_scale),
            logit_factor: factor(knobs.logit_divisor.map(|divisor| 1.0 / divisor)),
            logit_cap: knobs.logit_soft_cap.map(|cap| cap as f32),
        }
    }

    /// Columns of the queries and of the keys.
    pub(crate) fn qk_widths(&self) -> [usize; 2] {
        [self.heads.n_q * self.heads.dim, self.heads.n_kv * self.heads.dim]
    }
}

/// What the attention half of a layer keeps for T tokens beside attention itself: all of it is
/// linear maps and norms of the layer's input and of attention's output. Buffers of norms that are
/// not there are empty.
pub(crate) struct HalfActs<B: Backend> {
    /// Scales of the norm before attention (T).
    pub(crate) r1: B::Buf,
    /// Queries, keys and values after rotation (T, (H + 2 G) K).
    pub(crate) qkv: B::Buf,
    /// Queries and keys before their norms (T, H K), (T, G K).
    pub(crate) raw: [B::Buf; 2],
    /// Input of the norm after attention (T, D), and its scales (T).
    pub(crate) end: End<B>,
    /// Residual stream between the halves (T, D).
    pub(crate) mid: B::Buf,
}

/// What else the backward of a layer reads, for T tokens.
pub(crate) struct CoreActs<B: Backend> {
    /// Output of attention (T, H K).
    pub(crate) attn: B::Buf,
    /// Log-sum-exp of attention (T, H).
    pub(crate) lse: B::Buf,
    /// Scales of the norm before the feed-forward (T).
    pub(crate) r2: B::Buf,
    /// Gates and ups (T, 2 I); the backward turns them into their gradient.
    pub(crate) gate_up: B::Buf,
    /// Input of the norm after the feed-forward (T, D), and its scales (T).
    pub(crate) ffn_end: End<B>,
    /// X At of each map's adapter (T, R); empty where it is not kept.
    pub(crate) inner: [B::Buf; N_SITES],
}

/// Input (T, D) and scales (T) of a norm at the end of a half.
pub(crate) struct End<B: Backend> {
    pub(crate) input: B::Buf,
    pub(crate) r: B::Buf,
}

impl<B: Backend> HalfActs<B> {
    fn widths(dims: &Dims) -> [Width; 7] {
        let (before, after) = (usize::from(dims.norm_before), usize::from(dims.norm_after));
        let has_qk_norm = usize::from(dims.qk_norm != QkNorm::None);
        let [q, k] = dims.qk_widths().map(|width| has_qk_norm * width);
        let [r1, qkv] = [exact(before), rounded(dims.heads.qkv_width())];
        [r1, qkv, rounded(q), rounded(k), exact(after * dims.d), exact(after), exact(dims.d)]
    }

    fn new(backend: &B, dims: &Dims, rows: usize) -> Self {
        let buffers = Self::widths(dims).map(|width| width.make(backend, rows));
        let [r1, qkv, q, k, input, r, mid] = buffers;
        HalfActs { r1, qkv, raw: [q, k], end: End { input, r }, mid }
    }
}

impl<B: Backend> CoreActs<B> {
    fn widths(dims: &Dims, inner: [usize; N_SITES]) -> [Width; 6 + N_SITES] {
        let (before, after) = (usize::from(dims.norm_before), usize::from(dims.norm_after));
        let [attn, lse] = [rounded(dims.heads.out_width()), exact(dims.heads.n_q)];
        let [gate_up, input] = [rounded(2 * dims.i), exact(after * dims.d)];
        let [qkv, o, gates, down] = inner.map(rounded);
        [attn, lse, exact(before), gate_up, input, exact(after), qkv, o, gates, down]
    }

    fn new(backend: &B, dims: &Dims, inner: [usize; N_SITES], rows: usize) -> Self {
        let buffers = Self::widths(dims, inner).map(|width| width.make(backend, rows));
        let [attn, lse, r2, gate_up, input, r, inner @ ..] = buffers;
        CoreActs { attn, lse, r2, gate_up, ffn_end: End { input, r }, inner }
    }
}

/// How many sets of activations a pass has, one a layer or one that the layers share, and what is in
/// them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NActs {
    pub(crate) halves: usize,
    pub(crate) cores: usize,
    /// R of each map's adapter where X At is kept, or 0.
    pub(crate) inner: [usize; N_SITES],
}

impl NActs {
    /// One that all layers share, where nothing is kept.
    pub(crate) const SHARED: NActs = NActs { halves: 1, cores: 1, inner: [0; N_SITES] };

    /// What a pass keeps whose backward goes through `n_layers`, with adapters of ranks `inner` on
    /// their maps.
    pub(crate) fn kept(recompute: Recompute, n_layers: usize, inner: [usize; N_SITES]) -> Self {
        let n = n_layers.max(1);
        match recompute {
            Recompute::None => NActs { halves: n, cores: n, inner },
            Recompute::Attention => NActs { halves: 1, cores: n, inner },
            Recompute::Layer => NActs::SHARED,
        }
    }

    /// Bytes of all sets for `rows` tokens.
    pub(crate) fn n_bytes(self, dims: &Dims, compute: Compute, rows: usize) -> u64 {
        let half = planned_bytes(&HalfActs::<Cpu>::widths(dims), compute, rows);
        let core = planned_bytes(&CoreActs::<Cpu>::widths(dims, self.inner), compute, rows);
        self.halves as u64 * half + self.cores as u64 * core
    }
}

/// The sets of activations of all layers.
pub(crate) struct ActSets<B: Backend> {
    halves: Vec<HalfActs<B>>,
    cores: Vec<CoreActs<B>>,
}

/// The activations of one layer.
pub(crate) struct Acts<'a, B: Backend> {
    pub(crate) half: &'a mut HalfActs<B>,
    pub(crate) core: &'a mut CoreActs<B>,
}

impl<B: Backend> ActSets<B> {
    pub(crate) fn new(backend: &B, dims: &Dims, n_acts: NActs, rows: usize) -> Self {
        ActSets {
            halves: (0..n_acts.halves).map(|_| HalfActs::new(backend, dims, rows)).collect(),
            cores: (0..n_acts.cores)
                .map(|_| CoreActs::new(backend, dims, n_acts.inner, rows))
                .collect(),
        }
    }

    /// Those that layer `layer` writes and reads.
    pub(crate) fn of_layer(&mut self, layer: usize) -> Acts<'_, B> {
        let ActSets { halves, cores } = self;
        let (half, core) = (layer % halves.len(), layer % cores.len());
        Acts { half: &mut halves[half], core: &mut cores[core] }
    }

    /// Bytes of all buffers.
    pub(crate) fn n_bytes(&self, backend: &B) -> u64 {
        let half = |acts: &HalfActs<B>| {
            let HalfActs { r1, qkv, raw: [q, k], end, mid } = acts;
            held_bytes(backend, [r1, qkv, q, k, mid, &end.input, &end.r])
        };
        let core = |acts: &CoreActs<B>| {
            let CoreActs { attn, lse, r2, gate_up, ffn_end, inner } = acts;
            held_bytes(backend, [attn, lse, r2, gate_up, &ffn_end.input, &ffn_end.r])
                + held_bytes(backend, inner.each_ref())
        };
        self.halves.iter().map(half).sum::<u64>() + self.cores.iter().map(core).sum::<u64>()
    }
}

/// Buffers of a forward that are written again whenever they are read, shared by all layers.
pub(crate) struct Scratch<B: Backend> {
    /// Output of the norm before a half (T, D); empty without such norms.
    pub(crate) normed: B::Buf,
    /// Output of the gated activation (T, I).
    pub(crate) h: B::Buf,
    pub(crate) lora: LoraScratch<B>,
}

impl<B: Backend> Scratch<B> {
    pub(crate) fn new(backend: &B, dims: &Dims, lora: LoraNeeds, rows: usize) -> Self {
        let [normed, h] = Self::widths(dims).map(|width| width.make(backend, rows));
        Scratch { normed, h, lora: LoraScratch::new(backend, rows, lora) }
    }

    fn widths(dims: &Dims) -> [Width; 2] {
        [rounded(if dims.norm_before { dims.d } else { 0 }), rounded(dims.i)]
    }

    /// Bytes for `rows` tokens.
    pub(crate) fn planned_bytes(
        dims: &Dims,
        lora: LoraNeeds,
        compute: Compute,
        rows: usize,
    ) -> u64 {
        planned_bytes(&Self::widths(dims), compute, rows) + lora.n_bytes(compute, rows)
    }

    /// Bytes of all buffers.
    pub(crate) fn n_bytes(&self, backend: &B) -> u64 {
        let Scratch { normed, h, lora } = self;
        held_bytes(backend, [normed, h]) + lora.n_bytes(backend)
    }
}

/// Gradient of the residual stream (T, D).
pub(crate) struct StreamGrad<B: Backend> {
    pub(crate) exact: B::Buf,
    /// The same as products read it, so that each need not round it; empty where they round nothing,
    /// and where it is scaled or goes through a norm before them.
    pub(crate) rounded: B::Buf,
}

impl<B: Backend> StreamGrad<B> {
    pub(crate) fn new(backend: &B, dims: &Dims, rows: usize) -> Self {
        let widths = Self::widths(dims, backend.compute());
        let [exact, rounded] = widths.map(|width| width.make(backend, rows));
        StreamGrad { exact, rounded }
    }

    /// The widths of both.
    pub(crate) fn widths(dims: &Dims, compute: Compute) -> [Width; 2] {
        let is_factor = dims.residual.is_none() && !dims.norm_after;
        let is_rounded = is_factor && compute != Compute::F32;
        [exact(dims.d), rounded(if is_rounded { dims.d } else { 0 })]
    }

    /// The gradient as a factor of products.
    pub(crate) fn factor(&self, backend: &B) -> &B::Buf {
        if backend.len(&self.rounded) > 0 { &self.rounded } else { &self.exact }
    }

    /// Rounds the first `n` values, after they have been written.
    pub(crate) fn round(&mut self, backend: &B, n: usize) {
        if backend.len(&self.rounded) > 0 {
            backend.copy(&self.exact, &mut self.rounded, n);
        }
    }

    /// Bytes of both.
    pub(crate) fn n_bytes(&self, backend: &B) -> u64 {
        held_bytes(backend, [&self.exact, &self.rounded])
    }
}

/// Buffers of a backward, shared by all layers.
pub(crate) struct BackScratch<B: Backend> {
    /// Gradient at a norm's output (T, D), and that of the stream where it is scaled.
    pub(crate) dnormed: B::Buf,
    /// Gradient of queries, keys and values.
    pub(crate) dqkv: B::Buf,
    /// Gradient of attention's output.
    pub(crate) dattn: B::Buf,
    /// Gradient of the gated activation's output (T, I).
    pub(crate) dh: B::Buf,
    /// Gradient at the input of a norm that ends a half (T, D); empty without such norms.
    pub(crate) dend: B::Buf,
}

impl<B: Backend> BackScratch<B> {
    fn widths(dims: &Dims) -> [Width; 5] {
        let dend = if dims.norm_after { dims.d } else { 0 };
        let [dqkv, dattn] = [dims.heads.qkv_width(), dims.heads.out_width()].map(rounded);
        let dnormed = if dims.residual.is_some() { exact(dims.d) } else { rounded(dims.d) };
        [dnormed, dqkv, dattn, rounded(dims.i), exact(dend)]
    }

    pub(crate) fn new(backend: &B, dims: &Dims, rows: usize) -> Self {
        let buffers = Self::widths(dims).map(|width| width.make(backend, rows));
        let [dnormed, dqkv, dattn, dh, dend] = buffers;
        BackScratch { dnormed, dqkv, dattn, dh, dend }
    }

    /// Bytes for `rows` tokens.
    pub(crate) fn planned_bytes(dims: &Dims, compute: Compute, rows: usize) -> u64 {
        planned_bytes(&Self::widths(dims), compute, rows)
    }

    /// Bytes of all buffers.
    pub(crate) fn n_bytes(&self, backend: &B) -> u64 {
        let BackScratch { dnormed, dqkv, dattn, dh, dend } = self;
        held_bytes(backend, [dnormed, dqkv, dattn, dh, dend])
    }
}
