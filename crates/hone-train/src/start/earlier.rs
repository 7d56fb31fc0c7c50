//! The adapter that a run goes on from: an artefact of hone, or a directory as PEFT writes it.

use std::collections::BTreeSet;
use std::path::Path;

use hone_cli::Failure;
use hone_model::{Adapter, LoraConfig, ModelConfig, ModelError, Tensors};
use hone_schema::{ArtefactKind, InputRef, Manifest, sha256};
use hone_store::{Sealed, input};
use serde_json::{Map, Value};

use crate::args::TrainPlan;

/// Longest `adapter_config.json` read.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Largest adapter read: several times that of rank 256 on a model of 70 thousand million weights.
const ADAPTER_BYTES_MAX: u64 = 1 << 35;

const ADAPTER_CONFIG: &str = "adapter_config.json";
const ADAPTER: &str = "adapter_model.safetensors";

/// The adapter that a run goes on from, as an input of the stage.
pub(super) fn input_of(dir: &Path) -> Result<InputRef, Failure> {
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

pub(super) fn config(dir: &Path) -> Result<LoraConfig, Failure> {
    let at = dir.join(ADAPTER_CONFIG);
    let text = String::from_utf8(read(dir, ADAPTER_CONFIG, CONFIG_BYTES_MAX)?)
        .map_err(|_| Failure::input(format!("{}: not UTF-8", at.display())))?;
    LoraConfig::from_json(&text).map_err(|e| Failure::input(format!("{}: {e}", at.display())))
}

pub(super) fn adapter(
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
pub(super) fn fits(
    found: &LoraConfig,
    ours: &LoraConfig,
    model: &ModelConfig,
    (dir, plan): (&Path, &TrainPlan),
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
    // An adapter belongs to the weights that it learned on.
    if let Some(sealed) = sealed(dir)? {
        let config = serde_json::to_value(plan).unwrap_or_default();
        for key in ["method", "quant_type", "double_quant"] {
            let of = |config: &Value| config.get(key).map_or("not given".into(), Value::to_string);
            compare(key, of(&sealed.manifest().config), of(&config));
        }
    }
    compare("rank", found.r.to_string(), ours.r.to_string());
    // As much as the scaling has of it.
    let alpha = |lora: &LoraConfig| (lora.lora_alpha as f32).to_string();
    compare("alpha", alpha(found), alpha(ours));
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
