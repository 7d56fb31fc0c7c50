//! How the tiles of attention lie in memory: rows of tokens as factors of products, and scratch.
//!
//! A head's columns of some tokens are packed in two ways. [`turned`]: lanes are tokens and sums
//! run along the head's width, for scores. [`down`]: lanes run along the head's width and sums over
//! the tokens, for what scores are multiplied by. What is missing at either end is zero.

use std::cell::Cell;

use super::super::simd::{MAX_LANES, Simd};
use super::super::tile::{Factors, Lanes, Stored};

/// Some tokens' columns of one head: value c of token t lies at `data[t * stride + c]`.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a, T> {
    pub(super) data: &'a [T],
    pub(super) stride: usize,
    /// Tokens.
    pub(super) n: usize,
    /// The head's width.
    pub(super) dim: usize,
}

impl<'a, T> Rows<'a, T> {
    /// `n` tokens from token `t` and column `c` on.
    #[inline(always)]
    pub(super) fn behind(self, t: usize, c: usize, n: usize) -> Rows<'a, T> {
        Rows { data: &self.data[t * self.stride + c..], n, ..self }
    }

    /// At most a vector of the values of token `t` from column `c` on.
    #[inline(always)]
    fn load<F: Factors>(&self, f: F, t: usize, c: usize) -> Lanes<F>
    where
        T: Stored<F>,
    {
        if t >= self.n || c >= self.dim {
            return f.simd().splat(0.0);
        }
        T::load(f, &self.data[t * self.stride + c..t * self.stride + self.dim])
    }

    /// A vector of the values of token `t` from column `c` on.
    ///
    /// # Safety
    ///
    /// [`Rows::check`] was called, t < n, and c + LANES <= dim.
    #[inline(always)]
    #[allow(unsafe_code, reason = "`check` has checked the bounds once for all")]
    unsafe fn load_whole<F: Factors>(&self, f: F, t: usize, c: usize) -> Lanes<F>
    where
        T: Stored<F>,
    {
        let at = t * self.stride + c;
        // SAFETY: the last token ends at (n - 1) * stride + dim, for which `check` has checked the
        // length.
        T::load(f, unsafe { self.data.get_unchecked(at..at + F::S::LANES) })
    }

    /// Checks that all tokens are there, on which unchecked reads rely.
    #[inline(always)]
    fn check(&self) {
        assert!(self.n == 0 || (self.n - 1) * self.stride + self.dim <= self.data.len());
    }

    /// Asks for the tokens: they lie far apart, which no processor sees coming.
    #[inline(always)]
    #[allow(unsafe_code, reason = "asking for memory is unsafe to call without a proof")]
    pub(super) fn ask_for(&self) {
        #[cfg(target_arch = "x86_64")]
        for t in 0..self.n {
            for c in (0..self.dim).step_by(LINE * size_of::<f32>() / size_of::<T>()) {
                use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
                let from = self.data.as_ptr().wrapping_add(t * self.stride + c);
                // SAFETY: every machine of this architecture has the instruction; an address is
                // named, and nothing read: it may be any.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(from.cast()) };
            }
        }
    }
}

/// The sides of packed tiles of heads of one width.
#[derive(Clone, Copy)]
pub(super) struct Sides {
    /// Slots along the width.
    pub(super) depth: usize,
    /// The same up to whole vectors: rows of a turned tile.
    pub(super) turned_rows: usize,
    /// The width up to whole vectors: columns of a tile packed down.
    pub(super) width: usize,
}

impl Sides {
    pub(super) fn new<F: Factors>(dim: usize) -> Self {
        let depth = dim.div_ceil(F::PER_SLOT);
        let whole = |n: usize| n.next_multiple_of(F::S::LANES);
        Sides { depth, turned_rows: whole(depth), width: whole(dim) }
    }
}

/// `to` (turned_rows, pitch) <- rows, `pitch` of them, as columns of slots.
#[inline(always)]
#[allow(unsafe_code, reason = "whole tiles are read without a check of each value")]
pub(super) fn turned<F: Factors, T: Stored<F>>(
    f: F,
    rows: Rows<'_, T>,
    sides: Sides,
    pitch: usize,
    to: &mut [f32],
) {
    rows.check();
    let (s, lanes) = (f.simd(), F::S::LANES);
    let to = &mut to[..sides.turned_rows * pitch];
    for token in (0..pitch).step_by(lanes) {
        for slot in (0..sides.turned_rows).step_by(lanes) {
            let at = slot * F::PER_SLOT;
            let n = rows.n.saturating_sub(token).min(lanes);
            let mut square = [s.splat(0.0); MAX_LANES];
            if n == lanes && at + lanes * F::PER_SLOT <= rows.dim {
                for (i, v) in square.iter_mut().enumerate().take(lanes) {
                    // SAFETY: token + i < n and at + (half + 1) * lanes <= dim; `check` was called.
                    *v =
                        f.along(|half| unsafe { rows.load_whole(f, token + i, at + half * lanes) });
                }
            } else if at + lanes * F::PER_SLOT <= rows.dim {
                for (i, v) in square.iter_mut().enumerate().take(n) {
                    // SAFETY: as above.
                    *v =
                        f.along(|half| unsafe { rows.load_whole(f, token + i, at + half * lanes) });
                }
            } else {
                for (i, v) in square.iter_mut().enumerate().take(n) {
                    *v = f.along(|half| rows.load(f, token + i, at + half * lanes));
                }
            }
            s.turn(&mut square);
            for (i, &v) in square.iter().enumerate().take(lanes) {
                s.store(&mut to[(slot + i) * pitch + token..], v);
            }
        }
    }
}

