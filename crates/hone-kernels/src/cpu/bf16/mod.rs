//! Matrix products whose factors are rounded to bf16 and whose sums are f32.
//!
//! A factor may be f32 or bf16, in either layout; what is not yet rounded and packed is so as it is
//! multiplied, a part at a time, or as a whole where it is small. Sums are cut into runs by their
//! length and by what the factors are, and the result is cut into blocks by its shape, or where that
//! changes none of its bytes by the number of threads as well, on which no byte depends.
//!
//! There are two engines. [`Engine::Dot`] has the instruction for it, VDPBF16PS: two products and
//! their sum into each of 16 lanes, twice the rate of f32. It takes denormal factors for zero and
//! makes denormal sums zero (whatever lies below 2^-126); products of bf16 are exact in f32, and
//! Intel's manual as well as an AMD of the fifth Zen generation round after each of the two sums. A
//! row of the result has the same bytes whatever rows lie beside it, but for products with the columns
//! of a frozen weight, which is what a backward makes. On a machine with AMX it multiplies by tiles,
//! TDPBF16PS, which take denormal values for zero as well, but add in an order of their own: the same
//! is true of rows there, with other bytes. [`Engine::Widened`] rounds, widens to f32 again, and
//! multiplies as f32 is multiplied.

pub(super) mod attention;
mod dot;
mod few;
mod four;
mod packed;
mod pairs;
mod thin;
mod widened;

use std::ops::Range;

use half::bf16;

use super::buffer::ValuesMut;
use super::par::{SharedPtr, each_block};
use super::quant::Stack;
pub(super) use packed::PackedHalf;

/// Multiply-adds below which a product stays on the calling thread: about 10 microseconds.
const SERIAL_WORK: usize = 1 << 20;

/// Most values of a sum that are added up in registers, where a block packs its right factor: so
/// much of [`COLS_MAX`] columns takes half of a core's second cache.
const RUN_MAX: usize = 768;

/// The same for a frozen weight that lies packed: what is added up in registers is written once.
const RUN_PACKED_MAX: usize = 4096;

/// Columns of a block that packs its right factor.
const COLS_MAX: usize = 336;

/// Rows of a block of a large product, for which a block packs its right factor once.
const ROWS_MAX: usize = 512;

/// Rows of a block when there are too few blocks to go round.
const ROWS_MIN: usize = 128;

/// Columns up to which a block with a packed right factor has all of them, when its left one must be
/// rounded or turned.
const COLS_CONVERTED_MAX: usize = 2048;

/// Bytes of a result in f32 from which it is written past the caches: it will have left them when it is
/// read, and a line that is written as a whole need not be fetched first.
const STREAM_BYTES_MIN: usize = if cfg!(test) { 1 << 16 } else { 32 << 20 };

/// Blocks that are enough to go round, unevenly, among the usual numbers of cores.
const BLOCKS_ENOUGH: usize = 16;

/// Sides of blocks and lengths of runs are multiples of these, which the tiles divide.
const ROWS_ALIGN: usize = 16;
/// Three vectors.
const COLS_ALIGN: usize = 48;
/// Both, where two by two tiles multiply.
#[cfg(target_arch = "x86_64")]
const SQUARE_ALIGN: usize = 32;
/// Pairs along a sum are packed 16 at a time.
const RUN_ALIGN: usize = 32;

/// Most low-rank parts of one product: a map stacks three modules at most.
pub(super) const TAILS_MAX: usize = 4;

/// What multiplies.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Engine {
    /// The machine's own dot product of bf16 pairs; by tiles, where it has them.
    #[cfg(target_arch = "x86_64")]
    Dot(dot::Avx512Bf16, Option<dot::Amx>),
    /// Rounded factors widened to f32.
    Widened,
}

impl Engine {
    /// Every engine this machine has, the fastest first.
    pub(crate) fn all() -> Vec<Engine> {
        let mut engines = Vec::new();
        #[cfg(target_arch = "x86_64")]
        if let Some(proof) = dot::Avx512Bf16::detect() {
            engines.extend(dot::Amx::all(proof).into_iter().map(|amx| Engine::Dot(proof, amx)));
        }
        engines.push(Engine::Widened);
        engines
    }
}

