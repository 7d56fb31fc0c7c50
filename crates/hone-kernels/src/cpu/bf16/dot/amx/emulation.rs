//! Tiles in memory, and what the instructions do with them, after Intel's manual.

use super::super::super::packed::GROUP;
use super::tiles::Tiles;

/// The order in which the products of 16 pairs are added to a sum; each addition is fused with its
/// product and rounded to nearest even, with denormal values taken for zero before and after.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Order {
    /// That of the manual: first values of pairs, second values of pairs, both, and what was there.
    Manual,
    /// That of VDPBF16PS in its manual: pair by pair onto what was there, of each pair the second value
    /// first.
    Vectors,
    /// That of the guide to intrinsics: the same, of each pair the first value first.
    Guide,
}

/// Eight tiles.
pub(in super::super::super) struct Emulation {
    tiles: [[[u32; GROUP]; GROUP]; 8],
    order: Order,
}

impl Emulation {
    /// All zeros.
    pub(super) fn new(order: Order) -> Box<Self> {
        assert!(is_x86_feature_detected!("avx512f"));
        Box::new(Emulation { tiles: [[[0; GROUP]; GROUP]; 8], order })
    }
}

impl Tiles for Emulation {
    fn zero<const T: u8>(&mut self) {
        self.tiles[usize::from(T)] = [[0; GROUP]; GROUP];
    }

    unsafe fn load<const T: u8>(&mut self, from: *const u8, stride: usize) {
        for (i, row) in self.tiles[usize::from(T)].iter_mut().enumerate() {
            // SAFETY: the caller says that the row is there; it may lie at any address.
            *row = unsafe { from.add(i * stride).cast::<[u32; GROUP]>().read_unaligned() };
        }
    }

    fn multiply<const C: u8, const A: u8, const B: u8>(&mut self) {
        assert!(C != A && A != B && B != C);
        let [a, b] = [A, B].map(|tile| &self.tiles[usize::from(tile)]);
        let mut sums = self.tiles[usize::from(C)];
        // SAFETY: `new` has looked for the instructions.
        unsafe { multiply(&mut sums, a, b, self.order) };
        self.tiles[usize::from(C)] = sums;
    }

    unsafe fn store<const T: u8>(&mut self, to: *mut u8, stride: usize) {
        for (i, row) in self.tiles[usize::from(T)].iter().enumerate() {
            // SAFETY: the caller says that there is room; it may lie at any address.
            unsafe { to.add(i * stride).cast::<[u32; GROUP]>().write_unaligned(*row) };
        }
    }
}

/// A value, or zero with its sign where it is denormal.
#[inline(always)]
fn flushed(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { 0.0_f32.copysign(x) } else { x }
}

/// `x y + sum`.
#[inline(always)]
fn fused(x: f32, y: f32, sum: f32) -> f32 {
    flushed(x.mul_add(y, sum))
}

/// The values of a pair.
#[inline(always)]
fn halves(pair: u32) -> [f32; 2] {
    [f32::from_bits(pair << 16), f32::from_bits(pair & 0xffff_0000)].map(flushed)
}

/// TDPBF16PS.
#[target_feature(enable = "avx512f")]
fn multiply(
    sums: &mut [[u32; GROUP]; GROUP],
    a: &[[u32; GROUP]; GROUP],
    b: &[[u32; GROUP]; GROUP],
    order: Order,
) {
    let mut columns = [[[0.0_f32; GROUP]; 2]; GROUP];
    for (columns, b) in columns.iter_mut().zip(b) {
        for (n, &pair) in b.iter().enumerate() {
            let [first, second] = halves(pair);
            columns[0][n] = first;
            columns[1][n] = second;
        }
    }
    for (sums, a) in sums.iter_mut().zip(a) {
        let mut old = [0.0; GROUP];
        for (old, &mut sum) in old.iter_mut().zip(&mut *sums) {
            *old = flushed(f32::from_bits(sum));
        }
        // Of first and of second values, or of both in the first.
        let mut totals = [if order == Order::Manual { [0.0; GROUP] } else { old }, [0.0; GROUP]];
        for (&pair, columns) in a.iter().zip(&columns) {
            let a = halves(pair);
            for n in 0..GROUP {
                match order {
                    Order::Manual => {
                        totals[0][n] = fused(a[0], columns[0][n], totals[0][n]);
                        totals[1][n] = fused(a[1], columns[1][n], totals[1][n]);
                    }
                    Order::Vectors => {
                        let sum = fused(a[1], columns[1][n], totals[0][n]);
                        totals[0][n] = fused(a[0], columns[0][n], sum);
                    }
                    Order::Guide => {
                        let sum = fused(a[0], columns[0][n], totals[0][n]);
                        totals[0][n] = fused(a[1], columns[1][n], sum);
                    }
                }
            }
        }
        for n in 0..GROUP {
            let sum = match order {
                Order::Manual => flushed(old[n] + flushed(totals[0][n] + totals[1][n])),
                Order::Vectors | Order::Guide => totals[0][n],
            };
            sums[n] = sum.to_bits();
        }
    }
}
