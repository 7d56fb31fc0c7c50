//! Operators on rounded buffers: what each writes is what it writes to buffers of f32 that hold the
//! same values, rounded, byte by byte; so the table of all operators holds for them too.

use super::cases::{data, heads};
use crate::{AttnMask, Backend, Compute, LossOptions, Mat, MatMut, NormMore, Op, RmsNorm};

/// An output: its name, its values, and whether its buffer rounds.
pub struct Found(
    /// Name.
    pub &'static str,
    /// Values.
    pub Vec<f32>,
    /// Whether its buffer rounds.
    pub bool,
);

/// Buffers of rounded values, in f32 or as they are rounded.
struct Maker<'a, B>(&'a B);

impl<B: Backend> Maker<'_, B> {
    fn buf(&self, rounds: bool, values: &[f32]) -> B::Buf {
        let n = values.len();
        let mut buf = if rounds { self.0.zeros_rounded(n) } else { self.0.zeros(n) };
        let values: Vec<f32> = values.iter().map(|&x| Compute::Bf16.round(x)).collect();
        self.0.write(&mut buf, 0, &values);
        buf
    }

    fn normal(&self, rounds: bool, seed: u64, n: usize, size: f32) -> B::Buf {
        self.buf(rounds, &data(seed, n, size))
    }
}

/// Rows and columns of views, columns left out on either side, a third side, and the magnitude of
/// inputs.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Columns left out on either side.
    pub gap: usize,
    /// The third side.
    pub depth: usize,
    /// Magnitude of inputs.
    pub size: f32,
}

/// The shapes of the table.
pub const SHAPES: [Shape; 7] = [
    Shape { rows: 1, cols: 1, gap: 0, depth: 1, size: 1.0 },
    Shape { rows: 3, cols: 17, gap: 2, depth: 5, size: 1.0 },
    Shape { rows: 1, cols: 40, gap: 1, depth: 33, size: 1e-30 },
    Shape { rows: 70, cols: 48, gap: 0, depth: 64, size: 1.0 },
    Shape { rows: 300, cols: 129, gap: 3, depth: 7, size: 1e15 },
    Shape { rows: 5, cols: 31, gap: 0, depth: 0, size: 0.0 },
    Shape { rows: 9, cols: 16, gap: 1, depth: 2, size: 1e30 },
];

/// What is read and what is written, each rounded or not.
pub const KINDS: [(bool, bool); 4] = [(false, false), (true, false), (false, true), (true, true)];

/// Products.
fn products<B: Backend>(b: &B, s: Shape, (from, to): (bool, bool)) -> Vec<Found> {
    let (m, stride) = (Maker(b), s.cols + 2 * s.gap);
    let mut found = Vec::new();
    for (op, (rows, cols)) in [(Op::N, (s.rows, s.depth)), (Op::T, (s.depth, s.rows))] {
        for (alpha, beta) in [(1.0, 0.0), (0.5, -2.0)] {
            let x = m.normal(from, 1, rows * cols, s.size);
            let y = m.normal(from, 2, s.cols * s.depth, 1.0);
            let mut z = m.normal(to, 3, s.rows * stride, 1.0);
            let (x, y) = (Mat::new(&x, rows, cols), Mat::new(&y, s.cols, s.depth));
            let c = MatMut::columns(&mut z, s.rows, s.gap, s.cols, stride);
            b.gemm(x, op, y, Op::T, c, alpha, beta);
            found.push(Found("c", b.download(&z), to));
        }
    }
    let (out, inp) = (s.depth + 1, s.cols);
    let weight = b.freeze(&data(4, out * inp, 1.0), out, inp);
    for beta in [0.0, 1.0] {
        let x = m.normal(from, 5, s.rows * stride, s.size);
        let mut y = m.normal(to, 6, s.rows * out, 1.0);
        let x = Mat::columns(&x, s.rows, s.gap, inp, stride);
        b.linear(x, &weight, MatMut::new(&mut y, s.rows, out), beta);
        let dy = m.normal(from, 7, s.rows * out, s.size);
        let mut dx = m.normal(to, 8, s.rows * stride, 1.0);
        let to_dx = MatMut::columns(&mut dx, s.rows, s.gap, inp, stride);
        b.linear_dx(Mat::new(&dy, s.rows, out), &weight, to_dx, beta);
        found.push(Found("y", b.download(&y), to));
        found.push(Found("dx", b.download(&dx), to));
    }
    found
}

