//! The self-test of the first step: every trained tensor gets a gradient, and it is the one
//! expected.
//!
//! A model that trains nothing, or half of what it should, runs as fast and prints as plausible a
//! loss as one that trains. So the gradients of step 0 are looked at, tensor by tensor, before the
//! first update.

use hone_kernels::Backend;
use hone_model::{LayerRope, ModelConfig, ParamKind, QkNorm};
use serde::Serialize;

use crate::Learner;

/// One trained tensor.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SelfTestRow {
    /// Its name.
    pub name: String,
    /// Number of values.
    pub n_values: usize,
    /// Norm of its values.
    pub value_norm: f64,
    /// Norm of its gradient.
    pub grad_norm: f64,
    /// Whether that gradient must be zero now: of an adapter's A while its B is zero (of the
    /// embedding's, B while A is), and only then.
    pub expects_zero: bool,
    /// Why that gradient may as well be zero, where it may.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub may_be_zero: Option<&'static str>,
    /// Whether it is as expected: finite, and zero or not as it should.
    pub passed: bool,
}

/// The table.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SelfTest {
    /// A row per trained tensor, in the order of the parameters.
    pub rows: Vec<SelfTestRow>,
    /// Number of trained values.
    pub n_trained: usize,
    /// Number of frozen values, which have no gradient to begin with.
    pub n_frozen: usize,
}

impl SelfTest {
    /// Whether every row passed.
    pub fn passed(&self) -> bool {
        self.rows.iter().all(|row| row.passed)
    }

    /// The rows that did not pass.
    pub fn failures(&self) -> impl Iterator<Item = &SelfTestRow> {
        self.rows.iter().filter(|row| !row.passed)
    }
}

impl<B: Backend> Learner<B> {
    /// Norm of the gradient accumulated so far by part of the model, in the order of the parameters: each layer under its number,
    /// what lies outside them under its name. Call it between [`Learner::accumulate`] and [`Learner::apply`].
    pub fn grad_norms(&self) -> Vec<(String, f64)> {
        let mut parts: Vec<(String, f64)> = Vec::new();
        for (info, _, squares) in self.decoder.squares_of_trained() {
            let part = part_of(&info.name);
            match parts.iter_mut().find(|(name, _)| *name == part) {
                Some((_, sum)) => *sum += squares,
                None => parts.push((part, squares)),
            }
        }
        parts.into_iter().map(|(part, sum)| (part, sum.sqrt())).collect()
    }

    /// Looks at the gradients accumulated so far: call it between [`Learner::accumulate`] and
    /// [`Learner::apply`].
    pub fn self_test(&self) -> SelfTest {
        let mut rows = Vec::new();
        let mut kinds = Vec::new();
        for (info, values, gradient) in self.decoder.squares_of_trained() {
            kinds.push(info.kind);
            rows.push(SelfTestRow {
                n_values: info.n_values(),
                value_norm: values.sqrt(),
                grad_norm: gradient.sqrt(),
                expects_zero: false,
                may_be_zero: may_be_zero(self.decoder.config(), &info.name),
                passed: false,
                name: info.name,
            });
        }
        let zeros: Vec<String> =
            rows.iter().filter(|row| row.value_norm == 0.0).map(|row| row.name.clone()).collect();
        for (row, kind) in rows.iter_mut().zip(kinds) {
            // One factor starts at zero, and the other waits for it: B of a linear map, A of the
            // embedding.
            let other = match kind {
                ParamKind::LoraA if row.name.contains(".lora_A.") => {
                    Some(row.name.replace(".lora_A.", ".lora_B."))
                }
                ParamKind::LoraB if row.name.ends_with(".lora_embedding_B") => {
                    Some(row.name.replace("_embedding_B", "_embedding_A"))
                }
                _ => None,
            };
            row.expects_zero = other.is_some_and(|other| zeros.contains(&other));
            let is_zero = row.grad_norm == 0.0;
            let as_expected = is_zero == row.expects_zero || row.may_be_zero.is_some();
            row.passed = row.grad_norm.is_finite() && as_expected;
        }
        let n_trained = rows.iter().map(|row| row.n_values).sum();
        let n_base = self.decoder.config().n_params();
        let is_adapter = rows.iter().any(|row| row.name.contains(".lora_"));
        SelfTest { rows, n_trained, n_frozen: if is_adapter { n_base } else { n_base - n_trained } }
    }
}

