//! The stage: writes the directory, checks it, seals it.

use std::path::{Path, PathBuf};

use hone_cli::{Context, Exit, Failure, Outcome, StagePlan, run_stage};
use hone_model::{
    Adapter, BnbRegions, Merge, ModelConfig, ModelError, QuantizeOnLoad, SafetensorsRegions,
    SafetensorsWriter, StoredType, TensorSource,
};
use hone_schema::{ArtefactKind, Ledger};
use hone_store::{Draft, StoreError};
use serde_json::{Value, json};

use crate::args::{Args, MergeBase, MergeConfig, MergePlan};
use crate::check::{Difference, Reference, choose};
use crate::files;
use crate::inputs::{Document, Inputs, Trained, map, refused};

/// Name of the weights.
const WEIGHTS: &str = "model.safetensors";

/// Runs the stage.
pub(crate) fn merge(args: Args, ctx: &Context) -> Result<Exit, Failure> {
    let plan = MergePlan::resolve(&args.common)?;
    let inputs = Inputs::open(&plan)?;
    let stage = StagePlan {
        stage: "merge",
        kind: ArtefactKind::Weights,
        dir: plan.out.clone(),
        config: serde_json::to_value(&plan).expect("a plan has only string keys"),
        inputs: inputs.refs()?,
    };
    run_stage(ctx, &args.common, stage, |draft, _| work(ctx, &plan, &inputs, draft))
}

fn work(
    ctx: &Context,
    plan: &MergePlan,
    inputs: &Inputs,
    draft: &Draft,
) -> Result<Outcome, Failure> {
    let bad = |e: ModelError| refused(inputs.base.dir(), &e);
    let maps = inputs.weights()?;
    let regions: Vec<&[u8]> = maps.iter().map(AsRef::as_ref).collect();
    let source = BnbRegions::new(&regions).map_err(bad)?;
    let stored = plan.config.dtype.stored(source.is_all_bf16());
    let quantized = inputs.quant.as_ref().map(|q| QuantizeOnLoad::new(&inputs.model, &source, q));
    let trained_on: &dyn TensorSource = match &quantized {
        Some(quantized) => quantized,
        None => &source,
    };
    let into = match plan.config.base {
        MergeBase::Trained => trained_on,
        MergeBase::Original => &source,
    };
    let merged = match &inputs.trained {
        Trained::Adapter(adapter) => Some(Merge::new(&inputs.model, into, adapter).map_err(bad)?),
        Trained::Weights => None,
    };
    // An adapter may give a tied head a matrix of its own.
    let model = merged.as_ref().map_or(&inputs.model, Merge::config);
    let (documents, is_chat) = inputs.documents()?;
    let templates = if is_chat { Some(files::templates(&inputs.rendered)?) } else { None };
    let (base, packs) = (&inputs.base, &inputs.packs);
    let unties = model.tie_word_embeddings != inputs.model.tie_word_embeddings;
    let config = (inputs.config_json.as_str(), unties);
    let stop_ids = files::write(draft, config, stored, base, packs, templates.as_ref())?;
    let rows = choose(documents, plan.config.check_rows);
    let found = match (&inputs.trained, &merged) {
        (Trained::Adapter(adapter), Some(merged)) => {
            let file = write(ctx, draft, model, merged, stored)?;
            let bases = (trained_on, into);
            folded(inputs, (adapter, merged), bases, (&file, stored), rows)?
        }
        _ => {
            model.check_source(&source).map_err(bad)?;
            let file = write(ctx, draft, model, &source, stored)?;
            let reference = Reference::new(model, &source, None, rows).map_err(bad)?;
            let written = compare_file(&reference, model, &file)?;
            Found { model, exact: None, written, reference, n_changed: 0 }
        }
    };
    let faults = found.faults(&plan.config, stored);
    for fault in &faults {
        ctx.warn(format!("merge: {fault}"));
    }
    let report = report(inputs, &found, &plan.config, stored, &stop_ids, &faults);
    let text = serde_json::to_string_pretty(&report).expect("JSON values have only string keys");
    draft.write("merge.json", format!("{text}\n").as_bytes(), None)?;
    Ok(Outcome {
        ledger: ledger(inputs),
        summary: summary(&found, stored),
        exit: if faults.is_empty() { Exit::Done } else { Exit::GateFailed },
        report,
    })
}

/// Compares a merge with base and adapter, and its file with what was trained. `bases` are the one
/// that the adapter learned on and the one that it was folded into, which may be the same.
fn folded<'a>(
    inputs: &Inputs,
    (adapter, merged): (&Adapter, &'a Merge<'_>),
    (trained_on, into): (&dyn TensorSource, &dyn TensorSource),
    (file, stored): (&Path, StoredType),
    rows: Vec<Document>,
) -> Result<Found<'a>, Failure> {
    let bad = |e: ModelError| refused(inputs.base.dir(), &e);
    let model = merged.config();
    let beside = |base, rows| Reference::new(&inputs.model, base, Some(adapter), rows);
    let reference = beside(trained_on, rows.clone()).map_err(bad)?;
    let written = compare_file(&reference, model, file)?;
    let exact = if !std::ptr::addr_eq(trained_on, into) {
        // On its own base it says something else: that is a matter of `written`.
        beside(into, rows).and_then(|other| other.compare(model, merged)).map_err(bad)?
    } else if stored == StoredType::F32 {
        // A file of f32 is the exact merge; a rounded one is measured beside it.
        written
    } else {
        reference.compare(model, merged).map_err(bad)?
    };
    let n_changed = model.tensors().iter().filter(|t| merged.changes(&t.name)).count();
    Ok(Found { model, exact: Some(exact), written, reference, n_changed })
}

