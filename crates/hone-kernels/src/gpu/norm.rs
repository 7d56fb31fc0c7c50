//! RMSNorm; `kernels/norm.cu`.

use super::{Arg, Device, Gpu, GpuBuf, Launch, THREADS, blocks, over, view_mut};
use crate::{Compute, MatMut, NormMore, RmsNorm};

/// Rows that a thread adds up of a weight's gradient before the sums are added.
const RANGE: usize = 64;

/// Warps of a block.
const WARPS: usize = THREADS / 32;

/// The first values of a buffer that may be none, as an argument, and what they are.
fn optional<D: Device>(buf: Option<&mut GpuBuf<D>>, n: usize) -> (Arg, Compute) {
    buf.map_or((Arg::pointer(0), Compute::F32), |buf| (buf.first(n), buf.holds))
}

pub(super) fn rms_norm<D: Device>(
    gpu: &Gpu<D>,
    x: &GpuBuf<D>,
    w: &GpuBuf<D>,
    norm: RmsNorm,
    (rows, d): (usize, usize),
    y: &mut GpuBuf<D>,
    r: &mut GpuBuf<D>,
) {
    let args = [
        x.first_f32(rows * d),
        w.first_f32(d),
        norm.offset.into(),
        norm.eps.into(),
        d.into(),
        y.first(rows * d),
        r.first_f32(rows),
    ];
    gpu.launch("rms_norm", &[y.holds], blocks(rows), &args);
}

#[allow(clippy::too_many_arguments, reason = "what the formula names")]
pub(super) fn rms_norm_backward<D: Device>(
    gpu: &Gpu<D>,
    dy: &GpuBuf<D>,
    x: &GpuBuf<D>,
    w: &GpuBuf<D>,
    norm: RmsNorm,
    r: &GpuBuf<D>,
    (rows, d): (usize, usize),
    dx: &mut GpuBuf<D>,
    more: NormMore<'_, Gpu<D>>,
) {
    let n = rows * d;
    let NormMore { dw, y, dx: again } = more;
    if let Some(dw) = dw {
        let sides = (rows, 1, d);
        weight_grad(gpu, (dy.first(n), d, dy.holds), (x.first_f32(n), x.holds), r, sides, dw);
    }
    let ((y, y_holds), (again, again_holds)) = (optional(y, n), optional(again, n));
    let args = [
        dy.first(n),
        x.first_f32(n),
        w.first_f32(d),
        norm.offset.into(),
        r.first_f32(rows),
        d.into(),
        dx.first_f32(n),
        y,
        again,
    ];
    gpu.launch("rms_norm_backward", &[dy.holds, y_holds, again_holds], blocks(rows), &args);
}

/// `dw <- dw + sum of dy x r` over rows and groups; `dy` has its rows so far apart.
fn weight_grad<D: Device>(
    gpu: &Gpu<D>,
    (dy, stride, dy_holds): (Arg, usize, Compute),
    (x, x_holds): (Arg, Compute),
    r: &GpuBuf<D>,
    (rows, groups, d): (usize, usize, usize),
    dw: &mut GpuBuf<D>,
) {
    let n_parts = rows.div_ceil(RANGE);
    let parts = gpu.unset(n_parts * d, Compute::F32);
    let args = [
        dy,
        stride.into(),
        x,
        r.first_f32(rows * groups),
        rows.into(),
        groups.into(),
        d.into(),
        RANGE.into(),
        parts.first_f32(n_parts * d),
    ];
    let across = u32::try_from(d.div_ceil(THREADS)).expect("fewer than 2^32 columns");
    let down = u32::try_from(n_parts).expect("fewer than 2^32 ranges");
    let launch = Launch { grid: [across, down, 1], shared_bytes: 0 };
    gpu.launch("norm_dw", &[dy_holds, x_holds], launch, &args);
    let args = [parts.first_f32(n_parts * d), n_parts.into(), d.into(), dw.first_f32(d)];
    gpu.launch("add_parts", &[Compute::F32], over(d), &args);
}

pub(super) fn group_norm<D: Device>(
    gpu: &Gpu<D>,
    x: MatMut<'_, Gpu<D>>,
    w: &GpuBuf<D>,
    norm: RmsNorm,
    width: usize,
    raw: &mut GpuBuf<D>,
) {
    let (rows, cols, at) = (x.rows, x.cols, view_mut(gpu, &x));
    assert!(width > 0 && cols.is_multiple_of(width), "groups of {width} in {cols} columns");
    assert!(at.holds == raw.holds, "the norm's input is kept as it was");
    let groups = cols / width;
    let args = [
        at.at,
        at.stride,
        rows.into(),
        groups.into(),
        width.into(),
        w.first_f32(width),
        norm.offset.into(),
        norm.eps.into(),
        raw.first(rows * cols),
    ];
    gpu.launch("group_norm", &[at.holds], blocks((rows * groups).div_ceil(WARPS)), &args);
}

pub(super) fn group_norm_backward<D: Device>(
    gpu: &Gpu<D>,
    dy: MatMut<'_, Gpu<D>>,
    raw: &GpuBuf<D>,
    w: &GpuBuf<D>,
    norm: RmsNorm,
    width: usize,
    dw: Option<&mut GpuBuf<D>>,
) {
    let (rows, cols, stride, at) = (dy.rows, dy.cols, dy.stride, view_mut(gpu, &dy));
    assert!(width > 0 && cols.is_multiple_of(width), "groups of {width} in {cols} columns");
    let (groups, pairs) = (cols / width, rows * (cols / width));
    let (launch, input) = (blocks(pairs.div_ceil(WARPS)), raw.first(rows * cols));
    let r = gpu.unset(pairs, Compute::F32);
    let args = [input, pairs.into(), width.into(), norm.eps.into(), r.first_f32(pairs)];
    gpu.launch("group_roots", &[raw.holds], launch, &args);
    if let Some(dw) = dw {
        let sides = (rows, groups, width);
        weight_grad(gpu, (at.at, stride, at.holds), (input, raw.holds), &r, sides, dw);
    }
    let args = [
        at.at,
        at.stride,
        rows.into(),
        groups.into(),
        width.into(),
        input,
        w.first_f32(width),
        norm.offset.into(),
        r.first_f32(pairs),
    ];
    gpu.launch("group_norm_backward", &[at.holds, raw.holds], launch, &args);
}
