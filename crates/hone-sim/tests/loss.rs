//! The loss on the GPU backend where the table has no case: rows longer than a block takes at once, rows that are
//! aligned and rows that are not, logits that are not finite.

#![cfg(not(no_simulator))]

use hone_kernels::conformance::{all_options, data, error};
use hone_kernels::gpu::Gpu;
use hone_kernels::{Backend, Compute, Cpu, LossOptions, LossSums, MatMut, Reference};
use hone_sim::{Schedule, Sim};

/// A row's length: two units of every thread and more, and no whole number of units.
const V: usize = 9_003;
const ROWS: usize = 3;

/// What comes of logits that begin at `start` in rows of `stride`: sums, losses, and the gradient in place and
/// elsewhere.
fn run<B: Backend>(
    b: &B,
    logits: &[f32],
    (start, stride): (usize, usize),
    options: LossOptions,
) -> (LossSums, Vec<f32>, [Vec<f32>; 2]) {
    let (targets, weights) = ([17, V as u32 - 1, 0], [1.0, 0.5, 2.0]);
    let mut wide = vec![0.25; start + ROWS * stride];
    for (row, from) in wide[start..].chunks_mut(stride).zip(logits.chunks(V)) {
        row[..V].copy_from_slice(from);
    }
    let (mut buf, mut row_loss) = (b.upload(&wide), vec![0.0; ROWS]);
    let view = MatMut { buf: &mut buf, offset: start, rows: ROWS, cols: V, stride };
    let mut elsewhere = b.zeros(ROWS * V);
    let (scale, more) = ((0.1, &mut elsewhere), Some(&mut row_loss[..]));
    let sums = b.cross_entropy_into(view, &targets, &weights, scale, more, options);
    let mut buf = b.upload(&wide);
    let view = MatMut { buf: &mut buf, offset: start, rows: ROWS, cols: V, stride };
    let again = b.cross_entropy_with(view, &targets, &weights, Some(0.1), None, options);
    assert_eq!(format!("{sums:?}"), format!("{again:?}"));
    let in_place = b.download(&buf);
    let mut dense = Vec::new();
    for row in in_place[start..].chunks(stride) {
        assert!(row[V..].iter().all(|&x| x == 0.25), "a value behind a row changed");
        dense.extend(&row[..V]);
    }
    (sums, row_loss, [dense, b.download(&elsewhere)])
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

fn every_option() -> Vec<LossOptions> {
    let mut options = all_options();
    options.push(LossOptions::default());
    options
}

/// Long rows are those of the twin, and their bytes are the same however they are aligned.
#[test]
fn long_rows_have_the_same_bytes_wherever_they_lie() {
    let logits = data(1, ROWS * V, 3.0);
    for options in every_option() {
        let wanted = run(&Reference, &logits, (0, V), options);
        let gpu = Gpu::new(Sim::new(Schedule::Shuffled(5)));
        let first = run(&gpu, &logits, (0, V), options);
        assert!((first.0.weighted_loss / wanted.0.weighted_loss - 1.0).abs() < 1e-6, "{options:?}");
        assert_eq!(first.0.n_correct, wanted.0.n_correct);
        assert!(error(&first.1, &wanted.1) <= 1e-6, "{options:?}");
        assert!(error(&first.2[0], &wanted.2[0]) <= 4e-6, "{options:?}");
        for at in [(0, V + 1), (3, V + 2), (4, V + 5)] {
            let found = run(&gpu, &logits, at, options);
            assert_eq!(found.0, first.0);
            for found in &found.2 {
                assert!(bits(found) == bits(&first.2[0]), "{options:?} at {at:?}");
            }
        }
    }
}

/// A gradient in a rounded buffer is the gradient rounded, and what lies behind it stays.
#[test]
fn a_gradient_that_goes_into_a_rounded_buffer_is_rounded() {
    let gpu = Gpu::new(Sim::new(Schedule::Backward)).with_compute(Compute::Bf16);
    for v in [1, 7, 48, 4_104, V] {
        let logits = data(2, ROWS * v, 3.0);
        for options in every_option() {
            let into = |mut to| {
                let mut logits = gpu.upload(&logits);
                let view = MatMut::new(&mut logits, ROWS, v);
                let targets = [v as u32 - 1, 0, v as u32 / 2];
                let weights = [1.0, 0.5, 2.0];
                gpu.cross_entropy_into(view, &targets, &weights, (0.1, &mut to), None, options);
                gpu.download(&to)
            };
            let (found, exact) = (into(gpu.zeros_rounded(ROWS * v + 3)), into(gpu.zeros(ROWS * v)));
            let wanted = exact.iter().map(|&x| Compute::Bf16.round(x)).chain([0.0; 3]);
            assert!(bits(&found) == bits(&wanted.collect::<Vec<_>>()), "{v} {options:?}");
        }
    }
}

/// What is done to the logits of a row.
type Change<'a> = &'a dyn Fn(&mut [f32]);

/// Logits of -inf have no share, as where a vocabulary is masked; a row of them, NaN and +inf give NaN, and no other
/// row knows: as on the CPU, whose gradients of masked logits are NaN with options.
#[test]
fn what_is_not_finite_stays_in_its_row() {
    let (gpu, cpu) = (Gpu::new(Sim::new(Schedule::Forward)), Cpu::new());
    let (plain, masked) = (LossOptions::default(), V / 2..V - 1);
    let mask = |logits: &mut [f32]| logits[masked.clone()].fill(f32::NEG_INFINITY);
    let whole = |logits: &mut [f32]| logits.fill(f32::NEG_INFINITY);
    let nan = |logits: &mut [f32]| logits[4711] = f32::NAN;
    let inf = |logits: &mut [f32]| logits[4711] = f32::INFINITY;
    let changes: [Change; 4] = [&mask, &whole, &nan, &inf];
    for (kind, change) in changes.into_iter().enumerate() {
        for options in [plain, LossOptions { z_loss: 1e-3, ..plain }] {
            let mut logits = data(1, ROWS * V, 3.0);
            change(&mut logits[V..2 * V]);
            let found = run(&gpu, &logits, (0, V), options);
            let mut wanted = run(&cpu, &logits, (0, V), options);
            assert_eq!(found.1[1].is_nan(), kind > 0, "{kind}");
            assert_eq!(found.0.n_correct, wanted.0.n_correct, "{kind}");
            assert!(error(&found.1, &wanted.1) <= 2e-6, "{kind}: {:?} for {:?}", found.1, wanted.1);
            for (found, wanted) in found.2.iter().zip(&mut wanted.2) {
                if kind == 0 {
                    wanted[V..2 * V][masked.clone()].fill(0.0);
                }
                assert!(error(found, wanted) <= 4e-6, "{kind} {options:?}");
            }
        }
    }
}
