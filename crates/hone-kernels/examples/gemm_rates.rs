//! tmp
use hone_kernels::{Backend, Compute, Cpu, Mat, MatMut, Op};
use std::time::Instant;
fn main() {
    let cpu = Cpu::new().with_compute(Compute::Bf16);
    let time = |name: &str, flop: f64, f: &mut dyn FnMut()| {
        f();
        let mut best = f64::MAX;
        for _ in 0..7 {
            let t = Instant::now();
            f();
            best = best.min(t.elapsed().as_secs_f64());
        }
        println!("{name:<40} {:8.3} ms {:7.0} GFLOP/s", best * 1e3, flop / best / 1e9);
    };
    let data = |n: usize| -> Vec<f32> {
        (0..n as u64).map(|i| hone_kernels::rng::normal(7, i) as f32).collect()
    };
    for (t, k, n) in [(2048, 576, 960), (2048, 576, 576), (2048, 576, 3072), (2048, 1536, 576)] {
        let w = cpu.freeze(&data(n * k), n, k);
        let (x, mut y) = (cpu.upload(&data(t * k)), cpu.zeros(t * n));
        let mut dx = cpu.zeros(t * k);
        let flop = 2.0 * (t * k * n) as f64;
        time(&format!("linear {t} {k} {n}"), flop, &mut || {
            cpu.linear(Mat::new(&x, t, k), &w, MatMut::new(&mut y, t, n), 0.0)
        });
        time(&format!("linear_dx {t} {k} {n}"), flop, &mut || {
            cpu.linear_dx(Mat::new(&y, t, n), &w, MatMut::new(&mut dx, t, k), 0.0)
        });
        let wd = cpu.upload(&data(n * k));
        time(&format!("gemm x wt {t} {k} {n}"), flop, &mut || {
            cpu.gemm(
                Mat::new(&x, t, k),
                Op::N,
                Mat::new(&wd, n, k),
                Op::T,
                MatMut::new(&mut y, t, n),
                1.0,
                0.0,
            )
        });
        time(&format!("gemm dy w {t} {k} {n}"), flop, &mut || {
            cpu.gemm(
                Mat::new(&y, t, n),
                Op::N,
                Mat::new(&wd, n, k),
                Op::N,
                MatMut::new(&mut dx, t, k),
                1.0,
                0.0,
            )
        });
        let mut dw = cpu.zeros(n * k);
        time(&format!("gemm dyt x {t} {k} {n}"), flop, &mut || {
            cpu.gemm(
                Mat::new(&y, t, n),
                Op::T,
                Mat::new(&x, t, k),
                Op::N,
                MatMut::new(&mut dw, n, k),
                1.0,
                0.0,
            )
        });
        let r = 16;
        let a = cpu.upload(&data(r * k));
        let b = cpu.upload(&data(r * n));
        let (mut u, mut du, mut da, mut db) =
            (cpu.zeros(t * r), cpu.zeros(t * r), cpu.zeros(r * k), cpu.zeros(r * n));
        let flop = 2.0 * (t * k * r) as f64;
        time(&format!("u = x at {t} {k} {r}"), flop, &mut || {
            cpu.gemm(
                Mat::new(&x, t, k),
                Op::N,
                Mat::new(&a, r, k),
                Op::T,
                MatMut::new(&mut u, t, r),
                1.0,
                0.0,
            )
        });
        time(&format!("da = dut x {t} {k} {r}"), flop, &mut || {
            cpu.gemm(
                Mat::new(&u, t, r),
                Op::T,
                Mat::new(&x, t, k),
                Op::N,
                MatMut::new(&mut da, r, k),
                1.0,
                0.0,
            )
        });
        let flop = 2.0 * (t * n * r) as f64;
        time(&format!("du = dy b {t} {n} {r}"), flop, &mut || {
            cpu.gemm(
                Mat::new(&y, t, n),
                Op::N,
                Mat::new(&b, n, r),
                Op::N,
                MatMut::new(&mut du, t, r),
                1.0,
                0.0,
            )
        });
        time(&format!("db = dyt u {t} {n} {r}"), flop, &mut || {
            cpu.gemm(
                Mat::new(&y, t, n),
                Op::T,
                Mat::new(&u, t, r),
                Op::N,
                MatMut::new(&mut db, n, r),
                1.0,
                0.0,
            )
        });
    }
}
