//! The fast backend: vectors, tiles and threads.
//!
//! Work is cut into tasks by the shapes alone and sums are added in the order of the tasks, so the
//! bytes do not depend on the number of threads. Tasks run on the rayon pool of the caller; a
//! program that calls many small operators does so from inside `ThreadPool::install`, which saves
//! waking a thread for each.

mod adapter;
mod ahead;
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
mod value;

use std::cell::Cell;
use std::ops::Range;

use attention::{Plan, Saved};
use bf16::{Engine, Frozen, PackedHalf, Right, Values};
pub use buffer::CpuBuf;
use buffer::ValuesMut;
use decode::Cache;
use matmul::{Factor, Target};
use rayon::prelude::*;
use simd::Level;

use crate::quant::Quantized;
use crate::shape::{Layout, check_heads, check_mask, check_rotary, documents, layout, layout_mut};
use crate::{Adafactor, AdamW, AttnMask, Backend, CODE_BLOCK, Compute, Heads, Lion, NormMore};
use crate::{
    LossOptions, LossSums, Mat, MatMut, Onto, Op, RmsNorm, SecondMoment, Sgd, Tail, add_tails,
};

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
    Half(PackedHalf),
    Quantized(quant::Stack),
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

/// An expression for buffers of either kind: each name stands for the slice of its values in it.
macro_rules! with_values {
    ([] [] $result:expr) => { $result };
    ([$x:ident: $buf:expr $(, $more:ident: $rest:expr)*] [$($y:ident: $out:expr),*] $result:expr) => {
        match $buf.values() {
            Values::F32($x) => with_values!([$($more: $rest),*] [$($y: $out),*] $result),
            Values::Bf16($x) => with_values!([$($more: $rest),*] [$($y: $out),*] $result),
        }
    };
    ([] [$y:ident: $buf:expr $(, $more:ident: $rest:expr)*] $result:expr) => {
        match $buf.values_mut() {
            ValuesMut::F32($y) => with_values!([] [$($more: $rest),*] $result),
            ValuesMut::Bf16($y) => with_values!([] [$($more: $rest),*] $result),
        }
    };
}

thread_local! {
    /// What stands for a rounded result while it is summed, kept from call to call.
    static SUMS: Cell<CpuBuf> = Cell::default();
}

