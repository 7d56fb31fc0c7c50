//! What the update rules and the loss are told: their rates, their options, their 8-bit states.

use std::sync::OnceLock;

use crate::Backend;

/// One step of Lion (Chen et al. 2023); see [`Backend::lion`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lion {
    /// Learning rate of this step.
    pub lr: f64,
    /// Share of the momentum in the direction of the step.
    pub beta1: f64,
    /// Decay of the momentum.
    pub beta2: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Factor applied to the gradient first (clipping).
    pub grad_scale: f32,
}

/// One step of stochastic gradient descent; see [`Backend::sgd`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sgd {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the momentum.
    pub momentum: f64,
    /// Share of the gradient that does not enter the momentum.
    pub dampening: f64,
    /// Whether the step looks ahead along the momentum (Nesterov).
    pub nesterov: bool,
    /// Weight decay, added to the gradient as in PyTorch.
    pub weight_decay: f64,
    /// Whether the momentum is empty: it then starts as the gradient itself.
    pub first: bool,
    /// Factor applied to the gradient first (clipping).
    pub grad_scale: f32,
}

/// One step of Adafactor (Shazeer and Stern 2018); see [`Backend::adafactor`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adafactor {
    /// Step size before it is scaled by the tensor's root mean square.
    pub lr: f64,
    /// Decay of the second moment at this step, 1 - t^-0.8.
    pub beta2: f64,
    /// Decay of the first moment, where one is kept.
    pub beta1: f64,
    /// Added to the squared gradient.
    pub eps: f64,
    /// Least root mean square that scales the step; `None` does not scale it.
    pub scale_min: Option<f64>,
    /// Largest root mean square of the step before it is multiplied by its size.
    pub clip_threshold: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Factor applied to the gradient first (clipping).
    pub grad_scale: f32,
}

/// Adafactor's second moment.
pub enum SecondMoment<'a, B: Backend> {
    /// Of a matrix (rows, cols): the means of its rows (rows) and of its columns (cols).
    Factored(&'a mut B::Buf, &'a mut B::Buf),
    /// Of anything else: every value.
    Full(&'a mut B::Buf),
}

impl<B: Backend> SecondMoment<'_, B> {
    /// Values of the tensor that it belongs to.
    pub fn n_values(&self, backend: &B) -> usize {
        match self {
            SecondMoment::Factored(row, col) => backend.len(row) * backend.len(col),
            SecondMoment::Full(v) => backend.len(v),
        }
    }
}

/// What is added to cross-entropy; the default adds nothing. See [`Backend::cross_entropy_with`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossOptions {
    /// e, the share of the target that is spread over the vocabulary (Szegedy et al. 2016).
    pub label_smoothing: f32,
    /// l, the weight of the squared log-sum-exp (Chowdhery et al. 2022).
    pub z_loss: f32,
    /// Whether a token's cross-entropy is multiplied by its own probability, held constant (Wu et
    /// al. 2025: dynamic fine-tuning).
    pub reweight: bool,
    /// c: logits become c tanh(z / c) first (Gemma 2).
    pub soft_cap: Option<f32>,
}

impl LossOptions {
    /// Whether this is plain cross-entropy.
    pub fn is_plain(&self) -> bool {
        *self == LossOptions::default()
    }
}

/// Values that share one scale in an 8-bit state.
pub const CODE_BLOCK: usize = 256;

/// The 256 values of an 8-bit state, rising, and the midpoints between neighbours: a value takes
/// the code whose neighbours' midpoints enclose it, the lower one when it lies on one.
#[derive(Clone, Debug)]
pub struct CodeBook {
    /// What a code stands for, relative to the largest magnitude of its block.
    pub values: [f32; 256],
    /// Midpoints.
    pub bounds: [f32; 255],
    /// For each value of the upper half of an f32's bits, the code of the least f32 that has it.
    starts: Box<[u8; 1 << 16]>,
    /// The midpoints, and enough of infinity behind them for [`CodeBook::code`] to look ahead.
    ahead: [f32; 256 + AHEAD],
}

/// Most midpoints between two f32 that have the upper half of their bits in common: the halves hold
/// eight bits of the fraction, and a book has fewer codes from one power of two to the next.
const AHEAD: usize = 2;

/// Decades that the codes reach down: six powers of ten below one.
const DECADES: i32 = 7;

impl CodeBook {
    /// The signed dynamic tree map of Dettmers et al. (2022), for first moments.
    pub fn signed() -> &'static CodeBook {
        static BOOK: OnceLock<CodeBook> = OnceLock::new();
        BOOK.get_or_init(|| CodeBook::new(true))
    }

    /// The unsigned one, for second moments.
    pub fn unsigned() -> &'static CodeBook {
        static BOOK: OnceLock<CodeBook> = OnceLock::new();
        BOOK.get_or_init(|| CodeBook::new(false))
    }

    /// For decade i from -6 to 0: the midpoints of 2^k equal cells of [0.1, 1] times 10^i, with as
    /// many cells as 8 bits leave, and 0 and 1. The bits are those of bitsandbytes'
    /// `create_dynamic_map`.
    fn new(signed: bool) -> Self {
        let mut codes = vec![0.0, 1.0];
        for decade in 0..DECADES {
            let n_cells = 1_usize << (decade + i32::from(!signed));
            let scale = 10.0_f64.powi(decade - (DECADES - 1)) as f32;
            let edges = edges(n_cells);
            for pair in edges.windows(2) {
                let value = scale * ((pair[0] + pair[1]) / 2.0);
                codes.push(value);
                if signed {
                    codes.push(-value);
                }
            }
        }
        codes.sort_by(f32::total_cmp);
        let values: [f32; 256] = codes.try_into().expect("2 and 2^8 - 2 values");
        let bounds: [f32; 255] = std::array::from_fn(|i| (values[i] + values[i + 1]) / 2.0);
        let mut ahead = [f32::INFINITY; 256 + AHEAD];
        ahead[..255].copy_from_slice(&bounds);
        let starts = (0..=u16::MAX).map(|half| {
            let least =
                f32::from_bits(u32::from(half) << 16 | if half >> 15 == 1 { 0xffff } else { 0 });
            bounds.partition_point(|&bound| bound < least) as u8
        });
        let starts: Vec<u8> = starts.collect();
        let starts = starts.into_boxed_slice().try_into().expect("all halves");
        CodeBook { bounds, values, starts, ahead }
    }

    /// The code of a value from -1 to 1: the number of midpoints below it.
    #[inline(always)]
    pub fn code(&self, x: f32) -> u8 {
        let mut code = self.starts[(x.to_bits() >> 16) as usize];
        for _ in 0..AHEAD {
            code += u8::from(self.ahead[usize::from(code)] < x);
        }
        code
    }
}

/// The edges of `n` equal cells of [0.1, 1] as `torch.linspace` rounds them: from both ends, each
/// with one rounding.
fn edges(n: usize) -> Vec<f32> {
    let step = (1.0 - 0.1_f32) / n as f32;
    let edge = |i: usize| match i < n.div_ceil(2) {
        true => step.mul_add(i as f32, 0.1),
        false => (-step).mul_add((n - i) as f32, 1.0),
    };
    (0..=n).map(edge).collect()
}
