//! `hone-train selftest`: what must hold of every training, tried on the run's own first step; trains and writes nothing.

use hone_cli::{Common, Context, Exit, Failure};
use hone_kernels::{Backend, Cpu, Reference};
use hone_learn::Learner;
use hone_model::{Batch, Compute, ModelError, StoredType, Tensors};
use serde::Serialize;
use serde_json::json;

use crate::args::TrainPlan;
use crate::epochs::Packs;
use crate::plan::Steps;
use crate::start::Inputs;
use crate::training::failure;

/// Largest difference of what is the same sum in another order: relative, of the whole gradient.
const SAME_SUM: f64 = 1e-5;

/// Largest difference from the plain operators, which compute in f64.
const SAME_OPERATORS: f64 = 1e-4;

/// The same where factors are rounded to bf16: one that lies between two values may be rounded to either, 2^-8 of itself apart, and thirty layers carry it on.
const SAME_OPERATORS_BF16: f64 = 5e-2;

/// Tokens that go through the plain operators, which are slow.
const REFERENCE_TOKENS: usize = 48;

/// Packs of the first step that are looked at.
const PACKS: usize = 8;

/// Steps of the run that is taken up again in the middle.
const STEPS: u64 = 4;

/// A line of the table.
#[derive(Debug, Serialize)]
struct Row {
    check: &'static str,
    /// What was found; 0 is the same.
    difference: f64,
    /// What is allowed.
    bound: f64,
    passed: bool,
    on: String,
}

impl Row {
    fn new(check: &'static str, difference: f64, bound: f64, on: String) -> Self {
        // Not a number is not below the bound.
        Row { check, difference, bound, passed: difference <= bound, on }
    }
}

/// A run's inputs, to make learners from.
struct Bench {
    plan: TrainPlan,
    inputs: Inputs,
    packs: Packs,
}

/// Loss and gradient of some batches.
struct Gradient {
    loss: f64,
    tensors: Tensors,
}

/// Tries everything, prints a table, and ends with 1 where something does not hold.
pub(crate) fn run(ctx: &Context, common: &Common) -> Result<Exit, Failure> {
    let plan = TrainPlan::resolve(common)?;
    let inputs = Inputs::open(&plan)?;
    let (packs, _) = inputs.splits(&plan)?;
    let bench = Bench { plan, inputs, packs };
    let rows = bench.rows()?;
    let passed = rows.iter().all(|row| row.passed);
    if common.json {
        ctx.print(json!({"passed": passed, "checks": rows}).to_string());
    } else {
        ctx.print(table(&rows));
    }
    if passed {
        return Ok(Exit::Done);
    }
    let failed = rows.iter().filter(|row| !row.passed).map(|row| row.check);
    let message = format!("self-test failed: {}", failed.collect::<Vec<_>>().join(", "));
    let failure = Failure::input(message);
    Err(Failure { exit: Exit::GateFailed, ..failure }
        .hint("this is a fault of hone or of the base model; please report it with the table"))
}

impl Bench {
    fn rows(&self) -> Result<Vec<Row>, Failure> {
        let mut steps = Steps::new(&self.plan, &self.packs);
        let mut packs = steps.step(0).packs;
        packs.truncate(PACKS);
        let mut learner = self.learner(Cpu::new())?;
        let liveness = self.liveness(&mut learner, &packs)?;
        // The first update makes an adapter's B more than zero, so that A has a gradient too.
        learner.apply().map_err(failure)?;
        Ok(vec![
            liveness,
            self.alone(&mut learner, &packs)?,
            self.cut(&mut learner, &packs)?,
            self.reference(&mut learner, &packs)?,
            self.resumed(&mut steps)?,
        ])
    }

    fn learner<B: Backend>(&self, backend: B) -> Result<Learner<B>, Failure> {
        let Inputs { base, start, .. } = &self.inputs;
        let decoder = start.load(backend, &self.plan, base)?.decoder;
        let schedule = Steps::new(&self.plan, &self.packs).schedule();
        Learner::new(decoder, self.plan.recipe(), schedule, self.plan.seed).map_err(failure)
    }

