//! Low-rank adapters as PEFT lays them out: `adapter_config.json` and named tensors.
//!
//! An adapter adds s B A to a frozen matrix W (Hu et al. 2021): A is (r, in), B is (out, r), s =
//! alpha / r, or alpha / sqrt(r) with rank-stabilised scaling (Kalajdzievski 2023).

use hone_kernels::rng;
use serde_json::{Map, Value, json};

use crate::config::{LinearShape, layer_prefix};
use crate::init::named_seed;
use crate::param::named;
use crate::tensors::{NamedTensor, Tensors};
use crate::{ModelConfig, ModelError};

/// Name of the file in messages.
const FILE: &str = "adapter_config.json";

/// What PEFT puts before the model's own names.
const PREFIX: &str = "base_model.model.";

/// Largest rank accepted: more than any matrix's useful rank.
const RANK_MAX: u64 = 1 << 14;

/// Keys that change nothing that an adapter computes once it is trained.
const HARMLESS: &[&str] = &[
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "peft_type",
    "peft_version",
    "r",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
];

/// One adapter's factors.
pub(crate) type Factor<'a> = (&'a NamedTensor, &'a NamedTensor);

/// The settings of an adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// r, the rank.
    pub r: usize,
    /// alpha, the numerator of the scaling.
    pub lora_alpha: f64,
    /// Probability of dropping a value of an adapter's input in training.
    pub lora_dropout: f32,
    /// Names of the modules that get an adapter, or the ends of them after a dot: `q_proj`,
    /// `mlp.down_proj`.
    pub target_modules: Vec<String>,
    /// Whether the scaling is alpha / sqrt(r).
    pub use_rslora: bool,
    /// What the adapter was trained on, for people.
    pub base_model_name_or_path: Option<String>,
}

impl LoraConfig {
    /// The linear maps of every layer, which `all-linear` stands for.
    pub const ALL_LINEAR: [&'static str; 7] =
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

    /// An adapter of rank `r` on all linear maps, without dropout.
    pub fn all_linear(r: usize, lora_alpha: f64) -> Self {
        LoraConfig {
            r,
            lora_alpha,
            lora_dropout: 0.0,
            target_modules: Self::ALL_LINEAR.map(str::to_owned).to_vec(),
            use_rslora: false,
            base_model_name_or_path: None,
        }
    }

    /// s, the factor on B A.
    pub fn scaling(&self) -> f32 {
        let r = self.r as f64;
        (self.lora_alpha / if self.use_rslora { r.sqrt() } else { r }) as f32
    }

    /// Whether the module of that full name gets an adapter.
    pub fn targets(&self, module: &str) -> bool {
        self.target_modules.iter().any(|target| {
            module
                .strip_suffix(target.as_str())
                .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        })
    }

    /// Reads the text of an `adapter_config.json`. What would change the result and is not computed
    /// here is refused by name.
    pub fn from_json(text: &str) -> Result<Self, ModelError> {
        let value: Value =
            serde_json::from_str(text).map_err(|error| bad(format!("not JSON: {error}")))?;
        let Value::Object(map) = value else {
            return Err(bad("not a JSON object".to_owned()));
        };
        refuse_unknown(&map)?;
        let r = map.get("r").and_then(Value::as_u64).filter(|r| (1..=RANK_MAX).contains(r));
        let r = r.ok_or_else(|| bad(format!("`r` is not a whole number from 1 to {RANK_MAX}")))?;
        let number = |key: &str, default: f64| match map.get(key) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => {
                value.as_f64().ok_or_else(|| bad(format!("`{key}` = {value} is not a number")))
            }
        };
        let config = LoraConfig {
            r: r as usize,
            lora_alpha: number("lora_alpha", 8.0)?,
            lora_dropout: number("lora_dropout", 0.0)? as f32,
            target_modules: target_modules(map.get("target_modules"))?,
            use_rslora: map.get("use_rslora").and_then(Value::as_bool).unwrap_or(false),
            base_model_name_or_path: map
                .get("base_model_name_or_path")
                .and_then(Value::as_str)
                .map(str::to_owned),
        };
        config.check()?;
        Ok(config)
    }

    /// The text of an `adapter_config.json` that PEFT reads, indented.
    pub fn to_json(&self) -> String {
        let value = json!({
            "alpha_pattern": {},
            "base_model_name_or_path": self.base_model_name_or_path,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "lora_alpha": self.lora_alpha,
            "lora_bias": false,
            "lora_dropout": self.lora_dropout,
            "modules_to_save": Value::Null,
            "peft_type": "LORA",
            "r": self.r,
            "rank_pattern": {},
            "target_modules": self.target_modules,
            "task_type": "CAUSAL_LM",
            "use_dora": false,
            "use_rslora": self.use_rslora,
        });
        serde_json::to_string_pretty(&value).expect("a value of plain JSON can be written") + "\n"
    }

