//! Blocks of a product on AMX: tiles of 16 x 16 sums, TDPBF16PS.
//!
//! The layouts are those of vectors. Sixteen [`Pairs`] of a group, one after the other, are a tile of
//! the right factor; sixteen rows of bf16 that lie along the sums, 32 values of each, are a tile of
//! the left one, read where it lies. What does not fill its tiles is packed and filled up with zeros
//! first. Two by two tiles of sums are held at once; they leave through a square of f32, and are
//! written as sums of vectors are.
//!
//! Intel's manual has the order in which TDPBF16PS adds: over its 16 pairs, the first values of
//! pairs by themselves and the second ones by themselves, then both sums, then what was there before;
//! the guide to its intrinsics has another. VDPBF16PS has a third. So no row of a product may be left
//! to vectors where others are made by tiles: all of a product is made by one of them, the few rows
//! of generating too. Only products for which nothing is promised about rows, and attention, stay
//! with vectors.
//!
//! The engine was tested with an emulation of the instructions: all products in the order of the manual,
//! those that vectors make as well in theirs, where it has their bytes, and single sums in all three. It has not yet run on a machine that has the instructions. Where they
//! are found, and Linux permits them, a product of small whole numbers, which is exact in any order,
//! is made first: unless all of it is right, vectors multiply.

#[cfg(test)]
mod emulation;
mod panel;
#[cfg(test)]
mod tests;
mod tiles;

use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, _xgetbv};
use std::ops::Range;
use std::sync::OnceLock;

use half::bf16;

use super::super::super::par::SharedPtr;
use super::super::Place;
use super::super::packed::{GROUP, Pairs};
use super::tile::{Ends, Groups, Lines, Part, Shape};
use super::{Ahead, Avx512Bf16};

#[cfg(test)]
use emulation::Order;
pub(super) use panel::lines;
use tiles::{Machine, Tiles};

/// Rows and columns of sums that are held at once.
pub(super) const SIDE: usize = 2 * GROUP;

/// What has tiles; each variant proves that it may be used.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Amx {
    /// This machine.
    Machine(Permitted),
    /// The emulation, adding in some order.
    #[cfg(test)]
    Emulation(Order),
}

/// Proof that the machine has AMX-TILE and AMX-BF16, that this process may use them, and that a
/// product came out right.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Permitted(());

impl Amx {
    /// The ways to multiply pairs, the fastest first; vectors are none of tiles.
    pub(in super::super) fn all(dot: Avx512Bf16) -> Vec<Option<Self>> {
        let mut all = Vec::from_iter(Amx::detect(dot).map(Some));
        all.push(None);
        #[cfg(test)]
        all.push(Some(Amx::Emulation(Order::Manual)));
        all
    }

    /// The machine's tiles, where it has some. It is asked once: Linux gives a process permission for
    /// good, and to all of its threads, also to those that were there before; each gets room for its
    /// tiles when it first uses them.
    fn detect(dot: Avx512Bf16) -> Option<Self> {
        static HAS: OnceLock<bool> = OnceLock::new();
        let has = || {
            has_tiles(dot) && is_permitted() && {
                // SAFETY: the instructions are there, and may be used.
                let mut tiles = unsafe { Machine::configure() };
                is_right(dot, &mut tiles)
            }
        };
        HAS.get_or_init(has).then_some(Amx::Machine(Permitted(())))
    }

    /// Tiles for the calling thread, until the session is dropped.
    pub(super) fn begin(self) -> Session {
        match self {
            // SAFETY: the proof says so.
            Amx::Machine(Permitted(())) => Session::Machine(unsafe { Machine::configure() }),
            #[cfg(test)]
            Amx::Emulation(order) => Session::Emulation(emulation::Emulation::new(order)),
        }
    }
}

/// Whether the machine has the tiles that are used here, and the system keeps them for its threads.
/// The proof implies leaf 7, and the instruction that reads what the system keeps.
fn has_tiles(_: Avx512Bf16) -> bool {
    const BF16: u32 = 1 << 22;
    const TILE: u32 = 1 << 24;
    // Where tiles are configured, and what they hold.
    const KEPT: u64 = 1 << 17 | 1 << 18;
    #[target_feature(enable = "xsave")]
    fn kept() -> u64 {
        // SAFETY: the system has enabled the instruction, or else vectors would not be there.
        unsafe { _xgetbv(0) }
    }
    #[allow(unused_unsafe, reason = "reading leaves is safe in later versions of the library")]
    // SAFETY: as above; a leaf that is not there holds what others do, or nothing.
    let (features, palette, kept) = unsafe {
        let has_palette = __cpuid_count(0, 0).eax >= 0x1d;
        let palette = has_palette.then(|| __cpuid_count(0x1d, 1));
        (__cpuid_count(7, 0).edx, palette, kept())
    };
    // Eight tiles of 16 rows of 64 bytes.
    let fits = palette.is_some_and(|leaf| leaf.ebx == 8 << 16 | 64 && leaf.ecx & 0xffff == 16);
    features & BF16 != 0 && features & TILE != 0 && kept & KEPT == KEPT && fits
}