/// `to` (n_rows / PER_SLOT, width) <- the first `n_rows` rows, neighbours in one slot.
#[inline(always)]
#[allow(unsafe_code, reason = "whole tiles are read without a check of each value")]
pub(super) fn down<F: Factors, T: Stored<F>>(
    f: F,
    rows: Rows<'_, T>,
    sides: Sides,
    n_rows: usize,
    to: &mut [f32],
) {
    rows.check();
    let (s, lanes) = (f.simd(), F::S::LANES);
    let lines = to.chunks_exact_mut(sides.width).take(n_rows.div_ceil(F::PER_SLOT));
    for (slot, line) in lines.enumerate() {
        let token = slot * F::PER_SLOT;
        for c in (0..sides.width).step_by(lanes) {
            let v = if token + F::PER_SLOT <= rows.n && c + lanes <= rows.dim {
                // SAFETY: token + i < n and c + lanes <= dim; `check` was called above.
                f.across(|i| unsafe { rows.load_whole(f, token + i, c) })
            } else {
                f.across(|i| rows.load(f, token + i, c))
            };
            s.store(&mut line[c..], v);
        }
    }
}

/// `to[t]` <- the scalar product of rows t of `a` and `b`, 0 where there is none.
#[inline(always)]
#[allow(unsafe_code, reason = "whole tiles are read without a check of each value")]
pub(super) fn dots<F: Factors, T: Stored<F>>(f: F, a: Rows<'_, T>, b: Rows<'_, T>, to: &mut [f32]) {
    a.check();
    b.check();
    let (s, lanes) = (f.simd(), F::S::LANES);
    for (group, to) in to.chunks_exact_mut(lanes).enumerate() {
        let mut square = [s.splat(0.0); MAX_LANES];
        let n = a.n.saturating_sub(group * lanes).min(lanes);
        for (i, sum) in square.iter_mut().enumerate().take(n) {
            for c in (0..a.dim).step_by(lanes) {
                let t = group * lanes + i;
                let (a, b) = if t < a.n.min(b.n) && c + lanes <= a.dim.min(b.dim) {
                    // SAFETY: t < n and c + lanes <= dim of both; `check` was called above.
                    unsafe { (a.load_whole(f, t, c), b.load_whole(f, t, c)) }
                } else {
                    (a.load(f, t, c), b.load(f, t, c))
                };
                *sum = s.fma(a, b, *sum);
            }
        }
        s.turn(&mut square);
        let mut sum = square[0];
        for &v in &square[1..lanes] {
            sum = s.add(sum, v);
        }
        s.store(to, sum);
    }
}

/// Two vectors of hidden, two of visible, and two of hidden queries.
static EDGES: [f32; 6 * MAX_LANES] = {
    let mut edges = [f32::NEG_INFINITY; 6 * MAX_LANES];
    let mut i = 2 * MAX_LANES;
    while i < 4 * MAX_LANES {
        edges[i] = f32::INFINITY;
        i += 1;
    }
    edges
};

/// The bounds of the scores of a panel, two vectors, of which only `from .. to` are visible:
/// infinity there, minus infinity elsewhere.
#[inline(always)]
pub(super) fn edges<S: Simd>(s: S, from: usize, to: usize) -> [S::V; 2] {
    let panel = 2 * S::LANES;
    let visible_from = &EDGES[2 * MAX_LANES - from.min(panel)..];
    let visible_to = &EDGES[4 * MAX_LANES - to.min(panel)..];
    let low = s.min(s.load(visible_from), s.load(visible_to));
    let (visible_from, visible_to) = (&visible_from[S::LANES..], &visible_to[S::LANES..]);
    [low, s.min(s.load(visible_from), s.load(visible_to))]
}

/// Values of a cache line.
const LINE: usize = 16;

thread_local! {
    /// What the tiles of a task lie in; kept from call to call.
    static SCRATCH: Cell<Vec<f32>> = Cell::default();
}

/// Calls `run` with this thread's scratch, which is whatever was left there.
pub(super) fn with_scratch(run: impl FnOnce(&mut Vec<f32>)) {
    // Taken, not borrowed, so that nothing depends on what a thread does in between.
    let mut scratch = SCRATCH.take();
    run(&mut scratch);
    SCRATCH.set(scratch);
}

/// Pieces of scratch, each aligned to a cache line.
pub(super) fn carve<const M: usize, const N: usize>(
    scratch: &mut Vec<f32>,
    sizes: [[usize; N]; M],
) -> [[&mut [f32]; N]; M] {
    let sizes = sizes.map(|sizes| sizes.map(|n| n.next_multiple_of(LINE)));
    let needed = sizes.iter().flatten().sum::<usize>() + LINE;
    if scratch.len() < needed {
        *scratch = vec![0.0; needed];
    }
    let start = scratch.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
    let mut rest = &mut scratch[start..];
    sizes.map(|sizes| {
        sizes.map(|n| {
            let (piece, behind) = std::mem::take(&mut rest).split_at_mut(n);
            rest = behind;
            piece
        })
    })
}
