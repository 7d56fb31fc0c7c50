//! The training loop.

use std::sync::atomic::Ordering;

use hone_cli::{Context, Exit, Failure};
use hone_kernels::Backend;
use hone_learn::{Evaluation, LearnError, Learner, SelfTest};
use hone_model::{Batch, LossSums};
use serde_json::{Value, json};

use crate::args::{Save, TrainPlan};
use crate::checkpoint::{Checkpoints, Found};
use crate::epochs::Packs;
use crate::metrics::Metrics;
use crate::plan::{self, Steps};
use crate::samples::Samples;
use crate::tally::{Losses, Tally};
use crate::watch::{Watch, Wrong};

/// What a finished run leaves beside its weights.
pub(crate) struct Trained {
    /// The record.
    pub(crate) metrics: Metrics,
    /// Steps done.
    pub(crate) n_steps: u64,
    /// Steps that were to be done.
    pub(crate) n_planned: u64,
    /// The last evaluation on the held-out split, if it has packs.
    pub(crate) evaluation: Option<Evaluation>,
    /// That evaluation told apart, as JSON.
    pub(crate) eval_losses: Value,
    /// Step and held-out loss of the best weights, where they are what is left.
    pub(crate) best: Value,
    /// Who got a gradient at step 0, as JSON.
    pub(crate) self_test: String,
}

/// What the loop has beside the learner.
struct Course<'a> {
    settings: &'a TrainPlan,
    checkpoints: &'a Checkpoints,
    eval: &'a Packs,
    held_out: Vec<Batch>,
    samples: Option<Samples>,
    metrics: Metrics,
    self_test: String,
    watch: Watch,
    evaluation: Option<Evaluation>,
    eval_losses: Losses<'a>,
}

/// Trains from where the learner stands to the last step, or to where the held-out loss gets no better; then the learner has the
/// weights that the run leaves. Every step is what `steps` says it will be.
pub(crate) fn train<B: Backend>(
    ctx: &Context,
    settings: &TrainPlan,
    learner: &mut Learner<B>,
    (train, eval, samples): (&Packs, &Packs, Option<Samples>),
    mut steps: Steps,
    checkpoints: &Checkpoints,
) -> Result<Trained, Failure> {
    let config = &settings.config;
    let n_steps = steps.len();
    let mut course = Course::start(ctx, settings, learner, (eval, samples), checkpoints)?;
    let save_asked = ctx.save_signal();
    let mut bar = ctx.progress(n_steps, "steps");
    bar.set(learner.step());
    while learner.step() < n_steps && !course.is_over() {
        // 1. The packs of this step, cut into micro-batches; the loss is normalised over all of them.
        let planned = steps.step(learner.step());
        let batches = train.batches(&planned.packs, config.micro_batch_size)?;
        let weight = batches.iter().map(Batch::weight).sum();
        let n_tokens: u64 = batches.iter().map(|batch| batch.n_tokens() as u64).sum();

        // 2. Forward and backward, then one update.
        let mut tally = Tally::over(train, &planned.packs);
        for batch in &batches {
            let computed = learner.accumulate(batch, weight);
            course.look_at_device(learner)?;
            computed.map_err(failure)?;
            tally.add(batch, learner.decoder().row_losses());
        }
        course.look_at_gradients(learner)?;
        let report = learner.apply().map_err(|e| course.failure(e))?;
        plan::check(&planned, n_tokens, &report)?;

        // 3. The record, and a look at whether it goes well.
        let done = learner.step();
        let epoch = done as f64 / steps.steps_per_epoch() as f64;
        let replay = (train.n_replay() > 0).then_some(planned.replay_share);
        course.metrics.step(&report, (n_tokens, replay), epoch, &tally.losses())?;
        bar.message(course.metrics.message());
        bar.inc(1);
        let health = course.watch.stepped(&report, &config.watchdog);
        health.map_err(|wrong| wrong.end(checkpoints.newest()))?;

        // 4. The held-out split, a checkpoint, a signal.
        let is_due = |every: u64| every > 0 && done.is_multiple_of(every);
        if done == n_steps || is_due(config.eval_every) {
            course.evaluate(learner)?;
        }
        if is_due(config.sample_every) {
            course.sample(learner)?;
        }
        let (stop, asked) = (ctx.stop(), save_asked.swap(false, Ordering::Relaxed));
        let is_time = is_due(config.checkpoint_every) && done < n_steps;
        if stop.is_some() || asked || is_time && !course.watch.is_alarmed() {
            course.save(learner)?;
        }
        if asked {
            ctx.note(format!("train: checkpoint after step {done}"));
        }
        if let Some(exit) = stop {
            bar.finish();
            return Err(stopped(exit, done, n_steps));
        }
    }
    bar.finish();
    course.finish(ctx, learner, n_steps)
}

