//! The stage: opens its inputs, runs the loop, seals what was learned.

use hone_cli::{Common, Context, Exit, Failure, Outcome, StagePlan, run_stage};
use hone_kernels::{Cpu, mapping};
use hone_learn::Learner;
use hone_model::{
    Adapter, Decoder, MemoryPlan, Method as MemoryMethod, ModelConfig, ModelError, Recompute,
    SafetensorsRegions, StoredType, Tensors, Training, init_weights, reinit_rows,
};
use hone_schema::{ArtefactKind, Ledger};
use hone_store::{Draft, ModelDir, Sealed, StoreError};
use serde_json::{Value, json};

use crate::args::{Init, Method, Objective, RecomputeKnob, SaveDtype, TrainPlan};
use crate::checkpoint::Checkpoints;
use crate::epochs::Packs;
use crate::plan::Steps;
use crate::training::{self, Trained};

/// Longest `config.json` read.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Files of the base that a run from random weights depends on.
const SHAPE_FILES: [&str; 1] = ["config.json"];

/// What a run reads, open and checked.
struct Inputs {
    packs: Sealed,
    base: ModelDir,
    model: ModelConfig,
}

/// Runs the stage.
pub(crate) fn train(ctx: &Context, common: &Common) -> Result<Exit, Failure> {
    let plan = TrainPlan::resolve(common)?;
    let packs = Sealed::open(&plan.packs, ArtefactKind::Packs)?;
    let base = ModelDir::open(&plan.base)?;
    let from_base = match plan.config.init {
        Init::Base => base.input("base")?,
        Init::Random => base.input_of("base", &SHAPE_FILES)?,
    };
    let stage = StagePlan {
        stage: "train",
        kind: match plan.config.method {
            Method::Lora => ArtefactKind::Adapter,
            Method::Full => ArtefactKind::Weights,
        },
        dir: plan.packs.with_file_name("train"),
        config: serde_json::to_value(&plan).expect("a plan has only string keys"),
        inputs: vec![packs.input("packs"), from_base],
    };
    let text = String::from_utf8(base.read("config.json", CONFIG_BYTES_MAX)?).map_err(|_| {
        Failure::input(format!("{}: config.json is not UTF-8", plan.base.display()))
    })?;
    let model = ModelConfig::from_json(&text)
        .map_err(|e| Failure::input(format!("{}: {e}", plan.base.display())))?;
    if let Some(id) = plan.config.reinit_tokens.iter().find(|id| **id as usize >= model.vocab_size)
    {
        let size = model.vocab_size;
        let message =
            format!("[train] `reinit_tokens` names {id}, the vocabulary has {size} tokens");
        return Err(Failure::usage(message));
    }
    let (key, program) = stage.key()?;
    let out = common.out.clone().unwrap_or_else(|| stage.dir.clone());
    let checkpoints = Checkpoints::beside(&out, key, program);
    let inputs = Inputs { packs, base, model };
    let exit =
        run_stage(ctx, common, stage, |draft, _| work(ctx, &plan, &inputs, draft, &checkpoints))?;
    if !common.why {
        checkpoints.clear()?;
    }
    Ok(exit)
}

fn work(
    ctx: &Context,
    plan: &TrainPlan,
    inputs: &Inputs,
    draft: &mut Draft,
    checkpoints: &Checkpoints,
) -> Result<Outcome, Failure> {
    let causal = plan.config.objective == Objective::Causal;
    let train = Packs::read(&inputs.packs, "train", causal)?;
    let eval = Packs::read(&inputs.packs, "eval", causal)?;
    train.need_trained(&inputs.packs)?;
    let mut steps = Steps::new(plan, &train);
    let memory = memory_plan(plan, inputs, &train);
    ctx.note(format!(
        "train: {} packs, {} tokens, {} of them trained; {} steps; about {:.0} MB",
        train.len(),
        train.n_tokens(),
        train.n_trained(),
        steps.len(),
        memory.total() as f64 / 1e6
    ));
    steps.write(draft)?;
    let decoder = decoder(plan, inputs)?;
    let mut learner = Learner::new(decoder, plan.recipe(), steps.schedule(), plan.seed)
        .map_err(training::failure)?;
    let done = training::train(ctx, plan, &mut learner, (&train, &eval), steps, checkpoints)?;
    let mut decoder = learner.into_decoder();
    if !plan.config.reinit_tokens.is_empty() {
        reinit_tokens(plan, &mut decoder)?;
    }
    save(plan, inputs, &decoder, draft)?;
    draft.write("metrics.jsonl", done.metrics.sealed().as_bytes(), None)?;
    Ok(outcome(&inputs.packs, &train, &done, &memory))
}

