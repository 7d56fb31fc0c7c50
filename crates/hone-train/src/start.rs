//! What a run starts from: the tensors that are trained, an adapter to go on from, the decoder.

use std::collections::BTreeSet;
use std::path::Path;

use hone_cli::Failure;
use hone_kernels::{Backend, mapping};
use hone_learn::matching;
use hone_model::{
    Adapter, Decoder, LoraConfig, Method as Trains, ModelConfig, ModelError, ParamInfo, Recompute,
    SafetensorsRegions, Tensors, Training, check_frozen, init_weights, trained_params,
};
use hone_schema::{ArtefactKind, InputRef, Manifest, sha256};
use hone_store::{ModelDir, Sealed, input};
use serde_json::{Map, Value};

use crate::args::{Init, Method, Objective, RecomputeKnob, TrainPlan};
use crate::epochs::Packs;
use crate::training::failure;

/// Longest `adapter_config.json` read.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Largest adapter read: several times that of rank 256 on a model of 70 thousand million weights.
const ADAPTER_BYTES_MAX: u64 = 1 << 35;

const ADAPTER_CONFIG: &str = "adapter_config.json";
const ADAPTER: &str = "adapter_model.safetensors";

/// Longest `config.json` read.
const MODEL_BYTES_MAX: u64 = 1 << 20;

/// Files of the base that a run from random weights depends on.
const SHAPE_FILES: [&str; 1] = ["config.json"];

/// What a run reads, open and checked; of the weights only where they lie.
pub(crate) struct Inputs {
    pub(crate) packs: Sealed,
    pub(crate) base: ModelDir,
    pub(crate) model: ModelConfig,
    pub(crate) start: Start,
}

impl Inputs {
    /// Opens them.
    ///
    /// # Errors
    /// One is missing, changed since it was sealed, or does not fit the settings.
    pub(crate) fn open(plan: &TrainPlan) -> Result<Self, Failure> {
        let packs = Sealed::open(&plan.packs, ArtefactKind::Packs)?;
        let base = ModelDir::open(&plan.base)?;
        let text = String::from_utf8(base.read("config.json", MODEL_BYTES_MAX)?).map_err(|_| {
            Failure::input(format!("{}: config.json is not UTF-8", plan.base.display()))
        })?;
        let model = ModelConfig::from_json(&text)
            .map_err(|e| Failure::input(format!("{}: {e}", plan.base.display())))?;
        let ids = &plan.config.reinit_tokens;
        if let Some(id) = ids.iter().find(|id| **id as usize >= model.vocab_size) {
            let size = model.vocab_size;
            let message =
                format!("[train] `reinit_tokens` names {id}, the vocabulary has {size} tokens");
            return Err(Failure::usage(message));
        }
        let start = Start::new(plan, &model).map_err(|failure| plan.at(failure))?;
        Ok(Inputs { packs, base, model, start })
    }

    /// What the run's key is made of.
    pub(crate) fn refs(&self, plan: &TrainPlan) -> Result<Vec<InputRef>, Failure> {
        let base = match plan.config.init {
            Init::Base => self.base.input("base")?,
            Init::Random => self.base.input_of("base", &SHAPE_FILES)?,
        };
        let mut refs = vec![self.packs.input("packs"), base];
        if let Some(dir) = &plan.config.adapter_init {
            refs.push(adapter_input(dir)?);
        }
        Ok(refs)
    }

    /// The packs to train on, of which one at least has a trained token, and those held out.
    pub(crate) fn splits(&self, plan: &TrainPlan) -> Result<(Packs, Packs), Failure> {
        let causal = plan.config.objective == Objective::Causal;
        let train = Packs::read(&self.packs, "train", causal)?;
        let eval = Packs::read(&self.packs, "eval", causal)?;
        train.need_trained(&self.packs)?;
        Ok((train, eval))
    }

    /// Bytes that the weights come from, which are in memory until the decoder has its own.
    pub(crate) fn files(&self, plan: &TrainPlan) -> Result<u64, Failure> {
        if plan.config.init == Init::Random {
            return Ok((size_of::<f32>() * self.model.n_params()) as u64);
        }
        let dir = self.base.dir();
        let weights = self.base.names().iter().filter(|name| name.ends_with(".safetensors"));
        let bytes = weights.map(|name| input::len(&dir.join(name)));
        Ok(bytes.sum::<Result<u64, _>>()?)
    }
}

/// What a run starts from, checked before anything large is read.
pub(crate) struct Start {
    /// The adapter's settings, with `all-linear` spelt out.
    pub(crate) lora: LoraConfig,
    /// What is trained.
    pub(crate) trained: Vec<ParamInfo>,
    /// Names of the tensors that full fine-tuning leaves as they are.
    frozen: BTreeSet<String>,
}

