//! The end of the decoder: final norm, LM head and loss, over the rows that have a target and in
//! chunks of them.
//!
//! Rows of weight 0 are left out before the norm. The logits of a chunk become their gradient, in
//! place or in what products round them to, which is multiplied back at once, so that of all logits
//! only one chunk ever exists (the fused linear cross-entropy of Liger, kernels.md 5.2).

mod buffers;

use hone_kernels::{Backend, LossOptions, LossSums, Mat, MatMut, NormMore, Op};

use buffers::chunk_rows;
pub(crate) use buffers::{HeadActs, HeadBack};

use crate::buffers::Dims;
use crate::held::VALUE_BYTES;
use crate::linear::{LoraGroup, LoraNeeds, finite};
use crate::lora::{Adapter, EMBED, HEAD, TokenPatch};
use crate::param::{Param, ParamKind};
use crate::tensors::{TensorSource, Tensors};
use crate::{Batch, ModelConfig, ModelError};

/// The head's matrix.
enum HeadWeight<B: Backend> {
    /// The embedding's.
    Tied,
    Frozen(B::Frozen),
    Trained(Param<B>),
}

/// Final norm and head.
pub(crate) struct Head<B: Backend> {
    norm: Param<B>,
    weight: HeadWeight<B>,
    /// What is added to the loss of training; its soft cap holds for every loss.
    options: LossOptions,
    lora: Option<LoraGroup<B>>,
    /// Rows trained by themselves: of this matrix, and of the embedding too where it is tied.
    pub(crate) tokens: Option<TokenPatch<B>>,
    /// The base's matrix while an adapter's takes its place.
    stash: Option<HeadWeight<B>>,
}

/// The gradient's side of a call of [`Head::loss`].
pub(crate) struct HeadGrad<'a, B: Backend> {
    pub(crate) back: &'a mut HeadBack<B>,
    /// Receives the gradient at the last layer's output (T, D).
    pub(crate) dx: &'a mut B::Buf,
    /// One over the step's sum of weights.
    pub(crate) scale: f32,
}

impl<B: Backend> Head<B> {
    pub(crate) fn load(
        backend: &B,
        config: &ModelConfig,
        source: &dyn TensorSource,
        trained: bool,
    ) -> Result<Self, ModelError> {
        let norm = finite(source, "model.norm.weight")?;
        let norm = Param::new(backend, ParamKind::Norm, vec![norm], trained);
        let name = "lm_head.weight";
        let weight = if config.tie_word_embeddings {
            if source.has(name)
                && source.tensor(name)?.data != source.tensor("model.embed_tokens.weight")?.data
            {
                return Err(ModelError::Config {
                    file: "config.json",
                    reason:
                        "`tie_word_embeddings` is true, but the weights hold a `lm_head.weight` \
                             that differs from the embedding; set it to false"
                            .to_owned(),
                });
            }
            HeadWeight::Tied
        } else if trained {
            let weight = vec![finite(source, name)?];
            HeadWeight::Trained(Param::new(backend, ParamKind::Head, weight, true))
        } else {
            let weight = finite(source, name)?;
            HeadWeight::Frozen(backend.freeze(&weight.data, config.vocab_size, config.hidden_size))
        };
        Ok(Head {
            norm,
            weight,
            options: LossOptions::default(),
            lora: None,
            tokens: None,
            stash: None,
        })
    }

    /// Sets what is added to the loss.
    pub(crate) fn set_options(&mut self, options: LossOptions) {
        self.options = options;
    }