/// Streams the model's tensors into the weights' file, and says where it lies.
fn write(
    ctx: &Context,
    draft: &Draft,
    model: &ModelConfig,
    source: &dyn TensorSource,
    stored: StoredType,
) -> Result<PathBuf, Failure> {
    let entries = model.tensors();
    let mut progress = ctx.progress(entries.len() as u64, "tensors");
    let mut file = draft.file(WEIGHTS)?;
    let path = file.path().to_owned();
    let failed = |e: ModelError| match e {
        ModelError::Write(source) => {
            StoreError::Io { action: "write", path: path.clone(), source }.into()
        }
        other => Failure::input(other.to_string()),
    };
    let mut writer = SafetensorsWriter::new(&mut file, &entries, stored).map_err(failed)?;
    for entry in &entries {
        if let Some(exit) = ctx.stop() {
            return Err(Failure::stopped(exit));
        }
        let tensor = source.tensor(&entry.name).map_err(failed)?;
        writer.put(&tensor).map_err(failed)?;
        progress.inc(1);
    }
    writer.finish().map_err(failed)?;
    file.finish(None)?;
    progress.finish();
    Ok(path)
}

/// Reads the written file back as any loader would, and compares.
fn compare_file(
    reference: &Reference,
    model: &ModelConfig,
    path: &Path,
) -> Result<Difference, Failure> {
    let mapped = map(path)?;
    let wrong = |e: ModelError| Failure::input(format!("{WEIGHTS} as it was written: {e}"));
    let source = SafetensorsRegions::new(&[mapped.as_ref()]).map_err(wrong)?;
    reference.compare(model, &source).map_err(wrong)
}

/// What was measured.
struct Found<'a> {
    /// Shape of what was written.
    model: &'a ModelConfig,
    /// The merge before any rounding; nothing is merged into full weights.
    exact: Option<Difference>,
    /// The file.
    written: Difference,
    reference: Reference,
    n_changed: usize,
}

impl Found<'_> {
    /// What lies above its bound, in words.
    fn faults(&self, config: &MergeConfig, stored: StoredType) -> Vec<String> {
        let mut faults = Vec::new();
        let bound = config.max_logit_diff;
        let is_f32 = stored == StoredType::F32;
        let exact = self.exact.or(is_f32.then_some(self.written));
        if let Some(d) = exact.map(|d| d.max_logit_diff).filter(|d| *d > bound) {
            faults.push(format!("a logit differs by {d:.3e}, more than max_logit_diff = {bound}"));
        }
        let (kl, bound) = (self.written.mean_kl, config.max_kl);
        if kl > bound {
            let what = format!("the written weights diverge by {kl:.3e} nats a token");
            faults.push(format!("{what}, more than max_kl = {bound}"));
        }
        faults
    }
}

fn dtype_name(stored: StoredType) -> &'static str {
    match stored {
        StoredType::F32 => "f32",
        StoredType::Bf16 => "bf16",
    }
}

fn report(
    inputs: &Inputs,
    found: &Found<'_>,
    config: &MergeConfig,
    stored: StoredType,
    stop_ids: &[u32],
    faults: &[String],
) -> Value {
    json!({
        "from": match inputs.trained {
            Trained::Adapter(_) => "adapter",
            Trained::Weights => "weights",
        },
        "dtype": dtype_name(stored),
        // Of an adapter that learned on weights of 4 bits: what it was folded into.
        "base": inputs.quant.as_ref().map(|_| config.base),
        "n_params": found.model.n_params(),
        "n_tensors": found.model.tensors().len(),
        "n_changed": found.n_changed,
        "stop_ids": stop_ids,
        "template": files::template_ref(&inputs.rendered).map(|r| r.sha256),
        "check": {
            "rows": found.reference.row_ids(),
            "n_positions": found.reference.n_positions(),
            "exact": found.exact.map(Difference::to_json),
            "written": found.written.to_json(),
            "bounds": {"max_logit_diff": config.max_logit_diff, "max_kl": config.max_kl},
            "passed": faults.is_empty(),
            "faults": faults,
        },
    })
}

fn summary(found: &Found<'_>, stored: StoredType) -> String {
    let size = found.model.n_params() as f64 / 1e6;
    let what = match found.exact {
        Some(exact) => format!(
            "{} tensors merged, logits differ by at most {:.1e}",
            found.n_changed, exact.max_logit_diff
        ),
        None => format!("exported, logits differ by at most {:.1e}", found.written.max_logit_diff),
    };
    let rounding = match stored {
        StoredType::F32 => String::new(),
        StoredType::Bf16 => format!("; as bf16 {:.1e} nats a token", found.written.mean_kl),
    };
    format!("{size:.1} M parameters as {}, {what}{rounding}", dtype_name(stored))
}

/// Every row that training used stands behind the model: the ledger passes them on.
fn ledger(inputs: &Inputs) -> Ledger {
    let mut ledger = Ledger::default();
    for (source, before) in &inputs.sealed.manifest().ledger.sources {
        let account = ledger.source(source);
        (account.rows_in, account.rows_out) = (before.rows_out, before.rows_out);
    }
    ledger
}
