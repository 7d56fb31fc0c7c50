//! What a model is: the knobs of `config.json`, and which of its keys are refused.
//!
//! Keys fall into four tables: those read into [`ModelConfig`], those that must have one value
//! because the decoder computes nothing else, those that do not change what a decoder computes, and
//! the rest. The rest are refused by name unless they are null or false: a knob that is silently
//! ignored is a model that is silently wrong.
//!
//! | file | holds |
//! |---|---|
//! | `families` | one table a family |
//! | `keys` | typed reading of keys, the tables that all share, and refusal |
//! | `knobs` | [`Knobs`]: what a family computes beside Llama's decoder |
//! | `rope` | rotary positions in both spellings |
//! | `write` | the way back to JSON |

mod families;
mod keys;
mod knobs;
mod rope;
mod write;

use serde_json::Value;

use families::Table;
use keys::{Keys, bad};
pub use knobs::{
    Activation, Knobs, LayerKnobs, LayerRope, NormPlaces, QkNorm, Rope, RopeScaling, ScoreScale,
};

use crate::tensors::TensorSource;
use crate::{ModelError, TensorEntry};

/// A family of decoders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Llama 2 and 3, SmolLM2 and others with `model_type` llama.
    Llama,
    /// SmolLM3.
    SmolLm3,
    /// Mistral.
    Mistral,
    /// Qwen2 and Qwen2.5.
    Qwen2,
    /// Qwen3.
    Qwen3,
    /// Gemma 2.
    Gemma2,
    /// The text model of Gemma 3.
    Gemma3,
    /// Phi-3, Phi-3.5 and Phi-4-mini.
    Phi3,
    /// Granite 3.
    Granite,
    /// OLMo 2.
    Olmo2,
}

impl Family {
    /// The value of `model_type`.
    pub fn model_type(self) -> &'static str {
        Table::of(self).model_type
    }
}

/// The shape of a decoder, as `config.json` gives it.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Family.
    pub family: Family,
    /// V, rows of the embedding and of the head.
    pub vocab_size: usize,
    /// D, width of the residual stream.
    pub hidden_size: usize,
    /// I, width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// H, query heads.
    pub num_attention_heads: usize,
    /// G, key/value heads; divides H.
    pub num_key_value_heads: usize,
    /// K, width of a head; even.
    pub head_dim: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies; of those of [`LayerRope::Main`] where there are two.
    pub rope_theta: f64,
    /// Context in tokens as the file says it; [`ModelConfig::context`] is what may be used.
    pub max_position_embeddings: usize,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether q, k and v have biases, and o unless [`Knobs::bare_output`].
    pub attention_bias: bool,
    /// Whether gate, up and down have biases.
    pub mlp_bias: bool,
    /// Standard deviation of freshly drawn matrices.
    pub initializer_range: f64,
    /// Id of the token that begins a text, if any.
    pub bos_token_id: Option<u32>,
    /// Ids of the tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// Id of the padding token, if any.
    pub pad_token_id: Option<u32>,
    /// What is particular to the family.
    pub knobs: Knobs,
}

impl ModelConfig {
    /// Reads the text of a `config.json`. Errors name the key.
    pub fn from_json(text: &str) -> Result<Self, ModelError> {
        let value: Value =
            serde_json::from_str(text).map_err(|error| bad(format!("not JSON: {error}")))?;
        let Value::Object(map) = value else {
            return Err(bad("not a JSON object".to_owned()));
        };
        let keys = Keys::new(&map);
        let table = Table::named(&keys)?;
        keys.refuse_unknown(table)?;
        let mut config = Self::common(&keys, table)?;
        rope::read(&keys, table, &mut config)?;
        (table.read)(&keys, &mut config)?;
        config.check()?;
        Ok(config)
    }