    /// Every trained tensor gets a gradient, and the one expected.
    fn liveness(&self, learner: &mut Learner<Cpu>, packs: &[u64]) -> Result<Row, Failure> {
        let batches = self.packs.batches(packs, self.plan.config.micro_batch_size)?;
        let weight = batches.iter().map(Batch::weight).sum();
        for batch in &batches {
            learner.accumulate(batch, weight).map_err(failure)?;
        }
        let table = learner.self_test();
        let on = format!("{} tensors", table.rows.len());
        Ok(Row::new("every gradient lives", table.failures().count() as f64, 0.0, on))
    }

    /// A document in a pack and the same document alone.
    fn alone(&self, learner: &mut Learner<Cpu>, packs: &[u64]) -> Result<Row, Failure> {
        let packed = self.packs.batch(packs)?;
        let documents = documents(&packed)?;
        let on = format!("{} documents of {} packs", documents.len(), packs.len());
        let one = gradient(learner, &[packed])?;
        let other = gradient(learner, &documents)?;
        Ok(Row::new("packed = unpacked", one.difference(&other), SAME_SUM, on))
    }

    /// One micro-batch and as many as there are packs.
    fn cut(&self, learner: &mut Learner<Cpu>, packs: &[u64]) -> Result<Row, Failure> {
        let whole = gradient(learner, &self.packs.batches(packs, packs.len())?)?;
        let mut worst: f64 = 0.0;
        let sizes = [1, 2, 3];
        for n in sizes {
            let found = gradient(learner, &self.packs.batches(packs, n)?)?;
            worst = worst.max(whole.difference(&found));
        }
        let on = format!("micro-batches of 1, 2, 3 and {} packs", packs.len());
        Ok(Row::new("however a step is cut", worst, SAME_SUM, on))
    }

    /// The fast operators and their plain twins, on the first tokens.
    fn reference(&self, learner: &mut Learner<Cpu>, packs: &[u64]) -> Result<Row, Failure> {
        let batch = first_tokens(&self.packs.batch(packs)?)?;
        let mut plain = self.learner(Reference)?;
        let weights = learner.decoder().trained();
        plain.decoder_mut().set_trained(&weights).map_err(refused)?;
        let on = format!("{} tokens", batch.n_tokens());
        let one = gradient(learner, std::slice::from_ref(&batch))?;
        let other = gradient(&mut plain, &[batch])?;
        let bound = match self.plan.config.compute {
            Compute::F32 => SAME_OPERATORS,
            Compute::Bf16 => SAME_OPERATORS_BF16,
        };
        Ok(Row::new("fast operators = plain ones", one.difference(&other), bound, on))
    }

    /// A few steps in one go, and with the state written and read half-way: the same bytes.
    fn resumed(&self, steps: &mut Steps) -> Result<Row, Failure> {
        let n = STEPS.min(steps.len());
        let mut straight = self.learner(Cpu::new())?;
        let mut before = self.learner(Cpu::new())?;
        for step in 0..n {
            self.step(&mut straight, steps, step)?;
            if step < n / 2 {
                self.step(&mut before, steps, step)?;
            }
        }
        let (tensors, state) = before.state();
        let bytes = tensors.to_safetensors(StoredType::F32).map_err(refused)?;
        let tensors = Tensors::from_safetensors(&[&bytes]).map_err(refused)?;
        let mut resumed = self.learner(Cpu::new())?;
        resumed.restore(&tensors, &state).map_err(failure)?;
        for step in n / 2..n {
            self.step(&mut resumed, steps, step)?;
        }
        let (one, other) = (straight.state(), resumed.state());
        let bits = |tensors: &Tensors| -> Vec<u32> {
            tensors.iter().flat_map(|tensor| tensor.data.iter().map(|x| x.to_bits())).collect()
        };
        let (a, b) = (bits(&one.0), bits(&other.0));
        let n_other = a.iter().zip(&b).filter(|(a, b)| a != b).count() + a.len().abs_diff(b.len());
        let same = n_other + usize::from(one.1 != other.1);
        let on = format!("{n} steps, {} values", a.len());
        Ok(Row::new("resumed = straight", same as f64, 0.0, on))
    }