    /// Checks the numbers.
    pub fn check(&self) -> Result<(), ModelError> {
        if self.r == 0 || self.r as u64 > RANK_MAX {
            return Err(bad(format!(
                "`r` = {} is not a whole number from 1 to {RANK_MAX}",
                self.r
            )));
        }
        if !(self.lora_alpha > 0.0 && self.lora_alpha.is_finite()) {
            return Err(bad(format!("`lora_alpha` = {} is not above 0", self.lora_alpha)));
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            let what = format!("`lora_dropout` = {}", self.lora_dropout);
            return Err(bad(format!("{what} is not at least 0 and below 1")));
        }
        if self.target_modules.is_empty() {
            return Err(bad("`target_modules` names no module".to_owned()));
        }
        Ok(())
    }
}

/// `target_modules` as names.
fn target_modules(value: Option<&Value>) -> Result<Vec<String>, ModelError> {
    match value {
        Some(Value::String(all)) if all == "all-linear" => {
            Ok(LoraConfig::ALL_LINEAR.map(str::to_owned).to_vec())
        }
        Some(Value::Array(items)) => {
            let names = items.iter().map(|item| item.as_str().map(str::to_owned));
            let names = names.collect::<Option<Vec<String>>>();
            names
                .ok_or_else(|| bad("`target_modules` holds something that is no string".to_owned()))
        }
        Some(other) => {
            let reason = "give a list of module names or \"all-linear\"";
            Err(unsupported("target_modules", other, reason))
        }
        None => Err(bad("`target_modules` is missing".to_owned())),
    }
}

/// Refuses adapters of other kinds, and settings that change what an adapter computes.
fn refuse_unknown(map: &Map<String, Value>) -> Result<(), ModelError> {
    match map.get("peft_type") {
        Some(Value::String(kind)) if kind == "LORA" => {}
        Some(other) => return Err(unsupported("peft_type", other, "only \"LORA\" is")),
        None => return Err(bad("`peft_type` is missing".to_owned())),
    }
    for (key, value) in map {
        let is_empty = match value {
            Value::Null | Value::Bool(false) => true,
            Value::Object(inner) => inner.is_empty(),
            Value::Array(inner) => inner.is_empty(),
            _ => false,
        };
        // Group size of an option that is off: PEFT always writes it.
        let is_idle = key == "qalora_group_size" || (key == "bias" && value == "none");
        let is_idle = is_idle || (key == "megatron_core" && value.is_string());
        if is_empty || is_idle || HARMLESS.contains(&key.as_str()) {
            continue;
        }
        return Err(unsupported(key, value, "this version has plain LoRA only"));
    }
    Ok(())
}

fn bad(reason: String) -> ModelError {
    ModelError::Config { file: FILE, reason }
}

fn unsupported(key: &str, value: &Value, reason: &str) -> ModelError {
    let (key, reason) = (key.to_owned(), reason.to_owned());
    ModelError::Unsupported { file: FILE, key, value: value.to_string(), reason }
}

/// An adapter: its settings, and its tensors under PEFT's names.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// Settings.
    pub config: LoraConfig,
    /// `base_model.model.<module>.lora_A.weight` (r, in) and `lora_B.weight` (out, r).
    pub tensors: Tensors,
}

impl Adapter {
    /// A fresh adapter, as PEFT starts it: A uniform in +-1/sqrt(in), B zeros, so that it changes
    /// nothing yet.
    pub fn init(model: &ModelConfig, config: LoraConfig, seed: u64) -> Result<Self, ModelError> {
        config.check()?;
        let mut tensors = Tensors::new();
        for (module, shape) in modules(model).filter(|(module, _)| config.targets(module)) {
            let (name_a, name_b) = factor_names(&module);
            let stream = named_seed(seed, &name_a);
            let bound = 1.0 / (shape.inp as f64).sqrt();
            let value = |i| ((2.0 * rng::uniform(stream, i as u64) - 1.0) * bound) as f32;
            let a = (0..config.r * shape.inp).map(value).collect();
            tensors.insert(NamedTensor::new(name_a, vec![config.r, shape.inp], a));
            let b = vec![0.0; shape.out * config.r];
            tensors.insert(NamedTensor::new(name_b, vec![shape.out, config.r], b));
        }
        let adapter = Adapter { config, tensors };
        adapter.check(model)?;
        Ok(adapter)
    }

