//! What is done to each value by itself; `kernels/pointwise.cu`.

use super::{Arg, Device, Gpu, GpuBuf, over, over_columns, over_packs, view, view_mut};
use crate::{Compute, Mat, MatMut, rng};

pub(super) fn fill<D: Device>(gpu: &Gpu<D>, buf: &mut GpuBuf<D>, value: f32) {
    let n = buf.len;
    gpu.launch("fill", &[buf.holds], over_packs(n), &[buf.first(n), value.into(), n.into()]);
}

pub(super) fn copy<D: Device>(gpu: &Gpu<D>, x: &GpuBuf<D>, y: &mut GpuBuf<D>, n: usize) {
    axpby(gpu, 1.0, (x, 0), 0.0, (y, 0), n);
}

pub(super) fn add<D: Device>(gpu: &Gpu<D>, x: &GpuBuf<D>, y: &mut GpuBuf<D>, n: usize) {
    axpby(gpu, 1.0, (x, 0), 1.0, (y, 0), n);
}

pub(super) fn axpby<D: Device>(
    gpu: &Gpu<D>,
    a: f32,
    (x, x_at): (&GpuBuf<D>, usize),
    b: f32,
    (y, y_at): (&mut GpuBuf<D>, usize),
    n: usize,
) {
    let args: [Arg; 5] = [a.into(), x.part(x_at, n), b.into(), y.part(y_at, n), n.into()];
    gpu.launch("axpby", &[x.holds, y.holds], over_packs(n), &args);
}

pub(super) fn scale<D: Device>(gpu: &Gpu<D>, x: &mut GpuBuf<D>, s: f32, n: usize) {
    gpu.launch("scale", &[x.holds], over_packs(n), &[x.first(n), s.into(), n.into()]);
}

pub(super) fn add_bias<D: Device>(gpu: &Gpu<D>, y: MatMut<'_, Gpu<D>>, bias: &GpuBuf<D>) {
    let (rows, cols, to) = (y.rows, y.cols, view_mut(gpu, &y));
    let args = [to.at, to.stride, bias.first_f32(cols), rows.into(), cols.into()];
    gpu.launch("add_bias", &[to.holds], over_packs(rows * cols), &args);
}

pub(super) fn bias_grad<D: Device>(gpu: &Gpu<D>, dy: Mat<'_, Gpu<D>>, dbias: &mut GpuBuf<D>) {
    let (rows, cols, from) = (dy.rows, dy.cols, view(gpu, &dy));
    let args = [from.at, from.stride, dbias.first_f32(cols), rows.into(), cols.into()];
    gpu.launch("bias_grad", &[from.holds], over_columns(cols), &args);
}

pub(super) fn dropout<D: Device>(
    gpu: &Gpu<D>,
    x: Mat<'_, Gpu<D>>,
    y: MatMut<'_, Gpu<D>>,
    p: f32,
    seed: u64,
) {
    let (rows, cols) = (x.rows, x.cols);
    assert!(rows == y.rows && cols == y.cols && (0.0..1.0).contains(&p));
    let (from, to) = (view(gpu, &x), view_mut(gpu, &y));
    let scale = (1.0 / (1.0 - f64::from(p))) as f32;
    let args = [
        from.at,
        from.stride,
        to.at,
        to.stride,
        rows.into(),
        cols.into(),
        rng::stream(seed).into(),
        rng::drop_below(p).into(),
        scale.into(),
    ];
    gpu.launch("dropout", &[from.holds, to.holds], over_packs(rows * cols), &args);
}

pub(super) fn soft_cap<D: Device>(gpu: &Gpu<D>, x: &mut GpuBuf<D>, cap: f32, n: usize) {
    gpu.launch("soft_cap", &[Compute::F32], over(n), &[x.first_f32(n), cap.into(), n.into()]);
}

pub(super) fn add_noise<D: Device>(
    gpu: &Gpu<D>,
    x: &mut GpuBuf<D>,
    d: usize,
    seq_lens: &[usize],
    alpha: f32,
    (seed, first): (u64, u64),
) {
    let mut start = 0;
    for (k, &len) in seq_lens.iter().enumerate() {
        let n = len * d;
        let bound = f64::from(alpha) / (n as f64).sqrt();
        let stream = rng::stream(rng::mix(seed, first + k as u64));
        // An f32 buffer, as `first_f32` checks.
        x.first_f32(start + n);
        let args = [x.part(start, n), n.into(), stream.into(), bound.into()];
        if n > 0 {
            gpu.launch("add_noise", &[Compute::F32], over(n), &args);
        }
        start += n;
    }
}
