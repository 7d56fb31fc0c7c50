//! The stage: opens its inputs, runs the loop, seals what was learned.

use hone_cli::{Common, Context, Exit, Failure, Outcome, StagePlan, run_stage};
use hone_kernels::{Backend, Cpu, OnBackend, Place, PlaceError};
use hone_learn::Learner;
use hone_model::{Adapter, Compute, Decoder, StoredType, reinit_rows};
use hone_schema::{ArtefactKind, Ledger};
use hone_store::{Draft, Live, Sealed, machine};
use serde_json::{Value, json};

use crate::args::{EarlierArgs, Method, SaveDtype, TrainPlan};
use crate::checkpoint::Checkpoints;
use crate::epochs::Packs;
use crate::memory::{self, Memory, Run};
use crate::plan::Steps;
use crate::report;
use crate::samples::Samples;
use crate::start::{Inputs, Loaded};
use crate::training::{self, Trained};
use crate::weights;

/// Runs the stage.
pub(crate) fn train(ctx: &Context, common: &Common, earlier: EarlierArgs) -> Result<Exit, Failure> {
    let plan = TrainPlan::resolve(common)?;
    plan.notes.iter().for_each(|note| ctx.note(format!("train: {note}")));
    let inputs = Inputs::open(&plan)?;
    let mut stage = StagePlan {
        stage: "train",
        kind: match plan.config.method {
            Method::Lora | Method::Qlora => ArtefactKind::Adapter,
            Method::Full => ArtefactKind::Weights,
        },
        dir: plan.packs.with_file_name("train"),
        config: identity(&plan),
        inputs: inputs.refs(&plan)?,
    };
    let out = common.out.clone().unwrap_or_else(|| stage.dir.clone());
    let kept = plan.config.keep_checkpoints;
    let checkpoints = Checkpoints::beside(&out, &mut stage, kept, (earlier.into(), common.force))?;
    let force = common.force;
    let exit = run_stage(ctx, common, stage, |draft, _| {
        work(ctx, &plan, &inputs, force, draft, &checkpoints)
    })?;
    if !common.why {
        checkpoints.clear()?;
    }
    Ok(exit)
}

/// The settings that decide a run's bytes. When and how often it is written down does not.
fn identity(plan: &TrainPlan) -> Value {
    let mut value = serde_json::to_value(plan).expect("a plan has only string keys");
    if let Some(table) = value.as_object_mut() {
        table.retain(|key, _| !matches!(key.as_str(), "checkpoint_every" | "keep_checkpoints"));
    }
    value
}

fn work(
    ctx: &Context,
    plan: &TrainPlan,
    inputs: &Inputs,
    force: bool,
    draft: &mut Draft,
    checkpoints: &Checkpoints,
) -> Result<Outcome, Failure> {
    let (train, eval) = inputs.splits(plan)?;
    let (files, half_embedding) = (inputs.base.files(plan)?, inputs.base.half_embedding(plan)?);
    let run = Run { inputs, files, half_embedding, train: &train, eval: &eval };
    let memory = run.memory(plan, &inputs.start);
    memory.check(force)?;
    if plan.config.soft_cap.is_some() {
        ctx.note(
            "train: `soft_cap` becomes a part of what the model computes, and no `config.json` says it",
        );
    }
    let unseen = inputs.unseen_tokens(&train)?;
    if !unseen.is_empty() {
        ctx.warn(format!("train: `trainable_tokens`: no pack has {unseen:?}, whose rows stay"));
    }
    let mut steps = Steps::new(plan, &train);
    ctx.note(format!(
        "train: {} packs, {} tokens, {} of them trained; {} steps; about {}",
        train.len(),
        train.n_tokens(),
        train.n_trained(),
        steps.len(),
        memory::size(memory.peak())
    ));
    let on_cpu = plan.config.device == Place::Cpu;
    if on_cpu && plan.config.compute == Compute::Bf16 && !Cpu::has_bf16() {
        ctx.note("train: this processor has no instructions for bf16: it is slower than f32 here");
    }
    steps.write(draft)?;
    let data = (&train, &eval, Samples::open(&inputs.packs, &plan.config)?);
    let learning = Learning { ctx, plan, inputs, data, steps, checkpoints, draft: &mut *draft };
    let done = plan.config.device.with(learning).map_err(unusable)??;
    draft.write("metrics.jsonl", done.metrics.sealed().as_bytes(), None)?;
    measured(ctx, plan, &memory, checkpoints.has_written())?;
    Ok(outcome(&inputs.packs, &train, &done, &memory))
}

/// A device that cannot be used.
pub(crate) fn unusable(error: PlaceError) -> Failure {
    Failure::environment(error.what).hint(error.hint)
}

/// The training itself, on whichever device.
struct Learning<'a> {
    ctx: &'a Context,
    plan: &'a TrainPlan,
    inputs: &'a Inputs,
    data: (&'a Packs, &'a Packs, Option<Samples>),
    steps: Steps<'a>,
    checkpoints: &'a Checkpoints,
    draft: &'a mut Draft,
}

