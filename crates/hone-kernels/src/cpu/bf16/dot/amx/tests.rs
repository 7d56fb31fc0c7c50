//! The emulation against the manual by hand, and the product that is made before tiles are used.

use super::super::super::Engine;
use super::emulation::Emulation;
use super::*;
use crate::{Backend, Compute, Cpu};

impl Cpu {
    /// Where the machine has vectors of pairs: these, tiles that add in their order, and tiles that add
    /// in that of the manual.
    pub(crate) fn vectors_and_tiles() -> Option<[Self; 3]> {
        let dot = Avx512Bf16::detect()?;
        let cpu = |amx| {
            let engine = Engine::Dot(dot, amx);
            Cpu { engine, ..Cpu::new().with_compute(Compute::Bf16) }
        };
        let [like_vectors, others] = [Order::Vectors, Order::Manual].map(Amx::Emulation);
        Some([cpu(None), cpu(Some(like_vectors)), cpu(Some(others))])
    }
}

const ORDERS: [Order; 3] = [Order::Manual, Order::Vectors, Order::Guide];

/// A pair of either factor.
type Factors = ([f32; 2], [f32; 2]);

/// A sum that holds `old`, and to which the products of these pairs are added: of one row with one
/// column, which lie last in their tiles.
fn sum(order: Order, old: f32, pairs: &[Factors]) -> f32 {
    let pair = |[first, second]: [f32; 2]| {
        let bits = |x: f32| {
            let half = bf16::from_f32(x);
            assert!(half.to_f32().to_bits() == x.to_bits() || x.is_nan(), "no bf16");
            u32::from(half.to_bits())
        };
        bits(first) | bits(second) << 16
    };
    const LAST: usize = GROUP - 1;
    let (mut sums, mut a, mut b) =
        ([[0_u32; GROUP]; GROUP], [[0; GROUP]; GROUP], [[0; GROUP]; GROUP]);
    sums[LAST][LAST] = old.to_bits();
    for (k, &(left, right)) in pairs.iter().enumerate() {
        (a[LAST][k], b[k][LAST]) = (pair(left), pair(right));
    }
    let mut tiles = Emulation::new(order);
    let at = |tile: &[[u32; GROUP]; GROUP]| tile.as_ptr().cast::<u8>();
    // SAFETY: each is 16 rows of 64 bytes.
    unsafe {
        tiles.load::<0>(at(&sums), 64);
        tiles.load::<4>(at(&a), 64);
        tiles.load::<6>(at(&b), 64);
        tiles.multiply::<0, 4, 6>();
        tiles.store::<0>(sums.as_mut_ptr().cast(), 64);
    }
    assert!(sums[..LAST].iter().flatten().all(|&bits| bits == 0), "other rows change");
    f32::from_bits(sums[LAST][LAST])
}

#[test]
fn pairs_are_added_in_the_orders_that_are_documented() {
    // Beside 2^24 a one is lost, and two are not.
    const LARGE: f32 = (1 << 24) as f32;
    let one = [1.0, 1.0];
    let table: [(f32, &[Factors], [f32; 3]); 5] = [
        (3.0, &[([1.0, 2.0], [3.0, 4.0])], [14.0; 3]),
        (LARGE, &[(one, one)], [LARGE + 2.0, LARGE, LARGE]),
        (LARGE, &[([1.0, -LARGE], one)], [1.0, 1.0, 0.0]),
        (LARGE, &[([-LARGE, 1.0], one)], [1.0, 0.0, 1.0]),
        // First and second values do not meet before the end.
        (0.0, &[([LARGE, 1.0], one), (one, one)], [LARGE + 2.0, LARGE, LARGE]),
    ];
    for (i, (old, pairs, wanted)) in table.into_iter().enumerate() {
        assert_eq!(ORDERS.map(|order| sum(order, old, pairs)), wanted, "row {i}");
    }
}

#[test]
fn denormal_values_are_zero() {
    const TINY: f32 = f32::MIN_POSITIVE;
    for order in ORDERS {
        let denormal = TINY / 2.0;
        for (old, left, right, wanted) in [
            (0.0, denormal, LARGEST, 0.0),
            (0.0, LARGEST, denormal, 0.0),
            (denormal, 0.0, 0.0, 0.0),
            (-denormal, 0.0, 0.0, 0.0),
            (0.0, TINY, 0.5, 0.0),
            (0.0, TINY, 1.0, TINY),
            (1.0, f32::INFINITY, 1.0, f32::INFINITY),
        ] {
            let found = sum(order, old, &[([left, 0.0], [right, 0.0])]);
            assert_eq!(found, wanted, "{order:?}: {old:e} + {left:e} x {right:e}");
        }
        // The product alone would be denormal, and so is the sum; first products have their own here.
        let wanted = if order == Order::Manual { TINY } else { 0.0 };
        assert_eq!(sum(order, TINY, &[([TINY, 0.0], [-0.5, 0.0])]), wanted, "{order:?}");
        assert!(sum(order, 0.0, &[([f32::NAN, 0.0], [0.0, 0.0])]).is_nan());
        assert!(sum(order, f32::NAN, &[]).is_nan());
    }
}

/// The largest power of two.
const LARGEST: f32 = 1.0 / f32::MIN_POSITIVE;

/// Tiles with a fault.
struct Faulty {
    tiles: Box<Emulation>,
    fault: Fault,
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    None,
    /// A tile of the left factor is not read again.
    Stale,
    /// Rows lie side by side, whatever the stride.
    Stride,
    /// A product is added twice.
    Twice,
    /// One tile of sums does not begin with zeros.
    Left,
}

impl Tiles for Faulty {
    fn zero<const T: u8>(&mut self) {
        if !(matches!(self.fault, Fault::Left) && T == 3) {
            self.tiles.zero::<T>();
        }
    }

    unsafe fn load<const T: u8>(&mut self, from: *const u8, stride: usize) {
        let stride = if matches!(self.fault, Fault::Stride) { 64 } else { stride };
        if !(matches!(self.fault, Fault::Stale) && T == 5) {
            // SAFETY: the caller's; a smaller stride stays inside of it.
            unsafe { self.tiles.load::<T>(from, stride) };
        }
    }

    fn multiply<const C: u8, const A: u8, const B: u8>(&mut self) {
        self.tiles.multiply::<C, A, B>();
        if matches!(self.fault, Fault::Twice) {
            self.tiles.multiply::<C, A, B>();
        }
    }

    unsafe fn store<const T: u8>(&mut self, to: *mut u8, stride: usize) {
        // SAFETY: the caller's.
        unsafe { self.tiles.store::<T>(to, stride) };
    }
}

#[test]
fn tiles_that_are_wrong_are_not_used() {
    let Some(dot) = Avx512Bf16::detect() else { return };
    for order in ORDERS {
        for fault in [Fault::None, Fault::Stale, Fault::Stride, Fault::Twice, Fault::Left] {
            let mut tiles = Faulty { tiles: Emulation::new(order), fault };
            assert_eq!(is_right(dot, &mut tiles), matches!(fault, Fault::None), "{fault:?}");
        }
    }
}

/// Looking for tiles does no harm where there are none, and the answer does not change.
#[test]
fn tiles_are_looked_for_once() {
    let Some(dot) = Avx512Bf16::detect() else { return };
    let found = Amx::detect(dot).is_some();
    assert!(!found || has_tiles(dot), "what is not there was found");
    assert!((0..3).all(|_| Amx::detect(dot).is_some() == found));
}
