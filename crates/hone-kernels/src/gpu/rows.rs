//! Rows and columns by their numbers, and what adapters need beside products; `kernels/rows.cu`.

use super::{
    Device, Gpu, GpuBuf, Uploaded, View, blocks, over, over_columns, over_packs, view, view_mut,
};
use crate::{Compute, Mat, MatMut};

/// Values that a thread sums at a time, where they lie aligned.
const PACK_SUMS: usize = 4;

/// Threads of a block that has a row norm each.
const NORM_THREADS: usize = 64;

/// Numbers, each once, and where each of them stood, as they followed each other: on a GPU one thread
/// adds all that belongs to a number.
struct Meetings<D: Device> {
    n: usize,
    ids: Uploaded<D>,
    starts: Uploaded<D>,
    order: Uploaded<D>,
}

impl<D: Device> Meetings<D> {
    fn of(gpu: &Gpu<D>, ids: &[u32]) -> Self {
        let count = |n: usize| u32::try_from(n).expect("fewer than 2^32 ids");
        let mut order: Vec<u32> = (0..count(ids.len())).collect();
        // Equal numbers stay in their order.
        order.sort_by_key(|&i| ids[i as usize]);
        let (mut distinct, mut starts): (Vec<u32>, Vec<u32>) = (Vec::new(), Vec::new());
        for (at, &i) in order.iter().enumerate() {
            let id = ids[i as usize];
            if distinct.last() != Some(&id) {
                distinct.push(id);
                starts.push(count(at));
            }
        }
        starts.push(count(ids.len()));
        Meetings {
            n: distinct.len(),
            ids: gpu.put_u32(&distinct),
            starts: gpu.put_u32(&starts),
            order: gpu.put_u32(&order),
        }
    }
}

/// One past the largest number.
fn end(ids: &[u32]) -> usize {
    ids.iter().max().map_or(0, |&id| id as usize + 1)
}

/// A view of one row of f32.
fn one_row<D: Device>(gpu: &Gpu<D>, x: &Mat<'_, Gpu<D>>) -> View {
    let row = view(gpu, x);
    assert!(x.rows == 1 && row.holds == Compute::F32, "one row of f32");
    row
}

pub(super) fn gather_rows<D: Device>(
    gpu: &Gpu<D>,
    table: &GpuBuf<D>,
    ids: &[u32],
    d: usize,
    y: &mut GpuBuf<D>,
) {
    let n = ids.len();
    let (from, to) = (table.first(end(ids) * d), y.first(n * d));
    if n * d == 0 {
        return;
    }
    let numbers = gpu.put_u32(ids);
    let args = [from, numbers.arg(), to, n.into(), d.into()];
    gpu.launch("gather_rows", &[table.holds, y.holds], over_packs(n * d), &args);
}

pub(super) fn scatter_add_rows<D: Device>(
    gpu: &Gpu<D>,
    dy: &GpuBuf<D>,
    ids: &[u32],
    d: usize,
    dtable: &mut GpuBuf<D>,
) {
    let (from, to) = (dy.first_f32(ids.len() * d), dtable.first_f32(end(ids) * d));
    if ids.len() * d == 0 {
        return;
    }
    let met = Meetings::of(gpu, ids);
    let numbers = [met.ids.arg(), met.starts.arg(), met.order.arg()];
    let args = [from, numbers[0], numbers[1], numbers[2], to, met.n.into(), d.into()];
    let launch = over((met.n * d).div_ceil(PACK_SUMS));
    gpu.launch("scatter_add_rows", &[Compute::F32; 2], launch, &args);
}

pub(super) fn gather_columns<D: Device>(
    gpu: &Gpu<D>,
    table: Mat<'_, Gpu<D>>,
    ids: &[u32],
    y: &mut GpuBuf<D>,
) {
    assert!(end(ids) <= table.cols, "an id outside of {}", table.cols);
    let (n, rank, from) = (ids.len(), table.rows, view(gpu, &table));
    let to = y.first(n * rank);
    if n * rank == 0 {
        return;
    }
    let numbers = gpu.put_u32(ids);
    let args = [from.at, from.stride, numbers.arg(), to, n.into(), rank.into()];
    gpu.launch("gather_columns", &[from.holds, y.holds], over(n * rank), &args);
}

