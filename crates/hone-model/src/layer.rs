//! One layer of the decoder: attention and feed-forward, each a half that is added to the residual
//! stream.
//!
//!   m = x + s n2(o(attention(rope(norm(qkv(n1(x)))))))     y = m + s n4(down(glu(gate_up(n3(m)))))
//!
//! Which of the norms n1 to n4 there are, the norm of queries and keys, rotary positions, windows,
//! soft caps and the factor s are knobs; Llama has n1, n3 and rope, and s = 1.

use hone_kernels::{AttnMask, Backend, MatMut, NormMore, rng};

use crate::buffers::{Acts, BackScratch, CoreActs, Dims, End, HalfActs, Scratch, StreamGrad};
use crate::config::{Activation, LayerRope, Map, layer_prefix};
use crate::linear::{Linear, LoraScratch, Site, finite};
use crate::param::{Param, ParamKind};
use crate::rope::Ropes;
use crate::tensors::{TensorSource, Tensors};
use crate::{ModelConfig, ModelError, Recompute};

/// Linear maps of a layer: each draws its own dropout, and keeps its adapter's inner values.
pub(crate) const N_SITES: usize = 4;

/// What one pass over a batch needs beside weights and activations.
pub(crate) struct Pass<'a, B: Backend> {
    pub(crate) backend: &'a B,
    pub(crate) dims: Dims,
    /// T.
    pub(crate) rows: usize,
    pub(crate) seq_lens: &'a [usize],
    pub(crate) ropes: &'a Ropes<B>,
    /// Rows of each rotary table, where they are not those of the batch last prepared.
    pub(crate) rope_rows: Option<&'a [Vec<u32>]>,
    /// Turns dropout on.
    pub(crate) dropout_seed: Option<u64>,
}

impl<B: Backend> Pass<'_, B> {
    /// Rotates queries and keys, or back.
    fn rope(&self, qkv: &mut B::Buf, set: usize, inverse: bool) {
        let (table, rows) = self.ropes.of_batch(set);
        let rows = self.rope_rows.map_or(rows, |rows| &rows[set]);
        self.backend.rope(qkv, self.dims.heads, self.dims.rotary, rows, table, inverse);
    }
}

