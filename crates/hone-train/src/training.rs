//! The training loop.

use hone_cli::{Context, Exit, Failure};
use hone_kernels::Cpu;
use hone_learn::{Evaluation, LearnError, Learner, SelfTest};
use hone_model::Batch;

use crate::args::TrainPlan;
use crate::checkpoint::Checkpoints;
use crate::epochs::Packs;
use crate::metrics::Metrics;
use crate::plan::{self, Steps};

/// What a finished run leaves beside its weights.
pub(crate) struct Trained {
    /// The record.
    pub(crate) metrics: Metrics,
    /// Steps done.
    pub(crate) n_steps: u64,
    /// The last evaluation on the held-out split, if it has packs.
    pub(crate) evaluation: Option<Evaluation>,
    /// Who got a gradient at step 0, as JSON.
    pub(crate) self_test: String,
}

/// Trains from where the learner stands to the last step. Every step is what `steps` says it will be.
pub(crate) fn train(
    ctx: &Context,
    settings: &TrainPlan,
    learner: &mut Learner<Cpu>,
    (train, eval): (&Packs, &Packs),
    mut steps: Steps,
    checkpoints: &Checkpoints,
) -> Result<Trained, Failure> {
    let config = &settings.config;
    let n_steps = steps.len();
    let eval_packs: Vec<u64> = (0..eval.len() as u64).collect();
    let eval_batches = eval.batches(&eval_packs, config.micro_batch_size)?;

    let (before, mut self_test) = match checkpoints.resume(ctx, learner)? {
        Some(found) => (Some(found.metrics), found.self_test),
        None => (None, String::new()),
    };
    let mut metrics = Metrics::new(&settings.logs, checkpoints.run(), before)?;
    let mut evaluation = None;
    let mut bar = ctx.progress(n_steps, "steps");
    bar.set(learner.step());
    for step in learner.step()..n_steps {
        // 1. The packs of this step, cut into micro-batches; the loss is normalised over all of them.
        let planned = steps.step(step);
        let batches = train.batches(&planned.packs, config.micro_batch_size)?;
        let weight = batches.iter().map(Batch::weight).sum();
        let n_tokens: u64 = batches.iter().map(|batch| batch.n_tokens() as u64).sum();

        // 2. Forward and backward, then one update.
        for batch in &batches {
            learner.accumulate(batch, weight).map_err(failure)?;
        }
        if step == 0 {
            let table = checked(learner.self_test())?;
            self_test = serde_json::to_string(&table).expect("it has only string keys");
        }
        let report = learner.apply().map_err(failure)?;
        plan::check(&planned, n_tokens, &report)?;

        // 3. The record.
        let epoch = (step + 1) as f64 / steps.steps_per_epoch() as f64;
        metrics.step(&report, n_tokens, epoch)?;
        bar.message(format!("loss {:.4}  {:.0} tokens/s", report.loss, metrics.rate()));
        bar.inc(1);

        // 4. The held-out split, a checkpoint, a signal.
        let done = step + 1;
        let is_due = |every: u64| every > 0 && done % every == 0;
        if done == n_steps || is_due(config.eval_every) {
            evaluation = learner.evaluate(&eval_batches).map_err(failure)?;
            if let Some(found) = &evaluation {
                metrics.evaluation(done, found)?;
            }
        }
        let stop = ctx.stop();
        if stop.is_some() || (is_due(config.checkpoint_every) && done < n_steps) {
            checkpoints.save(learner, metrics.sealed(), &self_test)?;
        }
        if let Some(exit) = stop {
            bar.finish();
            return Err(stopped(exit, done, n_steps));
        }
    }
    bar.finish();
    if evaluation.is_none() {
        evaluation = learner.evaluate(&eval_batches).map_err(failure)?;
    }
    Ok(Trained { metrics, n_steps, evaluation, self_test })
}

fn stopped(exit: Exit, done: u64, n_steps: u64) -> Failure {
    let failure = Failure::stopped(exit);
    Failure { message: format!("stopped after step {done} of {n_steps}"), ..failure }
        .hint("run the same command again to go on from the checkpoint")
}

/// Refuses a run in which something is trained that gets no gradient, or the other way round.
fn checked(table: SelfTest) -> Result<SelfTest, Failure> {
    let names: Vec<&str> = table.failures().map(|row| row.name.as_str()).take(5).collect();
    if table.passed() {
        return Ok(table);
    }
    let n = table.failures().count();
    let message = format!(
        "self-test at step 0: {n} of {} trained tensors do not get the gradient they should: {}",
        table.rows.len(),
        names.join(", ")
    );
    Err(Failure::input(message)
        .hint("are these weights zero or not finite in the base? does any row of the first batch use them?"))
}

/// An error of learning, by whose fault it is.
pub(crate) fn failure(error: LearnError) -> Failure {
    match error {
        LearnError::Setting { .. } => Failure::usage(format!("[train] {error}")),
        LearnError::NotFinite { .. } => Failure::input(error.to_string())
            .hint("lower `train.lr`, or look at the packs with `hone-tokenize show`"),
        _ => Failure::input(error.to_string()),
    }
}
