//! Every operator of a training step and of decoding at the shapes of SmolLM2-135M (4 documents of 512 tokens), with the operations
//! and the bytes that it cannot do without, beside what the machine can do at best.
//!
//! `cargo bench --manifest-path tests/bench/Cargo.toml --target-dir target/bench/rust [-- FILTER]`; `RAYON_NUM_THREADS` sets the
//! threads. What fits a cache may be read faster than memory is. Ends with a table, which is also written to `operators.md` beside
//! criterion's own files, in `target/bench/operators/`.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use bench_ops::{Ceilings, normals};
use criterion::{Criterion, Throughput};
use hone_kernels::quant::{QuantSpec, Quantized, ValueType};
use hone_kernels::{
    AdamW, AttnMask, Backend, CODE_BLOCK, Compute, Cpu, Heads, Mat, MatMut, NormMore, Op, RmsNorm, rng,
};

type Buf = <Cpu as Backend>::Buf;

/// Tokens of a step, and of each of its documents.
const T: usize = 2048;
const DOCUMENT: usize = 512;
/// Model width, SwiGLU's, vocabulary, rank of adapters.
const D: usize = 576;
const I: usize = 1536;
const V: usize = 49_152;
const R: usize = 16;
/// Rows of logits at once.
const HEAD_ROWS: usize = 256;
const HEADS: Heads = Heads { n_q: 9, n_kv: 3, dim: 64 };
/// Values of an optimizer's buffer: past any cache.
const N_PARAMS: usize = 30_000_000;
/// Bytes of a value of a buffer.
const F32: usize = 4;

/// What is known of an operator before it runs.
struct Operator {
    name: String,
    /// Operations of its products; 0 where it has none.
    flops: usize,
    /// Bytes read and written at least.
    bytes: usize,
    compute: Compute,
}

/// The benchmarks so far.
struct Session {
    criterion: Criterion,
    out: PathBuf,
    begun: SystemTime,
    operators: Vec<Operator>,
}

impl Session {
    fn new(out: PathBuf) -> Self {
        let criterion = Criterion::default()
            .sample_size(10)
            .warm_up_time(Duration::from_millis(200))
            .measurement_time(Duration::from_millis(1500))
            .output_directory(&out)
            .configure_from_args();
        Session { criterion, out, begun: SystemTime::now(), operators: Vec::new() }
    }

    /// Measures a product in this arithmetic.
    fn product(
        &mut self,
        cpu: &Cpu,
        name: &str,
        flops: usize,
        bytes: usize,
        mut run: impl FnMut(),
    ) {
        let (compute, name) = (cpu.compute(), format!("{name}, {}", arithmetic(cpu)));
        let mut group = self.criterion.benchmark_group("operator");
        group.throughput(Throughput::ElementsAndBytes {
            elements: flops as u64,
            bytes: bytes as u64,
        });
        group.bench_function(&name, |bencher| bencher.iter(&mut run));
        group.finish();
        self.operators.push(Operator { name, flops, bytes, compute });
    }

    /// Measures what moves memory rather than multiplies.
    fn moves(&mut self, name: &str, bytes: usize, mut run: impl FnMut()) {
        let mut group = self.criterion.benchmark_group("operator");
        group.throughput(Throughput::Bytes(bytes as u64));
        group.bench_function(name, |bencher| bencher.iter(&mut run));
        group.finish();
        let (name, compute) = (name.to_owned(), Compute::F32);
        self.operators.push(Operator { name, flops: 0, bytes, compute });
    }

    /// Seconds of an operator's run, by criterion's median; none where a filter left it out.
    fn seconds(&self, operator: &Operator) -> Option<f64> {
        let folder = operator.name.replace(['/', '?', '"', '\\', '*', '<', '>', ':', '|'], "_");
        let path = self.out.join("operator").join(folder).join("new/estimates.json");
        if fs::metadata(&path).and_then(|file| file.modified()).ok()? < self.begun {
            return None;
        }
        let estimates: serde_json::Value = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
        Some(estimates["median"]["point_estimate"].as_f64()? / 1e9)
    }

