//! Adapters whose rows have trained lengths.
//!
//! DoRA (Liu et al. 2024) gives row j of the adapted weight a trained length: with the factor c_j =
//! magnitude_j / |row j of W + s B A|, whose norm is a constant for the gradient as in PEFT,
//!
//!   Y = X Wt + (c - 1) X' Wt + c s (X' At) Bt + b
//!
//! where X' is X after dropout. Norms need no adapted weight: the square of row j is that of W plus
//! B_j . (2 s A Wt + s^2 A At Bt)_j, columns of an r-wide product.

use hone_kernels::{Backend, Mat, MatMut, Op};

use super::{DoraScratch, LoraGroup, LoraScratch};
use crate::linear::Weight;

impl<B: Backend> LoraGroup<B> {
    /// Y <- X Wt + adapters + beta Y, with DoRA.
    pub(crate) fn forward_dora(
        &self,
        backend: &B,
        weight: &Weight<B>,
        x: Mat<'_, B>,
        (y, beta): (&mut B::Buf, f32),
        scratch: &mut LoraScratch<B>,
        seed: Option<u64>,
    ) {
        let (rows, out) = (x.rows, self.out);
        self.find_scales(backend, weight, x.cols, scratch);
        let LoraScratch { u, dropped, dora, .. } = scratch;
        self.project(backend, x, (u, dropped), seed);
        let DoraScratch { z, scales, .. } = dora;
        if self.dropout_seed(seed).is_none() {
            weight.linear(backend, x, MatMut::new(z, rows, out), 0.0);
            let (z, scales) = (Mat::new(z, rows, out), Mat::new(scales, 1, out));
            backend.add_scaled_columns(z, scales, 0.0, MatMut::new(y, rows, out), beta);
        } else {
            weight.linear(backend, x, MatMut::new(y, rows, out), beta);
            let dropped = Mat::new(dropped, rows, x.cols);
            weight.linear(backend, dropped, MatMut::new(z, rows, out), 0.0);
            let (z, scales) = (Mat::new(z, rows, out), Mat::new(scales, 1, out));
            backend.add_scaled_columns(z, scales, -1.0, MatMut::new(y, rows, out), 1.0);
        }
        for m in &self.members {
            m.add(backend, u, self.rank, MatMut::columns(z, rows, m.out_start, m.out, out), 0.0);
            let z = Mat::columns(z, rows, m.out_start, m.out, out);
            let scales = Mat::columns(scales, 1, m.out_start, m.out, out);
            let y = MatMut::columns(y, rows, m.out_start, m.out, out);
            backend.add_scaled_columns(z, scales, 0.0, y, 1.0);
        }
    }

    /// `norms` and `scales` as the factors are now.
    fn find_scales(
        &self,
        backend: &B,
        weight: &Weight<B>,
        inp: usize,
        scratch: &mut LoraScratch<B>,
    ) {
        let DoraScratch { norms, scales, p, m: square, .. } = &mut scratch.dora;
        let (rank, out) = (self.rank, self.out);
        let a = Mat::new(&self.a.value, rank, inp);
        weight.linear(backend, a, MatMut::new(p, rank, out), 0.0);
        backend.fill(scales, 1.0);
        for m in &self.members {
            let Some(dora) = &m.dora else { continue };
            let (a, s) = (a.rows(m.rank_start, m.rank), m.scaling);
            backend.gemm(a, Op::N, a, Op::T, MatMut::new(square, m.rank, m.rank), 1.0, 0.0);
            let b = Mat::new(&m.b.value, m.out, m.rank);
            let at = m.rank_start * out + m.out_start;
            let c = MatMut { buf: &mut *p, offset: at, rows: m.rank, cols: m.out, stride: out };
            let square = Mat::new(square, m.rank, m.rank);
            backend.gemm(square, Op::N, b, Op::T, c, s * s, 2.0 * s);
            let c = Mat { buf: &*p, offset: at, rows: m.rank, cols: m.out, stride: out };
            let norms = MatMut::columns(norms, 1, m.out_start, m.out, out);
            let scales = MatMut::columns(scales, 1, m.out_start, m.out, out);
            backend.dora_scales(&dora.squares, b, c, &dora.magnitude.value, norms, scales);
        }
    }

    /// The whole backward of a map with DoRA: `dx` is overwritten.
    pub(crate) fn backward_dora(
        &mut self,
        backend: &B,
        weight: &Weight<B>,
        (x, dy): (Mat<'_, B>, Mat<'_, B>),
        dx: Option<MatMut<'_, B>>,
        scratch: &mut LoraScratch<B>,
        seed: Option<u64>,
    ) {
        let (rows, inp, out) = (x.rows, x.cols, self.out);
        self.find_scales(backend, weight, inp, scratch);
        let LoraScratch { u, du, dropped, masked, zeros, dora } = scratch;
        let input = self.project(backend, x, (u, dropped), seed);
        let DoraScratch { z, gs, norms, scales, .. } = dora;
        let drops = self.dropout_seed(seed);
        weight.linear(backend, input, MatMut::new(z, rows, out), 0.0);
        for m in &mut self.members {
            m.add(backend, u, self.rank, MatMut::columns(z, rows, m.out_start, m.out, out), 1.0);
            let grad = m.dora.as_mut().and_then(|dora| dora.magnitude.grad.as_mut());
            if let Some(grad) = grad {
                let dy = Mat::columns(dy.buf, rows, m.out_start, m.out, dy.stride);
                let z = Mat::columns(z, rows, m.out_start, m.out, out);
                let norms = Mat::columns(norms, 1, m.out_start, m.out, out);
                backend.columns_dot(dy, z, norms, grad);
            }
        }
        let scales = Mat::new(scales, 1, out);
        backend.add_scaled_columns(dy, scales, 0.0, MatMut::new(gs, rows, out), 0.0);
        self.find_du(backend, Mat::new(gs, rows, out), du);
        self.factor_grads(backend, input, Mat::new(gs, rows, out), (u, du));
        let Some(mut dx) = dx else { return };
        let a = Mat::new(&self.a.value, self.rank, inp);
        let du = Mat::new(du, rows, self.rank);
        match drops {
            None => {
                weight.linear_dx(backend, Mat::new(gs, rows, out), dx.again(), 0.0);
                backend.gemm(du, Op::N, a, Op::N, dx, 1.0, 1.0);
            }
            Some(seed) => {
                weight.linear_dx(backend, dy, dx.again(), 0.0);
                backend.add_scaled_columns(dy, scales, -1.0, MatMut::new(gs, rows, out), 0.0);
                let part = Mat::new(gs, rows, out);
                weight.linear_dx(backend, part, MatMut::new(dropped, rows, inp), 0.0);
                backend.gemm(du, Op::N, a, Op::N, MatMut::new(dropped, rows, inp), 1.0, 1.0);
                self.add_masked(backend, (dropped, masked, zeros), dx, seed);
            }
        }
    }
}
