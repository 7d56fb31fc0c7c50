//! Block-wise quantisation to 4 bits, bit for bit as bitsandbytes does it on a CPU.
//!
//! A tensor is cut into blocks of its flat values. Of each block the largest magnitude is kept
//! (absmax, f32), and of each value the nearest of 16 code values times absmax: NF4, the quantiles
//! of a normal distribution (Dettmers et al. 2023), or FP4, a float of one sign, two exponent and
//! one mantissa bits. Two codes make a byte, the first value in the high half. "Double
//! quantisation" stores the absmax in 8 bits too: less their mean, in blocks of 256, each by the
//! nearest of 256 values of a dynamic tree (Dettmers et al. 2022).
//!
//! What "bit for bit" means: codes, absmax and values are those of bitsandbytes 0.50 on x86-64,
//! including how it rounds at the middle between two codes, that the last block of an uneven tensor
//! is divided and not multiplied by a reciprocal, and that PyTorch adds up the mean in eight lanes
//! (on one thread; with several, PyTorch's mean depends on their number and this one does not).

mod sum;
mod tables;

use half::{bf16, f16};
use rayon::prelude::*;

use tables::{DYNAMIC_STEPS, dynamic_nearest};
pub use tables::{FP4, NF4, dynamic_map};

/// Values per block of double quantisation.
pub const NESTED_BLOCK: usize = 256;

/// Block sizes that bitsandbytes knows.
pub const BLOCKS: [usize; 8] = [32, 64, 128, 256, 512, 1024, 2048, 4096];

/// What absmax is raised to before it divides, so that a block of zeros gives zeros; smaller than
/// the smallest normal f32.
const ABSMAX_MIN: f32 = 1e-38;

/// Values that one task handles: a multiple of every block size.
const TASK_VALUES: usize = 1 << 14;

/// The 16 code values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodeBook {
    /// NormalFloat: what QLoRA uses.
    Nf4,
    /// A 4-bit float, over its largest value.
    Fp4,
}

impl CodeBook {
    /// The name in files: `nf4`, `fp4`.
    pub fn name(self) -> &'static str {
        match self {
            CodeBook::Nf4 => "nf4",
            CodeBook::Fp4 => "fp4",
        }
    }

    /// The value of each code.
    pub fn values(self) -> &'static [f32; 16] {
        match self {
            CodeBook::Nf4 => &NF4,
            CodeBook::Fp4 => &FP4,
        }
    }
}

/// What dequantised values are rounded to: the type that the weight had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ValueType {
    /// Not at all.
    F32,
    /// bfloat16, to nearest even.
    Bf16,
    /// IEEE half precision, to nearest even.
    F16,
}

impl ValueType {
    /// PyTorch's name.
    pub fn name(self) -> &'static str {
        match self {
            ValueType::F32 => "float32",
            ValueType::Bf16 => "bfloat16",
            ValueType::F16 => "float16",
        }
    }

    /// `x` rounded.
    pub fn round(self, x: f32) -> f32 {
        match self {
            ValueType::F32 => x,
            ValueType::Bf16 => bf16::from_f32(x).to_f32(),
            ValueType::F16 => f16::from_f32(x).to_f32(),
        }
    }
}

/// How a tensor is quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuantSpec {
    /// Code values.
    pub book: CodeBook,
    /// Values per block; one of [`BLOCKS`].
    pub block: usize,
    /// Whether absmax is quantised too.
    pub nested: bool,
    /// What dequantised values are rounded to.
    pub values: ValueType,
}

impl QuantSpec {
    /// QLoRA's: NF4 in blocks of 64, double quantisation.
    pub fn qlora(values: ValueType) -> Self {
        QuantSpec { book: CodeBook::Nf4, block: 64, nested: true, values }
    }

    /// Bytes of `n` quantised values and their scales.
    pub fn n_bytes(&self, n: usize) -> usize {
        let blocks = n.div_ceil(self.block);
        let scales = match self.nested {
            false => 4 * blocks,
            true => blocks + 4 * blocks.div_ceil(NESTED_BLOCK) + 4 * (DYNAMIC_STEPS + 1),
        };
        n.div_ceil(2) + scales
    }
}

/// The absmax of every block.
#[derive(Clone, Debug, PartialEq)]
pub enum Scales {
    /// As they are.
    Plain(Vec<f32>),
    /// Quantised in their turn.
    Nested(NestedScales),
}

impl Scales {
    /// Bytes that they take.
    pub fn n_bytes(&self) -> usize {
        match self {
            Scales::Plain(absmax) => 4 * absmax.len(),
            Scales::Nested(nested) => {
                let NestedScales { codes, absmax, map, offset: _ } = nested;
                codes.len() + 4 * (absmax.len() + map.len() + 1)
            }
        }
    }
}

