//! Memory: what a run will hold, whether the machine has it, and which settings would fit.

use hone_cli::Failure;
use hone_learn::{AdamW8bitConfig, OptimizerConfig};
use hone_model::{MemoryNeeds, MemoryPlan};
use hone_store::machine;
use serde_json::{Value, json};

use crate::args::{LoraInit, Method, RecomputeKnob, TrainConfig, TrainPlan};
use crate::epochs::Packs;
use crate::plan::Steps;
use crate::start::{Inputs, Start};

/// What a process of hone holds before it reads a model: its program, tables and threads, as measured.
const PROGRAM: u64 = 36_000_000;

/// What a run over packs of a model is planned from.
pub(crate) struct Run<'a> {
    pub(crate) inputs: &'a Inputs,
    /// Bytes of the base's weights.
    pub(crate) files: u64,
    /// Whether they have the embedding in bf16.
    pub(crate) half_embedding: bool,
    pub(crate) train: &'a Packs,
    pub(crate) eval: &'a Packs,
}

/// Bytes that a run will hold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Memory {
    plan: MemoryPlan,
    /// Activations by what the backward computes again.
    levels: [(&'static str, u64); 3],
    /// Packs, which are mapped, and the columns kept of them.
    packs: u64,
    /// Tokens of the largest micro-batch.
    n_tokens: usize,
}

impl Run<'_> {
    /// What `plan` will hold.
    pub(crate) fn memory(&self, plan: &TrainPlan, start: &Start) -> Memory {
        let recipe = plan.recipe();
        let optimizer = &recipe.optimizer;
        let kept: u64 = start.trained.iter().map(|info| optimizer.state_bytes(info)).sum();
        let micro = plan.config.micro_batch_size;
        let n_tokens = Steps::new(plan, self.train).micro_tokens_max(micro);
        let held_out: Vec<usize> = (0..self.eval.len()).collect();
        let n_tokens = n_tokens.max(self.eval.tokens_max(&held_out, micro));
        let needs = MemoryNeeds {
            method: start.trains(plan),
            trained: &start.trained,
            optimizer: kept + optimizer.scratch_bytes(&start.trained),
            average: recipe.ema_decay.is_some(),
            // A signal may ask for one, whatever `checkpoint_every` says, which is no part of what a run is.
            checkpoints: true,
            n_tokens,
            recompute: plan.config.recompute.level(),
            compute: plan.config.compute,
            half_embedding: self.half_embedding,
            files: self.files,
        };
        let n_tokens_all = self.train.n_tokens() + self.eval.n_tokens();
        let model = &self.inputs.base.model;
        let levels = RecomputeKnob::ALL.map(|knob| {
            let needs = MemoryNeeds { recompute: knob.level(), ..needs };
            (knob.name(), MemoryPlan::new(model, &needs).activations)
        });
        let plan = MemoryPlan::new(model, &needs);
        Memory { plan, levels, packs: 8 * n_tokens_all, n_tokens }
    }

    /// Settings whose plan fits `budget` bytes, each with what it changes and what it holds: first those that give the same result.
    pub(crate) fn fitting(&self, plan: &TrainPlan, budget: u64) -> Vec<Proposal> {
        let mut proposals = Vec::new();
        for (keys, base) in variants(plan) {
            let given = plan.config.recompute;
            for knob in RecomputeKnob::ALL.into_iter().skip_while(|knob| *knob != given) {
                proposals.extend(self.largest(plan, &keys, &base, knob, budget));
            }
        }
        proposals
    }

    /// The largest micro-batches that fit, of these settings.
    fn largest(
        &self,
        plan: &TrainPlan,
        keys: &[String],
        base: &TrainPlan,
        knob: RecomputeKnob,
        budget: u64,
    ) -> Option<Proposal> {
        let mut other = base.clone();
        other.config.recompute = knob;
        let mut keys = keys.to_vec();
        if knob != plan.config.recompute {
            keys.push(format!("recompute = {:?}", knob.name()));
        }
        let start = self.inputs.start_of(&other).ok()?;
        let most = plan.config.micro_batch_size;
        let halves = std::iter::successors(Some(most), |n| (*n > 1).then_some(n / 2));
        for micro in halves {
            other.config.micro_batch_size = micro;
            let bytes = self.memory(&other, &start).peak();
            if bytes <= budget {
                if micro != most {
                    keys.push(format!("micro_batch_size = {micro}"));
                }
                return Some(Proposal { keys, bytes });
            }
        }
        None
    }
}

