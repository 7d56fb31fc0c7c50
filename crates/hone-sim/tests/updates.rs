//! The update rules on the GPU backend where the table has no case: weights that are aligned and weights that are not,
//! the bytes of the CPU, more values than one launch has threads.

#![cfg(not(no_simulator))]

use hone_kernels::conformance::data;
use hone_kernels::gpu::Gpu;
use hone_kernels::{Adafactor, AdamW, Backend, CODE_BLOCK, Cpu, Lion, SecondMoment, Sgd};
use hone_sim::{Schedule, Sim};

const ADAMW: AdamW = AdamW {
    lr: 1e-2,
    beta1: 0.9,
    beta2: 0.999,
    eps: 1e-8,
    weight_decay: 0.1,
    step: 3,
    grad_scale: 0.7,
};

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// A tensor of `n` values from `at` on, its gradient, and a moment that is not negative.
struct Tensors<B: Backend> {
    p: B::Buf,
    g: B::Buf,
    m: B::Buf,
    v: B::Buf,
    range: std::ops::Range<usize>,
}

impl<B: Backend> Tensors<B> {
    fn new(b: &B, at: usize, n: usize) -> Self {
        let placed = |values: Vec<f32>| {
            let mut all = vec![0.5; at + n + 2];
            all[at..at + n].copy_from_slice(&values);
            b.upload(&all)
        };
        let squares: Vec<f32> = data(4, n, 0.1).iter().map(|x| x * x).collect();
        Tensors {
            p: placed(data(1, n, 1.0)),
            g: placed(data(2, n, 0.3)),
            m: b.upload(&data(3, n, 0.1)),
            v: b.upload(&squares),
            range: at..at + n,
        }
    }

    /// The weights and the moments.
    fn found(self, b: &B) -> [Vec<f32>; 3] {
        let mut p = b.download(&self.p);
        let after = p.split_off(self.range.end);
        let before = p.drain(..self.range.start);
        assert!(after.iter().copied().chain(before).all(|x| x == 0.5), "values outside changed");
        [p, b.download(&self.m), b.download(&self.v)]
    }
}

/// Every rule once, on a tensor of `n` values from `at` on.
fn rules<B: Backend>(b: &B, at: usize, n: usize) -> Vec<(&'static str, [Vec<f32>; 3])> {
    let mut found = Vec::new();
    let mut rule = |name, step: &dyn Fn(&mut Tensors<B>)| {
        let mut t = Tensors::new(b, at, n);
        step(&mut t);
        found.push((name, t.found(b)));
    };
    rule("adamw", &|t| b.adamw(&mut t.p, &t.g, at, &mut t.m, &mut t.v, ADAMW));
    let lion = Lion { lr: 1e-2, beta1: 0.9, beta2: 0.99, weight_decay: 0.1, grad_scale: 0.7 };
    rule("lion", &|t| b.lion(&mut t.p, &t.g, at, &mut t.m, lion));
    let plain = Sgd {
        lr: 1e-2,
        momentum: 0.9,
        dampening: 0.2,
        nesterov: true,
        weight_decay: 0.1,
        first: false,
        grad_scale: 0.7,
    };
    rule("sgd", &|t| b.sgd(&mut t.p, &t.g, t.range.clone(), None, plain));
    rule("nesterov", &|t| b.sgd(&mut t.p, &t.g, t.range.clone(), Some(&mut t.m), plain));
    rule("8 bits", &|t| {
        let max = n.div_ceil(CODE_BLOCK);
        let (mut m, mut v) = (b.zero_codes(n), b.zero_codes(n));
        let (mut m_max, mut v_max) = (b.upload(&data(5, max, 0.1)), b.zeros(max));
        b.write_codes(&mut m, &(0..n).map(|i| (i * 37 % 256) as u8).collect::<Vec<_>>());
        b.adamw_8bit(&mut t.p, &t.g, at, [(&mut m, &mut m_max), (&mut v, &mut v_max)], ADAMW);
        t.m = b.upload(&b.read_codes(&m).into_iter().map(f32::from).collect::<Vec<_>>());
        t.v = b.upload(&b.read_codes(&v).into_iter().map(f32::from).collect::<Vec<_>>());
    });
    found
}

