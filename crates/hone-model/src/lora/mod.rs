//! Low-rank adapters as PEFT lays them out: `adapter_config.json` and named tensors.
//!
//! An adapter adds s B A to a frozen matrix W (Hu et al. 2021): A is (r, in), B is (out, r), s =
//! alpha / r, or alpha / sqrt(r) with rank-stabilised scaling. Beside the factors its file holds
//! what else is trained: magnitudes of rows (DoRA), biases, whole modules, rows of new tokens.
//!
//! | file | holds |
//! |---|---|
//! | `attach` | an adapter put on a decoder |
//! | `check` | whether settings mean something in a model |
//! | `config` | [`LoraConfig`] and `adapter_config.json` |
//! | `targets` | which modules are meant |
//! | `group` | adapters at work: forward and backward |
//! | `init` | fresh adapters |
//! | `overlay` | the embedding, rows of tokens, tensors trained whole |
//! | `svd` | the largest singular vectors, for PiSSA and LoftQ |

mod attach;
mod check;
mod config;
mod group;
mod init;
mod overlay;
mod svd;
mod targets;

pub use config::{BiasMode, InitMethod, LoraConfig, TokenRows};
pub(crate) use group::{LoraGroup, LoraNeeds, LoraScratch, Site};
pub(crate) use overlay::{EmbedLora, Stash, TokenPatch};
pub use targets::Targets;

use crate::config::{LinearShape, layer_prefix};
use crate::param::named;
use crate::tensors::{NamedTensor, Tensors};
use crate::{ModelConfig, ModelError, TensorEntry};

/// Name of the file in messages.
const FILE: &str = "adapter_config.json";

/// What PEFT puts before the model's own names.
pub(crate) const PREFIX: &str = "base_model.model.";

/// Full names of the modules outside the layers.
pub(crate) const EMBED: &str = "model.embed_tokens";
pub(crate) const HEAD: &str = "lm_head";

/// One adapter's factors.
pub(crate) type Factor<'a> = (&'a NamedTensor, &'a NamedTensor);

fn bad(reason: String) -> ModelError {
    ModelError::Config { file: FILE, reason }
}

/// An adapter: its settings, and its tensors under PEFT's names.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// Settings.
    pub config: LoraConfig,
    /// `base_model.model.<module>.lora_A.weight` (r, in), `lora_B.weight` (out, r) and
    /// `lora_magnitude_vector` (out); `lora_embedding_A` (r, V) and `lora_embedding_B` (D, r);
    /// `base_model.model.<tensor>` of what is trained whole; `token_adapter.trainable_tokens_delta`
    /// (tokens, D).
    pub tensors: Tensors,
}

/// A module that can have an adapter.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// Its full name.
    pub(crate) name: String,
    pub(crate) out: usize,
    pub(crate) inp: usize,
}

impl Adapter {
    /// An adapter from the text of its configuration and its tensors, unchecked against any model.
    pub fn from_parts(config_json: &str, tensors: Tensors) -> Result<Self, ModelError> {
        let config = LoraConfig::from_json(config_json)?;
        for tensor in tensors.iter() {
            tensor.check_finite()?;
        }
        Ok(Adapter { config, tensors })
    }

    /// Checks names and shapes against a model: everything that the settings ask for, and nothing
    /// else. What an adapter need not have been made with here, PEFT's `exclude_modules` or layers
    /// that the model does not have, is let be: [`LoraConfig::check_against`] refuses it.
    pub fn check(&self, model: &ModelConfig) -> Result<(), ModelError> {
        self.config.check_fits(model)?;
        let expected = self.config.tensors(model);
        for TensorEntry { name, shape } in &expected {
            let Some(found) = self.tensors.get(name) else {
                let (module, part) = name.rsplit_once(".lora_").unwrap_or(("", name));
                let part = if module.is_empty() { part.to_owned() } else { format!("lora_{part}") };
                let module = module.trim_start_matches(PREFIX);
                let what = format!("`{module}` is targeted and has no `{part}`");
                return Err(ModelError::Adapter(what));
            };
            if found.shape != *shape {
                let (found, expected) = (found.shape.clone(), shape.clone());
                return Err(ModelError::Shape { name: name.clone(), found, expected });
            }
        }
        if self.tensors.len() != expected.len() {
            let stranger = |t: &&NamedTensor| expected.iter().all(|entry| entry.name != t.name);
            let first = self.tensors.iter().find(stranger).map_or("", |t| t.name.as_str());
            let what = format!("it has {} tensors, its targets need", self.tensors.len());
            let what = format!("{what} {}; `{first}` is none of them", expected.len());
            return Err(ModelError::Adapter(what));
        }
        Ok(())
    }

