//! `adapter_config.json`: PEFT's settings of a LoRA adapter, read and written.

use std::collections::BTreeMap;

use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use super::{FILE, Targets, bad};
use crate::ModelError;

/// Largest rank accepted: more than any matrix's useful rank.
const RANK_MAX: u64 = 1 << 14;

/// Keys that are read, and keys that change nothing that an adapter computes once it is trained.
const KNOWN: &[&str] = &[
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
];

/// Which biases are trained with an adapter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BiasMode {
    /// None.
    #[default]
    None,
    /// All of the model's.
    All,
    /// Those of the modules that have an adapter.
    LoraOnly,
}

impl BiasMode {
    /// The value in the file.
    pub fn name(self) -> &'static str {
        match self {
            BiasMode::None => "none",
            BiasMode::All => "all",
            BiasMode::LoraOnly => "lora_only",
        }
    }
}

/// How an adapter's factors start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InitMethod {
    /// A uniform in +-1/sqrt(in) (Kaiming with a = sqrt 5), B zero.
    #[default]
    Default,
    /// A normal with deviation 1/r, B zero.
    Gaussian,
    /// The largest singular values and vectors of W, which lose them (Meng et al. 2024).
    Pissa,
    /// What a 4-bit weight has lost against W, as far as r singular vectors hold it (Li et al.
    /// 2023, one round, as PEFT's `replace_lora_weights_loftq`).
    Loftq,
}

/// Rows that are trained by themselves, new tokens' as a rule: ids without repetition.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenRows {
    /// Of the embedding, and of a head that is tied to it.
    pub embed_tokens: Vec<u32>,
    /// Of a head of its own.
    pub lm_head: Vec<u32>,
}

impl TokenRows {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.embed_tokens.is_empty() && self.lm_head.is_empty()
    }

    fn to_json(&self) -> Value {
        match (self.embed_tokens.as_slice(), self.lm_head.as_slice()) {
            ([], []) => Value::Null,
            (embed, []) => json!(embed),
            ([], head) => json!({"lm_head": head}),
            (embed, head) => json!({"embed_tokens": embed, "lm_head": head}),
        }
    }
}

/// The settings of an adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// r, the rank.
    pub r: usize,
    /// alpha, the numerator of the scaling.
    pub lora_alpha: f64,
    /// Probability of dropping a value of an adapter's input in training.
    pub lora_dropout: f32,
    /// Which modules get an adapter.
    pub target_modules: Targets,
    /// Which of them do not.
    pub exclude_modules: Option<Targets>,
    /// Only the layers of these numbers; not for a regular expression.
    pub layers_to_transform: Option<Vec<usize>>,
    /// What the list of layers is called in a module's name; any name when empty.
    pub layers_pattern: Vec<String>,
    /// Other ranks by the end of a module's name, an expression; the first that matches.
    pub rank_pattern: Vec<(String, usize)>,
    /// Other alphas, likewise.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Whether the scaling is alpha / sqrt(r) (Kalajdzievski 2023).
    pub use_rslora: bool,
    /// Whether rows of the adapted weight have a trained magnitude (Liu et al. 2024).
    pub use_dora: bool,
    /// Which biases are trained.
    pub bias: BiasMode,
    /// Modules that are trained whole and saved with the adapter: `lm_head`, `embed_tokens`, norms.
    pub modules_to_save: Vec<String>,
    /// Rows of the embedding and of the head that are trained by themselves.
    pub trainable_tokens: TokenRows,
    /// How the factors start; not written.
    pub init: InitMethod,
    /// What the adapter was trained on, for people.
    pub base_model_name_or_path: Option<String>,
}

impl LoraConfig {
    /// An adapter of rank `r` on all linear maps of the layers, with no other setting.
    pub fn all_linear(r: usize, lora_alpha: f64) -> Self {
        LoraConfig {
            r,
            lora_alpha,
            lora_dropout: 0.0,
            target_modules: Targets::AllLinear,
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: Vec::new(),
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            use_rslora: false,
            use_dora: false,
            bias: BiasMode::None,
            modules_to_save: Vec::new(),
            trainable_tokens: TokenRows::default(),
            init: InitMethod::Default,
            base_model_name_or_path: None,
        }
    }

    /// s, the factor on B A where no pattern says otherwise.
    pub fn scaling(&self) -> f32 {
        let r = self.r as f64;
        (self.lora_alpha / if self.use_rslora { r.sqrt() } else { r }) as f32
    }

