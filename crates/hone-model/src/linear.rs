//! A linear map, with its bias and its adapter: Y = X Wt + b + s (X At) Bt, and the gradients of
//! it.
//!
//! Maps that read the same input (q, k, v; gate, up) are one map here whose rows lie one below the
//! other, and their adapters share one product with X. A frozen W gets no gradient.

use hone_kernels::quant::{Quantized, ValueType};
use hone_kernels::{Backend, Mat, MatMut, Onto, Op, Tail};

use crate::ModelError;
use crate::held::VALUE_BYTES;
use crate::lora::Adapter;
pub(crate) use crate::lora::{LoraGroup, LoraNeeds, LoraScratch, Site};
use crate::param::{Param, ParamKind};
use crate::tensors::{NamedTensor, TensorSource, Tensors};

/// The matrix of a map: packed for multiplication when frozen, a buffer with its gradient when
/// trained.
pub(crate) enum Weight<B: Backend> {
    Frozen(B::Frozen),
    Trained(Param<B>),
}

impl<B: Backend> Weight<B> {
    /// Y <- X Wt + beta Y.
    pub(crate) fn linear(&self, backend: &B, x: Mat<'_, B>, y: MatMut<'_, B>, beta: f32) {
        self.linear_with(backend, x, &[], y, Onto::Old(beta));
    }

    /// dX <- dY W + beta dX.
    pub(crate) fn linear_dx(&self, backend: &B, dy: Mat<'_, B>, dx: MatMut<'_, B>, beta: f32) {
        self.linear_dx_with(backend, dy, &[], dx, beta);
    }