impl Cpu {
    /// A product into a rounded matrix: `run` makes it in one of f32, which holds the old values
    /// where `beta` asks for them.
    fn through_f32(&self, c: MatMut<'_, Self>, beta: f32, run: impl FnOnce(MatMut<'_, Self>)) {
        let l = layout_mut(self, &c);
        let dense = Layout { offset: 0, stride: l.cols, ..l };
        // Taken, not borrowed: while this thread waits for others inside a product, it may be
        // given work that asks for a product too.
        let mut sums = SUMS.take();
        if sums.len() < l.rows * l.cols {
            sums = CpuBuf::zeros(l.rows * l.cols);
        }
        if beta != 0.0 {
            let to = (dense, &mut sums[..]);
            with_values!([c: c.buf] [] pointwise::copy_rows(self.level, (l, c), to));
        }
        run(MatMut::new(&mut sums, l.rows, l.cols));
        let from = (dense, &sums[..]);
        with_values!([] [c: c.buf] pointwise::copy_rows(self.level, from, (l, c)));
        SUMS.set(sums);
    }

    /// `C <- alpha A B + tails + onto` with factors rounded to bf16; B has so many rows and columns.
    fn product_bf16(
        &self,
        (a, m, k): (bf16::Factor<'_>, usize, usize),
        (b, k_b, n): (Right<'_>, usize, usize),
        tails: &[Tail<'_, Self>],
        mut c: MatMut<'_, Self>,
        (alpha, onto): (f32, Onto<'_, Self>),
    ) {
        let (beta, old) = match onto {
            Onto::Buf(old) if bf16::adds_others(self.engine, m) => {
                assert!(c.offset == 0 && c.stride == c.cols, "the result lies dense");
                (1.0, Some(&old[..m * n]))
            }
            onto => (onto.settle(self, &mut c), None),
        };
        let lc = layout_mut(self, &c);
        assert!(k == k_b && m == lc.rows && n == lc.cols, "({m}, {k}) by ({k_b}, {n}) into {lc:?}");
        let at = lc.offset.min(c.buf.len());
        let values = match c.buf.values_mut() {
            ValuesMut::F32(values) => ValuesMut::F32(&mut values[at..]),
            ValuesMut::Bf16(values) => ValuesMut::Bf16(&mut values[at..]),
        };
        let target = bf16::Target { values, stride: lc.stride, alpha, beta, old };
        let tails: Vec<_> = tails.iter().map(|tail| self.low_rank(tail)).collect();
        bf16::product(self.engine, (m, n, k), a, b, &tails, target);
    }

    /// [`Backend::gemm`] with tails, in bf16.
    fn gemm_bf16(
        &self,
        (a, op_a): (Mat<'_, Self>, Op),
        (b, op_b): (Mat<'_, Self>, Op),
        tails: &[Tail<'_, Self>],
        c: MatMut<'_, Self>,
        factors: (f32, Onto<'_, Self>),
    ) {
        let a = rounded(layout(self, &a), a.buf.values(), op_a == Op::N);
        let (b, n, k) = rounded(layout(self, &b), b.buf.values(), op_b == Op::T);
        self.product_bf16(a, (Right::Factor(b), k, n), tails, c, factors);
    }

    /// A frozen weight that products in bf16 read as it is.
    fn in_bf16<'a>(&self, w: &'a CpuFrozen) -> Option<Frozen<'a>> {
        match &w.weight {
            Weight::Half(half) => Some(Frozen::Packed(half)),
            Weight::Quantized(stack) => {
                let takes = self.compute == Compute::Bf16 && bf16::takes_4bit(self.engine, stack);
                takes.then_some(Frozen::FourBits(stack))
            }
            Weight::Dense(_) => None,
        }
    }

    /// A tail as factors that are rounded.
    fn low_rank<'a>(&self, tail: &Tail<'a, Self>) -> bf16::Tail<'a> {
        let Tail { u, v, op_v, column, scale } = *tail;
        let (u, _, rank) = rounded(layout(self, &u), u.buf.values(), true);
        let (v, n, rank_v) = rounded(layout(self, &v), v.buf.values(), op_v == Op::T);
        assert_eq!(rank, rank_v, "a tail of two ranks");
        bf16::Tail { u, v, rank, cols: (column, n), scale }
    }
}

/// What attention in f32 writes, through f32 where that is rounded; its arguments are widened alike
/// ([`CpuBuf::widened`]).
fn rounded_result(buf: &mut CpuBuf, run: impl FnOnce(&mut [f32])) {
    if let ValuesMut::F32(values) = buf.values_mut() {
        return run(values);
    }
    let mut values = buf.widened().into_owned();
    run(&mut values);
    buf.round_from(&values);
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

    fn zeros_rounded(&self, n: usize) -> CpuBuf {
        CpuBuf::zeros_of(self.compute, n)
    }

    fn buf_bytes(&self, buf: &CpuBuf) -> u64 {
        buf.n_bytes() as u64
    }

    fn len(&self, buf: &CpuBuf) -> usize {
        buf.len()
    }

    fn read(&self, buf: &CpuBuf, offset: usize, out: &mut [f32]) {
        let end = offset + out.len();
        with_values!([x: buf] [] pointwise::copy(self.level, &x[offset..end], out));
    }

    fn write(&self, buf: &mut CpuBuf, offset: usize, data: &[f32]) {
        let end = offset + data.len();
        with_values!([] [y: buf] pointwise::copy(self.level, data, &mut y[offset..end]));
    }

    fn fill(&self, buf: &mut CpuBuf, value: f32) {
        match buf.values_mut() {
            ValuesMut::F32(values) => values.fill(value),
            ValuesMut::Bf16(values) => values.fill(half::bf16::from_f32(value)),
        }
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
            return self.gemm_bf16((a, op_a), (b, op_b), &[], c, (alpha, Onto::Old(beta)));
        }
        if c.buf.is_rounded() {
            return self.through_f32(c, beta, |c| self.gemm(a, op_a, b, op_b, c, alpha, beta));
        }
        let lc = layout_mut(self, &c);
        let (a_values, b_values) = (a.buf.widened(), b.buf.widened());
        let (fa, m, k) = factor(layout(self, &a), &a_values, op_a);
        let (fb, k_b, n) = factor(layout(self, &b), &b_values, op_b);
        assert!(k == k_b && m == lc.rows && n == lc.cols, "({m}, {k}) by ({k_b}, {n}) into {lc:?}");
        matmul::product((m, n, k), fa, fb, target(lc, c.buf, alpha, beta));
    }

    fn gemm_with(
        &self,
        a: (Mat<'_, Self>, Op),
        b: (Mat<'_, Self>, Op),
        tails: &[Tail<'_, Self>],
        mut c: MatMut<'_, Self>,
        onto: Onto<'_, Self>,
    ) {
        if self.compute == Compute::Bf16 {
            return self.gemm_bf16(a, b, tails, c, (1.0, onto));
        }
        if c.buf.is_rounded() {
            return self.through_f32(c, onto.beta(), |c| self.gemm_with(a, b, tails, c, onto));
        }
        let beta = onto.settle(self, &mut c);
        self.gemm(a.0, a.1, b.0, b.1, c.again(), 1.0, beta);
        add_tails(self, tails, c);
    }

    fn freeze(&self, weight: &[f32], out: usize, inp: usize) -> CpuFrozen {
        assert_eq!(weight.len(), out * inp);
        let weight = match self.compute {
            Compute::F32 => Weight::Dense(CpuBuf::from(weight)),
            Compute::Bf16 => Weight::Half(PackedHalf::new(weight, out, inp)),
        };
        CpuFrozen { weight, out, inp }
    }

    fn thaw(&self, weight: &CpuFrozen) -> Vec<f32> {
        match &weight.weight {
            Weight::Dense(dense) => dense.to_vec(),
            Weight::Half(half) => half.thaw(),
            Weight::Quantized(stack) => {
                let mut values = stack.dequantize();
                values.par_iter_mut().for_each(|x| *x = self.compute.round(*x));
                values
            }
        }
    }

    fn linear(&self, x: Mat<'_, Self>, w: &CpuFrozen, y: MatMut<'_, Self>, beta: f32) {
        self.linear_with(x, w, &[], y, Onto::Old(beta));
    }

    fn linear_dx(&self, dy: Mat<'_, Self>, w: &CpuFrozen, dx: MatMut<'_, Self>, beta: f32) {
        self.linear_dx_with(dy, w, &[], dx, beta);
    }

    fn linear_with(
        &self,
        x: Mat<'_, Self>,
        w: &CpuFrozen,
        tails: &[Tail<'_, Self>],
        mut y: MatMut<'_, Self>,
        onto: Onto<'_, Self>,
    ) {
        if let Some(weight) = self.in_bf16(w) {
            let a = rounded(layout(self, &x), x.buf.values(), true);
            let right = (Right::Rows(weight), w.inp, w.out);
            return self.product_bf16(a, right, tails, y, (1.0, onto));
        }
        if y.buf.is_rounded() {
            return self.through_f32(y, onto.beta(), |y| self.linear_with(x, w, tails, y, onto));
        }
        let beta = onto.settle(self, &mut y);
        match &w.weight {
            Weight::Dense(dense) => {
                let w = Mat::new(dense, w.out, w.inp);
                self.gemm(x, Op::N, w, Op::T, y.again(), 1.0, beta);
            }
            Weight::Quantized(stack) => stack.linear(self, x, y.again(), beta),
            Weight::Half(_) => unreachable!("multiplied above"),
        }
        add_tails(self, tails, y);
    }

    fn linear_dx_with(
        &self,
        dy: Mat<'_, Self>,
        w: &CpuFrozen,
        tails: &[Tail<'_, Self>],
        mut dx: MatMut<'_, Self>,
        beta: f32,
    ) {
        if let Some(weight) = self.in_bf16(w) {
            let a = rounded(layout(self, &dy), dy.buf.values(), true);
            let right = (Right::Columns(weight), w.out, w.inp);
            return self.product_bf16(a, right, tails, dx, (1.0, Onto::Old(beta)));
        }
        if dx.buf.is_rounded() {
            return self.through_f32(dx, beta, |dx| self.linear_dx_with(dy, w, tails, dx, beta));
        }
        match &w.weight {
            Weight::Dense(dense) => {
                let w = Mat::new(dense, w.out, w.inp);
                self.gemm(dy, Op::N, w, Op::N, dx.again(), 1.0, beta);
            }
            Weight::Quantized(stack) => stack.linear_dx(self, dy, dx.again(), beta),
            Weight::Half(_) => unreachable!("multiplied above"),
        }
        add_tails(self, tails, dx);
    }

    fn freeze_4bit(&self, parts: Vec<Quantized>, inp: usize) -> CpuFrozen {
        let stack = quant::Stack::new(parts, inp);
        CpuFrozen { out: stack.rows(), weight: Weight::Quantized(stack), inp }
    }

    fn copy(&self, x: &CpuBuf, y: &mut CpuBuf, n: usize) {
        with_values!([x: x] [y: y] pointwise::copy(self.level, &x[..n], &mut y[..n]));
    }

    fn add(&self, x: &CpuBuf, y: &mut CpuBuf, n: usize) {
        with_values!([x: x] [y: y] pointwise::add(self.level, &x[..n], &mut y[..n]));
    }

    fn scale(&self, x: &mut CpuBuf, s: f32, n: usize) {
        with_values!([] [x: x] pointwise::scale(self.level, &mut x[..n], s));
    }

    fn add_bias(&self, y: MatMut<'_, Self>, bias: &CpuBuf) {
        let l = layout_mut(self, &y);
        let bias = &bias[..l.cols];
        with_values!([] [y: y.buf] pointwise::add_bias(self.level, l, y, bias));
    }

    fn bias_grad(&self, dy: Mat<'_, Self>, dbias: &mut CpuBuf) {
        let l = layout(self, &dy);
        let dbias = &mut dbias[..l.cols];
        with_values!([dy: dy.buf] [] pointwise::bias_grad(self.level, l, dy, dbias));
    }

    fn dropout(&self, x: Mat<'_, Self>, y: MatMut<'_, Self>, p: f32, seed: u64) {
        let (lx, ly) = (layout(self, &x), layout_mut(self, &y));
        assert!(lx.rows == ly.rows && lx.cols == ly.cols && (0.0..1.0).contains(&p));
        if p == 0.0 {
            with_values!([x: x.buf] [y: y.buf] pointwise::copy_rows(self.level, (lx, x), (ly, y)));
        } else {
            with_values!([x: x.buf] [y: y.buf] pointwise::dropout((lx, x), (ly, y), p, seed));
        }
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
        let n = ids.len() * l.rows;
        with_values!([table: table.buf] [y: y] {
            adapter::gather_columns(l, table, ids, &mut y[..n]);
        });
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
        with_values!([x: x.buf] [y: y.buf] {
            adapter::add_scaled_columns((lx, x), scale, shift, (ly, y), beta);
        });
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
        let out = &mut out[..la.cols];
        with_values!([a: a.buf, b: b.buf] [] {
            adapter::columns_dot((la, a), (lb, b), divisor, out);
        });
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
        let (x, w, r) = (&x[..rows * d], &w[..d], &mut r[..rows]);
        with_values!([] [y: y] norm::forward(self.level, x, w, norm, &mut y[..rows * d], r));
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
        more: NormMore<'_, Self>,
    ) {
        let n = rows * d;
        let inputs = [&x[..n], &w[..d], &r[..rows]];
        // Empty where it is not asked for.
        let [mut no_y, mut no_dx] = [CpuBuf::default(), CpuBuf::default()];
        let (y, again) = (more.y.unwrap_or(&mut no_y), more.dx.unwrap_or(&mut no_dx));
        let (n_y, n_dx) = (n.min(y.len()), n.min(again.len()));
        let (dx, dw) = (&mut dx[..n], more.dw.map(|dw| &mut dw[..d]));
        with_values!([dy: dy] [y: y, again: again] {
            let outputs = (dx, &mut again[..n_dx], &mut y[..n_y]);
            norm::backward(self.level, (&dy[..n], inputs), norm, outputs, dw);
        });
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
        let (w, n) = (&w[..width], l.rows * l.cols);
        match (x.buf.values_mut(), raw.values_mut()) {
            (ValuesMut::F32(x), ValuesMut::F32(raw)) => {
                norm::group_forward(self.level, l, x, w, norm, &mut raw[..n]);
            }
            (ValuesMut::Bf16(x), ValuesMut::Bf16(raw)) => {
                norm::group_forward(self.level, l, x, w, norm, &mut raw[..n]);
            }
            _ => panic!("a group norm and what it keeps are either both rounded or neither"),
        }
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
        let (w, n) = (&w[..width], l.rows * l.cols);
        let dw = dw.map(|dw| &mut dw[..width]);
        with_values!([raw: raw] [dy: dy.buf] {
            norm::group_backward(self.level, l, dy, (&raw[..n], w), norm, dw);
        });
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
        let n = positions.len() * heads.qkv_width();
        with_values!([] [qkv: qkv] {
            norm::rope(self.level, &mut qkv[..n], heads, rotary, positions, cos_sin, inverse);
        });
    }

    fn swiglu(&self, gate_up: &CpuBuf, (rows, i): (usize, usize), h: &mut CpuBuf) {
        with_values!([gate_up: gate_up] [h: h] {
            pointwise::swiglu(self.level, &gate_up[..rows * 2 * i], i, &mut h[..rows * i]);
        });
    }

    fn swiglu_backward(&self, h: &mut CpuBuf, (rows, i): (usize, usize), gate_up: &mut CpuBuf) {
        with_values!([] [h: h, gate_up: gate_up] {
            let gate_up = &mut gate_up[..rows * 2 * i];
            pointwise::swiglu_backward(self.level, &mut h[..rows * i], i, gate_up);
        });
    }

    fn geglu(&self, gate_up: &CpuBuf, (rows, i): (usize, usize), h: &mut CpuBuf) {
        with_values!([gate_up: gate_up] [h: h] {
            pointwise::geglu(self.level, &gate_up[..rows * 2 * i], i, &mut h[..rows * i]);
        });
    }

    fn geglu_backward(&self, h: &mut CpuBuf, (rows, i): (usize, usize), gate_up: &mut CpuBuf) {
        with_values!([] [h: h, gate_up: gate_up] {
            let gate_up = &mut gate_up[..rows * 2 * i];
            pointwise::geglu_backward(self.level, &mut h[..rows * i], i, gate_up);
        });
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
        let plan = Plan { heads, mask };
        if self.compute == Compute::F32 {
            let qkv = qkv.widened();
            return rounded_result(out, |out| {
                attention::forward((self.level, Compute::F32), plan, &docs, &qkv, out, lse);
            });
        }
        let with = (self.level, self.engine);
        with_values!([qkv: qkv] [out: out] {
            bf16::attention::forward(with, plan, &docs, qkv, out, lse);
        });
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
        let plan = Plan { heads, mask };
        if self.compute == Compute::F32 {
            let [dout, qkv, out] = [dout, qkv, out].map(CpuBuf::widened);
            let saved = Saved { dout: &dout[..], qkv: &qkv, out: &out, lse };
            return rounded_result(dqkv, |dqkv| {
                attention::backward((self.level, Compute::F32), plan, &docs, saved, dqkv);
            });
        }
        let with = (self.level, self.engine);
        if let (Values::Bf16(dout), Values::Bf16(qkv), Values::Bf16(out)) =
            (dout.values(), qkv.values(), out.values())
        {
            let saved = Saved { dout, qkv, out, lse };
            with_values!([] [dqkv: dqkv] bf16::attention::backward(with, plan, &docs, saved, dqkv));
        } else {
            let [dout, qkv, out] = [dout, qkv, out].map(CpuBuf::widened);
            let saved = Saved { dout: &dout[..], qkv: &qkv, out: &out, lse };
            with_values!([] [dqkv: dqkv] bf16::attention::backward(with, plan, &docs, saved, dqkv));
        }
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
        let q = q.buf.widened();
        let rows = |b: usize| &q[l.row(b)..][..l.cols];
        let (level, plan) = (self.level, Plan { heads, mask });
        rounded_result(out, |out| {
            let out = &mut out[..l.rows * l.cols];
            match (k_cache.values(), v_cache.values()) {
                (Values::F32(keys), Values::F32(values)) => {
                    decode::decode(level, plan, rows, Cache { keys, values, capacity, lens }, out);
                }
                (Values::Bf16(keys), Values::Bf16(values)) => {
                    decode::decode(level, plan, rows, Cache { keys, values, capacity, lens }, out);
                }
                _ => panic!("keys and values are kept alike"),
            }
        });
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

    fn cross_entropy_into(
        &self,
        mut logits: MatMut<'_, Self>,
        targets: &[u32],
        weights: &[f32],
        (scale, dlogits): (f32, &mut CpuBuf),
        row_loss: Option<&mut [f32]>,
        options: LossOptions,
    ) -> LossSums {
        let l = layout_mut(self, &logits);
        assert!(targets.len() == l.rows && weights.len() == l.rows, "one target and weight a row");
        if options.is_plain() {
            let rows = (targets, weights);
            return with_values!([] [d: dlogits] {
                let d = &mut d[..l.rows * l.cols];
                loss::cross_entropy_into(self.level, (l, logits.buf), rows, (scale, d), row_loss)
            });
        }
        let (again, scale) = (logits.again(), Some(scale));
        let sums = self.cross_entropy_with(again, targets, weights, scale, row_loss, options);
        let (from, dense) = ((l, &logits.buf[..]), Layout { offset: 0, stride: l.cols, ..l });
        with_values!([] [d: dlogits] pointwise::copy_rows(self.level, from, (dense, d)));
        sums
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

    fn gather_frozen(&self, weight: &CpuFrozen, ids: &[u32], y: &mut CpuBuf) {
        let inp = weight.inp;
        let y = &mut y[..ids.len() * inp];
        match &weight.weight {
            Weight::Dense(dense) => pointwise::gather_rows(dense, ids, inp, y),
            Weight::Half(half) => pointwise::each_row(inp, y, |i, row| {
                half.read_row(ids[i] as usize, 0, row);
            }),
            Weight::Quantized(stack) => pointwise::each_row(inp, y, |i, row| {
                stack.dequantize_rows(ids[i] as usize, row);
                row.iter_mut().for_each(|x| *x = self.compute.round(*x));
            }),
        }
    }

    fn frozen_bytes(&self, weight: &CpuFrozen) -> u64 {
        let n = match &weight.weight {
            Weight::Dense(values) => size_of::<f32>() * values.len(),
            Weight::Half(half) => half.n_bytes(),
            Weight::Quantized(stack) => stack.n_bytes(),
        };
        n as u64
    }
}