    /// The keys that all families have; knobs are Llama's.
    fn common(keys: &Keys<'_>, table: &Table) -> Result<Self, ModelError> {
        let hidden_size = keys.size("hidden_size")?;
        let num_attention_heads = keys.size("num_attention_heads")?;
        let absent = &table.absent;
        let head_dim = match (keys.optional_size("head_dim")?, absent.head_dim) {
            (Some(head_dim), _) | (None, Some(head_dim)) => head_dim,
            (None, None) => hidden_size / num_attention_heads,
        };
        Ok(ModelConfig {
            family: table.family,
            vocab_size: keys.size("vocab_size")?,
            hidden_size,
            intermediate_size: keys.size("intermediate_size")?,
            num_hidden_layers: keys.size("num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads: keys
                .optional_size("num_key_value_heads")?
                .unwrap_or(num_attention_heads),
            head_dim,
            rms_norm_eps: keys.number("rms_norm_eps", absent.rms_norm_eps)?,
            rope_theta: absent.rope_theta,
            max_position_embeddings: keys.optional_size("max_position_embeddings")?.unwrap_or(2048),
            tie_word_embeddings: keys.flag("tie_word_embeddings", absent.tie_word_embeddings)?,
            attention_bias: keys.flag("attention_bias", false)?,
            mlp_bias: keys.flag("mlp_bias", false)?,
            initializer_range: keys.number("initializer_range", 0.02)?,
            bos_token_id: keys.ids("bos_token_id")?.first().copied(),
            eos_token_ids: keys.ids("eos_token_id")?,
            pad_token_id: keys.ids("pad_token_id")?.first().copied(),
            knobs: Knobs::default(),
        })
    }

    /// The text of a `config.json` that [`ModelConfig::from_json`] and transformers read back,
    /// indented.
    pub fn to_json(&self) -> String {
        let value = Value::Object(write::config(self));
        serde_json::to_string_pretty(&value).expect("a value of plain JSON can be written") + "\n"
    }

    /// Longest document that the model takes, in tokens: `max_position_embeddings`, times the
    /// factor where the rotary positions are scaled dynamically.
    pub fn context(&self) -> usize {
        match self.knobs.rope_scaling {
            RopeScaling::Dynamic { factor } => {
                (self.max_position_embeddings as f64 * factor.max(1.0)) as usize
            }
            _ => self.max_position_embeddings,
        }
    }

    /// What is particular to a layer.
    pub fn layer(&self, layer: usize) -> LayerKnobs {
        self.knobs.layers.get(layer).copied().unwrap_or_default()
    }

    /// R, the columns of a head that are rotated.
    pub fn rotary_dim(&self) -> usize {
        let share = self.knobs.partial_rotary_factor.unwrap_or(1.0);
        (self.head_dim as f64 * share) as usize
    }

    /// The sets of rotary positions: the main one, and the local one if there is one.
    pub(crate) fn ropes(&self) -> Vec<Rope> {
        let scaling = self.knobs.rope_scaling.clone();
        let main = Rope { theta: self.rope_theta, scaling };
        std::iter::once(main).chain(self.knobs.local_rope.clone()).collect()
    }

    /// Names and shapes of all tensors of such a model, sorted by name.
    pub fn tensors(&self) -> Vec<TensorEntry> {
        let mut entries = vec![
            entry("model.embed_tokens.weight", &[self.vocab_size, self.hidden_size]),
            entry("model.norm.weight", &[self.hidden_size]),
        ];
        if !self.tie_word_embeddings {
            entries.push(entry("lm_head.weight", &[self.vocab_size, self.hidden_size]));
        }
        for layer in 0..self.num_hidden_layers {
            let prefix = layer_prefix(layer);
            for (name, width) in self.norms().into_iter().flatten() {
                entries.push(entry(&format!("{prefix}.{name}.weight"), &[width]));
            }
            for linear in self.linears() {
                let name = format!("{prefix}.{}", linear.name);
                entries.push(entry(&format!("{name}.weight"), &[linear.out, linear.inp]));
                if linear.has_bias {
                    entries.push(entry(&format!("{name}.bias"), &[linear.out]));
                }
            }
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        entries
    }

    /// Names and widths of the norms of one layer: before and after attention, before and after
    /// the feed-forward, of queries and of keys.
    pub(crate) fn norms(&self) -> [Option<(&'static str, usize)>; 6] {
        let knobs = &self.knobs;
        let d = |name| Some((name, self.hidden_size));
        let [attn_in, attn_out, ffn_in, ffn_out] = match knobs.norm_places {
            NormPlaces::Before => [d("input_layernorm"), None, d("post_attention_layernorm"), None],
            NormPlaces::Around => [
                d("input_layernorm"),
                d("post_attention_layernorm"),
                d("pre_feedforward_layernorm"),
                d("post_feedforward_layernorm"),
            ],
            NormPlaces::After => {
                [None, d("post_attention_layernorm"), None, d("post_feedforward_layernorm")]
            }
        };
        let (q, k) = match knobs.qk_norm {
            QkNorm::None => return [attn_in, attn_out, ffn_in, ffn_out, None, None],
            QkNorm::Head => (1, 1),
            QkNorm::Projection => (self.num_attention_heads, self.num_key_value_heads),
        };
        let q = Some(("self_attn.q_norm", q * self.head_dim));
        let k = Some(("self_attn.k_norm", k * self.head_dim));
        [attn_in, attn_out, ffn_in, ffn_out, q, k]
    }

    /// The linear maps of one layer, in the order in which they are used.
    pub(crate) fn linears(&self) -> Vec<LinearShape> {
        let d = self.hidden_size;
        let i = self.intermediate_size;
        let q = self.num_attention_heads * self.head_dim;
        let kv = self.num_key_value_heads * self.head_dim;
        let bias = self.attention_bias;
        let shape = |map, name, out, inp, has_bias| LinearShape { map, name, out, inp, has_bias };
        let o = shape(Map::O, "self_attn.o_proj", d, q, bias && !self.knobs.bare_output);
        let down = shape(Map::Down, "mlp.down_proj", d, i, self.mlp_bias);
        if self.knobs.fused_weights {
            return vec![
                shape(Map::Qkv, "self_attn.qkv_proj", q + 2 * kv, d, bias),
                o,
                shape(Map::GateUp, "mlp.gate_up_proj", 2 * i, d, self.mlp_bias),
                down,
            ];
        }
        vec![
            shape(Map::Qkv, "self_attn.q_proj", q, d, bias),
            shape(Map::Qkv, "self_attn.k_proj", kv, d, bias),
            shape(Map::Qkv, "self_attn.v_proj", kv, d, bias),
            o,
            shape(Map::GateUp, "mlp.gate_proj", i, d, self.mlp_bias),
            shape(Map::GateUp, "mlp.up_proj", i, d, self.mlp_bias),
            down,
        ]
    }

    /// Names of a layer's linear maps, as an adapter's `target_modules` has them: what `all-linear`
    /// stands for.
    pub fn linear_names(&self) -> Vec<&'static str> {
        let last = |shape: LinearShape| shape.name.rsplit('.').next().unwrap_or(shape.name);
        self.linears().into_iter().map(last).collect()
    }

    /// Number of weights.
    pub fn n_params(&self) -> usize {
        self.tensors().iter().map(|entry| entry.shape.iter().product::<usize>()).sum()
    }

    /// Checks a source's names and shapes against this configuration, before any tensor is read. A
    /// head beside a tied embedding and precomputed rotary frequencies are allowed: older files
    /// carry them.
    pub fn check_source(&self, source: &dyn TensorSource) -> Result<(), ModelError> {
        let found = source.entries();
        let expected = self.tensors();
        let missing =
            |entry: &&TensorEntry| found.binary_search_by(|f| f.name.cmp(&entry.name)).is_err();
        let unexpected = |entry: &&TensorEntry| {
            let allowed = entry.name.ends_with("rotary_emb.inv_freq")
                || (self.tie_word_embeddings && entry.name == "lm_head.weight");
            !allowed && expected.binary_search_by(|e| e.name.cmp(&entry.name)).is_err()
        };
        let missing: Vec<_> = expected.iter().filter(missing).map(|e| e.name.clone()).collect();
        let unexpected: Vec<_> = found.iter().filter(unexpected).map(|e| e.name.clone()).collect();
        if !missing.is_empty() || !unexpected.is_empty() {
            return Err(ModelError::Names { missing, unexpected });
        }
        for entry in found {
            let Ok(idx) = expected.binary_search_by(|e| e.name.cmp(&entry.name)) else {
                continue;
            };
            if expected[idx].shape != entry.shape {
                let expected = expected[idx].shape.clone();
                return Err(ModelError::Shape { name: entry.name, found: entry.shape, expected });
            }
        }
        Ok(())
    }

    /// Relations between knobs.
    fn check(&self) -> Result<(), ModelError> {
        let (h, g) = (self.num_attention_heads, self.num_key_value_heads);
        if !h.is_multiple_of(g) {
            let what = format!("`num_attention_heads` = {h} is no multiple of");
            return Err(bad(format!("{what} `num_key_value_heads` = {g}")));
        }
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(2) {
            return Err(bad(format!("`head_dim` = {} is not even and above 0", self.head_dim)));
        }
        let rotary_dim = self.rotary_dim();
        if !(2..=self.head_dim).contains(&rotary_dim) || !rotary_dim.is_multiple_of(2) {
            let what = format!("`partial_rotary_factor` rotates {rotary_dim} columns of a head");
            return Err(bad(format!("{what} of {}, not an even number of them", self.head_dim)));
        }
        self.ropes().iter().try_for_each(|rope| rope::check(rope, rotary_dim))?;
        let knobs = &self.knobs;
        let score_scale = match knobs.score_scale {
            ScoreScale::HeadDim => ("head_dim", None),
            ScoreScale::RootOf(scalar) => ("query_pre_attn_scalar", Some(scalar)),
            ScoreScale::Value(factor) => ("attention_multiplier", Some(factor)),
        };
        for (key, value) in [
            ("rms_norm_eps", Some(self.rms_norm_eps)),
            ("initializer_range", Some(self.initializer_range)),
            score_scale,
            ("attn_logit_softcapping", knobs.score_soft_cap),
            ("final_logit_softcapping", knobs.logit_soft_cap),
            ("embedding_multiplier", knobs.embedding_scale),
            ("residual_multiplier", knobs.residual_scale),
            ("logits_scaling", knobs.logit_divisor),
        ] {
            // The decoder computes in f32, where a number may be none.
            if value.is_some_and(|value| value <= 0.0 || !(value as f32).is_normal()) {
                let value = value.unwrap_or_default();
                return Err(bad(format!("`{key}` = {value} is not above 0 in single precision")));
            }
        }
        Ok(())
    }
}

/// The products of a layer; modules that read the same input are one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Map {
    Qkv,
    O,
    GateUp,
    Down,
}

/// Shape of one linear map of a layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LinearShape {
    /// The product that it is part of.
    pub(crate) map: Map,
    /// Name inside the layer.
    pub(crate) name: &'static str,
    pub(crate) out: usize,
    pub(crate) inp: usize,
    pub(crate) has_bias: bool,
}

/// Name of a layer's tensors up to the module.
pub(crate) fn layer_prefix(layer: usize) -> String {
    format!("model.layers.{layer}")
}

fn entry(name: &str, shape: &[usize]) -> TensorEntry {
    TensorEntry { name: name.to_owned(), shape: shape.to_vec() }
}

#[cfg(test)]
mod tests;
