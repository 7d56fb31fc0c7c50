//! The table of cases: every operator, at ordinary, odd and extreme shapes and magnitudes.

use super::further::{self, further_cases};
use crate::quant::{CodeBook, QuantSpec, Quantized, ValueType};
use crate::{
    AdamW, AttnMask, Backend, Heads, LossOptions, Mat, MatMut, NormMore, Onto, Op, RmsNorm, Tail,
    rng,
};

/// What of a case is compared: a name, its values, and the error allowed relative to their largest
/// magnitude.
pub struct Output {
    /// What it is.
    pub name: &'static str,
    /// Its values.
    pub values: Vec<f32>,
    /// The largest difference allowed.
    pub tolerance: f32,
}

/// Names an output.
pub(super) fn output(name: &'static str, values: Vec<f32>, tolerance: f32) -> Output {
    Output { name, values, tolerance }
}

/// One call of an operator (or a forward and its backward) on made-up data.
#[derive(Clone, Debug)]
pub enum Case {
    /// Sides (m, n, k), transposes, alpha, beta, and columns that the views leave out on each side.
    Gemm((usize, usize, usize), (Op, Op), (f32, f32), usize),
    /// `linear` and `linear_dx` of (T, out, in).
    Linear(usize, usize, usize),
    /// `gemm_with`, `linear_with` and `linear_dx_with` of (T, out, in), with tails of these ranks that
    /// share the columns out between them, but for the last 5.
    Tails(usize, usize, usize, &'static [usize]),
    /// `linear` and `linear_dx` with a 4-bit weight in two parts: (T, out of each, in).
    Linear4Bit(usize, usize, usize),
    /// Columns gathered, scattered, scaled and multiplied, and row norms: (rows, columns, rank).
    Adapter(usize, usize, usize),
    /// copy, add, scale, bias and its gradient on (rows, cols).
    Pointwise(usize, usize),
    /// (rows, cols), p.
    Dropout(usize, usize, f32),
    /// Gather and scatter of n rows from (V, D).
    Rows(usize, usize, usize),
    /// RMSNorm and its backward of (rows, D) times a magnitude; the offset.
    Norm(usize, usize, f32, f32),
    /// RMSNorm by groups and its backward: rows, groups, width, magnitude, offset.
    GroupNorm(usize, usize, usize, f32, f32),
    /// RoPE and back of T tokens; columns that are rotated.
    Rope(usize, Heads, usize),
    /// SwiGLU and its backward of (rows, I) times a magnitude.
    Swiglu(usize, usize, f32),
    /// GeGLU and its backward of (rows, I) times a magnitude.
    Geglu(usize, usize, f32),
    /// Soft cap and its backward of n values times a magnitude.
    SoftCap(usize, f32, f32),
    /// Attention and its backward over documents, window, soft cap, magnitude of the queries.
    Attention(Heads, &'static [usize], Option<usize>, Option<f32>, f32),
    /// Decoding with caches of these lengths, window, soft cap.
    Decode(Heads, &'static [usize], Option<usize>, Option<f32>),
    /// Cross-entropy of (rows, V) times a magnitude.
    CrossEntropy(usize, usize, f32),
    /// Sum of squares and three AdamW steps on n values times a magnitude.
    Update(usize, f32),
    /// Three steps of every other rule on n values (rows, cols) times a magnitude.
    Rules(usize, usize, f32),
    /// Cross-entropy of (rows, V) times a magnitude, with options.
    Loss(usize, usize, f32, LossOptions),
    /// Noise on documents of these lengths, D wide.
    Noise(&'static [usize], usize),
}

/// `n` normal values of stream `seed`, times `scale`.
pub fn data(seed: u64, n: usize, scale: f32) -> Vec<f32> {
    (0..n as u64).map(|i| rng::normal(seed, i) as f32 * scale).collect()
}

/// Head counts and width.
pub const fn heads(n_q: usize, n_kv: usize, dim: usize) -> Heads {
    Heads { n_q, n_kv, dim }
}

/// Every case.
pub fn all() -> Vec<Case> {
    let mut cases = gemms();
    cases.extend([
        Case::Linear(1, 1, 1),
        Case::Linear(3, 70, 33),
        Case::Linear(200, 384, 128),
        Case::Linear(1, 640, 576),
        Case::Linear(2, 66, 1537),
        Case::Linear(9, 70, 33),
        Case::Linear(16, 333, 800),
        Case::Linear(150, 3000, 33),
        Case::Tails(1, 9, 3, &[1]),
        Case::Tails(3, 70, 33, &[2, 3]),
        Case::Tails(200, 389, 128, &[16, 8, 16]),
        Case::Tails(9, 133, 577, &[5, 64]),
        Case::Tails(37, 101, 96, &[]),
        Case::Linear4Bit(1, 1, 1),
        Case::Linear4Bit(3, 70, 33),
        Case::Linear4Bit(50, 384, 128),
        Case::Linear4Bit(1, 640, 576),
    ]);
    for (rows, cols) in [(1, 1), (1, 7), (5, 1), (3, 17), (300, 129), (2, 40_000)] {
        cases.push(Case::Pointwise(rows, cols));
        cases.push(Case::Adapter(rows, cols, 1 + rows % 7));
        cases.push(Case::Dropout(rows, cols, 0.0));
        cases.push(Case::Dropout(rows, cols, 0.3));
    }
    cases.extend([Case::Rows(1, 1, 1), Case::Rows(700, 50, 33), Case::Rows(300, 500, 128)]);
    for magnitude in [0.0, 1e-20, 1.0, 1e4, 1e30] {
        cases.push(Case::Norm(1, 1, magnitude, 0.0));
        cases.push(Case::Norm(7, 33, magnitude, 0.0));
        cases.push(Case::Norm(300, 128, magnitude, 0.0));
        cases.push(Case::Norm(2, 5000, magnitude, 0.0));
        cases.push(Case::Norm(300, 35, magnitude, 1.0));
        cases.push(Case::GroupNorm(1, 1, 2, magnitude, 0.0));
        cases.push(Case::GroupNorm(300, 3, 33, magnitude, 1.0));
        cases.push(Case::GroupNorm(9, 1, 320, magnitude, 0.0));
        cases.push(Case::CrossEntropy(1, 1, magnitude));
        cases.push(Case::CrossEntropy(5, 33, magnitude));
        cases.push(Case::CrossEntropy(40, 2048, magnitude));
        cases.push(Case::Update(37, magnitude.min(1e15)));
        cases.push(Case::Update(50_000, magnitude.min(1e15)));
    }
    for magnitude in [0.0, 1.0, 30.0, 1e4, 1e15] {
        cases.push(Case::Swiglu(1, 1, magnitude));
        cases.push(Case::Swiglu(9, 35, magnitude));
        cases.push(Case::Swiglu(100, 320, magnitude));
        cases.push(Case::Geglu(1, 1, magnitude));
        cases.push(Case::Geglu(9, 35, magnitude));
        cases.push(Case::Geglu(100, 320, magnitude));
        cases.push(Case::SoftCap(1, 30.0, magnitude));
        cases.push(Case::SoftCap(40_003, 0.7, magnitude));
    }
    cases.extend([
        Case::Rope(1, heads(1, 1, 2), 2),
        Case::Rope(33, heads(3, 1, 6), 6),
        Case::Rope(200, heads(4, 4, 32), 32),
        Case::Rope(60, heads(9, 3, 64), 64),
        Case::Rope(33, heads(3, 1, 12), 6),
        Case::Rope(150, heads(4, 2, 32), 24),
    ]);
    cases.extend(attentions());
    cases.extend(further_cases());
    cases
}

/// Products: odd sides, one row, one column, every transpose, views with gaps, sizes that are cut
/// into blocks.
fn gemms() -> Vec<Case> {
    let mut cases = Vec::new();
    let sides = [
        (1, 1, 1),
        (1, 5, 3),
        (5, 1, 3),
        (3, 4, 0),
        (17, 33, 65),
        (1, 300, 128),
        (128, 1, 64),
        (130, 257, 129),
        (8, 2048, 128),
        (2048, 8, 128),
        (384, 128, 300),
    ];
    for side in sides {
        for ops in [(Op::N, Op::N), (Op::N, Op::T), (Op::T, Op::N), (Op::T, Op::T)] {
            cases.push(Case::Gemm(side, ops, (1.0, 0.0), 0));
            cases.push(Case::Gemm(side, ops, (0.5, -2.0), 3));
        }
    }
    cases
}

/// Attention: one token, many documents, groups of heads, windows, tile edges, large scores.
fn attentions() -> Vec<Case> {
    let mut cases = Vec::new();
    let shapes = [
        (heads(1, 1, 1), &[1][..]),
        (heads(2, 1, 3), &[1, 5, 0, 2]),
        (heads(4, 4, 32), &[128, 31, 32, 33, 1, 127]),
        (heads(9, 3, 64), &[150]),
        (heads(4, 2, 20), &[300, 17]),
        (heads(2, 2, 33), &[129]),
        (heads(2, 1, 80), &[64, 65]),
        // Long enough that its keys are cut into ranges.
        (heads(2, 1, 4), &[700, 40]),
    ];
    for (heads, lens) in shapes {
        for window in [None, Some(1), Some(7), Some(100), Some(1000)] {
            cases.push(Case::Attention(heads, lens, window, None, 1.0));
        }
        for cap in [None, Some(2.5)] {
            cases.push(Case::Attention(heads, lens, None, cap, 0.0));
            cases.push(Case::Attention(heads, lens, None, cap, 1e4));
        }
        cases.push(Case::Attention(heads, lens, Some(7), Some(50.0), 1.0));
        cases.push(Case::Attention(heads, lens, None, Some(0.5), 1.0));
    }
    for heads in [heads(1, 1, 1), heads(9, 3, 64), heads(4, 2, 33)] {
        for window in [None, Some(5)] {
            for cap in [None, Some(1.5)] {
                cases.push(Case::Decode(heads, &[1], window, cap));
                cases.push(Case::Decode(heads, &[3, 1, 40, 17], window, cap));
                cases.push(Case::Decode(heads, &[700, 699], window, cap));
            }
        }
    }
    cases
}

impl Case {
    /// Runs the case and returns what it computed.
    pub fn run<B: Backend>(&self, b: &B) -> Vec<Output> {
        match *self {
            Case::Gemm(sides, ops, factors, gap) => gemm(b, sides, ops, factors, gap),
            Case::Linear(t, out, inp) => linear(b, t, out, inp),
            Case::Tails(t, out, inp, ranks) => tails(b, (t, out, inp), ranks),
            Case::Linear4Bit(t, out, inp) => linear_4bit(b, t, out, inp),
            Case::Adapter(rows, cols, rank) => adapter(b, rows, cols, rank),
            Case::Pointwise(rows, cols) => pointwise(b, rows, cols),
            Case::Dropout(rows, cols, p) => dropout(b, rows, cols, p),
            Case::Rows(n, v, d) => gather_scatter(b, n, v, d),
            Case::Norm(rows, d, magnitude, offset) => norm(b, rows, d, magnitude, offset),
            Case::GroupNorm(rows, groups, width, magnitude, offset) => {
                group_norm(b, (rows, groups, width), magnitude, offset)
            }
            Case::Rope(t, heads, rotary) => rope(b, t, heads, rotary),
            Case::Swiglu(rows, i, magnitude) => swiglu(b, rows, i, magnitude),
            Case::Geglu(rows, i, magnitude) => geglu(b, rows, i, magnitude),
            Case::SoftCap(n, cap, magnitude) => soft_cap(b, n, cap, magnitude),
            Case::Attention(heads, lens, window, soft_cap, magnitude) => {
                attention(b, heads, lens, mask(heads, window, soft_cap), magnitude)
            }
            Case::Decode(heads, lens, window, soft_cap) => {
                decode(b, heads, lens, mask(heads, window, soft_cap))
            }
            Case::CrossEntropy(rows, v, magnitude) => cross_entropy(b, rows, v, magnitude),
            Case::Update(n, magnitude) => update(b, n, magnitude),
            Case::Rules(rows, cols, magnitude) => further::rules(b, rows, cols, magnitude),
            Case::Loss(rows, v, magnitude, options) => {
                further::loss(b, rows, v, magnitude, options)
            }
            Case::Noise(lens, d) => further::noise(b, lens, d),
        }
    }
}

fn gemm<B: Backend>(
    b: &B,
    (m, n, k): (usize, usize, usize),
    (op_a, op_b): (Op, Op),
    (alpha, beta): (f32, f32),
    gap: usize,
) -> Vec<Output> {
    let turn = |op, rows, cols| {
        if op == Op::N { (rows, cols) } else { (cols, rows) }
    };
    let ((ra, ca), (rb, cb)) = (turn(op_a, m, k), turn(op_b, k, n));
    let x = b.upload(&data(1, ra * (ca + 2 * gap), 1.0));
    let y = b.upload(&data(2, rb * (cb + 2 * gap), 1.0));
    // With beta = 0 the old values must not matter, whatever they are.
    let old = if beta == 0.0 { vec![f32::NAN; m * n] } else { data(3, m * (n + 2 * gap), 1.0) };
    let mut z = b.upload(&old);
    b.gemm(
        Mat::columns(&x, ra, gap, ca, ca + 2 * gap),
        op_a,
        Mat::columns(&y, rb, gap, cb, cb + 2 * gap),
        op_b,
        MatMut::columns(&mut z, m, gap, n, n + 2 * gap),
        alpha,
        beta,
    );
    vec![output("c", b.download(&z), 1e-6)]
}

fn linear<B: Backend>(b: &B, t: usize, out: usize, inp: usize) -> Vec<Output> {
    let weight = data(1, out * inp, 1.0);
    both_ways(b, &b.freeze(&weight, out, inp), (t, out, inp))
}

/// A frozen weight (out, in) in the forward and in the backward, and its values.
fn both_ways<B: Backend>(
    b: &B,
    frozen: &B::Frozen,
    (t, out, inp): (usize, usize, usize),
) -> Vec<Output> {
    let (x, dy) = (b.upload(&data(2, t * inp, 1.0)), b.upload(&data(3, t * out, 1.0)));
    let (mut y, mut dx) = (b.upload(&data(4, t * out, 1.0)), b.zeros(t * inp));
    b.linear(Mat::new(&x, t, inp), frozen, MatMut::new(&mut y, t, out), 1.0);
    b.linear_dx(Mat::new(&dy, t, out), frozen, MatMut::new(&mut dx, t, inp), 0.0);
    let ids: Vec<u32> = (0..t as u64).map(|i| (rng::mix(5, i) % out as u64) as u32).collect();
    let mut rows = b.zeros(t * inp);
    b.gather_frozen(frozen, &ids, &mut rows);
    vec![
        output("y", b.download(&y), 1e-6),
        output("dx", b.download(&dx), 1e-6),
        output("thaw", b.thaw(frozen), 0.0),
        output("rows", b.download(&rows), 0.0),
    ]
}

fn tails<B: Backend>(b: &B, (t, out, inp): (usize, usize, usize), ranks: &[usize]) -> Vec<Output> {
    let weight = data(1, out * inp, 1.0);
    let (frozen, plain) = (b.freeze(&weight, out, inp), b.upload(&weight));
    let (x, dy) = (b.upload(&data(2, t * inp, 1.0)), b.upload(&data(3, t * out, 1.0)));
    let old = data(4, t * out, 1.0);
    // All tails read columns of one U; B of each lies by itself.
    let rank: usize = ranks.iter().sum();
    let u = b.upload(&data(5, t * (rank + 1), 1.0));
    let width = (out - 5) / ranks.len().max(1);
    let factors: Vec<B::Buf> =
        ranks.iter().map(|rank| b.upload(&data(6, rank * width, 1.0))).collect();
    let mut start = 1;
    let mut tails = Vec::new();
    for (i, (&rank_of, v)) in ranks.iter().zip(&factors).enumerate() {
        let u = Mat::columns(&u, t, start, rank_of, rank + 1);
        let v = Mat::new(v, width, rank_of);
        // Scales that change no rounding.
        let scale = [2.0, 0.25][i % 2];
        tails.push(Tail { u, v, op_v: Op::T, column: i * width, scale });
        start += rank_of;
    }
    let a = b.upload(&data(7, rank * inp, 1.0));
    let (du, a) = (Mat::columns(&u, t, 1, rank, rank + 1), Mat::new(&a, rank, inp));
    let of_dx = [Tail { u: du, v: a, op_v: Op::N, column: 0, scale: 1.0 }];
    let (x, dy) = (Mat::new(&x, t, inp), Mat::new(&dy, t, out));
    let (mut y, mut z) = (b.upload(&old), b.upload(&vec![f32::NAN; t * out]));
    b.linear_with(x, &frozen, &tails, MatMut::new(&mut y, t, out), Onto::Old(1.0));
    let (old, mut sum) = (b.upload(&old), b.upload(&vec![f32::NAN; t * out]));
    b.linear_with(x, &frozen, &tails, MatMut::new(&mut sum, t, out), Onto::Buf(&old));
    let w = Mat::new(&plain, out, inp);
    b.gemm_with((x, Op::N), (w, Op::T), &tails, MatMut::new(&mut z, t, out), Onto::Old(0.0));
    let mut dx = b.upload(&vec![f32::NAN; t * inp]);
    b.linear_dx_with(dy, &frozen, &of_dx, MatMut::new(&mut dx, t, inp), 0.0);
    vec![
        output("y", b.download(&y), 1e-6),
        output("sum", b.download(&sum), 1e-6),
        output("z", b.download(&z), 1e-6),
        output("dx", b.download(&dx), 1e-6),
    ]
}

fn linear_4bit<B: Backend>(b: &B, t: usize, out: usize, inp: usize) -> Vec<Output> {
    let part = |seed, book| {
        let spec = QuantSpec { book, ..QuantSpec::qlora(ValueType::Bf16) };
        Quantized::quantize(&data(seed, out * inp, 1.0), spec).expect("normal values are finite")
    };
    let frozen = b.freeze_4bit(vec![part(1, CodeBook::Nf4), part(5, CodeBook::Fp4)], inp);
    both_ways(b, &frozen, (t, 2 * out, inp))
}

fn adapter<B: Backend>(b: &B, rows: usize, cols: usize, rank: usize) -> Vec<Output> {
    let n = rows * cols;
    let (x, z) = (b.upload(&data(1, n + 2 * rows, 1.0)), b.upload(&data(2, n, 1.0)));
    let x = Mat::columns(&x, rows, 1, cols, cols + 2);
    let positive: Vec<f32> = data(3, cols, 1.0).iter().map(|v| v.abs() + 0.5).collect();
    let scale = b.upload(&positive);
    let scale = Mat::new(&scale, 1, cols);
    // With beta = 0 the old values must not matter.
    let (mut y, mut fresh) = (b.upload(&data(4, n, 1.0)), b.upload(&vec![f32::NAN; n]));
    b.add_scaled_columns(x, scale, -1.0, MatMut::new(&mut y, rows, cols), 0.3);
    b.add_scaled_columns(x, scale, 0.0, MatMut::new(&mut fresh, rows, cols), 0.0);
    let mut dots = b.upload(&data(5, cols, 1.0));
    b.columns_dot(x, Mat::new(&z, rows, cols), scale, &mut dots);

    let ids: Vec<u32> = (0..rows as u64).map(|i| (rng::mix(5, i) % cols as u64) as u32).collect();
    let (table, mut gathered) = (b.upload(&data(6, rank * cols, 1.0)), b.zeros(rows * rank));
    b.gather_columns(Mat::new(&table, rank, cols), &ids, &mut gathered);
    let mut scattered = b.upload(&data(7, rank * cols, 1.0));
    b.scatter_add_columns(&gathered, &ids, MatMut::new(&mut scattered, rank, cols));

    let (factor, squares) = (b.upload(&data(8, cols * rank, 0.1)), vec![4.0; cols]);
    let (mut norms, mut scales) = (b.zeros(cols + 1), b.zeros(cols));
    b.dora_scales(
        &b.upload(&squares),
        Mat::new(&factor, cols, rank),
        Mat::new(&table, rank, cols),
        &b.upload(&positive),
        MatMut::columns(&mut norms, 1, 1, cols, cols + 1),
        MatMut::new(&mut scales, 1, cols),
    );
    vec![
        output("y", b.download(&y), 5e-7),
        output("fresh", b.download(&fresh), 5e-7),
        output("dots", b.download(&dots), 1e-6),
        output("gathered", b.download(&gathered), 0.0),
        output("scattered", b.download(&scattered), 1e-6),
        output("norms", b.download(&norms), 5e-7),
        output("scales", b.download(&scales), 5e-7),
    ]
}

fn pointwise<B: Backend>(b: &B, rows: usize, cols: usize) -> Vec<Output> {
    let n = rows * cols;
    let (x, bias) = (b.upload(&data(1, n, 1.0)), b.upload(&data(2, cols, 1.0)));
    let (mut y, mut z) = (b.upload(&data(3, n, 1.0)), b.zeros(n));
    b.add(&x, &mut y, n - n / 5);
    b.scale(&mut y, 0.3, n - n / 3);
    b.copy(&y, &mut z, n - n / 7);
    let mut dbias = b.upload(&data(4, cols, 1.0));
    b.bias_grad(Mat::columns(&y, rows, cols / 3, cols - cols / 3, cols), &mut dbias);
    b.add_bias(MatMut::columns(&mut y, rows, cols / 3, cols - cols / 3, cols), &bias);
    vec![
        output("y", b.download(&y), 2e-7),
        output("z", b.download(&z), 2e-7),
        output("dbias", b.download(&dbias), 1e-6),
    ]
}

fn dropout<B: Backend>(b: &B, rows: usize, cols: usize, p: f32) -> Vec<Output> {
    let x = b.upload(&data(1, rows * (cols + 2), 1.0));
    let mut y = b.zeros(rows * cols);
    b.dropout(Mat::columns(&x, rows, 1, cols, cols + 2), MatMut::new(&mut y, rows, cols), p, 9);
    vec![output("y", b.download(&y), 2e-7)]
}

fn gather_scatter<B: Backend>(b: &B, n: usize, v: usize, d: usize) -> Vec<Output> {
    let ids: Vec<u32> = (0..n as u64).map(|i| (rng::mix(5, i) % v as u64) as u32).collect();
    let table = b.upload(&data(1, v * d, 1.0));
    let (mut y, mut dtable) = (b.zeros(n * d), b.upload(&data(2, v * d, 1.0)));
    b.gather_rows(&table, &ids, d, &mut y);
    b.scatter_add_rows(&y, &ids, d, &mut dtable);
    vec![output("y", b.download(&y), 0.0), output("dtable", b.download(&dtable), 1e-6)]
}

fn norm<B: Backend>(b: &B, rows: usize, d: usize, magnitude: f32, offset: f32) -> Vec<Output> {
    let norm = RmsNorm { eps: 1e-5, offset };
    let x = b.upload(&data(1, rows * d, magnitude));
    let (w, dy) = (b.upload(&data(2, d, 1.0)), b.upload(&data(3, rows * d, 1.0)));
    let (mut y, mut r) = (b.zeros(rows * d), b.zeros(rows));
    b.rms_norm(&x, &w, norm, (rows, d), &mut y, &mut r);
    // Adding to zeros: an old gradient of size 1 would hide that of large inputs.
    let (mut dx, mut dw) = (b.zeros(rows * d), b.upload(&data(4, d, 1.0)));
    b.rms_norm_backward(&dy, &x, &w, norm, &r, (rows, d), &mut dx, NormMore::dw(Some(&mut dw)));
    let mut dx_only = b.upload(&data(5, rows * d, 1.0));
    let [mut y_again, mut dx_again] = [b.zeros(rows * d), b.zeros(rows * d)];
    let more = NormMore { dw: None, y: Some(&mut y_again), dx: Some(&mut dx_again) };
    b.rms_norm_backward(&dy, &x, &w, norm, &r, (rows, d), &mut dx_only, more);
    assert_eq!(b.download(&y_again), b.download(&y), "the output once more");
    assert_eq!(b.download(&dx_again), b.download(&dx_only), "dx once more");
    vec![
        output("y", b.download(&y), 1e-6),
        output("r", b.download(&r), 1e-6),
        // One column: the gradient is a difference of nearly equal numbers, eps apart.
        output("dx", b.download(&dx), if d == 1 { f32::INFINITY } else { 2e-6 }),
        output("dw", b.download(&dw), 2e-6),
        output("dx added", b.download(&dx_only), if d == 1 { 1e-2 } else { 2e-6 }),
    ]
}

fn group_norm<B: Backend>(
    b: &B,
    (rows, groups, width): (usize, usize, usize),
    magnitude: f32,
    offset: f32,
) -> Vec<Output> {
    let norm = RmsNorm { eps: 1e-5, offset };
    // The view leaves out a column before and two behind.
    let (cols, stride) = (groups * width, groups * width + 3);
    let view = |buf| MatMut::columns(buf, rows, 1, cols, stride);
    let (mut x, w) = (b.upload(&data(1, rows * stride, magnitude)), b.upload(&data(2, width, 1.0)));
    let mut dy = b.upload(&data(3, rows * stride, 1.0));
    let (mut raw, mut dw) = (b.zeros(rows * cols), b.upload(&data(4, width, 1.0)));
    b.group_norm(view(&mut x), &w, norm, width, &mut raw);
    let mut dy_only = b.upload(&data(3, rows * stride, 1.0));
    b.group_norm_backward(view(&mut dy_only), &raw, &w, norm, width, None);
    b.group_norm_backward(view(&mut dy), &raw, &w, norm, width, Some(&mut dw));
    let (y, dx) = (b.download(&x), b.download(&dy));
    assert_eq!(dx, b.download(&dy_only), "the weight's gradient does not change the input's");
    let inside = |x: &[f32]| -> Vec<f32> {
        x.chunks(stride).flat_map(|row| row[1..=cols].to_vec()).collect()
    };
    let outside: Vec<f32> = y.chunks(stride).flat_map(|row| [row[0], row[cols + 1]]).collect();
    vec![
        output("y", inside(&y), 1e-6),
        output("outside", outside, 0.0),
        output("raw", b.download(&raw), 0.0),
        // Two columns: the gradient is nearly a difference of equal numbers.
        output("dx", inside(&dx), if width == 2 { 1e-2 } else { 2e-6 }),
        output("dw", b.download(&dw), 2e-6),
    ]
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

fn geglu<B: Backend>(b: &B, rows: usize, i: usize, magnitude: f32) -> Vec<Output> {
    let mut gate_up = b.upload(&data(1, rows * 2 * i, magnitude));
    let (mut again, mut h) = (b.upload(&data(2, rows * i, 1.0)), b.zeros(rows * i));
    b.geglu(&gate_up, (rows, i), &mut h);
    b.geglu_backward(&mut again, (rows, i), &mut gate_up);
    assert_eq!(bits(&b.download(&again)), bits(&b.download(&h)), "the backward's output");
    vec![output("h", b.download(&h), 1e-6), output("dgate_up", b.download(&gate_up), 2e-6)]
}

fn soft_cap<B: Backend>(b: &B, n: usize, cap: f32, magnitude: f32) -> Vec<Output> {
    let mut x = b.upload(&data(1, n, magnitude));
    b.soft_cap(&mut x, cap, n - n / 5);
    let mut y = b.download(&x);
    assert_eq!(y[n - n / 5..], data(1, n, magnitude)[n - n / 5..], "a value outside changed");
    y.truncate(n - n / 5);
    vec![output("y", y, 5e-7)]
}

/// A mask with the usual scale.
fn mask(heads: Heads, window: Option<usize>, soft_cap: Option<f32>) -> AttnMask {
    AttnMask { window, scale: 1.0 / (heads.dim as f32).sqrt(), soft_cap }
}

fn rope<B: Backend>(b: &B, t: usize, heads: Heads, rotary: usize) -> Vec<Output> {
    let positions: Vec<u32> = (0..t as u64).map(|i| (rng::mix(6, i) % 50) as u32).collect();
    let cos_sin = b.upload(&data(1, 50 * rotary, 1.0));
    let start = data(2, t * heads.qkv_width(), 1.0);
    let (mut x, mut y) = (b.upload(&start), b.upload(&start));
    b.rope(&mut x, heads, rotary, &positions, &cos_sin, false);
    b.rope(&mut y, heads, rotary, &positions, &cos_sin, true);
    vec![output("rotated", b.download(&x), 5e-7), output("inverse", b.download(&y), 5e-7)]
}

fn swiglu<B: Backend>(b: &B, rows: usize, i: usize, magnitude: f32) -> Vec<Output> {
    let mut gate_up = b.upload(&data(1, rows * 2 * i, magnitude));
    let (mut again, mut h) = (b.upload(&data(2, rows * i, 1.0)), b.zeros(rows * i));
    b.swiglu(&gate_up, (rows, i), &mut h);
    b.swiglu_backward(&mut again, (rows, i), &mut gate_up);
    assert_eq!(bits(&b.download(&again)), bits(&b.download(&h)), "the backward's output");
    vec![output("h", b.download(&h), 1e-6), output("dgate_up", b.download(&gate_up), 1e-6)]
}

fn attention<B: Backend>(
    b: &B,
    heads: Heads,
    lens: &[usize],
    mask: AttnMask,
    magnitude: f32,
) -> Vec<Output> {
    let t: usize = lens.iter().sum();
    let width = heads.qkv_width();
    let mut values = data(1, t * width, 1.0);
    for row in values.chunks_mut(width) {
        row[..heads.out_width()].iter_mut().for_each(|q| *q *= magnitude);
    }
    let (qkv, dout) = (b.upload(&values), b.upload(&data(2, t * heads.out_width(), 1.0)));
    let mut out = b.upload(&vec![f32::NAN; t * heads.out_width()]);
    let mut lse = b.upload(&vec![f32::NAN; t * heads.n_q]);
    let mut dqkv = b.upload(&vec![f32::NAN; t * width]);
    b.attention(&qkv, heads, lens, mask, &mut out, &mut lse);
    b.attention_backward(&dout, &qkv, &out, &lse, heads, lens, mask, &mut dqkv);
    // Scores of 1e4 are themselves only known to 1e-3 in f32, and probabilities are their
    // exponentials.
    let loose = if magnitude > 1.0 { 2e-2 } else { 2e-6 };
    vec![
        output("out", b.download(&out), loose),
        // A soft cap leaves lse of the size of the cap, whatever the scores' own error.
        output("lse", b.download(&lse), if mask.soft_cap.is_some() { loose } else { 2e-6 }),
        output("dqkv", b.download(&dqkv), loose),
    ]
}

fn decode<B: Backend>(b: &B, heads: Heads, lens: &[usize], mask: AttnMask) -> Vec<Output> {
    let (n, width) = (lens.len(), heads.n_kv * heads.dim);
    let capacity = lens.iter().max().expect("no case without sequences") + 2;
    let q = b.upload(&data(1, n * heads.qkv_width(), 1.0));
    let keys = b.upload(&data(2, n * capacity * width, 1.0));
    let values = b.upload(&data(3, n * capacity * width, 1.0));
    let mut out = b.zeros(n * heads.out_width());
    let q = Mat::columns(&q, n, 0, heads.out_width(), heads.qkv_width());
    b.attention_decode(q, &keys, &values, capacity, lens, heads, mask, &mut out);
    vec![output("out", b.download(&out), 2e-6)]
}

fn cross_entropy<B: Backend>(b: &B, rows: usize, v: usize, magnitude: f32) -> Vec<Output> {
    let targets: Vec<u32> = (0..rows as u64).map(|i| (rng::mix(5, i) % v as u64) as u32).collect();
    let weights: Vec<f32> = (0..rows).map(|i| i as f32 % 3.0 * 0.5).collect();
    let start = data(1, rows * (v + 1), magnitude);
    let mut logits = b.upload(&start);
    let mut row_loss = vec![0.0; rows];
    let view = MatMut::columns(&mut logits, rows, 1, v, v + 1);
    let sums = b.cross_entropy(view, &targets, &weights, None, Some(&mut row_loss));
    let kept = b.download(&logits);
    let view = MatMut::columns(&mut logits, rows, 1, v, v + 1);
    let with_gradient = b.cross_entropy(view, &targets, &weights, Some(0.1), None);
    assert_eq!(sums, with_gradient, "the gradient does not change the loss");
    let totals = [
        sums.weighted_loss,
        sums.weighted_ce,
        sums.weight,
        sums.n_correct as f64,
        sums.n_rows as f64,
    ];
    let mut gradient = b.download(&logits);
    // Column 0 lies outside the view and must be as it was; it would hide the gradient's scale.
    for (row, old) in gradient.chunks_mut(v + 1).zip(start.chunks(v + 1)) {
        assert_eq!(row[0], old[0], "a value outside the view changed");
        row[0] = 0.0;
    }
    vec![
        output("kept", kept, 0.0),
        output("row loss", row_loss, 1e-6),
        output("sums", totals.map(|x| x as f32).to_vec(), 1e-6),
        output("dlogits", gradient, 2e-6),
    ]
}

fn update<B: Backend>(b: &B, n: usize, magnitude: f32) -> Vec<Output> {
    let (mut p, mut m, mut v) = (b.upload(&data(1, n, 1.0)), b.zeros(n), b.zeros(n));
    let mut squares = Vec::new();
    for step in 1..=3 {
        let g = b.upload(&data(1 + step, n, magnitude));
        squares.push(b.sum_squares(&g) as f32);
        let update = AdamW {
            lr: 1e-2,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.1,
            step,
            grad_scale: 0.7,
        };
        b.adamw(&mut p, &g, 0, &mut m, &mut v, update);
    }
    vec![
        output("p", b.download(&p), 5e-7),
        output("m", b.download(&m), 5e-7),
        output("v", b.download(&v), 5e-7),
        output("squares", squares, 1e-7),
    ]
}
