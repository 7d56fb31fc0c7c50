//! The adapters of the modules that read one input, on the device: forward and backward.
//!
//! With u = X At and du_m = s_m dY_m B_m for each module m,
//!
//!   dB_m = s_m dY_mt u_m,   dA = dut X,   dX = dY W + du A
//!
//! so that everything goes through the r-wide side first (Hu et al. 2021; the order is Unsloth's).
//! u is kept for the backward where layers are ([`Site`]), and computed again elsewhere. Dropout, on
//! the adapters' input alone, draws one mask for the modules that share an input.

mod dora;

use hone_kernels::{Backend, Compute, Mat, MatMut, Op, Tail};

use super::Adapter;
use crate::ModelError;
use crate::buffers::{Width, exact, held_bytes, planned_bytes, rounded};
use crate::param::{Param, ParamKind};

/// The adapters of the modules of one map.
pub(crate) struct LoraGroup<B: Backend> {
    /// The modules' A one below the other, (R, in).
    a: Param<B>,
    members: Vec<LoraMember<B>>,
    /// R, the sum of the ranks.
    rank: usize,
    /// Columns of the map's output.
    out: usize,
    dropout: f32,
}

/// The adapter of one module.
struct LoraMember<B: Backend> {
    /// (out, r) of the module.
    b: Param<B>,
    dora: Option<Dora<B>>,
    /// First of its rows in the group's A.
    rank_start: usize,
    rank: usize,
    scaling: f32,
    /// First of its columns in the map's output.
    out_start: usize,
    out: usize,
}

/// Lengths of a module's rows.
struct Dora<B: Backend> {
    /// Trained, (out).
    magnitude: Param<B>,
    /// Squared lengths of the base's rows, (out).
    squares: B::Buf,
}

/// What one call of a map has of its own, from its forward to its backward.
pub(crate) struct Site<'a, B: Backend> {
    /// Turns dropout on.
    pub(crate) seed: Option<u64>,
    /// Keeps X At, (T, R); empty where the backward computes it again.
    pub(crate) inner: &'a mut B::Buf,
}

/// Buffers that adapters share over all layers. Empty where there are none.
pub(crate) struct LoraScratch<B: Backend> {
    /// X At where it is not kept, (T, R): rounded, as it is there.
    pub(super) u: B::Buf,
    /// Its gradient, (T, R).
    pub(super) du: B::Buf,
    /// X after dropout, then the adapter's part of dX, (T, in). Empty without dropout.
    dropped: B::Buf,
    /// That part after the same mask, (T, in). Empty without dropout.
    masked: B::Buf,
    /// Zeros, (in). Empty without dropout.
    zeros: B::Buf,
    dora: DoraScratch<B>,
}

/// Buffers of DoRA; empty without.
struct DoraScratch<B: Backend> {
    /// Unscaled output, (T, out).
    z: B::Buf,
    /// Scaled gradient, (T, out).
    gs: B::Buf,
    /// Norms of the rows, (out).
    norms: B::Buf,
    /// The factors c, 1 where a module has no adapter, (out).
    scales: B::Buf,
    /// A Wt, (R, out).
    p: B::Buf,
    /// A At of one module, (r, r).
    m: B::Buf,
}

/// Sizes of the shared buffers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LoraNeeds {
    /// Largest R of a map.
    pub(crate) rank: usize,
    /// Widest input of a map with dropout; 0 without.
    pub(crate) dropout_width: usize,
    /// Widest output of a map with DoRA; 0 without.
    pub(crate) dora_width: usize,
}

impl LoraNeeds {
    /// What serves both.
    pub(crate) fn max(self, other: Self) -> Self {
        LoraNeeds {
            rank: self.rank.max(other.rank),
            dropout_width: self.dropout_width.max(other.dropout_width),
            dora_width: self.dora_width.max(other.dora_width),
        }
    }

    /// The buffers of [`LoraScratch`] for `rows` tokens, each a row.
    fn sizes(self, rows: usize) -> [Width; 11] {
        let LoraNeeds { rank, dropout_width, dora_width } = self;
        let dora_rank = if dora_width > 0 { rank } else { 0 };
        let [a, drop, dora] = [rank, dropout_width, dora_width].map(|width| rows * width);
        let (p, m) = (dora_rank * dora_width, dora_rank * dora_rank);
        let [du, zeros, z, row] = [a, dropout_width, dora, dora_width].map(exact);
        let [u, drop, gs] = [a, drop, dora].map(rounded);
        [u, du, drop, drop, zeros, z, gs, row, row, exact(p), exact(m)]
    }

