//! Flat memory whose start is aligned to a cache line: f32, or bf16.

use std::borrow::Cow;
use std::ops::{Deref, DerefMut};

use half::bf16;
use memmap2::MmapMut;
use rayon::prelude::*;

use super::bf16::Values;
use super::par::TASK_VALUES;
use crate::Compute;

/// Values of f32 in a cache line.
const LINE: usize = 16;

/// One cache line.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Line([f32; LINE]);

/// Bytes from which a buffer asks for pages of its own: it then has a large page or more in it.
const PAGES_MIN: usize = 4 << 20;

/// Zeroed cache lines.
#[derive(Debug)]
enum Memory {
    Lines(Vec<Line>),
    /// Pages of their own. Where the system has large ones they are asked for: walking through a
    /// buffer by small ones looks up an address every 4 KiB, where prefetching stops, too.
    Pages(MmapMut),
}

impl Memory {
    fn zeros(n_lines: usize) -> Self {
        let n_bytes = n_lines * size_of::<Line>();
        if n_bytes >= PAGES_MIN
            && let Ok(pages) = MmapMut::map_anon(n_bytes)
        {
            // Only ever advice: memory is memory where the system does not take it.
            #[cfg(target_os = "linux")]
            let _ = pages.advise(memmap2::Advice::HugePage);
            return Memory::Pages(pages);
        }
        Memory::Lines(vec![Line([0.0; LINE]); n_lines])
    }

    fn as_ptr(&self) -> *const u8 {
        match self {
            Memory::Lines(lines) => lines.as_ptr().cast(),
            Memory::Pages(pages) => pages.as_ptr(),
        }
    }

    fn as_mut_ptr(&mut self) -> *mut u8 {
        match self {
            Memory::Lines(lines) => lines.as_mut_ptr().cast(),
            Memory::Pages(pages) => pages.as_mut_ptr(),
        }
    }
}

/// A buffer of [`crate::Cpu`], aligned to 64 bytes: a slice of f32, or one of bf16 (see
/// [`crate::Backend::zeros_rounded`]). It dereferences to its values where they are f32, and panics
/// where they are not, naming the place that took them for f32.
#[derive(Debug)]
pub struct CpuBuf {
    memory: Memory,
    len: usize,
    /// What each value is.
    kind: Compute,
}

/// The values of a buffer, to change them.
pub(super) enum ValuesMut<'a> {
    F32(&'a mut [f32]),
    Bf16(&'a mut [bf16]),
}

impl CpuBuf {
    /// A buffer of `len` zeros of f32.
    pub fn zeros(len: usize) -> Self {
        CpuBuf::zeros_of(Compute::F32, len)
    }

    /// A buffer of `len` zeros of this type.
    pub(super) fn zeros_of(kind: Compute, len: usize) -> Self {
        let lines = len.div_ceil(LINE * size_of::<f32>() / kind.value_bytes());
        CpuBuf { memory: Memory::zeros(lines), len, kind }
    }

    /// Number of values.
    #[allow(clippy::len_without_is_empty, reason = "the slice that it is has one")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Bytes of the values.
    pub(super) fn n_bytes(&self) -> usize {
        self.kind.value_bytes() * self.len
    }

    /// Whether values are rounded as they are written.
    pub(super) fn is_rounded(&self) -> bool {
        self.kind == Compute::Bf16
    }

    /// The values, whatever they are.
    #[allow(unsafe_code, reason = "memory is viewed as a slice of values")]
    pub(super) fn values(&self) -> Values<'_> {
        let (start, len) = (self.memory.as_ptr(), self.len);
        // SAFETY: the memory is initialised and aligned to 64 bytes, any bytes are values of either
        // type, and `len` is at most the number of them that its lines hold.
        unsafe {
            match self.kind {
                Compute::F32 => Values::F32(std::slice::from_raw_parts(start.cast(), len)),
                Compute::Bf16 => Values::Bf16(std::slice::from_raw_parts(start.cast(), len)),
            }
        }
    }

    /// The values, whatever they are, to change them.
    #[allow(unsafe_code, reason = "memory is viewed as a slice of values")]
    pub(super) fn values_mut(&mut self) -> ValuesMut<'_> {
        let (start, len) = (self.memory.as_mut_ptr(), self.len);
        // SAFETY: as in `values`; `&mut self` makes the view unique.
        unsafe {
            match self.kind {
                Compute::F32 => ValuesMut::F32(std::slice::from_raw_parts_mut(start.cast(), len)),
                Compute::Bf16 => ValuesMut::Bf16(std::slice::from_raw_parts_mut(start.cast(), len)),
            }
        }
    }

    /// The values as f32: themselves, or a copy.
    pub(super) fn widened(&self) -> Cow<'_, [f32]> {
        match self.values() {
            Values::F32(values) => Cow::Borrowed(values),
            Values::Bf16(values) => {
                let values = values.par_iter().with_min_len(TASK_VALUES);
                Cow::Owned(values.map(|x| x.to_f32()).collect())
            }
        }
    }

    /// Overwrites the first values, rounding them where they are bf16.
    pub(super) fn round_from(&mut self, from: &[f32]) {
        match self.values_mut() {
            ValuesMut::F32(values) => values[..from.len()].copy_from_slice(from),
            ValuesMut::Bf16(values) => {
                let values = values[..from.len()].par_iter_mut().with_min_len(TASK_VALUES);
                values.zip(from).for_each(|(to, &x)| *to = bf16::from_f32(x));
            }
        }
    }
}

impl Default for CpuBuf {
    fn default() -> Self {
        CpuBuf::zeros(0)
    }
}

impl Clone for CpuBuf {
    fn clone(&self) -> Self {
        let mut copy = CpuBuf::zeros_of(self.kind, self.len);
        match (self.values(), copy.values_mut()) {
            (Values::F32(from), ValuesMut::F32(to)) => to.copy_from_slice(from),
            (Values::Bf16(from), ValuesMut::Bf16(to)) => to.copy_from_slice(from),
            _ => unreachable!("the copy was made of the same type"),
        }
        copy
    }
}

impl From<&[f32]> for CpuBuf {
    fn from(data: &[f32]) -> Self {
        let mut buf = CpuBuf::zeros(data.len());
        buf.copy_from_slice(data);
        buf
    }
}

impl Deref for CpuBuf {
    type Target = [f32];

    #[track_caller]
    fn deref(&self) -> &[f32] {
        match self.values() {
            Values::F32(values) => values,
            Values::Bf16(_) => panic!("a buffer of f32 is wanted here, and it is one of bf16"),
        }
    }
}

impl DerefMut for CpuBuf {
    #[track_caller]
    fn deref_mut(&mut self) -> &mut [f32] {
        match self.values_mut() {
            ValuesMut::F32(values) => values,
            ValuesMut::Bf16(_) => panic!("a buffer of f32 is wanted here, and it is one of bf16"),
        }
    }
}
