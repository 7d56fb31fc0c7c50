//! Learning rate by step, as transformers' schedulers give it.

use std::f64::consts::PI;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::optimizer::{bad, check_positive};
use crate::{LearnError, named};

/// The shape of a schedule after its warm-up. In a file it is a name, or a table of a `name` and
/// knobs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(tag = "name", rename_all = "snake_case")]
enum KindTable {
    Polynomial(Polynomial),
    CosineRestarts(CosineRestarts),
    Wsd(Wsd),
    InverseSqrt(InverseSqrt),
}

/// The shape of a schedule after its warm-up. In a file it is a name, or a table of a `name` and
/// knobs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ScheduleKind {
    /// The peak rate throughout.
    Constant,
    /// A straight line down to the floor.
    Linear,
    /// Half a cosine down to the floor.
    Cosine,
    /// Half a cosine down to the floor, several times.
    CosineRestarts(CosineRestarts),
    /// A power of the straight line.
    Polynomial(Polynomial),
    /// Warm-up, stable, decay: the peak rate until the last steps.
    Wsd(Wsd),
    /// One over the root of the step, whatever the number of steps.
    InverseSqrt(InverseSqrt),
}

/// Knobs of [`ScheduleKind::CosineRestarts`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CosineRestarts {
    /// How often the rate falls.
    pub cycles: u32,
}

impl Default for CosineRestarts {
    fn default() -> Self {
        CosineRestarts { cycles: 2 }
    }
}

/// Knobs of [`ScheduleKind::Polynomial`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Polynomial {
    /// The power.
    pub power: f64,
}

impl Default for Polynomial {
    fn default() -> Self {
        Polynomial { power: 2.0 }
    }
}

/// How the rate of [`ScheduleKind::Wsd`] falls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Decay {
    /// In a straight line.
    #[serde(rename = "linear")]
    Linear,
    /// In half a cosine.
    #[serde(rename = "cosine")]
    #[default]
    Cosine,
    /// As one minus the root of what is done: fast at first.
    #[serde(rename = "1-sqrt")]
    OneMinusSqrt,
}

/// Knobs of [`ScheduleKind::Wsd`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Wsd {
    /// Steps of the decay, which is the end of the run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay_steps: Option<u64>,
    /// The same as a share of all steps, rounded up, where `decay_steps` is not given.
    pub decay_ratio: f64,
    /// How the rate falls.
    pub decay: Decay,
}

impl Default for Wsd {
    fn default() -> Self {
        Wsd { decay_steps: None, decay_ratio: 0.1, decay: Decay::Cosine }
    }
}

/// Knobs of [`ScheduleKind::InverseSqrt`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct InverseSqrt {
    /// Steps after which the rate would have halved twice over; the warm-up's when not given, and
    /// 10 000 without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timescale: Option<u64>,
}

impl Serialize for ScheduleKind {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let table = match *self {
            ScheduleKind::Constant => return serializer.serialize_str("constant"),
            ScheduleKind::Linear => return serializer.serialize_str("linear"),
            ScheduleKind::Cosine => return serializer.serialize_str("cosine"),
            ScheduleKind::CosineRestarts(knobs) => KindTable::CosineRestarts(knobs),
            ScheduleKind::Polynomial(knobs) => KindTable::Polynomial(knobs),
            ScheduleKind::Wsd(knobs) => KindTable::Wsd(knobs),
            ScheduleKind::InverseSqrt(knobs) => KindTable::InverseSqrt(knobs),
        };
        table.serialize(serializer)
    }
}

/// A table without knobs.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NoKnobs {}

impl<'de> Deserialize<'de> for ScheduleKind {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        let value = Value::deserialize(deserializer)?;
        let (name, table) = named::split::<D::Error>(value, None)?;
        let plain = match name.as_str() {
            "constant" => ScheduleKind::Constant,
            "linear" => ScheduleKind::Linear,
            "cosine" => ScheduleKind::Cosine,
            "cosine_restarts" => {
                return named::knobs(&name, table).map(ScheduleKind::CosineRestarts);
            }
            "polynomial" => return named::knobs(&name, table).map(ScheduleKind::Polynomial),
            "wsd" => return named::knobs(&name, table).map(ScheduleKind::Wsd),
            "inverse_sqrt" => return named::knobs(&name, table).map(ScheduleKind::InverseSqrt),
            other => {
                let names = ScheduleKind::NAMES.join("`, `");
                return Err(D::Error::custom(format!("`{other}` is not one of `{names}`")));
            }
        };
        named::knobs::<NoKnobs, D::Error>(&name, table).map(|NoKnobs {}| plain)
    }
}

