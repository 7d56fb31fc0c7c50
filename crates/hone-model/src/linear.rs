//! A linear map, with its bias and its adapter: Y = X Wt + b + s (X At) Bt, and the gradients of
//! it.
//!
//! Maps that read the same input (q, k, v; gate, up) are one map here whose rows lie one below the
//! other, and their adapters share one product with X. A frozen W gets no gradient: with u = X At
//! and du_m = s dY_m B_m for each module m,
//!
//!   dB_m = s dY_mt u_m,   dA = dut X,   dX = dY W + du A
//!
//! so that everything goes through the r-wide side first (Hu et al. 2021; the order is Unsloth's),
//! and u is computed again in the backward instead of being kept. Dropout, on the adapters' input
//! alone, draws one mask for the modules that share an input.

use hone_kernels::{Backend, Mat, MatMut, Op};

use crate::ModelError;
use crate::lora::Adapter;
use crate::param::{Param, ParamKind};
use crate::tensors::{NamedTensor, TensorSource, Tensors};

/// The matrix of a map: packed for multiplication when frozen, a buffer with its gradient when
/// trained.
enum Weight<B: Backend> {
    Frozen(B::Frozen),
    Trained(Param<B>),
}

/// A linear map (in) -> (out).
pub(crate) struct Linear<B: Backend> {
    weight: Weight<B>,
    bias: Option<Param<B>>,
    lora: Option<LoraGroup<B>>,
    /// The modules whose rows are stacked here, with their number of rows.
    modules: Vec<(String, usize)>,
    out: usize,
    inp: usize,
}

/// The adapters of the modules of one map.
struct LoraGroup<B: Backend> {
    /// The modules' A one below the other, (R, in).
    a: Param<B>,
    members: Vec<LoraMember<B>>,
    /// R, the sum of the ranks.
    rank: usize,
    scaling: f32,
    dropout: f32,
}

/// The adapter of one module.
struct LoraMember<B: Backend> {
    /// (out, r) of the module.
    b: Param<B>,
    /// First of its rows in the group's A.
    rank_start: usize,
    rank: usize,
    /// First of its columns in the map's output.
    out_start: usize,
    out: usize,
}

/// Buffers that adapters share over all layers. Empty where there are none.
pub(crate) struct LoraScratch<B: Backend> {
    /// X At, (T, R).
    u: B::Buf,
    /// Its gradient, (T, R).
    du: B::Buf,
    /// X after dropout, then the adapter's part of dX, (T, in). Empty without dropout.
    dropped: B::Buf,
    /// That part after the same mask, (T, in). Empty without dropout.
    masked: B::Buf,
}

impl<B: Backend> LoraScratch<B> {
    /// Room for `rows` tokens of adapters of summed rank `rank`; `width` is the widest input, 0
    /// without dropout.
    pub(crate) fn new(backend: &B, rows: usize, rank: usize, width: usize) -> Self {
        LoraScratch {
            u: backend.zeros(rows * rank),
            du: backend.zeros(rows * rank),
            dropped: backend.zeros(rows * width),
            masked: backend.zeros(rows * width),
        }
    }
}

impl<B: Backend> Linear<B> {
    /// Reads the modules `(full name, out)` and stacks them.
    pub(crate) fn load(
        backend: &B,
        source: &dyn TensorSource,
        modules: Vec<(String, usize)>,
        inp: usize,
        has_bias: bool,
        trained: bool,
    ) -> Result<Self, ModelError> {
        let read = |suffix: &str| -> Result<Vec<NamedTensor>, ModelError> {
            modules.iter().map(|(name, _)| finite(source, &format!("{name}.{suffix}"))).collect()
        };
        let out = modules.iter().map(|(_, out)| out).sum();
        let weights = read("weight")?;
        let weight = if trained {
            Weight::Trained(Param::new(backend, ParamKind::Matrix, weights, true))
        } else if let [only] = weights.as_slice() {
            Weight::Frozen(backend.freeze(&only.data, out, inp))
        } else {
            let stacked: Vec<f32> = weights.into_iter().flat_map(|t| t.data).collect();
            Weight::Frozen(backend.freeze(&stacked, out, inp))
        };
        let bias = match has_bias {
            true => Some(Param::new(backend, ParamKind::Bias, read("bias")?, trained)),
            false => None,
        };
        Ok(Linear { weight, bias, lora: None, modules, out, inp })
    }

    /// Whether the backward reads the input.
    pub(crate) fn needs_input(&self) -> bool {
        let is_trained = matches!(&self.weight, Weight::Trained(w) if w.grad.is_some());
        is_trained || self.lora.is_some()
    }

    /// R and the dropout of the adapters here; zeros without.
    pub(crate) fn lora_size(&self) -> (usize, f32) {
        self.lora.as_ref().map_or((0, 0.0), |lora| (lora.rank, lora.dropout))
    }

