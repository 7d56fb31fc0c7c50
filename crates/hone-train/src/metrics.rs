//! The record of a run: `metrics.jsonl`, and live logs with times beside it.
//!
//! The sealed `metrics.jsonl` holds only what the same run gives again. Rates and times go to the live log and to TensorBoard, which
//! are never sealed and never read by a stage.

use std::path::Path;
use std::time::Instant;

use hone_cli::Failure;
use hone_learn::{Evaluation, StepReport};
use hone_store::Live;
use serde_json::{Value, json};

use crate::samples::Sample;
use crate::tally::Losses;
use crate::tensorboard::EventFile;

/// Collects the lines of a run.
pub(crate) struct Metrics {
    sealed: String,
    live: Live,
    events: EventFile,
    started: Instant,
    tokens_seen: u64,
    tokens_at_start: u64,
    /// The last losses, for people.
    loss: f64,
    eval_loss: Option<f64>,
}

impl Metrics {
    /// Goes on after the lines `before` of a resumed run. Live logs go below `dir`, TensorBoard's into its folder `run`, so that runs
    /// with other `settings` are other curves.
    pub(crate) fn new(
        (dir, run): (&Path, &str),
        settings: &Value,
        before: Option<String>,
    ) -> Result<Self, Failure> {
        let is_new = before.is_none();
        let path = dir.join("metrics.jsonl");
        let live = if before.is_some() { Live::append(&path)? } else { Live::create(&path)? };
        let sealed = before.unwrap_or_default();
        let tokens_seen = last_tokens(&sealed);
        let mut events = EventFile::create(&dir.join(run), last_step(&sealed) + 1)?;
        if let Some(settings) = settings.as_object().filter(|_| is_new) {
            events.settings(settings)?;
        }
        Ok(Metrics {
            sealed,
            live,
            events,
            started: Instant::now(),
            tokens_seen,
            tokens_at_start: tokens_seen,
            loss: f64::NAN,
            eval_loss: None,
        })
    }

    /// The lines so far, as they will be sealed.
    pub(crate) fn sealed(&self) -> &str {
        &self.sealed
    }

    /// Tokens seen since the first step.
    pub(crate) fn tokens_seen(&self) -> u64 {
        self.tokens_seen
    }

    /// Tokens a second since this process started training.
    pub(crate) fn rate(&self) -> f64 {
        let tokens = self.tokens_seen - self.tokens_at_start;
        tokens as f64 / self.started.elapsed().as_secs_f64().max(1e-9)
    }

    /// Records a step over `n_tokens` tokens, at `epoch` epochs after it, with the share of replay in what was trained, where
    /// there is any at all, and the losses told apart.
    pub(crate) fn step(
        &mut self,
        report: &StepReport,
        (n_tokens, replay): (u64, Option<f64>),
        epoch: f64,
        losses: &Losses,
    ) -> Result<(), Failure> {
        self.tokens_seen += n_tokens;
        self.loss = report.loss;
        let step = report.step + 1;
        let mut line = json!({
            "step": step,
            "epoch": epoch,
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "learning_rate": report.lr,
            "mean_token_accuracy": report.accuracy,
            "num_tokens": self.tokens_seen,
            "num_trained_tokens": report.n_targets,
        });
        let mut values = vec![
            ("train/loss", report.loss),
            ("train/grad_norm", report.grad_norm),
            ("train/learning_rate", report.lr),
            ("train/mean_token_accuracy", report.accuracy),
            ("train/epoch", epoch),
            ("train/tokens_per_second", self.rate()),
        ];
        if let Some(share) = replay {
            line["replay_share"] = share.into();
            values.push(("train/replay_share", share));
        }
        losses.write(&mut line, "losses");
        let names = told_apart("train", losses);
        values.extend(names.iter().map(|(name, loss)| (name.as_str(), *loss)));
        self.record(line, step, &values)
    }