/// Sums, copies, biases, dropout and scaled columns.
fn pointwise<B: Backend>(b: &B, s: Shape, (from, to): (bool, bool)) -> Vec<Found> {
    let (m, stride) = (Maker(b), s.cols + 2 * s.gap);
    let n = s.rows * stride;
    let x = m.normal(from, 1, n, s.size);
    let bias = m.normal(false, 2, s.cols, 1.0);
    let mut found = Vec::new();
    let mut apply = |name, run: &dyn Fn(&mut B::Buf)| {
        let mut y = m.normal(to, 3, n, 1.0);
        run(&mut y);
        found.push(Found(name, b.download(&y), to));
    };
    let view = Mat::columns(&x, s.rows, s.gap, s.cols, stride);
    fn part<B: Backend>(s: Shape, y: &mut B::Buf) -> MatMut<'_, B> {
        MatMut::columns(y, s.rows, s.gap, s.cols, s.cols + 2 * s.gap)
    }
    apply("copied", &|y| b.copy(&x, y, n - n / 5));
    apply("added", &|y| b.add(&x, y, n - n / 5));
    apply("scaled", &|y| b.scale(y, 0.3, n - n / 5));
    apply("filled", &|y| b.fill(y, 0.3));
    apply("biased", &|y| b.add_bias(part(s, y), &bias));
    apply("kept", &|y| b.dropout(view, part(s, y), 0.0, 9));
    apply("dropped", &|y| b.dropout(view, part(s, y), 0.3, 9));
    let columns = Mat::new(&bias, 1, s.cols);
    apply("fresh", &|y| b.add_scaled_columns(view, columns, 0.0, part(s, y), 0.0));
    apply("mixed", &|y| b.add_scaled_columns(view, columns, -1.0, part(s, y), 0.3));
    let (other, mut dbias) = (m.normal(to, 4, n, 1.0), m.normal(false, 5, s.cols, 1.0));
    b.bias_grad(view, &mut dbias);
    found.push(Found("dbias", b.download(&dbias), false));
    let positive: Vec<f32> = data(6, s.cols, 1.0).iter().map(|x| x.abs() + 0.5).collect();
    let (mut dots, positive) = (m.normal(false, 7, s.cols, 1.0), b.upload(&positive));
    let other = Mat::columns(&other, s.rows, s.gap, s.cols, stride);
    b.columns_dot(view, other, Mat::new(&positive, 1, s.cols), &mut dots);
    found.push(Found("dots", b.download(&dots), false));
    let mut middle = vec![0.0; n - n / 3];
    b.read(&x, n / 3, &mut middle);
    found.push(Found("read", middle, from));
    found
}

/// Norms and gated activations with their backwards, and positions.
fn layers<B: Backend>(b: &B, s: Shape, (from, to): (bool, bool)) -> Vec<Found> {
    let (m, stride, n) = (Maker(b), s.cols + 2 * s.gap, s.rows * s.cols);
    let norm = RmsNorm { eps: 1e-5, offset: 1.0 };
    let w = m.normal(false, 1, s.cols, 1.0);
    let x = m.normal(false, 2, n, s.size);
    let (mut y, mut r) = (m.normal(to, 3, n, 1.0), b.zeros(s.rows));
    b.rms_norm(&x, &w, norm, (s.rows, s.cols), &mut y, &mut r);
    let (dy, mut dx, mut dw) = (m.normal(from, 12, n, 1.0), b.zeros(n), b.zeros(s.cols));
    let [mut output, mut again] = [3, 13].map(|seed| m.normal(to, seed, n, 1.0));
    let more = NormMore { dw: Some(&mut dw), y: Some(&mut output), dx: Some(&mut again) };
    b.rms_norm_backward(&dy, &x, &w, norm, &r, (s.rows, s.cols), &mut dx, more);
    let mut found = vec![
        Found("normed", b.download(&y), to),
        Found("normed again", b.download(&output), to),
        Found("dx again", b.download(&again), to),
        Found("dx", b.download(&dx), false),
        Found("dw of all columns", b.download(&dw), false),
    ];
    let mut x = m.normal(from, 4, s.rows * stride, s.size);
    let mut raw = m.normal(from, 5, n, 1.0);
    let group = MatMut::columns(&mut x, s.rows, s.gap, s.cols, stride);
    b.group_norm(group, &w, norm, s.cols, &mut raw);
    let mut dy = m.normal(to, 6, s.rows * stride, 1.0);
    let mut dw = m.normal(false, 7, s.cols, 1.0);
    let group = MatMut::columns(&mut dy, s.rows, s.gap, s.cols, stride);
    b.group_norm_backward(group, &raw, &w, norm, s.cols, Some(&mut dw));
    found.extend([
        Found("group", b.download(&x), from),
        Found("raw", b.download(&raw), from),
        Found("dgroup", b.download(&dy), to),
        Found("dw", b.download(&dw), false),
    ]);

    let size = (s.rows, s.cols);
    let gate_up = m.normal(from, 8, 2 * n, s.size);
    let dh = || m.normal(from, 9, n, 1.0);
    let mut glu = |name, run: &dyn Fn(&mut B::Buf), n| {
        let mut h = m.normal(to, 8, n, s.size);
        run(&mut h);
        found.push(Found(name, b.download(&h), to));
    };
    glu("swiglu", &|h| b.swiglu(&gate_up, size, h), n);
    glu("geglu", &|h| b.geglu(&gate_up, size, h), n);
    glu("dswiglu", &|gate_up| b.swiglu_backward(&mut dh(), size, gate_up), 2 * n);
    glu("dgeglu", &|gate_up| b.geglu_backward(&mut dh(), size, gate_up), 2 * n);

    for (heads, rotary) in [(heads(3, 1, 40), 40), (heads(2, 1, 12), 6)] {
        let positions: Vec<u32> = (0..s.rows as u32).map(|i| i * 7 % 50).collect();
        let cos_sin = m.normal(false, 10, 50 * rotary, 1.0);
        for inverse in [false, true] {
            let mut qkv = m.normal(to, 11, s.rows * heads.qkv_width(), s.size);
            b.rope(&mut qkv, heads, rotary, &positions, &cos_sin, inverse);
            found.push(Found("rotated", b.download(&qkv), to));
        }
    }
    found
}