/// Quantised absmax: block i has `map[codes[i]] * absmax[i / 256] + offset`.
#[derive(Clone, Debug, PartialEq)]
pub struct NestedScales {
    /// One code per block.
    pub codes: Vec<u8>,
    /// Largest magnitude of every [`NESTED_BLOCK`] blocks' absmax less the mean.
    pub absmax: Vec<f32>,
    /// The mean of the absmax.
    pub offset: f32,
    /// The 256 code values, [`dynamic_map`] as a rule.
    pub map: Vec<f32>,
}

/// Why values could not be quantised, or parts of a quantised tensor do not fit each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum QuantError {
    /// A value is NaN or infinite.
    NotFinite {
        /// Flat index of the first.
        index: usize,
    },
    /// A block size that is none of [`BLOCKS`].
    Block(usize),
    /// A part has another length than the tensor's size says.
    Length {
        /// `codes`, `absmax`, `nested absmax` or `nested map`.
        part: &'static str,
        /// Its length.
        found: usize,
        /// The length it must have.
        expected: usize,
    },
    /// A scale is NaN or infinite.
    Scale {
        /// Index of the first such block.
        block: usize,
    },
}

impl std::fmt::Display for QuantError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            QuantError::NotFinite { index } => {
                write!(f, "the value at index {index} is not finite")
            }
            QuantError::Block(block) => {
                write!(f, "a block size of {block} is not one of {BLOCKS:?}")
            }
            QuantError::Length { part, found, expected } => {
                write!(f, "{part} has {found} entries, the tensor's size asks for {expected}")
            }
            QuantError::Scale { block } => write!(f, "the scale of block {block} is not finite"),
        }
    }
}

impl std::error::Error for QuantError {}

/// A quantised tensor, flat.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantized {
    spec: QuantSpec,
    len: usize,
    codes: Vec<u8>,
    scales: Scales,
}

impl Quantized {
    /// Quantises `values`. Errors: a value that is not finite, an unknown block size.
    pub fn quantize(values: &[f32], spec: QuantSpec) -> Result<Self, QuantError> {
        check_block(spec.block)?;
        if let Some(index) = values.iter().position(|x| !x.is_finite()) {
            return Err(QuantError::NotFinite { index });
        }
        let bounds = tables::bounds(spec.book);
        let tasks: Vec<(Vec<u8>, Vec<f32>)> = values
            .par_chunks(TASK_VALUES)
            .map(|task| {
                let blocks = task.chunks(spec.block);
                let mut codes = Vec::with_capacity(task.len().next_multiple_of(2));
                let mut absmax = Vec::with_capacity(blocks.len());
                for block in blocks {
                    absmax.push(quantize_block(block, spec.block, &bounds, &mut codes));
                }
                (pack(&codes, bounds.zero()), absmax)
            })
            .collect();
        let mut codes = Vec::with_capacity(values.len().div_ceil(2));
        let mut absmax = Vec::with_capacity(values.len().div_ceil(spec.block));
        for (task_codes, task_absmax) in tasks {
            codes.extend(task_codes);
            absmax.extend(task_absmax);
        }
        let scales = match spec.nested {
            false => Scales::Plain(absmax),
            true => Scales::Nested(NestedScales::quantize(absmax)),
        };
        Ok(Quantized { spec, len: values.len(), codes, scales })
    }

    /// A tensor of `len` values from its parts, as a file holds them; `spec.nested` follows
    /// `scales`.
    pub fn from_parts(
        spec: QuantSpec,
        len: usize,
        codes: Vec<u8>,
        scales: Scales,
    ) -> Result<Self, QuantError> {
        check_block(spec.block)?;
        let blocks = len.div_ceil(spec.block);
        let length = |part, found, expected| match found == expected {
            true => Ok(()),
            false => Err(QuantError::Length { part, found, expected }),
        };
        length("codes", codes.len(), len.div_ceil(2))?;
        match &scales {
            Scales::Plain(absmax) => length("absmax", absmax.len(), blocks)?,
            Scales::Nested(nested) => {
                length("absmax", nested.codes.len(), blocks)?;
                let expected = blocks.div_ceil(NESTED_BLOCK);
                length("nested absmax", nested.absmax.len(), expected)?;
                length("nested map", nested.map.len(), DYNAMIC_STEPS)?;
            }
        }
        let spec = QuantSpec { nested: matches!(scales, Scales::Nested(_)), ..spec };
        let tensor = Quantized { spec, len, codes, scales };
        match (0..blocks).find(|&block| !tensor.absmax(block).is_finite()) {
            Some(block) => Err(QuantError::Scale { block }),
            None => Ok(tensor),
        }
    }

    /// The same codes and scales, dequantised to another type.
    pub fn with_values(self, values: ValueType) -> Self {
        Quantized { spec: QuantSpec { values, ..self.spec }, ..self }
    }