impl Engine {
    /// What the sides of blocks are multiples of.
    fn align(self) -> (usize, usize) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Engine::Dot(_, Some(_)) => (SQUARE_ALIGN, SQUARE_ALIGN),
            _ => (ROWS_ALIGN, COLS_ALIGN),
        }
    }

    /// Blocks that are enough where each reads the whole right factor: two for each thread, if their
    /// sides do not matter to the bytes.
    fn blocks_enough(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Engine::Dot(..) => BLOCKS_ENOUGH.min(2 * rayon::current_num_threads()),
            Engine::Widened => BLOCKS_ENOUGH,
        }
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

/// What a product goes into: C <- alpha A B + beta C, its rows `stride` apart.
pub(super) struct Target<'a> {
    pub(super) values: ValuesMut<'a>,
    pub(super) stride: usize,
    pub(super) alpha: f32,
    pub(super) beta: f32,
    /// Values, dense, in place of C on the right; see [`adds_others`].
    pub(super) old: Option<&'a [f32]>,
}

impl Target<'_> {
    /// Checks that an (m, n) matrix lies inside the values, and says whether it has any.
    fn has(&self, m: usize, n: usize) -> bool {
        let has = m > 0 && n > 0;
        let len = match &self.values {
            ValuesMut::F32(values) => values.len(),
            ValuesMut::Bf16(values) => values.len(),
        };
        let fits = || (m - 1) * self.stride + n <= len;
        assert!(!has || fits() && (self.stride >= n || m == 1), "{m} x {n} leaves its buffer");
        has
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

impl<'a> Factor<'a> {
    /// The same lanes from `depth` on.
    fn from(self, depth: usize) -> Factor<'a> {
        let at = depth * self.depth_stride;
        let values = match self.values {
            Values::F32(values) => Values::F32(&values[at.min(values.len())..]),
            Values::Bf16(values) => Values::Bf16(&values[at.min(values.len())..]),
        };
        Factor { values, ..self }
    }

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

/// A frozen weight (out, in).
#[derive(Clone, Copy)]
pub(super) enum Frozen<'a> {
    Packed(&'a PackedHalf),
    /// Dequantised as it is packed; see [`takes_4bit`].
    FourBits(&'a Stack),
}

impl Frozen<'_> {
    /// Its rows and columns.
    fn sides(&self) -> (usize, usize) {
        match self {
            Frozen::Packed(half) => half.sides(),
            Frozen::FourBits(stack) => (stack.rows(), stack.inp()),
        }
    }

    /// Most values of a sum along its columns that are added up in registers.
    fn run_max(&self) -> usize {
        RUN_PACKED_MAX
    }
}

/// Whether a product with so many rows can be added to values that lie elsewhere.
pub(super) fn adds_others(engine: Engine, m: usize) -> bool {
    match engine {
        #[cfg(target_arch = "x86_64")]
        Engine::Dot(..) => m > few::ROWS_MAX,
        Engine::Widened => false,
    }
}

/// Whether products can read a weight of 4 bits as it is.
pub(super) fn takes_4bit(engine: Engine, stack: &Stack) -> bool {
    match engine {
        #[cfg(target_arch = "x86_64")]
        Engine::Dot(..) => stack.inp().is_multiple_of(four::RUN) && stack.rounds_to_bf16_once(),
        Engine::Widened => false,
    }
}

/// The right factor of a product.
#[derive(Clone, Copy)]
pub(super) enum Right<'a> {
    /// Packed as it is multiplied.
    Factor(Factor<'a>),
    /// A frozen weight whose rows are the columns of the factor.
    Rows(Frozen<'a>),
    /// A frozen weight whose columns are.
    Columns(Frozen<'a>),
    /// One of those above, packed for all blocks at once.
    #[cfg(target_arch = "x86_64")]
    Laid(dot::Laid<'a>),
}

impl Right<'_> {
    /// Most values of a sum that are added up in registers.
    fn run_max(&self) -> usize {
        match self {
            Right::Factor(_) => RUN_MAX,
            Right::Rows(weight) => weight.run_max(),
            // Where it cannot be packed as a whole, a block packs so much of it.
            Right::Columns(_) => RUN_MAX,
            #[cfg(target_arch = "x86_64")]
            Right::Laid(laid) => laid.run_max,
        }
    }

    /// Whether it lies as products read it.
    fn is_packed(&self) -> bool {
        match self {
            Right::Rows(Frozen::Packed(_)) => true,
            #[cfg(target_arch = "x86_64")]
            Right::Laid(_) => true,
            _ => false,
        }
    }

    /// Checks that it has so many columns of that depth.
    fn check(&self, cols: usize, depth: usize) {
        match self {
            Right::Factor(factor) => factor.check(cols, depth),
            Right::Rows(weight) => assert_eq!(weight.sides(), (cols, depth)),
            Right::Columns(weight) => assert_eq!(weight.sides(), (depth, cols)),
            #[cfg(target_arch = "x86_64")]
            Right::Laid(_) => {}
        }
    }
}

/// A low-rank part of a product: `scale` U V is added to some of its columns. U is rounded after it is
/// scaled.
#[derive(Clone, Copy)]
pub(super) struct Tail<'a> {
    /// (m, rank), its rows dense.
    pub(super) u: Factor<'a>,
    /// (rank, columns).
    pub(super) v: Factor<'a>,
    pub(super) rank: usize,
    /// The first of its columns and their number.
    pub(super) cols: (usize, usize),
    pub(super) scale: f32,
}

/// Rows of values that several threads write.
#[derive(Clone, Copy)]
enum Place {
    F32 { start: SharedPtr<f32>, stride: usize },
    Bf16 { start: SharedPtr<bf16>, stride: usize },
}

/// What a product is made of and goes into: C <- alpha A B + tails + beta C.
struct Job<'a> {
    k: usize,
    a: Factor<'a>,
    right: Right<'a>,
    tails: &'a [Tail<'a>],
    alpha: f32,
    beta: f32,
    /// What beta multiplies.
    old: Place,
    out: Place,
    /// Whether it is written past the caches.
    streams: bool,
}

