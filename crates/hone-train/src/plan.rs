//! What every optimizer step will see: found before anything is trained, sealed with what was, and what the training loop goes by.

use hone_cli::{Common, Context, Exit, Failure};
use hone_learn::{OptimizerConfig, ScheduleConfig, StepReport};
use hone_schema::PlanStep;
use hone_store::Draft;
use serde_json::{Value, json};

use crate::args::{PlanArgs, TrainPlan};
use crate::epochs::{Order, Packs};
use crate::memory::{self, Memory, Proposal, Run};
use crate::start::Inputs;

/// Steps written at a time.
const STEPS_A_BATCH: usize = 1024;

/// Largest difference of two sums of the same weights in another order, as a share of them.
const WEIGHT_TOLERANCE: f64 = 1e-9;

/// The steps of a run, each a function of its number.
pub(crate) struct Steps<'a> {
    packs: &'a Packs,
    order: Order,
    schedule: ScheduleConfig,
    optimizer: OptimizerConfig,
    n_steps: u64,
}

impl<'a> Steps<'a> {
    /// The steps of a run over `packs`, which are at least one.
    pub(crate) fn new(plan: &TrainPlan, packs: &'a Packs) -> Self {
        let config = &plan.config;
        let order = Order::new(packs.len(), config.batch_size, plan.seed, config.shuffle);
        let all = order.steps_per_epoch() * u64::from(config.epochs);
        let n_steps = match config.max_steps {
            // Without epochs the packs are gone over as often as the steps ask.
            Some(max) if all == 0 => max,
            Some(max) => max.min(all),
            None => all,
        };
        let optimizer = plan.recipe().optimizer;
        Steps { packs, order, schedule: plan.schedule(n_steps), optimizer, n_steps }
    }

    /// How many there are.
    pub(crate) fn len(&self) -> u64 {
        self.n_steps
    }

    /// Tokens of the largest micro-batch of `n` packs.
    pub(crate) fn micro_tokens_max(&mut self, n: usize) -> usize {
        let steps = 0..self.n_steps;
        let tokens = steps.map(|step| self.packs.tokens_max(&self.order.step(step), n));
        tokens.max().unwrap_or_default()
    }

    /// The learning-rate schedule.
    pub(crate) fn schedule(&self) -> ScheduleConfig {
        self.schedule
    }

    /// Steps of one epoch.
    pub(crate) fn steps_per_epoch(&self) -> u64 {
        self.order.steps_per_epoch()
    }

    /// The rate of a step, counted from 0; some update rules have their own.
    fn lr(&self, step: u64) -> f64 {
        self.optimizer.lr(self.schedule.lr(step), step + 1)
    }

    /// A step, counted from 0.
    pub(crate) fn step(&mut self, step: u64) -> PlanStep {
        let packs = self.order.step(step);
        let sum = |of: fn(&crate::epochs::Facts) -> u64| -> u64 {
            packs.iter().map(|idx| of(self.packs.facts(*idx))).sum()
        };
        let trained_tokens = sum(|facts| facts.n_trained.into());
        let n_replay = sum(|facts| facts.n_replay.into());
        PlanStep {
            step,
            epoch: step / self.order.steps_per_epoch(),
            tokens: sum(|facts| facts.n_tokens.into()),
            trained_tokens,
            weight: packs.iter().map(|idx| self.packs.facts(*idx).weight).sum(),
            replay_share: n_replay as f64 / trained_tokens.max(1) as f64,
            learning_rate: self.lr(step),
            packs: packs.into_iter().map(|idx| idx as u64).collect(),
        }
    }

    /// Writes the plan into the artefact.
    pub(crate) fn write(&mut self, draft: &Draft) -> Result<(), Failure> {
        let mut file = draft.parquet("plan.parquet", PlanStep::schema())?;
        for start in (0..self.n_steps).step_by(STEPS_A_BATCH) {
            let end = self.n_steps.min(start + STEPS_A_BATCH as u64);
            let steps: Vec<PlanStep> = (start..end).map(|step| self.step(step)).collect();
            file.write(&PlanStep::to_batch(&steps)?)?;
        }
        Ok(file.finish()?)
    }
}