impl Start {
    /// Finds what `plan` trains of a model of this shape.
    ///
    /// # Errors
    /// A pattern of `freeze` or of a group that matches nothing; an adapter to go on from that is not the one of the settings.
    pub(crate) fn new(plan: &TrainPlan, model: &ModelConfig) -> Result<Self, Failure> {
        let lora = plan.lora(model);
        if plan.config.method == Method::Lora {
            lora.check_against(model).map_err(|e| Failure::usage(format!("[train] {e}")))?;
        }
        let mut trained = trained_params(model, trains(plan, &lora));
        let names: Vec<&str> = trained.iter().map(|info| info.name.as_str()).collect();
        let matched = matching("`freeze`", &plan.config.freeze, &names).map_err(failure)?;
        let mut matched = matched.into_iter();
        let mut frozen = BTreeSet::new();
        trained.retain(|info| {
            let is_frozen = matched.next().unwrap_or_default();
            if is_frozen {
                frozen.insert(info.name.clone());
            }
            !is_frozen
        });
        check_frozen(model, &|name| frozen.contains(name))
            .map_err(|e| Failure::usage(format!("[train] `freeze`: {e}")))?;
        if trained.is_empty() && !frozen.is_empty() {
            return Err(Failure::usage("[train] `freeze` leaves nothing to train"));
        }
        let lr = plan.config.lr.unwrap_or_default();
        plan.recipe().check_groups(lr, &trained).map_err(failure)?;
        if let Some(dir) = &plan.config.adapter_init {
            fits(&read_config(dir)?, &lora, model, dir)?;
        }
        Ok(Start { lora, trained, frozen })
    }

    /// Reads the weights, and puts on them what is trained.
    pub(crate) fn decoder<B: Backend>(
        &self,
        backend: B,
        plan: &TrainPlan,
        base: &ModelDir,
        model: &ModelConfig,
    ) -> Result<Decoder<B>, Failure> {
        let refused = |e: ModelError| Failure::input(format!("{}: {e}", base.dir().display()));
        let training = match plan.config.method {
            Method::Lora => Training::Frozen,
            Method::Full => Training::Full,
        };
        let mut decoder = match plan.config.init {
            Init::Random => {
                let weights = init_weights(model, plan.seed);
                Decoder::load(backend, model, &weights, training).map_err(refused)?
            }
            Init::Base => load(backend, base, model, training)?,
        };
        decoder.set_recompute(recompute(plan));
        if !self.frozen.is_empty() {
            decoder.freeze(&|name| self.frozen.contains(name)).map_err(refused)?;
        }
        if plan.config.method == Method::Lora {
            let adapter = match &plan.config.adapter_init {
                None => Adapter::init(model, self.lora.clone(), plan.seed).map_err(refused)?,
                Some(dir) => read_adapter(dir, &self.lora, model)?,
            };
            decoder.attach(&adapter, true).map_err(refused)?;
        }
        Ok(decoder)
    }
}

/// What is trained, as a memory plan has it.
pub(crate) fn trains<'a>(plan: &TrainPlan, lora: &'a LoraConfig) -> Trains<'a> {
    match plan.config.method {
        Method::Lora => Trains::Lora(lora),
        Method::Full => Trains::Full,
    }
}

/// What the backward computes again.
pub(crate) fn recompute(plan: &TrainPlan) -> Recompute {
    match plan.config.recompute {
        RecomputeKnob::None => Recompute::None,
        RecomputeKnob::Layer => Recompute::Layer,
    }
}

fn load<B: Backend>(
    backend: B,
    base: &ModelDir,
    model: &ModelConfig,
    training: Training,
) -> Result<Decoder<B>, Failure> {
    let files = base.weights()?;
    let maps = files
        .iter()
        .map(|(name, file)| {
            mapping::map(file)
                .map_err(|e| Failure::environment(format!("cannot map `{name}` into memory: {e}")))
        })
        .collect::<Result<Vec<_>, _>>()?;
    let regions: Vec<&[u8]> = maps.iter().map(|map| map.as_ref()).collect();
    let source = SafetensorsRegions::new(&regions).map_err(|e| {
        let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
        let (at, names) = (base.dir().display(), names.join(", "));
        Failure::input(format!("{at}/{names}: {e}"))
            .hint("fetch or copy the model again; the file is not whole, or another kind")
    })?;
    Decoder::load(backend, model, &source, training)
        .map_err(|e| Failure::input(format!("{}: {e}", base.dir().display())))
}