    fn step(
        &self,
        learner: &mut Learner<Cpu>,
        steps: &mut Steps,
        step: u64,
    ) -> Result<(), Failure> {
        let n = self.plan.config.micro_batch_size;
        let batches = self.packs.batches(&steps.step(step).packs, n)?;
        learner.train_step(&batches).map_err(failure)?;
        Ok(())
    }
}

impl Gradient {
    /// The relative difference of the losses or of the whole gradients, whichever is larger.
    fn difference(&self, other: &Gradient) -> f64 {
        let (mut square, mut squares) = (0.0, 0.0);
        for tensor in self.tensors.iter() {
            let Some(twin) = other.tensors.get(&tensor.name) else { return f64::NAN };
            for (a, b) in tensor.data.iter().zip(&twin.data) {
                square += (f64::from(*a) - f64::from(*b)).powi(2);
                squares += f64::from(*a).powi(2);
            }
        }
        let losses = (self.loss - other.loss).abs() / self.loss.abs();
        // `max` would take a number over what is none.
        let gradients = (square / squares).sqrt();
        if gradients.is_nan() { gradients } else { losses.max(gradients) }
    }
}

/// Loss and gradient of a step over `batches`, without dropout or noise.
fn gradient<B: Backend>(learner: &mut Learner<B>, batches: &[Batch]) -> Result<Gradient, Failure> {
    let decoder = learner.decoder_mut();
    decoder.zero_gradients();
    let weight: f64 = batches.iter().map(Batch::weight).sum();
    let mut sum = 0.0;
    for batch in batches {
        let found = decoder.accumulate(batch, (1.0 / weight) as f32, None).map_err(refused)?;
        sum += found.weighted_loss;
    }
    let tensors = decoder.gradients();
    decoder.zero_gradients();
    Ok(Gradient { loss: sum / weight, tensors })
}

fn refused(error: ModelError) -> Failure {
    Failure::input(error.to_string())
}

/// Each document of a batch as a batch of its own.
fn documents(batch: &Batch) -> Result<Vec<Batch>, Failure> {
    let mut all = Vec::new();
    let mut start = 0;
    for len in &batch.seq_lens {
        let (ids, weights) = (&batch.input_ids[start..start + len], weights(batch, start, *len));
        let mut one = Batch::new();
        one.push(ids, &weights).map_err(refused)?;
        all.push(one);
        start += len;
    }
    Ok(all)
}

/// The weight of each token of a document as a target: a batch has it where the token is predicted.
fn weights(batch: &Batch, start: usize, len: usize) -> Vec<f32> {
    std::iter::once(0.0).chain(batch.weights[start..start + len - 1].iter().copied()).collect()
}

/// The tokens of the first document up to and behind its first targets; its second, if it has none so early.
fn first_tokens(batch: &Batch) -> Result<Batch, Failure> {
    let first = batch.rows.first().map_or(0, |row| *row as usize);
    let mut start = 0;
    for len in &batch.seq_lens {
        if first < start + len {
            let from = first.saturating_sub(REFERENCE_TOKENS / 2).max(start);
            let n = REFERENCE_TOKENS.min(start + len - from);
            let mut one = Batch::new();
            one.push(&batch.input_ids[from..from + n], &weights(batch, from, n))
                .map_err(refused)?;
            return Ok(one);
        }
        start += len;
    }
    Err(Failure::input("the first step has no document"))
}

fn table(rows: &[Row]) -> String {
    let mut lines =
        vec![format!("{:<28} {:>10} {:>8}  {:<4} on", "check", "difference", "bound", "")];
    lines.extend(rows.iter().map(|row| {
        let said = if row.passed { "ok" } else { "FAIL" };
        let Row { check, difference, bound, on, .. } = row;
        format!("{check:<28} {difference:>10.1e} {bound:>8.0e}  {said:<4} {on}")
    }));
    lines.join("\n")
}