impl<'a> Course<'a> {
    /// Puts the learner where the newest checkpoint was, if there is one.
    fn start<B: Backend>(
        ctx: &Context,
        settings: &'a TrainPlan,
        learner: &mut Learner<B>,
        (eval, samples): (&'a Packs, Option<Samples>),
        checkpoints: &'a Checkpoints,
    ) -> Result<Self, Failure> {
        let all: Vec<u64> = (0..eval.len() as u64).collect();
        let held_out = eval.batches(&all, settings.config.micro_batch_size)?;
        let needs = settings.config.keep_best || settings.config.early_stopping.is_some();
        if needs && held_out.is_empty() {
            let message = "[train] `keep_best` and `early_stopping` go by the held-out split, and it is empty";
            return Err(Failure::usage(message).hint("set `ingest.eval_share` above 0"));
        }
        let found = checkpoints.resume(ctx, learner)?;
        let before = found.as_ref().map(|found| found.metrics.clone());
        let Found { self_test, watch, .. } = found.unwrap_or_default();
        let table = serde_json::to_value(settings).expect("a plan has only string keys");
        let metrics = Metrics::new((&settings.logs, checkpoints.run()), &table, before)?;
        let (evaluation, eval_losses) = (None, Losses::default());
        learner.decoder_mut().keep_row_losses();
        Ok(Course {
            settings,
            checkpoints,
            eval,
            held_out,
            samples,
            metrics,
            self_test,
            watch,
            evaluation,
            eval_losses,
        })
    }

    /// Whether the held-out loss has got no better for long enough.
    fn is_over(&self) -> bool {
        self.watch.is_over(self.settings.config.early_stopping)
    }

    /// Whether the best weights are what the run leaves.
    fn keeps_best(&self) -> bool {
        self.settings.config.keep_best || self.settings.config.early_stopping.is_some()
    }

    /// The self-test at the first step, and norms by layer when they are due.
    fn look_at_gradients<B: Backend>(&mut self, learner: &Learner<B>) -> Result<(), Failure> {
        if self.self_test.is_empty() {
            let table = checked(learner.self_test())?;
            self.self_test = serde_json::to_string(&table).expect("it has only string keys");
        }
        let (every, step) = (self.settings.config.log_layers_every, learner.step() + 1);
        if every > 0 && step.is_multiple_of(every) {
            self.metrics.layers(step, &learner.grad_norms())?;
        }
        Ok(())
    }

    /// The held-out split with the weights that the run would leave now, which are kept if they are the best.
    fn evaluate<B: Backend>(&mut self, learner: &mut Learner<B>) -> Result<(), Failure> {
        let averages = self.settings.config.save == Some(Save::Average) && learner.swap_average();
        self.measure(learner)?;
        if let Some(found) = &self.evaluation {
            self.metrics.evaluation(learner.step(), found, &self.eval_losses)?;
            let stopping = self.settings.config.early_stopping.unwrap_or_default();
            let is_best = self.watch.evaluated(learner.step(), found.loss, stopping.min_delta);
            if is_best && self.keeps_best() {
                self.checkpoints.save_best(learner)?;
            }
        }
        if averages {
            learner.swap_average();
        }
        Ok(())
    }

    /// Loss of the held-out split, and told apart.
    fn measure<B: Backend>(&mut self, learner: &mut Learner<B>) -> Result<(), Failure> {
        let all: Vec<u64> = (0..self.eval.len() as u64).collect();
        let mut tally = Tally::over(self.eval, &all);
        let (mut sums, mut rows) = (LossSums::default(), Vec::new());
        for batch in &self.held_out {
            let found = learner.decoder_mut().loss(batch, Some(&mut rows));
            sums += found.map_err(|e| Failure::input(e.to_string()))?;
            tally.add(batch, &rows);
        }
        self.evaluation = Evaluation::from_sums(&sums);
        self.eval_losses = tally.losses();
        Ok(())
    }

    /// Answers with the weights that the run would leave now.
    fn sample<B: Backend>(&mut self, learner: &mut Learner<B>) -> Result<(), Failure> {
        let Some(samples) = &self.samples else { return Ok(()) };
        let averages = self.settings.config.save == Some(Save::Average) && learner.swap_average();
        let made = samples.make(learner.decoder_mut())?;
        if averages {
            learner.swap_average();
        }
        self.metrics.samples(learner.step(), &made)
    }

    fn save<B: Backend>(&self, learner: &Learner<B>) -> Result<(), Failure> {
        let best = self.watch.best_step().filter(|_| self.keeps_best());
        let found = Found {
            metrics: self.metrics.sealed().to_owned(),
            self_test: self.self_test.clone(),
            watch: self.watch.clone(),
        };
        self.checkpoints.save(learner, &found, best)
    }

    /// Ends the run, with a checkpoint of the last step, when the device has failed within this one.
    fn look_at_device<B: Backend>(&self, learner: &Learner<B>) -> Result<(), Failure> {
        let Some(what) = learner.decoder().backend().take_fault() else { return Ok(()) };
        self.save(learner)?;
        let done = learner.step();
        let message = format!("the device failed in step {}: {what}", done + 1);
        Err(Failure::environment(message).hint(
            "a checkpoint is kept; where memory was short, lower `micro_batch_size` or say `recompute = \"layer\"`",
        ))
    }

    /// An error of a step.
    fn failure(&self, error: LearnError) -> Failure {
        match error {
            LearnError::NotFinite { step, what, value } => {
                // Counted from 1, as in the record.
                let what = format!("step {}: the {what} is {value}", step + 1);
                Wrong::diverged(what).end(self.checkpoints.newest())
            }
            other => failure(other),
        }
    }

    /// Gives the learner the weights that the run leaves.
    fn finish<B: Backend>(
        mut self,
        ctx: &Context,
        learner: &mut Learner<B>,
        n_planned: u64,
    ) -> Result<Trained, Failure> {
        let n_steps = learner.step();
        if n_steps < n_planned {
            ctx.note(format!(
                "train: ends after step {n_steps} of {n_planned}: the held-out loss got no better"
            ));
        }
        let mut best = Value::Null;
        match self.watch.best_step().filter(|_| self.keeps_best()) {
            Some(step) => {
                let weights = self.checkpoints.best(step)?;
                let decoder = learner.decoder_mut();
                decoder.set_trained(&weights).map_err(|e| Failure::input(e.to_string()))?;
                // Read from text, as a resumed run has it.
                best = json!({"step": step, "eval_loss": self.watch.best_loss()});
                if step < n_steps {
                    ctx.note(format!("train: leaves the weights after step {step}, its best"));
                }
            }
            None if self.settings.config.save == Some(Save::Average) => {
                learner.swap_average();
            }
            None => {}
        }
        if self.evaluation.is_none() || !best.is_null() {
            self.measure(learner)?;
        }
        let mut eval_losses = json!({});
        self.eval_losses.write(&mut eval_losses, "losses");
        let Course { metrics, evaluation, self_test, .. } = self;
        Ok(Trained { metrics, n_steps, n_planned, evaluation, eval_losses, best, self_test })
    }
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
        LearnError::Setting { .. } | LearnError::Pattern { .. } => {
            Failure::usage(format!("[train] {error}"))
        }
        _ => Failure::input(error.to_string()),
    }
}
