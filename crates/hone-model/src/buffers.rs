//! Sizes and constants of a model's layers, and the buffers of their passes.

use hone_kernels::{Backend, Cpu, Heads, RmsNorm};

use crate::config::{Activation, QkNorm, ScoreScale};
use crate::linear::{LoraNeeds, LoraScratch};
use crate::{ModelConfig, Recompute};

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
}

/// Input (T, D) and scales (T) of a norm at the end of a half.
pub(crate) struct End<B: Backend> {
    pub(crate) input: B::Buf,
    pub(crate) r: B::Buf,
}

impl<B: Backend> HalfActs<B> {
    /// Values per token of each buffer.
    fn widths(dims: &Dims) -> [usize; 7] {
        let (before, after) = (usize::from(dims.norm_before), usize::from(dims.norm_after));
        let has_qk_norm = usize::from(dims.qk_norm != QkNorm::None);
        let [q, k] = dims.qk_widths().map(|width| has_qk_norm * width);
        [before, dims.heads.qkv_width(), q, k, after * dims.d, after, dims.d]
    }

    fn new(backend: &B, dims: &Dims, rows: usize) -> Self {
        let buffers = Self::widths(dims).map(|width| backend.zeros(rows * width));
        let [r1, qkv, q, k, input, r, mid] = buffers;
        HalfActs { r1, qkv, raw: [q, k], end: End { input, r }, mid }
    }
}

impl<B: Backend> CoreActs<B> {
    /// Values per token of each buffer.
    fn widths(dims: &Dims) -> [usize; 6] {
        let (before, after) = (usize::from(dims.norm_before), usize::from(dims.norm_after));
        [dims.heads.out_width(), dims.heads.n_q, before, 2 * dims.i, after * dims.d, after]
    }

    fn new(backend: &B, dims: &Dims, rows: usize) -> Self {
        let buffers = Self::widths(dims).map(|width| backend.zeros(rows * width));
        let [attn, lse, r2, gate_up, input, r] = buffers;
        CoreActs { attn, lse, r2, gate_up, ffn_end: End { input, r } }
    }
}

/// How many sets of activations a pass has: one a layer, or one that the layers share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NActs {
    pub(crate) halves: usize,
    pub(crate) cores: usize,
}

impl NActs {
    /// One that all layers share, where nothing is kept.
    pub(crate) const SHARED: NActs = NActs { halves: 1, cores: 1 };

    /// What a pass keeps whose backward goes through `n_layers`.
    pub(crate) fn kept(recompute: Recompute, n_layers: usize) -> Self {
        let n = n_layers.max(1);
        match recompute {
            Recompute::None => NActs { halves: n, cores: n },
            Recompute::Attention => NActs { halves: 1, cores: n },
            Recompute::Layer => NActs::SHARED,
        }
    }

    /// Values per token of all sets.
    pub(crate) fn values_per_token(self, dims: &Dims) -> usize {
        let half: usize = HalfActs::<Cpu>::widths(dims).iter().sum();
        let core: usize = CoreActs::<Cpu>::widths(dims).iter().sum();
        self.halves * half + self.cores * core
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
            cores: (0..n_acts.cores).map(|_| CoreActs::new(backend, dims, rows)).collect(),
        }
    }

    /// Those that layer `layer` writes and reads.
    pub(crate) fn of_layer(&mut self, layer: usize) -> Acts<'_, B> {
        let ActSets { halves, cores } = self;
        let (half, core) = (layer % halves.len(), layer % cores.len());
        Acts { half: &mut halves[half], core: &mut cores[core] }
    }

    /// Values of all buffers.
    pub(crate) fn n_values(&self, backend: &B) -> usize {
        let end = |end: &End<B>| backend.len(&end.input) + backend.len(&end.r);
        let half = |acts: &HalfActs<B>| {
            let HalfActs { r1, qkv, raw: [q, k], end: attn_end, mid } = acts;
            let plain: usize = [r1, qkv, q, k, mid].map(|buf| backend.len(buf)).iter().sum();
            plain + end(attn_end)
        };
        let core = |acts: &CoreActs<B>| {
            let CoreActs { attn, lse, r2, gate_up, ffn_end } = acts;
            let plain: usize = [attn, lse, r2, gate_up].map(|buf| backend.len(buf)).iter().sum();
            plain + end(ffn_end)
        };
        self.halves.iter().map(half).sum::<usize>() + self.cores.iter().map(core).sum::<usize>()
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
        let [normed, h] = Self::widths(dims).map(|width| backend.zeros(rows * width));
        Scratch { normed, h, lora: LoraScratch::new(backend, rows, lora) }
    }

    fn widths(dims: &Dims) -> [usize; 2] {
        [if dims.norm_before { dims.d } else { 0 }, dims.i]
    }

    /// Values per token, without those of adapters.
    pub(crate) fn values_per_token(dims: &Dims) -> usize {
        Self::widths(dims).iter().sum()
    }

    /// Values of all buffers.
    pub(crate) fn n_values(&self, backend: &B) -> usize {
        let Scratch { normed, h, lora } = self;
        backend.len(normed) + backend.len(h) + lora.n_values(backend)
    }
}

/// Buffers of a backward, shared by all layers.
pub(crate) struct BackScratch<B: Backend> {
    /// Gradient at a norm's output (T, D).
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
    fn widths(dims: &Dims) -> [usize; 5] {
        let dend = if dims.norm_after { dims.d } else { 0 };
        [dims.d, dims.heads.qkv_width(), dims.heads.out_width(), dims.i, dend]
    }

    pub(crate) fn new(backend: &B, dims: &Dims, rows: usize) -> Self {
        let buffers = Self::widths(dims).map(|width| backend.zeros(rows * width));
        let [dnormed, dqkv, dattn, dh, dend] = buffers;
        BackScratch { dnormed, dqkv, dattn, dh, dend }
    }

    /// Values per token.
    pub(crate) fn values_per_token(dims: &Dims) -> usize {
        Self::widths(dims).iter().sum()
    }

    /// Values of all buffers.
    pub(crate) fn n_values(&self, backend: &B) -> usize {
        let BackScratch { dnormed, dqkv, dattn, dh, dend } = self;
        [dnormed, dqkv, dattn, dh, dend].map(|buf| backend.len(buf)).iter().sum()
    }
}