impl ScheduleKind {
    /// Every name.
    pub const NAMES: [&'static str; 7] =
        ["constant", "linear", "cosine", "cosine_restarts", "polynomial", "wsd", "inverse_sqrt"];
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

/// How the rates of a warm-up are counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Convention {
    /// From the first step on the rate is above 0.
    #[default]
    Hone,
    /// The first step has rate 0, as transformers' schedulers have it: moments move, weights do
    /// not.
    Transformers,
}

/// A learning-rate schedule over `n_steps` steps, counted from 0. With W steps of warm-up and the
/// floor f, step s has the rate
///
/// ```text
/// s < W    peak (s + 1) / (W + 1), or peak s / W by transformers' convention
/// s >= W   peak (f + (1 - f) h(p)), p = (s - W) / (n - W)
/// ```
///
/// and h is 1 - p (linear), (1 + cos(pi p)) / 2 (cosine), the same of the fraction of k p (k
/// restarts), (1 - p)^power (polynomial). Warm-up-stable-decay has h = 1 but for the last steps;
/// inverse square root has no p: its rate is peak sqrt(t / (s - W + t)), t its timescale, and no
/// less than the floor. By both conventions step W is the first with the whole rate.
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
    /// How the warm-up is counted.
    #[serde(default)]
    pub convention: Convention,
}

impl ScheduleConfig {
    /// The same rate at every step.
    pub fn constant(lr: f64, n_steps: u64) -> Self {
        ScheduleConfig {
            kind: ScheduleKind::Constant,
            lr,
            warmup: Warmup::Steps(0),
            min_lr_ratio: 0.0,
            n_steps,
            convention: Convention::default(),
        }
    }

    /// Checks the ranges.
    pub fn check(&self) -> Result<(), LearnError> {
        if !(self.lr >= 0.0 && self.lr.is_finite()) {
            return bad("lr", self.lr, "0 or more");
        }
        if !(0.0..=1.0).contains(&self.min_lr_ratio) {
            return bad("min_lr_ratio", self.min_lr_ratio, "from 0 to 1");
        }
        match self.kind {
            ScheduleKind::CosineRestarts(CosineRestarts { cycles: 0 }) => {
                bad("cycles", 0, "at least 1")?;
            }
            ScheduleKind::Polynomial(Polynomial { power }) => check_positive("power", power)?,
            ScheduleKind::Wsd(wsd) if !(0.0..=1.0).contains(&wsd.decay_ratio) => {
                bad("decay_ratio", wsd.decay_ratio, "from 0 to 1")?;
            }
            ScheduleKind::InverseSqrt(InverseSqrt { timescale: Some(0) }) => {
                bad("timescale", 0, "at least 1")?;
            }
            _ => {}
        }
        match self.warmup {
            Warmup::Ratio(ratio) if !(0.0..=1.0).contains(&ratio) => {
                bad("warmup_ratio", ratio, "from 0 to 1")
            }
            _ => Ok(()),
        }
    }

    /// A share of all steps, rounded up.
    fn share(&self, ratio: f64) -> u64 {
        (ratio * self.n_steps as f64).ceil() as u64
    }

    /// W in steps.
    pub fn warmup_steps(&self) -> u64 {
        match self.warmup {
            Warmup::Steps(steps) => steps,
            Warmup::Ratio(ratio) => self.share(ratio),
        }
    }

    /// The rate of step `step`, counted from 0.
    pub fn lr(&self, step: u64) -> f64 {
        let (warmup, floor) = (self.warmup_steps(), self.min_lr_ratio);
        if step < warmup {
            return self.lr * self.rise(step, warmup);
        }
        let rest = self.n_steps.saturating_sub(warmup).max(1) as f64;
        let progress = ((step - warmup) as f64 / rest).min(1.0);
        let wave = |p: f64| 0.5 * (1.0 + (PI * p).cos());
        let factor = match self.kind {
            ScheduleKind::Constant => return self.lr,
            ScheduleKind::Linear => 1.0 - progress,
            ScheduleKind::Cosine => wave(progress),
            ScheduleKind::CosineRestarts(_) if progress >= 1.0 => 0.0,
            ScheduleKind::CosineRestarts(knobs) => {
                wave((f64::from(knobs.cycles) * progress).fract())
            }
            ScheduleKind::Polynomial(knobs) => (1.0 - progress).powf(knobs.power),
            ScheduleKind::Wsd(knobs) => self.fall(knobs, step, warmup),
            ScheduleKind::InverseSqrt(knobs) => {
                let usual = if warmup > 0 { warmup } else { TIMESCALE };
                let scale = knobs.timescale.unwrap_or(usual) as f64;
                let factor = 1.0 / (((step - warmup) as f64 + scale) / scale).sqrt();
                return self.lr * factor.max(floor);
            }
        };
        self.lr * (floor + (1.0 - floor) * factor)
    }