    /// Y (rows, out) <- X Wt + b + adapter + beta Y. `seed` turns dropout on.
    pub(crate) fn forward(
        &self,
        backend: &B,
        (x, rows): (&B::Buf, usize),
        (y, beta): (&mut B::Buf, f32),
        scratch: &mut LoraScratch<B>,
        seed: Option<u64>,
    ) {
        let input = Mat::new(x, rows, self.inp);
        match &self.weight {
            Weight::Frozen(w) => backend.linear(input, w, MatMut::new(y, rows, self.out), beta),
            Weight::Trained(w) => {
                let w = Mat::new(&w.value, self.out, self.inp);
                backend.gemm(input, Op::N, w, Op::T, MatMut::new(y, rows, self.out), 1.0, beta);
            }
        }
        if let Some(bias) = &self.bias {
            backend.add_bias(MatMut::new(y, rows, self.out), &bias.value);
        }
        let Some(lora) = &self.lora else { return };
        lora.project(backend, input, scratch, seed);
        for m in &lora.members {
            let u = Mat::columns(&scratch.u, rows, m.rank_start, m.rank, lora.rank);
            let b = Mat::new(&m.b.value, m.out, m.rank);
            let y = MatMut::columns(y, rows, m.out_start, m.out, self.out);
            backend.gemm(u, Op::N, b, Op::T, y, lora.scaling, 1.0);
        }
    }

    /// Adds to the gradients of what is trained, and overwrites `dx` (rows, in) when it is asked
    /// for. `x` and `seed` are those of the forward.
    pub(crate) fn backward(
        &mut self,
        backend: &B,
        (x, dy, rows): (&B::Buf, &B::Buf, usize),
        mut dx: Option<&mut B::Buf>,
        scratch: &mut LoraScratch<B>,
        seed: Option<u64>,
    ) {
        let (out, inp) = (self.out, self.inp);
        let dy_mat = Mat::new(dy, rows, out);
        match &mut self.weight {
            Weight::Frozen(w) => {
                if let Some(dx) = dx.as_deref_mut() {
                    backend.linear_dx(dy_mat, w, MatMut::new(dx, rows, inp), 0.0);
                }
            }
            Weight::Trained(w) => {
                if let Some(dx) = dx.as_deref_mut() {
                    let value = Mat::new(&w.value, out, inp);
                    let dx = MatMut::new(dx, rows, inp);
                    backend.gemm(dy_mat, Op::N, value, Op::N, dx, 1.0, 0.0);
                }
                // There is none where it was frozen among others that are trained.
                if let Some(grad) = &mut w.grad {
                    let dw = MatMut::new(grad, out, inp);
                    backend.gemm(dy_mat, Op::T, Mat::new(x, rows, inp), Op::N, dw, 1.0, 1.0);
                }
            }
        }
        if let Some(grad) = self.bias.as_mut().and_then(|bias| bias.grad.as_mut()) {
            backend.bias_grad(dy_mat, grad);
        }
        if let Some(lora) = &mut self.lora {
            lora.backward(backend, Mat::new(x, rows, inp), dy_mat, dx, scratch, seed);
        }
    }

    /// Puts the adapter's factors for these modules in place; returns how many modules have some.
    pub(crate) fn attach(
        &mut self,
        backend: &B,
        adapter: &Adapter,
        trained: bool,
    ) -> Result<usize, ModelError> {
        let mut factors_a = Vec::new();
        let mut members = Vec::new();
        let (mut rank_start, mut out_start) = (0, 0);
        for (name, out) in &self.modules {
            if let Some((a, b)) = adapter.factors(name, *out, self.inp)? {
                let rank = adapter.config.r;
                let kind = ParamKind::LoraB;
                members.push(LoraMember {
                    b: Param::new(backend, kind, vec![b.clone()], trained),
                    rank_start,
                    rank,
                    out_start,
                    out: *out,
                });
                factors_a.push(a.clone());
                rank_start += rank;
            }
            out_start += out;
        }
        let n_modules = members.len();
        self.lora = (n_modules > 0).then(|| LoraGroup {
            a: Param::new(backend, ParamKind::LoraA, factors_a, trained),
            members,
            rank: rank_start,
            scaling: adapter.config.scaling(),
            dropout: adapter.config.lora_dropout,
        });
        Ok(n_modules)
    }

    /// Takes the adapter off.
    pub(crate) fn detach(&mut self) {
        self.lora = None;
    }