/// Whether a step was what the plan says. Anything else is a fault of hone, and the run is not what its record says.
pub(crate) fn check(step: &PlanStep, n_tokens: u64, report: &StepReport) -> Result<(), Failure> {
    let weight_off = (report.weight - step.weight).abs() > WEIGHT_TOLERANCE * step.weight;
    let is_planned = report.step == step.step
        && n_tokens == step.tokens
        && report.n_targets == step.trained_tokens
        && report.lr == step.learning_rate
        && !weight_off;
    if is_planned {
        return Ok(());
    }
    let message = format!(
        "step {} was planned with {} tokens, {} trained of weight {}, learning rate {}; it had {n_tokens}, {}, {}, {}",
        step.step,
        step.tokens,
        step.trained_tokens,
        step.weight,
        step.learning_rate,
        report.n_targets,
        report.weight,
        report.lr
    );
    Err(Failure::environment(message).hint("this is a fault of hone; please report it"))
}

/// `hone-train plan`: prints what a run would do, and does nothing.
pub(crate) fn show(ctx: &Context, common: &Common, args: &PlanArgs) -> Result<Exit, Failure> {
    let plan = TrainPlan::resolve(common)?;
    plan.notes.iter().for_each(|note| ctx.note(format!("train: {note}")));
    let inputs = Inputs::open(&plan)?;
    let (packs, eval) = inputs.splits(&plan)?;
    let files = inputs.base.files(&plan)?;
    let half_embedding = inputs.base.half_embedding(&plan)?;
    let run = Run { inputs: &inputs, files, half_embedding, train: &packs, eval: &eval };
    let memory = run.memory(&plan, &inputs.start);
    if let Some(budget) = args.fit {
        return Ok(fit(ctx, common, &run.fitting(&plan, budget), budget, &memory));
    }
    let mut steps = Steps::new(&plan, &packs);
    let n_shown = if args.steps == 0 { steps.len() } else { args.steps.min(steps.len()) };
    let shown: Vec<PlanStep> = (0..n_shown).map(|step| steps.step(step)).collect();
    let totals = Totals::of(&mut steps);
    if common.json {
        let mut object = totals.json(&steps);
        object["steps"] = shown.iter().map(json_of).collect();
        object["memory"] = memory.json();
        ctx.print(object.to_string());
    } else {
        ctx.print(totals.text(&steps));
        ctx.print(memory.text());
        ctx.print(table(&shown));
    }
    Ok(Exit::Done)
}

/// `plan --fit`: settings whose plan fits `budget` bytes.
fn fit(ctx: &Context, common: &Common, found: &[Proposal], budget: u64, memory: &Memory) -> Exit {
    if common.json {
        let fitting: Vec<Value> = found.iter().map(Proposal::json).collect();
        let object = json!({"budget": budget, "memory": memory.json(), "fitting": fitting});
        ctx.print(object.to_string());
    } else {
        let lines = found.iter().map(|proposal| proposal.text() + "\n");
        let (now, budget) = (memory::size(memory.peak()), memory::size(budget));
        let head = format!("the settings need {now}; of {budget} these would be held\n");
        ctx.print(std::iter::once(head).chain(lines).collect::<String>());
    }
    if found.is_empty() {
        ctx.warn("no change of micro-batch, recomputation, optimizer or method makes it fit");
        return Exit::GateFailed;
    }
    Exit::Done
}

/// What a run sees in all.
struct Totals {
    n_packs: usize,
    tokens: u64,
    trained: u64,
    replay: f64,
    weight: f64,
    /// Fewest and most tokens of a step.
    ends: [u64; 2],
    /// Learning rate of the first and the last step, and the highest.
    rates: [f64; 3],
}

