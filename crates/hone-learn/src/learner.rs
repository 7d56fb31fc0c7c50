//! The learner: a decoder, its optimizer's moments, and the place in the run.

use hone_kernels::{Backend, rng};
use hone_model::{Batch, Decoder, EmbeddingNoise, LossSums, ParamInfo, PassOptions};

use crate::groups::{self, is_muon};
use crate::muon::MuonScratch;
use crate::rule::{Slot, State, StepRates};
use crate::{GroupRates, LearnError, OptimizerConfig, Recipe, ScheduleConfig};

/// What an optimizer step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// The step, counted from 0.
    pub step: u64,
    /// sum(w L) / sum(w) over the step, in nats, before the update; L is cross-entropy and what the
    /// recipe adds to it.
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

/// A model in training.
pub struct Learner<B: Backend> {
    pub(crate) decoder: Decoder<B>,
    pub(crate) recipe: Recipe,
    schedule: ScheduleConfig,
    seed: u64,
    /// A slot for every trained tensor, in the order of the parameters.
    pub(crate) slots: Vec<Slot<B>>,
    muon: Option<MuonScratch<B>>,
    /// The moving average of each trained buffer.
    pub(crate) average: Option<Vec<B::Buf>>,
    /// Steps applied.
    pub(crate) step: u64,
    /// Steps applied before moments and average began: 0, unless [`Learner::restart`] began them anew.
    pub(crate) since: u64,
    /// Sums of the step under way.
    pub(crate) sums: LossSums,
    /// Micro-batches accumulated in the step under way.
    pub(crate) n_micro: u64,
    /// Documents in them.
    pub(crate) n_documents: u64,
}

/// The stream of a step's noise: no micro-batch has this number, whose streams are dropout's.
const NOISE: u64 = u64::MAX;

impl<B: Backend> Learner<B> {
    /// Takes a decoder that has trained parameters. `seed` is that of dropout and noise. Errors:
    /// settings out of their ranges, nothing to train, a group without a tensor.
    pub fn new(
        mut decoder: Decoder<B>,
        recipe: impl Into<Recipe>,
        schedule: ScheduleConfig,
        seed: u64,
    ) -> Result<Self, LearnError> {
        let recipe = recipe.into();
        recipe.check()?;
        schedule.check()?;
        let infos = decoder.trained_params();
        if infos.is_empty() {
            return Err(LearnError::NothingTrained);
        }
        let optimizer = &recipe.optimizer;
        let rates = groups::resolve(&recipe.groups, optimizer, schedule.lr, &infos)?;
        let backend = decoder.backend().clone();
        let muon = scratch(&backend, optimizer, &infos);
        let slot = |(info, rates): (ParamInfo, GroupRates)| {
            let state = State::new(&backend, optimizer, &info);
            Slot { info, rates, state }
        };
        let slots = infos.into_iter().zip(rates).map(slot).collect();
        let mut average = recipe.ema_decay.map(|_| Vec::new());
        decoder.for_each_trained(|backend, _, _, value, _| {
            average.iter_mut().for_each(|average| average.push(backend.zeros(backend.len(value))));
        });
        decoder.zero_gradients();
        decoder.set_loss_options(recipe.loss_options());
        Ok(Learner {
            decoder,
            recipe,
            schedule,
            seed,
            slots,
            muon,
            average,
            step: 0,
            since: 0,
            sums: LossSums::default(),
            n_micro: 0,
            n_documents: 0,
        })
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
        self.recipe.optimizer.lr(self.schedule.lr(self.step), self.step + 1 - self.since)
    }

    /// What every trained tensor is updated with, in the order of the parameters.
    pub fn rates(&self) -> impl Iterator<Item = (&ParamInfo, GroupRates)> {
        self.slots.iter().map(|slot| (&slot.info, slot.rates))
    }

