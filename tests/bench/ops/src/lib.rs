//! What this machine can do at best, as the share of it that hone's own operators reach is told by `benches/operators.rs` and by
//! `tests/bench/bench.py`.

mod products;

use std::hint::black_box;
use std::time::Instant;

use hone_kernels::{Backend, Compute, Cpu, Mat, MatMut, rng};
pub use products::products;
use rayon::prelude::*;

/// Tokens, inputs and outputs of the large product; those of `peers/torch_gemm.py`.
const LARGE: [usize; 3] = [2048, 4096, 4096];

/// Values of the buffer that is read: past any cache.
const N_READ: usize = 1 << 28;

/// How long each ceiling is measured, in seconds.
const SECONDS: f64 = 2.0;

/// Rates that no operator exceeds by much: medians of two seconds of runs each.
#[derive(Clone, Copy, Debug)]
pub struct Ceilings {
    /// A large product with a frozen weight in bf16, GFLOP/s.
    pub gemm_bf16: f64,
    /// The same in f32, GFLOP/s.
    pub gemm_f32: f64,
    /// Memory read in order by all threads, GB/s.
    pub read: f64,
}

impl Ceilings {
    /// Measures them on the threads of rayon's pool.
    pub fn measure() -> Self {
        let values: Vec<f32> = vec![1.0; N_READ];
        let bytes = 4.0 * N_READ as f64;
        let read = bytes / median_seconds(|| sum(&values)) / 1e9;
        Ceilings { gemm_bf16: gemm(Compute::Bf16), gemm_f32: gemm(Compute::F32), read }
    }

    /// The product's ceiling in this arithmetic.
    pub fn gemm(&self, compute: Compute) -> f64 {
        if compute == Compute::Bf16 { self.gemm_bf16 } else { self.gemm_f32 }
    }
}

/// Normal values.
pub fn normals(cpu: &Cpu, n: usize) -> <Cpu as Backend>::Buf {
    let value = |i: u64| rng::normal(7, i) as f32;
    cpu.upload(&(0..n as u64).into_par_iter().map(value).collect::<Vec<_>>())
}

/// The sum of values, in lanes that the compiler keeps in vector registers.
fn sum(values: &[f32]) {
    let part = |part: &[f32]| {
        let mut lanes = [0.0f32; 64];
        for chunk in part.chunks_exact(64) {
            for (lane, value) in lanes.iter_mut().zip(chunk) {
                *lane += value;
            }
        }
        lanes.iter().sum::<f32>()
    };
    black_box(values.par_chunks(1 << 16).map(part).sum::<f32>());
}

fn gemm(compute: Compute) -> f64 {
    let cpu = Cpu::new().with_compute(compute);
    let [t, inp, out] = LARGE;
    let x = normals(&cpu, t * inp);
    let weight = cpu.freeze(&cpu.download(&normals(&cpu, out * inp)), out, inp);
    let mut y = cpu.zeros(t * out);
    let seconds = median_seconds(|| {
        cpu.linear(Mat::new(&x, t, inp), &weight, MatMut::new(&mut y, t, out), 0.0);
    });
    2.0 * (t * inp * out) as f64 / seconds / 1e9
}

/// [`median_of`] as long as each ceiling is measured.
fn median_seconds(run: impl FnMut()) -> f64 {
    median_of(SECONDS, run)
}

/// Median of at least five runs and of so many seconds of them, after one that is not counted.
fn median_of(at_least: f64, mut run: impl FnMut()) -> f64 {
    run();
    let begun = Instant::now();
    let mut seconds = Vec::new();
    while seconds.len() < 5 || begun.elapsed().as_secs_f64() < at_least {
        let begun = Instant::now();
        run();
        seconds.push(begun.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}
