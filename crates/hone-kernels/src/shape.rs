//! The shape checks that both host backends make before they index.

use crate::{AttnMask, Backend, Heads, Mat, MatMut};

/// One past the last index of a view; 0 for an empty one.
pub(crate) fn end(offset: usize, rows: usize, cols: usize, stride: usize) -> usize {
    if rows == 0 || cols == 0 { 0 } else { offset + (rows - 1) * stride + cols }
}

/// Where the rows of a view lie, without the buffer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    pub(crate) offset: usize,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) stride: usize,
}

impl Layout {
    /// Index of the first value of row `i`.
    pub(crate) fn row(&self, i: usize) -> usize {
        self.offset + i * self.stride
    }

    /// Checks that the view lies inside a buffer of `len` values and that its rows do not overlap.
    fn check(self, len: usize) -> Self {
        assert!(self.stride >= self.cols || self.rows <= 1, "rows overlap: {self:?}");
        let end = end(self.offset, self.rows, self.cols, self.stride);
        assert!(end <= len, "{self:?} leaves its buffer of {len}");
        self
    }
}

/// The layout of `m`, checked against its buffer.
pub(crate) fn layout<B: Backend>(backend: &B, m: &Mat<'_, B>) -> Layout {
    Layout { offset: m.offset, rows: m.rows, cols: m.cols, stride: m.stride }
        .check(backend.len(m.buf))
}

/// The layout of `m`, checked against its buffer.
pub(crate) fn layout_mut<B: Backend>(backend: &B, m: &MatMut<'_, B>) -> Layout {
    Layout { offset: m.offset, rows: m.rows, cols: m.cols, stride: m.stride }
        .check(backend.len(m.buf))
}

/// (start, length) of each document; checks that T tokens of `qkv` and of an (T, H K) buffer are
/// there.
pub(crate) fn documents(
    heads: Heads,
    seq_lens: &[usize],
    qkv_len: usize,
    out_len: usize,
    lse_len: usize,
) -> Vec<(usize, usize)> {
    check_heads(heads);
    let mut start = 0;
    let mut docs = Vec::with_capacity(seq_lens.len());
    for &len in seq_lens {
        docs.push((start, len));
        start += len;
    }
    assert!(start * heads.qkv_width() <= qkv_len, "{start} tokens do not fit qkv of {qkv_len}");
    assert!(start * heads.out_width() <= out_len, "{start} tokens do not fit out of {out_len}");
    assert!(start * heads.n_q <= lse_len, "{start} tokens do not fit lse of {lse_len}");
    docs
}

/// Checks that a query sees at least itself, and that a soft cap is one.
pub(crate) fn check_mask(mask: AttnMask) {
    assert!(mask.window != Some(0), "a window of 0 hides every key");
    assert!(mask.soft_cap.is_none_or(|cap| cap > 0.0), "{mask:?}");
}

/// Checks that the rotated columns are pairs inside a head.
pub(crate) fn check_rotary(heads: Heads, rotary: usize) {
    check_heads(heads);
    assert!(rotary.is_multiple_of(2) && rotary <= heads.dim, "{rotary} columns of {heads:?}");
}

/// Checks that the query heads divide evenly among the key/value heads.
pub(crate) fn check_heads(heads: Heads) {
    assert!(
        heads.n_kv > 0 && heads.dim > 0 && heads.n_q.is_multiple_of(heads.n_kv) && heads.n_q > 0,
        "{heads:?}: query heads must be a multiple of key/value heads"
    );
}