    /// Adds a micro-batch's gradients to the step under way. `step_weight` is the sum of
    /// [`Batch::weight`] over all micro-batches of the step. A batch without targets changes
    /// nothing.
    pub fn accumulate(&mut self, batch: &Batch, step_weight: f64) -> Result<LossSums, LearnError> {
        if !(step_weight > 0.0 && step_weight.is_finite()) {
            return Err(LearnError::NoTarget { step: self.step, weight: step_weight });
        }
        let stream = rng::mix(self.seed, self.step);
        let noise = EmbeddingNoise {
            alpha: self.recipe.neftune_alpha as f32,
            seed: rng::mix(stream, NOISE),
            first_document: self.n_documents,
        };
        let options = PassOptions {
            dropout_seed: Some(rng::mix(stream, self.n_micro)),
            noise: (noise.alpha > 0.0).then_some(noise),
        };
        let scale = (1.0 / step_weight) as f32;
        let sums = self.decoder.accumulate_with(batch, scale, options)?;
        self.n_micro += 1;
        self.n_documents += batch.seq_lens.len() as u64;
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
        let clip = self.recipe.clip(grad_norm);
        let lr = self.lr();
        self.update(StepRates { lr, step: step + 1 - self.since, grad_scale: clip as f32 });
        self.step += 1;
        self.forget();
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

    /// Forgets the step under way.
    pub(crate) fn forget(&mut self) {
        self.sums = LossSums::default();
        self.n_micro = 0;
        self.n_documents = 0;
    }

    /// Changes every trained tensor, then its average, and sets the gradients to zero.
    fn update(&mut self, rates: StepRates) {
        let Learner { decoder, recipe, slots, muon, average, .. } = self;
        let mut slots = slots.iter_mut().peekable();
        let decay = recipe.ema_decay.unwrap_or_default();
        decoder.for_each_trained(|backend, buffer, _, value, grad| {
            while let Some(slot) = slots.next_if(|slot| slot.info.buffer == buffer) {
                slot.step(backend, &recipe.optimizer, value, grad, rates, muon.as_mut());
            }
            if let Some(average) = average {
                average_step(backend, decay, rates.step, value, &mut average[buffer]);
            }
            backend.fill(grad, 0.0);
        });
    }

    /// [`evaluate`] of the moving average; `None` where there is none yet, or no target.
    pub fn evaluate_average<'a>(
        &mut self,
        batches: impl IntoIterator<Item = &'a Batch>,
    ) -> Result<Option<Evaluation>, LearnError> {
        if !self.swap_average() {
            return Ok(None);
        }
        let result = self.evaluate(batches);
        self.swap_average();
        result
    }

    /// Exchanges the weights and their moving average: to sample or to save it. Exchange them again
    /// before the next step or [`Learner::state`]. `false`, and nothing is done, where there is
    /// none yet.
    pub fn swap_average(&mut self) -> bool {
        let Learner { decoder, average: Some(average), step, since, .. } = self else {
            return false;
        };
        if step == since {
            return false;
        }
        decoder.for_each_trained(|_, buffer, _, value, _| {
            std::mem::swap(value, &mut average[buffer]);
        });
        true
    }
}

/// Mixes the values after step `step`, counted from 1, into their average, which starts as the
/// first of them: `torch.optim.swa_utils` with an exponential average.
pub(crate) fn average_step<B: Backend>(
    backend: &B,
    decay: f64,
    step: u64,
    value: &B::Buf,
    average: &mut B::Buf,
) {
    let keep = if step == 1 { 0.0 } else { decay };
    let (fresh, n) = ((1.0 - keep) as f32, backend.len(value));
    backend.axpby(fresh, (value, 0), keep as f32, (average, 0), n);
}

/// Buffers for Muon, if it is the rule.
fn scratch<B: Backend>(
    backend: &B,
    optimizer: &OptimizerConfig,
    infos: &[ParamInfo],
) -> Option<MuonScratch<B>> {
    let OptimizerConfig::Muon(_) = optimizer else { return None };
    let shapes = infos.iter().filter(|info| is_muon(info));
    Some(MuonScratch::new(backend, shapes.map(|info| (info.shape[0], info.shape[1]))))
}
