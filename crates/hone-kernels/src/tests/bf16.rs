//! Products in bf16: every engine against the plain twin, at odd shapes and extremes; and what must
//! not change a byte.

use crate::conformance::{Case, all_cases, data, error};
use crate::quant::{QuantSpec, Quantized, ValueType};
use crate::{Backend, Compute, Cpu, Mat, MatMut, Op, Reference};

/// Unit of rounding of f32.
const UNIT: f64 = 1.0 / (1 << 24) as f64;

/// Least normal f32: what is smaller may be taken for zero.
const TINY: f64 = f32::MIN_POSITIVE as f64;

/// More than the largest of any number of normal values that a test draws.
const LARGEST: f64 = 10.0;

/// One product: sides (m, n, k), transposes, alpha and beta, columns left out on each side, and the
/// magnitudes of both factors.
struct Product {
    sides: (usize, usize, usize),
    ops: (Op, Op),
    factors: (f32, f32),
    gap: usize,
    sizes: (f32, f32),
}

impl Product {
    /// C, of factors made by `make` from what they hold.
    fn run<B: Backend>(&self, b: &B, make: impl Fn(f32) -> f32) -> Vec<f32> {
        let (m, n, k) = self.sides;
        let turn = |op, rows, cols| if op == Op::N { (rows, cols) } else { (cols, rows) };
        let ((ra, ca), (rb, cb)) = (turn(self.ops.0, m, k), turn(self.ops.1, k, n));
        let (gap, (alpha, beta)) = (self.gap, self.factors);
        let values =
            |seed, n, size| -> Vec<f32> { data(seed, n, size).into_iter().map(&make).collect() };
        let x = b.upload(&values(1, ra * (ca + 2 * gap), self.sizes.0));
        let y = b.upload(&values(2, rb * (cb + 2 * gap), self.sizes.1));
        // With beta = 0 the old values must not matter, whatever they are.
        let size = if beta == 0.0 { f32::NAN } else { 1.0 };
        let old = data(3, m * (n + 2 * gap), size);
        let mut z = b.upload(&old);
        b.gemm(
            Mat::columns(&x, ra, gap, ca, ca + 2 * gap),
            self.ops.0,
            Mat::columns(&y, rb, gap, cb, cb + 2 * gap),
            self.ops.1,
            MatMut::columns(&mut z, m, gap, n, n + 2 * gap),
            alpha,
            beta,
        );
        b.download(&z)
    }

    /// Checks every value of C of every engine against the bound of any order of summation:
    /// products of bf16 are exact, and k sums, a few for the runs, and those with alpha and beta are each
    /// rounded by a unit of what has been added up. A factor or a sum below the least normal number
    /// may vanish. Returns the largest share of the bound that was needed.
    fn check(&self) -> f64 {
        let plain = Reference.with_compute(Compute::Bf16);
        let wanted = self.run(&plain, |x| x);
        // The same with magnitudes of factors: how much was added up.
        let (k, (alpha, beta)) = (self.sides.2 as f64, self.factors);
        let size = Product { factors: (alpha.abs(), 0.0), ..*self };
        let sizes = size.run(&plain, f32::abs);
        let old = LARGEST * f64::from(beta.abs());
        let lost = TINY * (1.0 + k) * (1.0 + LARGEST * f64::from(self.sizes.0.max(self.sizes.1)));
        let width = self.sides.1 + 2 * self.gap;
        let is_inside = |i: usize| (self.gap..width - self.gap).contains(&(i % width));
        let mut worst = 0.0_f64;
        for cpu in Cpu::all_bf16() {
            let found = self.run(&cpu, |x| x);
            for (i, (&found, &wanted)) in found.iter().zip(&wanted).enumerate() {
                if found == wanted || (found.is_nan() && wanted.is_nan() && !is_inside(i)) {
                    continue;
                }
                let sum = f64::from(sizes[i]).abs() + old;
                let bound = if is_inside(i) { UNIT * (k + 8.0) * sum + lost } else { 0.0 };
                let off = (f64::from(found) - f64::from(wanted)).abs();
                assert!(off <= bound, "{cpu:?} {:?}: {found} for {wanted}, {off:e}", self.sides);
                worst = worst.max(off / bound);
            }
        }
        worst
    }
}

