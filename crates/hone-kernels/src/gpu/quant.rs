//! Weights of four bits; `kernels/nf4.cu`.

use super::{Arg, Device, Gpu, GpuBuf, Launch, THREADS, Uploaded, blocks, over, view, view_mut};
use crate::quant::{Quantized, Scales, ValueType};
use crate::{Compute, Mat, MatMut, Onto};

/// Most rows of X that are multiplied by codes as they are: up to here a product waits for its weight, and
/// codes are a quarter of it.
pub(super) const FEW_ROWS_MAX: usize = 4;

/// Values that a thread dequantises at once.
const UNIT: usize = 8;

/// Most blocks that dequantise: enough for every GPU, and few enough that reading the tables does not
/// count.
const BLOCKS_MAX: u32 = 1 << 11;

/// Rows of a weight that a block of the product has: one a warp.
const BLOCK_ROWS: usize = THREADS / 32;

/// A matrix on the device as [`Quantized`] has it, and which rows of the whole weight it is.
struct Part<D: Device> {
    codes: Uploaded<D>,
    scales: Uploaded<D>,
    /// Of double quantisation.
    scale_codes: Option<Uploaded<D>>,
    /// The code values, and the map of double quantisation behind them.
    tables: Uploaded<D>,
    offset: f32,
    block: usize,
    values: ValueType,
    start: usize,
    rows: usize,
}

impl<D: Device> Part<D> {
    fn new(gpu: &Gpu<D>, part: &Quantized, (start, rows): (usize, usize)) -> Self {
        let (spec, mut tables) = (part.spec(), part.spec().book.values().to_vec());
        let (scales, scale_codes, offset) = match part.scales() {
            Scales::Plain(absmax) => (absmax, None, 0.0),
            Scales::Nested(nested) => {
                assert_eq!(nested.map.len(), 256, "a value for every code of a byte");
                tables.extend(&nested.map);
                (&nested.absmax, Some(gpu.put(nested.codes.clone())), nested.offset)
            }
        };
        Part {
            codes: gpu.put(part.codes().to_vec()),
            scales: gpu.put_f32(scales),
            scale_codes,
            tables: gpu.put_f32(&tables),
            offset,
            block: spec.block,
            values: spec.values,
            start,
            rows,
        }
    }

    /// Arguments of every kernel.
    fn args(&self) -> [Arg; 7] {
        let Part { codes, scales, scale_codes, tables, offset, block, values, .. } = self;
        assert!(block.is_power_of_two() && block.is_multiple_of(UNIT), "blocks of {block}");
        let values = match values {
            ValueType::F32 => 0,
            ValueType::Bf16 => 1,
            ValueType::F16 => 2,
        };
        let scale_codes = scale_codes.as_ref().map_or(Arg::pointer(0), Uploaded::arg);
        let shift = block.trailing_zeros().cast_signed();
        let offset = (*offset).into();
        [codes.arg(), scales.arg(), scale_codes, tables.arg(), offset, shift.into(), values.into()]
    }
}

/// Matrices (rows, in), each quantised on its own, one below the other, and what their values are rounded
/// to when they are multiplied.
pub(super) struct Stack<D: Device> {
    parts: Vec<Part<D>>,
    rows: usize,
    inp: usize,
    holds: Compute,
    bytes: usize,
}

impl<D: Device> Stack<D> {
    /// The parts must be whole rows of `inp` values.
    pub(super) fn new(gpu: &Gpu<D>, parts: Vec<Quantized>, inp: usize) -> Self {
        assert!(inp > 0 && parts.iter().all(|part| part.len().is_multiple_of(inp)), "no rows");
        let bytes = parts.iter().map(|part| part.codes().len() + part.scales().n_bytes()).sum();
        let (mut there, mut start) = (Vec::with_capacity(parts.len()), 0);
        for part in parts.iter().filter(|part| !part.is_empty()) {
            let rows = part.len() / inp;
            there.push(Part::new(gpu, part, (start, rows)));
            start += rows;
        }
        Stack { parts: there, rows: start, inp, holds: gpu.compute, bytes }
    }

    /// Rows of all parts.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Bytes of codes and scales.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes as u64
    }

    /// Calls `run` with all values, which lie there until the next weight does.
    pub(super) fn whole<T>(&self, gpu: &Gpu<D>, run: impl FnOnce(&GpuBuf<D>) -> T) -> T {
        gpu.with_scratch(self.rows * self.inp, self.holds, |buf| {
            for part in &self.parts {
                let n = part.rows * self.inp;
                let grid = over(n.div_ceil(UNIT)).grid[0].min(BLOCKS_MAX);
                let launch = Launch { grid: [grid, 1, 1], shared_bytes: 0 };
                let to = [n.into(), buf.part(part.start * self.inp, n)];
                let args = [&part.args()[..], &to].concat();
                gpu.launch("nf4_dequantise", &[self.holds], launch, &args);
            }
            run(buf)
        })
    }

    /// `y (ids.len(), in) <- rows ids`.
    pub(super) fn gather(&self, gpu: &Gpu<D>, ids: &[u32], y: &mut GpuBuf<D>) {
        let rows = self.rows;
        assert!(ids.iter().all(|&id| (id as usize) < rows), "an id outside of {rows}");
        let (there, rounds) = (gpu.put_u32(ids), self.holds == Compute::Bf16);
        for part in &self.parts {
            let place = [part.start.into(), part.rows.into(), self.inp.into()];
            let to = [there.arg(), rounds.into(), y.first(ids.len() * self.inp)];
            let args = [&part.args()[..], &place, &to].concat();
            gpu.launch("nf4_gather", &[y.holds], blocks(ids.len()), &args);
        }
    }

    /// `Y (T, out) <- X (T, in) Wt + onto` of few rows.
    pub(super) fn linear(
        &self,
        gpu: &Gpu<D>,
        x: Mat<'_, Gpu<D>>,
        y: MatMut<'_, Gpu<D>>,
        onto: Onto<'_, Gpu<D>>,
    ) {
        assert!(x.rows == y.rows && x.cols == self.inp && y.cols == self.rows, "(T, in), (T, out)");
        let (from, to) = (view(gpu, &x), view_mut(gpu, &y));
        if y.rows == 0 || self.rows == 0 {
            return;
        }
        let kernel = ["nf4_linear_1", "nf4_linear_2", "nf4_linear_3", "nf4_linear_4"][x.rows - 1];
        let rounds = self.holds == Compute::Bf16;
        for part in &self.parts {
            // Values of Y, and of what it is added to.
            let values = (y.rows - 1) * y.stride + part.rows;
            let (c, c_stride, beta) = match onto {
                Onto::Old(beta) => (y.buf.part(y.offset + part.start, values), y.stride, beta),
                Onto::Buf(c) => {
                    assert!(c.holds == y.buf.holds, "values of the same kind");
                    assert!(y.offset == 0 && y.stride == y.cols, "the result lies dense");
                    (c.part(part.start, values), y.cols, 1.0)
                }
            };
            let of_x = [part.rows.into(), self.inp.into(), from.at, from.stride, rounds.into()];
            let of_y = [
                c,
                c_stride.into(),
                beta.into(),
                y.buf.part(y.offset + part.start, values),
                to.stride,
            ];
            let args = [&part.args()[..], &of_x, &of_y].concat();
            let launch = blocks(part.rows.div_ceil(BLOCK_ROWS));
            gpu.launch(kernel, &[from.holds, to.holds], launch, &args);
        }
    }
}
