//! Memory asked for before it is read. A processor looks ahead by itself along one stream of lines, up
//! to the end of a page; loops over rows of several matrices lie far apart.

/// Asks for what lies `distance` values behind the start of `x`, as long as `x`: its cache lines are on
/// their way to the second cache meanwhile. An address is named, and nothing read: it may be any.
#[inline(always)]
#[allow(unsafe_code, reason = "the instruction is there on every x86-64")]
pub(super) fn ask<T>(x: &[T], distance: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        const LINE: usize = 64;
        let start: *const i8 = x.as_ptr().wrapping_add(distance).cast();
        for at in (0..size_of_val(x)).step_by(LINE) {
            // SAFETY: nothing is read.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(start.wrapping_add(at)) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (x, distance);
}