#[test]
fn products_are_sums_of_rounded_factors() {
    let sides = [
        (1, 1, 1),
        (1, 5, 3),
        (5, 1, 2),
        (3, 4, 0),
        (16, 48, 32),
        (17, 49, 33),
        (8, 16, 31),
        (9, 33, 64),
        (1, 300, 129),
        (129, 1, 64),
        (66, 130, 769),
        (7, 15, 1537),
        (17, 400, 800),
        (2048, 8, 40),
        (3, 1100, 70),
        (35, 100, 601),
        (100, 35, 601),
    ];
    let magnitudes = [(1.0, 1.0), (1e30, 1e-30), (1e-30, 1e-5), (1e-40, 1.0), (0.0, 1.0)];
    let (mut n, mut worst) = (0, 0.0_f64);
    for sides in sides {
        for ops in [(Op::N, Op::N), (Op::N, Op::T), (Op::T, Op::N), (Op::T, Op::T)] {
            for (factors, gap) in [((1.0, 0.0), 0), ((0.5, -2.0), 3)] {
                // The plain twin takes its time: large products at one magnitude only.
                let is_large = sides.0 * sides.1 * sides.2 > 1 << 18;
                for sizes in &magnitudes[..if is_large { 1 } else { magnitudes.len() }] {
                    let product = Product { sides, ops, factors, gap, sizes: *sizes };
                    worst = worst.max(product.check());
                    n += 1;
                }
            }
        }
    }
    assert_eq!(n, 8 * (12 * magnitudes.len() + 5));
    // Below the bound, and far enough above nothing to say that it was looked for.
    assert!(worst > 1e-3, "{worst:e}");
}

/// The value x 1 is x rounded: to nearest, ties to even, and what is no number stays so.
#[test]
fn factors_are_rounded_to_nearest_even() {
    let bits = |bits: u32| f32::from_bits(bits);
    let cases = [
        (1.0, 1.0),
        (-0.0, 0.0),
        (bits(0x3f80_7fff), bits(0x3f80_0000)),
        (bits(0x3f80_8000), bits(0x3f80_0000)),
        (bits(0x3f80_8001), bits(0x3f81_0000)),
        (bits(0x3f81_8000), bits(0x3f82_0000)),
        (bits(0xbf81_8000), bits(0xbf82_0000)),
        (bits(0x3fff_ffff), 2.0),
        (f32::MIN_POSITIVE, f32::MIN_POSITIVE),
        (f32::MAX, f32::INFINITY),
        (bits(0x7f7f_7fff), bits(0x7f7f_0000)),
        (f32::INFINITY, f32::INFINITY),
        (f32::NEG_INFINITY, f32::NEG_INFINITY),
        (f32::NAN, f32::NAN),
        // Its upper half is that of infinity.
        (bits(0x7f80_0001), f32::NAN),
    ];
    let same = |a: f32, b: f32| a == b || (a.is_nan() && b.is_nan());
    for (x, wanted) in cases {
        assert!(same(Compute::Bf16.round(x), wanted), "{x:e}");
        assert!(same(Compute::F32.round(x), x), "{x:e}");
        // In place 0 of a vector and in the last of its tail, as either factor.
        for (cpu, n) in Cpu::all_bf16().into_iter().flat_map(|cpu| [(cpu, 1), (cpu, 35)]) {
            let (column, one) = (cpu.upload(&vec![x; n]), cpu.upload(&[1.0]));
            let (column, one) = (Mat::new(&column, n, 1), Mat::new(&one, 1, 1));
            let (mut left, mut right) = (cpu.zeros(n), cpu.zeros(n));
            cpu.gemm(column, Op::N, one, Op::N, MatMut::new(&mut left, n, 1), 1.0, 0.0);
            cpu.gemm(one, Op::N, column, Op::T, MatMut::new(&mut right, 1, n), 1.0, 0.0);
            let found = left.iter().chain(right.iter());
            found.for_each(|&y| assert!(same(y, wanted), "{cpu:?}: {x:e} became {y:e}"));
            let frozen = cpu.freeze(&vec![x; n], n, 1);
            assert!(cpu.thaw(&frozen).iter().all(|&y| same(y, wanted)), "{cpu:?}: {x:e}");
        }
    }
}

