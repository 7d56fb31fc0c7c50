//! Attention in bf16, and at shapes that the table of cases leaves out, against the plain twin.

#![cfg(not(no_simulator))]

use hone_kernels::conformance::{data, heads};
use hone_kernels::gpu::Gpu;
use hone_kernels::{AttnMask, Backend, Compute, Heads, Mat, Reference};
use hone_sim::{Schedule, Sim};

/// A layer: heads, lengths of documents, window and soft cap.
type Layer = (Heads, &'static [usize], Option<usize>, Option<f32>);

/// Which of the ways, tile edges, groups of heads, windows that end inside tiles, and heads wider than
/// a block's columns.
const LAYERS: [Layer; 9] = [
    (heads(2, 1, 64), &[1, 63, 64, 65, 0, 2], None, None),
    (heads(3, 1, 64), &[150], Some(70), None),
    (heads(2, 2, 64), &[200], Some(3), Some(5.0)),
    (heads(2, 1, 128), &[130, 7], None, None),
    (heads(1, 1, 128), &[129], Some(64), Some(2.0)),
    (heads(2, 1, 20), &[23, 70], Some(50), None),
    (heads(1, 1, 200), &[70], None, None),
    (heads(2, 1, 300), &[66], Some(40), None),
    (heads(1, 1, 96), &[65, 1], None, None),
];

/// Values of a buffer, and whether it rounds.
fn buf<B: Backend>(b: &B, rounds: bool, values: &[f32]) -> B::Buf {
    let mut buf = if rounds { b.zeros_rounded(values.len()) } else { b.zeros(values.len()) };
    b.write(&mut buf, 0, values);
    buf
}

/// The results of a layer: out, lse and dqkv, the backward being that of `forward` if it is given.
fn run<B: Backend>(
    b: &B,
    (heads, lens, window, soft_cap): Layer,
    (from, to): (bool, bool),
    rounded: bool,
    forward: Option<&[Vec<f32>]>,
) -> Vec<Vec<f32>> {
    let t: usize = lens.iter().sum();
    let mask = AttnMask { window, scale: 1.0 / (heads.dim as f32).sqrt(), soft_cap };
    let values = |seed, n| -> Vec<f32> {
        let values = data(seed, n, 1.0);
        if rounded { values.iter().map(|&x| Compute::Bf16.round(x)).collect() } else { values }
    };
    let qkv = buf(b, from, &values(1, t * heads.qkv_width()));
    let mut out = buf(b, to, &vec![f32::NAN; t * heads.out_width()]);
    let mut lse = buf(b, false, &vec![f32::NAN; t * heads.n_q]);
    b.attention(&qkv, heads, lens, mask, &mut out, &mut lse);
    let mut found = vec![b.download(&out), b.download(&lse)];
    let forward = forward.unwrap_or(&found);
    let (out, lse) = (buf(b, from, &forward[0]), buf(b, false, &forward[1]));
    let dout = buf(b, from, &values(2, t * heads.out_width()));
    let mut dqkv = buf(b, to, &vec![f32::NAN; t * heads.qkv_width()]);
    b.attention_backward(&dout, &qkv, &out, &lse, heads, lens, mask, &mut dqkv);
    found.push(b.download(&dqkv));
    found
}

fn gpu(schedule: Schedule, compute: Compute) -> Gpu<Sim> {
    Gpu::new(Sim::new(schedule)).with_compute(compute)
}

fn bits(values: &[Vec<f32>]) -> Vec<u32> {
    values.iter().flatten().map(|x| x.to_bits()).collect()
}

/// Root mean square of the differences, relative to that of what is wanted; and the largest, relative to
/// the largest.
fn errors(found: &[f32], wanted: &[f32]) -> (f64, f64) {
    assert_eq!(found.len(), wanted.len());
    let (mut off, mut all, mut most, mut top) = (0.0_f64, 0.0_f64, 0.0_f64, 0.0_f64);
    for (&a, &b) in found.iter().zip(wanted) {
        let (difference, b) = (f64::from(a) - f64::from(b), f64::from(b));
        assert!(difference.is_finite());
        off += difference * difference;
        all += b * b;
        most = most.max(difference.abs());
        top = top.max(b.abs());
    }
    ((off / all.max(1e-30)).sqrt(), most / top.max(1e-30))
}

/// Factors that are rounded are those of the twin but for ties and running maxima, either of which takes a
/// factor to its neighbour.
#[test]
fn factors_are_rounded_as_the_plain_twin_rounds_them() {
    let plain = Reference.with_compute(Compute::Bf16);
    for layer in LAYERS {
        let found = run(&gpu(Schedule::Forward, Compute::Bf16), layer, (false, false), false, None);
        let wanted = run(&plain, layer, (false, false), false, Some(&found));
        let exact = run(&Reference, layer, (false, false), false, None);
        for (i, name) in ["out", "lse", "dqkv"].into_iter().enumerate() {
            let (mean, most) = errors(&found[i], &wanted[i]);
            let (mean_max, most_max) = [(1e-3, 3e-3), (1e-6, 1e-6), (1e-3, 3e-3)][i];
            assert!(mean <= mean_max && most <= most_max, "{layer:?} {name}: {mean:e} {most:e}");
            // That factors are rounded shows.
            let (rounding, _) = errors(&exact[i], &wanted[i]);
            let single = layer.1 == [1];
            assert!(i == 1 || single || rounding > 1e-3, "{layer:?} {name}: {rounding:e}");
        }
    }
}

/// As `what_is_written_is_rounded_and_nothing_else_changes`, for both ways.
#[test]
fn what_is_written_is_rounded() {
    let b = gpu(Schedule::Forward, Compute::Bf16);
    for layer in LAYERS {
        let exact = run(&b, layer, (false, false), true, None);
        for (from, to) in [(true, false), (false, true), (true, true)] {
            // The backward of one and the same forward, which a rounded buffer may round.
            let forward: Vec<_> = exact[0].iter().map(|&x| Compute::Bf16.round(x)).collect();
            let forward = [forward, exact[1].clone()];
            let wanted = run(&b, layer, (false, false), true, Some(&forward));
            let found = run(&b, layer, (from, to), true, Some(&forward));
            for (i, rounds) in [to, false, to].into_iter().enumerate() {
                for (&found, &wanted) in found[i].iter().zip(&wanted[i]) {
                    let wanted = if rounds { Compute::Bf16.round(wanted) } else { wanted };
                    assert_eq!(found.to_bits(), wanted.to_bits(), "{layer:?} {from} {to} {i}");
                }
            }
        }
    }
}

#[test]
fn no_schedule_changes_a_byte() {
    for compute in [Compute::F32, Compute::Bf16] {
        for layer in LAYERS {
            let of =
                |schedule| bits(&run(&gpu(schedule, compute), layer, (true, true), false, None));
            let first = of(Schedule::Forward);
            assert!(of(Schedule::Backward) == first, "{layer:?} backwards");
            assert!(of(Schedule::Shuffled(3)) == first, "{layer:?} shuffled");
        }
    }
}

/// Heads wider than a block's columns, and more query heads to a key head than a block has.
#[test]
fn wide_heads_and_large_groups() {
    for layer in LAYERS {
        let found =
            run(&gpu(Schedule::Shuffled(1), Compute::F32), layer, (false, false), false, None);
        let wanted = run(&Reference, layer, (false, false), false, None);
        for (found, wanted) in found.iter().zip(&wanted) {
            let (_, most) = errors(found, wanted);
            assert!(most <= 2e-6, "{layer:?}: {most:e}");
        }
    }
    for heads in [heads(18, 2, 6), heads(2, 1, 258), heads(8, 1, 128), heads(9, 1, 131)] {
        for rounded in [false, true] {
            let wanted = decode(&Reference, heads, rounded);
            let found = decode(&gpu(Schedule::Backward, Compute::Bf16), heads, rounded);
            let (_, most) = errors(&found, &wanted);
            assert!(most <= 2e-6, "{heads:?}: {most:e}");
        }
    }
}

/// A step of decoding; inputs are of values that bf16 has.
fn decode<B: Backend>(b: &B, heads: Heads, rounded: bool) -> Vec<f32> {
    let (capacity, lens) = (290, [257, 31, 290]);
    let mask = AttnMask { window: Some(260), scale: 0.2, soft_cap: None };
    let values = |seed, n| -> Vec<f32> {
        data(seed, n, 1.0).iter().map(|&x| Compute::Bf16.round(x)).collect()
    };
    let [k, v] = [1, 2]
        .map(|seed| buf(b, rounded, &values(seed, lens.len() * capacity * heads.n_kv * heads.dim)));
    let q = buf(b, rounded, &values(3, lens.len() * heads.qkv_width()));
    let mut out = b.zeros(lens.len() * heads.out_width());
    let q = Mat::columns(&q, lens.len(), 0, heads.out_width(), heads.qkv_width());
    b.attention_decode(q, &k, &v, capacity, &lens, heads, mask, &mut out);
    b.download(&out)
}