    /// An adapter from the text of its configuration and its tensors, unchecked against any model.
    pub fn from_parts(config_json: &str, tensors: Tensors) -> Result<Self, ModelError> {
        let config = LoraConfig::from_json(config_json)?;
        for tensor in tensors.iter() {
            tensor.check_finite()?;
        }
        Ok(Adapter { config, tensors })
    }

    /// Checks names and shapes against a model: both factors of every targeted module, and nothing
    /// else.
    pub fn check(&self, model: &ModelConfig) -> Result<(), ModelError> {
        let mut n_expected = 0;
        for (module, shape) in modules(model).filter(|(module, _)| self.config.targets(module)) {
            if self.factors(&module, shape.out, shape.inp)?.is_none() {
                let what = format!("`{module}` is targeted and has no `lora_A.weight`");
                return Err(ModelError::Adapter(what));
            }
            n_expected += 2;
        }
        for target in &self.config.target_modules {
            let one = LoraConfig { target_modules: vec![target.clone()], ..self.config.clone() };
            if !modules(model).any(|(module, _)| one.targets(&module)) {
                let what =
                    format!("the target `{target}` names no linear map of the model's layers");
                return Err(ModelError::Adapter(what));
            }
        }
        if self.tensors.len() != n_expected {
            let what = format!("it has {} tensors, its targets need", self.tensors.len());
            return Err(ModelError::Adapter(format!("{what} {n_expected}")));
        }
        Ok(())
    }

    /// A and B of a module, if there are any; their shapes are checked.
    pub(crate) fn factors(
        &self,
        module: &str,
        out: usize,
        inp: usize,
    ) -> Result<Option<Factor<'_>>, ModelError> {
        let (name_a, name_b) = factor_names(module);
        if self.tensors.get(&name_a).is_none() {
            return Ok(None);
        }
        let a = named(&self.tensors, &name_a, &[self.config.r, inp])?;
        let b = named(&self.tensors, &name_b, &[out, self.config.r])?;
        Ok(Some((a, b)))
    }
}

/// PEFT's names of a module's factors.
pub(crate) fn factor_names(module: &str) -> (String, String) {
    (format!("{PREFIX}{module}.lora_A.weight"), format!("{PREFIX}{module}.lora_B.weight"))
}

/// Full names and shapes of all linear maps in the layers.
pub(crate) fn modules(model: &ModelConfig) -> impl Iterator<Item = (String, LinearShape)> + '_ {
    (0..model.num_hidden_layers).flat_map(|layer| {
        let prefix = layer_prefix(layer);
        model.linears().into_iter().map(move |shape| (format!("{prefix}.{}", shape.name), shape))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_round_trips() {
        let mut config = LoraConfig::all_linear(4, 8.0);
        config.lora_dropout = 0.25;
        config.use_rslora = true;
        assert_eq!(LoraConfig::from_json(&config.to_json()).unwrap(), config);
        assert_eq!(config.scaling(), 4.0);
        config.use_rslora = false;
        assert_eq!(config.scaling(), 2.0);
    }

    #[test]
    fn targets_match_whole_names() {
        let mut config = LoraConfig::all_linear(4, 8.0);
        config.target_modules = vec!["proj".into(), "mlp.up_proj".into(), "q_proj".into()];
        assert!(config.targets("model.layers.0.self_attn.q_proj"));
        assert!(config.targets("model.layers.11.mlp.up_proj"));
        assert!(!config.targets("model.layers.0.self_attn.k_proj"));
    }

    #[test]
    fn other_adapters_are_refused_by_name() {
        let base = r#"{"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]"#;
        for (rest, expected) in [
            (r#", "use_dora": true}"#, "`use_dora` = true is not supported"),
            (r#", "rank_pattern": {"q_proj": 8}}"#, "`rank_pattern`"),
            (r#", "modules_to_save": ["lm_head"]}"#, "`modules_to_save`"),
            (r#", "bias": "all"}"#, "`bias` = \"all\""),
            (r#", "target_modules": ".*q_proj"}"#, "`target_modules`"),
            (r#", "r": 0}"#, "`r`"),
            (r#", "lora_dropout": 1.0}"#, "`lora_dropout`"),
            (r#", "peft_type": "IA3"}"#, "`peft_type` = \"IA3\""),
        ] {
            let message = LoraConfig::from_json(&format!("{base}{rest}")).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
        let idle = r#", "rank_pattern": {}, "bias": "none", "qalora_group_size": 16}"#;
        assert!(LoraConfig::from_json(&format!("{base}{idle}")).is_ok());
    }
}
