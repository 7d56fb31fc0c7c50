//! What a step does to weights, and sums of squares; `kernels/update.cu`.

use std::ops::Range;

use super::{Arg, Device, Gpu, GpuBuf, GpuCodes, THREADS, Uploaded, blocks, over};
use crate::{AdamW, CODE_BLOCK, Compute, Lion, Sgd};

/// Values that a thread takes at once.
const UNIT: usize = 4;

/// Most blocks of a sum of squares, each of which gives a part of it.
const PARTS_MAX: usize = 1024;

/// Fewest values that a thread adds up before there is another block.
const SQUARES_MIN: usize = 4 * UNIT;

/// Warps of a block of the kernel of 8 bits, each with a block of codes.
const WARPS: usize = THREADS / 32;

/// Most blocks of that kernel: enough for every GPU, and few enough that reading the code books does
/// not count.
const CODE_BLOCKS_MAX: usize = 1 << 11;

/// `n` values from `at` on, which must be f32.
pub(super) fn part_f32<D: Device>(buf: &GpuBuf<D>, at: usize, n: usize) -> Arg {
    assert!(buf.holds == Compute::F32, "a rounded buffer where values must be f32");
    buf.part(at, n)
}

/// f64 numbers of a kernel for the next one or for the host.
pub(super) struct Parts<D: Device> {
    memory: D::Memory,
    pub(super) n: usize,
}

impl<D: Device> Parts<D> {
    pub(super) fn new(gpu: &Gpu<D>, n: usize) -> Self {
        Parts { memory: gpu.device.alloc(n * size_of::<f64>()), n }
    }

    pub(super) fn arg(&self) -> Arg {
        Arg::pointer(D::address(&self.memory))
    }

    /// Their sum, in order.
    fn sum(&self, gpu: &Gpu<D>) -> f64 {
        let mut bytes = vec![0; self.n * size_of::<f64>()];
        gpu.device.read(&self.memory, 0, &mut bytes);
        let (parts, _) = bytes.as_chunks();
        parts.iter().map(|&part| f64::from_le_bytes(part)).sum()
    }
}

/// Sums of squares of the pieces of a part of `x`.
pub(super) fn squares<D: Device>(gpu: &Gpu<D>, x: &GpuBuf<D>, at: usize, n: usize) -> Parts<D> {
    let parts = Parts::new(gpu, n.div_ceil(THREADS * SQUARES_MIN).clamp(1, PARTS_MAX));
    let args = [part_f32(x, at, n), n.into(), parts.arg()];
    gpu.launch("squares", &[Compute::F32], blocks(parts.n), &args);
    parts
}

pub(super) fn sum_squares_part<D: Device>(gpu: &Gpu<D>, x: &GpuBuf<D>, part: Range<usize>) -> f64 {
    if part.is_empty() { 0.0 } else { squares(gpu, x, part.start, part.len()).sum(gpu) }
}

/// The scalars of an AdamW step in the order of the kernels, in f32 as PyTorch applies them to f32
/// tensors.
fn rates(update: AdamW) -> [Arg; 9] {
    let AdamW { lr, beta1, beta2, eps, weight_decay, step, grad_scale } = update;
    let power = |beta: f64| beta.powf(step as f64);
    [
        ((1.0 - lr * weight_decay) as f32).into(),
        grad_scale.into(),
        ((1.0 - beta1) as f32).into(),
        (beta1 as f32).into(),
        ((1.0 - beta2) as f32).into(),
        (beta2 as f32).into(),
        ((lr / (1.0 - power(beta1))) as f32).into(),
        ((1.0 - power(beta2)).sqrt() as f32).into(),
        (eps as f32).into(),
    ]
}

/// Runs a kernel that goes through `n` values.
fn run<D: Device>(gpu: &Gpu<D>, name: &str, n: usize, of: &[Arg], rates: &[Arg]) {
    if n > 0 {
        let args = [of, &[n.into()], rates].concat();
        gpu.launch(name, &[Compute::F32], over(n.div_ceil(UNIT)), &args);
    }
}

pub(super) fn adamw<D: Device>(
    gpu: &Gpu<D>,
    p: &mut GpuBuf<D>,
    g: &GpuBuf<D>,
    at: usize,
    m: &mut GpuBuf<D>,
    v: &mut GpuBuf<D>,
    update: AdamW,
) {
    let n = m.len;
    assert!(g.len == p.len && v.len == n, "a gradient and two moments a weight");
    let of = [part_f32(p, at, n), part_f32(g, at, n), m.first_f32(n), v.first_f32(n)];
    run(gpu, "adamw", n, &of, &rates(update));
}

/// The first `n` codes, as an argument.
fn codes<D: Device>(of: &GpuCodes<D>) -> Arg {
    Arg::pointer(D::address(&of.memory))
}

pub(super) fn adamw_8bit<D: Device>(
    gpu: &Gpu<D>,
    p: &mut GpuBuf<D>,
    g: &GpuBuf<D>,
    at: usize,
    [(m, m_max), (v, v_max)]: [(&mut GpuCodes<D>, &mut GpuBuf<D>); 2],
    update: AdamW,
) {
    let (n, n_blocks) = (m.len, m.len.div_ceil(CODE_BLOCK));
    assert!(g.len == p.len && v.len == n, "a gradient and two moments a weight");
    assert!(m_max.len == n_blocks && v_max.len == n_blocks, "a magnitude a block of codes");
    let books: &Uploaded<D> = gpu.books();
    let of: [Arg; 8] = [
        part_f32(p, at, n),
        part_f32(g, at, n),
        codes(m),
        m_max.first_f32(n_blocks),
        codes(v),
        v_max.first_f32(n_blocks),
        n.into(),
        books.arg(),
    ];
    let launch = blocks(n_blocks.div_ceil(WARPS).min(CODE_BLOCKS_MAX));
    gpu.launch("adamw_8bit", &[Compute::F32], launch, &[&of[..], &rates(update)].concat());
}

pub(super) fn lion<D: Device>(
    gpu: &Gpu<D>,
    p: &mut GpuBuf<D>,
    g: &GpuBuf<D>,
    at: usize,
    m: &mut GpuBuf<D>,
    update: Lion,
) {
    let (n, Lion { lr, beta1, beta2, weight_decay, grad_scale }) = (m.len, update);
    let of = [part_f32(p, at, n), part_f32(g, at, n), m.first_f32(n)];
    let keep = 1.0 - lr * weight_decay;
    let rates = [keep, lr, beta1, beta2, 1.0 - beta1, 1.0 - beta2].map(|x| Arg::from(x as f32));
    run(gpu, "lion", n, &of, &[&rates[..], &[grad_scale.into()]].concat());
}

pub(super) fn sgd<D: Device>(
    gpu: &Gpu<D>,
    p: &mut GpuBuf<D>,
    g: &GpuBuf<D>,
    part: Range<usize>,
    m: Option<&mut GpuBuf<D>>,
    update: Sgd,
) {
    let (at, n) = (part.start, part.len());
    let Sgd { lr, momentum, dampening, nesterov, weight_decay, first, grad_scale } = update;
    let of =
        [part_f32(p, at, n), part_f32(g, at, n), m.map_or(Arg::pointer(0), |m| m.first_f32(n))];
    // An empty momentum holds zeros, so that it becomes the gradient.
    let fresh = if first { 1.0 } else { 1.0 - dampening };
    let rates = [lr, weight_decay, momentum, fresh].map(|x| Arg::from(x as f32));
    run(gpu, "sgd", n, &of, &[&rates[..], &[grad_scale.into(), nesterov.into()]].concat());
}
