//! Squares of sums in tiles.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::super::Factor;
use super::super::super::packed::{GROUP, Pairs};
use super::super::super::pairs::{rows_to_pairs, square, store, turn};
use super::super::ahead::Ahead;
use super::super::tile::{Ends, Groups, Lines, Part, Shape, write};
use super::super::{PARTS_MAX, lines_in_place, room, values_of};
use super::SIDE;
use super::tiles::Tiles;

/// Bytes from a row of a tile to the next, where rows lie side by side.
const ROW: usize = size_of::<Pairs>();

/// A tile of the right factor that is not full: pairs, and zeros behind them.
type Rest = [Pairs; GROUP];

/// Sums as they leave the tiles.
#[repr(align(64))]
struct Sums([[f32; SIDE]; SIDE]);

/// Lines of the left factor along a run, as tiles can be read from them: where they are, if they fill
/// tiles, or else rounded into `to`, times `scale`, and filled up with zeros along the run. Lines that
/// fill up the last tile hold anything.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
pub(in super::super) fn lines<'a>(
    a: Factor<'a>,
    rows: Range<usize>,
    run: Range<usize>,
    scale: f32,
    to: &'a mut Vec<Pairs>,
) -> Lines<'a> {
    let is_full = rows.len().is_multiple_of(GROUP) && run.len().is_multiple_of(2 * GROUP);
    if is_full && let Some(lines) = lines_in_place(a, &rows, &run, scale) {
        return lines;
    }
    let pitch = run.len().div_ceil(2 * GROUP);
    let to = room(to, rows.len().next_multiple_of(GROUP) * pitch);
    if a.depth_stride == 1 {
        rows_to_pairs(a, rows, run, scale, to);
    } else {
        assert!(scale == 1.0, "a factor that is turned is not scaled");
        pack_rows(a, rows, run, to);
    }
    Lines { values: values_of(to), shape: Shape::Rows(pitch * 2 * GROUP) }
}

/// Packs lanes of a factor whose sums do not run along them, each lane's pairs side by side, in whole
/// vectors.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
fn pack_rows(x: Factor<'_>, lanes: Range<usize>, run: Range<usize>, to: &mut [Pairs]) {
    let pitch = run.len().div_ceil(2 * GROUP);
    let groups = lanes.clone().step_by(GROUP).zip(to.chunks_mut((GROUP * pitch).max(1)));
    for (start, to) in groups {
        let group = start..lanes.end.min(start + GROUP);
        for (nth, l) in run.clone().step_by(2 * GROUP).enumerate() {
            let part = l..run.end.min(l + 2 * GROUP);
            let pairs = turn(square(x, group.clone(), part));
            for (to, pairs) in to[nth..].iter_mut().step_by(pitch).zip(pairs) {
                store(to, pairs);
            }
        }
    }
}

/// All squares of a panel of at most [`SIDE`] columns, whose groups start at `group`, in a strip of
/// rows; `ahead` is asked for meanwhile. The left factors are [`lines`].
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
pub(super) fn panel_rows<T: Tiles>(
    tiles: &mut T,
    parts: &[Part<'_>],
    group: usize,
    strip: &Range<usize>,
    cols: Range<usize>,
    ends: Ends,
    mut ahead: [Ahead; 2],
) {
    assert!(cols.len() <= SIDE);
    let n_cols = cols.len().div_ceil(GROUP);
    let mut rests = [[[Pairs([0; GROUP]); GROUP]; 2]; PARTS_MAX];
    for (part, rests) in parts.iter().zip(&mut rests) {
        let Groups { pairs, pitch, n_pairs } = part.right;
        let n_rest = n_pairs % GROUP;
        for (g, rest) in rests[..n_cols].iter_mut().enumerate() {
            let end = (group + g) * pitch + n_pairs;
            rest[..n_rest].copy_from_slice(&pairs[end - n_rest..end]);
        }
    }
    let n_asks = strip.len().div_ceil(SIDE) * parts[0].right.n_pairs.div_ceil(GROUP);
    let mut ask = Ask { quotas: [ahead[0].quota(n_asks), ahead[1].quota(n_asks)], of: &mut ahead };
    let mut sums = Sums([[0.0; SIDE]; SIDE]);
    for row in strip.clone().step_by(SIDE) {
        let at = (group, row - strip.start);
        let n_rows = SIDE.min(strip.end - row);
        let size = (n_rows.div_ceil(GROUP), n_cols);
        match size {
            (1, 1) => add_up::<T, 1, 1>(tiles, parts, &rests, at, &mut ask, &mut sums),
            (1, _) => add_up::<T, 1, 2>(tiles, parts, &rests, at, &mut ask, &mut sums),
            (_, 1) => add_up::<T, 2, 1>(tiles, parts, &rests, at, &mut ask, &mut sums),
            (_, _) => add_up::<T, 2, 2>(tiles, parts, &rests, at, &mut ask, &mut sums),
        }
        for (r, sums) in sums.0[..n_rows].iter().enumerate() {
            for (start, sums) in cols.clone().step_by(GROUP).zip(sums.chunks_exact(GROUP)) {
                // SAFETY: the slice has as many values as a vector.
                let sums = unsafe { _mm512_loadu_ps(sums.as_ptr()) };
                write(row + r, start..cols.end.min(start + GROUP), sums, ends);
            }
        }
    }
}

/// What is asked for, and how many lines of it with every step along the first part.
struct Ask<'a> {
    of: &'a mut [Ahead; 2],
    quotas: [usize; 2],
}

