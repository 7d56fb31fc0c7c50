//! The plain twin of every operator: one loop a formula, buffers and arithmetic in f64.
//!
//! It is written to be read against the formulas of [`Backend`], not to be fast. Because nothing is
//! rounded to f32 between operators, finite differences through it are accurate enough to check a
//! whole decoder's backward.

mod attention;
mod norm;
mod optim;
pub mod quant;

use std::ops::{Deref, DerefMut, Range};

use crate::quant::Quantized;
use crate::shape::{check_heads, check_mask, check_rotary, documents, layout, layout_mut};
use crate::{Adafactor, AdamW, AttnMask, Backend, Compute, Heads, Lion, LossOptions};
use crate::{
    LossSums, Mat, MatMut, NormMore, Onto, Op, RmsNorm, SecondMoment, Sgd, Tail, add_tails, rng,
};

/// The backend of naive loops in f64, whose products take their factors as they are or rounded to
/// bf16.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reference {
    rounds: bool,
}

/// The backend that rounds nothing; [`Backend::with_compute`] gives the other.
#[allow(non_upper_case_globals, reason = "it is the type's only value that needs a name")]
pub const Reference: Reference = Reference { rounds: false };

impl Reference {
    /// `x` as a factor of a product. What is rounded to bf16 is rounded to f32 before, as it is
    /// where buffers are f32.
    fn round(&self, x: f64) -> f64 {
        if self.rounds { f64::from(Compute::Bf16.round(x as f32)) } else { x }
    }
}

/// A buffer of [`struct@Reference`]: f64, or what is left of it when it is rounded to bf16.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct F64Buf {
    values: Vec<f64>,
    rounds: bool,
}

impl F64Buf {
    /// Rounds what an operator has written; what was rounded before stays.
    fn settle(&mut self) {
        let Self { values, rounds } = self;
        if *rounds {
            values.iter_mut().for_each(|x| *x = Reference { rounds: true }.round(*x));
        }
    }
}

impl From<Vec<f64>> for F64Buf {
    /// A buffer that rounds nothing.
    fn from(values: Vec<f64>) -> Self {
        F64Buf { values, rounds: false }
    }
}

impl Deref for F64Buf {
    type Target = [f64];

    fn deref(&self) -> &[f64] {
        &self.values
    }
}

impl DerefMut for F64Buf {
    fn deref_mut(&mut self) -> &mut [f64] {
        &mut self.values
    }
}

/// A weight (out, in) as given.
#[derive(Clone, Debug)]
pub struct FrozenF64 {
    weight: F64Buf,
    out: usize,
    inp: usize,
}

impl FrozenF64 {
    /// The weight as a matrix view.
    fn mat(&self) -> Mat<'_, Reference> {
        Mat::new(&self.weight, self.out, self.inp)
    }
}

/// 1 / (1 + exp(-x)).
fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// tanh(u) in the tanh formula of GELU, and the slope of u.
fn gelu_tanh(x: f64) -> (f64, f64) {
    let slope = (2.0 / std::f64::consts::PI).sqrt();
    ((slope * (x + 0.044715 * x.powi(3))).tanh(), slope * (1.0 + 3.0 * 0.044715 * x * x))
}

/// Calls `run` with a view into which nothing is rounded until it has ended.
fn rounded_once(y: MatMut<'_, Reference>, run: impl FnOnce(MatMut<'_, Reference>)) {
    let mut y = y;
    let rounds = std::mem::take(&mut y.buf.rounds);
    run(y.again());
    y.buf.rounds = rounds;
    y.buf.settle();
}

impl Backend for Reference {
    type Buf = F64Buf;
    type Frozen = FrozenF64;

