//! Every case of the conformance table, and rounded buffers.

use std::collections::BTreeMap;

use hone_kernels::conformance::rounded::{self, Found, KINDS, SHAPES};
use hone_kernels::conformance::{Case, Output, all_cases, error};
use hone_kernels::gpu::Gpu;
use hone_kernels::gpu::cuda::Cuda;
use hone_kernels::{Backend, Compute, Reference};

use crate::Check;

/// Runs them all, in f32 and in bf16.
pub(crate) fn run(gpu: &Gpu<Cuda>) -> Vec<Check> {
    let mut checks = table(gpu);
    checks.push(rounds(&gpu.with_compute(Compute::Bf16)));
    checks.push(near(&gpu.with_compute(Compute::Bf16)));
    checks
}

/// What became of the cases of one kind.
#[derive(Default)]
struct Kind {
    n: usize,
    /// The largest error, in parts of the one that is allowed.
    worst: f32,
    faults: Vec<String>,
}

/// Each case twice: within its tolerance of the plain twin, and with the same bytes both times.
fn table(gpu: &Gpu<Cuda>) -> Vec<Check> {
    let mut kinds: BTreeMap<String, Kind> = BTreeMap::new();
    for case in all_cases() {
        let name = format!("{case:?}").split('(').next().unwrap_or("").to_owned();
        let kind = kinds.entry(name).or_default();
        kind.n += 1;
        try_case(gpu, &case, kind);
    }
    let check = |(name, kind): (String, Kind)| Check {
        passed: kind.faults.is_empty(),
        found: match kind.faults.first() {
            None => format!("{} cases, at most {:.2} of what is allowed", kind.n, kind.worst),
            Some(fault) => format!("{} of {} cases: {fault}", kind.faults.len(), kind.n),
        },
        name,
    };
    kinds.into_iter().map(check).collect()
}

fn try_case(gpu: &Gpu<Cuda>, case: &Case, kind: &mut Kind) {
    let want = case.run(&Reference);
    let (found, again) = (case.run(gpu), case.run(gpu));
    if let Some(fault) = gpu.take_fault() {
        kind.faults.push(format!("{case:?}: {fault}"));
        return;
    }
    let outputs = found.iter().zip(&again).zip(&want);
    for ((Output { name, values, tolerance }, again), want) in outputs {
        let error = error(values, &want.values);
        if error > *tolerance {
            kind.faults.push(format!("{case:?} {name}: {error:e} > {tolerance:e}"));
        } else if *tolerance > 0.0 && tolerance.is_finite() {
            kind.worst = kind.worst.max(error / tolerance);
        }
        let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        if bits(values) != bits(&again.values) {
            kind.faults.push(format!("{case:?} {name}: other bytes the second time"));
        }
    }
}

/// What is written to rounded buffers is what is written to buffers of f32, rounded. Products are left out: a library may
/// take another algorithm for another type.
fn rounds(gpu: &Gpu<Cuda>) -> Check {
    let (mut n, mut faults) = (0, Vec::new());
    for shape in SHAPES {
        let exact = rounded::all(gpu, shape, (false, false));
        for kinds in KINDS {
            let found = rounded::all(gpu, shape, kinds);
            for (Found(name, found, rounds), Found(_, exact, _)) in found.iter().zip(&exact) {
                if matches!(*name, "c" | "y" | "dx") {
                    continue;
                }
                n += found.len();
                let wanted = |x: f32| if *rounds { Compute::Bf16.round(x) } else { x };
                let differs = |(&a, &b): (&f32, &f32)| {
                    let b = wanted(b);
                    a.to_bits() != b.to_bits() && !(a.is_nan() && b.is_nan())
                };
                let n_apart = found.iter().zip(exact).filter(|pair| differs(*pair)).count();
                if n_apart > 0 {
                    faults.push(format!("{shape:?} {kinds:?} {name}: {n_apart} values differ"));
                }
            }
        }
    }
    let passed = faults.is_empty();
    let found = faults.first().cloned().unwrap_or_else(|| format!("{n} values"));
    Check { name: "rounded buffers".to_owned(), passed, found }
}

/// In bf16, near the plain twin: a unit where sums lie on either side of a tie.
fn near(gpu: &Gpu<Cuda>) -> Check {
    let plain = Reference.with_compute(Compute::Bf16);
    let (mut n, mut n_apart, mut faults) = (0, 0, Vec::new());
    for shape in SHAPES.into_iter().filter(|shape| shape.size == 1.0) {
        let wanted = rounded::all(&plain, shape, (true, true));
        let found = rounded::all(gpu, shape, (true, true));
        for (Found(name, found, rounds), Found(_, wanted, _)) in found.iter().zip(&wanted) {
            let top = wanted.iter().fold(1.0_f32, |top, x| top.max(x.abs()));
            for (&found, &wanted) in found.iter().zip(wanted) {
                let unit = if *rounds { wanted.abs() / 128.0 } else { 0.0 };
                let off = (found - wanted).abs();
                // What is not a number is not within it.
                if !(off <= unit + 3e-6 * top) {
                    faults.push(format!("{shape:?} {name}: {found} for {wanted}"));
                }
                n += 1;
                n_apart += usize::from(*rounds && found != wanted);
            }
        }
    }
    let passed = faults.is_empty();
    let found = faults.first().cloned();
    let found = found.unwrap_or_else(|| format!("{n_apart} of {n} values differ by a unit"));
    Check { name: "bf16 beside the plain twin".to_owned(), passed, found }
}
