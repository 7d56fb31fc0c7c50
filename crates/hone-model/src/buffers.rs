//! Sizes and constants of a model's layers, and the buffers of their passes.

use hone_kernels::{Backend, Heads, RmsNorm};

use crate::ModelConfig;
use crate::config::{Activation, QkNorm, ScoreScale};
use crate::linear::LoraScratch;

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

/// What the backward of a layer reads, for T tokens; buffers of norms that are not there are empty.
pub(crate) struct Acts<B: Backend> {
    /// Output of the norm before attention (T, D).
    pub(crate) normed: B::Buf,
    /// Its scales (T).
    pub(crate) r1: B::Buf,
    /// Queries, keys and values after rotation (T, (H + 2 G) K).
    pub(crate) qkv: B::Buf,
    /// Queries and keys before their norms (T, H K), (T, G K).
    pub(crate) raw: [B::Buf; 2],
    /// Output of attention (T, H K).
    pub(crate) attn: B::Buf,
    /// Log-sum-exp of attention (T, H).
    pub(crate) lse: B::Buf,
    /// Input of the norm after attention (T, D), and its scales (T).
    pub(crate) attn_end: End<B>,
    /// Residual stream between the halves (T, D).
    pub(crate) mid: B::Buf,
    /// Output of the norm before the feed-forward (T, D).
    pub(crate) mid_normed: B::Buf,
    /// Its scales (T).
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

impl<B: Backend> Acts<B> {
    pub(crate) fn new(backend: &B, dims: &Dims, rows: usize) -> Self {
        let zeros = |width: usize| backend.zeros(rows * width);
        let when = |is_there: bool, width: usize| zeros(if is_there { width } else { 0 });
        let end = || End { input: when(dims.norm_after, dims.d), r: when(dims.norm_after, 1) };
        let has_qk_norm = dims.qk_norm != QkNorm::None;
        Acts {
            normed: when(dims.norm_before, dims.d),
            r1: when(dims.norm_before, 1),
            qkv: zeros(dims.heads.qkv_width()),
            raw: dims.qk_widths().map(|width| when(has_qk_norm, width)),
            attn: zeros(dims.heads.out_width()),
            lse: zeros(dims.heads.n_q),
            attn_end: end(),
            mid: zeros(dims.d),
            mid_normed: when(dims.norm_before, dims.d),
            r2: when(dims.norm_before, 1),
            gate_up: zeros(2 * dims.i),
            ffn_end: end(),
        }
    }

    /// Values per token.
    pub(crate) fn values_per_token(dims: &Dims) -> usize {
        let norms = usize::from(dims.norm_before) + usize::from(dims.norm_after);
        let qk: usize =
            if dims.qk_norm == QkNorm::None { 0 } else { dims.qk_widths().iter().sum() };
        (2 * norms + 1) * dims.d
            + 2 * norms
            + qk
            + dims.heads.qkv_width()
            + dims.heads.out_width()
            + dims.heads.n_q
            + 2 * dims.i
    }
}

/// Buffers of a forward that no backward reads, shared by all layers.
pub(crate) struct Scratch<B: Backend> {
    /// Output of the gated activation (T, I).
    pub(crate) h: B::Buf,
    pub(crate) lora: LoraScratch<B>,
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
    pub(crate) fn new(backend: &B, dims: &Dims, rows: usize) -> Self {
        let zeros = |width: usize| backend.zeros(rows * width);
        BackScratch {
            dnormed: zeros(dims.d),
            dqkv: zeros(dims.heads.qkv_width()),
            dattn: zeros(dims.heads.out_width()),
            dh: zeros(dims.i),
            dend: zeros(if dims.norm_after { dims.d } else { 0 }),
        }
    }

    /// Values per token.
    pub(crate) fn values_per_token(dims: &Dims) -> usize {
        let norms = 1 + usize::from(dims.norm_after);
        norms * dims.d + dims.heads.qkv_width() + dims.heads.out_width() + dims.i
    }
}
