//! Accesses to several values at once: every offset that makes them aligned or not, in buffers of either kind.

use hone_kernels::conformance::{data, heads};
use hone_kernels::gpu::Gpu;
use hone_kernels::{Backend, Compute, Mat, MatMut};
use hone_sim::{Schedule, Sim};

fn gpu() -> Gpu<Sim> {
    Gpu::new(Sim::new(Schedule::Shuffled(5))).with_compute(Compute::Bf16)
}

/// Values that bf16 holds.
fn values(seed: u64, n: usize) -> Vec<f32> {
    data(seed, n, 1.0).iter().map(|&x| Compute::Bf16.round(x)).collect()
}

fn buf<B: Backend>(b: &B, rounds: bool, values: &[f32]) -> B::Buf {
    let n = values.len();
    let mut buf = if rounds { b.zeros_rounded(n) } else { b.zeros(n) };
    b.write(&mut buf, 0, values);
    buf
}

fn settled(rounds: bool, x: f32) -> f32 {
    if rounds { Compute::Bf16.round(x) } else { x }
}

const KINDS: [(bool, bool); 4] = [(false, false), (true, false), (false, true), (true, true)];

/// All offsets and lengths near a pack: what lies around the part stays.
#[test]
fn sums_and_copies_at_every_offset() {
    let b = gpu();
    let (x, y) = (values(1, 40), values(2, 40));
    for (from, to) in KINDS {
        for (x_at, y_at) in (0..9).flat_map(|i| (0..9).map(move |j| (i, j))) {
            for n in [0, 1, 7, 8, 9, 15, 16, 17, 31] {
                for scale in [0.0, -0.5] {
                    let (at, mut sum) = (buf(&b, from, &x), buf(&b, to, &y));
                    b.axpby(0.25, (&at, x_at), scale, (&mut sum, y_at), n);
                    let mut want = y.clone();
                    for i in 0..n {
                        let kept = if scale == 0.0 { 0.0 } else { scale * y[y_at + i] };
                        want[y_at + i] = settled(to, 0.25 * x[x_at + i] + kept);
                    }
                    assert_eq!(b.download(&sum), want, "{from} {to} {x_at} {y_at} {n} {scale}");
                }
            }
        }
    }
}

/// Rows that lie aligned, rows that begin aligned and go on elsewhere, and dense rows.
#[test]
fn rows_are_copied_biased_and_dropped_wherever_they_lie() {
    let b = gpu();
    let bias = values(3, 24);
    let bias_at = b.upload(&bias);
    for (from, to) in KINDS {
        for (rows, cols, offset, stride) in [
            (3, 16, 8, 24),
            (3, 17, 8, 24),
            (3, 16, 8, 25),
            (3, 16, 1, 24),
            (1, 19, 0, 19),
            (5, 9, 0, 9),
        ] {
            let len = offset + rows * stride;
            let (x, y) = (values(1, len), values(2, len));
            let at = buf(&b, from, &x);
            let view = Mat { buf: &at, offset, rows, cols, stride };
            let run =
                |name, apply: &dyn Fn(MatMut<'_, Gpu<Sim>>), want: &dyn Fn(usize, usize) -> f32| {
                    let mut found = buf(&b, to, &y);
                    apply(MatMut { buf: &mut found, offset, rows, cols, stride });
                    let mut wanted = y.clone();
                    for (i, j) in (0..rows).flat_map(|i| (0..cols).map(move |j| (i, j))) {
                        wanted[offset + i * stride + j] =
                            settled(to, want(offset + i * stride + j, i * cols + j));
                    }
                    assert_eq!(
                        b.download(&found),
                        wanted,
                        "{name} {from} {to} {rows} {cols} {offset} {stride}"
                    );
                };
            run("kept", &|to| b.dropout(view, to, 0.0, 1), &|at, _| x[at]);
            let half = |i| if hone_kernels::rng::keep(9, i as u64, 0.5) { 2.0 } else { 0.0 };
            run("dropped", &|to| b.dropout(view, to, 0.5, 9), &|at, i| x[at] * half(i));
            run("biased", &|to| b.add_bias(to, &bias_at), &|at, i| y[at] + bias[i % cols]);
            let columns = Mat::new(&bias_at, 1, cols);
            let scaled = |at: usize, i: usize| bias[i % cols] * x[at];
            run("scaled", &|to| b.add_scaled_columns(view, columns, 0.0, to, 0.0), &scaled);
            let mut sums = b.zeros(cols);
            b.bias_grad(view, &mut sums);
            let sum =
                |j: usize| (0..rows).map(|i| f64::from(x[offset + i * stride + j])).sum::<f64>();
            assert_eq!(b.download(&sums), (0..cols).map(|j| sum(j) as f32).collect::<Vec<_>>());
        }
    }
}