/// The adapter that a run goes on from, as an input of the stage.
fn adapter_input(dir: &Path) -> Result<InputRef, Failure> {
    let role = "adapter_init";
    if let Some(sealed) = sealed(dir)? {
        return Ok(sealed.input(role));
    }
    let mut lines = String::new();
    for name in [ADAPTER_CONFIG, ADAPTER] {
        let (hash, _) = input::hash(&dir.join(name)).map_err(Failure::from).map_err(no_adapter)?;
        lines.push_str(&format!("{hash} {name}\n"));
    }
    Ok(InputRef { role: role.to_owned(), sha256: sha256(lines.as_bytes()) })
}

fn no_adapter(failure: Failure) -> Failure {
    let hint = "`train.adapter_init` is a directory with `adapter_config.json` and \
                `adapter_model.safetensors`, as PEFT and hone write it";
    failure.hint(hint)
}

/// The directory as an artefact of hone, if it is one.
fn sealed(dir: &Path) -> Result<Option<Sealed>, Failure> {
    if !input::is_file(&dir.join(Manifest::FILE)) {
        return Ok(None);
    }
    Ok(Some(Sealed::open(dir, ArtefactKind::Adapter)?))
}

fn read(dir: &Path, name: &str, bytes_max: u64) -> Result<Vec<u8>, Failure> {
    let bytes = match sealed(dir)? {
        Some(sealed) => sealed.read(name),
        None => input::read(&dir.join(name), bytes_max),
    };
    bytes.map_err(Failure::from).map_err(no_adapter)
}

fn read_config(dir: &Path) -> Result<LoraConfig, Failure> {
    let at = dir.join(ADAPTER_CONFIG);
    let text = String::from_utf8(read(dir, ADAPTER_CONFIG, CONFIG_BYTES_MAX)?)
        .map_err(|_| Failure::input(format!("{}: not UTF-8", at.display())))?;
    LoraConfig::from_json(&text).map_err(|e| Failure::input(format!("{}: {e}", at.display())))
}

fn read_adapter(
    dir: &Path,
    settings: &LoraConfig,
    model: &ModelConfig,
) -> Result<Adapter, Failure> {
    let refused = |e: ModelError| Failure::input(format!("{}: {e}", dir.join(ADAPTER).display()));
    let bytes = read(dir, ADAPTER, ADAPTER_BYTES_MAX)?;
    let tensors = Tensors::from_safetensors(&[&bytes]).map_err(refused)?;
    let adapter = Adapter { config: settings.clone(), tensors };
    for tensor in adapter.tensors.iter() {
        tensor.check_finite().map_err(refused)?;
    }
    adapter.check(model).map_err(refused)?;
    Ok(adapter)
}

/// Refuses an adapter whose settings are not those of the run: what it computes would change at the first step.
fn fits(
    found: &LoraConfig,
    ours: &LoraConfig,
    model: &ModelConfig,
    dir: &Path,
) -> Result<(), Failure> {
    let modules = |lora: &LoraConfig| -> BTreeSet<&'static str> {
        let names = model.linear_names().into_iter();
        let is_target = |name: &&str| {
            let full = |half| format!("model.layers.0.{half}.{name}");
            lora.targets(&full("self_attn")) || lora.targets(&full("mlp"))
        };
        names.filter(is_target).collect()
    };
    let (theirs, own) = (modules(found), modules(ours));
    let list = |names: &BTreeSet<&str>| {
        let quoted: Vec<String> = names.iter().map(|name| format!("\"{name}\"")).collect();
        format!("[{}]", quoted.join(", "))
    };
    let mut differ = Vec::new();
    let mut compare = |key: &str, theirs: String, own: String| {
        if theirs != own {
            differ.push(format!("`{key}` is {theirs} there and {own} here"));
        }
    };
    compare("rank", found.r.to_string(), ours.r.to_string());
    compare("alpha", found.lora_alpha.to_string(), ours.lora_alpha.to_string());
    compare("rslora", found.use_rslora.to_string(), ours.use_rslora.to_string());
    compare("target_modules", list(&theirs), list(&own));
    // What this program sets no otherwise than PEFT's default: DoRA, patterns, biases, layers.
    let rest = |lora: &LoraConfig| -> Map<String, Value> {
        let lora = LoraConfig {
            r: ours.r,
            lora_alpha: ours.lora_alpha,
            lora_dropout: ours.lora_dropout,
            use_rslora: ours.use_rslora,
            target_modules: ours.target_modules.clone(),
            base_model_name_or_path: None,
            ..lora.clone()
        };
        serde_json::from_str(&lora.to_json()).expect("it is written as an object")
    };
    let own = rest(ours);
    for (key, theirs) in rest(found) {
        let own = own.get(&key).unwrap_or(&Value::Null);
        compare(&key, theirs.to_string(), own.to_string());
    }
    if differ.is_empty() {
        return Ok(());
    }
    let message = format!("[train] `adapter_init` = {:?} does not fit: {}", dir, differ.join("; "));
    Err(Failure::usage(message).hint("give the settings that it was made with, or leave it out"))
}
