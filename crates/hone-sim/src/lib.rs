//! The CUDA kernels on the CPU, for tests: a [`Device`] whose kernels are the `.cu` files of `kernels/`,
//! compiled as C++ and run thread by thread (`kernels/sim/`).
//!
//! It shows that kernels and the code that launches them compute what they should, at odd shapes and under
//! any order in which threads may run between two barriers, and that neither touches what it should not. It
//! says nothing about speed. Products of matrices, which a GPU has a library for, are plain loops.
//!
//! Beside `hone-kernels` this crate alone may hold `unsafe` code. Only tests use it.

#![allow(unsafe_code, reason = "kernels are called through pointers")]
#![cfg(not(no_simulator))]

mod ffi;
mod product;

use std::ffi::{CStr, c_char};
use std::sync::{Mutex, MutexGuard, PoisonError};

use hone_kernels::gpu::{Arg, Device, Launch, Product};

/// The order in which the threads of a block go on when several can.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    /// As they are numbered.
    Forward,
    /// The other way round, each warp as far as the block's next barrier before the one in front of it.
    Backward,
    /// Shuffled at every turn, by this seed.
    Shuffled(u16),
}

impl Schedule {
    /// Its number in the simulator.
    fn seed(self) -> u32 {
        match self {
            Schedule::Forward => 0,
            Schedule::Backward => 1,
            Schedule::Shuffled(seed) => 2 + u32::from(seed),
        }
    }
}

/// The simulated GPU.
#[derive(Clone, Copy, Debug)]
pub struct Sim {
    schedule: Schedule,
}

impl Sim {
    /// A GPU whose threads go on in this order.
    pub fn new(schedule: Schedule) -> Self {
        Sim { schedule }
    }
}

/// The simulator runs one kernel at a time in a process.
fn one_at_a_time() -> MutexGuard<'static, ()> {
    static RUNS: Mutex<()> = Mutex::new(());
    RUNS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The names of all kernels, in order.
pub fn kernels() -> Vec<String> {
    let mut names = vec![std::ptr::null::<c_char>(); 4096];
    // SAFETY: the array has as many places as it is said to.
    let n = unsafe { ffi::cusim_names(names.as_mut_ptr(), names.len()) };
    assert!(n <= names.len(), "{n} kernels");
    // SAFETY: each name is a literal of the simulator.
    let mut names: Vec<String> = names[..n]
        .iter()
        .map(|&name| unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Memory with a page behind it that nobody may touch.
#[derive(Debug)]
pub struct Memory {
    start: *mut u8,
    bytes: usize,
}

// SAFETY: it is owned memory like a vector's; kernels that write it run one at a time.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: it was made by `cusim_alloc` with as many bytes, and nobody has it any more.
        unsafe { ffi::cusim_free(self.start.cast(), self.bytes) };
    }
}

impl Device for Sim {
    type Memory = Memory;

    fn name(&self) -> &'static str {
        "cusim"
    }

    fn alloc(&self, bytes: usize) -> Memory {
        // SAFETY: it takes any size.
        let start = unsafe { ffi::cusim_alloc(bytes) }.cast::<u8>();
        assert!(!start.is_null(), "no memory for {bytes} bytes");
        Memory { start, bytes }
    }

    fn alloc_unset(&self, bytes: usize) -> Memory {
        let memory = self.alloc(bytes);
        // What is read before it is written shows: these are no numbers that anybody computes with.
        // SAFETY: it has so many bytes.
        unsafe { memory.start.write_bytes(0xff, bytes) };
        memory
    }

    fn address(memory: &Memory) -> u64 {
        memory.start.addr() as u64
    }

    fn write(&self, to: &mut Memory, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= to.bytes, "{offset} + {} of {}", bytes.len(), to.bytes);
        // SAFETY: the range lies inside, and nobody else has the memory.
        unsafe { to.start.add(offset).copy_from(bytes.as_ptr(), bytes.len()) };
    }

    fn read(&self, from: &Memory, offset: usize, out: &mut [u8]) {
        assert!(offset + out.len() <= from.bytes, "{offset} + {} of {}", out.len(), from.bytes);
        // SAFETY: the range lies inside; kernels run while nobody reads, as launches wait for them.
        unsafe { from.start.add(offset).copy_to(out.as_mut_ptr(), out.len()) };
    }

    unsafe fn launch(&self, kernel: &str, launch: &Launch, args: &[Arg]) {
        let Launch { grid, shared_bytes } = *launch;
        assert!(grid[0] > 0 && grid[1] > 0 && grid[2] > 0, "{kernel} on {grid:?}");
        assert!(
            grid[0] < 1 << 31 && grid[1] < 1 << 16 && grid[2] < 1 << 16,
            "{kernel} on {grid:?}"
        );
        assert!(shared_bytes <= SHARED_BYTES_MAX, "{kernel}: a block shares {shared_bytes} bytes");
        let _alone = one_at_a_time();
        // SAFETY: the name is as long as it is said to be.
        let found = unsafe { ffi::cusim_find(kernel.as_ptr().cast(), kernel.len()) };
        assert!(!found.is_null(), "no kernel is called {kernel}");
        let mut kinds = std::ptr::null();
        // SAFETY: the kernel was found, and has as many kinds as it says.
        let kinds = unsafe {
            let n = ffi::cusim_arguments(found, &raw mut kinds);
            std::slice::from_raw_parts(kinds, n.try_into().expect("not negative"))
        };
        let given: Vec<i32> = args.iter().map(|arg| arg.kind() as i32).collect();
        assert_eq!(given, kinds, "{kernel}: kinds of arguments given, and wanted");
        let mut places: Vec<_> = args.iter().map(Arg::as_ptr).collect();
        // SAFETY: the arguments are of the kinds that the kernel has; the caller's for the rest.
        unsafe {
            ffi::cusim_watch(1);
            let (grid, seed) = (grid.as_ptr(), self.schedule.seed());
            ffi::cusim_launch(found, grid, shared_bytes as usize, places.as_mut_ptr(), seed);
            ffi::cusim_watch(0);
        }
    }

    unsafe fn product(&self, product: &Product) {
        // SAFETY: the caller's.
        unsafe { product::run(product) }
    }

    fn take_fault(&self) -> Option<String> {
        None
    }
}

/// Most bytes that a block can share on compute capability 9.0; 8.0 has 163 KiB.
const SHARED_BYTES_MAX: u32 = 227 << 10;
