//! Prints the milliseconds and rates of each operator at the shapes of two models: the tiny base
//! (hidden 128, 4 heads of 32, SwiGLU 320, vocabulary 2048) and SmolLM2-135M (hidden 576, 9 heads
//! of 64 over 3, SwiGLU 1536).
//!
//! `cargo run --release -p hone-kernels --example op_times`; `RAYON_NUM_THREADS` sets the threads.

use std::io::Write;
use std::time::Instant;

use hone_kernels::{
    AdamW, AttnMask, Backend, CODE_BLOCK, Cpu, Heads, LossOptions, Mat, MatMut, Op, RmsNorm, rng,
};

/// The shapes of a model and its batch.
struct Shape {
    name: &'static str,
    tokens: usize,
    window: usize,
    d: usize,
    heads: Heads,
    i: usize,
    v: usize,
    layers: usize,
}

/// The models timed.
const SHAPES: [Shape; 2] = [
    Shape {
        name: "tiny base",
        tokens: 2048,
        window: 128,
        d: 128,
        heads: Heads { n_q: 4, n_kv: 4, dim: 32 },
        i: 320,
        v: 2048,
        layers: 4,
    },
    Shape {
        name: "SmolLM2-135M",
        tokens: 1024,
        window: 512,
        d: 576,
        heads: Heads { n_q: 9, n_kv: 3, dim: 64 },
        i: 1536,
        v: 49_152,
        layers: 30,
    },
];

/// A buffer of normal values.
fn normals(cpu: &Cpu, n: usize) -> <Cpu as Backend>::Buf {
    cpu.upload(&(0..n as u64).map(|i| rng::normal(7, i) as f32).collect::<Vec<_>>())
}

/// A table of times: each operator's, and the sum of a step's.
struct Table {
    step_ms: f64,
}

impl Table {
    /// Times `f`, prints the best of several runs, and adds `count` of them to the step.
    fn row(&mut self, name: &str, count: usize, flops: usize, mut f: impl FnMut()) {
        f();
        let n_runs = 7;
        let best = (0..n_runs)
            .map(|_| {
                let start = Instant::now();
                f();
                start.elapsed().as_secs_f64()
            })
            .fold(f64::INFINITY, f64::min);
        self.step_ms += best * 1e3 * count as f64;
        let rate = flops as f64 / best / 1e9;
        let line = format!("{name:28} {:9.3} ms  x{count:<3} {rate:8.1} Gflop/s\n", best * 1e3);
        std::io::stdout().write_all(line.as_bytes()).expect("stdout is open");
    }
}

/// Times every product of a step: forward, input gradient and weight gradient.
fn products(cpu: &Cpu, s: &Shape, table: &mut Table) {
    let shapes = [
        ("qkv", s.heads.qkv_width(), s.d, s.layers),
        ("o", s.d, s.heads.out_width(), s.layers),
        ("gate_up", 2 * s.i, s.d, s.layers),
        ("down", s.d, s.i, s.layers),
        ("head", s.v, s.d, 1),
    ];
    let t = s.tokens;
    for (name, out, inp, count) in shapes {
        // The head of a large vocabulary runs in chunks of rows.
        let t = if name == "head" && s.v > 10_000 { t / 4 } else { t };
        let (x, w) = (normals(cpu, t * inp), normals(cpu, out * inp));
        let (mut y, mut dx, mut dw) =
            (cpu.zeros(t * out), cpu.zeros(t * inp), cpu.zeros(out * inp));
        let flops = 2 * t * out * inp;
        let (x_mat, w_mat) = (Mat::new(&x, t, inp), Mat::new(&w, out, inp));
        table.row(&format!("{name} forward"), count, flops, || {
            let y = MatMut::new(&mut y, t, out);
            cpu.gemm(x_mat, Op::N, w_mat, Op::T, y, 1.0, 0.0);
        });
        table.row(&format!("{name} dx"), count, flops, || {
            let dx = MatMut::new(&mut dx, t, inp);
            cpu.gemm(Mat::new(&y, t, out), Op::N, w_mat, Op::N, dx, 1.0, 0.0);
        });
        table.row(&format!("{name} dw"), count, flops, || {
            let dw = MatMut::new(&mut dw, out, inp);
            cpu.gemm(Mat::new(&y, t, out), Op::T, x_mat, Op::N, dw, 1.0, 1.0);
        });
    }
}

/// Times attention and positions.
fn attention(cpu: &Cpu, s: &Shape, table: &mut Table) {
    let (t, heads) = (s.tokens, s.heads);
    let lens = vec![s.window; t / s.window];
    let mut qkv = normals(cpu, t * heads.qkv_width());
    let dout = normals(cpu, t * heads.out_width());
    let (mut out, mut lse) = (cpu.zeros(t * heads.out_width()), cpu.zeros(t * heads.n_q));
    let mut dqkv = cpu.zeros(t * heads.qkv_width());
    let mask = AttnMask { window: None, scale: 1.0 / (heads.dim as f32).sqrt(), soft_cap: None };
    let flops = 2 * t * s.window * heads.out_width();
    table.row("attention", s.layers, flops, || {
        cpu.attention(&qkv, heads, &lens, mask, &mut out, &mut lse);
    });
    table.row("attention backward", s.layers, flops * 5 / 2, || {
        cpu.attention_backward(&dout, &qkv, &out, &lse, heads, &lens, mask, &mut dqkv);
    });
    let positions: Vec<u32> = (0..t).map(|i| (i % s.window) as u32).collect();
    let cos_sin = normals(cpu, s.window * heads.dim);
    table.row("rope", 2 * s.layers, 0, || {
        cpu.rope(&mut qkv, heads, heads.dim, &positions, &cos_sin, false);
    });
}

