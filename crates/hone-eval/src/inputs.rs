//! What an evaluation reads: both models, the test packs and prompts, the record of training.

use hone_cli::{Context, Failure};
use hone_kernels::{Backend, mapping};
use hone_model::{BnbConfig, BnbRegions, Decoder, ModelError, Training};
use hone_schema::{ArtefactKind, InputRef, Manifest, Pack, Prompt, Split};
use hone_store::{ModelDir, Sealed};
use hone_tokens::Vocab;
use serde_json::Value;

use crate::args::EvalPlan;

/// Longest `config.json` read.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Everything that is read, open.
pub(crate) struct Inputs {
    /// The base model.
    pub(crate) base: ModelDir,
    /// The tuned model's directory.
    pub(crate) tuned: ModelDir,
    /// The manifest of the tuned model.
    pub(crate) tuned_manifest: Manifest,
    /// Packs and prompts.
    pub(crate) packs: Sealed,
    /// What training wrote, if the tuned model was made from it.
    pub(crate) train: Option<Sealed>,
    /// What the evaluation depends on.
    pub(crate) refs: Vec<InputRef>,
}

impl Inputs {
    /// Opens what the plan names.
    pub(crate) fn open(ctx: &Context, plan: &EvalPlan) -> Result<Self, Failure> {
        let packs = Sealed::open(&plan.packs, ArtefactKind::Packs)?;
        let merged = Sealed::open(&plan.tuned, ArtefactKind::Weights)?;
        let base = ModelDir::open(&plan.base)?;
        let tuned = ModelDir::open(&plan.tuned)?;
        let train = match Sealed::open_any(&plan.train) {
            Ok(train) if is_input(&merged, "trained", &train) => Some(train),
            _ => {
                let (train, merge) = (plan.train.display(), plan.tuned.display());
                ctx.warn(format!(
                    "eval: `{merge}` was not made from `{train}`: no loss curve is shown"
                ));
                None
            }
        };
        let mut refs = vec![packs.input("packs"), base.input("base")?, merged.input("tuned")];
        refs.extend(train.iter().map(|train| train.input("train")));
        let tuned_manifest = merged.manifest().clone();
        Ok(Inputs { base, tuned, tuned_manifest, packs, train, refs })
    }

    /// The test packs; none when no row is of the test split.
    pub(crate) fn packs(&self) -> Result<Vec<Pack>, Failure> {
        let name = "test.arrow";
        if !self.packs.has(name) {
            return Ok(Vec::new());
        }
        let mut packs = Vec::new();
        for batch in self.packs.ipc(name)? {
            packs.extend(Pack::from_batch(&batch)?);
        }
        Ok(packs)
    }

    /// The prompts of the test split, at most `max` of them, evenly spaced.
    pub(crate) fn prompts(&self, max: Option<usize>) -> Result<Vec<Prompt>, Failure> {
        let mut prompts = self.packs.parquet("prompts.parquet")?.rows(Prompt::from_batch)?;
        prompts.retain(|prompt| prompt.split == Split::Test);
        let chosen = spaced(prompts.len(), max.unwrap_or(usize::MAX));
        let mut chosen = chosen.into_iter().peekable();
        let mut at = 0;
        prompts.retain(|_| {
            at += 1;
            chosen.next_if_eq(&(at - 1)).is_some()
        });
        Ok(prompts)
    }

    /// The tokens that end an answer.
    pub(crate) fn stop_ids(&self) -> Result<Vec<u32>, Failure> {
        let name = "stops.json";
        let at = self.packs.path(name);
        let wrong = |what: String| Failure::input(format!("`{}`: {what}", at.display()));
        let value: Value =
            serde_json::from_slice(&self.packs.read(name)?).map_err(|e| wrong(e.to_string()))?;
        let ids = value.get("stop_ids").and_then(Value::as_array).and_then(|ids| {
            ids.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect()
        });
        ids.ok_or_else(|| wrong("`stop_ids` is no list of token ids".to_owned()))
    }

    /// The vocabulary that the packs were made with.
    pub(crate) fn vocab(&self) -> Result<Vocab, Failure> {
        let name = "tokenizer.json";
        Vocab::from_json(&self.packs.read(name)?)
            .map_err(|e| Failure::input(format!("`{}`: {e}", self.packs.path(name).display())))
    }

    /// The lines of `metrics.jsonl`.
    pub(crate) fn metrics(&self) -> Result<Option<String>, Failure> {
        let name = "metrics.jsonl";
        let Some(train) = self.train.as_ref().filter(|train| train.has(name)) else {
            return Ok(None);
        };
        Ok(Some(String::from_utf8_lossy(&train.read(name)?).into_owned()))
    }
}

/// Whether `made` was made from just this state of `input`.
fn is_input(made: &Sealed, role: &str, input: &Sealed) -> bool {
    let then = made.manifest().inputs.iter().find(|i| i.role == role);
    then.is_some_and(|then| then.sha256 == *input.sha256())
}

/// At most `n` of the numbers below `total`, evenly spaced.
pub(crate) fn spaced(total: usize, n: usize) -> Vec<usize> {
    let n = n.min(total);
    (0..n).map(|i| i * total / n).collect()
}

/// Loads a model onto a device.
pub(crate) fn load<B: Backend>(dir: &ModelDir, backend: B) -> Result<Decoder<B>, Failure> {
    let refused = |e: ModelError| Failure::input(format!("`{}`: {e}", dir.dir().display()));
    let text = String::from_utf8(dir.read("config.json", CONFIG_BYTES_MAX)?).map_err(|_| {
        Failure::input(format!("`{}`: config.json is not UTF-8", dir.dir().display()))
    })?;
    let (model, _) = BnbConfig::read_model_config(&text).map_err(refused)?;
    let maps = dir.mapped_weights(mapping::map)?;
    let regions: Vec<&[u8]> = maps.iter().map(|(_, map)| map.as_ref()).collect();
    // A directory whose weights are not in 4 bits is read by it too.
    let source = BnbRegions::new(&regions).map_err(refused)?;
    Decoder::load(backend, &model, &source, Training::Frozen).map_err(refused)
}