    /// A and B of a linear map, if there are any; their shapes are checked.
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
        let rank = self.config.rank_of(module);
        let a = named(&self.tensors, &name_a, &[rank, inp])?;
        let b = named(&self.tensors, &name_b, &[out, rank])?;
        Ok(Some((a, b)))
    }

    /// The magnitudes of a linear map's rows, with DoRA.
    pub(crate) fn magnitude(&self, module: &str) -> Option<&NamedTensor> {
        self.tensors.get(&magnitude_name(module))
    }

    /// What takes the place of the base tensor of that name, if it is trained whole.
    pub(crate) fn whole(&self, name: &str) -> Option<&NamedTensor> {
        self.tensors.get(&self.config.whole_name(name)?)
    }

    /// Factors of the embedding: A (r, V), B (D, r).
    pub(crate) fn embedding(&self) -> Option<Factor<'_>> {
        let [a, b] = embedding_names();
        Some((self.tensors.get(&a)?, self.tensors.get(&b)?))
    }

    /// The trained rows of the embedding or of the head, with their ids.
    pub(crate) fn token_rows(&self, module: &str) -> Option<(&[u32], &NamedTensor)> {
        let ids = self.config.token_ids(module);
        Some((ids, self.tensors.get(&tokens_name(module))?))
    }
}

impl LoraConfig {
    /// Ids of the rows of [`EMBED`] or [`HEAD`] that are trained by themselves.
    pub(crate) fn token_ids(&self, module: &str) -> &[u32] {
        match module {
            HEAD => &self.trainable_tokens.lm_head,
            _ => &self.trainable_tokens.embed_tokens,
        }
    }

    /// PEFT's name of a base tensor that is trained whole: a bias, or what `modules_to_save` names.
    pub(crate) fn whole_name(&self, name: &str) -> Option<String> {
        let (module, part) = name.rsplit_once('.')?;
        if self.saves(module) {
            return Some(format!("{PREFIX}{name}"));
        }
        if part != "bias" || self.bias == BiasMode::None {
            return None;
        }
        match (self.targets(module), self.bias) {
            (true, _) => Some(format!("{PREFIX}{module}.base_layer.bias")),
            (false, BiasMode::All) => Some(format!("{PREFIX}{name}")),
            (false, _) => None,
        }
    }

    /// Number of values of such an adapter.
    pub fn n_params(&self, model: &ModelConfig) -> u64 {
        let size = |entry: &TensorEntry| entry.shape.iter().product::<usize>() as u64;
        self.tensors(model).iter().map(size).sum()
    }

    /// Names and shapes of all tensors of such an adapter.
    pub(crate) fn tensors(&self, model: &ModelConfig) -> Vec<TensorEntry> {
        let mut entries = Vec::new();
        let mut put = |name: String, shape: &[usize]| {
            entries.push(TensorEntry { name, shape: shape.to_vec() });
        };
        for Place { name, out, inp } in places(model).filter(|place| self.targets(&place.name)) {
            let r = self.rank_of(&name);
            if name == EMBED {
                let [a, b] = embedding_names();
                put(a, &[r, out]);
                put(b, &[inp, r]);
                continue;
            }
            let (a, b) = factor_names(&name);
            put(a, &[r, inp]);
            put(b, &[out, r]);
            if self.use_dora {
                put(magnitude_name(&name), &[out]);
            }
        }
        for entry in base_tensors(model) {
            if let Some(name) = self.whole_name(&entry.name) {
                put(name, &entry.shape);
            }
        }
        for module in [EMBED, HEAD] {
            let n = self.token_ids(module).len();
            if n > 0 {
                put(tokens_name(module), &[n, model.hidden_size]);
            }
        }
        entries
    }
}

/// PEFT's names of a module's factors.
pub(crate) fn factor_names(module: &str) -> (String, String) {
    (format!("{PREFIX}{module}.lora_A.weight"), format!("{PREFIX}{module}.lora_B.weight"))
}

/// PEFT's name of the magnitudes of a module's rows.
pub(crate) fn magnitude_name(module: &str) -> String {
    format!("{PREFIX}{module}.lora_magnitude_vector")
}

/// PEFT's names of the embedding's factors.
pub(crate) fn embedding_names() -> [String; 2] {
    ["A", "B"].map(|factor| format!("{PREFIX}{EMBED}.lora_embedding_{factor}"))
}

/// PEFT's name of the trained rows of a module.
pub(crate) fn tokens_name(module: &str) -> String {
    format!("{PREFIX}{module}.token_adapter.trainable_tokens_delta")
}

/// All tensors of the base, with the head's even where it is tied: it may be trained by itself.
fn base_tensors(model: &ModelConfig) -> Vec<TensorEntry> {
    let mut entries = model.tensors();
    if model.tie_word_embeddings {
        let shape = vec![model.vocab_size, model.hidden_size];
        entries.push(TensorEntry { name: format!("{HEAD}.weight"), shape });
    }
    entries
}

/// Every module that can have an adapter.
pub(crate) fn places(model: &ModelConfig) -> impl Iterator<Item = Place> + '_ {
    let ends = [EMBED, HEAD].map(|name| Place {
        name: name.to_owned(),
        out: model.vocab_size,
        inp: model.hidden_size,
    });
    let maps = modules(model).map(|(name, shape)| Place { name, out: shape.out, inp: shape.inp });
    maps.chain(ends)
}

/// Full names and shapes of all linear maps in the layers.
pub(crate) fn modules(model: &ModelConfig) -> impl Iterator<Item = (String, LinearShape)> + '_ {
    (0..model.num_hidden_layers).flat_map(|layer| {
        let prefix = layer_prefix(layer);
        model.linears().into_iter().map(move |shape| (format!("{prefix}.{}", shape.name), shape))
    })
}