impl Totals {
    fn of(steps: &mut Steps) -> Self {
        let mut totals = Totals {
            n_packs: steps.packs.len(),
            tokens: 0,
            trained: 0,
            replay: 0.0,
            weight: 0.0,
            ends: [u64::MAX, 0],
            rates: [steps.lr(0), 0.0, 0.0],
        };
        for step in (0..steps.n_steps).map(|step| steps.step(step)) {
            totals.tokens += step.tokens;
            totals.trained += step.trained_tokens;
            totals.replay += step.replay_share * step.trained_tokens as f64;
            totals.weight += step.weight;
            totals.ends = [totals.ends[0].min(step.tokens), totals.ends[1].max(step.tokens)];
            totals.rates[1] = step.learning_rate;
            totals.rates[2] = totals.rates[2].max(step.learning_rate);
        }
        totals
    }

    fn replay_share(&self) -> f64 {
        self.replay / (self.trained as f64).max(1.0)
    }

    fn json(&self, steps: &Steps) -> Value {
        json!({
            "n_steps": steps.n_steps,
            "steps_per_epoch": steps.steps_per_epoch(),
            "n_packs": self.n_packs,
            "tokens": self.tokens,
            "trained_tokens": self.trained,
            "weight": self.weight,
            "replay_share": self.replay_share(),
            "tokens_of_a_step": {"min": self.ends[0], "max": self.ends[1]},
            "learning_rate": {"first": self.rates[0], "last": self.rates[1], "max": self.rates[2]},
        })
    }

    fn text(&self, steps: &Steps) -> String {
        let per_epoch = steps.steps_per_epoch();
        format!(
            "{} steps, {per_epoch} an epoch ({:.2} epochs) over {} packs\n\
             {} tokens, {} trained, {:.1} % of those replay\n\
             {} to {} tokens a step, learning rate {} to {}, at most {}\n",
            steps.n_steps,
            steps.n_steps as f64 / per_epoch as f64,
            self.n_packs,
            self.tokens,
            self.trained,
            100.0 * self.replay_share(),
            self.ends[0],
            self.ends[1],
            short(self.rates[0]),
            short(self.rates[1]),
            short(self.rates[2]),
        )
    }
}

fn short(rate: f64) -> String {
    format!("{rate:.3e}")
}

fn json_of(step: &PlanStep) -> Value {
    json!({
        "step": step.step,
        "epoch": step.epoch,
        "packs": step.packs,
        "tokens": step.tokens,
        "trained_tokens": step.trained_tokens,
        "weight": step.weight,
        "replay_share": step.replay_share,
        "learning_rate": step.learning_rate,
    })
}

