//! What a merge reads: the base, what was trained on it, its packs and its template; opened, and
//! shown to belong together.

use std::path::Path;

use hone_cli::Failure;
use hone_kernels::mapping::{self, Mapped};
use hone_model::{
    Adapter, BnbConfig, CodeBook, ModelConfig, ModelError, QuantSpec, Tensors, ValueType,
};
use hone_schema::{ArtefactKind, InputRef, Kind, Pack, Sha256Hex};
use hone_store::{ModelDir, Sealed};
use serde_json::Value;

use crate::args::{MergeBase, MergePlan};

/// Longest `config.json` read.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// What training made.
pub(crate) enum Trained {
    /// An adapter on the base.
    Adapter(Box<Adapter>),
    /// Weights that stand for themselves.
    Weights,
}

/// Everything that is read, open.
pub(crate) struct Inputs {
    /// Directory of the base model.
    pub(crate) base: ModelDir,
    /// What was trained on it.
    pub(crate) trained: Trained,
    /// How the base was quantised for the adapter, if its training did that.
    pub(crate) quant: Option<BnbConfig>,
    /// Shape of the model.
    pub(crate) model: ModelConfig,
    /// The `config.json` that the shape was read from.
    pub(crate) config_json: String,
    /// The packs.
    pub(crate) packs: Sealed,
    /// The rendered rows.
    pub(crate) rendered: Sealed,
    /// The artefact of `hone-train`.
    pub(crate) sealed: Sealed,
}

impl Inputs {
    /// Opens what the plan names.
    pub(crate) fn open(plan: &MergePlan) -> Result<Self, Failure> {
        let sealed = Sealed::open_any(&plan.trained)?;
        let base = ModelDir::open(&plan.base)?;
        let packs = Sealed::open(&plan.packs, ArtefactKind::Packs)?;
        let rendered = Sealed::open(&plan.rendered, ArtefactKind::Rendered)?;
        same(&sealed, "packs", packs.sha256(), packs.dir(), "hone-train")?;
        same(&packs, "rendered", rendered.sha256(), rendered.dir(), "hone-tokenize")?;
        let (config, trained) = match sealed.manifest().kind {
            ArtefactKind::Adapter => {
                same(&sealed, "base", &base.input("base")?.sha256, base.dir(), "hone-train")?;
                let adapter = Box::new(adapter(&sealed)?);
                (base.read("config.json", CONFIG_BYTES_MAX)?, Trained::Adapter(adapter))
            }
            ArtefactKind::Weights => (sealed.read("config.json")?, Trained::Weights),
            other => {
                let at = sealed.dir().display();
                return Err(Failure::input(format!(
                    "`{at}` holds {other}, nothing that was trained"
                ))
                .hint("run `hone-train` first"));
            }
        };
        let config_json = String::from_utf8(config).map_err(|_| {
            Failure::input(format!("`{}`: config.json is not UTF-8", base.dir().display()))
        })?;
        // Whether the weights lie in 4 bits, their own files say.
        let (model, stored) =
            BnbConfig::read_model_config(&config_json).map_err(|e| refused(base.dir(), &e))?;
        // What lies in 4 bits was taken as it is.
        let quant = if stored.is_none() { quant(&sealed)? } else { None };
        if quant.is_none() && plan.config.base == MergeBase::Original {
            let message = "[merge] `base` is \"original\", and the adapter learned on the weights \
                           as they lie in the base";
            return Err(Failure::usage(message).hint("leave it out"));
        }
        Ok(Inputs { base, trained, quant, model, config_json, packs, rendered, sealed })
    }

    /// What the merge depends on.
    pub(crate) fn refs(&self) -> Result<Vec<InputRef>, Failure> {
        let base = match self.trained {
            Trained::Adapter(_) => self.base.input("base")?,
            // Only its tokenizer and its settings are read; its weights may be the older copy of
            // what is written.
            Trained::Weights => {
                let is_text = |name: &&str| !name.ends_with(".safetensors");
                let names: Vec<&str> =
                    self.base.names().iter().map(String::as_str).filter(is_text).collect();
                self.base.input_of("base", &names)?
            }
        };
        let sealed =
            [("trained", &self.sealed), ("packs", &self.packs), ("template", &self.rendered)];
        let sealed = sealed.into_iter().map(|(role, artefact)| artefact.input(role));
        Ok(std::iter::once(base).chain(sealed).collect())
    }

