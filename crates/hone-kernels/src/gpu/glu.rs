//! Gated activations; `kernels/glu.cu`.

use super::{Device, Gpu, GpuBuf, over};

/// Values that a thread takes at once where rows are made of so many.
const WIDE: usize = 4;

fn forward<D: Device>(
    gpu: &Gpu<D>,
    kernel: &str,
    gate_up: &GpuBuf<D>,
    (rows, i): (usize, usize),
    h: &mut GpuBuf<D>,
) {
    let wide = i.is_multiple_of(WIDE);
    let args = [gate_up.first(rows * 2 * i), rows.into(), i.into(), h.first(rows * i), wide.into()];
    let n = rows * i / if wide { WIDE } else { 1 };
    gpu.launch(kernel, &[gate_up.holds, h.holds], over(n), &args);
}

fn backward<D: Device>(
    gpu: &Gpu<D>,
    kernel: &str,
    h: &mut GpuBuf<D>,
    (rows, i): (usize, usize),
    gate_up: &mut GpuBuf<D>,
) {
    let wide = i.is_multiple_of(WIDE);
    let args = [h.first(rows * i), rows.into(), i.into(), gate_up.first(rows * 2 * i), wide.into()];
    let n = rows * i / if wide { WIDE } else { 1 };
    gpu.launch(kernel, &[h.holds, gate_up.holds], over(n), &args);
}

pub(super) fn swiglu<D: Device>(
    gpu: &Gpu<D>,
    gate_up: &GpuBuf<D>,
    rows_i: (usize, usize),
    h: &mut GpuBuf<D>,
) {
    forward(gpu, "swiglu", gate_up, rows_i, h);
}

pub(super) fn swiglu_backward<D: Device>(
    gpu: &Gpu<D>,
    h: &mut GpuBuf<D>,
    rows_i: (usize, usize),
    gate_up: &mut GpuBuf<D>,
) {
    backward(gpu, "swiglu_backward", h, rows_i, gate_up);
}

pub(super) fn geglu<D: Device>(
    gpu: &Gpu<D>,
    gate_up: &GpuBuf<D>,
    rows_i: (usize, usize),
    h: &mut GpuBuf<D>,
) {
    forward(gpu, "geglu", gate_up, rows_i, h);
}

pub(super) fn geglu_backward<D: Device>(
    gpu: &Gpu<D>,
    h: &mut GpuBuf<D>,
    rows_i: (usize, usize),
    gate_up: &mut GpuBuf<D>,
) {
    backward(gpu, "geglu_backward", h, rows_i, gate_up);
}