/// `len` cut into equal parts of at most `max`, rounded up to a multiple of `align`.
fn even(len: usize, max: usize, align: usize) -> usize {
    len.div_ceil(len.div_ceil(max).max(1)).next_multiple_of(align).max(align)
}

/// Sides of the blocks into which an (m, n) result of depth `k` is cut. Those of
/// [`Engine::Dot`] do not change its bytes.
fn block_sides(
    engine: Engine,
    (m, n, k): (usize, usize, usize),
    a: Factor<'_>,
    right: Right<'_>,
) -> (usize, usize) {
    if m * n * k <= SERIAL_WORK {
        return (m, n);
    }
    if right.is_packed() {
        return packed_block_sides(engine, (m, n), a);
    }
    let align = engine.align();
    let (mut rows, mut cols) = (ROWS_MAX, even(n, COLS_MAX, align.1));
    while rows > ROWS_MIN && m.div_ceil(rows) * n.div_ceil(cols) < BLOCKS_ENOUGH {
        rows /= 2;
    }
    let n_down = m.div_ceil(rows);
    if n_down * n.div_ceil(cols) < BLOCKS_ENOUGH && m <= ROWS_MIN {
        cols = even(n, n.div_ceil(BLOCKS_ENOUGH / n_down), align.1).min(cols);
    }
    (even(m, rows, align.0), cols)
}

/// The same, where nothing of the right factor is packed again in a narrow or a low block. What is
/// rounded or turned of the left one is so in each block across.
fn packed_block_sides(engine: Engine, (m, n): (usize, usize), a: Factor<'_>) -> (usize, usize) {
    let align = engine.align();
    let reads = a.depth_stride == 1 && matches!(a.values, Values::Bf16(_));
    if !reads && n <= COLS_CONVERTED_MAX {
        let rows = m.div_ceil(engine.blocks_enough()).min(ROWS_MIN);
        return (even(m, rows, align.0), n);
    }
    let rows = if m >= ROWS_MIN * BLOCKS_ENOUGH && n <= COLS_CONVERTED_MAX {
        ROWS_MIN
    } else {
        ROWS_MAX / 2
    };
    let n_across = BLOCKS_ENOUGH.div_ceil(m.div_ceil(rows));
    (even(m, rows, align.0), even(n, n.div_ceil(n_across), align.1))
}

