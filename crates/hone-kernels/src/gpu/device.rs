//! What a GPU is to the engine: memory, launches of kernels, matrix products.

#![allow(unsafe_code, reason = "kernels and products are given addresses")]

use std::ffi::c_void;

use crate::{Compute, Op};

/// A GPU, or what stands in for one. All work is done in the order in which it is asked for, and may
/// still be going on when a call returns; [`Device::read`] waits for it.
///
/// What fails (memory that is not there, a driver's error) is remembered until [`Device::take_fault`] asks, and
/// nothing is done meanwhile: buffers keep what was in them before the work that failed.
pub trait Device: Clone + Send + Sync + 'static {
    /// Memory on the device, freed when dropped. Its start is aligned to 16 bytes.
    type Memory: Send + Sync;

    /// Name for reports: `cuda`.
    fn name(&self) -> &'static str;
    /// `bytes` bytes of zeros.
    fn alloc(&self, bytes: usize) -> Self::Memory;
    /// `bytes` bytes of anything: all of them will be written before they are read.
    fn alloc_unset(&self, bytes: usize) -> Self::Memory;
    /// Where the memory begins.
    fn address(memory: &Self::Memory) -> u64;
    /// Overwrites the bytes from `offset` on.
    fn write(&self, to: &mut Self::Memory, offset: usize, bytes: &[u8]);
    /// Reads the bytes from `offset` on, once all work before has been done.
    fn read(&self, from: &Self::Memory, offset: usize, out: &mut [u8]);
    /// Runs a kernel.
    ///
    /// # Safety
    ///
    /// The arguments must be those that the kernel has, and all that it reads and writes must lie in
    /// memory of this device.
    unsafe fn launch(&self, kernel: &str, launch: &Launch, args: &[Arg]);
    /// A product of matrices.
    ///
    /// # Safety
    ///
    /// All three must lie in memory of this device, and nothing else be written while they are.
    unsafe fn product(&self, product: &Product);
    /// What has failed since this was last asked; asking forgets it.
    fn take_fault(&self) -> Option<String>;
}

/// How many blocks a kernel runs on; how many threads a block has is the kernel's own.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// Blocks along x, y and z.
    pub grid: [u32; 3],
    /// Bytes that a block shares, beside what its kernel declares.
    pub shared_bytes: u32,
}

/// An argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub struct Arg {
    /// The value in the lowest bytes, which is where it lies on machines that have the lowest first.
    bits: u64,
    /// What it is; a simulator compares it with what the kernel says.
    kind: ArgKind,
}

/// What an argument is, numbered as `kernels/sim/cusim.h` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArgKind {
    /// An address.
    Pointer = 0,
    /// 32 bits, with or without a sign.
    I32 = 1,
    /// 64 bits with a sign.
    I64 = 2,
    /// 64 bits without a sign.
    U64 = 3,
    /// f32.
    F32 = 4,
    /// f64.
    F64 = 5,
}

const _: () = assert!(cfg!(target_endian = "little"), "arguments lie in the lowest bytes");

impl Arg {
    /// An address in the device's memory; 0 is none.
    pub fn pointer(address: u64) -> Self {
        Arg { bits: address, kind: ArgKind::Pointer }
    }

    /// What it is.
    pub fn kind(&self) -> ArgKind {
        self.kind
    }

    /// Where the value lies, for a launch.
    pub fn as_ptr(&self) -> *mut c_void {
        (&raw const self.bits).cast_mut().cast()
    }
}

impl From<usize> for Arg {
    /// As an `i64`, which is what kernels count with.
    fn from(n: usize) -> Self {
        Arg { bits: i64::try_from(n).expect("less than 2^63") as u64, kind: ArgKind::I64 }
    }
}

impl From<i32> for Arg {
    fn from(n: i32) -> Self {
        Arg { bits: u64::from(n.cast_unsigned()), kind: ArgKind::I32 }
    }
}

impl From<bool> for Arg {
    /// As an `int`.
    fn from(is: bool) -> Self {
        i32::from(is).into()
    }
}

impl From<u64> for Arg {
    fn from(bits: u64) -> Self {
        Arg { bits, kind: ArgKind::U64 }
    }
}

impl From<f32> for Arg {
    fn from(x: f32) -> Self {
        Arg { bits: u64::from(x.to_bits()), kind: ArgKind::F32 }
    }
}

impl From<f64> for Arg {
    fn from(x: f64) -> Self {
        Arg { bits: x.to_bits(), kind: ArgKind::F64 }
    }
}

/// A row-major matrix on the device.
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    /// Of the first value.
    pub address: u64,
    /// Values from one row to the next.
    pub stride: usize,
}

/// `Y (m, n) <- alpha op(A) op(B) + beta C`, with sums of f32. C may be Y; with beta = 0 it is not read.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    /// A and how it is taken.
    pub a: (Matrix, Op),
    /// B and how it is taken.
    pub b: (Matrix, Op),
    /// C.
    pub c: Matrix,
    /// Y.
    pub y: Matrix,
    /// Rows of Y, columns of Y, and values of a sum.
    pub sides: (usize, usize, usize),
    /// alpha and beta.
    pub factors: (f32, f32),
    /// What A and B hold.
    pub inputs: Compute,
    /// What C and Y hold.
    pub output: Compute,
}
