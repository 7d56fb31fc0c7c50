//! Muon's step: a momentum whose singular values are all pushed towards one.

use std::ops::Range;

use hone_kernels::{Backend, Compute, Mat, MatMut, Op};

use crate::MuonConfig;

/// Buffers of the iteration, for matrices of up to so many values and so short a side.
pub(crate) struct MuonScratch<B: Backend> {
    /// The momentum, then its iterates, (rows, cols), twice.
    x: [B::Buf; 2],
    /// Two square matrices of the shorter side.
    square: [B::Buf; 2],
}

impl<B: Backend> MuonScratch<B> {
    /// Room for all matrices of these shapes.
    pub(crate) fn new(backend: &B, shapes: impl Iterator<Item = (usize, usize)>) -> Self {
        let (mut n, mut side) = (0, 0);
        for (rows, cols) in shapes {
            n = n.max(rows * cols);
            side = side.max(rows.min(cols));
        }
        let zeros = |n| backend.zeros(n);
        MuonScratch { x: [zeros(n), zeros(n)], square: [zeros(side * side), zeros(side * side)] }
    }
}

/// One tensor: where it lies in its buffer, and its sides.
#[derive(Clone, Copy)]
pub(crate) struct Matrix {
    pub(crate) at: usize,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

impl Matrix {
    pub(crate) fn n(&self) -> usize {
        self.rows * self.cols
    }

    fn part(&self) -> Range<usize> {
        0..self.n()
    }
}

/// The rates of one step.
#[derive(Clone, Copy)]
pub(crate) struct MuonStep {
    pub(crate) lr: f64,
    pub(crate) weight_decay: f64,
    pub(crate) grad_scale: f32,
}

/// `m <- lerp(m, g, 1 - mu)`; the step is along the polar factor of lerp(g, m, mu), or of m without
/// Nesterov; weights decay first.
pub(crate) fn step<B: Backend>(
    backend: &B,
    config: &MuonConfig,
    (p, g): (&mut B::Buf, &B::Buf),
    m: &mut B::Buf,
    matrix: Matrix,
    step: MuonStep,
    scratch: &mut MuonScratch<B>,
) {
    let (n, at) = (matrix.n(), matrix.at);
    let (keep, fresh) = (config.momentum as f32, (1.0 - config.momentum) as f32);
    backend.axpby(fresh * step.grad_scale, (g, at), keep, (m, 0), n);
    backend.axpby(1.0, (m, 0), 0.0, (&mut scratch.x[0], 0), n);
    if config.nesterov {
        let x = (&mut scratch.x[0], 0);
        backend.axpby(fresh * step.grad_scale, (g, at), keep, x, n);
    }
    let last = orthogonalise(backend, config, matrix, scratch);
    let lr = step.lr * config.lr_factor(matrix.rows, matrix.cols);
    let keep = (1.0 - step.lr * step.weight_decay) as f32;
    backend.axpby(-lr as f32, (&scratch.x[last], 0), keep, (p, at), n);
}

/// Newton-Schulz: X <- a X + (b G + c G^2) X with G = X Xt, from X / |X|; of the shorter side, so
/// that a tall matrix is multiplied from the right. In f32 whatever the model computes in: it is part
/// of an update of f32 weights. Returns which of the two buffers holds it.
fn orthogonalise<B: Backend>(
    backend: &B,
    config: &MuonConfig,
    matrix: Matrix,
    scratch: &mut MuonScratch<B>,
) -> usize {
    let backend = &backend.with_compute(Compute::F32);
    let Matrix { rows, cols, .. } = matrix;
    let is_tall = rows > cols;
    let side = rows.min(cols);
    let [a, b, c] = config.ns_coefficients.map(|x| x as f32);
    let norm = backend.sum_squares_part(&scratch.x[0], matrix.part()).sqrt().max(config.eps);
    backend.scale(&mut scratch.x[0], (1.0 / norm) as f32, matrix.n());
    let mut now = 0;
    for _ in 0..config.ns_steps {
        let [gram, update] = &mut scratch.square;
        let (front, back) = scratch.x.split_at_mut(1);
        let (x, next) =
            if now == 0 { (&front[0], &mut back[0]) } else { (&back[0], &mut front[0]) };
        let view = Mat::new(x, rows, cols);
        let (left, right) = if is_tall { (Op::T, Op::N) } else { (Op::N, Op::T) };
        let to = MatMut::new(gram, side, side);
        backend.gemm(view, left, view, right, to, 1.0, 0.0);
        backend.copy(gram, update, side * side);
        let square = Mat::new(gram, side, side);
        let to = MatMut::new(update, side, side);
        backend.gemm(square, Op::N, square, Op::N, to, c, b);
        backend.copy(x, next, matrix.n());
        let update = Mat::new(update, side, side);
        let (first, second) = if is_tall { (view, update) } else { (update, view) };
        backend.gemm(first, Op::N, second, Op::N, MatMut::new(next, rows, cols), 1.0, a);
        now = 1 - now;
    }
    now
}