    /// Reads the text of an `adapter_config.json`. What would change the result and is not computed
    /// here is refused by name.
    pub fn from_json(text: &str) -> Result<Self, ModelError> {
        let value: Value =
            serde_json::from_str(text).map_err(|error| bad(format!("not JSON: {error}")))?;
        let Value::Object(mut map) = value else {
            return Err(bad("not a JSON object".to_owned()));
        };
        read_exactly(&mut map, text);
        refuse_unknown(&map)?;
        let keys = Keys(&map);
        let r = map.get("r").and_then(Value::as_u64).filter(|r| (1..=RANK_MAX).contains(r));
        let r = r.ok_or_else(|| bad(format!("`r` is not a whole number from 1 to {RANK_MAX}")))?;
        let target_modules = keys.targets("target_modules")?;
        let rank = |value: &Value| value.as_u64().and_then(|r| usize::try_from(r).ok());
        let config = LoraConfig {
            r: r as usize,
            lora_alpha: keys.number("lora_alpha", 8.0)?,
            lora_dropout: keys.number("lora_dropout", 0.0)? as f32,
            target_modules: target_modules
                .ok_or_else(|| bad("`target_modules` is missing".to_owned()))?,
            exclude_modules: keys.targets("exclude_modules")?,
            layers_to_transform: keys.layers()?,
            // PEFT takes an empty text for none.
            layers_pattern: (keys.strings("layers_pattern")?)
                .filter(|patterns| *patterns != [""])
                .unwrap_or_default(),
            rank_pattern: keys.pattern("rank_pattern", rank)?,
            alpha_pattern: keys.pattern("alpha_pattern", Value::as_f64)?,
            use_rslora: keys.flag("use_rslora")?,
            use_dora: keys.flag("use_dora")?,
            bias: keys.bias()?,
            modules_to_save: keys.strings("modules_to_save")?.unwrap_or_default(),
            trainable_tokens: keys.tokens()?,
            init: InitMethod::Default,
            base_model_name_or_path: map
                .get("base_model_name_or_path")
                .and_then(Value::as_str)
                .map(str::to_owned),
        };
        config.check()?;
        Ok(config)
    }

    /// The text of an `adapter_config.json` that PEFT reads, indented. However the factors started,
    /// PEFT is told that they are plain LoRA's: they belong to the base as it is stored.
    pub fn to_json(&self) -> String {
        let targets = |targets: &Targets| match targets {
            Targets::Names(names) => json!(names),
            Targets::Pattern(pattern) => json!(pattern),
            Targets::AllLinear => json!("all-linear"),
        };
        let some = |names: &[String]| if names.is_empty() { Value::Null } else { json!(names) };
        let ranks = self.rank_pattern.iter().map(|(key, r)| (key.clone(), json!(r)));
        let alphas = self.alpha_pattern.iter().map(|(key, alpha)| (key.clone(), json!(alpha)));
        let value = json!({
            "alpha_pattern": alphas.collect::<Map<_, _>>(),
            "base_model_name_or_path": self.base_model_name_or_path,
            "bias": self.bias.name(),
            "exclude_modules": self.exclude_modules.as_ref().map(targets),
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "layers_pattern": some(&self.layers_pattern),
            "layers_to_transform": self.layers_to_transform,
            "lora_alpha": self.lora_alpha,
            "lora_bias": false,
            "lora_dropout": self.lora_dropout,
            "modules_to_save": some(&self.modules_to_save),
            "peft_type": "LORA",
            "r": self.r,
            "rank_pattern": ranks.collect::<Map<_, _>>(),
            "target_modules": targets(&self.target_modules),
            "task_type": "CAUSAL_LM",
            "trainable_token_indices": self.trainable_tokens.to_json(),
            "use_dora": self.use_dora,
            "use_rslora": self.use_rslora,
        });
        serde_json::to_string_pretty(&value).expect("a value of plain JSON can be written") + "\n"
    }