/// Attention, its backward, and a step of decoding.
fn attention<B: Backend>(b: &B, s: Shape, (from, to): (bool, bool)) -> Vec<Found> {
    let (m, heads, t) = (Maker(b), heads(4, 2, 20), s.rows);
    let mask = AttnMask { window: Some(50), scale: 0.2, soft_cap: None };
    let lens = [t / 3, t - t / 3];
    let qkv = m.normal(from, 1, t * heads.qkv_width(), s.size);
    let (mut out, mut lse) = (m.normal(to, 2, t * heads.out_width(), 1.0), b.zeros(t * 4));
    b.attention(&qkv, heads, &lens, mask, &mut out, &mut lse);
    let mut found = vec![Found("out", b.download(&out), to), Found("lse", b.download(&lse), false)];
    // The backward of one and the same forward, whatever its output was kept as.
    let out = m.buf(from, &found[0].1);
    let dout = m.normal(from, 3, t * heads.out_width(), 1.0);
    let mut dqkv = m.normal(to, 4, t * heads.qkv_width(), 1.0);
    b.attention_backward(&dout, &qkv, &out, &lse, heads, &lens, mask, &mut dqkv);
    found.push(Found("dqkv", b.download(&dqkv), to));

    let (n, capacity) = (2, 30);
    let [k, v] = [5, 6].map(|seed| m.normal(from, seed, n * capacity * 40, 1.0));
    let q = m.normal(from, 7, n * heads.qkv_width(), s.size);
    let q = Mat::columns(&q, n, 0, heads.out_width(), heads.qkv_width());
    let mut out = m.normal(to, 8, n * heads.out_width(), 1.0);
    b.attention_decode(q, &k, &v, capacity, &[3, 30], heads, mask, &mut out);
    found.push(Found("decoded", b.download(&out), to));
    found
}

/// The gradient of logits, where it goes elsewhere, and columns of a table.
fn loss<B: Backend>(b: &B, s: Shape, (from, to): (bool, bool)) -> Vec<Found> {
    let (m, stride, n) = (Maker(b), s.cols + 2 * s.gap, s.rows * s.cols);
    let targets: Vec<u32> = (0..s.rows).map(|i| (i * 5 % s.cols) as u32).collect();
    let weights: Vec<f32> = (0..s.rows).map(|i| i as f32 % 3.0 * 0.5).collect();
    let options = LossOptions { label_smoothing: 0.1, z_loss: 1e-3, ..LossOptions::default() };
    let mut found = Vec::new();
    for (name, options) in [("dlogits", LossOptions::default()), ("with options", options)] {
        let mut logits = m.normal(false, 1, s.rows * stride, s.size);
        let mut dlogits = m.normal(to, 2, n + 3, 1.0);
        let view = MatMut::columns(&mut logits, s.rows, s.gap, s.cols, stride);
        let (grad, mut row_loss) = ((0.1, &mut dlogits), vec![0.0; s.rows]);
        b.cross_entropy_into(view, &targets, &weights, grad, Some(&mut row_loss), options);
        found.push(Found(name, b.download(&dlogits), to));
        found.push(Found("row loss", row_loss, false));
    }
    let table = m.normal(from, 3, s.rows * stride, 1.0);
    let mut y = m.normal(to, 4, 2 * s.rows, 1.0);
    let table = Mat::columns(&table, s.rows, s.gap, s.cols, stride);
    b.gather_columns(table, &[0, s.cols as u32 - 1], &mut y);
    found.push(Found("columns", b.download(&y), to));
    found
}

/// All outputs of all operators at a shape, with buffers of these kinds.
pub fn all<B: Backend>(b: &B, shape: Shape, kinds: (bool, bool)) -> Vec<Found> {
    let mut found = products(b, shape, kinds);
    found.extend(pointwise(b, shape, kinds));
    found.extend(layers(b, shape, kinds));
    found.extend(attention(b, shape, kinds));
    found.extend(loss(b, shape, kinds));
    found
}