/// Asks the system for permission to use tiles: their state is large, and is not saved for processes
/// that did not ask. Refused, too, where a signal's stack could not hold it.
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_PRCTL: isize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const TILE_DATA: usize = 18;
    let mut answer = ARCH_PRCTL;
    // SAFETY: the call takes two numbers, touches no memory of ours, and leaves all other registers.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") answer,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") TILE_DATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    answer == 0
}

/// Other systems are not asked.
#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

/// Configured tiles of one thread, given back when dropped.
pub(in super::super) enum Session {
    Machine(Machine),
    #[cfg(test)]
    Emulation(Box<emulation::Emulation>),
}

impl Session {
    /// [`panel::panel_rows`] on these tiles.
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
    pub(in super::super) fn panel_rows(
        &mut self,
        parts: &[Part<'_>],
        group: usize,
        strip: &Range<usize>,
        cols: Range<usize>,
        ends: Ends,
        ahead: [Ahead; 2],
    ) {
        match self {
            Session::Machine(t) => panel::panel_rows(t, parts, group, strip, cols, ends, ahead),
            #[cfg(test)]
            Session::Emulation(t) => {
                panel::panel_rows(&mut **t, parts, group, strip, cols, ends, ahead);
            }
        }
    }
}

/// Whether some tiles multiply: two parts of a sum of small whole numbers, with every edge that a
/// panel can have, against plain loops. Every sum is exact, in whatever order it is made.
fn is_right(_: Avx512Bf16, tiles: &mut impl Tiles) -> bool {
    const PITCH: usize = 4 * GROUP;
    // Small numbers without a pattern: those of the left factor, and of the right one.
    let number = |i: usize| (i * i * 7 + i * 13) % 31 % 17;
    let left = |part: usize, row: usize, l: usize| number(part + row * 67 + l) as f32 - 8.0;
    let right =
        |part: usize, col: usize, l: usize| number(part * 5 + col * 41 + l * 3) as f32 - 8.0;
    for (n_rows, n_cols, depths) in [(16, 16, [32, 0]), (73, 32, [74, 16]), (7, 19, [96, 128])] {
        let values = |part: usize| -> Vec<bf16> {
            let at = |i: usize| (i / (2 * PITCH), i % (2 * PITCH));
            let value = |(row, l)| if l < depths[part] { left(part, row, l) } else { 0.0 };
            let len = usize::next_multiple_of(n_rows, GROUP) * 2 * PITCH;
            (0..len).map(|i| bf16::from_f32(value(at(i)))).collect()
        };
        let pairs = |part: usize| -> Vec<Pairs> {
            // What lies behind the pairs of a part must not matter.
            let value = |col, l| if l < depths[part] { right(part, col, l) } else { f32::NAN };
            let half = |col, l| u32::from(bf16::from_f32(value(col, l)).to_bits());
            let pair = |i: usize, lane: usize| {
                let (col, l) = (i / PITCH * GROUP + lane, i % PITCH * 2);
                half(col, l) | half(col, l + 1) << 16
            };
            (0..2 * PITCH).map(|i| Pairs(std::array::from_fn(|lane| pair(i, lane)))).collect()
        };
        let (lefts, rights) = ([values(0), values(1)], [pairs(0), pairs(1)]);
        let part = |i: usize| Part {
            left: Lines { values: &lefts[i], shape: Shape::Rows(2 * PITCH) },
            right: Groups { pairs: &rights[i], pitch: PITCH, n_pairs: depths[i] / 2 },
        };
        let mut found = vec![f32::NAN; n_rows * n_cols];
        let to = Place::F32 { start: SharedPtr(found.as_mut_ptr()), stride: n_cols };
        let ends = Ends { alpha: 1.0, old: to, beta: 0.0, to, streams: false };
        let (parts, strip) = ([part(0), part(1)], 0..n_rows);
        // SAFETY: the first argument proves that the machine has the instructions of vectors.
        unsafe { panel::panel_rows(tiles, &parts, 0, &strip, 0..n_cols, ends, [Ahead::NONE; 2]) };
        let sum = |row: usize, col: usize| -> f32 {
            let part = |i: usize| (0..depths[i]).map(move |l| left(i, row, l) * right(i, col, l));
            part(0).chain(part(1)).sum()
        };
        if (0..n_rows * n_cols).any(|i| found[i] != sum(i / n_cols, i % n_cols)) {
            return false;
        }
    }
    true
}
