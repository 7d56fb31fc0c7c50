//! The learner: a decoder, its optimizer's moments, and the place in the run.

use hone_kernels::{AdamW, Backend, rng};
use hone_model::{Batch, Decoder, LossSums};

use crate::{LearnError, OptimizerConfig, ScheduleConfig};

/// What an optimizer step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// The step, counted from 0.
    pub step: u64,
    /// sum(w CE) / sum(w) over the step, in nats, before the update.
    pub loss: f64,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Factor that clipping applied, at most 1.
    pub clip: f64,
    /// Learning rate of the update.
    pub lr: f64,
    /// Sum of the loss weights.
    pub weight: f64,
    /// Targets with a weight above 0.
    pub n_targets: u64,
    /// Share of the targets that had the largest logit.
    pub accuracy: f64,
}

/// What an evaluation found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// sum(w CE) / sum(w), in nats.
    pub loss: f64,
    /// exp(loss).
    pub perplexity: f64,
    /// Share of the targets that had the largest logit.
    pub accuracy: f64,
    /// Sum of the loss weights.
    pub weight: f64,
    /// Targets with a weight above 0.
    pub n_targets: u64,
}

impl Evaluation {
    /// From the sums of all batches. `None` when there was no target.
    pub fn from_sums(sums: &LossSums) -> Option<Self> {
        let loss = sums.weighted_loss / sums.weight;
        (sums.weight > 0.0).then(|| Evaluation {
            loss,
            perplexity: loss.exp(),
            accuracy: sums.n_correct as f64 / sums.n_rows as f64,
            weight: sums.weight,
            n_targets: sums.n_rows,
        })
    }
}

/// Loss, perplexity and accuracy of a model over batches, without dropout; `None` when they have no
/// target.
pub fn evaluate<'a, B: Backend>(
    decoder: &mut Decoder<B>,
    batches: impl IntoIterator<Item = &'a Batch>,
) -> Result<Option<Evaluation>, LearnError> {
    let mut sums = LossSums::default();
    for batch in batches {
        sums += decoder.loss(batch, None)?;
    }
    Ok(Evaluation::from_sums(&sums))
}

/// Moments of one trained buffer.
pub(crate) struct Moments<B: Backend> {
    pub(crate) first: B::Buf,
    pub(crate) second: B::Buf,
}

/// A model in training.
pub struct Learner<B: Backend> {
    pub(crate) decoder: Decoder<B>,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    seed: u64,
    pub(crate) moments: Vec<Moments<B>>,
    /// Steps applied.
    pub(crate) step: u64,
    /// Sums of the step under way.
    pub(crate) sums: LossSums,
    /// Micro-batches accumulated in the step under way.
    pub(crate) n_micro: u64,
}

impl<B: Backend> Learner<B> {
    /// Takes a decoder that has trained parameters. `seed` is that of dropout.
    pub fn new(
        mut decoder: Decoder<B>,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        seed: u64,
    ) -> Result<Self, LearnError> {
        optimizer.check()?;
        schedule.check()?;
        let mut moments = Vec::new();
        decoder.for_each_trained(|backend, _, _, value, _| {
            let zeros = || backend.zeros(backend.len(value));
            moments.push(Moments { first: zeros(), second: zeros() });
        });
        if moments.is_empty() {
            return Err(LearnError::NothingTrained);
        }
        decoder.zero_gradients();
        let (sums, n_micro) = (LossSums::default(), 0);
        Ok(Learner { decoder, optimizer, schedule, seed, moments, step: 0, sums, n_micro })
    }

    /// The model.
    pub fn decoder(&self) -> &Decoder<B> {
        &self.decoder
    }

    /// The model, to evaluate or generate with.
    pub fn decoder_mut(&mut self) -> &mut Decoder<B> {
        &mut self.decoder
    }

    /// Gives the model back.
    pub fn into_decoder(self) -> Decoder<B> {
        self.decoder
    }

    /// Steps applied so far, which is the number of the step under way.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Learning rate of the step under way.
    pub fn lr(&self) -> f64 {
        self.schedule.lr(self.step)
    }

    /// Adds a micro-batch's gradients to the step under way. `step_weight` is the sum of
    /// [`Batch::weight`] over all micro-batches of the step. A batch without targets changes
    /// nothing.
    pub fn accumulate(&mut self, batch: &Batch, step_weight: f64) -> Result<LossSums, LearnError> {
        if !(step_weight > 0.0 && step_weight.is_finite()) {
            return Err(LearnError::NoTarget { step: self.step, weight: step_weight });
        }
        let seed = rng::mix(rng::mix(self.seed, self.step), self.n_micro);
        let scale = (1.0 / step_weight) as f32;
        let sums = self.decoder.accumulate(batch, scale, Some(seed))?;
        self.n_micro += 1;
        self.sums += sums;
        Ok(sums)
    }

    /// Ends the step: clips, updates, and sets the gradients to zero. Errors leave the parameters
    /// as they are: no target at all, or a loss or a gradient that is not finite.
    pub fn apply(&mut self) -> Result<StepReport, LearnError> {
        let (step, sums) = (self.step, self.sums);
        if sums.weight <= 0.0 {
            return Err(LearnError::NoTarget { step, weight: sums.weight });
        }
        let loss = sums.weighted_loss / sums.weight;
        let grad_norm = self.grad_norm();
        for (what, value) in [("loss", loss), ("gradient norm", grad_norm)] {
            if !value.is_finite() {
                return Err(LearnError::NotFinite { step, what, value });
            }
        }
        let clip = self.optimizer.clip(grad_norm);
        let lr = self.schedule.lr(step);
        self.update(lr, clip);
        self.step += 1;
        self.sums = LossSums::default();
        self.n_micro = 0;
        Ok(StepReport {
            step,
            loss,
            grad_norm,
            clip,
            lr,
            weight: sums.weight,
            n_targets: sums.n_rows,
            accuracy: sums.n_correct as f64 / sums.n_rows as f64,
        })
    }

    /// A whole step over micro-batches.
    pub fn train_step(&mut self, batches: &[Batch]) -> Result<StepReport, LearnError> {
        let weight = batches.iter().map(Batch::weight).sum();
        for batch in batches {
            self.accumulate(batch, weight)?;
        }
        self.apply()
    }

    /// [`evaluate`] of the model as it is.
    pub fn evaluate<'a>(
        &mut self,
        batches: impl IntoIterator<Item = &'a Batch>,
    ) -> Result<Option<Evaluation>, LearnError> {
        evaluate(&mut self.decoder, batches)
    }

    /// Global norm of the gradient accumulated so far, in f64.
    pub fn grad_norm(&mut self) -> f64 {
        let mut sum = 0.0;
        self.decoder.for_each_trained(|backend, _, _, _, grad| sum += backend.sum_squares(grad));
        sum.sqrt()
    }

    /// AdamW on every trained buffer.
    fn update(&mut self, lr: f64, clip: f64) {
        let (optimizer, step, moments) = (self.optimizer, self.step + 1, &mut self.moments);
        self.decoder.for_each_trained(|backend, buffer, kind, value, grad| {
            let Moments { first, second } = &mut moments[buffer];
            let update = AdamW {
                lr,
                beta1: optimizer.beta1,
                beta2: optimizer.beta2,
                eps: optimizer.eps,
                weight_decay: if kind.decays() { optimizer.weight_decay } else { 0.0 },
                step,
                grad_scale: clip as f32,
            };
            backend.adamw(value, grad, first, second, update);
            backend.fill(grad, 0.0);
        });
    }
}