    /// Puts on what the adapter has for the head; `embed` is the base's embedding.
    pub(crate) fn attach(
        &mut self,
        backend: &B,
        config: &ModelConfig,
        embed: &Param<B>,
        adapter: &Adapter,
        trained: bool,
    ) -> Result<(), ModelError> {
        let (v, d) = (config.vocab_size, config.hidden_size);
        let plain = |tensor, trained| {
            HeadWeight::Trained(Param::new(backend, ParamKind::Head, vec![tensor], trained))
        };
        let is_tied = matches!(self.weight, HeadWeight::Tied);
        let new = if let Some(tensor) = adapter.whole("lm_head.weight") {
            Some(plain(tensor.clone(), trained))
        } else if is_tied && adapter.whole("model.embed_tokens.weight").is_some() {
            Some(HeadWeight::Frozen(backend.freeze(&embed.values(backend), v, d)))
        } else if let (HeadWeight::Frozen(w), false) =
            (&self.weight, adapter.config.token_ids(HEAD).is_empty())
        {
            // Rows are written into it, so it must be a plain buffer.
            let values = crate::NamedTensor::new("lm_head.weight", vec![v, d], backend.thaw(w));
            Some(plain(values, false))
        } else {
            None
        };
        if let Some(new) = new {
            self.stash = Some(std::mem::replace(&mut self.weight, new));
        }
        let module = [(HEAD.to_owned(), v)];
        // Magnitudes of the head are refused.
        self.lora = LoraGroup::new(backend, adapter, &module, d, trained, Vec::new)?;
        self.tokens = match &self.weight {
            HeadWeight::Tied => TokenPatch::new(backend, adapter, EMBED, &embed.value, trained),
            HeadWeight::Trained(w) => TokenPatch::new(backend, adapter, HEAD, &w.value, trained),
            HeadWeight::Frozen(_) => None,
        };
        Ok(())
    }

    /// Takes it off again.
    pub(crate) fn detach(&mut self, backend: &B, embed: &mut Param<B>) {
        self.lora = None;
        if let (Some(tokens), HeadWeight::Tied) = (&self.tokens, &self.weight) {
            tokens.undo(backend, &mut embed.value);
        }
        self.tokens = None;
        if let Some(base) = self.stash.take() {
            self.weight = base;
        }
    }

    /// Writes rows that are trained by themselves into their matrix.
    pub(crate) fn write_tokens(&mut self, backend: &B, embed: &mut Param<B>) {
        let Some(tokens) = &self.tokens else { return };
        match &mut self.weight {
            HeadWeight::Tied => tokens.apply(backend, &mut embed.value),
            HeadWeight::Trained(w) => tokens.apply(backend, &mut w.value),
            HeadWeight::Frozen(_) => {}
        }
    }

    /// The rows of the embedding that are trained by themselves, where the head is tied to it.
    pub(crate) fn tied_tokens(&self) -> Option<&TokenPatch<B>> {
        self.tokens.as_ref().filter(|_| matches!(self.weight, HeadWeight::Tied))
    }

    /// [`Head::tied_tokens`], to change them.
    pub(crate) fn tied_tokens_mut(&mut self) -> Option<&mut TokenPatch<B>> {
        self.tokens.as_mut().filter(|_| matches!(self.weight, HeadWeight::Tied))
    }

    /// Buffers that its adapter needs.
    pub(crate) fn lora_needs(&self, d: usize) -> LoraNeeds {
        self.lora.as_ref().map_or(LoraNeeds::default(), |lora| lora.needs(d))
    }

    /// Bytes of what no visit reaches: packed matrices, what adapters keep beside their factors,
    /// and the base's matrix while another takes its place.
    pub(crate) fn other_bytes(&self, backend: &B) -> u64 {
        let matrix = |weight: &HeadWeight<B>| match weight {
            HeadWeight::Frozen(w) => backend.frozen_bytes(w),
            HeadWeight::Tied | HeadWeight::Trained(_) => 0,
        };
        let stash = self.stash.as_ref().map_or(0, |stash| match stash {
            HeadWeight::Trained(param) => VALUE_BYTES * backend.len(&param.value) as u64,
            other => matrix(other),
        });
        let lora = self.lora.as_ref().map_or(0, |lora| lora.n_squares(backend));
        let tokens = self.tokens.as_ref().map_or(0, TokenPatch::n_originals);
        matrix(&self.weight) + stash + VALUE_BYTES * (lora + tokens) as u64
    }

    /// Takes `rows` of `x` (T, D) through the norm.
    fn gather(
        &self,
        (backend, dims): (&B, &Dims),
        x: &B::Buf,
        rows: &[u32],
        acts: &mut HeadActs<B>,
    ) {
        backend.gather_rows(x, rows, dims.d, &mut acts.gathered);
        let size = (rows.len(), dims.d);
        let (w, r) = (&self.norm.value, &mut acts.r);
        backend.rms_norm(&acts.gathered, w, dims.norm, size, &mut acts.normed, r);
    }