    /// Bytes of all buffers of [`LoraScratch`] for `rows` tokens.
    pub(crate) fn n_bytes(self, compute: Compute, rows: usize) -> u64 {
        planned_bytes(&self.sizes(rows), compute, 1)
    }
}

impl<B: Backend> LoraScratch<B> {
    /// Room for `rows` tokens.
    pub(crate) fn new(backend: &B, rows: usize, needs: LoraNeeds) -> Self {
        let buffers = needs.sizes(rows).map(|width| width.make(backend, 1));
        let [u, du, dropped, masked, zeros, z, gs, norms, scales, p, m] = buffers;
        let dora = DoraScratch { z, gs, norms, scales, p, m };
        LoraScratch { u, du, dropped, masked, zeros, dora }
    }

    /// Bytes of all buffers.
    pub(crate) fn n_bytes(&self, backend: &B) -> u64 {
        let LoraScratch { u, du, dropped, masked, zeros, dora } = self;
        let DoraScratch { z, gs, norms, scales, p, m } = dora;
        held_bytes(backend, [u, du, dropped, masked, zeros, z, gs, norms, scales, p, m])
    }
}

impl<B: Backend> LoraGroup<B> {
    /// The adapter's factors for the modules `(full name, out)` that have some; `weight` is called
    /// for the base's values (out of all modules, in) when magnitudes need them.
    pub(crate) fn new(
        backend: &B,
        adapter: &Adapter,
        modules: &[(String, usize)],
        inp: usize,
        trained: bool,
        weight: impl FnOnce() -> Vec<f32>,
    ) -> Result<Option<Self>, ModelError> {
        let (mut factors_a, mut members) = (Vec::new(), Vec::new());
        let (mut rank_start, mut out_start) = (0, 0);
        let values = if adapter.config.use_dora { weight() } else { Vec::new() };
        for (name, out) in modules {
            if let Some((a, b)) = adapter.factors(name, *out, inp)? {
                let rank = adapter.config.rank_of(name);
                let dora = adapter.magnitude(name).map(|magnitude| {
                    let rows = values[out_start * inp..][..out * inp].chunks(inp);
                    let square = |row: &[f32]| row.iter().map(|&w| f64::from(w).powi(2)).sum();
                    let squares: Vec<f32> = rows
                        .map(|row| {
                            let s: f64 = square(row);
                            s as f32
                        })
                        .collect();
                    let kind = ParamKind::LoraB;
                    Dora {
                        magnitude: Param::new(backend, kind, vec![magnitude.clone()], trained),
                        squares: backend.upload(&squares),
                    }
                });
                members.push(LoraMember {
                    b: Param::new(backend, ParamKind::LoraB, vec![b.clone()], trained),
                    dora,
                    rank_start,
                    rank,
                    scaling: adapter.config.scaling_of(name),
                    out_start,
                    out: *out,
                });
                factors_a.push(a.clone());
                rank_start += rank;
            }
            out_start += out;
        }
        let dropout = adapter.config.lora_dropout;
        Ok((!members.is_empty()).then(|| LoraGroup {
            a: Param::new(backend, ParamKind::LoraA, factors_a, trained),
            members,
            rank: rank_start,
            out: out_start,
            dropout,
        }))
    }

    /// Buffers that it needs, for an input of `inp`.
    pub(crate) fn needs(&self, inp: usize) -> LoraNeeds {
        LoraNeeds {
            rank: self.rank,
            dropout_width: if self.dropout > 0.0 { inp } else { 0 },
            dora_width: if self.has_dora() { self.out } else { 0 },
        }
    }

    /// See [`crate::linear::Linear::inner_width`].
    pub(crate) fn inner_width(&self) -> usize {
        if self.has_dora() { 0 } else { self.rank }
    }

    /// Squared lengths of rows that are kept.
    pub(crate) fn n_squares(&self, backend: &B) -> usize {
        let doras = self.members.iter().filter_map(|m| m.dora.as_ref());
        doras.map(|dora| backend.len(&dora.squares)).sum()
    }

    /// Whether rows have trained lengths.
    pub(crate) fn has_dora(&self) -> bool {
        self.members.iter().any(|m| m.dora.is_some())
    }