/// Rows of a weight in bf16 and of a table in f32, into buffers of either kind.
#[test]
fn rows_are_gathered_from_any_kind() {
    let b = gpu();
    let ids = [5, 0, 0, 6, 3];
    for d in [1, 7, 8, 33, 40] {
        let table = values(1, 7 * d);
        let frozen = b.freeze(&table, 7, d);
        let want: Vec<f32> =
            ids.iter().flat_map(|&id| table[id as usize * d..][..d].to_vec()).collect();
        for to in [false, true] {
            let mut y = buf(&b, to, &vec![f32::NAN; 5 * d]);
            b.gather_frozen(&frozen, &ids, &mut y);
            assert_eq!(b.download(&y), want, "{d}");
            let mut y = buf(&b, to, &vec![f32::NAN; 5 * d]);
            b.gather_rows(&b.upload(&table), &ids, d, &mut y);
            assert_eq!(b.download(&y), want, "{d}");
        }
    }
}

/// One number many times, and many numbers once.
#[test]
fn rows_that_meet_are_added_in_order() {
    let b = gpu();
    for d in [1, 6, 8] {
        for ids in [vec![2; 50], (0..50).rev().collect::<Vec<u32>>(), vec![1, 0, 1, 49, 0, 1]] {
            let (dy, table) = (data(1, ids.len() * d, 1.0), data(2, 50 * d, 1e3));
            let mut want = table.clone();
            for (i, &id) in ids.iter().enumerate() {
                for j in 0..d {
                    want[id as usize * d + j] += dy[i * d + j];
                }
            }
            let mut found = b.upload(&table);
            b.scatter_add_rows(&b.upload(&dy), &ids, d, &mut found);
            assert_eq!(b.download(&found), want);
            // The same as columns of a table that is turned.
            let turned = |x: &[f32]| -> Vec<f32> {
                (0..d).flat_map(|k| (0..50).map(move |j| x[j * d + k])).collect()
            };
            let mut found = b.upload(&turned(&table));
            b.scatter_add_columns(&b.upload(&dy), &ids, MatMut::new(&mut found, d, 50));
            assert_eq!(b.download(&found), turned(&want));
        }
    }
}

/// Heads whose halves are packs, in bf16; the first rotated columns of a head, the rest left.
#[test]
fn positions_in_bf16_are_those_in_f32_rounded() {
    let b = gpu();
    let positions = [0, 3, 8, 2, 2];
    for (heads, rotary) in
        [(heads(3, 1, 64), 64), (heads(2, 2, 32), 16), (heads(1, 1, 24), 16), (heads(2, 1, 20), 16)]
    {
        let cos_sin = b.upload(&data(1, 9 * rotary, 1.0));
        let start = values(2, 5 * heads.qkv_width());
        for inverse in [false, true] {
            let [exact, found] = [false, true].map(|rounds| {
                let mut qkv = buf(&b, rounds, &start);
                b.rope(&mut qkv, heads, rotary, &positions, &cos_sin, inverse);
                b.download(&qkv)
            });
            let want: Vec<f32> = exact.iter().map(|&x| Compute::Bf16.round(x)).collect();
            assert_eq!(found, want, "{heads:?} {rotary}");
            assert_ne!(found, start);
        }
    }
}