impl OnBackend for Learning<'_> {
    type Output = Result<Trained, Failure>;

    fn run<B: Backend>(self, backend: B) -> Result<Trained, Failure> {
        let Learning { ctx, plan, inputs, data, steps, checkpoints, draft } = self;
        let Loaded { decoder, taken } = inputs.start.load(backend, plan, &inputs.base)?;
        let mut learner = Learner::new(decoder, plan.recipe(), steps.schedule(), plan.seed)
            .map_err(training::failure)?;
        let done = training::train(ctx, plan, &mut learner, data, steps, checkpoints)?;
        let mut decoder = learner.into_decoder();
        if !plan.config.reinit_tokens.is_empty() {
            reinit_tokens(plan, &mut decoder)?;
        }
        save(plan, inputs, &decoder, taken.as_ref(), draft)?;
        Ok(done)
    }
}

/// Says what the plan of memory was worth: what a process took is no part of its result, and goes to the logs.
fn measured(
    ctx: &Context,
    plan: &TrainPlan,
    memory: &Memory,
    checkpoint: bool,
) -> Result<(), Failure> {
    let Some(peak) = machine::peak_bytes() else { return Ok(()) };
    let (text, object) = memory.beside(peak, checkpoint);
    ctx.note(format!("train: memory: {text}"));
    Ok(Live::create(&plan.logs.join("memory.json"))?.write(format!("{object}\n").as_bytes())?)
}

/// Draws embeddings anew: those of tokens that never occurred have all been pushed the same way by the softmax.
fn reinit_tokens<B: Backend>(plan: &TrainPlan, decoder: &mut Decoder<B>) -> Result<(), Failure> {
    let mut tensors = decoder.trained();
    for name in ["model.embed_tokens.weight", "lm_head.weight"] {
        if let Some(matrix) = tensors.get_mut(name) {
            reinit_rows(matrix, &plan.config.reinit_tokens, plan.seed);
        }
    }
    decoder.set_trained(&tensors).map_err(|e| Failure::input(e.to_string()))
}

fn save<B: Backend>(
    plan: &TrainPlan,
    inputs: &Inputs,
    decoder: &Decoder<B>,
    taken: Option<&Adapter>,
    draft: &mut Draft,
) -> Result<(), Failure> {
    match plan.config.method {
        Method::Lora | Method::Qlora => {
            let Adapter { config, tensors } =
                inputs.start.learned(&inputs.base.model, decoder, taken)?;
            weights::write(draft, "adapter_model.safetensors", &tensors, StoredType::F32)?;
            draft.write("adapter_config.json", config.to_json().as_bytes(), None)?;
        }
        Method::Full => {
            let stored = match plan.config.save_dtype {
                SaveDtype::F32 => StoredType::F32,
                SaveDtype::Bf16 => StoredType::Bf16,
            };
            weights::write(draft, "model.safetensors", &decoder.export(), stored)?;
            draft.write("config.json", inputs.base.model.to_json().as_bytes(), None)?;
        }
    }
    Ok(())
}

fn outcome(packs: &Sealed, train: &Packs, done: &Trained, memory: &Memory) -> Outcome {
    let last = done.metrics.sealed().lines().rev().find_map(loss_of);
    let evaluation = done.evaluation.map(
        |e| json!({"loss": e.loss, "perplexity": e.perplexity, "mean_token_accuracy": e.accuracy}),
    );
    let mut report = json!({
        "n_steps": done.n_steps,
        "n_packs": train.len(),
        "num_tokens": done.metrics.tokens_seen(),
        "loss": last,
        "eval": evaluation,
        "best": done.best,
        "stopped_early": done.n_steps < done.n_planned,
        // From its text in every run, so that the floats of a resumed one are the same.
        "self_test": serde_json::from_str::<Value>(&done.self_test).ok(),
        "memory_plan": memory.sealed(),
    });
    report::tell_apart(&mut report, train, done);
    let held_out = done.evaluation.map_or(String::new(), |e| format!(", held-out {:.4}", e.loss));
    let summary = format!(
        "{} steps, loss {:.4}{held_out}, {:.0} tokens/s",
        done.n_steps,
        last.unwrap_or(f64::NAN),
        done.metrics.rate()
    );
    // Every row of the packs is used: the ledger passes them on.
    let mut ledger = Ledger::default();
    for (source, before) in &packs.manifest().ledger.sources {
        let account = ledger.source(source);
        (account.rows_in, account.rows_out) = (before.rows_out, before.rows_out);
    }
    Outcome { ledger, report, exit: Exit::Done, summary }
}

fn loss_of(line: &str) -> Option<f64> {
    serde_json::from_str::<Value>(line).ok()?.get("loss")?.as_f64()
}