/// Why the gradient of the tensor of that name may be zero in a run that learns, if it may.
///
/// A query's scores are q (k_j + b) = q k_j + q b for all keys j, so that the bias b of the keys is
/// one number more on each of them, which a softmax does not see: its gradient is zero but for
/// rounding. Rotation by position comes between the two, as do a norm of the keys and a soft cap on
/// the scores, and then the bias counts.
fn may_be_zero(config: &ModelConfig, name: &str) -> Option<&'static str> {
    if name.contains("embed_tokens.token_adapter.") {
        return Some("rows of new tokens wait until a batch holds one of them");
    }
    let part = ["self_attn.k_proj.bias", "self_attn.k_proj.base_layer.bias"];
    if !part.iter().any(|part| name.ends_with(part)) {
        return None;
    }
    let knobs = &config.knobs;
    let is_seen = config.layer(layer_of(name)?).rope != LayerRope::Off
        || knobs.qk_norm != QkNorm::None
        || knobs.score_soft_cap.is_some();
    if is_seen {
        return None;
    }
    Some("a bias of all keys alike changes no softmax, and nothing rotates them here")
}

/// The number of the layer that a tensor belongs to.
fn layer_of(name: &str) -> Option<usize> {
    name.split_once("layers.")?.1.split('.').next()?.parse().ok()
}

/// `layer_003` for a tensor of the fourth layer, whose number has as many digits as sorts a thousand of them; else the module's name.
fn part_of(name: &str) -> String {
    if let Some(number) = layer_of(name) {
        return format!("layer_{number:03}");
    }
    let parts = ["embed_tokens", "lm_head", "norm"];
    parts.into_iter().find(|part| name.contains(part)).unwrap_or(name).to_owned()
}

#[cfg(test)]
mod tests {
    use super::{may_be_zero, part_of};
    use hone_model::ModelConfig;

    /// The layers of four whose key bias is excused.
    fn check(model_type: &str, more: &str, expected: &[usize]) {
        let text = format!(
            r#"{{"model_type": "{model_type}", "vocab_size": 8, "hidden_size": 8,
                "intermediate_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2,
                "num_key_value_heads": 2, "head_dim": 4 {more}}}"#
        );
        let config = ModelConfig::from_json(&text).unwrap();
        for prefix in ["", "base_model.model."] {
            let name = |layer: usize, rest: &str| format!("{prefix}model.layers.{layer}.{rest}");
            for key in ["self_attn.k_proj.bias", "self_attn.k_proj.base_layer.bias"] {
                let excused = |&layer: &usize| may_be_zero(&config, &name(layer, key)).is_some();
                assert_eq!((0..4).filter(excused).collect::<Vec<_>>(), expected, "{model_type}");
            }
            for other in ["q_proj.bias", "v_proj.bias", "o_proj.bias", "k_proj.weight"] {
                let name = name(1, &format!("self_attn.{other}"));
                assert_eq!(may_be_zero(&config, &name), None, "{name}");
            }
        }
    }

    #[test]
    fn only_keys_that_nothing_rotates_are_excused() {
        let bias = r#", "attention_bias": true"#;
        let some = r#", "attention_bias": true, "no_rope_layers": [1, 0, 1, 0]"#;
        check("smollm3", some, &[1, 3]);
        check("smollm3", bias, &[3]);
        for model_type in ["llama", "qwen3", "gemma2", "olmo2"] {
            check(model_type, bias, &[]);
        }
        check("qwen2", "", &[]);
    }

    #[test]
    fn tensors_belong_to_parts() {
        let check = |name, part| assert_eq!(part_of(name), part);
        check("model.layers.3.mlp.up_proj.weight", "layer_003");
        check("base_model.model.model.layers.11.self_attn.q_proj.lora_A.weight", "layer_011");
        check("model.embed_tokens.weight", "embed_tokens");
        check("model.norm.weight", "norm");
        check("lm_head.weight", "lm_head");
    }
}
