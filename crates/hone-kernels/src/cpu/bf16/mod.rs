//! Matrix products whose factors are rounded to bf16 and whose sums are f32.
//!
//! A factor may be f32 or bf16, in either layout; it is rounded and packed as it is multiplied, a
//! part at a time, so that nothing but the weights themselves stays in memory. The result is cut
//! into blocks by its shape and the sums into runs by their length, so that the bytes do not depend
//! on the number of threads.
//!
//! There are two engines. [`Engine::Dot`] has the instruction for it, VDPBF16PS: two products and
//! their sum into each of 16 lanes, twice the rate of f32. It takes denormal factors for zero and
//! makes denormal sums zero (whatever lies below 2^-126); products of bf16 are exact in f32, and
//! Intel's manual as well as an AMD of the fifth Zen generation round after each of the two sums. A
//! row of the result has the same bytes whatever rows lie beside it. [`Engine::Widened`] rounds,
//! widens to f32 again, and multiplies as f32 is multiplied.

pub(super) mod attention;
mod dot;
mod pairs;
mod widened;

use half::bf16;

use super::matmul::Target;
use super::par::{SharedPtr, each_block};

/// Multiply-adds below which a product stays on the calling thread: about 10 microseconds.
const SERIAL_WORK: usize = 1 << 20;

/// Most values of a sum that are added up in registers; then the block goes to memory and the next
/// run is added to it. A packed block of B, this deep and [`COLS_MAX`] wide, is 576 KiB of bf16: it
/// stays in a core's second cache beside what streams through.
const RUN_MAX: usize = 768;

/// Columns of a block. A block packs its part of A for itself: with fewer columns that would show.
const COLS_MAX: usize = 384;

/// Rows of a block of a large product. A block packs its part of B for itself, too.
const ROWS_MAX: usize = 512;

/// Rows of a block when there are too few blocks to go round.
const ROWS_MIN: usize = 128;

/// Blocks that are enough to go round, unevenly, among the usual numbers of cores.
const BLOCKS_ENOUGH: usize = 16;

/// Sides of blocks and lengths of runs are multiples of these, which the tiles divide.
const ROWS_ALIGN: usize = 16;
/// Three vectors.
const COLS_ALIGN: usize = 48;
/// Pairs along a sum are packed 16 at a time.
const RUN_ALIGN: usize = 32;

/// What multiplies.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Engine {
    /// The machine's own dot product of bf16 pairs.
    #[cfg(target_arch = "x86_64")]
    Dot(dot::Avx512Bf16),
    /// Rounded factors widened to f32.
    Widened,
}

impl Engine {
    /// Every engine this machine has, the fastest first.
    pub(crate) fn all() -> Vec<Engine> {
        let mut engines = Vec::new();
        #[cfg(target_arch = "x86_64")]
        engines.extend(dot::Avx512Bf16::detect().map(Engine::Dot));
        engines.push(Engine::Widened);
        engines
    }
}

/// The values of a factor.
#[derive(Clone, Copy)]
pub(super) enum Values<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

impl Values<'_> {
    fn len(&self) -> usize {
        match self {
            Values::F32(values) => values.len(),
            Values::Bf16(values) => values.len(),
        }
    }
}

/// A factor: its lanes are the rows of A or the columns of B, and the sums run along its depth.
/// Value l of lane i lies at `i * lane_stride + l * depth_stride`; one of the strides is 1.
#[derive(Clone, Copy)]
pub(super) struct Factor<'a> {
    pub(super) values: Values<'a>,
    pub(super) lane_stride: usize,
    pub(super) depth_stride: usize,
}

impl Factor<'_> {
    /// Checks that it has so many lanes of that depth.
    fn check(&self, lanes: usize, depth: usize) {
        assert!(
            self.lane_stride == 1 || self.depth_stride == 1,
            "neither lanes nor sums lie dense"
        );
        if lanes > 0 && depth > 0 {
            let last = (lanes - 1) * self.lane_stride + (depth - 1) * self.depth_stride;
            assert!(last < self.values.len(), "a factor of {lanes} x {depth} leaves its buffer");
        }
    }
}

/// A block of the result, in the rows of C.
struct Block {
    rows: std::ops::Range<usize>,
    cols: std::ops::Range<usize>,
    alpha: f32,
    beta: f32,
}

/// The result, whose blocks several threads write.
#[derive(Clone, Copy)]
struct Out {
    start: SharedPtr,
    stride: usize,
}

/// `len` cut into equal parts of at most `max`, rounded up to a multiple of `align`.
fn even(len: usize, max: usize, align: usize) -> usize {
    len.div_ceil(len.div_ceil(max).max(1)).next_multiple_of(align).max(align)
}

/// Sides of the blocks into which an (m, n) result of depth `k` is cut.
fn block_sides(m: usize, n: usize, k: usize) -> (usize, usize) {
    if m * n * k <= SERIAL_WORK {
        return (m, n);
    }
    let cols = even(n, COLS_MAX, COLS_ALIGN);
    let (mut rows, n_across) = (ROWS_MAX, n.div_ceil(cols));
    while rows > ROWS_MIN && m.div_ceil(rows) * n_across < BLOCKS_ENOUGH {
        rows /= 2;
    }
    (even(m, rows, ROWS_ALIGN), cols)
}

/// The runs into which sums of `k` terms are cut; one without terms where `k` is 0.
fn runs(k: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let len = even(k, RUN_MAX, RUN_ALIGN);
    (0..k.div_ceil(len).max(1)).map(move |run| run * len..k.min((run + 1) * len))
}

/// `C (m, n) <- alpha A (m, k) B (k, n) + beta C`.
pub(super) fn product(
    engine: Engine,
    (m, n, k): (usize, usize, usize),
    a: Factor<'_>,
    b: Factor<'_>,
    c: Target<'_>,
) {
    if !c.has(m, n) {
        return;
    }
    a.check(m, k);
    b.check(n, k);
    let Target { values, stride, alpha, beta } = c;
    let out = Out { start: SharedPtr(values.as_mut_ptr()), stride };
    each_block((m, n), block_sides(m, n, k), |rows, cols| {
        let block = Block { rows, cols, alpha, beta };
        match engine {
            #[cfg(target_arch = "x86_64")]
            Engine::Dot(proof) => dot::block(proof, block, k, a, b, out),
            Engine::Widened => widened::block(block, k, a, b, out),
        }
    });
}
