//! One layer of the decoder: attention and feed-forward, each behind a norm and added to the
//! residual stream.
//!
//!   m = x + o(attention(rope(qkv(norm1(x)))))        y = m + down(swiglu(gate_up(norm2(m))))

use hone_kernels::{AttnMask, Backend, Heads, rng};

use crate::config::layer_prefix;
use crate::linear::{Linear, LoraScratch, finite};
use crate::param::{Param, ParamKind};
use crate::tensors::{TensorSource, Tensors};
use crate::{ModelConfig, ModelError};

/// Linear maps of a layer; each draws its own dropout.
const N_SITES: u64 = 4;

/// Sizes that every layer shares.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dims {
    /// D.
    pub(crate) d: usize,
    /// I.
    pub(crate) i: usize,
    /// V.
    pub(crate) v: usize,
    pub(crate) heads: Heads,
    pub(crate) mask: AttnMask,
    pub(crate) eps: f32,
}

impl Dims {
    pub(crate) fn new(config: &ModelConfig) -> Self {
        let heads = Heads {
            n_q: config.num_attention_heads,
            n_kv: config.num_key_value_heads,
            dim: config.head_dim,
        };
        let scale = (1.0 / (config.head_dim as f64).sqrt()) as f32;
        Dims {
            d: config.hidden_size,
            i: config.intermediate_size,
            v: config.vocab_size,
            heads,
            mask: AttnMask { window: None, scale },
            eps: config.rms_norm_eps as f32,
        }
    }
}

/// What one pass over a batch needs beside weights and activations.
pub(crate) struct Pass<'a, B: Backend> {
    pub(crate) backend: &'a B,
    pub(crate) dims: Dims,
    pub(crate) positions: &'a [u32],
    pub(crate) seq_lens: &'a [usize],
    /// Table of rotary positions.
    pub(crate) cos_sin: &'a B::Buf,
    /// Turns dropout on.
    pub(crate) dropout_seed: Option<u64>,
}

impl<B: Backend> Pass<'_, B> {
    /// T.
    pub(crate) fn rows(&self) -> usize {
        self.positions.len()
    }
}

/// What the backward of a layer reads, for T tokens.
pub(crate) struct Acts<B: Backend> {
    /// Output of the first norm (T, D).
    pub(crate) normed: B::Buf,
    /// Scales of the first norm (T).
    pub(crate) r1: B::Buf,
    /// Queries, keys and values after rotation (T, (H + 2 G) K).
    pub(crate) qkv: B::Buf,
    /// Output of attention (T, H K).
    pub(crate) attn: B::Buf,
    /// Log-sum-exp of attention (T, H).
    pub(crate) lse: B::Buf,
    /// Residual stream between the halves (T, D).
    pub(crate) mid: B::Buf,
    /// Output of the second norm (T, D).
    pub(crate) mid_normed: B::Buf,
    /// Scales of the second norm (T).
    pub(crate) r2: B::Buf,
    /// Gates and ups (T, 2 I); the backward turns them into their gradient.
    pub(crate) gate_up: B::Buf,
}

impl<B: Backend> Acts<B> {
    pub(crate) fn new(backend: &B, dims: &Dims, rows: usize) -> Self {
        let zeros = |width: usize| backend.zeros(rows * width);
        Acts {
            normed: zeros(dims.d),
            r1: zeros(1),
            qkv: zeros(dims.heads.qkv_width()),
            attn: zeros(dims.heads.out_width()),
            lse: zeros(dims.heads.n_q),
            mid: zeros(dims.d),
            mid_normed: zeros(dims.d),
            r2: zeros(1),
            gate_up: zeros(2 * dims.i),
        }
    }

    /// Values per token.
    pub(crate) fn values_per_token(dims: &Dims) -> usize {
        3 * dims.d
            + 2
            + dims.heads.qkv_width()
            + dims.heads.out_width()
            + dims.heads.n_q
            + 2 * dims.i
    }
}

/// Buffers of a forward that no backward reads, shared by all layers.
pub(crate) struct Scratch<B: Backend> {
    /// Output of SwiGLU (T, I).
    pub(crate) h: B::Buf,
    pub(crate) lora: LoraScratch<B>,
}