    fn table(&self, limits: Ceilings) -> String {
        let threads = rayon::current_num_threads();
        let mut out = format!(
            "{threads} threads; a large product reaches {:.0} GFLOP/s in bf16 and {:.0} in f32, memory is read at {:.0} GB/s.\n\n\
             | operator | ms | GFLOP/s | of the large product | GB/s | of reading |\n|---|---:|---:|---:|---:|---:|\n",
            limits.gemm_bf16, limits.gemm_f32, limits.read
        );
        for operator in &self.operators {
            let Some(seconds) = self.seconds(operator) else { continue };
            let (flops, bytes) = (operator.flops as f64, operator.bytes as f64);
            let (rate, read) = (flops / seconds / 1e9, bytes / seconds / 1e9);
            let products = match operator.flops {
                0 => " | ".to_owned(),
                _ => format!("{rate:.0} | {:.0} %", 100.0 * rate / limits.gemm(operator.compute)),
            };
            let row = format!("{read:.1} | {:.0} %", 100.0 * read / limits.read);
            out += &format!("| {} | {:.3} | {products} | {row} |\n", operator.name, 1e3 * seconds);
        }
        out
    }
}

fn arithmetic(cpu: &Cpu) -> &'static str {
    if cpu.compute() == Compute::Bf16 { "bf16" } else { "f32" }
}

/// The frozen maps of a layer and the head, forward and back, whole and in 4 bits; few rows, as decoding has them.
fn frozen(session: &mut Session, cpu: &Cpu) {
    let maps = [("qkv", HEADS.qkv_width(), D), ("gate_up", 2 * I, D), ("down", D, I)];
    let weight_bytes = if cpu.compute() == Compute::Bf16 { 2 } else { F32 };
    let cases = maps.iter().flat_map(|&(name, out, inp)| [T, 8, 1].map(|t| (name, t, out, inp)));
    let head = [HEAD_ROWS, 8, 1].map(|t| ("head", t, V, D));
    for (name, t, out, inp) in cases.chain(head) {
        let (x, w) = (normals(cpu, t * inp), normals(cpu, out * inp));
        let w = cpu.freeze(&cpu.download(&w), out, inp);
        let (mut y, mut dx) = (normals(cpu, t * out), cpu.zeros(t * inp));
        let flops = 2 * t * out * inp;
        let bytes = weight_bytes * out * inp + F32 * t * (out + inp);
        session.product(cpu, &format!("linear {name}, {t} rows"), flops, bytes, || {
            cpu.linear(Mat::new(&x, t, inp), &w, MatMut::new(&mut y, t, out), 0.0);
        });
        if t > 8 {
            session.product(cpu, &format!("linear_dx {name}, {t} rows"), flops, bytes, || {
                cpu.linear_dx(Mat::new(&y, t, out), &w, MatMut::new(&mut dx, t, inp), 0.0);
            });
        }
    }
    let values = cpu.download(&normals(cpu, 2 * I * D));
    let Ok(codes) = Quantized::quantize(&values, QuantSpec::qlora(ValueType::Bf16)) else { return };
    let w = cpu.freeze_4bit(vec![codes], D);
    let (x, mut y, mut dx) = (normals(cpu, T * D), normals(cpu, T * 2 * I), cpu.zeros(T * D));
    let (flops, bytes) = (4 * T * I * D, I * D + F32 * T * (2 * I + D));
    session.product(cpu, "linear gate_up in 4 bits, 2048 rows", flops, bytes, || {
        cpu.linear(Mat::new(&x, T, D), &w, MatMut::new(&mut y, T, 2 * I), 0.0);
    });
    session.product(cpu, "linear_dx gate_up in 4 bits, 2048 rows", flops, bytes, || {
        cpu.linear_dx(Mat::new(&y, T, 2 * I), &w, MatMut::new(&mut dx, T, D), 0.0);
    });
}