    /// Calls `visit` with its parameters.
    pub(crate) fn visit(&self, visit: &mut dyn FnMut(&Param<B>)) {
        visit(&self.a);
        for m in &self.members {
            visit(&m.b);
            m.dora.iter().for_each(|dora| visit(&dora.magnitude));
        }
    }

    /// [`LoraGroup::visit`], to change them; the same order.
    pub(crate) fn visit_mut(&mut self, visit: &mut dyn FnMut(&mut Param<B>)) {
        visit(&mut self.a);
        for m in &mut self.members {
            visit(&mut m.b);
            m.dora.iter_mut().for_each(|dora| visit(&mut dora.magnitude));
        }
    }

    /// The seed, if there is any dropout to do with it.
    fn dropout_seed(&self, seed: Option<u64>) -> Option<u64> {
        seed.filter(|_| self.dropout > 0.0)
    }

    /// X after dropout: X itself, or `dropped`.
    fn drop_input<'a>(
        &self,
        backend: &B,
        x: Mat<'a, B>,
        dropped: &'a mut B::Buf,
        seed: Option<u64>,
    ) -> Mat<'a, B> {
        let Some(seed) = self.dropout_seed(seed) else { return x };
        backend.dropout(x, MatMut::new(dropped, x.rows, x.cols), self.dropout, seed);
        Mat::new(dropped, x.rows, x.cols)
    }

    /// `u` <- X At, X after dropout, which is returned.
    fn project<'a>(
        &self,
        backend: &B,
        x: Mat<'a, B>,
        (u, dropped): (&mut B::Buf, &'a mut B::Buf),
        seed: Option<u64>,
    ) -> Mat<'a, B> {
        let x = self.drop_input(backend, x, dropped, seed);
        let a = Mat::new(&self.a.value, self.rank, x.cols);
        backend.gemm(x, Op::N, a, Op::T, MatMut::new(u, x.rows, self.rank), 1.0, 0.0);
        x
    }

    /// What the adapters add to the map's output, as low-rank parts of its product. Without DoRA.
    pub(crate) fn tails<'a>(
        &'a self,
        backend: &B,
        x: Mat<'_, B>,
        scratch: &'a mut LoraScratch<B>,
        site: Site<'a, B>,
    ) -> Vec<Tail<'a, B>> {
        let LoraScratch { u, dropped, .. } = scratch;
        let u = if backend.len(site.inner) > 0 { site.inner } else { u };
        self.project(backend, x, (u, dropped), site.seed);
        let u = &*u;
        let tail = |m: &'a LoraMember<B>| Tail {
            u: Mat::columns(u, x.rows, m.rank_start, m.rank, self.rank),
            v: Mat::new(&m.b.value, m.out, m.rank),
            op_v: Op::T,
            column: m.out_start,
            scale: m.scaling,
        };
        self.members.iter().map(tail).collect()
    }

    /// What the adapters add to the gradient at the map's input, du A, as a low-rank part of its
    /// product; `None` where it must go through a mask first. After [`LoraGroup::inner_grad`].
    pub(crate) fn dx_tail<'a>(
        &'a self,
        (rows, inp): (usize, usize),
        scratch: &'a LoraScratch<B>,
        seed: Option<u64>,
    ) -> Option<Tail<'a, B>> {
        self.dropout_seed(seed).is_none().then(|| Tail {
            u: Mat::new(&scratch.du, rows, self.rank),
            v: Mat::new(&self.a.value, self.rank, inp),
            op_v: Op::N,
            column: 0,
            scale: 1.0,
        })
    }

    /// Y <- Y + adapters, Y (T, out of the map) being at the start of `y`; only the columns of modules
    /// that have adapters. Without DoRA.
    pub(crate) fn forward(
        &self,
        backend: &B,
        x: Mat<'_, B>,
        y: &mut B::Buf,
        scratch: &mut LoraScratch<B>,
        seed: Option<u64>,
    ) {
        self.project(backend, x, (&mut scratch.u, &mut scratch.dropped), seed);
        for m in &self.members {
            let y = MatMut::columns(y, x.rows, m.out_start, m.out, self.out);
            m.add(backend, &scratch.u, self.rank, y, 1.0);
        }
    }

    /// `scratch.du` <- the gradient at X At. Without DoRA.
    pub(crate) fn inner_grad(&self, backend: &B, dy: Mat<'_, B>, scratch: &mut LoraScratch<B>) {
        self.find_du(backend, dy, &mut scratch.du);
    }

    /// Adds to the adapters' gradients. After [`LoraGroup::inner_grad`]; without DoRA.
    pub(crate) fn grads(
        &mut self,
        backend: &B,
        x: Mat<'_, B>,
        dy: Mat<'_, B>,
        scratch: &mut LoraScratch<B>,
        (seed, inner): (Option<u64>, Option<&B::Buf>),
    ) {
        let LoraScratch { u, du, dropped, .. } = scratch;
        let x = match inner {
            Some(_) => self.drop_input(backend, x, dropped, seed),
            None => self.project(backend, x, (u, dropped), seed),
        };
        self.factor_grads(backend, x, dy, (inner.unwrap_or(u), du));
    }

    /// `dx` (T, in) <- `dx` + what comes through the adapters. After [`LoraGroup::inner_grad`]; X after
    /// dropout is lost.
    pub(crate) fn add_dx(
        &self,
        backend: &B,
        dx: MatMut<'_, B>,
        scratch: &mut LoraScratch<B>,
        seed: Option<u64>,
    ) {
        let LoraScratch { du, dropped, masked, zeros, .. } = scratch;
        let (rows, inp, rank) = (dx.rows, dx.cols, self.rank);
        let (a, du) = (Mat::new(&self.a.value, rank, inp), Mat::new(du, rows, rank));
        match self.dropout_seed(seed) {
            None => backend.gemm(du, Op::N, a, Op::N, dx, 1.0, 1.0),
            Some(seed) => {
                // The gradient at the dropped input goes through the same mask before it is added.
                backend.gemm(du, Op::N, a, Op::N, MatMut::new(dropped, rows, inp), 1.0, 0.0);
                self.add_masked(backend, (dropped, masked, zeros), dx, seed);
            }
        }
    }

    /// du, the gradient at X At.
    fn find_du(&self, backend: &B, dy: Mat<'_, B>, du: &mut B::Buf) {
        for m in &self.members {
            let dy = Mat { offset: dy.offset + m.out_start, cols: m.out, ..dy };
            let b = Mat::new(&m.b.value, m.out, m.rank);
            let du = MatMut::columns(du, dy.rows, m.rank_start, m.rank, self.rank);
            backend.gemm(dy, Op::N, b, Op::N, du, m.scaling, 0.0);
        }
    }

    /// dB and dA, from u, du and the input after dropout.
    fn factor_grads(
        &mut self,
        backend: &B,
        x: Mat<'_, B>,
        dy: Mat<'_, B>,
        (u, du): (&B::Buf, &B::Buf),
    ) {
        let (rows, inp, rank) = (x.rows, x.cols, self.rank);
        for m in &mut self.members {
            let dy = Mat { offset: dy.offset + m.out_start, cols: m.out, ..dy };
            if let Some(grad) = &mut m.b.grad {
                let u = Mat::columns(u, rows, m.rank_start, m.rank, rank);
                let db = MatMut::new(grad, m.out, m.rank);
                backend.gemm(dy, Op::T, u, Op::N, db, m.scaling, 1.0);
            }
        }
        if let Some(grad) = &mut self.a.grad {
            let da = MatMut::new(grad, rank, inp);
            backend.gemm(Mat::new(du, rows, rank), Op::T, x, Op::N, da, 1.0, 1.0);
        }
    }

    /// dX <- dX + the gradient at the dropped input, through its mask.
    fn add_masked(
        &self,
        backend: &B,
        (dropped, masked, zeros): (&B::Buf, &mut B::Buf, &B::Buf),
        dx: MatMut<'_, B>,
        seed: u64,
    ) {
        let (rows, inp) = (dx.rows, dx.cols);
        let dropped = Mat::new(dropped, rows, inp);
        backend.dropout(dropped, MatMut::new(masked, rows, inp), self.dropout, seed);
        // Each column once: zeros and a shift of one.
        let (masked, once) = (Mat::new(masked, rows, inp), Mat::new(zeros, 1, inp));
        backend.add_scaled_columns(masked, once, 1.0, dx, 1.0);
    }
}

impl<B: Backend> LoraMember<B> {
    /// Y (T, out) <- s u Bt + beta Y, u being this module's columns of (T, R).
    fn add(&self, backend: &B, u: &B::Buf, group_rank: usize, y: MatMut<'_, B>, beta: f32) {
        let u = Mat::columns(u, y.rows, self.rank_start, self.rank, group_rank);
        let b = Mat::new(&self.b.value, self.out, self.rank);
        backend.gemm(u, Op::N, b, Op::T, y, self.scaling, beta);
    }
}