    /// Checks the numbers and the expressions.
    pub fn check(&self) -> Result<(), ModelError> {
        self.check_numbers()?;
        if self.target_modules.is_empty() {
            return Err(bad("`target_modules` names no module".to_owned()));
        }
        self.check_expressions(&[])?;
        for ids in [&self.trainable_tokens.embed_tokens, &self.trainable_tokens.lm_head] {
            let mut sorted = ids.clone();
            sorted.sort_unstable();
            if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
                let id = twice[0];
                return Err(bad(format!("`trainable_token_indices` names token {id} twice")));
            }
        }
        if self.layers_to_transform.is_some() && matches!(self.target_modules, Targets::Pattern(_))
        {
            let what = "`layers_to_transform` cannot be used when `target_modules` is an";
            return Err(bad(format!("{what} expression: write the layers into it")));
        }
        if self.layers_to_transform.is_none() && !self.layers_pattern.is_empty() {
            let what = "`layers_pattern` says where the numbers of `layers_to_transform` stand in";
            return Err(bad(format!("{what} names: give those too, or leave it out")));
        }
        Ok(())
    }

    /// Checks ranks, alphas and the probability.
    fn check_numbers(&self) -> Result<(), ModelError> {
        let (most, why) = match self.init {
            InitMethod::Pissa => (RANK_MAX / 2, ": PiSSA's adapter is saved with twice its rank"),
            _ => (RANK_MAX, ""),
        };
        let rank = |key: &str, r: usize| match (1..=most).contains(&(r as u64)) {
            true => Ok(()),
            false => Err(bad(format!("`{key}` = {r} is not a whole number from 1 to {most}{why}"))),
        };
        let alpha = |key: &str, alpha: f64| match alpha > 0.0 && alpha.is_finite() {
            true => Ok(()),
            false => Err(bad(format!("`{key}` = {alpha} is not above 0"))),
        };
        rank("r", self.r)?;
        alpha("lora_alpha", self.lora_alpha)?;
        for (key, r) in &self.rank_pattern {
            rank(&format!("rank_pattern.{key}"), *r)?;
        }
        for (key, value) in &self.alpha_pattern {
            alpha(&format!("alpha_pattern.{key}"), *value)?;
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            let what = format!("`lora_dropout` = {}", self.lora_dropout);
            return Err(bad(format!("{what} is not at least 0 and below 1")));
        }
        Ok(())
    }
}

/// Puts the alphas into `map` to the last bit: serde_json reads some numbers of 17 digits, as it
/// writes them, a unit in the last place off.
fn read_exactly(map: &mut Map<String, Value>, text: &str) {
    let parts = |text| serde_json::from_str::<BTreeMap<String, &RawValue>>(text);
    let put = |value: &mut Value, raw: &RawValue| {
        if let (true, Ok(exact)) = (value.is_number(), raw.get().parse::<f64>()) {
            *value = Value::from(exact);
        }
    };
    let Ok(whole) = parts(text) else { return };
    if let (Some(value), Some(raw)) = (map.get_mut("lora_alpha"), whole.get("lora_alpha")) {
        put(value, raw);
    }
    let (value, raw) = (map.get_mut("alpha_pattern"), whole.get("alpha_pattern"));
    let alphas = value.and_then(Value::as_object_mut).zip(raw.and_then(|r| parts(r.get()).ok()));
    let Some((alphas, raw)) = alphas else { return };
    for (key, value) in alphas {
        raw.get(key).into_iter().for_each(|raw| put(value, raw));
    }
}

/// The keys of the file, read with their types checked.
struct Keys<'a>(&'a Map<String, Value>);

