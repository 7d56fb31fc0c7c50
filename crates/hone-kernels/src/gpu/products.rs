//! Products of matrices and the weights that are made for them.

use super::quant::{FEW_ROWS_MAX, Stack};
use super::{Device, Gpu, GpuBuf, Matrix, Product};
use crate::quant::Quantized;
use crate::shape::{layout, layout_mut};
use crate::{Backend, Compute, Mat, MatMut, Onto, Op, Tail};

/// A weight (out, in) that stays as it is: dense, in f32 or bf16, or quantised in 4 bits.
pub struct GpuFrozen<D: Device> {
    weight: Weight<D>,
    out: usize,
    inp: usize,
}

/// How it is kept.
enum Weight<D: Device> {
    Dense(GpuBuf<D>),
    Quantized(Stack<D>),
}

/// A factor as a product reads it: where it lies, or a copy that holds other values.
enum Factor<'a, D: Device> {
    There(Mat<'a, Gpu<D>>),
    Made(GpuBuf<D>, usize),
}

impl<D: Device> Factor<'_, D> {
    fn matrix(&self) -> Matrix {
        match self {
            Factor::There(m) => {
                Matrix { address: m.buf.address(m.offset.min(m.buf.len)), stride: m.stride }
            }
            Factor::Made(buf, cols) => Matrix { address: buf.address(0), stride: *cols },
        }
    }
}

