//! The operators on a GPU.
//!
//! [`Gpu`] is the backend: buffers, checks, and which kernel runs on what. It knows a GPU as a
//! [`Device`], of which there are two: CUDA, and a simulator that runs the same kernels on the CPU
//! thread by thread (`hone-sim`), so that all of this is tested where there is no GPU. The kernels are the `.cu`
//! files of `kernels/`; a kernel that is made for several types of buffers has their names behind its
//! own, as in `add_f32_bf16`.
//!
//! Nothing here waits for the device but [`crate::Backend::read`] and what returns a number.

mod adafactor;
mod attention;
mod backend;
#[cfg(feature = "cuda")]
pub mod cuda;
mod device;
mod glu;
mod kept;
mod loss;
mod norm;
mod pointwise;
mod position;
mod products;
mod quant;
mod rows;
mod update;

pub use device::{Arg, ArgKind, Device, Launch, Matrix, Product};
pub use products::GpuFrozen;

use std::sync::Arc;

use crate::{Compute, Mat, MatMut};
use kept::Kept;

/// The backend whose operators run on a GPU.
#[derive(Clone, Debug)]
pub struct Gpu<D: Device> {
    device: D,
    compute: Compute,
    kept: Arc<Kept<D>>,
}

impl<D: Device> Gpu<D> {
    /// A backend on this device, whose products are in f32; [`crate::Backend::with_compute`] gives the other.
    pub fn new(device: D) -> Self {
        Gpu { device, compute: Compute::F32, kept: Kept::new() }
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }
}

/// Values on the device, in f32 or rounded.
pub struct GpuBuf<D: Device> {
    memory: D::Memory,
    len: usize,
    holds: Compute,
}

impl<D: Device> GpuBuf<D> {
    /// Address of value `index`, which may be one past the last.
    fn address(&self, index: usize) -> u64 {
        assert!(index <= self.len, "{index} of {}", self.len);
        D::address(&self.memory) + (index * self.holds.value_bytes()) as u64
    }

    /// The value from which on there are `n`, as an argument.
    fn part(&self, index: usize, n: usize) -> Arg {
        assert!(index + n <= self.len, "{index} + {n} of {}", self.len);
        Arg::pointer(self.address(index))
    }

    /// The first `n` values, as an argument.
    fn first(&self, n: usize) -> Arg {
        self.part(0, n)
    }

    /// The first `n` values, as an argument; the buffer must be f32.
    fn first_f32(&self, n: usize) -> Arg {
        assert!(self.holds == Compute::F32, "a rounded buffer where values must be f32");
        self.first(n)
    }
}

/// 8-bit codes on the device.
pub struct GpuCodes<D: Device> {
    memory: D::Memory,
    len: usize,
}

/// Numbers of the host for one kernel, on the device.
struct Uploaded<D: Device>(D::Memory);

impl<D: Device> Uploaded<D> {
    fn arg(&self) -> Arg {
        Arg::pointer(D::address(&self.0))
    }
}

/// Threads of a block in kernels that go through values one by one.
const THREADS: usize = 256;

/// Most blocks of such a kernel; its threads go on to further values.
const BLOCKS_MAX: usize = 1 << 16;

/// What a kernel runs on that goes through `n` values.
fn over(n: usize) -> Launch {
    blocks(n.div_ceil(THREADS).clamp(1, BLOCKS_MAX))
}

/// Values that a thread takes at a time in most kernels, where they lie aligned.
const PACK: usize = 8;

/// What a kernel runs on that goes through `n` values by packs.
fn over_packs(n: usize) -> Launch {
    over(n.div_ceil(PACK))
}

/// Columns that a block sums, in kernels that do so.
const BLOCK_COLUMNS: usize = 32;

/// What a kernel runs on that sums `n` columns.
fn over_columns(n: usize) -> Launch {
    blocks(n.div_ceil(BLOCK_COLUMNS))
}

/// What a kernel runs on that has `n` blocks.
fn blocks(n: usize) -> Launch {
    let n = u32::try_from(n).expect("fewer than 2^31 blocks");
    Launch { grid: [n, 1, 1], shared_bytes: 0 }
}

impl<D: Device> Gpu<D> {
    /// Runs a kernel for these types of buffers, unless there is nothing to do.
    fn launch(&self, name: &str, holds: &[Compute], launch: Launch, args: &[Arg]) {
        if launch.grid.contains(&0) {
            return;
        }
        let mut kernel = String::with_capacity(40);
        kernel.push_str(name);
        for holds in holds {
            kernel.push('_');
            kernel.push_str(holds.name());
        }
        // SAFETY: the operators give the arguments that their kernels have (the simulator compares), and
        // check that buffers hold as many values as the kernels use.
        #[allow(unsafe_code, reason = "kernels are given addresses")]
        unsafe {
            self.device.launch(&kernel, &launch, args);
        }
    }