/// The weights of one layer.
pub(crate) struct Layer<B: Backend> {
    idx: usize,
    /// What a query may see.
    mask: AttnMask,
    /// Set of rotary positions.
    rope: Option<usize>,
    /// Norms before and after attention, before and after the feed-forward.
    norms: [Option<Param<B>>; 4],
    /// Norms of queries and keys, or neither.
    qk_norms: [Option<Param<B>>; 2],
    pub(crate) qkv: Linear<B>,
    pub(crate) o: Linear<B>,
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
        let linear = |map: Map| {
            let parts: Vec<_> = shapes.iter().filter(|shape| shape.map == map).collect();
            let (inp, has_bias) = (parts[0].inp, parts[0].has_bias);
            let modules = parts.iter().map(|s| (format!("{prefix}.{}", s.name), s.out)).collect();
            Linear::load(backend, source, modules, inp, has_bias, trained)
        };
        let mut norms = Vec::new();
        for named in config.norms() {
            norms.push(named.map(|(name, _)| norm(name)).transpose()?);
        }
        let norms: [Option<Param<B>>; 6] =
            norms.try_into().unwrap_or_else(|_| unreachable!("one for each of six names"));
        let [attn_in, attn_out, ffn_in, ffn_out, q, k] = norms;
        let (dims, knobs) = (Dims::new(config), config.layer(idx));
        Ok(Layer {
            idx,
            mask: AttnMask { window: knobs.window, scale: dims.scale, soft_cap: dims.score_cap },
            rope: match knobs.rope {
                LayerRope::Main => Some(0),
                LayerRope::Local => Some(1),
                LayerRope::Off => None,
            },
            norms: [attn_in, attn_out, ffn_in, ffn_out],
            qk_norms: [q, k],
            qkv: linear(Map::Qkv)?,
            o: linear(Map::O)?,
            gate_up: linear(Map::GateUp)?,
            down: linear(Map::Down)?,
        })
    }

    /// What a query of this layer may see.
    pub(crate) fn mask(&self) -> AttnMask {
        self.mask
    }

    /// What a call of each of the layer's maps has of its own.
    fn sites<'a>(
        &self,
        pass: &Pass<'_, B>,
        inner: &'a mut [B::Buf; N_SITES],
    ) -> [Site<'a, B>; N_SITES] {
        let mut number = (self.idx * N_SITES) as u64;
        inner.each_mut().map(|inner| {
            let seed = pass.dropout_seed.map(|seed| rng::mix(seed, number));
            number += 1;
            Site { seed, inner }
        })
    }

    /// `out` (T, D) <- the layer on `x` (T, D); fills `acts`.
    pub(crate) fn forward(
        &self,
        pass: &Pass<'_, B>,
        x: &B::Buf,
        acts: &mut Acts<'_, B>,
        scratch: &mut Scratch<B>,
        out: &mut B::Buf,
    ) {
        self.project(pass, x, acts, scratch);
        self.attend(pass, acts);
        self.finish(pass, x, acts, scratch, out);
    }

    /// Computes what `recompute` has not kept once more, the same bytes: all that the backward
    /// reads, and nothing else. `out` may be written over.
    pub(crate) fn restore(
        &self,
        pass: &Pass<'_, B>,
        recompute: Recompute,
        x: &B::Buf,
        acts: &mut Acts<'_, B>,
        scratch: &mut Scratch<B>,
        out: &mut B::Buf,
    ) {
        if recompute == Recompute::None {
            return;
        }
        self.project(pass, x, acts, scratch);
        if recompute == Recompute::Layer {
            self.attend(pass, acts);
        }
        self.add_attention(pass, x, acts, scratch);
        if recompute == Recompute::Layer {
            self.gate(pass, acts, scratch);
            if self.norms[3].is_some() {
                // Of the last map only what its norm reads.
                self.add_ffn(pass, acts, scratch, out);
            }
        }
    }

    /// The part before attention: `acts.half.qkv` <- queries, keys and values, normed and rotated.
    pub(crate) fn project(
        &self,
        pass: &Pass<'_, B>,
        x: &B::Buf,
        acts: &mut Acts<'_, B>,
        scratch: &mut Scratch<B>,
    ) {
        let (b, t, dims) = (pass.backend, pass.rows, &pass.dims);
        let HalfActs { r1, qkv, raw, .. } = &mut *acts.half;
        let Scratch { normed: y, lora, .. } = scratch;
        let input = normed(pass, (x, r1), self.norms[0].as_ref(), y);
        let [site, ..] = self.sites(pass, &mut acts.core.inner);
        self.qkv.forward(b, (input, t), (qkv, None), lora, site);
        let (mut start, stride) = (0, dims.heads.qkv_width());
        for ((w, width), raw) in self.qk_norms.iter().zip(dims.qk_widths()).zip(raw) {
            if let Some(w) = w {
                let x = MatMut::columns(qkv, t, start, width, stride);
                b.group_norm(x, &w.value, dims.norm, b.len(&w.value), raw);
            }
            start += width;
        }
        if let Some(set) = self.rope {
            pass.rope(qkv, set, false);
        }
    }

    /// Attention itself, from `acts.half.qkv` into `acts.core.attn`.
    fn attend(&self, pass: &Pass<'_, B>, acts: &mut Acts<'_, B>) {
        let (qkv, CoreActs { attn, lse, .. }) = (&acts.half.qkv, &mut *acts.core);
        pass.backend.attention(qkv, pass.dims.heads, pass.seq_lens, self.mask, attn, lse);
    }

    /// The part behind attention, whose output lies in `acts.core.attn`: `out` (T, D) <- the rest
    /// of the layer on `x`.
    pub(crate) fn finish(
        &self,
        pass: &Pass<'_, B>,
        x: &B::Buf,
        acts: &mut Acts<'_, B>,
        scratch: &mut Scratch<B>,
        out: &mut B::Buf,
    ) {
        self.add_attention(pass, x, acts, scratch);
        self.gate(pass, acts, scratch);
        self.add_ffn(pass, acts, scratch, out);
    }

    /// `acts.half.mid` <- x + attention's part.
    fn add_attention(
        &self,
        pass: &Pass<'_, B>,
        x: &B::Buf,
        acts: &mut Acts<'_, B>,
        scratch: &mut Scratch<B>,
    ) {
        let HalfActs { end, mid, .. } = &mut *acts.half;
        let CoreActs { attn, inner, .. } = &mut *acts.core;
        let [_, site, ..] = self.sites(pass, inner);
        let o = (&self.o, self.norms[1].as_ref(), site);
        join(pass, o, (x, attn), end, mid, &mut scratch.lora);
    }

    /// `acts.core.gate_up` <- gates and ups.
    fn gate(&self, pass: &Pass<'_, B>, acts: &mut Acts<'_, B>, scratch: &mut Scratch<B>) {
        let CoreActs { r2, gate_up: to, inner, .. } = &mut *acts.core;
        let Scratch { normed: y, lora, .. } = scratch;
        let input = normed(pass, (&acts.half.mid, r2), self.norms[2].as_ref(), y);
        let [_, _, site, _] = self.sites(pass, inner);
        self.gate_up.forward(pass.backend, (input, pass.rows), (to, None), lora, site);
    }

    /// `out` <- `acts.half.mid` + the feed-forward's part.
    fn add_ffn(
        &self,
        pass: &Pass<'_, B>,
        acts: &mut Acts<'_, B>,
        scratch: &mut Scratch<B>,
        out: &mut B::Buf,
    ) {
        let Scratch { h, lora, .. } = scratch;
        let CoreActs { gate_up, ffn_end, inner, .. } = &mut *acts.core;
        glu(pass, gate_up, h);
        let [.., site] = self.sites(pass, inner);
        let down = (&self.down, self.norms[3].as_ref(), site);
        join(pass, down, (&acts.half.mid, h), ffn_end, out, lora);
    }

    /// Given `dx`, the gradient at the layer's output (T, D), makes it the gradient at its input
    /// `x` and adds to the gradients of what is trained. `needs_dx` = false leaves `dx` unfinished
    /// where nothing below is trained.
    #[allow(clippy::too_many_arguments, reason = "the buffers of one backward pass")]
    pub(crate) fn backward(
        &mut self,
        pass: &Pass<'_, B>,
        x: &B::Buf,
        acts: &mut Acts<'_, B>,
        scratch: &mut Scratch<B>,
        back: &mut BackScratch<B>,
        dx: &mut StreamGrad<B>,
        needs_dx: bool,
    ) {
        let (b, t, dims) = (pass.backend, pass.rows, pass.dims);
        let Scratch { normed: y, h, lora } = scratch;
        let BackScratch { dnormed, dqkv, dattn, dh, dend } = back;
        let HalfActs { r1, qkv, raw, end, mid } = &mut *acts.half;
        let CoreActs { attn, lse, r2, gate_up, ffn_end, inner } = &mut *acts.core;
        let [qkv_site, o_site, gate_up_site, down_site] = self.sites(pass, inner);
        let [attn_in, attn_out, ffn_in, ffn_out] = &mut self.norms;

        let dy = part(pass, dx, ffn_out.as_mut(), ffn_end, dnormed, dend);
        let down = (&mut self.down, down_site);
        glu_backward(pass, down, dy, gate_up, (h, dh), lora);
        let gate_up_map = (&mut self.gate_up, gate_up_site);
        enter(pass, gate_up_map, gate_up, ffn_in.as_mut(), (mid, r2), (y, dnormed), lora, Some(dx));

        let dy = part(pass, dx, attn_out.as_mut(), end, dnormed, dend);
        self.o.backward(b, (attn, dy, t), Some(dattn), lora, o_site);
        let (heads, lens) = (dims.heads, pass.seq_lens);
        b.attention_backward(dattn, qkv, attn, lse, heads, lens, self.mask, dqkv);
        if let Some(set) = self.rope {
            pass.rope(dqkv, set, true);
        }
        let (mut start, stride) = (0, dims.heads.qkv_width());
        for ((w, width), raw) in self.qk_norms.iter_mut().zip(dims.qk_widths()).zip(&*raw) {
            if let Some(Param { value, grad, .. }) = w {
                let dy = MatMut::columns(dqkv, t, start, width, stride);
                b.group_norm_backward(dy, raw, value, dims.norm, b.len(value), grad.as_mut());
            }
            start += width;
        }
        let below = needs_dx || attn_in.as_ref().is_some_and(|w| w.grad.is_some());
        let (qkv_map, dx) = ((&mut self.qkv, qkv_site), below.then_some(dx));
        enter(pass, qkv_map, dqkv, attn_in.as_mut(), (x, r1), (y, dnormed), lora, dx);
    }

    /// The linear maps.
    pub(crate) fn linears(&self) -> [&Linear<B>; 4] {
        [&self.qkv, &self.o, &self.gate_up, &self.down]
    }

    /// The linear maps, to change them.
    pub(crate) fn linears_mut(&mut self) -> [&mut Linear<B>; 4] {
        [&mut self.qkv, &mut self.o, &mut self.gate_up, &mut self.down]
    }

    /// The norms that are there.
    fn each_norm(&self) -> impl Iterator<Item = &Param<B>> {
        self.norms.iter().chain(&self.qk_norms).flatten()
    }

    /// The base tensors under their own names.
    pub(crate) fn export(&self, backend: &B, into: &mut Tensors) {
        self.each_norm().for_each(|norm| norm.export(backend, &norm.value, into));
        self.linears().iter().for_each(|linear| linear.export(backend, into));
    }

    /// Calls `visit` with every parameter that lives as a plain buffer.
    pub(crate) fn visit(&self, visit: &mut dyn FnMut(&Param<B>)) {
        self.each_norm().for_each(&mut *visit);
        self.linears().iter().for_each(|linear| linear.visit(visit));
    }

    /// [`Layer::visit`], to change them; the same order.
    pub(crate) fn visit_mut(&mut self, visit: &mut dyn FnMut(&mut Param<B>)) {
        let norms = self.norms.iter_mut().chain(&mut self.qk_norms).flatten();
        norms.for_each(&mut *visit);
        self.linears_mut().into_iter().for_each(|linear| linear.visit_mut(visit));
    }
}