    /// The share of the peak in the warm-up.
    fn rise(&self, step: u64, warmup: u64) -> f64 {
        let (step, warmup) = (step as f64, warmup as f64);
        match (self.convention, self.kind) {
            (Convention::Hone, _) => (step + 1.0) / (warmup + 1.0),
            // There it rises from the floor.
            (Convention::Transformers, ScheduleKind::Wsd(_)) => {
                self.min_lr_ratio + (1.0 - self.min_lr_ratio) * (step / warmup)
            }
            (Convention::Transformers, _) => step / warmup,
        }
    }

    /// h of warm-up-stable-decay.
    fn fall(&self, knobs: Wsd, step: u64, warmup: u64) -> f64 {
        let decay = knobs.decay_steps.unwrap_or_else(|| self.share(knobs.decay_ratio));
        let start = self.n_steps.saturating_sub(decay).max(warmup);
        if step < start {
            return 1.0;
        }
        let progress = ((step - start) as f64 / decay.max(1) as f64).min(1.0);
        match knobs.decay {
            Decay::Linear => 1.0 - progress,
            Decay::Cosine => 0.5 * (1.0 + (PI * progress).cos()),
            Decay::OneMinusSqrt => 1.0 - progress.sqrt(),
        }
    }
}

/// Timescale of an inverse square root without a warm-up, as in transformers.
const TIMESCALE: u64 = 10_000;

#[cfg(test)]
mod tests {
    use super::*;

    /// The rates of a ten-step run with two steps of warm-up and a floor of a tenth.
    fn check(kind: ScheduleKind, expected: [f64; 10]) {
        let warmup = Warmup::Ratio(0.11);
        let convention = Convention::Transformers;
        let schedule =
            ScheduleConfig { kind, lr: 2.0, warmup, min_lr_ratio: 0.1, n_steps: 10, convention };
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
            convention: Convention::Transformers,
        };
        assert_eq!(schedule.lr(19), 0.95);
        assert!(schedule.lr(1000) < 1e-9);
    }

    #[test]
    fn our_own_warm_up_spends_no_step_on_nothing() {
        let transformers = ScheduleConfig {
            warmup: Warmup::Steps(4),
            convention: Convention::Transformers,
            ..ScheduleConfig::constant(1.0, 10)
        };
        let ours = ScheduleConfig { convention: Convention::Hone, ..transformers };
        let rates = |schedule: ScheduleConfig| [0, 1, 2, 3, 4].map(|step| schedule.lr(step));
        assert_eq!(rates(transformers), [0.0, 0.25, 0.5, 0.75, 1.0]);
        assert_eq!(rates(ours), [0.2, 0.4, 0.6, 0.8, 1.0]);
    }

    #[test]
    fn kinds_are_names_or_tables() {
        let read = |text: &str| serde_json::from_str::<ScheduleKind>(text);
        for text in [
            r#""constant""#,
            r#""linear""#,
            r#""cosine""#,
            r#"{"name":"cosine_restarts","cycles":3}"#,
            r#"{"name":"polynomial","power":1.5}"#,
            r#"{"name":"wsd","decay_steps":7,"decay_ratio":0.1,"decay":"1-sqrt"}"#,
            r#"{"name":"inverse_sqrt","timescale":100}"#,
        ] {
            let kind = read(text).unwrap();
            assert_eq!(serde_json::to_string(&kind).unwrap(), text);
        }
        for name in ScheduleKind::NAMES {
            read(&format!("{name:?}")).unwrap();
        }
        for (text, expected) in [
            (r#""step""#, "`step` is not one of `constant`"),
            (r#"{"name":"cosine","cycles":2}"#, "unknown field `cycles`"),
            (r#"{"name":"polynomial","pow":2}"#, "unknown field `pow`, expected `power`"),
            (r#"{"power":2}"#, "no `name`"),
            ("3", "neither a name nor a table"),
        ] {
            let message = read(text).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }
}
