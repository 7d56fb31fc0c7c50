//! Operators on rounded buffers: what each writes is what it writes to buffers of f32 that hold the
//! same values, rounded, byte by byte; so the table of all operators holds for them too.

use crate::conformance::rounded::{Found, KINDS, SHAPES, Shape, all};
use crate::{Backend, Compute, Cpu, Reference};

fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
}

/// Backends that compute in bf16, at every level and with every engine.
fn backends() -> Vec<Cpu> {
    let levels = Cpu::all_levels().into_iter().map(|cpu| cpu.with_compute(Compute::Bf16));
    levels.chain(Cpu::all_bf16().into_iter().skip(1)).collect()
}

#[test]
fn what_is_written_is_rounded_and_nothing_else_changes() {
    let mut n_rounded = 0;
    for cpu in backends() {
        for shape in SHAPES {
            let exact = all(&cpu, shape, (false, false));
            for kinds in KINDS {
                let found = all(&cpu, shape, kinds);
                assert_eq!(found.len(), exact.len());
                for (Found(name, found, rounds), Found(_, exact, _)) in found.iter().zip(&exact) {
                    assert_eq!(found.len(), exact.len());
                    for (i, (&found, &exact)) in found.iter().zip(exact).enumerate() {
                        let wanted = if *rounds { Compute::Bf16.round(exact) } else { exact };
                        let what = format!("{cpu:?} {shape:?} {kinds:?} {name}[{i}]");
                        assert!(same(found, wanted), "{what}: {found:e} for {wanted:e}");
                        n_rounded += usize::from(wanted != exact);
                    }
                }
            }
        }
    }
    assert!(n_rounded > 1_000_000, "{n_rounded} values were rounded");
}

/// The twins differ where sums of f32 and of f64 lie on either side of a tie: by a unit of bf16, in
/// few places.
#[test]
fn rounded_buffers_are_those_of_the_plain_twin() {
    let (plain, mut n, mut n_apart) = (Reference.with_compute(Compute::Bf16), 0, 0);
    for cpu in backends() {
        for shape in SHAPES.into_iter().filter(|shape| shape.size == 1.0) {
            let wanted = all(&plain, shape, (true, true));
            for (Found(name, found, rounds), Found(_, wanted, _)) in
                all(&cpu, shape, (true, true)).iter().zip(&wanted)
            {
                let top = wanted.iter().fold(1.0_f32, |top, x| top.max(x.abs()));
                for (&found, &wanted) in found.iter().zip(wanted) {
                    let unit = if *rounds { wanted.abs() / 128.0 } else { 0.0 };
                    let off = (found - wanted).abs();
                    assert!(off <= unit + 3e-6 * top, "{cpu:?} {shape:?} {name}: {off:e}");
                    n += usize::from(*rounds);
                    n_apart += usize::from(*rounds && found != wanted);
                }
            }
        }
    }
    assert!(n > 100_000 && n_apart * 500 < n, "{n_apart} of {n} values differ");
}

#[test]
fn bytes_do_not_depend_on_the_number_of_threads() {
    let cpu = Cpu::new().with_compute(Compute::Bf16);
    let shape = Shape { rows: 700, cols: 200, gap: 3, depth: 90, size: 1.0 };
    let run = |n_threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
        let found = pool.install(|| all(&cpu, shape, (true, true)));
        let bits = |Found(_, x, _): Found| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        found.into_iter().map(bits).collect::<Vec<_>>()
    };
    let one = run(1);
    assert!(one == run(2) && one == run(8));
}

/// To nearest, ties to even, as [`Compute::round`] does it; denormal values stay, and so does NaN.
#[test]
fn values_are_rounded_at_every_level() {
    let mut values: Vec<f32> = (0..70_000_u32).map(|i| f32::from_bits(i * 61_357)).collect();
    values.extend(
        [0x3f80_8000, 0x3f81_8000, 0x7f7f_8000, 0x7f80_0001, 0xffff_ffff, 0x0000_8000]
            .map(f32::from_bits),
    );
    values.extend([f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, -0.0]);
    for cpu in backends() {
        let (from, mut to) = (cpu.upload(&values), cpu.zeros_rounded(values.len()));
        cpu.copy(&from, &mut to, values.len());
        let mut written = cpu.zeros_rounded(values.len());
        cpu.write(&mut written, 0, &values);
        let found = cpu.download(&to).into_iter().zip(cpu.download(&written));
        for (&x, (copied, written)) in values.iter().zip(found) {
            let wanted = Compute::Bf16.round(x);
            assert!(same(copied, wanted) && same(written, wanted), "{cpu:?}: {x:e}");
        }
    }
}

#[test]
fn rounded_buffers_have_half_the_bytes_in_bf16_alone() {
    let cpu = Cpu::new().with_compute(Compute::Bf16);
    let bytes = |cpu: Cpu| {
        let (plain, rounded) = (cpu.zeros(37), cpu.zeros_rounded(37));
        assert_eq!((cpu.len(&plain), cpu.len(&rounded)), (37, 37));
        (cpu.buf_bytes(&plain), cpu.buf_bytes(&rounded))
    };
    assert_eq!(bytes(Cpu::new()), (4 * 37, 4 * 37));
    assert_eq!(bytes(cpu), (4 * 37, 2 * 37));
}

/// Buffers that have pages of their own are memory like any other.
#[test]
fn large_buffers_begin_with_zeros_and_keep_what_is_written() {
    let cpu = Cpu::new().with_compute(Compute::Bf16);
    let n = (5 << 20) / 2 + 3;
    let values: Vec<f32> = (0..n).map(|i| (i % 251) as f32).collect();
    for mut buf in [cpu.zeros(n), cpu.zeros_rounded(n)] {
        assert!(cpu.download(&buf).iter().all(|&x| x == 0.0));
        cpu.write(&mut buf, 0, &values);
        assert!(cpu.download(&buf) == values && cpu.download(&buf.clone()) == values);
    }
}

#[test]
#[should_panic(expected = "a buffer of f32 is wanted here")]
fn an_operator_of_f32_refuses_a_rounded_buffer() {
    let cpu = Cpu::new().with_compute(Compute::Bf16);
    cpu.sum_squares(&cpu.zeros_rounded(3));
}