fn table(steps: &[PlanStep]) -> String {
    let mut lines = vec![format!(
        "{:>8} {:>5} {:>6} {:>9} {:>9} {:>11} {:>7} {:>10}",
        "step", "epoch", "packs", "tokens", "trained", "weight", "replay", "lr"
    )];
    lines.extend(steps.iter().map(|step| {
        format!(
            "{:>8} {:>5} {:>6} {:>9} {:>9} {:>11.2} {:>6.1}% {:>10}",
            step.step,
            step.epoch,
            step.packs.len(),
            step.tokens,
            step.trained_tokens,
            step.weight,
            100.0 * step.replay_share,
            short(step.learning_rate)
        )
    }));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Shuffle, TrainConfig};
    use hone_schema::{Doc, Kind, Pack, Roles};
    use std::collections::BTreeSet;
    use std::path::PathBuf;

    fn packs(n: u32) -> Packs {
        let pack = |idx: u32| {
            let source = if idx.is_multiple_of(3) { "replay" } else { "s" };
            let doc = Doc {
                len: 4 + idx,
                row: idx.into(),
                row_id: format!("r{idx}"),
                source: source.into(),
                kind: Kind::Sft,
                offset: 0,
                truncated: false,
                kept: Vec::new(),
            };
            let len = doc.len as usize;
            let roles = Roles::one("assistant", doc.len);
            Pack { input_ids: vec![7; len], loss_weight: vec![0.5; len], roles, docs: vec![doc] }
        };
        let packs: Vec<Pack> = (0..n).map(pack).collect();
        let replay = BTreeSet::from(["replay"]);
        Packs::new(vec![Pack::to_batch(&packs).unwrap()], false, &replay).unwrap()
    }

    fn plan(edit: impl FnOnce(&mut TrainConfig)) -> TrainPlan {
        let mut config = TrainConfig { batch_size: 4, lr: Some(1e-3), ..TrainConfig::default() };
        edit(&mut config);
        let path = PathBuf::new;
        let notes = Vec::new();
        TrainPlan {
            config,
            seed: 7,
            base: path(),
            packs: path(),
            logs: path(),
            notes,
            pipeline: None,
        }
    }

    #[test]
    fn an_epoch_has_every_token_once() {
        let packs = packs(10);
        for shuffle in [Shuffle::Packs, Shuffle::Batches, Shuffle::None] {
            let plan = plan(|config| (config.epochs, config.shuffle) = (2, shuffle));
            let mut steps = Steps::new(&plan, &packs);
            assert_eq!((steps.len(), steps.steps_per_epoch()), (6, 3));
            for epoch in 0..2 {
                let all: Vec<PlanStep> =
                    (3 * epoch..3 * epoch + 3).map(|s| steps.step(s)).collect();
                assert!(all.iter().all(|step| step.epoch == epoch));
                let sum = |of: fn(&PlanStep) -> u64| all.iter().map(of).sum::<u64>();
                assert_eq!(sum(|s| s.tokens), packs.n_tokens());
                assert_eq!(sum(|s| s.trained_tokens), packs.n_trained());
                assert_eq!(
                    all.iter().map(|s| s.weight).sum::<f64>(),
                    packs.n_trained() as f64 / 2.0
                );
                let replay: f64 =
                    all.iter().map(|s| s.replay_share * s.trained_tokens as f64).sum();
                // Packs 0, 3, 6 and 9 are replay; the first token of each is not trained.
                assert!((replay - (3.0 + 6.0 + 9.0 + 12.0)).abs() < 1e-9, "{replay}");
                let mut seen: Vec<u64> = all.into_iter().flat_map(|step| step.packs).collect();
                seen.sort_unstable();
                assert_eq!(seen, (0..10).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn steps_are_bounded_by_epochs_and_by_max_steps() {
        let packs = packs(10);
        let check = |epochs, max_steps, n_steps: u64| {
            let plan = plan(|config| (config.epochs, config.max_steps) = (epochs, max_steps));
            assert_eq!(Steps::new(&plan, &packs).len(), n_steps);
        };
        check(1, None, 3);
        check(3, Some(5), 5);
        check(1, Some(5), 3);
        check(0, Some(50), 50);
    }

    #[test]
    fn a_step_that_is_not_the_planned_one_is_seen() {
        let packs = packs(10);
        let step = Steps::new(&plan(|_| {}), &packs).step(1);
        let report = StepReport {
            step: 1,
            loss: 1.0,
            grad_norm: 1.0,
            clip: 1.0,
            lr: step.learning_rate,
            weight: step.weight * (1.0 + 1e-12),
            n_targets: step.trained_tokens,
            accuracy: 0.5,
        };
        assert!(check(&step, step.tokens, &report).is_ok());
        assert!(check(&step, step.tokens + 1, &report).is_err());
        assert!(check(&step, step.tokens, &StepReport { step: 2, ..report }).is_err());
        assert!(check(&step, step.tokens, &StepReport { lr: 1.0, ..report }).is_err());
        assert!(check(&step, step.tokens, &StepReport { weight: 1.0, ..report }).is_err());
        let other = StepReport { n_targets: 0, ..report };
        let failure = check(&step, step.tokens, &other).unwrap_err().to_string();
        assert!(failure.starts_with("step 1 was planned with "), "{failure}");
    }
}
