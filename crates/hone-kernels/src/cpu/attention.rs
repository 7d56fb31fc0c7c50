//! Attention by tiles, after FlashAttention-2 (Dao 2023): online softmax forward, probabilities
//! recomputed from the log-sum-exp backward.
//!
//! Scores are held transposed, (keys, queries), in blocks of eight keys by two vectors of queries
//! that never leave the nearest cache: the running maximum and sum of a query are lanes of a
//! vector, and gradients of keys read probabilities as they lie. What is multiplied is first packed
//! in the order in which registers are loaded, a tile of keys once for all query heads that share
//! it, and blocks that the mask hides are left out.
//!
//! Everything is written once, generic over [`super::tile::Factors`]: factors are f32, or pairs of
//! bf16 ([`super::bf16::attention`]). Softmax and its slopes are f32 in both.

mod backward;
mod forward;
mod pack;
mod ranges;

pub(super) use backward::backward;
pub(super) use forward::forward;
pub(super) use ranges::Saved;

/// What another kind of factors is put into.
#[cfg(target_arch = "x86_64")]
pub(super) mod tasks {
    pub(in crate::cpu) use super::backward::run_task as run_backward;
    pub(in crate::cpu) use super::forward::{
        Task as ForwardTask, Work as ForwardWork, each_task as each_forward,
        run_task as run_forward,
    };
    pub(in crate::cpu) use super::ranges::{
        Task as BackwardTask, Work as BackwardWork, each_task as each_backward,
    };
}

use super::simd::{Simd, tanh};
use crate::{AttnMask, Heads};

/// The layout of the packed buffer, and what a query may see.
#[derive(Clone, Copy)]
pub(super) struct Plan {
    pub(super) heads: Heads,
    pub(super) mask: AttnMask,
}

impl Plan {
    /// Columns of the query, key and value of a query head.
    fn columns(&self, head: usize) -> [usize; 3] {
        let Heads { n_q, n_kv, dim } = self.heads;
        let kv = head / (n_q / n_kv);
        [head * dim, (n_q + kv) * dim, (n_q + n_kv + kv) * dim]
    }

    /// The first key that query `i` sees.
    pub(super) fn first_key(&self, i: usize) -> usize {
        self.mask.window.map_or(0, |w| (i + 1).saturating_sub(w))
    }

    /// One past the last query of `len` that sees key `j`.
    fn end_query(&self, j: usize, len: usize) -> usize {
        self.mask.window.map_or(len, |w| j.saturating_add(w).min(len))
    }
}

/// A result of several tasks, each of which writes columns of rows that no other touches.
#[derive(Clone, Copy)]
struct Columns<O> {
    start: *mut O,
    /// Values of the result, and of a row.
    len: usize,
    stride: usize,
}

// SAFETY: it is only a number; every use of `row` states why its parts are disjoint.
#[allow(unsafe_code, reason = "tasks write disjoint columns of the same rows")]
unsafe impl<O: Send> Send for Columns<O> {}
// SAFETY: as above.
#[allow(unsafe_code, reason = "tasks write disjoint columns of the same rows")]
unsafe impl<O: Send> Sync for Columns<O> {}

impl<O> Columns<O> {
    fn new(values: &mut [O], stride: usize) -> Self {
        Columns { start: values.as_mut_ptr(), len: values.len(), stride }
    }

    /// `n` values of a row from a column on.
    ///
    /// # Safety
    ///
    /// The result is still there, and nobody else holds any of these values: a task asks for its
    /// own columns and rows alone, one piece at a time.
    #[allow(unsafe_code, reason = "tasks write disjoint columns of the same rows")]
    #[allow(clippy::mut_from_ref, reason = "a piece of what the tasks share")]
    unsafe fn row(&self, row: usize, col: usize, n: usize) -> &mut [O] {
        let at = row * self.stride + col;
        assert!(col + n <= self.stride && at + n <= self.len);
        // SAFETY: the piece lies within the result, and is the caller's alone.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), n) }
    }
}

/// `cap tanh(x / cap)` and its slope, 1 - tanh^2.
#[inline(always)]
pub(super) fn soft_cap<S: Simd>(s: S, cap: f32, x: S::V) -> (S::V, S::V) {
    let (t, one) = (tanh(s, s.mul(x, s.splat(1.0 / cap))), s.splat(1.0));
    (s.mul(s.splat(cap), t), s.mul(s.sub(one, t), s.add(one, t)))
}
