//! Gated activations; `kernels/glu.cu`.

use super::{Device, Gpu, GpuBuf, over_packs};

/// `h` from the gates and ups.
fn forward<D: Device>(
    gpu: &Gpu<D>,
    name: &str,
    gate_up: &GpuBuf<D>,
    (rows, i): (usize, usize),
    h: &mut GpuBuf<D>,
) {
    let args = [gate_up.first(rows * 2 * i), h.first(rows * i), rows.into(), i.into()];
    if rows * i > 0 {
        gpu.launch(name, &[gate_up.holds, h.holds], over_packs(rows * i), &args);
    }
}

/// Gates and ups become their gradients, and the output's gradient `h` the output.
fn backward<D: Device>(
    gpu: &Gpu<D>,
    name: &str,
    h: &mut GpuBuf<D>,
    (rows, i): (usize, usize),
    gate_up: &mut GpuBuf<D>,
) {
    let args = [h.first(rows * i), gate_up.first(rows * 2 * i), rows.into(), i.into()];
    if rows * i > 0 {
        gpu.launch(name, &[h.holds, gate_up.holds], over_packs(rows * i), &args);
    }
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