    /// The base tensors under their own names.
    pub(crate) fn export(&self, backend: &B, into: &mut Tensors) {
        match &self.weight {
            Weight::Trained(w) => w.export(backend, &w.value, into),
            Weight::Frozen(w) => {
                let values = backend.thaw(w);
                let mut start = 0;
                for (name, out) in &self.modules {
                    let end = start + out * self.inp;
                    let shape = vec![*out, self.inp];
                    let data = values[start..end].to_vec();
                    into.insert(NamedTensor::new(format!("{name}.weight"), shape, data));
                    start = end;
                }
            }
        }
        if let Some(bias) = &self.bias {
            bias.export(backend, &bias.value, into);
        }
    }

    /// Calls `visit` with every parameter that lives as a plain buffer.
    pub(crate) fn visit(&self, visit: &mut dyn FnMut(&Param<B>)) {
        if let Weight::Trained(w) = &self.weight {
            visit(w);
        }
        self.bias.iter().for_each(&mut *visit);
        if let Some(lora) = &self.lora {
            visit(&lora.a);
            lora.members.iter().for_each(|m| visit(&m.b));
        }
    }

    /// [`Linear::visit`], to change them; the same order.
    pub(crate) fn visit_mut(&mut self, visit: &mut dyn FnMut(&mut Param<B>)) {
        if let Weight::Trained(w) = &mut self.weight {
            visit(w);
        }
        self.bias.iter_mut().for_each(&mut *visit);
        if let Some(lora) = &mut self.lora {
            visit(&mut lora.a);
            lora.members.iter_mut().for_each(|m| visit(&mut m.b));
        }
    }
}

impl<B: Backend> LoraGroup<B> {
    /// The seed, if there is any dropout to do with it.
    fn dropout_seed(&self, seed: Option<u64>) -> Option<u64> {
        seed.filter(|_| self.dropout > 0.0)
    }

    /// `scratch.u` <- X At, X after dropout.
    fn project(&self, backend: &B, x: Mat<'_, B>, scratch: &mut LoraScratch<B>, seed: Option<u64>) {
        let LoraScratch { u, dropped, .. } = scratch;
        let x = match self.dropout_seed(seed) {
            None => x,
            Some(seed) => {
                let y = MatMut::new(dropped, x.rows, x.cols);
                backend.dropout(x, y, self.dropout, seed);
                Mat::new(dropped, x.rows, x.cols)
            }
        };
        let a = Mat::new(&self.a.value, self.rank, x.cols);
        backend.gemm(x, Op::N, a, Op::T, MatMut::new(u, x.rows, self.rank), 1.0, 0.0);
    }

    fn backward(
        &mut self,
        backend: &B,
        x: Mat<'_, B>,
        dy: Mat<'_, B>,
        dx: Option<&mut B::Buf>,
        scratch: &mut LoraScratch<B>,
        seed: Option<u64>,
    ) {
        let (rows, inp, rank) = (x.rows, x.cols, self.rank);
        self.project(backend, x, scratch, seed);
        let LoraScratch { u, du, dropped, masked } = scratch;
        for m in &mut self.members {
            let dy = Mat::columns(dy.buf, rows, m.out_start, m.out, dy.stride);
            let b = Mat::new(&m.b.value, m.out, m.rank);
            let du = MatMut::columns(du, rows, m.rank_start, m.rank, rank);
            backend.gemm(dy, Op::N, b, Op::N, du, self.scaling, 0.0);
            if let Some(grad) = &mut m.b.grad {
                let u = Mat::columns(u, rows, m.rank_start, m.rank, rank);
                let db = MatMut::new(grad, m.out, m.rank);
                backend.gemm(dy, Op::T, u, Op::N, db, self.scaling, 1.0);
            }
        }
        let seed = self.dropout_seed(seed);
        if let Some(grad) = &mut self.a.grad {
            let x = if seed.is_some() { Mat::new(dropped, rows, inp) } else { x };
            let da = MatMut::new(grad, rank, inp);
            backend.gemm(Mat::new(du, rows, rank), Op::T, x, Op::N, da, 1.0, 1.0);
        }
        let Some(dx) = dx else { return };
        let a = Mat::new(&self.a.value, rank, inp);
        let du = Mat::new(du, rows, rank);
        match seed {
            None => backend.gemm(du, Op::N, a, Op::N, MatMut::new(dx, rows, inp), 1.0, 1.0),
            Some(seed) => {
                // The gradient at the dropped input goes through the same mask before it is added.
                backend.gemm(du, Op::N, a, Op::N, MatMut::new(dropped, rows, inp), 1.0, 0.0);
                let y = MatMut::new(masked, rows, inp);
                backend.dropout(Mat::new(dropped, rows, inp), y, self.dropout, seed);
                backend.add(masked, dx, rows * inp);
            }
        }
    }
}

/// One tensor, refused if it holds NaN or infinity.
pub(crate) fn finite(source: &dyn TensorSource, name: &str) -> Result<NamedTensor, ModelError> {
    let tensor = source.tensor(name)?;
    tensor.check_finite()?;
    Ok(tensor)
}