impl<D: Device> Gpu<D> {
    /// `x` holding what products of `inputs` read.
    fn factor<'a>(&self, x: Mat<'a, Self>, inputs: Compute) -> Factor<'a, D> {
        if x.buf.holds == inputs {
            Factor::There(x)
        } else {
            Factor::Made(self.converted(x, inputs), x.cols)
        }
    }

    /// `Y <- alpha op(A) op(B) + beta C`, factors rounded to `inputs`; C is Y, or the start of a buffer.
    #[allow(clippy::too_many_arguments, reason = "the arguments of BLAS")]
    pub(super) fn multiply(
        &self,
        (a, op_a): (Mat<'_, Self>, Op),
        (b, op_b): (Mat<'_, Self>, Op),
        y: MatMut<'_, Self>,
        alpha: f32,
        onto: Onto<'_, Self>,
        inputs: Compute,
    ) {
        let (la, lb, ly) = (layout(self, &a), layout(self, &b), layout_mut(self, &y));
        let (m, k) = if op_a == Op::N { (la.rows, la.cols) } else { (la.cols, la.rows) };
        let (k_b, n) = if op_b == Op::N { (lb.rows, lb.cols) } else { (lb.cols, lb.rows) };
        assert!(k == k_b && m == ly.rows && n == ly.cols, "{la:?} {op_a:?} {lb:?} {op_b:?} {ly:?}");
        if m == 0 || n == 0 {
            return;
        }
        if k == 0 {
            self.leave(y, onto);
            return;
        }
        let (a, b) = (self.factor(a, inputs), self.factor(b, inputs));
        let to = Matrix { address: y.buf.address(y.offset), stride: y.stride };
        let (c, beta) = match onto {
            Onto::Old(beta) => (to, beta),
            Onto::Buf(x) => {
                assert!(
                    x.holds == y.buf.holds && x.len >= m * n,
                    "as many values of the same kind"
                );
                assert!(y.offset == 0 && y.stride == y.cols, "the result lies dense");
                (Matrix { address: x.address(0), stride: n }, 1.0)
            }
        };
        let product = Product {
            a: (a.matrix(), op_a),
            b: (b.matrix(), op_b),
            c,
            y: to,
            sides: (m, n, k),
            factors: (alpha, beta),
            inputs,
            output: y.buf.holds,
        };
        // SAFETY: the views were checked against their buffers, and Y is borrowed for writing.
        #[allow(unsafe_code, reason = "products are given addresses")]
        unsafe {
            self.device.product(&product);
        }
    }

    /// What a product of nothing leaves: `Y <- beta C`.
    fn leave(&self, mut y: MatMut<'_, Self>, onto: Onto<'_, Self>) {
        let (rows, cols) = (y.rows, y.cols);
        let kept = match onto {
            Onto::Old(0.0) => self.buf(rows * cols, Compute::F32),
            Onto::Old(beta) => {
                let MatMut { buf, offset, stride, .. } = y.again();
                let old = Mat { buf: &*buf, offset, rows, cols, stride };
                let mut kept = self.converted(old, Compute::F32);
                self.scale(&mut kept, beta, rows * cols);
                kept
            }
            Onto::Buf(x) => self.converted(Mat::new(x, rows, cols), Compute::F32),
        };
        self.copy_rows(Mat::new(&kept, rows, cols), y);
    }

    /// The product and its low-rank parts. These come first: where the result is rounded, it is the
    /// smaller part that is rounded twice.
    pub(super) fn multiply_with(
        &self,
        a: (Mat<'_, Self>, Op),
        b: (Mat<'_, Self>, Op),
        tails: &[Tail<'_, Self>],
        y: MatMut<'_, Self>,
        onto: Onto<'_, Self>,
        inputs: Compute,
    ) {
        self.with_tails(tails, y, onto, |y, onto| self.multiply(a, b, y, 1.0, onto, inputs));
    }

    /// The product `main` and low-rank parts. These come first: where the result is rounded, it is the
    /// smaller part that is rounded twice.
    fn with_tails(
        &self,
        tails: &[Tail<'_, Self>],
        mut y: MatMut<'_, Self>,
        onto: Onto<'_, Self>,
        main: impl FnOnce(MatMut<'_, Self>, Onto<'_, Self>),
    ) {
        let rounds = y.buf.holds == Compute::Bf16;
        if let (true, Onto::Old(beta), Some(fresh)) = (rounds, onto, share_out(tails, y.cols)) {
            for (tail, fresh) in tails.iter().zip(fresh) {
                let (u, v) = ((tail.u, Op::N), (tail.v, tail.op_v));
                let onto = Onto::Old(if fresh { beta } else { 1.0 });
                self.multiply(u, v, tail_columns(tail, &mut y), tail.scale, onto, self.compute);
            }
            main(y, Onto::Old(1.0));
            return;
        }
        main(y.again(), onto);
        for tail in tails {
            let (u, v, onto) = ((tail.u, Op::N), (tail.v, tail.op_v), Onto::Old(1.0));
            self.multiply(u, v, tail_columns(tail, &mut y), tail.scale, onto, self.compute);
        }
    }

    pub(super) fn frozen(&self, weight: &[f32], out: usize, inp: usize) -> GpuFrozen<D> {
        assert_eq!(weight.len(), out * inp);
        let mut buf = self.buf(weight.len(), self.compute);
        self.write_values(&mut buf, 0, weight);
        GpuFrozen { weight: Weight::Dense(buf), out, inp }
    }

    pub(super) fn frozen_4bit(&self, parts: Vec<Quantized>, inp: usize) -> GpuFrozen<D> {
        let stack = Stack::new(self, parts, inp);
        GpuFrozen { out: stack.rows(), weight: Weight::Quantized(stack), inp }
    }

    pub(super) fn thawed(&self, weight: &GpuFrozen<D>) -> Vec<f32> {
        match &weight.weight {
            Weight::Dense(buf) => self.download(buf),
            Weight::Quantized(stack) => stack.whole(self, |w| self.download(w)),
        }
    }

    pub(super) fn linear_onto(
        &self,
        x: Mat<'_, Self>,
        w: &GpuFrozen<D>,
        tails: &[Tail<'_, Self>],
        y: MatMut<'_, Self>,
        onto: Onto<'_, Self>,
    ) {
        let multiply = |x, buf: &GpuBuf<D>, y| {
            let w = Mat::new(buf, w.out, w.inp);
            self.multiply_with((x, Op::N), (w, Op::T), tails, y, onto, buf.holds);
        };
        match &w.weight {
            Weight::Dense(buf) => multiply(x, buf, y),
            Weight::Quantized(stack) if x.rows <= FEW_ROWS_MAX => {
                self.with_tails(tails, y, onto, |y, onto| stack.linear(self, x, y, onto));
            }
            Weight::Quantized(stack) => stack.whole(self, |buf| multiply(x, buf, y)),
        }
    }

    pub(super) fn linear_dx_onto(
        &self,
        dy: Mat<'_, Self>,
        w: &GpuFrozen<D>,
        tails: &[Tail<'_, Self>],
        dx: MatMut<'_, Self>,
        onto: Onto<'_, Self>,
    ) {
        let multiply = |dy, buf: &GpuBuf<D>, dx| {
            let w = Mat::new(buf, w.out, w.inp);
            self.multiply_with((dy, Op::N), (w, Op::N), tails, dx, onto, buf.holds);
        };
        match &w.weight {
            Weight::Dense(buf) => multiply(dy, buf, dx),
            Weight::Quantized(stack) => stack.whole(self, |buf| multiply(dy, buf, dx)),
        }
    }

    pub(super) fn frozen_rows(&self, w: &GpuFrozen<D>, ids: &[u32], y: &mut GpuBuf<D>) {
        match &w.weight {
            Weight::Dense(buf) => super::rows::gather_rows(self, buf, ids, w.inp, y),
            Weight::Quantized(stack) => stack.gather(self, ids, y),
        }
    }

    pub(super) fn bytes_of(&self, w: &GpuFrozen<D>) -> u64 {
        match &w.weight {
            Weight::Dense(buf) => self.buf_bytes(buf),
            Weight::Quantized(stack) => stack.bytes(),
        }
    }
}

/// Columns that a low-rank part is added to.
fn columns<D: Device>(tail: &Tail<'_, Gpu<D>>) -> usize {
    if tail.op_v == Op::N { tail.v.cols } else { tail.v.rows }
}

/// Which of the parts are the first in their columns, if together they have all `cols` of them and none has
/// some columns that are taken and some that are not.
fn share_out<D: Device>(tails: &[Tail<'_, Gpu<D>>], cols: usize) -> Option<Vec<bool>> {
    let mut taken: Vec<(usize, usize)> = Vec::new();
    let mut fresh = Vec::with_capacity(tails.len());
    for tail in tails {
        let own = (tail.column, tail.column + columns(tail));
        let meets = taken.iter().filter(|other| own.0 < other.1 && other.0 < own.1).count();
        match (taken.contains(&own), meets) {
            (true, _) => fresh.push(false),
            (false, 0) => {
                taken.push(own);
                fresh.push(true);
            }
            (false, _) => return None,
        }
    }
    let n: usize = taken.iter().map(|(start, end)| end - start).sum();
    (n == cols && n > 0).then_some(fresh)
}

/// Those columns of `y`.
fn tail_columns<'a, D: Device>(
    tail: &Tail<'_, Gpu<D>>,
    y: &'a mut MatMut<'_, Gpu<D>>,
) -> MatMut<'a, Gpu<D>> {
    let MatMut { buf, offset, rows, stride, .. } = y.again();
    MatMut { buf, offset: offset + tail.column, rows, cols: columns(tail), stride }
}