/// Buffers of a backward, shared by all layers.
pub(crate) struct BackScratch<B: Backend> {
    /// Gradient at a norm's output (T, D).
    dnormed: B::Buf,
    /// Gradient of queries, keys and values.
    dqkv: B::Buf,
    /// Gradient of attention's output.
    dattn: B::Buf,
    /// Gradient of SwiGLU's output (T, I).
    dh: B::Buf,
}

impl<B: Backend> BackScratch<B> {
    pub(crate) fn new(backend: &B, dims: &Dims, rows: usize) -> Self {
        let zeros = |width: usize| backend.zeros(rows * width);
        BackScratch {
            dnormed: zeros(dims.d),
            dqkv: zeros(dims.heads.qkv_width()),
            dattn: zeros(dims.heads.out_width()),
            dh: zeros(dims.i),
        }
    }
}

/// The weights of one layer.
pub(crate) struct Layer<B: Backend> {
    pub(crate) idx: usize,
    pub(crate) input_norm: Param<B>,
    pub(crate) qkv: Linear<B>,
    pub(crate) o: Linear<B>,
    pub(crate) post_norm: Param<B>,
    pub(crate) gate_up: Linear<B>,
    pub(crate) down: Linear<B>,
}

impl<B: Backend> Layer<B> {
    pub(crate) fn load(
        backend: &B,
        config: &ModelConfig,
        source: &dyn TensorSource,
        idx: usize,
        trained: bool,
    ) -> Result<Self, ModelError> {
        let prefix = layer_prefix(idx);
        let shapes = config.linears();
        let norm = |name: &str| -> Result<Param<B>, ModelError> {
            let tensor = finite(source, &format!("{prefix}.{name}.weight"))?;
            Ok(Param::new(backend, ParamKind::Norm, vec![tensor], trained))
        };
        let linear = |range: std::ops::Range<usize>| {
            let (inp, has_bias) = (shapes[range.start].inp, shapes[range.start].has_bias);
            let named = |shape: &crate::config::LinearShape| {
                (format!("{prefix}.{}", shape.name), shape.out)
            };
            let modules = shapes[range].iter().map(named).collect();
            Linear::load(backend, source, modules, inp, has_bias, trained)
        };
        Ok(Layer {
            idx,
            input_norm: norm("input_layernorm")?,
            qkv: linear(0..3)?,
            o: linear(3..4)?,
            post_norm: norm("post_attention_layernorm")?,
            gate_up: linear(4..6)?,
            down: linear(6..7)?,
        })
    }

    /// The seed of one of the layer's maps.
    fn seed(&self, pass: &Pass<'_, B>, site: u64) -> Option<u64> {
        pass.dropout_seed.map(|seed| rng::mix(seed, self.idx as u64 * N_SITES + site))
    }

    /// `out` (T, D) <- the layer on `x` (T, D); fills `acts`.
    pub(crate) fn forward(
        &self,
        pass: &Pass<'_, B>,
        x: &B::Buf,
        acts: &mut Acts<B>,
        scratch: &mut Scratch<B>,
        out: &mut B::Buf,
    ) {
        let (b, t, dims) = (pass.backend, pass.rows(), &pass.dims);
        let (d, heads) = (dims.d, dims.heads);
        let Scratch { h, lora } = scratch;
        let size = (t, d);
        b.rms_norm(x, &self.input_norm.value, dims.eps, size, &mut acts.normed, &mut acts.r1);
        let seed = self.seed(pass, 0);
        self.qkv.forward(b, (&acts.normed, t), (&mut acts.qkv, 0.0), lora, seed);
        b.rope(&mut acts.qkv, heads, pass.positions, pass.cos_sin, false);
        let (attn, lse) = (&mut acts.attn, &mut acts.lse);
        b.attention(&acts.qkv, heads, pass.seq_lens, dims.mask, attn, lse);
        b.copy(x, &mut acts.mid, t * d);
        self.o.forward(b, (&acts.attn, t), (&mut acts.mid, 1.0), lora, self.seed(pass, 1));

        let (w, mid) = (&self.post_norm.value, &acts.mid);
        b.rms_norm(mid, w, dims.eps, size, &mut acts.mid_normed, &mut acts.r2);
        let seed = self.seed(pass, 2);
        self.gate_up.forward(b, (&acts.mid_normed, t), (&mut acts.gate_up, 0.0), lora, seed);
        b.swiglu(&acts.gate_up, (t, dims.i), h);
        b.copy(&acts.mid, out, t * d);
        self.down.forward(b, (h, t), (out, 1.0), lora, self.seed(pass, 3));
    }