/// A value that is no number, or infinite, spoils its row and its column and nothing else.
#[test]
fn what_is_no_number_stays_in_its_row() {
    let (m, n, k) = (21, 50, 37);
    for cpu in Cpu::all_bf16() {
        for (bad, at) in [(f32::NAN, 3), (f32::INFINITY, 20), (f32::NAN, 0)] {
            let mut x = data(1, m * k, 1.0);
            x[at * k + k - 1] = bad;
            let (x, w) = (cpu.upload(&x), cpu.upload(&data(2, n * k, 1.0)));
            let mut y = cpu.zeros(m * n);
            let (x, w) = (Mat::new(&x, m, k), Mat::new(&w, n, k));
            cpu.gemm(x, Op::N, w, Op::T, MatMut::new(&mut y, m, n), 1.0, 0.0);
            for (row, y) in y.chunks(n).enumerate() {
                assert!(y.iter().all(|y| y.is_finite() != (row == at)), "{cpu:?}: row {row}");
            }
        }
    }
}

/// The table of all operators: products against the plain twin that rounds, the others against
/// themselves in f32, byte by byte.
#[test]
fn nothing_but_products_is_rounded() {
    let mut faults = Vec::new();
    let (mut n_products, mut n_others) = (0, 0);
    let plain = Reference.with_compute(Compute::Bf16);
    for case in all_cases() {
        // What attention rounds has its own tests.
        if matches!(case, Case::Attention(..)) {
            continue;
        }
        let is_product = matches!(
            case,
            Case::Gemm(..) | Case::Linear(..) | Case::Tails(..) | Case::Linear4Bit(..)
        );
        // What is no product does not know the engines.
        let cpus = Cpu::all_bf16();
        let cpus = if is_product { &cpus[..] } else { &cpus[..1] };
        for &cpu in cpus {
            let found = case.run(&cpu);
            let wanted = if is_product { case.run(&plain) } else { case.run(&Cpu::new()) };
            for (found, wanted) in found.iter().zip(&wanted) {
                let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                let is_right = if is_product {
                    error(&found.values, &wanted.values) <= found.tolerance
                } else {
                    bits(&found.values) == bits(&wanted.values)
                };
                if !is_right {
                    faults.push(format!("{cpu:?} {case:?} {}", found.name));
                }
            }
            *(if is_product { &mut n_products } else { &mut n_others }) += 1;
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    assert!(n_products > 90 && n_others > 60, "{n_products}, {n_others}");
}

/// What a case computes, bit by bit, on a pool of so many threads.
fn bits(case: &Case, cpu: &Cpu, n_threads: usize) -> Vec<Vec<u32>> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
    let outputs = pool.install(|| case.run(cpu));
    outputs.iter().map(|o| o.values.iter().map(|x| x.to_bits()).collect()).collect()
}

#[test]
fn bytes_do_not_depend_on_the_number_of_threads() {
    // Large enough to be cut, along rows and along columns, and into several runs.
    let cases = [
        Case::Linear(600, 1152, 576),
        Case::Linear(8, 20_000, 128),
        Case::Linear(40, 50, 20_000),
        Case::Linear(150, 3000, 40),
        Case::Linear4Bit(40, 2000, 600),
        Case::Tails(600, 1157, 576, &[16, 4, 16]),
        Case::Tails(40, 50, 9000, &[8]),
        Case::Gemm((700, 500, 900), (Op::T, Op::N), (0.5, 1.0), 2),
        Case::Gemm((700, 500, 900), (Op::T, Op::T), (0.5, 0.0), 0),
    ];
    for cpu in Cpu::all_bf16() {
        for case in &cases {
            let one = bits(case, &cpu, 1);
            for n in [2, 8] {
                assert!(bits(case, &cpu, n) == one, "{cpu:?} {case:?} differs on {n} threads");
            }
        }
    }
}

/// With the machine's own instructions a row's bytes are the same alone and among others, so that
/// generating does not depend on what is generated beside it.
#[test]
fn a_row_alone_is_the_row_among_others() {
    with_instructions().iter().for_each(check_rows_alone);
}

/// Backends that compute in bf16, but for the last, which widens.
fn with_instructions() -> Vec<Cpu> {
    let mut cpus = Cpu::all_bf16();
    cpus.pop();
    cpus
}

/// Rows of products with weights of both kinds, and of products with what is packed as they are made.
fn check_rows_alone(cpu: &Cpu) {
    for (m, n, k) in [(40, 70, 33), (67, 100, 1800)] {
        for op in [Op::N, Op::T] {
            check_gemm_alone(cpu, (m, n, k), op);
        }
    }
    for (m, out, inp) in [(17, 70, 33), (37, 100, 1800), (600, 1152, 576), (21, 40, 4224)] {
        check_alone(cpu, &cpu.freeze(&data(1, out * inp, 1.0), out, inp), (m, out, inp));
    }
    for (m, out, inp) in [(17, 70, 33), (37, 100, 1824), (300, 1152, 576)] {
        let part = |seed, rows, values| {
            let spec = QuantSpec::qlora(values);
            Quantized::quantize(&data(seed, rows * inp, 1.0), spec).unwrap()
        };
        let parts = vec![part(1, out - 23, ValueType::F32), part(2, 23, ValueType::Bf16)];
        check_alone(cpu, &cpu.freeze_4bit(parts, inp), (m, out, inp));
        let rounded_twice = cpu.freeze_4bit(vec![part(1, out, ValueType::F16)], inp);
        check_alone(cpu, &rounded_twice, (m, out, inp));
    }
}

/// Some rows of a product with a factor that is not frozen are those of the product of all.
fn check_gemm_alone(cpu: &Cpu, (m, n, k): (usize, usize, usize), op: Op) {
    let (x, y) = (data(1, m * k, 1.0), cpu.upload(&data(2, n * k, 1.0)));
    let product = |i: usize, rows: usize| {
        let x = cpu.upload(&x[i * k..(i + rows) * k]);
        let mut z = cpu.zeros(rows * n);
        let y = if op == Op::N { Mat::new(&y, k, n) } else { Mat::new(&y, n, k) };
        cpu.gemm(Mat::new(&x, rows, k), Op::N, y, op, MatMut::new(&mut z, rows, n), 1.0, 0.0);
        cpu.download(&z)
    };
    let all = product(0, m);
    for (i, rows) in [(0, 1), (m - 1, 1), (3, 4), (5, 17), (0, 32), (1, 33)] {
        assert_eq!(product(i, rows), all[i * n..(i + rows) * n], "{cpu:?}: row {i}, {op:?}");
    }
}

/// A left factor that is already rounded, and may be read where it lies, makes the bytes of the same
/// values in f32; what lies between its rows does not matter.
#[test]
fn a_rounded_left_factor_is_read_where_it_lies() {
    let sides = [(16, 32), (32, 64), (48, 96), (96, 1600), (300, 800), (33, 64), (64, 70), (80, 0)];
    for cpu in with_instructions() {
        for ((m, k), gap) in sides.into_iter().flat_map(|sides| [(sides, 0), (sides, 3)]) {
            let (n, width) = (50, k + 2 * gap);
            let mut values = data(1, m * width, 1.0);
            for (i, x) in values.iter_mut().enumerate() {
                let is_inside = (gap..gap + k).contains(&(i % width));
                *x = if is_inside { Compute::Bf16.round(*x) } else { f32::NAN };
            }
            let mut rounded = cpu.zeros_rounded(m * width);
            cpu.write(&mut rounded, 0, &values);
            let weight = cpu.freeze(&data(2, n * k, 1.0), n, k);
            let [found, wanted] = [rounded, cpu.upload(&values)].map(|x| {
                let mut y = cpu.zeros(m * n);
                let x = Mat::columns(&x, m, gap, k, width);
                cpu.linear(x, &weight, MatMut::new(&mut y, m, n), 0.0);
                cpu.download(&y)
            });
            assert!(found == wanted, "{cpu:?}: {m} x {k}, {gap} left out");
            assert!(found.iter().all(|y| y.is_finite()));
        }
    }
}

/// Tiles that add in the order of vectors make the bytes of vectors, so that nothing is left out, or
/// added in another place than it is by vectors.
#[cfg(target_arch = "x86_64")]
#[test]
fn tiles_that_add_as_vectors_do_make_their_bytes() {
    let Some([vectors, tiles, others]) = Cpu::vectors_and_tiles() else { return };
    let larger = [
        Case::Linear(600, 1157, 576),
        Case::Linear(40, 50, 9000),
        Case::Linear4Bit(40, 300, 608),
        Case::Linear4Bit(8, 300, 4160),
        Case::Tails(150, 389, 576, &[16, 4, 16]),
        Case::Gemm((200, 500, 900), (Op::N, Op::N), (0.5, 1.0), 2),
        Case::Gemm((200, 500, 1600), (Op::T, Op::N), (0.5, 1.0), 0),
    ];
    // In another order they are others.
    assert!(bits(&larger[0], &others, 2) != bits(&larger[0], &vectors, 2));
    let mut n = 0;
    for case in all_cases().into_iter().chain(larger) {
        let is_product = matches!(
            case,
            Case::Gemm(..) | Case::Linear(..) | Case::Tails(..) | Case::Linear4Bit(..)
        );
        if is_product {
            assert!(bits(&case, &tiles, 2) == bits(&case, &vectors, 2), "{case:?}");
            n += 1;
        }
    }
    assert!(n > 40, "{n}");
}

/// Some rows of a product with a weight are those of the product of all, exact and rounded.
fn check_alone(cpu: &Cpu, weight: &crate::CpuFrozen, (m, out, inp): (usize, usize, usize)) {
    let x = data(2, m * inp, 1.0);
    let some =
        [(0, m), (0, 1), (1, 1), (m - 1, 1), (2, 2), (0, 3), (m - 4, 4), (0, 5), (1, 9), (0, 16)];
    for zeros in [Cpu::zeros, Cpu::zeros_rounded] {
        let product = |i: usize, n: usize| {
            let rows = cpu.upload(&x[i * inp..(i + n) * inp]);
            let mut y = zeros(cpu, n * out);
            cpu.linear(Mat::new(&rows, n, inp), weight, MatMut::new(&mut y, n, out), 0.0);
            cpu.download(&y)
        };
        let all = product(0, m);
        for (i, n) in some {
            assert_eq!(product(i, n), all[i * out..(i + n) * out], "rows {i} to {} of {m}", i + n);
        }
    }
}

/// A weight is rounded once: its values are bf16, and frozen again they are the same; a checkpoint
/// in bf16 loses nothing. 4 bits are dequantised and rounded.
#[test]
fn frozen_weights_are_bf16() {
    let (out, inp) = (37, 65);
    let weight = data(1, out * inp, 0.1);
    for cpu in Cpu::all_bf16() {
        let thawed = cpu.thaw(&cpu.freeze(&weight, out, inp));
        let rounded: Vec<f32> = weight.iter().map(|&x| Compute::Bf16.round(x)).collect();
        assert_eq!(thawed, rounded);
        assert_ne!(thawed, weight);
        assert_eq!(cpu.thaw(&cpu.freeze(&thawed, out, inp)), thawed);
        let spec = QuantSpec::qlora(ValueType::F32);
        let quantized = Quantized::quantize(&weight, spec).unwrap();
        let rounded: Vec<f32> =
            quantized.dequantize().into_iter().map(|x| Compute::Bf16.round(x)).collect();
        assert_eq!(cpu.thaw(&cpu.freeze_4bit(vec![quantized], inp)), rounded);
        // Exact products asked of the same weight, as an update rule may: nothing is rounded anew.
        let exact = cpu.with_compute(Compute::F32);
        let frozen = cpu.freeze(&weight, out, inp);
        assert_eq!((exact.compute(), exact.thaw(&frozen)), (Compute::F32, thawed));
    }
}