fn decoder(plan: &TrainPlan, inputs: &Inputs) -> Result<Decoder<Cpu>, Failure> {
    let refused = |e: ModelError| Failure::input(format!("{}: {e}", inputs.base.dir().display()));
    let training = match plan.config.method {
        Method::Lora => Training::Frozen,
        Method::Full => Training::Full,
    };
    let mut decoder = match plan.config.init {
        Init::Random => {
            let weights = init_weights(&inputs.model, plan.seed);
            Decoder::load(Cpu::new(), &inputs.model, &weights, training).map_err(refused)?
        }
        Init::Base => {
            let files = inputs.base.weights()?;
            let maps = files
                .iter()
                .map(|(name, file)| {
                    mapping::map(file).map_err(|e| {
                        Failure::environment(format!("cannot map `{name}` into memory: {e}"))
                    })
                })
                .collect::<Result<Vec<_>, _>>()?;
            let regions: Vec<&[u8]> = maps.iter().map(|map| map.as_ref()).collect();
            let source = SafetensorsRegions::new(&regions).map_err(|e| {
                let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
                let (at, names) = (inputs.base.dir().display(), names.join(", "));
                Failure::input(format!("{at}/{names}: {e}"))
                    .hint("fetch or copy the model again; the file is not whole, or another kind")
            })?;
            Decoder::load(Cpu::new(), &inputs.model, &source, training).map_err(refused)?
        }
    };
    decoder.set_recompute(recompute(plan));
    if plan.config.method == Method::Lora {
        let adapter = Adapter::init(&inputs.model, plan.lora(), plan.seed).map_err(refused)?;
        decoder.attach(&adapter, true).map_err(refused)?;
    }
    Ok(decoder)
}

fn recompute(plan: &TrainPlan) -> Recompute {
    match plan.config.recompute {
        RecomputeKnob::None => Recompute::None,
        RecomputeKnob::Layer => Recompute::Layer,
    }
}

fn memory_plan(plan: &TrainPlan, inputs: &Inputs, train: &Packs) -> MemoryPlan {
    let lora = plan.lora();
    let method = match plan.config.method {
        Method::Lora => MemoryMethod::Lora(&lora),
        Method::Full => MemoryMethod::Full,
    };
    let tokens = train.tokens_max(plan.config.micro_batch_size);
    MemoryPlan::new(&inputs.model, method, tokens, recompute(plan))
}

/// Draws embeddings anew: those of tokens that never occurred have all been pushed the same way by the softmax.
fn reinit_tokens(plan: &TrainPlan, decoder: &mut Decoder<Cpu>) -> Result<(), Failure> {
    let mut tensors = decoder.trained();
    for name in ["model.embed_tokens.weight", "lm_head.weight"] {
        if let Some(matrix) = tensors.get_mut(name) {
            reinit_rows(matrix, &plan.config.reinit_tokens, plan.seed);
        }
    }
    decoder.set_trained(&tensors).map_err(|e| Failure::input(e.to_string()))
}

fn save(
    plan: &TrainPlan,
    inputs: &Inputs,
    decoder: &Decoder<Cpu>,
    draft: &mut Draft,
) -> Result<(), Failure> {
    let write = |name: &str, tensors: &Tensors, stored| -> Result<(), Failure> {
        let mut file = draft.file(name)?;
        let path = file.path().to_owned();
        tensors.write_safetensors(&mut file, stored).map_err(|e| match e {
            ModelError::Write(source) => {
                StoreError::Io { action: "write", path: path.clone(), source }.into()
            }
            other => Failure::environment(format!("{name}: {other}")),
        })?;
        Ok(file.finish(None)?)
    };
    match plan.config.method {
        Method::Lora => {
            write("adapter_model.safetensors", &decoder.trained(), StoredType::F32)?;
            draft.write("adapter_config.json", plan.lora().to_json().as_bytes(), None)?;
        }
        Method::Full => {
            let stored = match plan.config.save_dtype {
                SaveDtype::F32 => StoredType::F32,
                SaveDtype::Bf16 => StoredType::Bf16,
            };
            write("model.safetensors", &decoder.export(), stored)?;
            draft.write("config.json", inputs.model.to_json().as_bytes(), None)?;
        }
    }
    Ok(())
}

fn outcome(packs: &Sealed, train: &Packs, done: &Trained, memory: &MemoryPlan) -> Outcome {
    let last = done.metrics.sealed().lines().rev().find_map(loss_of);
    let evaluation = done.evaluation.map(
        |e| json!({"loss": e.loss, "perplexity": e.perplexity, "mean_token_accuracy": e.accuracy}),
    );
    let report = json!({
        "n_steps": done.n_steps,
        "n_packs": train.len(),
        "num_tokens": done.metrics.tokens_seen(),
        "loss": last,
        "eval": evaluation,
        // From its text in every run, so that the floats of a resumed one are the same.
        "self_test": serde_json::from_str::<Value>(&done.self_test).ok(),
        "memory_plan_bytes": memory.total(),
    });
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
