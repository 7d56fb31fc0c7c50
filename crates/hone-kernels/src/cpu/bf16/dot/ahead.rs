//! What tiles will read next, on its way from memory meanwhile.
//!
//! A tile of the result reads a panel of the right factor and rows of the left one, all of them again
//! and again but for the first time, which waits for memory: a processor does not look as far ahead as
//! the next panel, nor over the end of a row. So every tile asks for its share of both.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::packed::Pairs;
use super::super::{Factor, Values};
use super::tile::Groups;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Rows of memory that are asked for, a cache line at a time. Addresses are named, and nothing read, so
/// that they may be any.
#[derive(Clone, Copy)]
pub(in super::super) struct Ahead {
    /// Where the current row begins.
    row: *const u8,
    /// Lines of a row, and of the current one those that were asked for.
    row_lines: usize,
    done: usize,
    /// Bytes from a row to the next.
    stride: usize,
    n_rows: usize,
}

impl Ahead {
    /// Nothing.
    pub(in super::super) const NONE: Ahead =
        Ahead { row: std::ptr::null(), row_lines: 0, done: 0, stride: 0, n_rows: 0 };

    /// The `n` groups of the panel that begins at `group`, as far as there are some.
    pub(in super::super) fn groups(right: Groups<'_>, group: usize, n: usize) -> Self {
        let at = group * right.pitch;
        let n_left = right.pairs.len().saturating_sub(at);
        if n_left < right.n_pairs || right.n_pairs == 0 {
            return Ahead::NONE;
        }
        let n_groups = n.min((n_left - right.n_pairs) / right.pitch.max(1) + 1);
        Ahead {
            row: right.pairs[at..].as_ptr().cast(),
            row_lines: right.n_pairs * size_of::<Pairs>() / LINE,
            done: 0,
            stride: right.pitch * size_of::<Pairs>(),
            n_rows: n_groups,
        }
    }

    /// Rows of the left factor along a run, where its sums run along its rows.
    pub(super) fn rows(a: Factor<'_>, rows: Range<usize>, run: Range<usize>) -> Self {
        if a.depth_stride != 1 {
            return Ahead::NONE;
        }
        let first = rows.start * a.lane_stride + run.start;
        let (row, size) = match a.values {
            Values::F32(values) => (values.as_ptr().wrapping_add(first).cast(), size_of::<f32>()),
            Values::Bf16(values) => (values.as_ptr().wrapping_add(first).cast(), size_of::<u16>()),
        };
        let row_lines = (run.len() * size).div_ceil(LINE);
        Ahead { row, row_lines, done: 0, stride: a.lane_stride * size, n_rows: rows.len() }
    }

    /// Cuts off the first of `n` equal parts of what is left, in whole rows.
    pub(super) fn share(&mut self, n: usize) -> Self {
        let n_rows = self.n_rows.div_ceil(n);
        let part = Ahead { n_rows, ..*self };
        self.row = self.row.wrapping_add(n_rows * self.stride);
        self.n_rows -= n_rows;
        part
    }

    /// Lines that are left.
    fn n_lines(&self) -> usize {
        self.n_rows * self.row_lines - self.done
    }

    /// How many lines each of `n` askings takes.
    pub(super) fn quota(&self, n: usize) -> usize {
        self.n_lines().div_ceil(n.max(1))
    }

    /// Asks for so many lines more.
    #[inline]
    pub(super) fn ask(&mut self, mut n: usize) {
        while n > 0 && self.n_rows > 0 {
            let now = n.min(self.row_lines - self.done);
            for line in self.done..self.done + now {
                let at = self.row.wrapping_add(line * LINE);
                // SAFETY: an address is named, and nothing read. Every x86-64 has the instruction.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) };
            }
            n -= now;
            self.done += now;
            if self.done == self.row_lines {
                self.row = self.row.wrapping_add(self.stride);
                self.done = 0;
                self.n_rows -= 1;
            }
        }
    }
}