/// The input of a half's first map: `x` (T, D) through the half's norm into `y`, its scales into
/// `r`; or `x` as it is, where there is none.
fn normed<'a, B: Backend>(
    pass: &Pass<'_, B>,
    (x, r): (&'a B::Buf, &mut B::Buf),
    norm: Option<&Param<B>>,
    y: &'a mut B::Buf,
) -> &'a B::Buf {
    let Some(w) = norm else { return x };
    pass.backend.rms_norm(x, &w.value, pass.dims.norm, (pass.rows, pass.dims.d), y, r);
    y
}

/// The gated activation: `h` (T, I) <- `gate_up` (T, 2 I).
fn glu<B: Backend>(pass: &Pass<'_, B>, gate_up: &B::Buf, h: &mut B::Buf) {
    let size = (pass.rows, pass.dims.i);
    match pass.dims.activation {
        Activation::Silu => pass.backend.swiglu(gate_up, size, h),
        Activation::GeluTanh => pass.backend.geglu(gate_up, size, h),
    }
}

/// The backward of the gated activation and of the map behind it: gates and ups become their gradient,
/// given `dy` (T, D) at the map's output. `h` and `dh` (T, I) are written over.
fn glu_backward<B: Backend>(
    pass: &Pass<'_, B>,
    (down, site): (&mut Linear<B>, Site<'_, B>),
    dy: &B::Buf,
    gate_up: &mut B::Buf,
    (h, dh): (&mut B::Buf, &mut B::Buf),
    lora: &mut LoraScratch<B>,
) {
    let (b, t, size) = (pass.backend, pass.rows, (pass.rows, pass.dims.i));
    let back = |dh: &mut B::Buf, gate_up: &mut B::Buf| match pass.dims.activation {
        Activation::Silu => b.swiglu_backward(dh, size, gate_up),
        Activation::GeluTanh => b.geglu_backward(dh, size, gate_up),
    };
    if down.is_whole() {
        glu(pass, gate_up, h);
        down.backward(b, (h, dy, t), Some(dh), lora, site);
        return back(dh, gate_up);
    }
    down.backward_input(b, (dy, t), Some(dh), lora, site.seed);
    back(dh, gate_up);
    // It is the activation's output now.
    down.backward_weights(b, (dh, dy, t), lora, site);
}

/// Ends a half: `to` (T, D) <- x + s norm(map(h)). With a norm, its input and scales stay in `end`.
fn join<B: Backend>(
    pass: &Pass<'_, B>,
    (map, norm, site): (&Linear<B>, Option<&Param<B>>, Site<'_, B>),
    (x, h): (&B::Buf, &B::Buf),
    end: &mut End<B>,
    to: &mut B::Buf,
    lora: &mut LoraScratch<B>,
) {
    let (b, t, dims) = (pass.backend, pass.rows, &pass.dims);
    let n = t * dims.d;
    match norm {
        None if dims.residual.is_none() => {
            return map.forward(b, (h, t), (to, Some(x)), lora, site);
        }
        None => map.forward(b, (h, t), (to, None), lora, site),
        Some(w) => {
            map.forward(b, (h, t), (&mut end.input, None), lora, site);
            b.rms_norm(&end.input, &w.value, dims.norm, (t, dims.d), to, &mut end.r);
        }
    }
    match dims.residual {
        Some(factor) => b.axpby(1.0, (x, 0), factor, (to, 0), n),
        None => b.add(x, to, n),
    }
}

/// The backward of [`join`] down to the output of its map: that gradient lies in `dx` itself, or in
/// one of the two buffers.
fn part<'a, B: Backend>(
    pass: &Pass<'_, B>,
    dx: &'a StreamGrad<B>,
    norm: Option<&mut Param<B>>,
    end: &End<B>,
    scaled: &'a mut B::Buf,
    dend: &'a mut B::Buf,
) -> &'a B::Buf {
    let (b, t, dims) = (pass.backend, pass.rows, &pass.dims);
    let n = t * dims.d;
    let dy: &'a B::Buf = match dims.residual {
        None if norm.is_none() => return dx.factor(b),
        None => &dx.exact,
        Some(factor) => {
            b.copy(&dx.exact, scaled, n);
            b.scale(scaled, factor, n);
            scaled
        }
    };
    let Some(Param { value, grad, .. }) = norm else { return dy };
    b.fill(dend, 0.0);
    let (size, more) = ((t, dims.d), NormMore::dw(grad.as_mut()));
    b.rms_norm_backward(dy, &end.input, value, dims.norm, &end.r, size, dend, more);
    dend
}