/// The runs into which sums of `k` terms are cut; one without terms where `k` is 0.
fn runs(k: usize, max: usize) -> impl Iterator<Item = Range<usize>> {
    let len = even(k, max, RUN_ALIGN);
    (0..k.div_ceil(len).max(1)).map(move |run| run * len..k.min((run + 1) * len))
}

/// Checks the sides of all factors.
fn check((m, n, k): (usize, usize, usize), a: Factor<'_>, right: Right<'_>, tails: &[Tail<'_>]) {
    a.check(m, k);
    right.check(n, k);
    assert!(tails.len() <= TAILS_MAX);
    for tail in tails {
        tail.u.check(m, tail.rank);
        tail.v.check(tail.cols.1, tail.rank);
        assert!(tail.cols.0 + tail.cols.1 <= n && tail.u.depth_stride == 1);
    }
}

/// `C (m, n) <- alpha A (m, k) B (k, n) + tails + beta C`.
pub(super) fn product(
    engine: Engine,
    (m, n, k): (usize, usize, usize),
    a: Factor<'_>,
    right: Right<'_>,
    tails: &[Tail<'_>],
    c: Target<'_>,
) {
    if !c.has(m, n) {
        return;
    }
    check((m, n, k), a, right, tails);
    assert!(tails.is_empty() || c.alpha == 1.0);
    let Target { values, stride, alpha, beta, old } = c;
    assert!(old.is_none_or(|old| adds_others(engine, m) && old.len() == m * n));
    let out = match values {
        ValuesMut::F32(values) => Place::F32 { start: SharedPtr(values.as_mut_ptr()), stride },
        ValuesMut::Bf16(values) => Place::Bf16 { start: SharedPtr(values.as_mut_ptr()), stride },
    };
    // Read, and never written.
    let old = old.map(|old| Place::F32 { start: SharedPtr(old.as_ptr().cast_mut()), stride: n });
    #[cfg(target_arch = "x86_64")]
    if let (Engine::Dot(proof, amx), Right::Rows(weight), []) = (engine, right, tails)
        && m <= few::ROWS_MAX
        && a.depth_stride == 1
        // Between runs it holds sums in the result, where bf16 would round them.
        && (matches!(out, Place::F32 { .. }) || k <= weight.run_max())
    {
        return few::product((proof, amx), a, m, weight, (alpha, beta), out);
    }
    #[cfg(target_arch = "x86_64")]
    if let (Engine::Dot(proof, _), Right::Factor(b), [], None) = (engine, right, tails, old)
        && thin::takes((m, n), a, b)
    {
        return thin::product(proof, (m, n, k), (a, b), (alpha, beta), out);
    }
    // The part of all sums over `depth`; parts are made one after the other.
    let run = |right: Right<'_>, depth: Range<usize>| {
        let (is_first, is_last) = (depth.start == 0, depth.end == k);
        let a = a.from(depth.start);
        let (beta, tails) = (if is_first { beta } else { 1.0 }, if is_last { tails } else { &[] });
        let old = old.filter(|_| is_first).unwrap_or(out);
        let size = m * n * size_of::<f32>();
        let streams = is_first && is_last && beta == 0.0 && size >= STREAM_BYTES_MIN;
        let job = Job { k: depth.len(), a, right, tails, alpha, beta, old, out, streams };
        each_block(
            (m, n),
            block_sides(engine, (m, n, job.k), a, right),
            |rows, cols| match engine {
                #[cfg(target_arch = "x86_64")]
                Engine::Dot(proof, amx) => dot::block(proof, amx, &job, rows, cols),
                Engine::Widened => widened::block(&job, rows, cols),
            },
        );
    };
    match engine {
        #[cfg(target_arch = "x86_64")]
        Engine::Dot(proof, _) if m > ROWS_MIN => {
            let may_slice = matches!(out, Place::F32 { .. });
            dot::laid(proof, right, (n, k), may_slice, run);
        }
        _ => run(right, 0..k),
    }
}