    /// The files of the weights that are the merge's starting point: the base's, or those that were
    /// trained.
    pub(crate) fn weights(&self) -> Result<Vec<Mapped>, Failure> {
        let maps = match self.trained {
            Trained::Adapter(_) => self.base.mapped_weights(mapping::map)?,
            Trained::Weights => ModelDir::open(self.sealed.dir())?.mapped_weights(mapping::map)?,
        };
        Ok(maps.into_iter().map(|(_, map)| map).collect())
    }

    /// Every document of the packs, in the order of eval, test, train, and whether training saw a
    /// conversation.
    pub(crate) fn documents(&self) -> Result<(Vec<Document>, bool), Failure> {
        let mut all = Vec::new();
        let mut is_chat = false;
        for split in ["eval", "test", "train"] {
            let name = format!("{split}.arrow");
            if !self.packs.has(&name) {
                continue;
            }
            for batch in self.packs.ipc(&name)? {
                for pack in Pack::from_batch(&batch)? {
                    is_chat |= split == "train" && pack.docs.iter().any(|d| d.kind != Kind::Text);
                    push_documents(pack, &mut all);
                }
            }
        }
        Ok((all, is_chat))
    }
}

/// A document of the packs.
#[derive(Clone)]
pub(crate) struct Document {
    /// Id of its row.
    pub(crate) row_id: String,
    /// Its tokens.
    pub(crate) ids: Vec<u32>,
}

fn push_documents(pack: Pack, all: &mut Vec<Document>) {
    let mut ids = pack.input_ids.as_slice();
    for doc in pack.docs {
        let (own, rest) = ids.split_at(doc.len as usize);
        all.push(Document { row_id: doc.row_id, ids: own.to_vec() });
        ids = rest;
    }
}

/// A file that was written a moment ago, mapped into memory.
pub(crate) fn map(path: &Path) -> Result<Mapped, Failure> {
    let file = hone_store::input::open(path)?;
    mapping::map(&file).map_err(|e| {
        Failure::environment(format!("cannot map `{}` into memory: {e}", path.display()))
    })
}

/// A model or an adapter that does not fit, and where it lies.
pub(crate) fn refused(dir: &Path, error: &ModelError) -> Failure {
    Failure::input(format!("`{}`: {error}", dir.display()))
}

fn adapter(sealed: &Sealed) -> Result<Adapter, Failure> {
    let bytes = sealed.read("adapter_model.safetensors")?;
    let text = String::from_utf8(sealed.read("adapter_config.json")?)
        .map_err(|_| Failure::input("adapter_config.json is not UTF-8"))?;
    Tensors::from_safetensors(&[&bytes])
        .and_then(|tensors| Adapter::from_parts(&text, tensors))
        .map_err(|e| refused(sealed.dir(), &e))
}

/// How training quantised its base, as its record has it.
fn quant(sealed: &Sealed) -> Result<Option<BnbConfig>, Failure> {
    let config = &sealed.manifest().config;
    if config.get("method").and_then(Value::as_str) != Some("qlora") {
        return Ok(None);
    }
    let book = match config.get("quant_type").and_then(Value::as_str) {
        Some("nf4") => Some(CodeBook::Nf4),
        Some("fp4") => Some(CodeBook::Fp4),
        _ => None,
    };
    let nested = config.get("double_quant").and_then(Value::as_bool);
    let (Some(book), Some(nested)) = (book, nested) else {
        let at = sealed.dir().display();
        let message = format!("`{at}` does not say how its base was quantised");
        return Err(Failure::input(message).hint("run `hone-train` again"));
    };
    let spec = QuantSpec { book, nested, ..QuantSpec::qlora(ValueType::F32) };
    Ok(Some(BnbConfig { spec, skip_modules: Vec::new() }))
}

/// Refuses an artefact that was made from another state of its input: a model would be given a
/// template, or a base, that it was not trained with.
fn same(
    made: &Sealed,
    role: &str,
    now: &Sha256Hex,
    dir: &Path,
    stage: &str,
) -> Result<(), Failure> {
    match made.manifest().inputs.iter().find(|input| input.role == role) {
        Some(then) if then.sha256 == *now => Ok(()),
        _ => Err(Failure::input(format!(
            "`{}` was made from other {role} than those in `{}`",
            made.dir().display(),
            dir.display()
        ))
        .hint(format!("run `{stage}` again"))),
    }
}