pub(super) fn scatter_add_columns<D: Device>(
    gpu: &Gpu<D>,
    dy: &GpuBuf<D>,
    ids: &[u32],
    dtable: MatMut<'_, Gpu<D>>,
) {
    assert!(end(ids) <= dtable.cols, "an id outside of {}", dtable.cols);
    let (rank, to) = (dtable.rows, view_mut(gpu, &dtable));
    let from = dy.first_f32(ids.len() * rank);
    if ids.len() * rank == 0 {
        return;
    }
    let met = Meetings::of(gpu, ids);
    let args = [
        from,
        met.ids.arg(),
        met.starts.arg(),
        met.order.arg(),
        to.at,
        to.stride,
        met.n.into(),
        rank.into(),
    ];
    gpu.launch("scatter_add_columns", &[Compute::F32, to.holds], over(met.n * rank), &args);
}

pub(super) fn add_scaled_columns<D: Device>(
    gpu: &Gpu<D>,
    x: Mat<'_, Gpu<D>>,
    scale: Mat<'_, Gpu<D>>,
    shift: f32,
    y: MatMut<'_, Gpu<D>>,
    beta: f32,
) {
    let (rows, cols) = (x.rows, x.cols);
    assert!(rows == y.rows && cols == y.cols && cols == scale.cols, "views of one shape");
    let (from, factors, to) = (view(gpu, &x), one_row(gpu, &scale), view_mut(gpu, &y));
    let args = [
        from.at,
        from.stride,
        factors.at,
        shift.into(),
        to.at,
        to.stride,
        beta.into(),
        rows.into(),
        cols.into(),
    ];
    if rows * cols > 0 {
        let launch = over_packs(rows * cols);
        gpu.launch("add_scaled_columns", &[from.holds, to.holds], launch, &args);
    }
}

pub(super) fn columns_dot<D: Device>(
    gpu: &Gpu<D>,
    a: Mat<'_, Gpu<D>>,
    b: Mat<'_, Gpu<D>>,
    divisor: Mat<'_, Gpu<D>>,
    out: &mut GpuBuf<D>,
) {
    let (rows, cols) = (a.rows, a.cols);
    assert!(rows == b.rows && cols == b.cols && cols == divisor.cols, "views of one shape");
    let (a, b, divisor) = (view(gpu, &a), view(gpu, &b), one_row(gpu, &divisor));
    let args =
        [a.at, a.stride, b.at, b.stride, divisor.at, out.first_f32(cols), rows.into(), cols.into()];
    gpu.launch("columns_dot", &[a.holds, b.holds], over_columns(cols), &args);
}

pub(super) fn dora_scales<D: Device>(
    gpu: &Gpu<D>,
    squares: &GpuBuf<D>,
    b: Mat<'_, Gpu<D>>,
    c: Mat<'_, Gpu<D>>,
    magnitude: &GpuBuf<D>,
    norms: MatMut<'_, Gpu<D>>,
    scales: MatMut<'_, Gpu<D>>,
) {
    let (out, rank) = (b.rows, b.cols);
    assert!(c.rows == rank && c.cols == out && norms.cols == out && scales.cols == out);
    assert!(norms.rows == 1 && scales.rows == 1, "one row each");
    let (b, c) = (view(gpu, &b), view(gpu, &c));
    let (norms, scales) = (view_mut(gpu, &norms), view_mut(gpu, &scales));
    let holds = [b.holds, c.holds, norms.holds, scales.holds];
    assert!(holds == [Compute::F32; 4], "norms of rows are made of f32");
    let args = [
        squares.first_f32(out),
        b.at,
        b.stride,
        c.at,
        c.stride,
        magnitude.first_f32(out),
        norms.at,
        scales.at,
        out.into(),
        rank.into(),
    ];
    gpu.launch("dora_scales", &[Compute::F32], blocks(out.div_ceil(NORM_THREADS)), &args);
}