    /// Given `dx`, the gradient at the layer's output (T, D), makes it the gradient at its input
    /// `x` and adds to the gradients of what is trained. `needs_dx` = false leaves `dx` unfinished
    /// where nothing below is trained.
    #[allow(clippy::too_many_arguments, reason = "the buffers of one backward pass")]
    pub(crate) fn backward(
        &mut self,
        pass: &Pass<'_, B>,
        x: &B::Buf,
        acts: &mut Acts<B>,
        scratch: &mut Scratch<B>,
        back: &mut BackScratch<B>,
        dx: &mut B::Buf,
        needs_dx: bool,
    ) {
        let (b, t, dims) = (pass.backend, pass.rows(), pass.dims);
        let (heads, size) = (dims.heads, (t, dims.d));
        let seeds = [0, 1, 2, 3].map(|site| self.seed(pass, site));
        let Scratch { h, lora } = scratch;
        let BackScratch { dnormed, dqkv, dattn, dh } = back;

        if self.down.needs_input() {
            b.swiglu(&acts.gate_up, (t, dims.i), h);
        }
        self.down.backward(b, (h, dx, t), Some(dh), lora, seeds[3]);
        b.swiglu_backward(dh, (t, dims.i), &mut acts.gate_up);
        let (input, dy) = (&acts.mid_normed, &acts.gate_up);
        self.gate_up.backward(b, (input, dy, t), Some(dnormed), lora, seeds[2]);
        let Param { value, grad, .. } = &mut self.post_norm;
        b.rms_norm_backward(dnormed, &acts.mid, value, &acts.r2, size, dx, grad.as_mut());

        self.o.backward(b, (&acts.attn, dx, t), Some(dattn), lora, seeds[1]);
        let (qkv, out, lse) = (&acts.qkv, &acts.attn, &acts.lse);
        b.attention_backward(dattn, qkv, out, lse, heads, pass.seq_lens, dims.mask, dqkv);
        b.rope(dqkv, heads, pass.positions, pass.cos_sin, true);
        let Param { value, grad, .. } = &mut self.input_norm;
        let below = needs_dx || grad.is_some();
        let dnormed_out = if below { Some(&mut *dnormed) } else { None };
        self.qkv.backward(b, (&acts.normed, dqkv, t), dnormed_out, lora, seeds[0]);
        if below {
            b.rms_norm_backward(dnormed, x, value, &acts.r1, size, dx, grad.as_mut());
        }
    }

    /// The linear maps.
    pub(crate) fn linears(&self) -> [&Linear<B>; 4] {
        [&self.qkv, &self.o, &self.gate_up, &self.down]
    }

    /// The linear maps, to change them.
    pub(crate) fn linears_mut(&mut self) -> [&mut Linear<B>; 4] {
        [&mut self.qkv, &mut self.o, &mut self.gate_up, &mut self.down]
    }

    /// The base tensors under their own names.
    pub(crate) fn export(&self, backend: &B, into: &mut Tensors) {
        self.input_norm.export(backend, &self.input_norm.value, into);
        self.post_norm.export(backend, &self.post_norm.value, into);
        self.linears().iter().for_each(|linear| linear.export(backend, into));
    }

    /// Calls `visit` with every parameter that lives as a plain buffer.
    pub(crate) fn visit(&self, visit: &mut dyn FnMut(&Param<B>)) {
        visit(&self.input_norm);
        visit(&self.post_norm);
        self.linears().iter().for_each(|linear| linear.visit(visit));
    }

    /// [`Layer::visit`], to change them; the same order.
    pub(crate) fn visit_mut(&mut self, visit: &mut dyn FnMut(&mut Param<B>)) {
        visit(&mut self.input_norm);
        visit(&mut self.post_norm);
        self.linears_mut().into_iter().for_each(|linear| linear.visit_mut(visit));
    }
}