/// The backward of a half's beginning, a norm and a map, given `dy` at the map's output: adds to `dx`,
/// where it is asked for, what comes through both. A norm's output costs next to nothing beside its
/// gradient, so it is made again into `y` where the map's own gradients read it.
#[allow(clippy::too_many_arguments, reason = "the buffers of one backward pass")]
fn enter<B: Backend>(
    pass: &Pass<'_, B>,
    (map, site): (&mut Linear<B>, Site<'_, B>),
    dy: &B::Buf,
    norm: Option<&mut Param<B>>,
    (x, r): (&B::Buf, &mut B::Buf),
    (y, dnormed): (&mut B::Buf, &mut B::Buf),
    lora: &mut LoraScratch<B>,
    dx: Option<&mut StreamGrad<B>>,
) {
    let (b, t, reads) = (pass.backend, pass.rows, map.needs_input());
    let Some(dx) = dx else {
        let input = normed(pass, (x, r), norm.as_deref().filter(|_| reads), y);
        return map.backward(b, (input, dy, t), None, lora, site);
    };
    if map.is_whole() {
        let input = normed(pass, (x, r), norm.as_deref(), y);
        map.backward(b, (input, dy, t), Some(dnormed), lora, site);
        return leave(pass, dnormed, norm, (x, r), dx, None);
    }
    map.backward_input(b, (dy, t), Some(dnormed), lora, site.seed);
    let has_norm = norm.is_some();
    leave(pass, dnormed, norm, (x, r), dx, reads.then_some(&mut *y));
    map.backward_weights(b, (if has_norm { y } else { x }, dy, t), lora, site);
}

/// Adds to `dx` what comes through a half's norm, or as it is; `y` receives the norm's output.
fn leave<B: Backend>(
    pass: &Pass<'_, B>,
    dnormed: &B::Buf,
    norm: Option<&mut Param<B>>,
    (x, r): (&B::Buf, &B::Buf),
    dx: &mut StreamGrad<B>,
    y: Option<&mut B::Buf>,
) {
    let (b, size) = (pass.backend, (pass.rows, pass.dims.d));
    let Some(Param { value, grad, .. }) = norm else {
        b.add(dnormed, &mut dx.exact, size.0 * size.1);
        return dx.round(b, size.0 * size.1);
    };
    let StreamGrad { exact, rounded } = dx;
    let again = (b.len(rounded) > 0).then_some(rounded);
    let more = NormMore { dw: grad.as_mut(), y, dx: again };
    b.rms_norm_backward(dnormed, x, value, pass.dims.norm, r, size, exact, more);
}
