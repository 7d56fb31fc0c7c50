//! Norms at shapes that the table of all operators has not: groups that a whole block has, groups longer than
//! what a block keeps in registers, and more groups than sums of the weight's gradient.

use hone_kernels::conformance::{Case, data, error};
use hone_kernels::gpu::Gpu;
use hone_kernels::{Backend, Compute, MatMut, NormMore, Reference, RmsNorm};
use hone_sim::{Schedule, Sim};

const NORM: RmsNorm = RmsNorm { eps: 1e-5, offset: 1.0 };

fn check(case: &Case) {
    let want = case.run(&Reference);
    let mut bytes = Vec::new();
    for schedule in [Schedule::Forward, Schedule::Backward, Schedule::Shuffled(3)] {
        let found = case.run(&Gpu::new(Sim::new(schedule)));
        for (found, want) in found.iter().zip(&want) {
            let error = error(&found.values, &want.values);
            assert!(error <= found.tolerance, "{case:?} {}: {error:e}", found.name);
        }
        let bits: Vec<u32> =
            found.iter().flat_map(|o| o.values.iter().map(|x| x.to_bits())).collect();
        assert!(bytes.is_empty() || bytes == bits, "{schedule:?} {case:?}: other bytes");
        bytes = bits;
    }
}

#[test]
fn more_rows_than_sums() {
    // A warp has two rows each, and one is left; the same of blocks.
    check(&Case::Norm(4097, 5, 1.0, 0.0));
    check(&Case::Norm(5001, 8, 1.0, 1.0));
    check(&Case::Norm(265, 516, 1.0, 0.0));
    check(&Case::Norm(529, 521, 1.0, 1.0));
    check(&Case::GroupNorm(1700, 3, 4, 1.0, 0.0));
}

#[test]
fn rows_beyond_registers() {
    for magnitude in [1.0, 1e30] {
        check(&Case::Norm(3, 4096, magnitude, 0.0));
        check(&Case::Norm(3, 4097, magnitude, 0.0));
        check(&Case::Norm(2, 9001, magnitude, 1.0));
        check(&Case::GroupNorm(5, 2, 4101, magnitude, 1.0));
    }
    // Sums that blocks keep in memory are added to as they go on.
    check(&Case::Norm(267, 4100, 1.0, 0.0));
    check(&Case::GroupNorm(267, 1, 4111, 1.0, 0.0));
}

#[test]
fn groups_of_every_length() {
    for width in [127, 128, 129, 132, 511, 512, 513, 516, 1000] {
        check(&Case::GroupNorm(7, 3, width, 1.0, 0.0));
        check(&Case::Norm(5, width, 1.0, 1.0));
    }
}

/// All outputs of both norms at a shape, (name, rounds, values); inputs and outputs rounded or not.
fn outputs(
    b: &Gpu<Sim>,
    (rows, width): (usize, usize),
    rounds: [bool; 4],
) -> Vec<(&'static str, bool, Vec<f32>)> {
    let n = rows * width;
    let buf = |rounds: bool, seed| {
        let mut buf = if rounds { b.zeros_rounded(n) } else { b.zeros(n) };
        let values: Vec<f32> = data(seed, n, 1.0).iter().map(|&x| Compute::Bf16.round(x)).collect();
        b.write(&mut buf, 0, &values);
        buf
    };
    let w = b.upload(&data(1, width, 1.0));
    let (x, dy) = (buf(false, 2), buf(rounds[0], 3));
    let (mut dx, mut r, mut dw) = (buf(false, 4), b.zeros(rows), b.zeros(width));
    let (mut y, mut once_more, mut again) =
        (buf(rounds[1], 5), buf(rounds[2], 6), buf(rounds[3], 7));
    b.rms_norm(&x, &w, NORM, (rows, width), &mut y, &mut r);
    let more = NormMore { dw: Some(&mut dw), y: Some(&mut once_more), dx: Some(&mut again) };
    b.rms_norm_backward(&dy, &x, &w, NORM, &r, (rows, width), &mut dx, more);
    let (mut group, mut raw) = (buf(rounds[0], 8), buf(rounds[0], 9));
    b.group_norm(MatMut::new(&mut group, rows, width), &w, NORM, width, &mut raw);
    let (mut slope, mut dw_group) = (buf(rounds[1], 10), b.zeros(width));
    let to = MatMut::new(&mut slope, rows, width);
    b.group_norm_backward(to, &raw, &w, NORM, width, Some(&mut dw_group));
    vec![
        ("y", rounds[1], b.download(&y)),
        ("y once more", rounds[2], b.download(&once_more)),
        ("dx", false, b.download(&dx)),
        ("dx again", rounds[3], b.download(&again)),
        ("dw", false, b.download(&dw)),
        ("group", rounds[0], b.download(&group)),
        ("raw", rounds[0], b.download(&raw)),
        ("slope", rounds[1], b.download(&slope)),
        ("dw of groups", false, b.download(&dw_group)),
    ]
}

/// Every kind of buffer in the kernels of heads, warps and blocks, aligned and not.
#[test]
fn buffers_of_any_kind_hold_the_same_rounded() {
    let gpu = Gpu::new(Sim::new(Schedule::Backward)).with_compute(Compute::Bf16);
    let mut n_compared = 0;
    for width in [24, 33, 260, 301, 4108, 4111] {
        let exact = outputs(&gpu, (5, width), [false; 4]);
        for kind in 0..16 {
            let found = outputs(&gpu, (5, width), [0, 1, 2, 3].map(|bit| kind >> bit & 1 == 1));
            for ((name, rounds, found), (.., exact)) in found.iter().zip(&exact) {
                for (i, (found, &exact)) in found.iter().zip(exact).enumerate() {
                    let want = if *rounds { Compute::Bf16.round(exact) } else { exact };
                    assert_eq!(found.to_bits(), want.to_bits(), "{width} {kind} {name}[{i}]");
                    n_compared += 1;
                }
            }
        }
    }
    assert!(n_compared > 1_000_000, "{n_compared}");
}
