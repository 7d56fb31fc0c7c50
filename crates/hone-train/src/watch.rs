//! What a run is watched for: the least held-out loss, and a training that has gone wrong.
//!
//! All of it is a function of the losses so far and is kept in checkpoints, so that a resumed run ends where the unbroken one does.

use std::collections::VecDeque;

use hone_cli::{Exit, Failure};
use hone_learn::StepReport;
use serde::{Deserialize, Serialize};

use crate::args::TrainConfig;

/// Ends a run whose held-out loss gets no better.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct EarlyStopping {
    /// Evaluations in a row without a better one that end it.
    pub(crate) patience: u64,
    /// By how much a loss has to be lower to be better, in nats.
    #[serde(default)]
    pub(crate) min_delta: f64,
}

/// When a training is taken to have gone wrong.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Watchdog {
    /// A loss is a spike above so many times the median of those before it; a median below 1 nat counts as 1, since what is nearly
    /// known by heart jumps by factors without harm. 0 looks for none.
    pub(crate) spike: f64,
    /// Losses that the median is of.
    pub(crate) window: usize,
    /// Spikes in a row that end the run; fewer are left to recover.
    pub(crate) spikes: u64,
    /// Steps in a row with the same loss, or without a gradient, that end the run. 0 looks for none.
    pub(crate) dead: u64,
}

impl Default for Watchdog {
    fn default() -> Self {
        Watchdog { spike: 3.0, window: 100, spikes: 5, dead: 20 }
    }
}

/// Losses before which nothing is a spike: the first steps fall steeply.
const LOSSES_MIN: usize = 10;

/// Least median that a spike is measured by, in nats.
const MEDIAN_MIN: f64 = 1.0;

/// What is wrong with what is watched, if something is.
pub(crate) fn fault(config: &TrainConfig) -> Option<&'static str> {
    if config.keep_checkpoints == 0 {
        return Some("`keep_checkpoints` is at least 1");
    }
    if config.sample_prompts == 0 || config.sample_tokens == 0 {
        return Some(
            "`sample_prompts` and `sample_tokens` are at least 1; `sample_every = 0` asks for none",
        );
    }
    let stopping = config.early_stopping.and_then(|stopping| stopping.fault());
    stopping.or_else(|| config.watchdog.fault())
}

impl EarlyStopping {
    fn fault(&self) -> Option<&'static str> {
        if self.patience == 0 {
            return Some("`early_stopping.patience` is at least 1");
        }
        let is_bad = !(self.min_delta >= 0.0 && self.min_delta.is_finite());
        is_bad.then_some("`early_stopping.min_delta` is at least 0")
    }
}

impl Watchdog {
    fn fault(&self) -> Option<&'static str> {
        if !(self.spike == 0.0 || self.spike > 1.0 && self.spike.is_finite()) {
            return Some("`watchdog.spike` is above 1, or 0 for none");
        }
        if self.window < LOSSES_MIN {
            return Some("`watchdog.window` is at least 10");
        }
        (self.spikes == 0).then_some("`watchdog.spikes` is at least 1")
    }
}

/// A float whose text is read back to its last bit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
struct Exact(f64);

impl From<Exact> for String {
    fn from(value: Exact) -> String {
        value.0.to_string()
    }
}

impl TryFrom<String> for Exact {
    type Error = std::num::ParseFloatError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse().map(Exact)
    }
}

/// The evaluation with the least loss.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Best {
    step: u64,
    loss: Exact,
}

/// What is remembered from step to step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Watch {
    best: Option<Best>,
    /// Evaluations since the last one that was better by more than `min_delta`.
    stale: u64,
    /// The loss that a later one has to be lower than by `min_delta`.
    bar: Option<Exact>,
    /// The last losses that were no spikes.
    losses: VecDeque<Exact>,
    /// Spikes in a row.
    spikes: u64,
    /// The last loss.
    last: Option<Exact>,
    /// Steps in a row with that loss, or without a gradient.
    dead: u64,
}

impl Watch {
    /// As it stands in a checkpoint.
    pub(crate) fn to_json(&self) -> String {
        serde_json::to_string(self).expect("it has only string keys")
    }

    /// From a checkpoint.
    pub(crate) fn from_json(text: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(text)
    }

    /// The step after which the held-out loss was least.
    pub(crate) fn best_step(&self) -> Option<u64> {
        self.best.map(|best| best.step)
    }

    /// That loss.
    pub(crate) fn best_loss(&self) -> Option<f64> {
        self.best.map(|best| best.loss.0)
    }

    /// Whether the last step was out of the ordinary: no time to seal a checkpoint.
    pub(crate) fn is_alarmed(&self) -> bool {
        self.spikes > 0
    }

    /// Notes a held-out loss after `step` steps, and says whether it is the least so far.
    pub(crate) fn evaluated(&mut self, step: u64, loss: f64, min_delta: f64) -> bool {
        if self.bar.is_none_or(|bar| loss < bar.0 - min_delta) {
            (self.bar, self.stale) = (Some(Exact(loss)), 0);
        } else {
            self.stale += 1;
        }
        let is_best = self.best.is_none_or(|best| loss < best.loss.0);
        if is_best {
            self.best = Some(Best { step, loss: Exact(loss) });
        }
        is_best
    }

    /// Whether the held-out loss has got no better for long enough.
    pub(crate) fn is_over(&self, stopping: Option<EarlyStopping>) -> bool {
        stopping.is_some_and(|stopping| self.stale >= stopping.patience)
    }

