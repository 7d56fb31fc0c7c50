//! The fast backend: vectors, tiles and threads.
//!
//! Work is cut into tasks by the shapes alone and sums are added in the order of the tasks, so the
//! bytes do not depend on the number of threads. Tasks run on the rayon pool of the caller; a
//! program that calls many small operators does so from inside `ThreadPool::install`, which saves
//! waking a thread for each.

mod adapter;
mod attention;
mod bf16;
mod buffer;
mod decode;
mod loss;
mod matmul;
mod norm;
mod optim;
mod options;
mod par;
mod pointwise;
mod quant;
pub(crate) mod simd;
mod tile;
mod turn;

use std::ops::Range;

use attention::{Plan, Saved};
use bf16::{Engine, Values};
pub use buffer::CpuBuf;
use decode::Cache;
use matmul::{Factor, Target};
use rayon::prelude::*;
use simd::Level;

use crate::quant::Quantized;
use crate::shape::{Layout, check_heads, check_mask, check_rotary, documents, layout, layout_mut};
use crate::{Adafactor, AdamW, AttnMask, Backend, CODE_BLOCK, Compute, Heads, Lion};
use crate::{LossOptions, LossSums, Mat, MatMut, Op, RmsNorm, SecondMoment, Sgd};

/// The fast backend on the processor; see the module.
#[derive(Clone, Copy, Debug)]
pub struct Cpu {
    level: Level,
    compute: Compute,
    engine: Engine,
}

impl Cpu {
    /// The backend with the best instruction sets that this machine has, computing in f32.
    pub fn new() -> Self {
        Cpu { level: Level::all()[0], compute: Compute::F32, engine: Engine::all()[0] }
    }

    /// Whether the machine has instructions for products of bf16; without them they are right, but
    /// slower than those of f32.
    pub fn has_bf16() -> bool {
        Engine::all().len() > 1
    }
}

#[cfg(test)]
impl Cpu {
    /// A backend for every instruction set of this machine.
    pub(crate) fn all_levels() -> Vec<Self> {
        Level::all().into_iter().map(|level| Cpu { level, ..Cpu::new() }).collect()
    }

    /// A backend that computes in bf16 for every way in which this machine can.
    pub(crate) fn all_bf16() -> Vec<Self> {
        let cpu = Cpu::new().with_compute(Compute::Bf16);
        Engine::all().into_iter().map(|engine| Cpu { engine, ..cpu }).collect()
    }
}

impl Default for Cpu {
    fn default() -> Self {
        Cpu::new()
    }
}

/// A weight (out, in) as [`Cpu`] keeps it.
#[derive(Clone, Debug)]
pub struct CpuFrozen {
    weight: Weight,
    out: usize,
    inp: usize,
}

/// The values of a frozen weight.
#[derive(Clone, Debug)]
enum Weight {
    Dense(CpuBuf),
    Half(Vec<half::bf16>),
    Quantized(quant::Stack),
}

impl CpuFrozen {
    /// The bf16 values as a factor whose sums run along the rows, or down the columns.
    fn half<'a>(
        &self,
        values: &'a [half::bf16],
        along_rows: bool,
    ) -> (bf16::Factor<'a>, usize, usize) {
        let l = Layout { offset: 0, rows: self.out, cols: self.inp, stride: self.inp };
        rounded(l, Values::Bf16(values), along_rows)
    }
}

/// A view as what a product goes into.
fn target(l: Layout, buf: &mut [f32], alpha: f32, beta: f32) -> Target<'_> {
    let at = l.offset.min(buf.len());
    Target { values: &mut buf[at..], stride: l.stride, alpha, beta }
}

/// A view as a factor of a product, with its sides after `op`.
fn factor<'a>(l: Layout, buf: &'a [f32], op: Op) -> (Factor<'a>, usize, usize) {
    let data = &buf[l.offset.min(buf.len())..];
    match op {
        Op::N => (Factor { data, row_stride: l.stride, col_stride: 1 }, l.rows, l.cols),
        Op::T => (Factor { data, row_stride: 1, col_stride: l.stride }, l.cols, l.rows),
    }
}