impl Keys<'_> {
    fn present(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn number(&self, key: &str, default: f64) -> Result<f64, ModelError> {
        match self.present(key) {
            None => Ok(default),
            Some(value) => {
                value.as_f64().ok_or_else(|| bad(format!("`{key}` = {value} is not a number")))
            }
        }
    }

    fn flag(&self, key: &str) -> Result<bool, ModelError> {
        match self.present(key) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(bad(format!("`{key}` = {other} is not true or false"))),
        }
    }

    /// A list of strings, or one.
    fn strings(&self, key: &str) -> Result<Option<Vec<String>>, ModelError> {
        match self.present(key) {
            None => Ok(None),
            Some(Value::String(one)) => Ok(Some(vec![one.clone()])),
            Some(Value::Array(items)) => {
                let names = items.iter().map(|item| item.as_str().map(str::to_owned));
                let names = names.collect::<Option<Vec<String>>>();
                let what = || bad(format!("`{key}` holds something that is no string"));
                Ok(Some(names.ok_or_else(what)?))
            }
            Some(other) => Err(bad(format!("`{key}` = {other} is not a list of names"))),
        }
    }

    fn targets(&self, key: &str) -> Result<Option<Targets>, ModelError> {
        match self.present(key) {
            Some(Value::String(all)) if all.eq_ignore_ascii_case("all-linear") => {
                Ok(Some(Targets::AllLinear))
            }
            Some(Value::String(pattern)) => Ok(Some(Targets::Pattern(pattern.clone()))),
            Some(Value::Array(items)) if items.is_empty() && key == "exclude_modules" => Ok(None),
            _ => Ok(self.strings(key)?.map(Targets::Names)),
        }
    }

    fn layers(&self) -> Result<Option<Vec<usize>>, ModelError> {
        let number = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok());
        let layers = match self.present("layers_to_transform") {
            None => return Ok(None),
            Some(Value::Array(items)) if items.is_empty() => return Ok(None),
            Some(Value::Array(items)) => items.iter().map(number).collect::<Option<Vec<_>>>(),
            Some(one) => number(one).map(|one| vec![one]),
        };
        let what = || bad("`layers_to_transform` is not a list of layer numbers".to_owned());
        layers.map(Some).ok_or_else(what)
    }

    fn pattern<T>(
        &self,
        key: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Vec<(String, T)>, ModelError> {
        let wrong = |name: &str, value: &Value| {
            bad(format!("`{key}` gives `{name}` = {value}, which is not a number of its kind"))
        };
        match self.present(key) {
            None => Ok(Vec::new()),
            Some(Value::Object(map)) => map
                .iter()
                .map(|(name, value)| match read(value) {
                    Some(read) => Ok((name.clone(), read)),
                    None => Err(wrong(name, value)),
                })
                .collect(),
            Some(other) => Err(bad(format!("`{key}` = {other} is not an object"))),
        }
    }

    fn tokens(&self) -> Result<TokenRows, ModelError> {
        let key = "trainable_token_indices";
        let ids = |value: &Value| -> Option<Vec<u32>> {
            let id = |id: &Value| id.as_u64().and_then(|id| u32::try_from(id).ok());
            value.as_array()?.iter().map(id).collect()
        };
        let wrong = || bad(format!("`{key}` is not a list of token ids, or an object of such"));
        let mut rows = TokenRows::default();
        match self.present(key) {
            None => {}
            Some(Value::Object(map)) => {
                for (name, value) in map {
                    let into = match name.as_str() {
                        "embed_tokens" | "model.embed_tokens" => &mut rows.embed_tokens,
                        "lm_head" => &mut rows.lm_head,
                        _ => {
                            let why = "it names neither embed_tokens nor lm_head";
                            return Err(unsupported(key, &json!(name), why));
                        }
                    };
                    *into = ids(value).ok_or_else(wrong)?;
                }
            }
            Some(value) => rows.embed_tokens = ids(value).ok_or_else(wrong)?,
        }
        Ok(rows)
    }

    fn bias(&self) -> Result<BiasMode, ModelError> {
        let modes = [BiasMode::None, BiasMode::All, BiasMode::LoraOnly];
        match self.present("bias") {
            None => Ok(BiasMode::None),
            Some(value) => modes
                .into_iter()
                .find(|mode| value == mode.name())
                .ok_or_else(|| unsupported("bias", value, "give none, all or lora_only")),
        }
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
        let is_idle = key == "qalora_group_size";
        let is_idle = is_idle || (key == "megatron_core" && value.is_string());
        if is_empty || is_idle || KNOWN.contains(&key.as_str()) {
            continue;
        }
        return Err(unsupported(key, value, "this version does not compute it"));
    }
    // These change the base weights: what is saved with them does not belong to the base as stored.
    let init = map.get("init_lora_weights").and_then(Value::as_str).unwrap_or_default();
    let moves_base = ["pissa", "olora", "corda", "loftq", "lora_ga"];
    if moves_base.iter().any(|method| init.to_lowercase().starts_with(method)) {
        let reason = "such an adapter belongs to changed base weights; save it as plain LoRA \
                      (PEFT: path_initial_model_for_weight_conversion)";
        return Err(unsupported("init_lora_weights", &json!(init), reason));
    }
    Ok(())
}