    /// A buffer of `n` zeros that hold this.
    fn buf(&self, n: usize, holds: Compute) -> GpuBuf<D> {
        GpuBuf { memory: self.device.alloc(n * holds.value_bytes()), len: n, holds }
    }

    /// A buffer of `n` values that will all be written before they are read.
    fn unset(&self, n: usize, holds: Compute) -> GpuBuf<D> {
        GpuBuf { memory: self.device.alloc_unset(n * holds.value_bytes()), len: n, holds }
    }

    /// Numbers of the host, as they lie there.
    fn put_u32(&self, numbers: &[u32]) -> Uploaded<D> {
        self.put(numbers.iter().flat_map(|n| n.to_le_bytes()).collect())
    }

    /// As [`Gpu::put_u32`].
    fn put_f32(&self, numbers: &[f32]) -> Uploaded<D> {
        self.put(numbers.iter().flat_map(|x| x.to_le_bytes()).collect())
    }

    fn put(&self, bytes: Vec<u8>) -> Uploaded<D> {
        let mut memory = self.device.alloc_unset(bytes.len());
        self.device.write(&mut memory, 0, &bytes);
        Uploaded(memory)
    }
}

/// A view as kernels take it: an address, and values from row to row.
struct View {
    at: Arg,
    stride: Arg,
    holds: Compute,
}

/// A checked view.
fn view<D: Device>(gpu: &Gpu<D>, m: &Mat<'_, Gpu<D>>) -> View {
    let layout = crate::shape::layout(gpu, m);
    View {
        at: Arg::pointer(m.buf.address(layout.offset.min(m.buf.len))),
        stride: layout.stride.into(),
        holds: m.buf.holds,
    }
}

/// A checked view.
fn view_mut<D: Device>(gpu: &Gpu<D>, m: &MatMut<'_, Gpu<D>>) -> View {
    view(gpu, &Mat { buf: &*m.buf, offset: m.offset, rows: m.rows, cols: m.cols, stride: m.stride })
}

/// bf16 values as they lie in memory, widened.
fn widened(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes.chunks_exact(2).map(|x| half::bf16::from_le_bytes([x[0], x[1]]).to_f32())
}

impl<D: Device> Gpu<D> {
    fn read_values(&self, buf: &GpuBuf<D>, offset: usize, out: &mut [f32]) {
        assert!(offset + out.len() <= buf.len, "{offset} + {} of {}", out.len(), buf.len);
        let size = buf.holds.value_bytes();
        let mut bytes = vec![0; out.len() * size];
        self.device.read(&buf.memory, offset * size, &mut bytes);
        match buf.holds {
            Compute::F32 => out.iter_mut().zip(bytes.chunks_exact(4)).for_each(|(to, x)| {
                *to = f32::from_le_bytes([x[0], x[1], x[2], x[3]]);
            }),
            Compute::Bf16 => out.iter_mut().zip(widened(&bytes)).for_each(|(to, x)| *to = x),
        }
    }

    fn write_values(&self, buf: &mut GpuBuf<D>, offset: usize, data: &[f32]) {
        assert!(offset + data.len() <= buf.len, "{offset} + {} of {}", data.len(), buf.len);
        let bytes: Vec<u8> = match buf.holds {
            Compute::F32 => data.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Compute::Bf16 => {
                data.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect()
            }
        };
        self.device.write(&mut buf.memory, offset * buf.holds.value_bytes(), &bytes);
    }

    /// The same values, held as this.
    fn converted(&self, x: Mat<'_, Self>, holds: Compute) -> GpuBuf<D> {
        let mut y = self.unset(x.rows * x.cols, holds);
        let to = MatMut::new(&mut y, x.rows, x.cols);
        self.copy_rows(x, to);
        y
    }

    /// `Y <- X`, of as many rows and columns.
    fn copy_rows(&self, x: Mat<'_, Self>, y: MatMut<'_, Self>) {
        assert!(x.rows == y.rows && x.cols == y.cols, "views of one shape");
        let (from, to) = (view(self, &x), view_mut(self, &y));
        let args = [from.at, from.stride, to.at, to.stride, x.rows.into(), x.cols.into()];
        self.launch("copy_rows", &[from.holds, to.holds], over_packs(x.rows * x.cols), &args);
    }
}