/// The settings as they are, then those that learn in another way.
fn variants(plan: &TrainPlan) -> Vec<(Vec<String>, TrainPlan)> {
    let mut all = vec![(Vec::new(), plan.clone())];
    let mut put = |key: &str, edit: &dyn Fn(&mut TrainConfig)| {
        let mut other = plan.clone();
        edit(&mut other.config);
        // What follows from it.
        if other.config.settle().is_ok() {
            all.push((vec![key.to_owned()], other));
        }
    };
    let is_adamw = matches!(plan.recipe().optimizer, OptimizerConfig::AdamW(_));
    let adapter = |config: &mut TrainConfig, method: Method| {
        config.method = method;
        // Names of full fine-tuning's tensors.
        (config.groups, config.freeze) = (Vec::new(), Vec::new());
    };
    if plan.config.method == Method::Full {
        if is_adamw {
            put("optimizer = \"adamw8bit\"", &|config| {
                let rule = OptimizerConfig::AdamW8bit(AdamW8bitConfig::default());
                config.optimizer = Some(rule);
                // AdamW's own, at hand since the table was settled.
                (config.beta1, config.beta2) = (None, None);
                (config.eps, config.weight_decay) = (None, None);
            });
        }
        put("method = \"lora\"", &|config| adapter(config, Method::Lora));
        put("method = \"qlora\"", &|config| adapter(config, Method::Qlora));
    }
    if plan.config.method == Method::Lora && plan.config.lora_init != LoraInit::Pissa {
        put("method = \"qlora\"", &|config| config.method = Method::Qlora);
    }
    all
}

/// Settings that fit.
pub(crate) struct Proposal {
    /// What changes; nothing where the settings fit as they are.
    keys: Vec<String>,
    bytes: u64,
}

impl Proposal {
    /// A line of text.
    pub(crate) fn text(&self) -> String {
        let keys = if self.keys.is_empty() { "as it is".to_owned() } else { self.keys.join(", ") };
        format!("{:>12}  {keys}", size(self.bytes))
    }

    /// As JSON.
    pub(crate) fn json(&self) -> Value {
        json!({"change": self.keys, "peak": self.bytes})
    }
}

impl Memory {
    /// Bytes at the worst moment.
    pub(crate) fn peak(&self) -> u64 {
        self.peak_of(true)
    }

    /// Bytes at the worst moment of a process that has, or has not, written a checkpoint.
    fn peak_of(&self, checkpoint: bool) -> u64 {
        let plan = match checkpoint {
            true => self.plan,
            false => MemoryPlan { checkpoint: 0, ..self.plan },
        };
        PROGRAM + self.packs + plan.peak()
    }

    /// The parts with their names; the last is the worst moment.
    fn parts(&self) -> Vec<(&'static str, u64)> {
        let [parts @ .., _] = self.plan.parts();
        let rest = [("packs", self.packs), ("program", PROGRAM), ("peak", self.peak())];
        parts.into_iter().chain(rest).collect()
    }

    /// As JSON.
    pub(crate) fn json(&self) -> Value {
        let parts = self.parts().into_iter().map(|(name, bytes)| (name.to_owned(), bytes.into()));
        let mut object = Value::Object(parts.collect());
        object["activations_by_recompute"] = Value::Object(
            self.levels.map(|(name, n)| (name.to_owned(), n.into())).into_iter().collect(),
        );
        object
    }

    /// As JSON, without what depends on how often the run is written down: that is no part of its result.
    pub(crate) fn sealed(&self) -> Value {
        let mut object = self.json();
        if let Some(parts) = object.as_object_mut() {
            parts.retain(|name, _| name != "checkpoint" && name != "peak");
        }
        object
    }

