//! Flat f32 memory whose start is aligned to a cache line.

use std::ops::{Deref, DerefMut};

/// Values in a cache line.
const LINE: usize = 16;

/// One cache line.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Line([f32; LINE]);

/// A buffer of [`crate::Cpu`]: a slice of f32 aligned to 64 bytes.
#[derive(Clone, Debug, Default)]
pub struct CpuBuf {
    lines: Vec<Line>,
    len: usize,
}

impl CpuBuf {
    /// A buffer of `len` zeros.
    pub fn zeros(len: usize) -> Self {
        CpuBuf { lines: vec![Line([0.0; LINE]); len.div_ceil(LINE)], len }
    }
}

impl From<&[f32]> for CpuBuf {
    fn from(data: &[f32]) -> Self {
        let mut buf = CpuBuf::zeros(data.len());
        buf.copy_from_slice(data);
        buf
    }
}

#[allow(unsafe_code, reason = "a slice of lines is viewed as a slice of their values")]
impl Deref for CpuBuf {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // SAFETY: `Line` is `repr(C)` of LINE values without padding, and `len` is at most LINE
        // times their number.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

#[allow(unsafe_code, reason = "a slice of lines is viewed as a slice of their values")]
impl DerefMut for CpuBuf {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `deref`; `&mut self` makes the view unique.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}
