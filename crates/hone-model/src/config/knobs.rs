//! What a decoder does beside Llama's: the knobs that [`crate::ModelConfig`] carries.
//!
//! The default of every knob is Llama's. A family is a set of values here and nothing else: the
//! decoder executes knobs and does not know families.

/// Where the norms of a layer's halves stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NormPlaces {
    /// Before attention and before the feed-forward (Llama).
    #[default]
    Before,
    /// Before and after each, the latter before the residual sum (Gemma 2 and 3).
    Around,
    /// After each, before the residual sum (OLMo 2).
    After,
}

impl NormPlaces {
    /// Whether there are norms before the halves.
    pub fn before(self) -> bool {
        self != NormPlaces::After
    }

    /// Whether there are norms after the halves.
    pub fn after(self) -> bool {
        self != NormPlaces::Before
    }
}

/// The norm of queries and keys before rotation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    #[default]
    None,
    /// Over each head, one weight of width K for all of them (Qwen3, Gemma 3).
    Head,
    /// Over all heads at once, a weight of width H K for queries and G K for keys (OLMo 2).
    Projection,
}

/// What is applied to the gates of the feed-forward layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activation {
    /// x sigmoid(x).
    #[default]
    Silu,
    /// GELU by its tanh formula, `gelu_pytorch_tanh` (Gemma).
    GeluTanh,
}

/// The factor on attention's scores.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum ScoreScale {
    /// 1 / sqrt(K).
    #[default]
    HeadDim,
    /// 1 / sqrt of this number, `query_pre_attn_scalar` (Gemma).
    RootOf(f64),
    /// This number, `attention_multiplier` (Granite).
    Value(f64),
}

/// The rotary positions of one layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LayerRope {
    /// The model's.
    #[default]
    Main,
    /// Those of [`Knobs::local_rope`] (Gemma 3).
    Local,
    /// None at all (SmolLM3).
    Off,
}

/// What is particular to one layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerKnobs {
    /// Only the last so many positions are seen, the query's own included; `None` sees all.
    pub window: Option<usize>,
    /// Its rotary positions.
    pub rope: LayerRope,
}

/// How rotary frequencies are stretched over a longer context.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    #[default]
    None,
    /// All divided by the factor.
    Linear {
        /// At least 1 as a rule.
        factor: f64,
    },
    /// The base grows with the length of a document that is longer than `max_position_embeddings`
    /// ("dynamic NTK").
    Dynamic {
        /// At least 1 as a rule.
        factor: f64,
    },
    /// Llama 3.1's: long waves are divided, short ones kept, those between blended.
    Llama3 {
        /// Divides the long waves.
        factor: f64,
        /// The original context over the longest wave that is blended.
        low_freq_factor: f64,
        /// The original context over the shortest wave that is blended.
        high_freq_factor: f64,
        /// Context of the pre-training, in tokens.
        original: usize,
    },
    /// YaRN (Peng et al. 2023).
    Yarn {
        /// Divides the long waves.
        factor: f64,
        /// Factor on cosines and sines.
        attention_factor: f64,
        /// Turns within the original context from which a wave is kept.
        beta_fast: f64,
        /// Turns below which a wave is divided.
        beta_slow: f64,
        /// Context of the pre-training, in tokens.
        original: usize,
        /// Whether the ends of the ramp between the two are rounded to whole dimensions.
        truncate: bool,
    },
    /// LongRoPE (Ding et al. 2024): a divisor for each frequency, one set for documents within the
    /// original context and one for longer ones.
    LongRope {
        /// Divisors for documents of at most `original` tokens, R/2 of them.
        short: Vec<f64>,
        /// Divisors for longer ones.
        long: Vec<f64>,
        /// Factor on cosines and sines.
        attention_factor: f64,
        /// Context of the pre-training, in tokens.
        original: usize,
    },
}

/// Base and scaling of rotary positions.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// How they are stretched.
    pub scaling: RopeScaling,
}

/// What a decoder does beside Llama's; the default is Llama itself.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Knobs {
    /// Where norms stand.
    pub norm_places: NormPlaces,
    /// Whether a norm's factor is its weight plus one (Gemma).
    pub norm_plus_one: bool,
    /// Norms of queries and keys.
    pub qk_norm: QkNorm,
    /// Activation of the gates.
    pub activation: Activation,
    /// Whether q, k, v and gate, up are one tensor each, `qkv_proj` and `gate_up_proj` (Phi-3).
    pub fused_weights: bool,
    /// Whether o has no bias although q, k and v have (Qwen2).
    pub bare_output: bool,
    /// Share of a head that is rotated, its first columns; `None` is all of it (Phi-3).
    pub partial_rotary_factor: Option<f64>,
    /// How the frequencies of the main rotary positions are stretched.
    pub rope_scaling: RopeScaling,
    /// Rotary positions of the layers with [`LayerRope::Local`].
    pub local_rope: Option<Rope>,
    /// One for each layer; empty where none has anything particular.
    pub layers: Vec<LayerKnobs>,
    /// Factor on the scores.
    pub score_scale: ScoreScale,
    /// c of the soft cap c tanh(s / c) on scores (Gemma 2).
    pub score_soft_cap: Option<f64>,
    /// c of the soft cap on logits (Gemma 2).
    pub logit_soft_cap: Option<f64>,
    /// Factor on embeddings (Gemma: sqrt(D), which transformers rounds to bf16 where the weights
    /// are; Granite).
    pub embedding_scale: Option<f64>,
    /// Factor on each half of a layer before the residual sum (Granite).
    pub residual_scale: Option<f64>,
    /// What logits are divided by (Granite).
    pub logit_divisor: Option<f64>,
}