fn unsupported(key: &str, value: &Value, reason: &str) -> ModelError {
    let (key, reason) = (key.to_owned(), reason.to_owned());
    ModelError::Unsupported { file: FILE, key, value: value.to_string(), reason }
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
        config.rank_pattern = vec![("b".to_owned(), 2), ("a".to_owned(), 1)];
        config.alpha_pattern = vec![(r"x\..*".to_owned(), 0.5)];
        config.exclude_modules = Some(Targets::Pattern(".*v_proj".to_owned()));
        config.layers_to_transform = Some(vec![1, 0]);
        config.layers_pattern = vec!["layers".to_owned()];
        config.use_dora = true;
        config.bias = BiasMode::LoraOnly;
        config.modules_to_save = vec!["lm_head".to_owned()];
        config.trainable_tokens.embed_tokens = vec![3, 1];
        assert_eq!(LoraConfig::from_json(&config.to_json()).unwrap(), config);
        config.trainable_tokens.lm_head = vec![2];
        assert_eq!(LoraConfig::from_json(&config.to_json()).unwrap(), config);
        (config.layers_to_transform, config.layers_pattern) = (None, Vec::new());
        for targets in [Targets::AllLinear, Targets::Pattern(".*(q|k)_proj".to_owned())] {
            config.target_modules = targets;
            assert_eq!(LoraConfig::from_json(&config.to_json()).unwrap(), config);
        }
    }

    /// Alphas of 17 digits, such as those that rank-stabilised PiSSA is saved with.
    #[test]
    fn alphas_are_read_to_the_last_bit() {
        for alpha in [22.627416997969522, 16.0 * 2_f64.sqrt(), 0.1 + 0.2, 7.3 / 3.0, 1e-7 / 3.0] {
            let mut config = LoraConfig::all_linear(4, alpha);
            config.use_rslora = true;
            config.alpha_pattern = vec![("q_proj".to_owned(), alpha), ("up".to_owned(), 2.0)];
            let read = LoraConfig::from_json(&config.to_json()).unwrap();
            assert_eq!(read, config);
            assert_eq!(read.scaling().to_bits(), config.scaling().to_bits());
        }
        let mut n_off = 0;
        for i in 1..2000 {
            let config = LoraConfig::all_linear(4, f64::from(i) * 2_f64.sqrt() / 7.0);
            assert_eq!(LoraConfig::from_json(&config.to_json()).unwrap(), config);
            let text = config.lora_alpha.to_string();
            n_off += usize::from(serde_json::from_str::<f64>(&text).unwrap() != config.lora_alpha);
        }
        assert!(n_off > 0, "serde_json is exact by itself: `read_exactly` can go");
    }

    #[test]
    fn other_adapters_are_refused_by_name() {
        let base = r#"{"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]"#;
        for (rest, expected) in [
            (r#", "use_qalora": true}"#, "`use_qalora` = true is not supported"),
            (r#", "lora_bias": true}"#, "`lora_bias`"),
            (r#", "rank_pattern": {"q_proj": 0}}"#, "`rank_pattern.q_proj` = 0"),
            (r#", "rank_pattern": {"q_proj": 1.5}}"#, "`rank_pattern` gives `q_proj` = 1.5"),
            (r#", "rank_pattern": {"(": 1}}"#, "no regular expression"),
            (r#", "alpha_pattern": {"q_proj": -1}}"#, "`alpha_pattern.q_proj` = -1"),
            (r#", "bias": "some"}"#, "`bias` = \"some\""),
            (r#", "use_dora": 1}"#, "`use_dora` = 1 is not true or false"),
            (r#", "target_modules": "*"}"#, "`target_modules` holds `*`"),
            (r#", "target_modules": 7}"#, "`target_modules` = 7"),
            (r#", "target_modules": "q", "layers_to_transform": 1}"#, "write the layers into it"),
            (r#", "layers_to_transform": "x"}"#, "`layers_to_transform`"),
            (r#", "layers_pattern": "layers"}"#, "`layers_pattern` says where"),
            (r#", "exclude_modules": "("}"#, "`exclude_modules` holds `(`"),
            (r#", "init_lora_weights": "pissa_niter_4"}"#, "`init_lora_weights`"),
            (r#", "r": 0}"#, "`r`"),
            (r#", "lora_alpha": "NaN"}"#, "`lora_alpha`"),
            (r#", "lora_dropout": 1.0}"#, "`lora_dropout`"),
            (r#", "peft_type": "IA3"}"#, "`peft_type` = \"IA3\""),
        ] {
            let message = LoraConfig::from_json(&format!("{base}{rest}")).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
        let idle = r#", "rank_pattern": {}, "bias": "none", "qalora_group_size": 16,
                        "layers_pattern": ""}"#;
        assert!(LoraConfig::from_json(&format!("{base}{idle}")).is_ok());
        let nan = LoraConfig::all_linear(4, f64::NAN);
        assert!(nan.check().unwrap_err().to_string().contains("`lora_alpha` = NaN"));
    }
}
