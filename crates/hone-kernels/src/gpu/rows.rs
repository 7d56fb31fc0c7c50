//! Rows and columns by number, and what adapters do by column; `kernels/rows.cu`.

use std::collections::BTreeMap;

use super::{Arg, Device, Gpu, GpuBuf, Launch, THREADS, Uploaded, blocks, over, view, view_mut};
use crate::{Compute, Mat, MatMut};

/// Rows that a thread adds up before the sums are added.
const RANGE: usize = 64;

/// A view whose values must be f32.
fn f32_view<D: Device>(gpu: &Gpu<D>, m: &Mat<'_, Gpu<D>>) -> super::View {
    let view = view(gpu, m);
    assert!(view.holds == Compute::F32, "a rounded buffer where values must be f32");
    view
}

/// Checks that numbers name something.
fn check(ids: &[u32], n: usize) {
    let last = ids.iter().max().map_or(0, |&id| id as usize + 1);
    assert!(last <= n, "number {last} of {n}");
}

pub(super) fn gather_rows<D: Device>(
    gpu: &Gpu<D>,
    table: &GpuBuf<D>,
    ids: &[u32],
    d: usize,
    y: &mut GpuBuf<D>,
) {
    check(ids, table.len / d.max(1));
    let (n, numbers) = (ids.len(), gpu.put_u32(ids));
    let args = [table.first(table.len), numbers.arg(), n.into(), d.into(), y.first(n * d)];
    gpu.launch("gather_rows", &[table.holds, y.holds], over(n * d), &args);
}

/// The numbers that occur, each with its places in the order in which it has them.
struct Places<D: Device> {
    n: usize,
    ids: Uploaded<D>,
    starts: Uploaded<D>,
    places: Uploaded<D>,
}

impl<D: Device> Places<D> {
    fn new(gpu: &Gpu<D>, ids: &[u32]) -> Self {
        let mut of: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for (place, &id) in (0..).zip(ids) {
            of.entry(id).or_default().push(place);
        }
        let mut starts = vec![0];
        for places in of.values() {
            let end = starts[starts.len() - 1] + places.len() as u32;
            starts.push(end);
        }
        let numbers: Vec<u32> = of.keys().copied().collect();
        let places: Vec<u32> = of.into_values().flatten().collect();
        Places {
            n: numbers.len(),
            ids: gpu.put_u32(&numbers),
            starts: gpu.put_u32(&starts),
            places: gpu.put_u32(&places),
        }
    }
}

/// Adds rows `d` wide of `dy` to what their numbers name, `id_stride` apart, with values `stride` apart.
fn scatter<D: Device>(
    gpu: &Gpu<D>,
    dy: Arg,
    ids: &[u32],
    d: usize,
    to: Arg,
    (id_stride, stride): (usize, usize),
) {
    let places = Places::new(gpu, ids);
    let args = [
        dy,
        places.ids.arg(),
        places.starts.arg(),
        places.places.arg(),
        d.into(),
        to,
        id_stride.into(),
        stride.into(),
    ];
    gpu.launch("scatter_add", &[Compute::F32], blocks(places.n), &args);
}

pub(super) fn scatter_add_rows<D: Device>(
    gpu: &Gpu<D>,
    dy: &GpuBuf<D>,
    ids: &[u32],
    d: usize,
    dtable: &mut GpuBuf<D>,
) {
    check(ids, dtable.len / d.max(1));
    let to = dtable.first_f32(dtable.len);
    scatter(gpu, dy.first_f32(ids.len() * d), ids, d, to, (d, 1));
}

pub(super) fn gather_columns<D: Device>(
    gpu: &Gpu<D>,
    table: Mat<'_, Gpu<D>>,
    ids: &[u32],
    y: &mut GpuBuf<D>,
) {
    check(ids, table.cols);
    let (n, rank, numbers) = (ids.len(), table.rows, gpu.put_u32(ids));
    let from = view(gpu, &table);
    let args = [from.at, from.stride, rank.into(), numbers.arg(), n.into(), y.first(n * rank)];
    gpu.launch("gather_columns", &[from.holds, y.holds], over(n * rank), &args);
}

pub(super) fn scatter_add_columns<D: Device>(
    gpu: &Gpu<D>,
    dy: &GpuBuf<D>,
    ids: &[u32],
    dtable: MatMut<'_, Gpu<D>>,
) {
    check(ids, dtable.cols);
    let (rank, stride, to) = (dtable.rows, dtable.stride, view_mut(gpu, &dtable));
    assert!(to.holds == Compute::F32, "a rounded buffer where values must be f32");
    scatter(gpu, dy.first_f32(ids.len() * rank), ids, rank, to.at, (1, stride));
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
    assert!(rows == y.rows && cols == y.cols && scale.cols == cols && scale.rows == 1);
    let (from, factors, to) = (view(gpu, &x), f32_view(gpu, &scale), view_mut(gpu, &y));
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
    gpu.launch("add_scaled_columns", &[from.holds, to.holds], over(rows * cols), &args);
}

pub(super) fn columns_dot<D: Device>(
    gpu: &Gpu<D>,
    a: Mat<'_, Gpu<D>>,
    b: Mat<'_, Gpu<D>>,
    divisor: Mat<'_, Gpu<D>>,
    out: &mut GpuBuf<D>,
) {
    let (rows, cols) = (a.rows, a.cols);
    assert!(rows == b.rows && cols == b.cols && divisor.cols == cols && divisor.rows == 1);
    let (left, right, under) = (view(gpu, &a), view(gpu, &b), f32_view(gpu, &divisor));
    let n_parts = rows.div_ceil(RANGE);
    let parts = gpu.unset(n_parts * cols, Compute::F32);
    let args = [
        left.at,
        left.stride,
        right.at,
        right.stride,
        rows.into(),
        cols.into(),
        RANGE.into(),
        parts.first_f32(n_parts * cols),
    ];
    let across = u32::try_from(cols.div_ceil(THREADS)).expect("fewer than 2^32 columns");
    let down = u32::try_from(n_parts).expect("fewer than 2^32 ranges");
    let launch = Launch { grid: [across, down, 1], shared_bytes: 0 };
    gpu.launch("columns_dot", &[left.holds, right.holds], launch, &args);
    let args = [
        parts.first_f32(n_parts * cols),
        n_parts.into(),
        cols.into(),
        under.at,
        out.first_f32(cols),
    ];
    gpu.launch("add_divided_parts", &[Compute::F32], over(cols), &args);
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
    assert!(c.cols == out && c.rows == rank && norms.cols == out && scales.cols == out);
    let (left, right) = (f32_view(gpu, &b), f32_view(gpu, &c));
    let (norms, scales) = (view_mut(gpu, &norms), view_mut(gpu, &scales));
    assert!(norms.holds == Compute::F32 && scales.holds == Compute::F32, "norms are f32");
    let args = [
        squares.first_f32(out),
        left.at,
        left.stride,
        right.at,
        right.stride,
        magnitude.first_f32(out),
        out.into(),
        rank.into(),
        norms.at,
        scales.at,
    ];
    gpu.launch("dora_scales", &[Compute::F32], over(out), &args);
}
