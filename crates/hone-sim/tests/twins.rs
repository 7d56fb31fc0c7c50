//! Every operator of the GPU backend, its kernels run on the CPU, against the plain twin.

#![cfg(not(no_simulator))]

use std::collections::BTreeMap;

use hone_kernels::conformance::rounded::{self, Found, KINDS, SHAPES};
use hone_kernels::conformance::{Case, Output, all_cases, error};
use hone_kernels::gpu::Gpu;
use hone_kernels::{Backend, Compute, Reference};
use hone_sim::{Schedule, Sim};

const SCHEDULES: [Schedule; 3] = [Schedule::Forward, Schedule::Backward, Schedule::Shuffled(7)];

/// The kind of a case: the name of its variant.
fn kind(case: &Case) -> String {
    format!("{case:?}").split('(').next().unwrap_or("").to_owned()
}

/// Runs all cases of these kinds under every schedule; there must be `n` of them.
fn check(kinds: &[&str], n: usize) {
    let cases: Vec<Case> =
        all_cases().into_iter().filter(|case| kinds.contains(&&*kind(case))).collect();
    assert_eq!(cases.len(), n, "cases of {kinds:?}");
    let (mut worst, mut faults) = (BTreeMap::new(), Vec::new());
    for case in cases {
        let want = case.run(&Reference);
        let mut first: Option<Vec<Output>> = None;
        for schedule in SCHEDULES {
            let found = case.run(&Gpu::new(Sim::new(schedule)));
            for (Output { name, values, tolerance }, want) in found.iter().zip(&want) {
                let error = error(values, &want.values);
                if error > *tolerance {
                    faults.push(format!("{schedule:?} {case:?} {name}: {error:e} > {tolerance:e}"));
                }
                let entry = worst.entry((kind(&case), *name)).or_insert(0.0_f32);
                *entry = entry.max(error);
            }
            // The bytes do not depend on the order of threads.
            let bits = |o: &Output| o.values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            if let Some(first) = &first {
                for (a, b) in first.iter().zip(&found) {
                    assert!(bits(a) == bits(b), "{schedule:?} {case:?}: other bytes of {}", a.name);
                }
            }
            first.get_or_insert(found);
        }
    }
    assert!(faults.is_empty(), "{}\n{worst:#?}", faults.join("\n"));
}

#[test]
fn products() {
    check(&["Gemm", "Linear", "Tails"], 101);
}

#[test]
fn products_with_weights_of_four_bits() {
    check(&["Linear4Bit"], 4);
}

#[test]
fn pointwise() {
    check(&["Pointwise", "Dropout", "SoftCap", "Noise"], 31);
}

#[test]
fn rows_and_columns() {
    check(&["Rows", "Adapter"], 9);
}

#[test]
fn norms() {
    check(&["Norm", "GroupNorm"], 40);
}

#[test]
fn positions() {
    check(&["Rope"], 6);
}

#[test]
fn gated_activations() {
    check(&["Swiglu", "Geglu"], 30);
}

#[test]
fn attention() {
    check(&["Attention"], 88);
}

#[test]
fn decoding() {
    check(&["Decode"], 36);
}

#[test]
fn losses() {
    check(&["CrossEntropy", "Loss"], 75);
}

#[test]
fn updates() {
    check(&["Update", "Rules"], 34);
}

fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
}

/// What each operator writes to rounded buffers is what it writes to buffers of f32, rounded.
#[test]
fn what_is_written_is_rounded_and_nothing_else_changes() {
    let gpu = Gpu::new(Sim::new(Schedule::Forward)).with_compute(Compute::Bf16);
    let mut n_rounded = 0;
    for shape in SHAPES {
        let exact = rounded::all(&gpu, shape, (false, false));
        for kinds in KINDS {
            let found = rounded::all(&gpu, shape, kinds);
            assert_eq!(found.len(), exact.len());
            for (Found(name, found, rounds), Found(_, exact, _)) in found.iter().zip(&exact) {
                assert_eq!(found.len(), exact.len());
                for (i, (&found, &exact)) in found.iter().zip(exact).enumerate() {
                    let wanted = if *rounds { Compute::Bf16.round(exact) } else { exact };
                    let what = format!("{shape:?} {kinds:?} {name}[{i}]");
                    assert!(same(found, wanted), "{what}: {found:e} for {wanted:e}");
                    n_rounded += usize::from(wanted != exact);
                }
            }
        }
    }
    assert!(n_rounded > 100_000, "{n_rounded} values were rounded");
}

/// In bf16 the twins differ where sums of f32 and of f64 lie on either side of a tie: by a unit, in few
/// places.
#[test]
fn rounded_buffers_are_those_of_the_plain_twin() {
    let gpu = Gpu::new(Sim::new(Schedule::Backward)).with_compute(Compute::Bf16);
    let (plain, mut n, mut n_apart) = (Reference.with_compute(Compute::Bf16), 0, 0);
    for shape in SHAPES.into_iter().filter(|shape| shape.size == 1.0) {
        let wanted = rounded::all(&plain, shape, (true, true));
        let found = rounded::all(&gpu, shape, (true, true));
        for (Found(name, found, rounds), Found(_, wanted, _)) in found.iter().zip(&wanted) {
            let top = wanted.iter().fold(1.0_f32, |top, x| top.max(x.abs()));
            for (&found, &wanted) in found.iter().zip(wanted) {
                let unit = if *rounds { wanted.abs() / 128.0 } else { 0.0 };
                let off = (found - wanted).abs();
                assert!(off <= unit + 3e-6 * top, "{shape:?} {name}: {off:e}");
                n += usize::from(*rounds);
                n_apart += usize::from(*rounds && found != wanted);
            }
        }
    }
    assert!(n > 10_000 && n_apart * 500 < n, "{n_apart} of {n} values differ");
}