    /// Y <- X Wt + tails + onto.
    fn linear_with(
        &self,
        backend: &B,
        x: Mat<'_, B>,
        tails: &[Tail<'_, B>],
        y: MatMut<'_, B>,
        onto: Onto<'_, B>,
    ) {
        match self {
            Weight::Frozen(w) => backend.linear_with(x, w, tails, y, onto),
            Weight::Trained(w) => {
                let w = Mat::new(&w.value, y.cols, x.cols);
                backend.gemm_with((x, Op::N), (w, Op::T), tails, y, onto);
            }
        }
    }

    /// dX <- dY W + tails + beta dX.
    fn linear_dx_with(
        &self,
        backend: &B,
        dy: Mat<'_, B>,
        tails: &[Tail<'_, B>],
        dx: MatMut<'_, B>,
        beta: f32,
    ) {
        match self {
            Weight::Frozen(w) => backend.linear_dx_with(dy, w, tails, dx, beta),
            Weight::Trained(w) => {
                let w = Mat::new(&w.value, dy.cols, dx.cols);
                backend.gemm_with((dy, Op::N), (w, Op::N), tails, dx, Onto::Old(beta));
            }
        }
    }

    /// Its values, (out, in).
    pub(crate) fn values(&self, backend: &B) -> Vec<f32> {
        match self {
            Weight::Frozen(w) => backend.thaw(w),
            Weight::Trained(w) => backend.download(&w.value),
        }
    }
}

/// A linear map (in) -> (out).
pub(crate) struct Linear<B: Backend> {
    weight: Weight<B>,
    /// One a module, or none.
    biases: Vec<Param<B>>,
    lora: Option<LoraGroup<B>>,
    /// The modules whose rows are stacked here, with their number of rows.
    modules: Vec<(String, usize)>,
    out: usize,
    inp: usize,
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
        let quantized = if trained { None } else { quantized(source, &modules)? };
        let weights = if quantized.is_none() { read("weight")? } else { Vec::new() };
        let weight = if let Some(parts) = quantized {
            Weight::Frozen(backend.freeze_4bit(parts, inp))
        } else if trained {
            Weight::Trained(Param::new(backend, ParamKind::Matrix, weights, true))
        } else if let [only] = weights.as_slice() {
            Weight::Frozen(backend.freeze(&only.data, out, inp))
        } else {
            let stacked: Vec<f32> = weights.into_iter().flat_map(|t| t.data).collect();
            Weight::Frozen(backend.freeze(&stacked, out, inp))
        };
        let biases = if has_bias { read("bias")? } else { Vec::new() };
        let bias = |tensor| Param::new(backend, ParamKind::Bias, vec![tensor], trained);
        let biases = biases.into_iter().map(bias).collect();
        Ok(Linear { weight, biases, lora: None, modules, out, inp })
    }

    /// Whether the backward reads the input.
    pub(crate) fn needs_input(&self) -> bool {
        let is_trained = matches!(&self.weight, Weight::Trained(w) if w.grad.is_some());
        is_trained || self.lora.is_some()
    }

    /// Bytes of what no visit reaches: a packed matrix, and what adapters keep beside their
    /// factors.
    pub(crate) fn other_bytes(&self, backend: &B) -> u64 {
        let squares = self.lora.as_ref().map_or(0, |lora| lora.n_squares(backend));
        let packed = match &self.weight {
            Weight::Frozen(w) => backend.frozen_bytes(w),
            Weight::Trained(_) => 0,
        };
        packed + VALUE_BYTES * squares as u64
    }

    /// Buffers that the adapters here need.
    pub(crate) fn lora_needs(&self) -> LoraNeeds {
        self.lora.as_ref().map_or(LoraNeeds::default(), |lora| lora.needs(self.inp))
    }

    /// Each bias with the first of its columns and their number.
    fn bias_columns(&self) -> impl Iterator<Item = (usize, usize)> + use<B> {
        let mut start = 0;
        let columns = self.biases.iter().zip(&self.modules).map(|(_, &(_, out))| {
            start += out;
            (start - out, out)
        });
        columns.collect::<Vec<_>>().into_iter()
    }

    /// Columns of X At that a call keeps for its backward: R, or 0 where it does not.
    pub(crate) fn inner_width(&self) -> usize {
        self.lora.as_ref().map_or(0, LoraGroup::inner_width)
    }

    /// Y (rows, out) <- X Wt + b + adapter, and `onto`, as many values of another buffer.
    pub(crate) fn forward(
        &self,
        backend: &B,
        (x, rows): (&B::Buf, usize),
        (y, onto): (&mut B::Buf, Option<&B::Buf>),
        scratch: &mut LoraScratch<B>,
        site: Site<'_, B>,
    ) {
        let input = Mat::new(x, rows, self.inp);
        match &self.lora {
            Some(lora) if lora.has_dora() => {
                if let Some(onto) = onto {
                    backend.copy(onto, y, rows * self.out);
                }
                let beta = if onto.is_some() { 1.0 } else { 0.0 };
                lora.forward_dora(backend, &self.weight, input, (y, beta), scratch, site.seed);
            }
            lora => {
                let tails = lora.as_ref().map(|lora| lora.tails(backend, input, scratch, site));
                let (y, tails) = (MatMut::new(y, rows, self.out), tails.unwrap_or_default());
                let onto = onto.map_or(Onto::Old(0.0), Onto::Buf);
                self.weight.linear_with(backend, input, &tails, y, onto);
            }
        }
        for (bias, (start, out)) in self.biases.iter().zip(self.bias_columns()) {
            backend.add_bias(MatMut::columns(y, rows, start, out, self.out), &bias.value);
        }
    }

    /// Whether [`Linear::backward_input`] needs the input, so that [`Linear::backward`] has to do for
    /// both: a trained length of rows scales what comes back through them.
    pub(crate) fn is_whole(&self) -> bool {
        self.lora.as_ref().is_some_and(LoraGroup::has_dora)
    }

    /// [`Linear::backward_input`] and [`Linear::backward_weights`]. Adds to the gradients of what is
    /// trained, and overwrites `dx` (rows, in) when it is asked for. `x` and `site` are those of the
    /// forward.
    pub(crate) fn backward(
        &mut self,
        backend: &B,
        (x, dy, rows): (&B::Buf, &B::Buf, usize),
        dx: Option<&mut B::Buf>,
        scratch: &mut LoraScratch<B>,
        site: Site<'_, B>,
    ) {
        if let Some(lora) = self.lora.as_mut().filter(|lora| lora.has_dora()) {
            let both = (Mat::new(x, rows, self.inp), Mat::new(dy, rows, self.out));
            let dx = dx.map(|dx| MatMut::new(dx, rows, self.inp));
            lora.backward_dora(backend, &self.weight, both, dx, scratch, site.seed);
            return self.bias_grads(backend, (dy, rows));
        }
        self.backward_input(backend, (dy, rows), dx, scratch, site.seed);
        self.backward_weights(backend, (x, dy, rows), scratch, site);
    }

    /// The first half of a backward: overwrites `dx` (rows, in) when it is asked for. Where rows have no
    /// trained lengths.
    pub(crate) fn backward_input(
        &self,
        backend: &B,
        (dy, rows): (&B::Buf, usize),
        dx: Option<&mut B::Buf>,
        scratch: &mut LoraScratch<B>,
        seed: Option<u64>,
    ) {
        let dy = Mat::new(dy, rows, self.out);
        if let Some(lora) = &self.lora {
            lora.inner_grad(backend, dy, scratch);
        }
        let Some(dx) = dx else { return };
        let (mut dx, lora) = (MatMut::new(dx, rows, self.inp), self.lora.as_ref());
        let tail = lora.and_then(|lora| lora.dx_tail((rows, self.inp), scratch, seed));
        self.weight.linear_dx_with(backend, dy, tail.as_slice(), dx.again(), 0.0);
        if let Some(lora) = lora.filter(|_| tail.is_none()) {
            lora.add_dx(backend, dx, scratch, seed);
        }
    }

    /// The second half: adds to the gradients of what is trained. After [`Linear::backward_input`], with
    /// the same `dy` and `scratch`; `x` and `site` are those of the forward.
    pub(crate) fn backward_weights(
        &mut self,
        backend: &B,
        (x, dy, rows): (&B::Buf, &B::Buf, usize),
        scratch: &mut LoraScratch<B>,
        site: Site<'_, B>,
    ) {
        let (out, inp) = (self.out, self.inp);
        let (input, dy_mat) = (Mat::new(x, rows, inp), Mat::new(dy, rows, out));
        if let Weight::Trained(Param { grad: Some(grad), .. }) = &mut self.weight {
            let dw = MatMut::new(grad, out, inp);
            backend.gemm(dy_mat, Op::T, input, Op::N, dw, 1.0, 1.0);
        }
        if let Some(lora) = &mut self.lora {
            let inner = (backend.len(site.inner) > 0).then_some(&*site.inner);
            lora.grads(backend, input, dy_mat, scratch, (site.seed, inner));
        }
        self.bias_grads(backend, (dy, rows));
    }

    /// Adds to the gradients of trained biases.
    fn bias_grads(&mut self, backend: &B, (dy, rows): (&B::Buf, usize)) {
        let columns = self.bias_columns();
        for (bias, (start, n)) in self.biases.iter_mut().zip(columns) {
            if let Some(grad) = &mut bias.grad {
                backend.bias_grad(Mat::columns(dy, rows, start, n, self.out), grad);
            }
        }
    }

    /// Puts the adapter's factors for these modules in place. Errors: DoRA on weights that are
    /// trained.
    pub(crate) fn attach(
        &mut self,
        backend: &B,
        adapter: &Adapter,
        trained: bool,
    ) -> Result<(), ModelError> {
        if adapter.config.use_dora && matches!(self.weight, Weight::Trained(_)) {
            let what = "`use_dora` needs frozen base weights".to_owned();
            return Err(ModelError::Adapter(what));
        }
        let weight = || self.weight.values(backend);
        self.lora = LoraGroup::new(backend, adapter, &self.modules, self.inp, trained, weight)?;
        Ok(())
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
        self.biases.iter().for_each(|bias| bias.export(backend, &bias.value, into));
    }

    /// Calls `visit` with every parameter that lives as a plain buffer.
    pub(crate) fn visit(&self, visit: &mut dyn FnMut(&Param<B>)) {
        if let Weight::Trained(w) = &self.weight {
            visit(w);
        }
        self.biases.iter().for_each(&mut *visit);
        if let Some(lora) = &self.lora {
            lora.visit(visit);
        }
    }

    /// [`Linear::visit`], to change them; the same order.
    pub(crate) fn visit_mut(&mut self, visit: &mut dyn FnMut(&mut Param<B>)) {
        if let Weight::Trained(w) = &mut self.weight {
            visit(w);
        }
        self.biases.iter_mut().for_each(&mut *visit);
        if let Some(lora) = &mut self.lora {
            lora.visit_mut(visit);
        }
    }
}

/// The modules' weights in 4 bits, if the source has all of them so. Products are f32, and so are
/// their dequantised values: not rounded to the type that the weight once had (bitsandbytes does
/// the same for inputs in f32).
fn quantized(
    source: &dyn TensorSource,
    modules: &[(String, usize)],
) -> Result<Option<Vec<Quantized>>, ModelError> {
    let part = |(name, _): &(String, usize)| {
        let part = source.quantized(&format!("{name}.weight"))?;
        Ok(part.map(|part| part.with_values(ValueType::F32)))
    };
    modules.iter().map(part).collect()
}

/// One tensor as products see it: of a 4-bit weight, the values before they are rounded to the type
/// that it once had.
pub(crate) fn as_multiplied(
    source: &dyn TensorSource,
    name: &str,
) -> Result<NamedTensor, ModelError> {
    let tensor = source.tensor(name)?;
    let tensor = match source.quantized(name)? {
        Some(weight) => {
            NamedTensor { data: weight.with_values(ValueType::F32).dequantize(), ..tensor }
        }
        None => tensor,
    };
    tensor.check_finite()?;
    Ok(tensor)
}

/// One tensor, refused if it holds NaN or infinity.
pub(crate) fn finite(source: &dyn TensorSource, name: &str) -> Result<NamedTensor, ModelError> {
    let tensor = source.tensor(name)?;
    tensor.check_finite()?;
    Ok(tensor)
}