    /// A table for people.
    pub(crate) fn text(&self) -> String {
        let line = |(name, bytes): (&str, u64)| match name {
            "loading" => format!("{name:>12} {:>12}  while the weights are read\n", size(bytes)),
            "checkpoint" => format!("{name:>12} {:>12}  while one is written\n", size(bytes)),
            "saving" => format!("{name:>12} {:>12}  while the result is written\n", size(bytes)),
            "activations" => {
                let n = self.n_tokens;
                let levels = self.levels.iter().filter(|(_, other)| *other != bytes);
                let levels: Vec<String> = levels
                    .map(|(knob, bytes)| format!("{} with recompute = {knob:?}", size(*bytes)))
                    .collect();
                let levels = levels.join(", ");
                format!("{name:>12} {:>12}  of {n} tokens at once; {levels}\n", size(bytes))
            }
            _ => format!("{name:>12} {:>12}\n", size(bytes)),
        };
        let parts = self.parts().into_iter().filter(|(_, bytes)| *bytes > 0);
        parts.map(line).collect()
    }

    /// Refuses a run that the machine has no memory for.
    pub(crate) fn check(&self, force: bool) -> Result<(), Failure> {
        match machine::memory_bytes() {
            Some(all) if self.peak() > all && !force => Err(self.too_large(all)),
            _ => Ok(()),
        }
    }

    fn too_large(&self, all: u64) -> Failure {
        let parts = self.parts().into_iter().filter(|(name, bytes)| *bytes > 0 && *name != "peak");
        let parts: Vec<String> =
            parts.map(|(name, bytes)| format!("{name} {}", size(bytes))).collect();
        let message = format!(
            "the run would hold {}, this machine has {}: {}",
            size(self.peak()),
            size(all),
            parts.join(", ")
        );
        Failure::environment(message).hint(format!(
            "`hone-train plan --fit {}` proposes settings that fit; `--force` runs all the same",
            size(all).replace(' ', "")
        ))
    }

    /// What was planned, with or without a checkpoint on the way, beside what the process took at most: in words and as JSON.
    pub(crate) fn beside(&self, measured: u64, checkpoint: bool) -> (String, Value) {
        let planned = self.peak_of(checkpoint);
        let off = 100.0 * (planned as f64 / measured as f64 - 1.0);
        let rest = if checkpoint { "" } else { "; no checkpoint was written" };
        let (ours, theirs) = (size(planned), size(measured));
        let mut object = self.json();
        object["planned"] = planned.into();
        object["measured"] = measured.into();
        (format!("{ours} planned, {theirs} measured ({off:+.1} %){rest}"), object)
    }
}

/// Bytes in a unit that people read.
pub(crate) fn size(bytes: u64) -> String {
    let bytes = bytes as f64;
    if bytes >= GIB { format!("{:.1} GiB", bytes / GIB) } else { format!("{:.1} MiB", bytes / MIB) }
}

const MIB: f64 = 1_048_576.0;
const GIB: f64 = 1_073_741_824.0;

/// Reads a number of bytes: `24GiB`, `24 GB`, `800MiB`, `1000000`.
///
/// # Errors
/// Anything else; the message says what is read.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    let split = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => MIB,
        "gib" => GIB,
        "tib" => GIB * 1024.0,
        _ => return Err("give bytes, or a unit such as 24GiB or 24GB".to_owned()),
    };
    match number.parse::<f64>() {
        Ok(n) if n > 0.0 && n.is_finite() => Ok((n * factor) as u64),
        _ => Err("give a number above 0, such as 24GiB".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_they_are_written() {
        for (text, expected) in [
            ("24GiB", 24 << 30),
            ("24 GB", 24_000_000_000),
            ("1.5gib", 3 << 29),
            ("800MiB", 800 << 20),
            ("1000", 1000),
        ] {
            assert_eq!(bytes(text).unwrap(), expected, "{text}");
        }
        for text in ["", "GiB", "0", "-1GiB", "24 bananas", "1e9", "1.2.3"] {
            assert!(bytes(text).is_err(), "{text}");
        }
        assert_eq!((size(24 << 30), size(800 << 20)), ("24.0 GiB".into(), "800.0 MiB".into()));
    }
}
