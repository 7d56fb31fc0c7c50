//! What the update rule keeps of each trained tensor, and its step.

use hone_kernels::{Adafactor, AdamW, Backend, CODE_BLOCK, Lion, SecondMoment, Sgd};
use hone_model::ParamInfo;

use crate::groups::{GroupRates, is_muon};
use crate::muon::{self, Matrix, MuonScratch, MuonStep};
use crate::{AdafactorConfig, AdamWConfig, OptimizerConfig, SgdConfig};

/// The state of one tensor: buffers, each with what comes before the tensor's name when it is
/// saved. Which ones there are is the rule's choice.
pub(crate) struct State<B: Backend> {
    pub(crate) values: Vec<(&'static str, B::Buf)>,
    pub(crate) codes: Vec<(&'static str, B::Codes)>,
}

/// A trained tensor with its state and its rates.
pub(crate) struct Slot<B: Backend> {
    pub(crate) info: ParamInfo,
    pub(crate) rates: GroupRates,
    pub(crate) state: State<B>,
}

const FIRST: &str = "exp_avg.";
const SECOND: &str = "exp_avg_sq.";
const MOMENTUM: &str = "momentum.";
const ROWS: &str = "exp_avg_sq_row.";
const COLS: &str = "exp_avg_sq_col.";
const FIRST_MAX: &str = "exp_avg_absmax.";
const SECOND_MAX: &str = "exp_avg_sq_absmax.";
const FIRST_CODES: &str = "exp_avg_codes.";
const SECOND_CODES: &str = "exp_avg_sq_codes.";

/// Buffers of a state: prefix and number of values, or of codes.
struct Kept {
    values: Vec<(&'static str, usize)>,
    codes: Vec<(&'static str, usize)>,
}

/// What a rule keeps of a tensor.
fn kept(optimizer: &OptimizerConfig, info: &ParamInfo) -> Kept {
    let n = info.n_values();
    let pair = || vec![(FIRST, n), (SECOND, n)];
    let mut codes = Vec::new();
    let values = match optimizer {
        OptimizerConfig::AdamW8bit(adamw) if adamw.has_codes(info) => {
            codes = vec![(FIRST_CODES, n), (SECOND_CODES, n)];
            let n_blocks = n.div_ceil(CODE_BLOCK);
            vec![(FIRST_MAX, n_blocks), (SECOND_MAX, n_blocks)]
        }
        OptimizerConfig::AdamW(_) | OptimizerConfig::AdamW8bit(_) => pair(),
        OptimizerConfig::Muon(_) if !is_muon(info) => pair(),
        OptimizerConfig::Sgd(sgd) if sgd.momentum == 0.0 => Vec::new(),
        OptimizerConfig::Muon(_) | OptimizerConfig::Lion(_) | OptimizerConfig::Sgd(_) => {
            vec![(MOMENTUM, n)]
        }
        OptimizerConfig::Adafactor(adafactor) => {
            let mut values = match info.shape[..] {
                [rows, cols] => vec![(ROWS, rows), (COLS, cols)],
                _ => vec![(SECOND, n)],
            };
            values.extend(adafactor.beta1.map(|_| (FIRST, n)));
            values
        }
    };
    Kept { values, codes }
}

impl OptimizerConfig {
    /// Bytes that the rule keeps of a tensor from step to step.
    pub fn state_bytes(&self, info: &ParamInfo) -> u64 {
        let Kept { values, codes } = kept(self, info);
        let total = |parts: &[(&str, usize)]| parts.iter().map(|(_, n)| *n as u64).sum::<u64>();
        size_of::<f32>() as u64 * total(&values) + total(&codes)
    }

    /// Bytes of the rule's buffers that all tensors share: Muon's two of the largest matrix and two
    /// squares of the shorter side.
    pub fn scratch_bytes(&self, infos: &[ParamInfo]) -> u64 {
        let OptimizerConfig::Muon(_) = self else { return 0 };
        let (mut n, mut side) = (0, 0);
        for info in infos.iter().filter(|info| is_muon(info)) {
            n = n.max(info.n_values());
            side = side.max(info.shape[0].min(info.shape[1]));
        }
        (2 * size_of::<f32>() * (n + side * side)) as u64
    }
}

impl<B: Backend> State<B> {
    /// The state of a tensor before the first step.
    pub(crate) fn new(backend: &B, optimizer: &OptimizerConfig, info: &ParamInfo) -> Self {
        let Kept { values, codes } = kept(optimizer, info);
        State {
            values: values.into_iter().map(|(name, n)| (name, backend.zeros(n))).collect(),
            codes: codes.into_iter().map(|(name, n)| (name, backend.zero_codes(n))).collect(),
        }
    }
}

/// What all tensors of a step share.
#[derive(Clone, Copy)]
pub(crate) struct StepRates {
    pub(crate) lr: f64,
    /// Counted from 1.
    pub(crate) step: u64,
    /// What clipping leaves of the gradient.
    pub(crate) grad_scale: f32,
}

impl<B: Backend> Slot<B> {
    /// Changes the tensor in `p` by its gradient in `g`.
    pub(crate) fn step(
        &mut self,
        backend: &B,
        optimizer: &OptimizerConfig,
        p: &mut B::Buf,
        g: &B::Buf,
        rates: StepRates,
        scratch: Option<&mut MuonScratch<B>>,
    ) {
        let at = self.info.offset;
        let lr = rates.lr * self.rates.lr_scale;
        let weight_decay = self.rates.weight_decay;
        let StepRates { step, grad_scale, .. } = rates;
        let adamw = |config: AdamWConfig, lr: f64| {
            let AdamWConfig { beta1, beta2, eps, .. } = config;
            AdamW { lr, beta1, beta2, eps, weight_decay, step, grad_scale }
        };
        let state = (self.state.values.as_mut_slice(), self.state.codes.as_mut_slice());
        match (optimizer, state) {
            (OptimizerConfig::AdamW(config), ([(_, m), (_, v)], _)) => {
                backend.adamw(p, g, at, m, v, adamw(*config, lr));
            }
            (OptimizerConfig::AdamW8bit(config), ([(_, m), (_, v)], [])) => {
                backend.adamw(p, g, at, m, v, adamw(config.adamw(), lr));
            }
            (OptimizerConfig::AdamW8bit(config), ([(_, m_max), (_, v_max)], [(_, m), (_, v)])) => {
                let update = adamw(config.adamw(), lr);
                backend.adamw_8bit(p, g, at, [(m, m_max), (v, v_max)], update);
            }
            (OptimizerConfig::Lion(config), ([(_, m)], _)) => {
                let (beta1, beta2) = (config.beta1, config.beta2);
                backend.lion(p, g, at, m, Lion { lr, beta1, beta2, weight_decay, grad_scale });
            }
            (OptimizerConfig::Sgd(config), (values, _)) => {
                let (first, SgdConfig { momentum, dampening, nesterov, .. }) = (step == 1, *config);
                let update =
                    Sgd { lr, momentum, dampening, nesterov, weight_decay, first, grad_scale };
                let m = values.first_mut().map(|(_, m)| m);
                backend.sgd(p, g, at..at + self.info.n_values(), m, update);
            }
            (OptimizerConfig::Adafactor(config), (values, _)) => {
                let update = adafactor(config, lr, weight_decay, rates);
                let (second, first) = match (self.info.shape.len(), values) {
                    (2, [(_, row), (_, col), first @ ..]) => {
                        (SecondMoment::Factored(row, col), first)
                    }
                    (_, [(_, v), first @ ..]) => (SecondMoment::Full(v), first),
                    _ => unreachable!("a second moment is always kept"),
                };
                let first = first.first_mut().map(|(_, m)| m);
                backend.adafactor(p, g, at, second, first, update);
            }
            (OptimizerConfig::Muon(config), ([(_, m)], _)) => {
                let matrix = Matrix { at, rows: self.info.shape[0], cols: self.info.shape[1] };
                let step = MuonStep { lr, weight_decay, grad_scale };
                let scratch = scratch.expect("made for Muon");
                muon::step(backend, config, (p, g), m, matrix, step, scratch);
            }
            (OptimizerConfig::Muon(config), ([(_, m), (_, v)], _)) => {
                let update = adamw(config.adamw, lr * config.adamw_lr_scale);
                backend.adamw(p, g, at, m, v, update);
            }
            _ => unreachable!("a state is made for its rule"),
        }
    }
}

/// Adafactor's step.
fn adafactor(config: &AdafactorConfig, lr: f64, weight_decay: f64, rates: StepRates) -> Adafactor {
    Adafactor {
        lr,
        beta2: 1.0 - (rates.step as f64).powf(config.decay_rate),
        beta1: config.beta1.unwrap_or_default(),
        eps: config.eps1,
        scale_min: config.scale_parameter.then_some(config.eps2),
        clip_threshold: config.clip_threshold,
        weight_decay,
        grad_scale: rates.grad_scale,
    }
}