    fn name(&self) -> &'static str {
        "reference"
    }

    fn compute(&self) -> Compute {
        if self.rounds { Compute::Bf16 } else { Compute::F32 }
    }

    fn with_compute(&self, compute: Compute) -> Self {
        Reference { rounds: compute == Compute::Bf16 }
    }

    fn zeros(&self, n: usize) -> F64Buf {
        vec![0.0; n].into()
    }

    fn zeros_rounded(&self, n: usize) -> F64Buf {
        F64Buf { values: vec![0.0; n], rounds: self.rounds }
    }

    fn buf_bytes(&self, buf: &F64Buf) -> u64 {
        (size_of::<f64>() * buf.len()) as u64
    }

    fn upload(&self, data: &[f32]) -> F64Buf {
        let values: Vec<f64> = data.iter().map(|&x| f64::from(x)).collect();
        values.into()
    }

    fn len(&self, buf: &F64Buf) -> usize {
        buf.len()
    }

    fn read(&self, buf: &F64Buf, offset: usize, out: &mut [f32]) {
        let from = &buf[offset..offset + out.len()];
        out.iter_mut().zip(from).for_each(|(o, &x)| *o = x as f32);
    }

    fn write(&self, buf: &mut F64Buf, offset: usize, data: &[f32]) {
        let to = &mut buf[offset..offset + data.len()];
        to.iter_mut().zip(data).for_each(|(t, &x)| *t = f64::from(x));
        buf.settle();
    }

    fn fill(&self, buf: &mut F64Buf, value: f32) {
        buf.fill(f64::from(value));
        buf.settle();
    }

    fn gemm(
        &self,
        a: Mat<'_, Self>,
        op_a: Op,
        b: Mat<'_, Self>,
        op_b: Op,
        c: MatMut<'_, Self>,
        alpha: f32,
        beta: f32,
    ) {
        let (la, lb, lc) = (layout(self, &a), layout(self, &b), layout_mut(self, &c));
        let (m, k) = if op_a == Op::N { (la.rows, la.cols) } else { (la.cols, la.rows) };
        let (k_b, n) = if op_b == Op::N { (lb.rows, lb.cols) } else { (lb.cols, lb.rows) };
        assert!(k == k_b && m == lc.rows && n == lc.cols, "{la:?} {op_a:?} {lb:?} {op_b:?} {lc:?}");
        for i in 0..m {
            for j in 0..n {
                let sum: f64 = (0..k)
                    .map(|l| {
                        let x = a.buf[if op_a == Op::N { la.row(i) + l } else { la.row(l) + i }];
                        let y = b.buf[if op_b == Op::N { lb.row(l) + j } else { lb.row(j) + l }];
                        self.round(x) * self.round(y)
                    })
                    .sum();
                let at = &mut c.buf[lc.row(i) + j];
                let kept = if beta == 0.0 { 0.0 } else { f64::from(beta) * *at };
                *at = f64::from(alpha) * sum + kept;
            }
        }
        c.buf.settle();
    }

    fn freeze(&self, weight: &[f32], out: usize, inp: usize) -> FrozenF64 {
        assert_eq!(weight.len(), out * inp);
        let weight: Vec<f64> = weight.iter().map(|&x| self.round(f64::from(x))).collect();
        FrozenF64 { weight: weight.into(), out, inp }
    }

    fn thaw(&self, weight: &FrozenF64) -> Vec<f32> {
        self.download(&weight.weight)
    }

    fn linear(&self, x: Mat<'_, Self>, w: &FrozenF64, y: MatMut<'_, Self>, beta: f32) {
        self.gemm(x, Op::N, w.mat(), Op::T, y, 1.0, beta);
    }

    fn linear_dx(&self, dy: Mat<'_, Self>, w: &FrozenF64, dx: MatMut<'_, Self>, beta: f32) {
        self.gemm(dy, Op::N, w.mat(), Op::N, dx, 1.0, beta);
    }

    fn gemm_with(
        &self,
        (a, op_a): (Mat<'_, Self>, Op),
        (b, op_b): (Mat<'_, Self>, Op),
        tails: &[Tail<'_, Self>],
        c: MatMut<'_, Self>,
        onto: Onto<'_, Self>,
    ) {
        rounded_once(c, |mut c| {
            let beta = onto.settle(self, &mut c);
            self.gemm(a, op_a, b, op_b, c.again(), 1.0, beta);
            for tail in tails {
                // Scaled before it is rounded.
                let scaled = tail.u.buf.iter().map(|x| f64::from(tail.scale) * x);
                let scaled: F64Buf = scaled.collect::<Vec<f64>>().into();
                let tail = Tail { u: Mat { buf: &scaled, ..tail.u }, scale: 1.0, ..*tail };
                add_tails(self, &[tail], c.again());
            }
        });
    }

    fn linear_with(
        &self,
        x: Mat<'_, Self>,
        w: &FrozenF64,
        tails: &[Tail<'_, Self>],
        y: MatMut<'_, Self>,
        onto: Onto<'_, Self>,
    ) {
        self.gemm_with((x, Op::N), (w.mat(), Op::T), tails, y, onto);
    }

    fn linear_dx_with(
        &self,
        dy: Mat<'_, Self>,
        w: &FrozenF64,
        tails: &[Tail<'_, Self>],
        dx: MatMut<'_, Self>,
        beta: f32,
    ) {
        self.gemm_with((dy, Op::N), (w.mat(), Op::N), tails, dx, Onto::Old(beta));
    }

    fn freeze_4bit(&self, parts: Vec<Quantized>, inp: usize) -> FrozenF64 {
        let weight: Vec<f64> = parts
            .iter()
            .flat_map(|part| (0..part.len()).map(|i| quant::value(part, i)))
            .map(|value| self.round(f64::from(value)))
            .collect();
        assert!(parts.iter().all(|part| inp > 0 && part.len().is_multiple_of(inp)));
        FrozenF64 { out: weight.len() / inp, weight: weight.into(), inp }
    }

    fn copy(&self, x: &F64Buf, y: &mut F64Buf, n: usize) {
        y[..n].copy_from_slice(&x[..n]);
        y.settle();
    }

    fn add(&self, x: &F64Buf, y: &mut F64Buf, n: usize) {
        y[..n].iter_mut().zip(&x[..n]).for_each(|(y, x)| *y += x);
        y.settle();
    }

    fn scale(&self, x: &mut F64Buf, s: f32, n: usize) {
        x[..n].iter_mut().for_each(|x| *x *= f64::from(s));
        x.settle();
    }

    fn add_bias(&self, y: MatMut<'_, Self>, bias: &F64Buf) {
        let l = layout_mut(self, &y);
        for i in 0..l.rows {
            let row = &mut y.buf[l.row(i)..][..l.cols];
            row.iter_mut().zip(&bias[..l.cols]).for_each(|(y, b)| *y += b);
        }
        y.buf.settle();
    }

    fn bias_grad(&self, dy: Mat<'_, Self>, dbias: &mut F64Buf) {
        let l = layout(self, &dy);
        for i in 0..l.rows {
            let row = &dy.buf[l.row(i)..][..l.cols];
            dbias[..l.cols].iter_mut().zip(row).for_each(|(b, y)| *b += y);
        }
    }

    fn dropout(&self, x: Mat<'_, Self>, y: MatMut<'_, Self>, p: f32, seed: u64) {
        let (lx, ly) = (layout(self, &x), layout_mut(self, &y));
        assert!(lx.rows == ly.rows && lx.cols == ly.cols && (0.0..1.0).contains(&p));
        for i in 0..lx.rows {
            for j in 0..lx.cols {
                let kept = rng::keep(seed, (i * lx.cols + j) as u64, p);
                let value = x.buf[lx.row(i) + j] / (1.0 - f64::from(p));
                y.buf[ly.row(i) + j] = if kept { value } else { 0.0 };
            }
        }
        y.buf.settle();
    }

    fn gather_rows(&self, table: &F64Buf, ids: &[u32], d: usize, y: &mut F64Buf) {
        for (i, &id) in ids.iter().enumerate() {
            y[i * d..(i + 1) * d].copy_from_slice(&table[id as usize * d..(id as usize + 1) * d]);
        }
    }

    fn scatter_add_rows(&self, dy: &F64Buf, ids: &[u32], d: usize, dtable: &mut F64Buf) {
        for (i, &id) in ids.iter().enumerate() {
            let to = &mut dtable[id as usize * d..(id as usize + 1) * d];
            to.iter_mut().zip(&dy[i * d..]).for_each(|(t, y)| *t += y);
        }
    }

    fn gather_columns(&self, table: Mat<'_, Self>, ids: &[u32], y: &mut F64Buf) {
        let l = layout(self, &table);
        for (i, &id) in ids.iter().enumerate() {
            for k in 0..l.rows {
                y[i * l.rows + k] = table.buf[l.row(k) + id as usize];
            }
        }
        y.settle();
    }

    fn scatter_add_columns(&self, dy: &F64Buf, ids: &[u32], dtable: MatMut<'_, Self>) {
        let l = layout_mut(self, &dtable);
        for (i, &id) in ids.iter().enumerate() {
            for k in 0..l.rows {
                dtable.buf[l.row(k) + id as usize] += dy[i * l.rows + k];
            }
        }
    }

    fn add_scaled_columns(
        &self,
        x: Mat<'_, Self>,
        scale: Mat<'_, Self>,
        shift: f32,
        y: MatMut<'_, Self>,
        beta: f32,
    ) {
        let (lx, ls, ly) = (layout(self, &x), layout(self, &scale), layout_mut(self, &y));
        assert!(lx.rows == ly.rows && lx.cols == ly.cols && ls.cols == lx.cols && ls.rows == 1);
        for i in 0..lx.rows {
            for j in 0..lx.cols {
                let factor = scale.buf[ls.row(0) + j] + f64::from(shift);
                let at = &mut y.buf[ly.row(i) + j];
                let kept = if beta == 0.0 { 0.0 } else { f64::from(beta) * *at };
                *at = kept + factor * x.buf[lx.row(i) + j];
            }
        }
        y.buf.settle();
    }

    fn columns_dot(
        &self,
        a: Mat<'_, Self>,
        b: Mat<'_, Self>,
        divisor: Mat<'_, Self>,
        out: &mut F64Buf,
    ) {
        let (la, lb, ld) = (layout(self, &a), layout(self, &b), layout(self, &divisor));
        assert!(la.rows == lb.rows && la.cols == lb.cols && ld.cols == la.cols && ld.rows == 1);
        for (j, out) in out.iter_mut().enumerate().take(la.cols) {
            let dot: f64 = (0..la.rows).map(|i| a.buf[la.row(i) + j] * b.buf[lb.row(i) + j]).sum();
            *out += dot / divisor.buf[ld.row(0) + j];
        }
    }

    fn dora_scales(
        &self,
        squares: &F64Buf,
        b: Mat<'_, Self>,
        c: Mat<'_, Self>,
        magnitude: &F64Buf,
        norms: MatMut<'_, Self>,
        scales: MatMut<'_, Self>,
    ) {
        let (lb, lc) = (layout(self, &b), layout(self, &c));
        let (ln, ls) = (layout_mut(self, &norms), layout_mut(self, &scales));
        assert!(
            lb.rows == lc.cols && lb.cols == lc.rows && ln.cols == lb.rows && ls.cols == lb.rows
        );
        for j in 0..lb.rows {
            let dot: f64 = (0..lb.cols).map(|k| b.buf[lb.row(j) + k] * c.buf[lc.row(k) + j]).sum();
            let norm = (squares[j] + dot).sqrt();
            norms.buf[ln.row(0) + j] = norm;
            scales.buf[ls.row(0) + j] = magnitude[j] / norm;
        }
    }

    fn rms_norm(
        &self,
        x: &F64Buf,
        w: &F64Buf,
        norm: RmsNorm,
        rows_d: (usize, usize),
        y: &mut F64Buf,
        r: &mut F64Buf,
    ) {
        norm::forward(x, w, norm, rows_d, y, r);
        y.settle();
    }

    fn rms_norm_backward(
        &self,
        dy: &F64Buf,
        x: &F64Buf,
        w: &F64Buf,
        norm: RmsNorm,
        r: &F64Buf,
        rows_d: (usize, usize),
        dx: &mut F64Buf,
        more: NormMore<'_, Self>,
    ) {
        let NormMore { dw, y, dx: again } = more;
        norm::backward([dy, x, w, r], norm, rows_d, dx, dw.map(|dw| &mut dw[..]));
        if let Some(y) = y {
            norm::scaled([x, w, r], norm, rows_d, y);
            y.settle();
        }
        if let Some(again) = again {
            self.copy(dx, again, rows_d.0 * rows_d.1);
        }
    }

    fn group_norm(
        &self,
        x: MatMut<'_, Self>,
        w: &F64Buf,
        norm: RmsNorm,
        width: usize,
        raw: &mut F64Buf,
    ) {
        let l = layout_mut(self, &x);
        assert!(width > 0 && l.cols.is_multiple_of(width), "groups of {width} in {l:?}");
        norm::group_forward(l, x.buf, &w[..width], norm, raw);
        x.buf.settle();
    }

    fn group_norm_backward(
        &self,
        dy: MatMut<'_, Self>,
        raw: &F64Buf,
        w: &F64Buf,
        norm: RmsNorm,
        width: usize,
        dw: Option<&mut F64Buf>,
    ) {
        let l = layout_mut(self, &dy);
        assert!(width > 0 && l.cols.is_multiple_of(width), "groups of {width} in {l:?}");
        norm::group_backward(l, dy.buf, [raw, &w[..width]], norm, dw.map(|dw| &mut dw[..]));
        dy.buf.settle();
    }

    fn rope(
        &self,
        qkv: &mut F64Buf,
        heads: Heads,
        rotary: usize,
        positions: &[u32],
        cos_sin: &F64Buf,
        inverse: bool,
    ) {
        check_rotary(heads, rotary);
        let (width, dim, half) = (heads.qkv_width(), heads.dim, rotary / 2);
        for (t, &p) in positions.iter().enumerate() {
            for h in 0..heads.n_q + heads.n_kv {
                for c in 0..half {
                    let cos = cos_sin[p as usize * rotary + c];
                    let sin =
                        cos_sin[p as usize * rotary + half + c] * if inverse { -1.0 } else { 1.0 };
                    let at = t * width + h * dim + c;
                    let (a, b) = (qkv[at], qkv[at + half]);
                    qkv[at] = a * cos - b * sin;
                    qkv[at + half] = b * cos + a * sin;
                }
            }
        }
        qkv.settle();
    }

    fn swiglu(&self, gate_up: &F64Buf, (rows, i): (usize, usize), h: &mut F64Buf) {
        for t in 0..rows {
            for j in 0..i {
                let (gate, up) = (gate_up[t * 2 * i + j], gate_up[t * 2 * i + i + j]);
                h[t * i + j] = gate * sigmoid(gate) * up;
            }
        }
        h.settle();
    }

    fn swiglu_backward(&self, dh: &mut F64Buf, (rows, i): (usize, usize), gate_up: &mut F64Buf) {
        for t in 0..rows {
            for j in 0..i {
                let (g_at, u_at, h_at) = (t * 2 * i + j, t * 2 * i + i + j, t * i + j);
                let (gate, up, s) = (gate_up[g_at], gate_up[u_at], sigmoid(gate_up[g_at]));
                gate_up[g_at] = dh[h_at] * up * s * (1.0 + gate * (1.0 - s));
                gate_up[u_at] = dh[h_at] * gate * s;
                dh[h_at] = gate * s * up;
            }
        }
        gate_up.settle();
        dh.settle();
    }

    fn geglu(&self, gate_up: &F64Buf, (rows, i): (usize, usize), h: &mut F64Buf) {
        for t in 0..rows {
            for j in 0..i {
                let (gate, up) = (gate_up[t * 2 * i + j], gate_up[t * 2 * i + i + j]);
                h[t * i + j] = 0.5 * gate * (1.0 + gelu_tanh(gate).0) * up;
            }
        }
        h.settle();
    }

    fn geglu_backward(&self, dh: &mut F64Buf, (rows, i): (usize, usize), gate_up: &mut F64Buf) {
        for t in 0..rows {
            for j in 0..i {
                let (g_at, u_at, h_at) = (t * 2 * i + j, t * 2 * i + i + j, t * i + j);
                let (gate, up) = (gate_up[g_at], gate_up[u_at]);
                let (tanh, du) = gelu_tanh(gate);
                let slope = 0.5 * (1.0 + tanh) + 0.5 * gate * (1.0 - tanh * tanh) * du;
                gate_up[g_at] = dh[h_at] * up * slope;
                gate_up[u_at] = dh[h_at] * 0.5 * gate * (1.0 + tanh);
                dh[h_at] = 0.5 * gate * (1.0 + tanh) * up;
            }
        }
        gate_up.settle();
        dh.settle();
    }

    fn soft_cap(&self, x: &mut F64Buf, cap: f32, n: usize) {
        let cap = f64::from(cap);
        x[..n].iter_mut().for_each(|x| *x = cap * (*x / cap).tanh());
    }

    fn attention(
        &self,
        qkv: &F64Buf,
        heads: Heads,
        seq_lens: &[usize],
        mask: AttnMask,
        out: &mut F64Buf,
        lse: &mut F64Buf,
    ) {
        check_mask(mask);
        let docs = documents(heads, seq_lens, qkv.len(), out.len(), lse.len());
        let qkv: Vec<f64> = qkv.iter().map(|&x| self.round(x)).collect();
        attention::forward(&qkv, heads, &docs, mask, |x| self.round(x), out, lse);
        out.settle();
    }

    fn attention_backward(
        &self,
        dout: &F64Buf,
        qkv: &F64Buf,
        out: &F64Buf,
        lse: &F64Buf,
        heads: Heads,
        seq_lens: &[usize],
        mask: AttnMask,
        dqkv: &mut F64Buf,
    ) {
        check_mask(mask);
        let docs = documents(heads, seq_lens, qkv.len().min(dqkv.len()), out.len(), lse.len());
        let rounded = |x: &[f64]| x.iter().map(|&x| self.round(x)).collect::<Vec<_>>();
        let (qkv, dout_rounded) = (&rounded(qkv)[..], &rounded(dout)[..]);
        let saved = attention::Saved { dout, dout_rounded, qkv, out, lse };
        attention::backward(&saved, heads, &docs, mask, |x| self.round(x), dqkv);
        dqkv.settle();
    }

    fn attention_decode(
        &self,
        q: Mat<'_, Self>,
        k_cache: &F64Buf,
        v_cache: &F64Buf,
        capacity: usize,
        lens: &[usize],
        heads: Heads,
        mask: AttnMask,
        out: &mut F64Buf,
    ) {
        check_heads(heads);
        check_mask(mask);
        let l = layout(self, &q);
        assert!(l.rows == lens.len() && l.cols == heads.out_width(), "{l:?}");
        assert!(lens.iter().all(|&len| 0 < len && len <= capacity), "{lens:?} of {capacity}");
        let rows = |b: usize| &q.buf[l.row(b)..][..l.cols];
        attention::decode(rows, (k_cache, v_cache), capacity, lens, heads, mask, out);
        out.settle();
    }

    fn cross_entropy(
        &self,
        logits: MatMut<'_, Self>,
        targets: &[u32],
        weights: &[f32],
        grad_scale: Option<f32>,
        row_loss: Option<&mut [f32]>,
    ) -> LossSums {
        let options = LossOptions::default();
        self.cross_entropy_with(logits, targets, weights, grad_scale, row_loss, options)
    }

    fn sum_squares(&self, x: &F64Buf) -> f64 {
        x.iter().map(|x| x * x).sum()
    }

    fn adamw(
        &self,
        p: &mut F64Buf,
        g: &F64Buf,
        at: usize,
        m: &mut F64Buf,
        v: &mut F64Buf,
        update: AdamW,
    ) {
        let AdamW { lr, beta1: b1, beta2: b2, eps, weight_decay: decay, .. } = update;
        let grad_scale = f64::from(update.grad_scale);
        let step = i32::try_from(update.step).expect("fewer than 2^31 steps");
        let (c1, c2) = (1.0 - b1.powi(step), (1.0 - b2.powi(step)).sqrt());
        for i in 0..m.len() {
            let (g, p) = (g[at + i] * grad_scale, &mut p[at + i]);
            *p *= 1.0 - lr * decay;
            m[i] += (g - m[i]) * (1.0 - b1);
            v[i] = b2 * v[i] + (1.0 - b2) * g * g;
            *p -= lr / c1 * m[i] / (v[i].sqrt() / c2 + eps);
        }
    }

    type Codes = Vec<u8>;

    fn zero_codes(&self, n: usize) -> Vec<u8> {
        vec![0; n]
    }

    fn read_codes(&self, codes: &Vec<u8>) -> Vec<u8> {
        codes.clone()
    }

    fn write_codes(&self, codes: &mut Vec<u8>, data: &[u8]) {
        codes.copy_from_slice(data);
    }

    fn sum_squares_part(&self, x: &F64Buf, part: Range<usize>) -> f64 {
        x[part].iter().map(|x| x * x).sum()
    }

    fn axpby(&self, a: f32, x: (&F64Buf, usize), b: f32, y: (&mut F64Buf, usize), n: usize) {
        for i in 0..n {
            let y = &mut y.0[y.1 + i];
            *y = f64::from(a) * x.0[x.1 + i] + f64::from(b) * *y;
        }
    }

    fn adamw_8bit(
        &self,
        p: &mut F64Buf,
        g: &F64Buf,
        at: usize,
        [(m, m_max), (v, v_max)]: [(&mut Vec<u8>, &mut F64Buf); 2],
        update: AdamW,
    ) {
        let part = at..at + m.len();
        let moments = [(&mut m[..], &mut m_max[..]), (&mut v[..], &mut v_max[..])];
        optim::adamw_8bit(&mut p[part.clone()], &g[part], moments, update);
    }

    fn lion(&self, p: &mut F64Buf, g: &F64Buf, at: usize, m: &mut F64Buf, update: Lion) {
        optim::lion(&mut p[at..], &g[at..], m, update);
    }

    fn sgd(
        &self,
        p: &mut F64Buf,
        g: &F64Buf,
        part: Range<usize>,
        m: Option<&mut F64Buf>,
        update: Sgd,
    ) {
        let m = m.map(|m| &mut m[..part.len()]);
        optim::sgd(&mut p[part.clone()], &g[part], m, update);
    }

    fn adafactor(
        &self,
        p: &mut F64Buf,
        g: &F64Buf,
        at: usize,
        second: SecondMoment<'_, Self>,
        first: Option<&mut F64Buf>,
        update: Adafactor,
    ) {
        let part = at..at + second.n_values(self);
        let second = match second {
            SecondMoment::Factored(row, col) => optim::Second::Factored(row, col),
            SecondMoment::Full(v) => optim::Second::Full(v),
        };
        let first = first.map(|m| &mut m[..]);
        optim::adafactor(&mut p[part.clone()], &g[part], second, first, update);
    }

    fn cross_entropy_with(
        &self,
        logits: MatMut<'_, Self>,
        targets: &[u32],
        weights: &[f32],
        grad_scale: Option<f32>,
        mut row_loss: Option<&mut [f32]>,
        options: LossOptions,
    ) -> LossSums {
        let l = layout_mut(self, &logits);
        assert!(targets.len() == l.rows && weights.len() == l.rows, "one target and weight a row");
        let mut sums = LossSums::default();
        for i in 0..l.rows {
            let z = &mut logits.buf[l.row(i)..][..l.cols];
            let w = f64::from(weights[i]);
            let scale = grad_scale.map(|scale| f64::from(scale) * w);
            let row = optim::loss_row(z, targets[i] as usize, scale, options);
            sums.weighted_loss += w * row.loss;
            sums.weighted_ce += w * row.ce;
            sums.weight += w;
            sums.n_correct += u64::from(row.correct);
            sums.n_rows += 1;
            if let Some(row_loss) = row_loss.as_deref_mut() {
                row_loss[i] = row.loss as f32;
            }
        }
        sums
    }

    fn cross_entropy_into(
        &self,
        mut logits: MatMut<'_, Self>,
        targets: &[u32],
        weights: &[f32],
        (scale, dlogits): (f32, &mut F64Buf),
        row_loss: Option<&mut [f32]>,
        options: LossOptions,
    ) -> LossSums {
        let (again, scale) = (logits.again(), Some(scale));
        let sums = self.cross_entropy_with(again, targets, weights, scale, row_loss, options);
        let l = layout_mut(self, &logits);
        for (i, to) in dlogits.chunks_mut(l.cols).take(l.rows).enumerate() {
            to.copy_from_slice(&logits.buf[l.row(i)..][..l.cols]);
        }
        dlogits.settle();
        sums
    }

    fn add_noise(
        &self,
        x: &mut F64Buf,
        d: usize,
        seq_lens: &[usize],
        alpha: f32,
        (seed, first): (u64, u64),
    ) {
        let mut rows = x.chunks_mut(d);
        for (k, &len) in seq_lens.iter().enumerate() {
            let bound = f64::from(alpha) / ((len * d) as f64).sqrt();
            let stream = rng::mix(seed, first + k as u64);
            for (i, x) in rows.by_ref().take(len).flatten().enumerate() {
                *x += f64::from(rng::noise(stream, i as u64, bound));
            }
        }
    }

    fn gather_frozen(&self, weight: &FrozenF64, ids: &[u32], y: &mut F64Buf) {
        self.gather_rows(&weight.weight, ids, weight.inp, y);
    }

    fn frozen_bytes(&self, weight: &FrozenF64) -> u64 {
        (size_of::<f64>() * weight.weight.len()) as u64
    }
}