/// The products of an adapter, and the gradient of a weight that is trained whole.
fn trained(session: &mut Session, cpu: &Cpu) {
    let products = [
        ("gemm x At", T, R, D, Op::N, Op::T),
        ("gemm x Bt", T, D, R, Op::N, Op::T),
        ("gemm dy B", T, R, D, Op::N, Op::N),
        ("gemm dyt x, adapter", R, D, T, Op::T, Op::N),
        ("gemm dyt x, weight", 2 * I, D, T, Op::T, Op::N),
    ];
    for (name, rows, cols, inner, op_a, op_b) in products {
        let (a, b) = (normals(cpu, rows * inner), normals(cpu, inner * cols));
        let mut c = cpu.zeros(rows * cols);
        let a = if op_a == Op::N { Mat::new(&a, rows, inner) } else { Mat::new(&a, inner, rows) };
        let b = if op_b == Op::N { Mat::new(&b, inner, cols) } else { Mat::new(&b, cols, inner) };
        let flops = 2 * rows * cols * inner;
        let bytes = F32 * (rows * inner + inner * cols + rows * cols);
        session.product(cpu, name, flops, bytes, || {
            cpu.gemm(a, op_a, b, op_b, MatMut::new(&mut c, rows, cols), 1.0, 0.0);
        });
    }
}

/// Attention of training and of decoding.
fn attention(session: &mut Session, cpu: &Cpu) {
    let lens = vec![DOCUMENT; T / DOCUMENT];
    let (qkv_n, out_n) = (T * HEADS.qkv_width(), T * HEADS.out_width());
    let (qkv, dout) = (normals(cpu, qkv_n), normals(cpu, out_n));
    let (mut out, mut lse) = (cpu.zeros(out_n), cpu.zeros(T * HEADS.n_q));
    let mut dqkv = cpu.zeros(qkv_n);
    let mask = AttnMask { window: None, scale: 0.125, soft_cap: None };
    // Pairs of a query and a key that it sees; two products forward, five back.
    let pairs = T * (DOCUMENT + 1) / 2;
    let flops = 2 * pairs * HEADS.out_width();
    session.product(cpu, "attention", 2 * flops, F32 * (qkv_n + out_n), || {
        cpu.attention(&qkv, HEADS, &lens, mask, &mut out, &mut lse);
    });
    let bytes = F32 * 2 * (qkv_n + out_n);
    session.product(cpu, "attention_backward", 5 * flops, bytes, || {
        cpu.attention_backward(&dout, &qkv, &out, &lse, HEADS, &lens, mask, &mut dqkv);
    });
    let width = HEADS.n_kv * HEADS.dim;
    let (k, v) = (normals(cpu, 8 * DOCUMENT * width), normals(cpu, 8 * DOCUMENT * width));
    let (q, mut y) = (normals(cpu, 8 * HEADS.out_width()), cpu.zeros(8 * HEADS.out_width()));
    let (flops, bytes) = (4 * 8 * DOCUMENT * HEADS.out_width(), 2 * F32 * 8 * DOCUMENT * width);
    session.product(cpu, "attention_decode, 8 sequences of 512", flops, bytes, || {
        let q = Mat::new(&q, 8, HEADS.out_width());
        let lens = [DOCUMENT; 8];
        cpu.attention_decode(q, &k, &v, DOCUMENT, &lens, HEADS, mask, &mut y);
    });
}

