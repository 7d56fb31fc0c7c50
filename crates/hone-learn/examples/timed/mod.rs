//! A backend that takes the time of every operator, and the table of what each has taken.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::ops::Range;
use std::time::{Duration, Instant};

use hone_kernels::quant::Quantized;
use hone_kernels::{
    Adafactor, AdamW, AttnMask, Backend, Compute, Heads, Lion, LossOptions, LossSums, Mat, MatMut,
    NormMore, Onto, Op, RmsNorm, SecondMoment, Sgd, Tail,
};

/// Calls, seconds and multiplications with their sums by operator; products by their
/// sizes m, k, n.
type Times = BTreeMap<String, (i64, f64, f64)>;

thread_local! {
    /// Calls and time of each operator. Operators are called from one thread; what they do inside
    /// is theirs.
    static TIMES: RefCell<Times> = const { RefCell::new(BTreeMap::new()) };
}

/// Forgets all times.
pub(crate) fn clear() {
    TIMES.with_borrow_mut(BTreeMap::clear);
}

/// Makes of all that was counted so far what is taken off the counts to come.
#[allow(dead_code, reason = "not every example has something to take off")]
pub(crate) fn negate() {
    TIMES.with_borrow_mut(|times| {
        for (calls, time, work) in times.values_mut() {
            (*calls, *time, *work) = (-*calls, -*time, -*work);
        }
    });
}

/// Writes what each operator has taken of `total`, a step of `n_steps`.
pub(crate) fn report(out: &mut dyn Write, total: Duration, n_steps: usize) -> io::Result<()> {
    TIMES.with_borrow(|times| {
        let total = total.as_secs_f64();
        let mut rows: Vec<_> = times.iter().collect();
        rows.sort_by(|(_, (_, a, _)), (_, (_, b, _))| b.total_cmp(a));
        let head = ["operator", "calls", "ms a step", "share", "GFLOP/s"];
        let [name, calls, ms, share, rate] = head;
        writeln!(out, "{name:<28} {calls:>8} {ms:>10} {share:>7} {rate:>8}")?;
        let inside: f64 = rows.iter().map(|(_, (_, time, _))| time).sum();
        let line = |time: f64| (time * 1e3 / n_steps as f64, 100.0 * time / total);
        for (name, (calls, time, work)) in rows {
            let ((ms, share), calls) = (line(*time), *calls as f64 / n_steps as f64);
            write!(out, "{name:<28} {calls:>8.0} {ms:>10.3} {share:>6.1}%")?;
            match *work {
                0.0 => writeln!(out)?,
                work => writeln!(out, " {:>8.0}", 2.0 * work / time / 1e9)?,
            }
        }
        let (ms, share) = line(total - inside);
        writeln!(out, "{:<28} {:>8} {ms:>10.3} {share:>6.1}%", "between operators", "")
    })
}

/// A backend that counts the time of every call.
#[derive(Clone)]
pub(crate) struct Timed<B>(pub(crate) B);

fn timed<R>(name: &str, call: impl FnOnce() -> R) -> R {
    counted(name.to_owned(), 0.0, call)
}

/// A product of (m, k) by (k, n).
fn product<R>(name: &str, [m, k, n]: [usize; 3], call: impl FnOnce() -> R) -> R {
    counted(format!("{name} {m} {k} {n}"), (m * k * n) as f64, call)
}

fn counted<R>(name: String, work: f64, call: impl FnOnce() -> R) -> R {
    let start = Instant::now();
    let result = call();
    let time = start.elapsed();
    TIMES.with_borrow_mut(|times| {
        let entry = times.entry(name).or_default();
        entry.0 += 1;
        entry.1 += time.as_secs_f64();
        entry.2 += work;
    });
    result
}

