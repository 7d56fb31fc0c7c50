//! Products with a 4-bit weight: a panel of rows is dequantised, multiplied, and forgotten.

use std::cell::Cell;

use rayon::prelude::*;

use super::{Cpu, CpuBuf};
use crate::quant::{Quantized, ValueType};
use crate::{Backend, Compute, Mat, MatMut, Op};

/// Values of a panel: 4 MiB, to stay in the shared cache, and deep enough that the product spends
/// ten times as long on a panel as its dequantisation from about a hundred tokens on.
const PANEL_VALUES: usize = 1 << 20;

/// Fewest rows of a panel, however wide.
const PANEL_ROWS_MIN: usize = 16;

/// Rows of X from which a panel is transposed before it is multiplied: a product with a narrow
/// transposed factor packs it again for every 64 rows, which costs two thirds of its speed.
const TURN_ROWS_MIN: usize = 32;

/// Columns that one task transposes: a cache line.
const TURN_COLUMNS: usize = 16;

thread_local! {
    /// The panel of the thread that asks for the product, kept from call to call.
    static PANEL: Cell<CpuBuf> = Cell::default();
    /// The panel transposed.
    static TURNED: Cell<CpuBuf> = Cell::default();
}

/// `to` (cols, rows) <- the transpose of `from` (rows, cols).
fn turn(from: &[f32], (rows, cols): (usize, usize), to: &mut CpuBuf) {
    if to.len() < rows * cols {
        *to = CpuBuf::zeros(rows * cols);
    }
    // A strip of columns is read a cache line at a time and written in whole rows.
    let strips = to[..rows * cols].par_chunks_mut(TURN_COLUMNS * rows).enumerate();
    strips.for_each(|(strip, to)| {
        let start = strip * TURN_COLUMNS;
        let width = to.len() / rows;
        for (i, from) in from.chunks_exact(cols).take(rows).enumerate() {
            for (j, &value) in from[start..start + width].iter().enumerate() {
                to[j * rows + i] = value;
            }
        }
    });
}

/// Matrices (rows, in), each quantised on its own, one below the other.
#[derive(Clone, Debug)]
pub(super) struct Stack {
    parts: Vec<Quantized>,
    inp: usize,
}

impl Stack {
    /// The parts must be whole rows of `inp` values.
    pub(super) fn new(parts: Vec<Quantized>, inp: usize) -> Self {
        assert!(inp > 0 && parts.iter().all(|part| part.len().is_multiple_of(inp)), "no rows");
        Stack { parts, inp }
    }

    /// Values of a row.
    pub(super) fn inp(&self) -> usize {
        self.inp
    }

    /// The part that has row `row` of all, and where in it the row starts.
    pub(super) fn row(&self, row: usize) -> (&Quantized, usize) {
        let mut at = row * self.inp;
        for part in &self.parts {
            if at < part.len() {
                return (part, at);
            }
            at -= part.len();
        }
        unreachable!("there are {} rows, not {row}", self.rows())
    }

    /// Whether bf16 values come of one rounding of code value times scale.
    pub(super) fn rounds_to_bf16_once(&self) -> bool {
        self.parts.iter().all(|part| part.spec().values != ValueType::F16)
    }

    /// Bytes of codes and scales.
    pub(super) fn n_bytes(&self) -> usize {
        self.parts.iter().map(|part| part.codes().len() + part.scales().n_bytes()).sum()
    }

    /// Rows of all parts.
    pub(super) fn rows(&self) -> usize {
        self.parts.iter().map(|part| part.len() / self.inp).sum()
    }

    /// All values.
    pub(super) fn dequantize(&self) -> Vec<f32> {
        self.parts.iter().flat_map(Quantized::dequantize).collect()
    }

    /// `Y (T, out) <- X (T, in) Wt + beta * Y`.
    pub(super) fn linear(&self, cpu: &Cpu, x: Mat<'_, Cpu>, y: MatMut<'_, Cpu>, beta: f32) {
        let MatMut { buf, offset, rows, cols, stride } = y;
        assert!(x.rows == rows && x.cols == self.inp && cols == self.rows());
        let mut turned = TURNED.take();
        self.panels(|start, n, panel| {
            let offset = offset + start;
            let y = MatMut { buf: &mut *buf, offset, rows, cols: n, stride };
            // A product in bf16 packs a factor in either layout, once for many rows.
            if rows < TURN_ROWS_MIN || cpu.compute() == Compute::Bf16 {
                cpu.gemm(x, Op::N, Mat::new(panel, n, self.inp), Op::T, y, 1.0, beta);
            } else {
                turn(panel, (n, self.inp), &mut turned);
                cpu.gemm(x, Op::N, Mat::new(&turned, self.inp, n), Op::N, y, 1.0, beta);
            }
        });
        TURNED.set(turned);
    }

    /// `dX (T, in) <- dY (T, out) W + beta * dX`, added up panel after panel.
    pub(super) fn linear_dx(&self, cpu: &Cpu, dy: Mat<'_, Cpu>, dx: MatMut<'_, Cpu>, beta: f32) {
        let MatMut { buf, offset, rows, cols, stride } = dx;
        assert!(dy.rows == rows && dy.cols == self.rows() && cols == self.inp);
        self.panels(|start, n, panel| {
            let part = Mat { buf: dy.buf, offset: dy.offset + start, cols: n, ..dy };
            let dx = MatMut { buf: &mut *buf, offset, rows, cols, stride };
            let beta = if start == 0 { beta } else { 1.0 };
            cpu.gemm(part, Op::N, Mat::new(panel, n, self.inp), Op::N, dx, 1.0, beta);
        });
    }

    /// Calls `multiply(first row, number of rows, those rows of W)` for one panel after another. A
    /// panel may hold the end of one part and the beginning of the next.
    fn panels(&self, mut multiply: impl FnMut(usize, usize, &CpuBuf)) {
        let rows = self.rows();
        let panel_rows = (PANEL_VALUES / self.inp).max(PANEL_ROWS_MIN).min(rows);
        // Taken, not borrowed: while this thread waits for others inside a product, it may be
        // given work that asks for a product too.
        let mut panel = PANEL.take();
        if panel.len() < panel_rows * self.inp {
            panel = CpuBuf::zeros(panel_rows * self.inp);
        }
        for start in (0..rows).step_by(panel_rows.max(1)) {
            let n_rows = panel_rows.min(rows - start);
            self.dequantize_rows(start, &mut panel[..n_rows * self.inp]);
            multiply(start, n_rows, &panel);
        }
        PANEL.set(panel);
    }

    /// `out` <- as many whole rows as it holds, from row `start`.
    pub(super) fn dequantize_rows(&self, start: usize, mut out: &mut [f32]) {
        let mut at = start * self.inp;
        for part in &self.parts {
            if at >= part.len() {
                at -= part.len();
                continue;
            }
            let (now, later) = out.split_at_mut(out.len().min(part.len() - at));
            part.dequantize_into(at, now);
            (out, at) = (later, 0);
        }
    }
}