/// Times what works row by row or value by value.
fn rows(cpu: &Cpu, s: &Shape, table: &mut Table) {
    let (t, d, i) = (s.tokens, s.d, s.i);
    let (x, w, dy) = (normals(cpu, t * d), normals(cpu, d), normals(cpu, t * d));
    let (mut y, mut r, mut dx, mut dw) =
        (cpu.zeros(t * d), cpu.zeros(t), cpu.zeros(t * d), cpu.zeros(d));
    let norm = RmsNorm { eps: 1e-5, offset: 0.0 };
    table.row("rms_norm", 2 * s.layers + 1, 0, || {
        cpu.rms_norm(&x, &w, norm, (t, d), &mut y, &mut r);
    });
    table.row("rms_norm backward", 2 * s.layers + 1, 0, || {
        cpu.rms_norm_backward(&dy, &x, &w, norm, &r, (t, d), &mut dx, Some(&mut dw));
    });
    let (mut gate_up, mut h) = (normals(cpu, t * 2 * i), normals(cpu, t * i));
    table.row("swiglu", s.layers, 0, || cpu.swiglu(&gate_up, (t, i), &mut h));
    table.row("swiglu backward", s.layers, 0, || cpu.swiglu_backward(&h, (t, i), &mut gate_up));
    table.row("add", 2 * s.layers, 0, || cpu.add(&x, &mut y, t * d));
    table.row("copy", 2 * s.layers, 0, || cpu.copy(&x, &mut y, t * d));
    let ids: Vec<u32> = (0..t as u64).map(|i| (rng::mix(1, i) % 2048) as u32).collect();
    let mut embedding = normals(cpu, s.v * d);
    table.row("gather_rows", 1, 0, || cpu.gather_rows(&embedding, &ids, d, &mut y));
    table.row("scatter_add_rows", 1, 0, || cpu.scatter_add_rows(&dy, &ids, d, &mut embedding));
    table.row("dropout", 0, 0, || {
        cpu.dropout(Mat::new(&x, t, d), MatMut::new(&mut y, t, d), 0.1, 3);
    });
    let t = if s.v > 10_000 { t / 4 } else { t };
    let mut logits = normals(cpu, t * s.v);
    let (targets, weights) = (vec![3; t], vec![1.0; t]);
    table.row("cross_entropy", 1, 0, || {
        let logits = MatMut::new(&mut logits, t, s.v);
        cpu.cross_entropy(logits, &targets, &weights, Some(1.0), None);
    });
    let n = s.v * d + s.layers * (d * (s.heads.qkv_width() + s.heads.out_width() + 3 * i));
    let n = n.min(30_000_000);
    let (mut p, mut m, mut v) = (cpu.zeros(n), cpu.zeros(n), cpu.zeros(n));
    let g = normals(cpu, n);
    let update = AdamW {
        lr: 1e-3,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.1,
        step: 3,
        grad_scale: 1.0,
    };
    table.row("sum_squares", 1, 0, || {
        std::hint::black_box(cpu.sum_squares(&g));
    });
    table.row("adamw", 1, 0, || cpu.adamw(&mut p, &g, 0, &mut m, &mut v, update));
    let (mut m, mut v) = (cpu.zero_codes(n), cpu.zero_codes(n));
    let (mut m_max, mut v_max) =
        (cpu.zeros(n.div_ceil(CODE_BLOCK)), cpu.zeros(n.div_ceil(CODE_BLOCK)));
    table.row("adamw_8bit", 0, 0, || {
        cpu.adamw_8bit(&mut p, &g, 0, [(&mut m, &mut m_max), (&mut v, &mut v_max)], update);
    });
    let options = LossOptions { label_smoothing: 0.1, ..LossOptions::default() };
    for (name, options) in [
        ("cross_entropy, smoothed", options),
        ("cross_entropy, capped too", LossOptions { soft_cap: Some(30.0), ..options }),
    ] {
        table.row(name, 0, 0, || {
            let logits = MatMut::new(&mut logits, t, s.v);
            cpu.cross_entropy_with(logits, &targets, &weights, Some(1.0), None, options);
        });
    }
}

fn main() {
    let cpu = Cpu::new();
    let wanted = std::env::args().nth(1).unwrap_or_default();
    for shape in SHAPES.iter().filter(|s| s.name.contains(&wanted)) {
        let mut table = Table { step_ms: 0.0 };
        let title = format!("{}: {} tokens, {cpu:?}\n", shape.name, shape.tokens);
        std::io::stdout().write_all(title.as_bytes()).expect("stdout is open");
        products(&cpu, shape, &mut table);
        attention(&cpu, shape, &mut table);
        rows(&cpu, shape, &mut table);
        let rate = shape.tokens as f64 / table.step_ms * 1e3;
        let total = format!("a step of these: {:.1} ms, {rate:.0} tokens/s\n\n", table.step_ms);
        std::io::stdout().write_all(total.as_bytes()).expect("stdout is open");
    }
}
