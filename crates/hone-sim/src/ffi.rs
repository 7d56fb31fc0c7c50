//! The simulator, `kernels/sim/`.

use std::ffi::{c_char, c_int, c_uint, c_void};

/// A kernel of the simulator.
#[repr(C)]
pub(crate) struct Kernel {
    _opaque: [u8; 0],
}

unsafe extern "C" {
    pub(crate) fn cusim_names(names: *mut *const c_char, capacity: usize) -> usize;
    pub(crate) fn cusim_find(name: *const c_char, length: usize) -> *mut Kernel;
    pub(crate) fn cusim_arguments(of: *const Kernel, kinds: *mut *const c_int) -> c_int;
    pub(crate) fn cusim_launch(
        of: *mut Kernel,
        grid: *const c_uint,
        shared_bytes: usize,
        at: *mut *mut c_void,
        seed: c_uint,
    );
    pub(crate) fn cusim_alloc(bytes: usize) -> *mut c_void;
    pub(crate) fn cusim_free(start: *mut c_void, bytes: usize);
    pub(crate) fn cusim_watch(on: c_int);
}
