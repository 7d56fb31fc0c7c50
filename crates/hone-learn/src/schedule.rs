//! Learning rate by step, as transformers' schedulers give it.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use crate::LearnError;

/// The shape of a schedule after its warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// The peak rate throughout.
    Constant,
    /// A straight line down to the floor.
    Linear,
    /// Half a cosine down to the floor.
    Cosine,
}

/// Length of the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Warmup {
    /// So many steps.
    Steps(u64),
    /// This share of all steps, rounded up.
    Ratio(f64),
}

/// A learning-rate schedule over `n_steps` steps, counted from 0.
///
///   warm-up:  peak * s / W,  s < W                     (so the first step of a warm-up has rate 0)
///   linear:   peak * (f + (1 - f) (1 - p)),            p = (s - W) / (n - W)
///   cosine:   peak * (f + (1 - f) (1 + cos(pi p)) / 2)
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScheduleConfig {
    /// Shape.
    pub kind: ScheduleKind,
    /// Peak learning rate.
    pub lr: f64,
    /// W.
    pub warmup: Warmup,
    /// f, the floor as a share of the peak; a constant schedule has none.
    pub min_lr_ratio: f64,
    /// n, all steps of the run.
    pub n_steps: u64,
}

impl ScheduleConfig {
    /// The same rate at every step.
    pub fn constant(lr: f64, n_steps: u64) -> Self {
        let warmup = Warmup::Steps(0);
        ScheduleConfig { kind: ScheduleKind::Constant, lr, warmup, min_lr_ratio: 0.0, n_steps }
    }

    /// Checks the ranges.
    pub fn check(&self) -> Result<(), LearnError> {
        let bad = |key, value: f64, expected| {
            Err(LearnError::Setting { key, value: value.to_string(), expected })
        };
        if !(self.lr >= 0.0 && self.lr.is_finite()) {
            return bad("lr", self.lr, "0 or more");
        }
        if !(0.0..=1.0).contains(&self.min_lr_ratio) {
            return bad("min_lr_ratio", self.min_lr_ratio, "from 0 to 1");
        }
        match self.warmup {
            Warmup::Ratio(ratio) if !(0.0..=1.0).contains(&ratio) => {
                bad("warmup_ratio", ratio, "from 0 to 1")
            }
            _ => Ok(()),
        }
    }

    /// W in steps.
    pub fn warmup_steps(&self) -> u64 {
        match self.warmup {
            Warmup::Steps(steps) => steps,
            Warmup::Ratio(ratio) => (ratio * self.n_steps as f64).ceil() as u64,
        }
    }

    /// The rate of step `step`, counted from 0.
    pub fn lr(&self, step: u64) -> f64 {
        let warmup = self.warmup_steps();
        if step < warmup {
            return self.lr * (step as f64 / warmup as f64);
        }
        let rest = self.n_steps.saturating_sub(warmup).max(1) as f64;
        let progress = ((step - warmup) as f64 / rest).min(1.0);
        let factor = match self.kind {
            ScheduleKind::Constant => return self.lr,
            ScheduleKind::Linear => 1.0 - progress,
            ScheduleKind::Cosine => 0.5 * (1.0 + (PI * progress).cos()),
        };
        self.lr * (self.min_lr_ratio + (1.0 - self.min_lr_ratio) * factor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rates of a ten-step run with two steps of warm-up and a floor of a tenth.
    fn check(kind: ScheduleKind, expected: [f64; 10]) {
        let warmup = Warmup::Ratio(0.11);
        let schedule = ScheduleConfig { kind, lr: 2.0, warmup, min_lr_ratio: 0.1, n_steps: 10 };
        for (step, expected) in expected.into_iter().enumerate() {
            let lr = schedule.lr(step as u64);
            assert!((lr - expected).abs() < 1e-3, "{kind:?} at {step}: {lr}, not {expected}");
        }
    }

    #[test]
    fn rates_are_those_of_transformers() {
        check(ScheduleKind::Constant, [0.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]);
        check(ScheduleKind::Linear, [0.0, 1.0, 2.0, 1.775, 1.55, 1.325, 1.1, 0.875, 0.65, 0.425]);
        check(
            ScheduleKind::Cosine,
            [0.0, 1.0, 2.0, 1.9315, 1.7364, 1.4444, 1.1, 0.7556, 0.4636, 0.2685],
        );
    }

    #[test]
    fn a_schedule_past_its_end_stays_at_the_floor() {
        let schedule = ScheduleConfig {
            kind: ScheduleKind::Cosine,
            lr: 1.0,
            warmup: Warmup::Steps(20),
            min_lr_ratio: 0.0,
            n_steps: 10,
        };
        assert_eq!(schedule.lr(19), 0.95);
        assert!(schedule.lr(1000) < 1e-9);
    }
}