/// A view as a factor of a product in bf16: of a matrix whose sums run along its rows, or down its
/// columns.
fn rounded(l: Layout, values: Values<'_>, along_rows: bool) -> (bf16::Factor<'_>, usize, usize) {
    let values = match values {
        Values::F32(values) => Values::F32(&values[l.offset.min(values.len())..]),
        Values::Bf16(values) => Values::Bf16(&values[l.offset.min(values.len())..]),
    };
    if along_rows {
        (bf16::Factor { values, lane_stride: l.stride, depth_stride: 1 }, l.rows, l.cols)
    } else {
        (bf16::Factor { values, lane_stride: 1, depth_stride: l.stride }, l.cols, l.rows)
    }
}

impl Cpu {
    /// `C <- alpha A B + beta C` with factors rounded to bf16.
    fn product_bf16(
        &self,
        a: (bf16::Factor<'_>, usize, usize),
        b: (bf16::Factor<'_>, usize, usize),
        c: MatMut<'_, Self>,
        alpha: f32,
        beta: f32,
    ) {
        let lc = layout_mut(self, &c);
        let ((a, m, k), (b, n, k_b)) = (a, b);
        assert!(k == k_b && m == lc.rows && n == lc.cols, "({m}, {k}) by ({k_b}, {n}) into {lc:?}");
        bf16::product(self.engine, (m, n, k), a, b, target(lc, c.buf, alpha, beta));
    }
}

impl Backend for Cpu {
    type Buf = CpuBuf;
    type Frozen = CpuFrozen;

    fn name(&self) -> &'static str {
        "cpu"
    }

    fn compute(&self) -> Compute {
        self.compute
    }

    fn with_compute(&self, compute: Compute) -> Self {
        Cpu { compute, ..*self }
    }

    fn zeros(&self, n: usize) -> CpuBuf {
        CpuBuf::zeros(n)
    }

    fn upload(&self, data: &[f32]) -> CpuBuf {
        CpuBuf::from(data)
    }

    fn len(&self, buf: &CpuBuf) -> usize {
        buf.len()
    }

    fn read(&self, buf: &CpuBuf, offset: usize, out: &mut [f32]) {
        out.copy_from_slice(&buf[offset..offset + out.len()]);
    }

    fn write(&self, buf: &mut CpuBuf, offset: usize, data: &[f32]) {
        buf[offset..offset + data.len()].copy_from_slice(data);
    }

    fn fill(&self, buf: &mut CpuBuf, value: f32) {
        buf.fill(value);
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
        if self.compute == Compute::Bf16 {
            let a = rounded(layout(self, &a), Values::F32(a.buf), op_a == Op::N);
            let b = rounded(layout(self, &b), Values::F32(b.buf), op_b == Op::T);
            return self.product_bf16(a, b, c, alpha, beta);
        }
        let lc = layout_mut(self, &c);
        let (fa, m, k) = factor(layout(self, &a), a.buf, op_a);
        let (fb, k_b, n) = factor(layout(self, &b), b.buf, op_b);
        assert!(k == k_b && m == lc.rows && n == lc.cols, "({m}, {k}) by ({k_b}, {n}) into {lc:?}");
        matmul::product((m, n, k), fa, fb, target(lc, c.buf, alpha, beta));
    }

    fn freeze(&self, weight: &[f32], out: usize, inp: usize) -> CpuFrozen {
        assert_eq!(weight.len(), out * inp);
        let weight = match self.compute {
            Compute::F32 => Weight::Dense(CpuBuf::from(weight)),
            Compute::Bf16 => {
                Weight::Half(weight.par_iter().map(|&x| half::bf16::from_f32(x)).collect())
            }
        };
        CpuFrozen { weight, out, inp }
    }

    fn thaw(&self, weight: &CpuFrozen) -> Vec<f32> {
        match &weight.weight {
            Weight::Dense(dense) => dense.to_vec(),
            Weight::Half(half) => half.par_iter().map(|x| x.to_f32()).collect(),
            Weight::Quantized(stack) => {
                let mut values = stack.dequantize();
                values.par_iter_mut().for_each(|x| *x = self.compute.round(*x));
                values
            }
        }
    }

    fn linear(&self, x: Mat<'_, Self>, w: &CpuFrozen, y: MatMut<'_, Self>, beta: f32) {
        match &w.weight {
            Weight::Dense(dense) => {
                self.gemm(x, Op::N, Mat::new(dense, w.out, w.inp), Op::T, y, 1.0, beta);
            }
            Weight::Half(half) => {
                let a = rounded(layout(self, &x), Values::F32(x.buf), true);
                self.product_bf16(a, w.half(half, true), y, 1.0, beta);
            }
            Weight::Quantized(stack) => stack.linear(self, x, y, beta),
        }
    }

    fn linear_dx(&self, dy: Mat<'_, Self>, w: &CpuFrozen, dx: MatMut<'_, Self>, beta: f32) {
        match &w.weight {
            Weight::Dense(dense) => {
                self.gemm(dy, Op::N, Mat::new(dense, w.out, w.inp), Op::N, dx, 1.0, beta);
            }
            Weight::Half(half) => {
                let a = rounded(layout(self, &dy), Values::F32(dy.buf), true);
                self.product_bf16(a, w.half(half, false), dx, 1.0, beta);
            }
            Weight::Quantized(stack) => stack.linear_dx(self, dy, dx, beta),
        }
    }

    fn freeze_4bit(&self, parts: Vec<Quantized>, inp: usize) -> CpuFrozen {
        let stack = quant::Stack::new(parts, inp);
        CpuFrozen { out: stack.rows(), weight: Weight::Quantized(stack), inp }
    }

    fn copy(&self, x: &CpuBuf, y: &mut CpuBuf, n: usize) {
        pointwise::copy(&x[..n], &mut y[..n]);
    }

    fn add(&self, x: &CpuBuf, y: &mut CpuBuf, n: usize) {
        pointwise::add(self.level, &x[..n], &mut y[..n]);
    }

    fn scale(&self, x: &mut CpuBuf, s: f32, n: usize) {
        pointwise::scale(self.level, &mut x[..n], s);
    }

    fn add_bias(&self, y: MatMut<'_, Self>, bias: &CpuBuf) {
        let l = layout_mut(self, &y);
        pointwise::add_bias(self.level, l, y.buf, &bias[..l.cols]);
    }

    fn bias_grad(&self, dy: Mat<'_, Self>, dbias: &mut CpuBuf) {
        let l = layout(self, &dy);
        pointwise::bias_grad(self.level, l, dy.buf, &mut dbias[..l.cols]);
    }

    fn dropout(&self, x: Mat<'_, Self>, y: MatMut<'_, Self>, p: f32, seed: u64) {
        let (lx, ly) = (layout(self, &x), layout_mut(self, &y));
        assert!(lx.rows == ly.rows && lx.cols == ly.cols && (0.0..1.0).contains(&p));
        pointwise::dropout(lx, x.buf, ly, y.buf, p, seed);
    }

    fn gather_rows(&self, table: &CpuBuf, ids: &[u32], d: usize, y: &mut CpuBuf) {
        pointwise::gather_rows(table, ids, d, &mut y[..ids.len() * d]);
    }

    fn scatter_add_rows(&self, dy: &CpuBuf, ids: &[u32], d: usize, dtable: &mut CpuBuf) {
        pointwise::scatter_add_rows(self.level, &dy[..ids.len() * d], ids, d, dtable);
    }

    fn gather_columns(&self, table: Mat<'_, Self>, ids: &[u32], y: &mut CpuBuf) {
        let l = layout(self, &table);
        assert!(ids.iter().all(|&id| (id as usize) < l.cols), "an id outside of {}", l.cols);
        adapter::gather_columns(l, table.buf, ids, &mut y[..ids.len() * l.rows]);
    }

    fn scatter_add_columns(&self, dy: &CpuBuf, ids: &[u32], dtable: MatMut<'_, Self>) {
        let l = layout_mut(self, &dtable);
        assert!(ids.iter().all(|&id| (id as usize) < l.cols), "an id outside of {}", l.cols);
        adapter::scatter_add_columns(&dy[..ids.len() * l.rows], ids, l, dtable.buf);
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
        let scale = &scale.buf[ls.row(0)..][..ls.cols];
        adapter::add_scaled_columns((lx, x.buf), scale, shift, (ly, y.buf), beta);
    }

    fn columns_dot(
        &self,
        a: Mat<'_, Self>,
        b: Mat<'_, Self>,
        divisor: Mat<'_, Self>,
        out: &mut CpuBuf,
    ) {
        let (la, lb, ld) = (layout(self, &a), layout(self, &b), layout(self, &divisor));
        assert!(la.rows == lb.rows && la.cols == lb.cols && ld.cols == la.cols && ld.rows == 1);
        let divisor = &divisor.buf[ld.row(0)..][..ld.cols];
        adapter::columns_dot((la, a.buf), (lb, b.buf), divisor, &mut out[..la.cols]);
    }

    fn dora_scales(
        &self,
        squares: &CpuBuf,
        b: Mat<'_, Self>,
        c: Mat<'_, Self>,
        magnitude: &CpuBuf,
        norms: MatMut<'_, Self>,
        scales: MatMut<'_, Self>,
    ) {
        let (lb, lc) = (layout(self, &b), layout(self, &c));
        let (ln, ls) = (layout_mut(self, &norms), layout_mut(self, &scales));
        assert!(
            lb.rows == lc.cols && lb.cols == lc.rows && ln.cols == lb.rows && ls.cols == lb.rows
        );
        let norms = &mut norms.buf[ln.row(0)..][..ln.cols];
        let scales = &mut scales.buf[ls.row(0)..][..ls.cols];
        adapter::row_norms(&squares[..lb.rows], (lb, b.buf), (lc, c.buf), norms);
        for ((scale, norm), magnitude) in scales.iter_mut().zip(norms).zip(magnitude.iter()) {
            *scale = magnitude / *norm;
        }
    }

    fn rms_norm(
        &self,
        x: &CpuBuf,
        w: &CpuBuf,
        norm: RmsNorm,
        (rows, d): (usize, usize),
        y: &mut CpuBuf,
        r: &mut CpuBuf,
    ) {
        let (y, r) = (&mut y[..rows * d], &mut r[..rows]);
        norm::forward(self.level, &x[..rows * d], &w[..d], norm, y, r);
    }

    fn rms_norm_backward(
        &self,
        dy: &CpuBuf,
        x: &CpuBuf,
        w: &CpuBuf,
        norm: RmsNorm,
        r: &CpuBuf,
        (rows, d): (usize, usize),
        dx: &mut CpuBuf,
        dw: Option<&mut CpuBuf>,
    ) {
        let inputs = [&dy[..rows * d], &x[..rows * d], &w[..d], &r[..rows]];
        let dw = dw.map(|dw| &mut dw[..d]);
        norm::backward(self.level, inputs, norm, &mut dx[..rows * d], dw);
    }

    fn group_norm(
        &self,
        x: MatMut<'_, Self>,
        w: &CpuBuf,
        norm: RmsNorm,
        width: usize,
        raw: &mut CpuBuf,
    ) {
        let l = layout_mut(self, &x);
        assert!(width > 0 && l.cols.is_multiple_of(width), "groups of {width} in {l:?}");
        let raw = &mut raw[..l.rows * l.cols];
        norm::group_forward(self.level, l, x.buf, &w[..width], norm, raw);
    }

    fn group_norm_backward(
        &self,
        dy: MatMut<'_, Self>,
        raw: &CpuBuf,
        w: &CpuBuf,
        norm: RmsNorm,
        width: usize,
        dw: Option<&mut CpuBuf>,
    ) {
        let l = layout_mut(self, &dy);
        assert!(width > 0 && l.cols.is_multiple_of(width), "groups of {width} in {l:?}");
        let inputs = [&raw[..l.rows * l.cols], &w[..width]];
        let dw = dw.map(|dw| &mut dw[..width]);
        norm::group_backward(self.level, l, dy.buf, inputs, norm, dw);
    }

    fn rope(
        &self,
        qkv: &mut CpuBuf,
        heads: Heads,
        rotary: usize,
        positions: &[u32],
        cos_sin: &CpuBuf,
        inverse: bool,
    ) {
        check_rotary(heads, rotary);
        let qkv = &mut qkv[..positions.len() * heads.qkv_width()];
        norm::rope(self.level, qkv, heads, rotary, positions, cos_sin, inverse);
    }

    fn swiglu(&self, gate_up: &CpuBuf, (rows, i): (usize, usize), h: &mut CpuBuf) {
        pointwise::swiglu(self.level, &gate_up[..rows * 2 * i], i, &mut h[..rows * i]);
    }

    fn swiglu_backward(&self, dh: &CpuBuf, (rows, i): (usize, usize), gate_up: &mut CpuBuf) {
        let gate_up = &mut gate_up[..rows * 2 * i];
        pointwise::swiglu_backward(self.level, &dh[..rows * i], i, gate_up);
    }

    fn geglu(&self, gate_up: &CpuBuf, (rows, i): (usize, usize), h: &mut CpuBuf) {
        pointwise::geglu(self.level, &gate_up[..rows * 2 * i], i, &mut h[..rows * i]);
    }

    fn geglu_backward(&self, dh: &CpuBuf, (rows, i): (usize, usize), gate_up: &mut CpuBuf) {
        let gate_up = &mut gate_up[..rows * 2 * i];
        pointwise::geglu_backward(self.level, &dh[..rows * i], i, gate_up);
    }

    fn soft_cap(&self, x: &mut CpuBuf, cap: f32, n: usize) {
        pointwise::soft_cap(self.level, &mut x[..n], cap);
    }

    fn attention(
        &self,
        qkv: &CpuBuf,
        heads: Heads,
        seq_lens: &[usize],
        mask: AttnMask,
        out: &mut CpuBuf,
        lse: &mut CpuBuf,
    ) {
        check_mask(mask);
        let docs = documents(heads, seq_lens, qkv.len(), out.len(), lse.len());
        if self.compute == Compute::Bf16 {
            let with = (self.level, self.engine);
            return bf16::attention::forward(
                with,
                Plan { heads, mask },
                &docs,
                &qkv[..],
                &mut out[..],
                lse,
            );
        }
        attention::forward((self.level, Compute::F32), Plan { heads, mask }, &docs, qkv, out, lse);
    }

    fn attention_backward(
        &self,
        dout: &CpuBuf,
        qkv: &CpuBuf,
        out: &CpuBuf,
        lse: &CpuBuf,
        heads: Heads,
        seq_lens: &[usize],
        mask: AttnMask,
        dqkv: &mut CpuBuf,
    ) {
        let (qkv_len, out_len) = (qkv.len().min(dqkv.len()), out.len().min(dout.len()));
        check_mask(mask);
        let docs = documents(heads, seq_lens, qkv_len, out_len, lse.len());
        let saved = Saved { dout: &dout[..], qkv, out, lse };
        if self.compute == Compute::Bf16 {
            let with = (self.level, self.engine);
            return bf16::attention::backward(
                with,
                Plan { heads, mask },
                &docs,
                saved,
                &mut dqkv[..],
            );
        }
        attention::backward((self.level, Compute::F32), Plan { heads, mask }, &docs, saved, dqkv);
    }

    fn attention_decode(
        &self,
        q: Mat<'_, Self>,
        k_cache: &CpuBuf,
        v_cache: &CpuBuf,
        capacity: usize,
        lens: &[usize],
        heads: Heads,
        mask: AttnMask,
        out: &mut CpuBuf,
    ) {
        check_heads(heads);
        check_mask(mask);
        let l = layout(self, &q);
        assert!(l.rows == lens.len() && l.cols == heads.out_width(), "{l:?}");
        assert!(lens.iter().all(|&len| 0 < len && len <= capacity), "{lens:?} of {capacity}");
        let rows = |b: usize| &q.buf[l.row(b)..][..l.cols];
        let cache = Cache { keys: k_cache, values: v_cache, capacity, lens };
        let out = &mut out[..l.rows * l.cols];
        decode::decode(self.level, Plan { heads, mask }, rows, cache, out);
    }

    fn cross_entropy(
        &self,
        logits: MatMut<'_, Self>,
        targets: &[u32],
        weights: &[f32],
        grad_scale: Option<f32>,
        row_loss: Option<&mut [f32]>,
    ) -> LossSums {
        let l = layout_mut(self, &logits);
        assert!(targets.len() == l.rows && weights.len() == l.rows, "one target and weight a row");
        loss::cross_entropy(self.level, l, logits.buf, targets, weights, grad_scale, row_loss)
    }

    fn sum_squares(&self, x: &CpuBuf) -> f64 {
        loss::sum_squares(self.level, x)
    }

    fn adamw(
        &self,
        p: &mut CpuBuf,
        g: &CpuBuf,
        at: usize,
        m: &mut CpuBuf,
        v: &mut CpuBuf,
        update: AdamW,
    ) {
        assert!(g.len() == p.len() && m.len() == v.len());
        let part = at..at + m.len();
        loss::adamw(self.level, &mut p[part.clone()], &g[part], m, v, update);
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

    fn sum_squares_part(&self, x: &CpuBuf, part: Range<usize>) -> f64 {
        loss::sum_squares(self.level, &x[part])
    }

    fn axpby(&self, a: f32, x: (&CpuBuf, usize), b: f32, y: (&mut CpuBuf, usize), n: usize) {
        optim::axpby(self.level, a, &x.0[x.1..][..n], b, &mut y.0[y.1..][..n]);
    }

    fn adamw_8bit(
        &self,
        p: &mut CpuBuf,
        g: &CpuBuf,
        at: usize,
        [(m, m_max), (v, v_max)]: [(&mut Vec<u8>, &mut CpuBuf); 2],
        update: AdamW,
    ) {
        let (n, n_blocks) = (m.len(), m.len().div_ceil(CODE_BLOCK));
        assert!(g.len() == p.len() && v.len() == n);
        assert!(m_max.len() == n_blocks && v_max.len() == n_blocks);
        let moments = [(&mut m[..], &mut m_max[..]), (&mut v[..], &mut v_max[..])];
        optim::adamw_8bit(self.level, &mut p[at..at + n], &g[at..at + n], moments, update);
    }

    fn lion(&self, p: &mut CpuBuf, g: &CpuBuf, at: usize, m: &mut CpuBuf, update: Lion) {
        let part = at..at + m.len();
        optim::lion(self.level, &mut p[part.clone()], &g[part], m, update);
    }

    fn sgd(
        &self,
        p: &mut CpuBuf,
        g: &CpuBuf,
        part: Range<usize>,
        m: Option<&mut CpuBuf>,
        update: Sgd,
    ) {
        let m = m.map(|m| &mut m[..part.len()]);
        optim::sgd(self.level, &mut p[part.clone()], &g[part], m, update);
    }

    fn adafactor(
        &self,
        p: &mut CpuBuf,
        g: &CpuBuf,
        at: usize,
        second: SecondMoment<'_, Self>,
        first: Option<&mut CpuBuf>,
        update: Adafactor,
    ) {
        let part = at..at + second.n_values(self);
        let first = first.map(|m| &mut m[..part.len()]);
        let second = match second {
            SecondMoment::Factored(row, col) => optim::Second::Factored(row, col),
            SecondMoment::Full(v) => optim::Second::Full(v),
        };
        let (p, g) = (&mut p[part.clone()], &g[part]);
        optim::adafactor(self.level, p, g, second, first, update);
    }

    fn cross_entropy_with(
        &self,
        logits: MatMut<'_, Self>,
        targets: &[u32],
        weights: &[f32],
        grad_scale: Option<f32>,
        row_loss: Option<&mut [f32]>,
        options: LossOptions,
    ) -> LossSums {
        if options.is_plain() {
            return self.cross_entropy(logits, targets, weights, grad_scale, row_loss);
        }
        let l = layout_mut(self, &logits);
        assert!(targets.len() == l.rows && weights.len() == l.rows, "one target and weight a row");
        let rows = (targets, weights);
        options::cross_entropy(self.level, l, logits.buf, rows, grad_scale, row_loss, options)
    }

    fn add_noise(
        &self,
        x: &mut CpuBuf,
        d: usize,
        seq_lens: &[usize],
        alpha: f32,
        (seed, first): (u64, u64),
    ) {
        let n = seq_lens.iter().sum::<usize>() * d;
        options::add_noise(&mut x[..n], d, seq_lens, alpha, seed, first);
    }

    fn frozen_bytes(&self, weight: &CpuFrozen) -> u64 {
        let n = match &weight.weight {
            Weight::Dense(values) => size_of::<f32>() * values.len(),
            Weight::Half(values) => size_of::<half::bf16>() * values.len(),
            Weight::Quantized(stack) => stack.n_bytes(),
        };
        n as u64
    }
}