    /// `acts.logits` (rows, V) <- logits of `rows` normed rows from `start`, before any soft cap.
    fn project(
        &self,
        (backend, dims): (&B, &Dims),
        embed: &Param<B>,
        (start, rows): (usize, usize),
        acts: &mut HeadActs<B>,
    ) {
        let x = Mat::new(&acts.normed, start, dims.d).rows(start, rows);
        let y = MatMut::new(&mut acts.logits, rows, dims.v);
        match self.matrix(embed) {
            Err(frozen) => backend.linear(x, frozen, y, 0.0),
            Ok(value) => {
                let w = Mat::new(value, dims.v, dims.d);
                backend.gemm(x, Op::N, w, Op::T, y, 1.0, 0.0);
            }
        }
        if let Some(lora) = &self.lora {
            let seed = acts.chunk_seed(start);
            lora.forward(backend, x, &mut acts.logits, &mut acts.lora, seed);
        }
        if let Some(factor) = dims.logit_factor {
            backend.scale(&mut acts.logits, factor, rows * dims.v);
        }
    }

    /// The matrix: a plain buffer, or packed.
    fn matrix<'a>(&'a self, embed: &'a Param<B>) -> Result<&'a B::Buf, &'a B::Frozen> {
        match &self.weight {
            HeadWeight::Tied => embed.matrix(),
            HeadWeight::Trained(param) => param.matrix(),
            HeadWeight::Frozen(frozen) => Err(frozen),
        }
    }

    /// Logits of the given rows of `x`, chunk by chunk: `take(first, n, logits)` reads (n, V)
    /// values of the rows from `first`.
    pub(crate) fn logits(
        &self,
        (backend, dims): (&B, &Dims),
        embed: &Param<B>,
        x: &B::Buf,
        rows: &[u32],
        acts: &mut HeadActs<B>,
        take: &mut dyn FnMut(usize, usize, &B::Buf),
    ) {
        self.gather((backend, dims), x, rows, acts);
        for start in (0..rows.len()).step_by(chunk_rows(dims.v)) {
            let n = chunk_rows(dims.v).min(rows.len() - start);
            self.project((backend, dims), embed, (start, n), acts);
            if let Some(cap) = dims.logit_cap {
                backend.soft_cap(&mut acts.logits, cap, n * dims.v);
            }
            take(start, n, &acts.logits);
        }
    }

    /// The loss sums of a batch whose last layer gave `x`, and, with `grad`, all gradients down to
    /// that output. `row_loss` receives the loss of each row: plain cross-entropy without `grad`.
    #[allow(clippy::too_many_arguments, reason = "a forward, its targets and its backward at once")]
    pub(crate) fn loss(
        &mut self,
        (backend, dims): (&B, &Dims),
        embed: &mut Param<B>,
        x: &B::Buf,
        batch: &Batch,
        acts: &mut HeadActs<B>,
        mut grad: Option<HeadGrad<'_, B>>,
        mut row_loss: Option<&mut [f32]>,
    ) -> LossSums {
        let n_rows = batch.rows.len();
        self.gather((backend, dims), x, &batch.rows, acts);
        acts.targets.clear();
        acts.targets.extend(batch.rows.iter().map(|&row| batch.targets[row as usize]));
        acts.weights.clear();
        acts.weights.extend(batch.rows.iter().map(|&row| batch.weights[row as usize]));
        // The loss caps the logits itself: its gradient needs both sides of the cap.
        let soft_cap = dims.logit_cap.or(self.options.soft_cap);
        let options = match grad {
            Some(_) => LossOptions { soft_cap, ..self.options },
            None => LossOptions { soft_cap, ..LossOptions::default() },
        };
        let mut sums = LossSums::default();
        for start in (0..n_rows).step_by(chunk_rows(dims.v)) {
            let n = chunk_rows(dims.v).min(n_rows - start);
            self.project((backend, dims), embed, (start, n), acts);
            let logits = MatMut::new(&mut acts.logits, n, dims.v);
            let (targets, weights) = (&acts.targets[start..][..n], &acts.weights[start..][..n]);
            let row_loss = row_loss.as_deref_mut().map(|losses| &mut losses[start..][..n]);
            let scale = grad.as_ref().map(|grad| grad.scale * dims.logit_factor.unwrap_or(1.0));
            let dlogits = grad.as_mut().and_then(|grad| grad.back.dlogits_mut(backend));
            sums += match (scale, dlogits) {
                (Some(scale), Some(to)) => {
                    let to = (scale, to);
                    backend.cross_entropy_into(logits, targets, weights, to, row_loss, options)
                }
                (scale, _) => {
                    backend.cross_entropy_with(logits, targets, weights, scale, row_loss, options)
                }
            };
            if let Some(grad) = &mut grad {
                self.project_backward((backend, dims), embed, (start, n), acts, grad.back);
            }
        }
        if let Some(grad) = grad {
            let HeadBack { dnormed, dgathered, .. } = grad.back;
            backend.fill(dgathered, 0.0);
            let Param { value, grad: dw, .. } = &mut self.norm;
            let (size, dw) = ((n_rows, dims.d), NormMore::dw(dw.as_mut()));
            let (x, r) = (&acts.gathered, &acts.r);
            backend.rms_norm_backward(dnormed, x, value, dims.norm, r, size, dgathered, dw);
            backend.fill(grad.dx, 0.0);
            backend.scatter_add_rows(dgathered, &batch.rows, dims.d, grad.dx);
        }
        sums
    }

    /// Multiplies the logits' gradient back: rows of `dnormed`, and the head's own gradient where
    /// it is trained.
    fn project_backward(
        &mut self,
        (backend, dims): (&B, &Dims),
        embed: &mut Param<B>,
        (start, rows): (usize, usize),
        acts: &mut HeadActs<B>,
        back: &mut HeadBack<B>,
    ) {
        let (v, d) = (dims.v, dims.d);
        let HeadBack { dlogits, dnormed, .. } = back;
        let dlogits = if backend.len(dlogits) > 0 { &*dlogits } else { &acts.logits };
        let dlogits = Mat::new(dlogits, rows, v);
        let dnormed = MatMut { buf: dnormed, offset: start * d, rows, cols: d, stride: d };
        let x = Mat::new(&acts.normed, start, d).rows(start, rows);
        let mut dnormed = dnormed;
        match self.matrix(embed) {
            Err(frozen) => backend.linear_dx(dlogits, frozen, dnormed.again(), 0.0),
            Ok(value) => {
                let w = Mat::new(value, v, d);
                backend.gemm(dlogits, Op::N, w, Op::N, dnormed.again(), 1.0, 0.0);
            }
        }
        let grad = match &mut self.weight {
            HeadWeight::Frozen(_) => None,
            HeadWeight::Tied => embed.grad.as_mut(),
            HeadWeight::Trained(param) => param.grad.as_mut(),
        };
        if let Some(grad) = grad {
            backend.gemm(dlogits, Op::T, x, Op::N, MatMut::new(grad, v, d), 1.0, 1.0);
        }
        if let Some(tokens) = &mut self.tokens {
            tokens.head_grad(backend, dlogits, x);
        }
        if let Some(lora) = &mut self.lora {
            let seed = acts.chunk_seed(start);
            lora.inner_grad(backend, dlogits, &mut acts.lora);
            lora.grads(backend, x, dlogits, &mut acts.lora, (seed, None));
            lora.add_dx(backend, dnormed, &mut acts.lora, seed);
        }
    }

    /// The base tensors under their own names; a tied head has none of its own.
    pub(crate) fn export(&self, backend: &B, config: &ModelConfig, into: &mut Tensors) {
        self.norm.export(backend, &self.norm.value, into);
        match self.stash.as_ref().unwrap_or(&self.weight) {
            HeadWeight::Tied => {}
            HeadWeight::Trained(param) => param.export(backend, &param.value, into),
            HeadWeight::Frozen(w) => {
                let shape = vec![config.vocab_size, config.hidden_size];
                let data = backend.thaw(w);
                into.insert(crate::NamedTensor::new("lm_head.weight", shape, data));
            }
        }
    }

    /// Calls `visit` with every parameter that lives as a plain buffer.
    pub(crate) fn visit(&self, visit: &mut dyn FnMut(&Param<B>)) {
        visit(&self.norm);
        if let HeadWeight::Trained(param) = &self.weight {
            visit(param);
        }
        self.lora.iter().for_each(|lora| lora.visit(visit));
        self.tokens.iter().for_each(|tokens| visit(&tokens.rows));
    }

    /// [`Head::visit`], to change them; the same order.
    pub(crate) fn visit_mut(&mut self, visit: &mut dyn FnMut(&mut Param<B>)) {
        visit(&mut self.norm);
        if let HeadWeight::Trained(param) = &mut self.weight {
            visit(param);
        }
        self.lora.iter_mut().for_each(|lora| lora.visit_mut(visit));
        self.tokens.iter_mut().for_each(|tokens| visit(&mut tokens.rows));
    }
}