    /// The last loss and the rate, for people.
    pub(crate) fn message(&self) -> String {
        let held_out = self.eval_loss.map_or(String::new(), |loss| format!("  held-out {loss:.4}"));
        format!("loss {:.4}{held_out}  {:.0} tokens/s", self.loss, self.rate())
    }

    /// Records the norms of the gradient by part of the model at `step`, counted from 1.
    pub(crate) fn layers(&mut self, step: u64, norms: &[(String, f64)]) -> Result<(), Failure> {
        let norms: Vec<(&str, f64)> =
            norms.iter().map(|(part, norm)| (part.as_str(), *norm)).collect();
        let names = names(&norms, |part| format!("train/grad_norm/{part}"));
        let values: Vec<(&str, f64)> =
            names.iter().map(|(name, norm)| (name.as_str(), *norm)).collect();
        let object: Value = norms.iter().copied().collect();
        self.record(json!({"step": step, "grad_norms": object}), step, &values)
    }

    /// Records what the model says after `step` steps.
    pub(crate) fn samples(&mut self, step: u64, samples: &[Sample]) -> Result<(), Failure> {
        for sample in samples {
            let tag = format!("samples/{}", sample.id);
            self.events.text(step, &tag, &sample.to_markdown())?;
        }
        let samples: Vec<Value> = samples.iter().map(Sample::to_json).collect();
        self.record(json!({"step": step, "samples": samples}), step, &[])
    }

    /// Records an evaluation after `step` steps.
    pub(crate) fn evaluation(
        &mut self,
        step: u64,
        found: &Evaluation,
        losses: &Losses,
    ) -> Result<(), Failure> {
        self.eval_loss = Some(found.loss);
        let mut line = json!({
            "step": step,
            "eval_loss": found.loss,
            "eval_perplexity": found.perplexity,
            "eval_mean_token_accuracy": found.accuracy,
        });
        let mut values = vec![
            ("eval/loss", found.loss),
            ("eval/perplexity", found.perplexity),
            ("eval/mean_token_accuracy", found.accuracy),
        ];
        losses.write(&mut line, "eval_losses");
        let names = told_apart("eval", losses);
        values.extend(names.iter().map(|(name, loss)| (name.as_str(), *loss)));
        self.record(line, step, &values)
    }

    fn record(
        &mut self,
        mut line: Value,
        step: u64,
        values: &[(&str, f64)],
    ) -> Result<(), Failure> {
        self.sealed.push_str(&format!("{line}\n"));
        line["seconds"] = self.started.elapsed().as_secs_f64().into();
        line["tokens_per_second"] = self.rate().into();
        self.live.write(format!("{line}\n").as_bytes())?;
        if values.is_empty() { Ok(()) } else { self.events.scalars(step, values) }
    }
}

/// Losses that are told apart, under their names in TensorBoard.
fn told_apart(split: &str, losses: &Losses) -> Vec<(String, f64)> {
    let mut all = names(&losses.by_source, |source| format!("{split}/{source}/loss"));
    all.extend(names(&losses.by_role, |role| format!("{split}/role/{role}/loss")));
    all
}

/// Values under longer names.
fn names(values: &[(&str, f64)], name: impl Fn(&str) -> String) -> Vec<(String, f64)> {
    values.iter().map(|(short, value)| (name(short), *value)).collect()
}

/// The last step of some lines; 0 before the first.
fn last_step(lines: &str) -> u64 {
    let step = |line: &str| serde_json::from_str::<Value>(line).ok()?.get("step")?.as_u64();
    lines.lines().next_back().and_then(step).unwrap_or(0)
}

/// `num_tokens` of the last line that has it.
fn last_tokens(lines: &str) -> u64 {
    let tokens = |line: &str| {
        serde_json::from_str::<Value>(line).ok()?.get("num_tokens").and_then(Value::as_u64)
    };
    lines.lines().rev().find_map(tokens).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_run_counts_on() {
        assert_eq!(last_tokens(""), 0);
        assert_eq!(last_tokens("{\"num_tokens\":5}\n{\"eval_loss\":1.0}\n"), 5);
    }
}
