//! Weights of four bits on the GPU backend: what they are dequantised to, bit by bit, and their products with few
//! rows.

#![cfg(not(no_simulator))]

use hone_kernels::conformance::{data, error};
use hone_kernels::gpu::Gpu;
use hone_kernels::quant::{
    BLOCKS, CodeBook, NestedScales, QuantSpec, Quantized, Scales, ValueType,
};
use hone_kernels::{Backend, Compute, Mat, MatMut, Onto, Op, Reference, Tail};
use hone_sim::{Schedule, Sim};

fn gpu(schedule: Schedule, compute: Compute) -> Gpu<Sim> {
    Gpu::new(Sim::new(schedule)).with_compute(compute)
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Parts of these rows, `inp` wide.
fn parts(spec: QuantSpec, rows: &[usize], inp: usize, scale: f32) -> Vec<Quantized> {
    let part = |(seed, rows): (usize, &usize)| {
        Quantized::quantize(&data(seed as u64, rows * inp, scale), spec).unwrap()
    };
    rows.iter().enumerate().map(part).collect()
}

/// The same part with another map of its scales' codes, as a file may have it, so that nothing that a kernel before has
/// left behind is right.
fn mapped(part: Quantized, factor: f32) -> Quantized {
    let Scales::Nested(nested) = part.scales().clone() else { return part };
    let map = nested.map.iter().map(|x| x * factor).collect();
    let scales = Scales::Nested(NestedScales { map, ..nested });
    Quantized::from_parts(part.spec(), part.len(), part.codes().to_vec(), scales).unwrap()
}

/// All values, and those of some rows, are those of the plain twin.
fn check_values(gpu: &Gpu<Sim>, parts: &[Quantized], inp: usize, what: &str) {
    let wanted = Reference.with_compute(gpu.compute());
    let wanted = wanted.thaw(&wanted.freeze_4bit(parts.to_vec(), inp));
    let frozen = gpu.freeze_4bit(parts.to_vec(), inp);
    assert!(bits(&gpu.thaw(&frozen)) == bits(&wanted), "{what}: thaw");
    let out = wanted.len() / inp;
    let ids = [0, out / 2, out - 1, out / 3, 0].map(|id| id as u32);
    for rounds in [false, true] {
        let n = ids.len() * inp;
        let mut y = if rounds { gpu.zeros_rounded(n) } else { gpu.zeros(n) };
        gpu.gather_frozen(&frozen, &ids, &mut y);
        let rows = ids.iter().flat_map(|&id| &wanted[id as usize * inp..][..inp]).copied();
        assert!(bits(&gpu.download(&y)) == bits(&rows.collect::<Vec<_>>()), "{what}: rows");
    }
    let n_bytes: usize = parts.iter().map(|part| part.spec().n_bytes(part.len())).sum();
    assert_eq!(gpu.frozen_bytes(&frozen), n_bytes as u64);
}

/// Book, block, double quantisation, type of the values, arithmetic, odd widths, magnitude: 1e-7 lies below the
/// normal values of half precision, and 1e5 beyond its largest.
#[test]
fn values_are_those_of_the_plain_twin() {
    let shapes = [(&[1][..], 1), (&[3, 1], 33), (&[5, 2, 7], 8), (&[70, 3], 129), (&[9], 4096)];
    let types = [ValueType::F32, ValueType::Bf16, ValueType::F16];
    let mut n = 0;
    for book in [CodeBook::Nf4, CodeBook::Fp4] {
        for block in BLOCKS {
            for nested in [false, true] {
                for values in types {
                    for (i, (rows, inp)) in shapes.into_iter().enumerate() {
                        let spec = QuantSpec { book, block, nested, values };
                        let scale = [0.02, 1.0, 1e-7, 1e5, 0.0][(n + i) % 5];
                        for compute in [Compute::F32, Compute::Bf16] {
                            let schedule = Schedule::Shuffled(n as u16);
                            let what = format!("{spec:?} {compute:?} {rows:?} {inp} {scale}");
                            let factor = 1.0 - (n % 7) as f32 / 20.0;
                            let parts = parts(spec, rows, inp, scale).into_iter();
                            let parts: Vec<_> = parts.map(|part| mapped(part, factor)).collect();
                            check_values(&gpu(schedule, compute), &parts, inp, &what);
                        }
                        n += 1;
                    }
                    // So that a shape meets every magnitude.
                    n += 1;
                }
            }
        }
    }
    assert_eq!(n, 2 * 8 * 2 * 3 * (5 + 1));
}

/// More values than the threads of one launch take at once, and a weight that follows a larger one into the same
/// memory.
#[test]
fn a_large_weight_is_dequantised_in_turns() {
    let gpu = gpu(Schedule::Forward, Compute::Bf16);
    let spec = QuantSpec::qlora(ValueType::Bf16);
    check_values(&gpu, &parts(spec, &[1100], 4096, 0.02), 4096, "large");
    check_values(&gpu, &parts(spec, &[3], 40, 0.02), 40, "small behind it");
}

/// A product of `t` rows of x, of these kinds, with what it is added to; x and y lie in wider rows.
struct Product {
    t: usize,
    beta: f32,
    gap: usize,
    rounds: (bool, bool),
}

fn buf(gpu: &Gpu<Sim>, rounds: bool, values: &[f32]) -> <Gpu<Sim> as Backend>::Buf {
    let mut buf = if rounds { gpu.zeros_rounded(values.len()) } else { gpu.zeros(values.len()) };
    gpu.write(&mut buf, 0, values);
    buf
}

impl Product {
    fn run(
        &self,
        gpu: &Gpu<Sim>,
        w: &<Gpu<Sim> as Backend>::Frozen,
        (out, inp): (usize, usize),
    ) -> Vec<f32> {
        let Product { t, beta, gap, rounds } = *self;
        let x = buf(gpu, rounds.0, &data(7, t * (inp + gap), 1.0));
        // With beta = 0 the old values must not matter.
        let n = t * (out + gap);
        let old = if beta == 0.0 { vec![f32::NAN; n] } else { data(8, n, 1.0) };
        let mut y = buf(gpu, rounds.1, &old);
        let (u, v) = (gpu.upload(&data(9, t * 2, 1.0)), gpu.upload(&data(10, out * 2, 1.0)));
        let (u, v) = (Mat::new(&u, t, 2), Mat::new(&v, out, 2));
        let tail = Tail { u, v, op_v: Op::T, column: 0, scale: 0.5 };
        let x = Mat::columns(&x, t, gap, inp, inp + gap);
        let to = MatMut::columns(&mut y, t, gap, out, out + gap);
        gpu.linear_with(x, w, &[tail], to, Onto::Old(beta));
        let mut found = gpu.download(&y);
        // What lies between the rows stays.
        for (row, old) in found.chunks_mut(out + gap).zip(old.chunks(out + gap)) {
            for (x, &old) in row[..gap].iter_mut().zip(&old[..gap]) {
                let old = if rounds.1 { gpu.compute().round(old) } else { old };
                assert!(*x == old || (x.is_nan() && old.is_nan()), "a value outside changed");
                *x = 0.0;
            }
        }
        let onto = gpu.upload(&data(11, t * out, 1.0));
        let mut sum = buf(gpu, false, &vec![f32::NAN; t * out]);
        gpu.linear_with(x, w, &[], MatMut::new(&mut sum, t, out), Onto::Buf(&onto));
        found.extend(gpu.download(&sum));
        found
    }
}

/// Products with codes as they are, against those of the same values frozen in full, under every schedule.
#[test]
fn products_of_few_rows_are_those_of_the_dequantised_weight() {
    let shapes = [(&[1][..], 1), (&[5, 2, 7], 33), (&[9, 20], 256), (&[70, 3], 1000), (&[3], 4096)];
    let mut n = 0;
    for (rows, inp) in shapes {
        for compute in [Compute::F32, Compute::Bf16] {
            for t in 1..=5 {
                let schedules = [Schedule::Forward, Schedule::Backward, Schedule::Shuffled(3)];
                let spec = QuantSpec::qlora(ValueType::F16);
                let spec = if t % 2 == 0 { spec } else { QuantSpec { nested: false, ..spec } };
                let (parts, out) = (parts(spec, rows, inp, 0.1), rows.iter().sum());
                for (i, gap) in [0, 8, 3].into_iter().enumerate() {
                    let rounds = [(false, false), (true, false), (true, true)][(i + t) % 3];
                    let product = Product { t, beta: [0.0, 0.5][t % 2], gap, rounds };
                    let found = schedules.map(|schedule| {
                        let gpu = gpu(schedule, compute);
                        product.run(&gpu, &gpu.freeze_4bit(parts.clone(), inp), (out, inp))
                    });
                    assert!(found.iter().all(|other| bits(other) == bits(&found[0])));
                    let gpu = gpu(Schedule::Forward, compute);
                    let full =
                        gpu.freeze(&gpu.thaw(&gpu.freeze_4bit(parts.clone(), inp)), out, inp);
                    let wanted = product.run(&gpu, &full, (out, inp));
                    let off = error(&found[0], &wanted);
                    let unit =
                        if rounds.1 && compute == Compute::Bf16 { 1.0 / 128.0 } else { 1e-6 };
                    assert!(
                        off <= unit,
                        "{rows:?} {inp} {compute:?} {t} {gap} {rounds:?}: {off:e}"
                    );
                    n += 1;
                }
            }
        }
    }
    assert_eq!(n, 5 * 2 * 5 * 3);
}