/// The CPU's bytes, however the tensor is aligned.
#[test]
fn bytes_are_those_of_the_cpu_wherever_a_tensor_lies() {
    for n in [1, 3, 4, 255, 256, 1027, 5000] {
        let wanted = rules(&Cpu::new(), 1, n);
        for (at, schedule) in
            [(0, Schedule::Forward), (3, Schedule::Backward), (8, Schedule::Shuffled(1))]
        {
            let found = rules(&Gpu::new(Sim::new(schedule)), at, n);
            assert_eq!(found.len(), 5);
            for ((name, found), (_, wanted)) in found.iter().zip(&wanted) {
                for (i, (found, wanted)) in found.iter().zip(wanted).enumerate() {
                    assert!(bits(found) == bits(wanted), "{name} of {n} at {at}: output {i}");
                }
            }
        }
    }
}

/// Adafactor and sums of squares do not know where a tensor lies either.
#[test]
fn sums_do_not_know_where_a_tensor_lies() {
    let gpu = Gpu::new(Sim::new(Schedule::Shuffled(9)));
    for (rows, cols) in [(3, 5000), (700, 7), (1, 1), (90, 64)] {
        let n = rows * cols;
        let run = |at| {
            let mut t = Tensors::new(&gpu, at, n);
            let sum = gpu.sum_squares_part(&t.g, t.range.clone());
            let exact: f64 = data(2, n, 0.3).iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            assert!((sum / exact - 1.0).abs() < 1e-13, "{sum} for {exact}");
            let update = Adafactor {
                lr: 1e-2,
                beta2: 0.8,
                beta1: 0.9,
                eps: 1e-30,
                scale_min: Some(1e-3),
                clip_threshold: 1.0,
                weight_decay: 0.1,
                grad_scale: 0.7,
            };
            let (mut row, mut col) = (gpu.zeros(rows), gpu.zeros(cols));
            let second = SecondMoment::Factored(&mut row, &mut col);
            gpu.adafactor(&mut t.p, &t.g, at, second, Some(&mut t.m), update);
            let factors = [bits(&gpu.download(&row)), bits(&gpu.download(&col))];
            (sum.to_bits(), factors, t.found(&gpu).map(|values| bits(&values)))
        };
        let first = run(0);
        assert!([1, 4].into_iter().all(|at| run(at) == first), "({rows}, {cols})");
    }
}

/// More values than the threads of one launch take at once: they go on.
#[test]
fn what_is_larger_than_a_launch_is_done_whole() {
    let (gpu, cpu, n) = (Gpu::new(Sim::new(Schedule::Forward)), Cpu::new(), 4_300_001);
    let value = |i: usize| (i % 1009) as f32 * 1e-3 - 0.5;
    let values: Vec<f32> = (0..n).map(value).collect();
    let exact: f64 = values.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    let sum = gpu.sum_squares(&gpu.upload(&values));
    // What is exact here is a sum in one go, off by more than the pieces' are.
    assert!((sum / exact - 1.0).abs() < 1e-11, "{sum} for {exact}");

    fn step<B: Backend>(b: &B, values: &[f32]) -> (Vec<f32>, [Vec<u8>; 2], Vec<f32>) {
        let (n, max) = (values.len(), values.len().div_ceil(CODE_BLOCK));
        let (mut p, g) = (b.upload(values), b.upload(values));
        let (mut m, mut v) = (b.zero_codes(n), b.zero_codes(n));
        let (mut m_max, mut v_max) = (b.zeros(max), b.zeros(max));
        b.adamw_8bit(&mut p, &g, 0, [(&mut m, &mut m_max), (&mut v, &mut v_max)], ADAMW);
        (b.download(&p), [b.read_codes(&m), b.read_codes(&v)], b.download(&m_max))
    }
    let (found, wanted) = (step(&gpu, &values), step(&cpu, &values));
    assert!(bits(&found.0) == bits(&wanted.0) && found.1 == wanted.1);
    assert!(bits(&found.2) == bits(&wanted.2));
}