    /// How it is quantised.
    pub fn spec(&self) -> QuantSpec {
        self.spec
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Two codes a byte, the first value in the high half.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// The scales as stored.
    pub fn scales(&self) -> &Scales {
        &self.scales
    }

    /// The absmax of one block.
    pub fn absmax(&self, block: usize) -> f32 {
        match &self.scales {
            Scales::Plain(absmax) => absmax[block],
            Scales::Nested(nested) => nested.absmax(block),
        }
    }

    /// All values.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.len];
        self.dequantize_into(0, &mut out);
        out
    }

    /// `out <- values[start .. start + out.len()]`.
    pub fn dequantize_into(&self, start: usize, out: &mut [f32]) {
        assert!(start + out.len() <= self.len, "{start} + {} of {}", out.len(), self.len);
        if out.len() <= TASK_VALUES {
            return self.dequantize_run(start, out);
        }
        let tasks = out.par_chunks_mut(TASK_VALUES).enumerate();
        tasks.for_each(|(task, out)| self.dequantize_run(start + task * TASK_VALUES, out));
    }

    /// [`Quantized::dequantize_into`] on one thread, block by block.
    fn dequantize_run(&self, start: usize, out: &mut [f32]) {
        let QuantSpec { book, block, values, .. } = self.spec;
        let (mut at, end) = (start, start + out.len());
        while at < end {
            let stop = end.min((at / block + 1) * block);
            let absmax = self.absmax(at / block);
            let table = book.values().map(|value| values.round(value * absmax));
            let code = |i: usize| usize::from(self.codes[i / 2] >> (4 * (1 - i % 2)) & 15);
            let mut run = &mut out[at - start..stop - start];
            if at % 2 == 1 {
                run[0] = table[code(at)];
                run = &mut run[1..];
                at += 1;
            }
            let codes = &self.codes[at / 2..];
            let mut pairs = run.chunks_exact_mut(2);
            for (pair, &byte) in pairs.by_ref().zip(codes) {
                pair[0] = table[usize::from(byte >> 4)];
                pair[1] = table[usize::from(byte & 15)];
            }
            if let [last] = pairs.into_remainder() {
                *last = table[code(stop - 1)];
            }
            at = stop;
        }
    }
}

impl NestedScales {
    /// Quantises the absmax of all blocks.
    fn quantize(mut absmax: Vec<f32>) -> Self {
        let map = dynamic_map();
        let offset = sum::mean(&absmax);
        absmax.iter_mut().for_each(|x| *x -= offset);
        let mut codes = Vec::with_capacity(absmax.len());
        let mut tops = Vec::with_capacity(absmax.len().div_ceil(NESTED_BLOCK));
        let nearest = dynamic_nearest(&map);
        for block in absmax.chunks(NESTED_BLOCK) {
            let top = block.iter().fold(0.0_f32, |top, x| top.max(x.abs()));
            tops.push(top);
            if top == 0.0 {
                // What bitsandbytes writes for a block of zeros: code 0, times a scale of 0.
                codes.extend(std::iter::repeat_n(0, block.len()));
                continue;
            }
            let inverse = 1.0 / top;
            codes.extend(block.iter().map(|x| nearest.code(x * inverse)));
        }
        NestedScales { codes, absmax: tops, offset, map }
    }

    /// The absmax of one block.
    fn absmax(&self, block: usize) -> f32 {
        let value = self.map[usize::from(self.codes[block])];
        value * self.absmax[block / NESTED_BLOCK] + self.offset
    }
}

fn check_block(block: usize) -> Result<(), QuantError> {
    if BLOCKS.contains(&block) { Ok(()) } else { Err(QuantError::Block(block)) }
}

/// Appends the codes of one block and returns its absmax. A block shorter than `whole` is the
/// tensor's last.
fn quantize_block(
    block: &[f32],
    whole: usize,
    bounds: &tables::Bounds,
    codes: &mut Vec<u8>,
) -> f32 {
    let top = block.iter().fold(0.0_f32, |top, x| top.max(x.abs()));
    let raised = top.max(ABSMAX_MIN);
    if block.len() < whole {
        codes.extend(block.iter().map(|x| bounds.code((x / raised).clamp(-1.0, 1.0))));
        return raised;
    }
    let inverse = 1.0 / raised;
    codes.extend(block.iter().map(|x| bounds.code((x * inverse).clamp(-1.0, 1.0))));
    top
}

/// Two codes a byte; an odd last one is filled up with `zero`, the code of a zero.
fn pack(codes: &[u8], zero: u8) -> Vec<u8> {
    let pair = |pair: &[u8]| pair[0] << 4 | pair.get(1).copied().unwrap_or(zero);
    codes.chunks(2).map(pair).collect()
}