/// `sums` <- a square of `ROWS` by `COLS` tiles of all parts: columns from group `group` on, rows from
/// line `line` of the left factors on.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
fn add_up<T: Tiles, const ROWS: usize, const COLS: usize>(
    tiles: &mut T,
    parts: &[Part<'_>],
    rests: &[[Rest; 2]; PARTS_MAX],
    (group, line): (usize, usize),
    ask: &mut Ask<'_>,
    Sums(sums): &mut Sums,
) {
    tiles.zero::<0>();
    tiles.zero::<1>();
    tiles.zero::<2>();
    tiles.zero::<3>();
    for (nth, (part, rests)) in parts.iter().zip(rests).enumerate() {
        let Groups { pairs, pitch, n_pairs } = part.right;
        let Shape::Rows(len) = part.left.shape else {
            unreachable!("`lines` makes rows");
        };
        if n_pairs == 0 {
            continue;
        }
        let n_steps = n_pairs.div_ceil(GROUP);
        // What the unchecked reads below rely on.
        let values = &part.left.values[line * len..];
        assert!((ROWS * GROUP - 1) * len + n_steps * 2 * GROUP <= values.len());
        assert!((group + COLS - 1) * pitch + n_pairs <= pairs.len());
        let (mut left, stride) = (values.as_ptr().cast::<u8>(), len * size_of::<u16>());
        let mut right: [*const u8; 2] =
            std::array::from_fn(|g| pairs[(group + g.min(COLS - 1)) * pitch..].as_ptr().cast());
        for step in 0..n_steps {
            if (step + 1) * GROUP > n_pairs {
                right = [rests[0].as_ptr().cast(), rests[1].as_ptr().cast()];
            }
            // SAFETY: so many rows have as many steps, a tile of pairs lies there for each whole one,
            // and the rest is a tile; see above.
            unsafe { step_up::<T, ROWS, COLS>(tiles, (left, stride), right) };
            left = left.wrapping_add(ROW);
            right = right.map(|right| right.wrapping_add(GROUP * ROW));
            if nth == 0 {
                for (ahead, quota) in ask.of.iter_mut().zip(ask.quotas) {
                    ahead.ask(quota);
                }
            }
        }
    }
    const STRIDE: usize = SIDE * size_of::<f32>();
    let first = sums.as_mut_ptr().cast::<u8>();
    let to = |row: usize, col: usize| first.wrapping_add(row * STRIDE + col * size_of::<f32>());
    // SAFETY: the square has 16 rows of 16 values from each of these places on.
    unsafe {
        tiles.store::<0>(to(0, 0), STRIDE);
        tiles.store::<1>(to(0, GROUP), STRIDE);
        tiles.store::<2>(to(GROUP, 0), STRIDE);
        tiles.store::<3>(to(GROUP, GROUP), STRIDE);
    }
}

/// Adds the products of 16 pairs along the sums.
///
/// # Safety
///
/// There must be `ROWS * 16` rows of 64 bytes of the left factor, a stride apart, and in each of the
/// first `COLS` places a tile of the right one.
#[inline(always)]
unsafe fn step_up<T: Tiles, const ROWS: usize, const COLS: usize>(
    tiles: &mut T,
    (left, stride): (*const u8, usize),
    right: [*const u8; 2],
) {
    // SAFETY: the caller's.
    unsafe {
        tiles.load::<6>(right[0], ROW);
        tiles.load::<4>(left, stride);
        tiles.multiply::<0, 4, 6>();
        if COLS == 2 {
            tiles.load::<7>(right[1], ROW);
            tiles.multiply::<1, 4, 7>();
        }
        if ROWS == 2 {
            tiles.load::<5>(left.wrapping_add(GROUP * stride), stride);
            tiles.multiply::<2, 5, 6>();
            if COLS == 2 {
                tiles.multiply::<3, 5, 7>();
            }
        }
    }
}
