//! What can be done with tiles, and the instructions for it.

use std::arch::asm;
use std::marker::PhantomData;

use super::super::super::packed::Pairs;

/// Eight tiles, configured: 16 rows of 64 bytes each. They are named by numbers that are known when
/// a kernel is compiled.
pub(super) trait Tiles {
    /// Zeros.
    fn zero<const T: u8>(&mut self);

    /// Reads rows that lie `stride` bytes apart.
    ///
    /// # Safety
    ///
    /// Sixteen rows of 64 bytes must lie there.
    unsafe fn load<const T: u8>(&mut self, from: *const u8, stride: usize);

    /// Adds to the sums of tile `C`, 16 x 16 of f32, the products of 16 rows of 16 pairs of bf16, tile
    /// `A`, with 16 pairs of each of 16 columns, tile `B`.
    fn multiply<const C: u8, const A: u8, const B: u8>(&mut self);

    /// Writes rows `stride` bytes apart.
    ///
    /// # Safety
    ///
    /// There must be room for sixteen rows of 64 bytes.
    unsafe fn store<const T: u8>(&mut self, to: *mut u8, stride: usize);
}

/// What the instruction that configures tiles reads.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    /// Where an instruction goes on that was interrupted.
    start_row: u8,
    reserved: [u8; 14],
    /// Bytes of the rows of each tile.
    row_bytes: [u16; 16],
    n_rows: [u8; 16],
}

/// All tiles as large as they can be.
static CONFIG: Config = Config {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    n_rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

const _: () = assert!(size_of::<Config>() == size_of::<Pairs>());

/// The tiles of the machine, and of the thread that configured them. They are released when this is
/// dropped, so that nobody saves them for a thread that is done with them.
pub(in super::super::super) struct Machine(PhantomData<*const ()>);

/// An instruction that may change tiles. Between two of them nothing else does: the compiler knows
/// of no use for tiles.
macro_rules! tiles {
    ($($arguments:tt)*) => {
        asm!(
            $($arguments)*
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
        )
    };
}

impl Machine {
    /// Configures the tiles of this thread, all zero.
    ///
    /// # Safety
    ///
    /// The machine must have AMX-TILE and AMX-BF16, and the process permission to use them.
    pub(super) unsafe fn configure() -> Self {
        // SAFETY: the caller's; the instruction reads 64 bytes, which are a configuration.
        unsafe {
            tiles!(
                "ldtilecfg [{from}]",
                from = in(reg) &raw const CONFIG,
                options(readonly, nostack, preserves_flags),
            );
        }
        Machine(PhantomData)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // SAFETY: whoever configured tiles may release them.
        unsafe { tiles!("tilerelease", options(nomem, nostack, preserves_flags),) };
    }
}

impl Tiles for Machine {
    #[inline(always)]
    fn zero<const T: u8>(&mut self) {
        const { assert!(T < 8) };
        // SAFETY: the tiles are configured.
        unsafe {
            tiles!("tilezero tmm{t}", t = const T, options(nomem, nostack, preserves_flags),);
        }
    }

    #[inline(always)]
    unsafe fn load<const T: u8>(&mut self, from: *const u8, stride: usize) {
        const { assert!(T < 8) };
        // SAFETY: the tiles are configured, and the caller says what may be read.
        unsafe {
            tiles!(
                "tileloadd tmm{t}, [{from} + {stride}*1]",
                t = const T,
                from = in(reg) from,
                stride = in(reg) stride,
                options(readonly, nostack, preserves_flags),
            );
        }
    }

    #[inline(always)]
    fn multiply<const C: u8, const A: u8, const B: u8>(&mut self) {
        const { assert!(C < 8 && A < 8 && B < 8 && C != A && A != B && B != C) };
        // SAFETY: the tiles are configured, and three different ones.
        unsafe {
            tiles!(
                "tdpbf16ps tmm{c}, tmm{a}, tmm{b}",
                c = const C,
                a = const A,
                b = const B,
                options(nomem, nostack, preserves_flags),
            );
        }
    }

    #[inline(always)]
    unsafe fn store<const T: u8>(&mut self, to: *mut u8, stride: usize) {
        const { assert!(T < 8) };
        // SAFETY: the tiles are configured, and the caller says what may be written.
        unsafe {
            tiles!(
                "tilestored [{to} + {stride}*1], tmm{t}",
                t = const T,
                to = in(reg) to,
                stride = in(reg) stride,
                options(nostack, preserves_flags),
            );
        }
    }
}