    /// Notes a step. Errors: the training has gone wrong, in words.
    pub(crate) fn stepped(&mut self, report: &StepReport, dog: &Watchdog) -> Result<(), Wrong> {
        let (loss, step) = (report.loss, report.step + 1);
        let is_same = self.last == Some(Exact(loss)) && report.lr > 0.0;
        self.dead = if is_same || report.grad_norm == 0.0 { self.dead + 1 } else { 0 };
        self.last = Some(Exact(loss));
        if dog.dead > 0 && self.dead >= dog.dead {
            let what = if report.grad_norm == 0.0 { "no gradient" } else { "the same loss" };
            let n = dog.dead;
            let what = format!("step {step}: {what} for {n} steps in a row, loss {loss:.4}");
            return Err(Wrong::dead(what));
        }
        let limit = dog.spike * self.median().max(MEDIAN_MIN);
        if dog.spike > 0.0 && self.losses.len() >= LOSSES_MIN && loss > limit {
            self.spikes += 1;
            if self.spikes < dog.spikes {
                return Ok(());
            }
            return Err(Wrong::diverged(format!(
                "step {step}: the loss is {loss:.4}, and for {} steps in a row above {limit:.4}, {} times \
                 the median of those before",
                self.spikes, dog.spike
            )));
        }
        self.spikes = 0;
        self.losses.push_back(Exact(loss));
        if self.losses.len() > dog.window {
            self.losses.pop_front();
        }
        Ok(())
    }

    fn median(&self) -> f64 {
        let mut losses: Vec<f64> = self.losses.iter().map(|loss| loss.0).collect();
        losses.sort_by(f64::total_cmp);
        losses.get(losses.len() / 2).copied().unwrap_or_default()
    }
}

/// A training that has gone wrong.
#[derive(Debug)]
pub(crate) struct Wrong {
    /// How, in words.
    what: String,
    /// What may help.
    advice: &'static str,
}

impl Wrong {
    /// Its losses rise out of bounds.
    pub(crate) fn diverged(what: String) -> Self {
        let advice = "lower `train.lr`, lengthen the warm-up or clip at a smaller `train.max_grad_norm`, and look at the \
                      rows of the step (`hone-train plan`, `hone-tokenize show`)";
        Wrong { what, advice }
    }

    /// It learns nothing.
    fn dead(what: String) -> Self {
        let advice = "raise `train.lr`, see whether anything that is trained is used by these rows \
                      (`hone-train selftest`), or set `train.watchdog.dead` to 0 if it is meant so";
        Wrong { what, advice }
    }

    /// The end of the run. `last` is the newest checkpoint from before.
    pub(crate) fn end(self, last: Option<u64>) -> Failure {
        let advice = self.advice;
        let hint = match last {
            Some(step) => format!(
                "the checkpoint after step {step} is kept: {advice}; then `--reset-optimizer` goes on \
                 from it, `--restart` from step 0"
            ),
            None => advice.to_owned(),
        };
        let failure = Failure::input(self.what);
        Failure { exit: Exit::GateFailed, ..failure }.hint(hint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(step: u64, loss: f64, grad_norm: f64) -> StepReport {
        let (clip, lr, weight, n_targets, accuracy) = (1.0, 1e-3, 1.0, 1, 0.5);
        StepReport { step, loss, grad_norm, clip, lr, weight, n_targets, accuracy }
    }

    /// Steps through losses with a gradient, and returns the number of the one that ends the run.
    fn end(losses: impl IntoIterator<Item = f64>) -> Option<usize> {
        let (mut watch, dog) = (Watch::default(), Watchdog::default());
        let mut steps = losses.into_iter().enumerate();
        steps.find_map(|(i, loss)| {
            // Kept and taken out again at every step: as exact as in memory.
            watch = Watch::from_json(&watch.to_json()).unwrap();
            watch.stepped(&report(i as u64, loss, 1.0), &dog).is_err().then_some(i)
        })
    }

    fn falling(n: usize) -> impl Iterator<Item = f64> {
        (0..n).map(|i| 4.0 / (1.0 + 0.1 * i as f64))
    }

    #[test]
    fn spikes_that_stay_end_a_run_and_one_that_passes_does_not() {
        assert_eq!(end(falling(300)), None);
        assert_eq!(end(falling(30).chain([20.0; 4]).chain(falling(30))), None);
        assert_eq!(end(falling(30).chain((0..9).map(|i| 20.0 + f64::from(i)))), Some(34));
        // Known by heart: a hundredfold jump below a nat is nothing.
        let tiny = (0..50).map(|i| 0.001 + 1e-6 * f64::from(i));
        assert_eq!(end(tiny.chain((0..9).map(|i| 0.4 + 0.01 * f64::from(i)))), None);
        // The first losses are compared with nothing.
        assert_eq!(end((0..9).map(|i| 10f64.powi(i))), None);
    }

    #[test]
    fn a_loss_that_stands_still_ends_a_run() {
        assert_eq!(end(falling(5).chain([1.0; 40])), Some(5 + 20));
        let (mut watch, dog) = (Watch::default(), Watchdog::default());
        let ends = |i: &u64| watch.stepped(&report(*i, 1.0 / (i + 1) as f64, 0.0), &dog).is_err();
        assert_eq!((0..40).find(ends), Some(19));
    }

    #[test]
    fn patience_counts_evaluations_that_are_not_better() {
        let stopping = EarlyStopping { patience: 2, min_delta: 0.1 };
        let mut watch = Watch::default();
        let mut seen = Vec::new();
        for (step, loss) in [3.0, 2.0, 1.95, 1.92, 1.0].into_iter().enumerate() {
            let best = watch.evaluated(step as u64, loss, stopping.min_delta);
            seen.push((best, watch.is_over(Some(stopping))));
        }
        let expect = [(true, false), (true, false), (true, false), (true, true), (true, false)];
        assert_eq!(seen, expect);
        assert_eq!((watch.best_step(), watch.best_loss()), (Some(4), Some(1.0)));
        assert!(!watch.is_over(None));
    }
}