/// What works row by row or value by value.
fn rows(session: &mut Session, cpu: &Cpu) {
    let (x, w, dy) = (normals(cpu, T * D), normals(cpu, D), normals(cpu, T * D));
    let (mut y, mut r, mut dx) = (cpu.zeros(T * D), cpu.zeros(T), cpu.zeros(T * D));
    let norm = RmsNorm { eps: 1e-5, offset: 0.0 };
    let row = F32 * T * D;
    session.moves("rms_norm", 2 * row, || {
        cpu.rms_norm(&x, &w, norm, (T, D), &mut y, &mut r);
    });
    session.moves("rms_norm_backward", 4 * row, || {
        cpu.rms_norm_backward(&dy, &x, &w, norm, &r, (T, D), &mut dx, NormMore::dw(None));
    });
    let (mut gate_up, mut h) = (normals(cpu, T * 2 * I), normals(cpu, T * I));
    session.moves("swiglu", 3 * F32 * T * I, || cpu.swiglu(&gate_up, (T, I), &mut h));
    session.moves("swiglu_backward", 6 * F32 * T * I, || {
        cpu.swiglu_backward(&mut h, (T, I), &mut gate_up);
    });
    session.moves("add", 3 * row, || cpu.add(&x, &mut y, T * D));
    session.moves("copy", 2 * row, || cpu.copy(&x, &mut y, T * D));
    session.moves("dropout", 2 * row, || {
        cpu.dropout(Mat::new(&x, T, D), MatMut::new(&mut y, T, D), 0.1, 3);
    });
    let ids: Vec<u32> = (0..T as u64).map(|i| (rng::mix(1, i) % V as u64) as u32).collect();
    let mut embedding = normals(cpu, V * D);
    session.moves("gather_rows", 2 * row, || cpu.gather_rows(&embedding, &ids, D, &mut y));
    session.moves("scatter_add_rows", 3 * row, || {
        cpu.scatter_add_rows(&dy, &ids, D, &mut embedding);
    });
    let mut qkv = normals(cpu, T * HEADS.qkv_width());
    let positions: Vec<u32> = (0..T).map(|i| (i % DOCUMENT) as u32).collect();
    let cos_sin = normals(cpu, DOCUMENT * HEADS.dim);
    let rotated = T * (HEADS.n_q + HEADS.n_kv) * HEADS.dim;
    session.moves("rope", 2 * F32 * rotated, || {
        cpu.rope(&mut qkv, HEADS, HEADS.dim, &positions, &cos_sin, false);
    });
    let mut logits = normals(cpu, HEAD_ROWS * V);
    let (targets, weights) = (vec![3; HEAD_ROWS], vec![1.0; HEAD_ROWS]);
    session.moves("cross_entropy with its gradient, 256 rows", 2 * F32 * HEAD_ROWS * V, || {
        let logits = MatMut::new(&mut logits, HEAD_ROWS, V);
        cpu.cross_entropy(logits, &targets, &weights, Some(1.0), None);
    });
}

/// Update rules over thirty million values.
fn updates(session: &mut Session, cpu: &Cpu) {
    let n = N_PARAMS;
    let zeros = || -> [Buf; 3] { [n, n, n].map(|n| cpu.zeros(n)) };
    let ([mut p, mut m, mut v], g) = (zeros(), normals(cpu, n));
    let update = AdamW {
        lr: 1e-3,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.1,
        step: 3,
        grad_scale: 1.0,
    };
    session.moves("sum_squares", F32 * n, || {
        std::hint::black_box(cpu.sum_squares(&g));
    });
    session.moves("adamw", 7 * F32 * n, || cpu.adamw(&mut p, &g, 0, &mut m, &mut v, update));
    let (mut m, mut v) = (cpu.zero_codes(n), cpu.zero_codes(n));
    let [mut m_max, mut v_max] = [0, 1].map(|_| cpu.zeros(n.div_ceil(CODE_BLOCK)));
    session.moves("adamw_8bit", (3 * F32 + 4) * n, || {
        cpu.adamw_8bit(&mut p, &g, 0, [(&mut m, &mut m_max), (&mut v, &mut v_max)], update);
    });
}

fn main() -> std::io::Result<()> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../target/bench/operators");
    let limits = Ceilings::measure();
    let mut session = Session::new(root.clone());
    for compute in [Compute::Bf16, Compute::F32] {
        let cpu = Cpu::new().with_compute(compute);
        frozen(&mut session, &cpu);
        trained(&mut session, &cpu);
        attention(&mut session, &cpu);
    }
    let cpu = Cpu::new();
    rows(&mut session, &cpu);
    updates(&mut session, &cpu);
    session.criterion.final_summary();
    let table = session.table(limits);
    fs::write(root.join("operators.md"), &table)?;
    std::io::stdout().write_all(table.as_bytes())
}