impl<B: Backend> Timed<B> {
    fn tails<'a>(tails: &[Tail<'a, Self>]) -> Vec<Tail<'a, B>> {
        let inner = |tail: &Tail<'a, Self>| {
            let Tail { u, v, op_v, column, scale } = *tail;
            Tail { u: Self::mat(u), v: Self::mat(v), op_v, column, scale }
        };
        tails.iter().map(inner).collect()
    }

    fn onto<'a>(onto: Onto<'a, Self>) -> Onto<'a, B> {
        match onto {
            Onto::Old(beta) => Onto::Old(beta),
            Onto::Buf(buf) => Onto::Buf(buf),
        }
    }

    fn mat<'a>(m: Mat<'a, Self>) -> Mat<'a, B> {
        Mat { buf: m.buf, offset: m.offset, rows: m.rows, cols: m.cols, stride: m.stride }
    }

    fn mat_mut<'a>(m: MatMut<'a, Self>) -> MatMut<'a, B> {
        MatMut { buf: m.buf, offset: m.offset, rows: m.rows, cols: m.cols, stride: m.stride }
    }
}

impl<B: Backend> Backend for Timed<B> {
    type Buf = B::Buf;
    type Frozen = B::Frozen;

    fn name(&self) -> &'static str {
        self.0.name()
    }
    fn compute(&self) -> Compute {
        self.0.compute()
    }
    fn with_compute(&self, compute: Compute) -> Self {
        Timed(self.0.with_compute(compute))
    }
    fn zeros(&self, n: usize) -> B::Buf {
        timed("zeros", || self.0.zeros(n))
    }
    fn zeros_rounded(&self, n: usize) -> B::Buf {
        timed("zeros", || self.0.zeros_rounded(n))
    }
    fn buf_bytes(&self, buf: &B::Buf) -> u64 {
        self.0.buf_bytes(buf)
    }
    fn upload(&self, data: &[f32]) -> B::Buf {
        timed("upload", || self.0.upload(data))
    }
    fn len(&self, buf: &B::Buf) -> usize {
        self.0.len(buf)
    }
    fn read(&self, buf: &B::Buf, offset: usize, out: &mut [f32]) {
        timed("read", || self.0.read(buf, offset, out));
    }
    fn write(&self, buf: &mut B::Buf, offset: usize, data: &[f32]) {
        timed("write", || self.0.write(buf, offset, data));
    }
    fn fill(&self, buf: &mut B::Buf, value: f32) {
        timed("fill", || self.0.fill(buf, value));
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
        let name = match (op_a, op_b) {
            (Op::N, Op::T) => "gemm x wt",
            (Op::N, Op::N) => "gemm dy w",
            _ => "gemm dyt x",
        };
        let (a, b, c) = (Self::mat(a), Self::mat(b), Self::mat_mut(c));
        let k = if op_a == Op::N { a.cols } else { a.rows };
        product(name, [c.rows, k, c.cols], || self.0.gemm(a, op_a, b, op_b, c, alpha, beta));
    }
    fn freeze(&self, weight: &[f32], out: usize, inp: usize) -> B::Frozen {
        self.0.freeze(weight, out, inp)
    }
    fn thaw(&self, weight: &B::Frozen) -> Vec<f32> {
        self.0.thaw(weight)
    }
    fn linear(&self, x: Mat<'_, Self>, w: &B::Frozen, y: MatMut<'_, Self>, beta: f32) {
        let (x, y) = (Self::mat(x), Self::mat_mut(y));
        product("linear", [x.rows, x.cols, y.cols], || self.0.linear(x, w, y, beta));
    }
    fn linear_dx(&self, dy: Mat<'_, Self>, w: &B::Frozen, dx: MatMut<'_, Self>, beta: f32) {
        let (dy, dx) = (Self::mat(dy), Self::mat_mut(dx));
        product("linear_dx", [dy.rows, dy.cols, dx.cols], || self.0.linear_dx(dy, w, dx, beta));
    }
    fn gemm_with(
        &self,
        (a, op_a): (Mat<'_, Self>, Op),
        (b, op_b): (Mat<'_, Self>, Op),
        tails: &[Tail<'_, Self>],
        c: MatMut<'_, Self>,
        onto: Onto<'_, Self>,
    ) {
        let (a, b) = (Self::mat(a), Self::mat(b));
        let (tails, c) = (Self::tails(tails), Self::mat_mut(c));
        let k = if op_a == Op::N { a.cols } else { a.rows };
        product("gemm_with", [c.rows, k, c.cols], || {
            self.0.gemm_with((a, op_a), (b, op_b), &tails, c, Self::onto(onto))
        });
    }
    fn linear_with(
        &self,
        x: Mat<'_, Self>,
        w: &B::Frozen,
        tails: &[Tail<'_, Self>],
        y: MatMut<'_, Self>,
        onto: Onto<'_, Self>,
    ) {
        let (x, tails, y) = (Self::mat(x), Self::tails(tails), Self::mat_mut(y));
        product("linear", [x.rows, x.cols, y.cols], || {
            self.0.linear_with(x, w, &tails, y, Self::onto(onto))
        });
    }
    fn linear_dx_with(
        &self,
        dy: Mat<'_, Self>,
        w: &B::Frozen,
        tails: &[Tail<'_, Self>],
        dx: MatMut<'_, Self>,
        beta: f32,
    ) {
        let (dy, tails, dx) = (Self::mat(dy), Self::tails(tails), Self::mat_mut(dx));
        product("linear_dx", [dy.rows, dy.cols, dx.cols], || {
            self.0.linear_dx_with(dy, w, &tails, dx, beta)
        });
    }
    fn freeze_4bit(&self, parts: Vec<Quantized>, inp: usize) -> B::Frozen {
        self.0.freeze_4bit(parts, inp)
    }
    fn gather_columns(&self, table: Mat<'_, Self>, ids: &[u32], y: &mut B::Buf) {
        let table = Self::mat(table);
        timed("gather_columns", || self.0.gather_columns(table, ids, y));
    }
    fn scatter_add_columns(&self, dy: &B::Buf, ids: &[u32], dtable: MatMut<'_, Self>) {
        let dtable = Self::mat_mut(dtable);
        timed("scatter_add_columns", || self.0.scatter_add_columns(dy, ids, dtable));
    }
    fn add_scaled_columns(
        &self,
        x: Mat<'_, Self>,
        scale: Mat<'_, Self>,
        shift: f32,
        y: MatMut<'_, Self>,
        beta: f32,
    ) {
        let (x, scale, y) = (Self::mat(x), Self::mat(scale), Self::mat_mut(y));
        timed("add_scaled_columns", || self.0.add_scaled_columns(x, scale, shift, y, beta));
    }
    fn columns_dot(
        &self,
        a: Mat<'_, Self>,
        b: Mat<'_, Self>,
        divisor: Mat<'_, Self>,
        out: &mut B::Buf,
    ) {
        let (a, b, divisor) = (Self::mat(a), Self::mat(b), Self::mat(divisor));
        timed("columns_dot", || self.0.columns_dot(a, b, divisor, out));
    }
    fn dora_scales(
        &self,
        squares: &B::Buf,
        b: Mat<'_, Self>,
        c: Mat<'_, Self>,
        magnitude: &B::Buf,
        norms: MatMut<'_, Self>,
        scales: MatMut<'_, Self>,
    ) {
        let (b, c) = (Self::mat(b), Self::mat(c));
        let (norms, scales) = (Self::mat_mut(norms), Self::mat_mut(scales));
        timed("dora_scales", || self.0.dora_scales(squares, b, c, magnitude, norms, scales));
    }
    fn copy(&self, x: &B::Buf, y: &mut B::Buf, n: usize) {
        timed("copy", || self.0.copy(x, y, n));
    }
    fn add(&self, x: &B::Buf, y: &mut B::Buf, n: usize) {
        timed("add", || self.0.add(x, y, n));
    }
    fn scale(&self, x: &mut B::Buf, s: f32, n: usize) {
        timed("scale", || self.0.scale(x, s, n));
    }
    fn add_bias(&self, y: MatMut<'_, Self>, bias: &B::Buf) {
        let y = Self::mat_mut(y);
        timed("add_bias", || self.0.add_bias(y, bias));
    }
    fn bias_grad(&self, dy: Mat<'_, Self>, dbias: &mut B::Buf) {
        let dy = Self::mat(dy);
        timed("bias_grad", || self.0.bias_grad(dy, dbias));
    }
    fn dropout(&self, x: Mat<'_, Self>, y: MatMut<'_, Self>, p: f32, seed: u64) {
        let (x, y) = (Self::mat(x), Self::mat_mut(y));
        timed("dropout", || self.0.dropout(x, y, p, seed));
    }
    fn gather_rows(&self, table: &B::Buf, ids: &[u32], d: usize, y: &mut B::Buf) {
        timed("gather_rows", || self.0.gather_rows(table, ids, d, y));
    }
    fn scatter_add_rows(&self, dy: &B::Buf, ids: &[u32], d: usize, dtable: &mut B::Buf) {
        timed("scatter_add_rows", || self.0.scatter_add_rows(dy, ids, d, dtable));
    }
    fn rms_norm(
        &self,
        x: &B::Buf,
        w: &B::Buf,
        norm: RmsNorm,
        size: (usize, usize),
        y: &mut B::Buf,
        r: &mut B::Buf,
    ) {
        timed("rms_norm", || self.0.rms_norm(x, w, norm, size, y, r));
    }
    fn rms_norm_backward(
        &self,
        dy: &B::Buf,
        x: &B::Buf,
        w: &B::Buf,
        norm: RmsNorm,
        r: &B::Buf,
        size: (usize, usize),
        dx: &mut B::Buf,
        NormMore { dw, y, dx: again }: NormMore<'_, Self>,
    ) {
        let more = NormMore { dw, y, dx: again };
        timed("rms_norm_backward", || {
            self.0.rms_norm_backward(dy, x, w, norm, r, size, dx, more);
        });
    }
    fn group_norm(
        &self,
        x: MatMut<'_, Self>,
        w: &B::Buf,
        norm: RmsNorm,
        width: usize,
        raw: &mut B::Buf,
    ) {
        let x = Self::mat_mut(x);
        timed("group_norm", || self.0.group_norm(x, w, norm, width, raw));
    }
    fn group_norm_backward(
        &self,
        dy: MatMut<'_, Self>,
        raw: &B::Buf,
        w: &B::Buf,
        norm: RmsNorm,
        width: usize,
        dw: Option<&mut B::Buf>,
    ) {
        let dy = Self::mat_mut(dy);
        timed("group_norm_backward", || {
            self.0.group_norm_backward(dy, raw, w, norm, width, dw);
        });
    }
    fn rope(
        &self,
        qkv: &mut B::Buf,
        heads: Heads,
        rotary: usize,
        positions: &[u32],
        cos_sin: &B::Buf,
        inverse: bool,
    ) {
        timed("rope", || self.0.rope(qkv, heads, rotary, positions, cos_sin, inverse));
    }
    fn swiglu(&self, gate_up: &B::Buf, size: (usize, usize), h: &mut B::Buf) {
        timed("swiglu", || self.0.swiglu(gate_up, size, h));
    }
    fn swiglu_backward(&self, dh: &mut B::Buf, size: (usize, usize), gate_up: &mut B::Buf) {
        timed("swiglu_backward", || self.0.swiglu_backward(dh, size, gate_up));
    }
    fn geglu(&self, gate_up: &B::Buf, size: (usize, usize), h: &mut B::Buf) {
        timed("geglu", || self.0.geglu(gate_up, size, h));
    }
    fn geglu_backward(&self, dh: &mut B::Buf, size: (usize, usize), gate_up: &mut B::Buf) {
        timed("geglu_backward", || self.0.geglu_backward(dh, size, gate_up));
    }
    fn soft_cap(&self, x: &mut B::Buf, cap: f32, n: usize) {
        timed("soft_cap", || self.0.soft_cap(x, cap, n));
    }
    fn attention(
        &self,
        qkv: &B::Buf,
        heads: Heads,
        seq_lens: &[usize],
        mask: AttnMask,
        out: &mut B::Buf,
        lse: &mut B::Buf,
    ) {
        timed("attention", || self.0.attention(qkv, heads, seq_lens, mask, out, lse));
    }
    fn attention_backward(
        &self,
        dout: &B::Buf,
        qkv: &B::Buf,
        out: &B::Buf,
        lse: &B::Buf,
        heads: Heads,
        seq_lens: &[usize],
        mask: AttnMask,
        dqkv: &mut B::Buf,
    ) {
        timed("attention_backward", || {
            self.0.attention_backward(dout, qkv, out, lse, heads, seq_lens, mask, dqkv);
        });
    }
    fn attention_decode(
        &self,
        q: Mat<'_, Self>,
        k_cache: &B::Buf,
        v_cache: &B::Buf,
        capacity: usize,
        lens: &[usize],
        heads: Heads,
        mask: AttnMask,
        out: &mut B::Buf,
    ) {
        let q = Self::mat(q);
        timed("attention_decode", || {
            self.0.attention_decode(q, k_cache, v_cache, capacity, lens, heads, mask, out);
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
        let logits = Self::mat_mut(logits);
        timed("cross_entropy", || {
            self.0.cross_entropy(logits, targets, weights, grad_scale, row_loss)
        })
    }
    fn sum_squares(&self, x: &B::Buf) -> f64 {
        timed("sum_squares", || self.0.sum_squares(x))
    }
    fn adamw(
        &self,
        p: &mut B::Buf,
        g: &B::Buf,
        at: usize,
        m: &mut B::Buf,
        v: &mut B::Buf,
        update: AdamW,
    ) {
        timed("adamw", || self.0.adamw(p, g, at, m, v, update));
    }

    type Codes = B::Codes;

    fn zero_codes(&self, n: usize) -> B::Codes {
        self.0.zero_codes(n)
    }
    fn read_codes(&self, codes: &B::Codes) -> Vec<u8> {
        self.0.read_codes(codes)
    }
    fn write_codes(&self, codes: &mut B::Codes, data: &[u8]) {
        self.0.write_codes(codes, data);
    }
    fn sum_squares_part(&self, x: &B::Buf, part: Range<usize>) -> f64 {
        timed("sum_squares_part", || self.0.sum_squares_part(x, part))
    }
    fn axpby(&self, a: f32, x: (&B::Buf, usize), b: f32, y: (&mut B::Buf, usize), n: usize) {
        timed("axpby", || self.0.axpby(a, x, b, y, n));
    }
    fn adamw_8bit(
        &self,
        p: &mut B::Buf,
        g: &B::Buf,
        at: usize,
        moments: [(&mut B::Codes, &mut B::Buf); 2],
        update: AdamW,
    ) {
        timed("adamw_8bit", || self.0.adamw_8bit(p, g, at, moments, update));
    }
    fn lion(&self, p: &mut B::Buf, g: &B::Buf, at: usize, m: &mut B::Buf, update: Lion) {
        timed("lion", || self.0.lion(p, g, at, m, update));
    }
    fn sgd(
        &self,
        p: &mut B::Buf,
        g: &B::Buf,
        part: Range<usize>,
        m: Option<&mut B::Buf>,
        update: Sgd,
    ) {
        timed("sgd", || self.0.sgd(p, g, part, m, update));
    }
    fn adafactor(
        &self,
        p: &mut B::Buf,
        g: &B::Buf,
        at: usize,
        second: SecondMoment<'_, Self>,
        first: Option<&mut B::Buf>,
        update: Adafactor,
    ) {
        let second = match second {
            SecondMoment::Factored(row, col) => SecondMoment::Factored(row, col),
            SecondMoment::Full(v) => SecondMoment::Full(v),
        };
        timed("adafactor", || self.0.adafactor(p, g, at, second, first, update));
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
        let logits = Self::mat_mut(logits);
        timed("cross_entropy", || {
            self.0.cross_entropy_with(logits, targets, weights, grad_scale, row_loss, options)
        })
    }
    fn cross_entropy_into(
        &self,
        logits: MatMut<'_, Self>,
        targets: &[u32],
        weights: &[f32],
        grad: (f32, &mut B::Buf),
        row_loss: Option<&mut [f32]>,
        options: LossOptions,
    ) -> LossSums {
        let logits = Self::mat_mut(logits);
        timed("cross_entropy", || {
            self.0.cross_entropy_into(logits, targets, weights, grad, row_loss, options)
        })
    }
    fn add_noise(
        &self,
        x: &mut B::Buf,
        d: usize,
        seq_lens: &[usize],
        alpha: f32,
        seed_first: (u64, u64),
    ) {
        timed("add_noise", || self.0.add_noise(x, d, seq_lens, alpha, seed_first));
    }
    fn gather_frozen(&self, weight: &B::Frozen, ids: &[u32], y: &mut B::Buf) {
        timed("gather_frozen", || self.0.gather_frozen(weight, ids, y));
    }
    fn frozen_bytes(&self, weight: &B::Frozen) -> u64 {
        self.0.frozen_bytes(weight)
    }
}
