//! Products of rounded factors on machines without an instruction for them.

use std::cell::Cell;
use std::ops::Range;

use half::bf16;

use super::super::par::SharedPtr;
use super::packed::PackedHalf;
use super::{Factor, Frozen, Job, Place, Right, Tail, Values, runs};
use crate::Compute;

/// What a thread computes with; kept from call to call.
#[derive(Default)]
struct Scratch {
    /// The parts of both factors.
    parts: [Vec<f32>; 2],
    /// A block of the result, where that holds bf16.
    sums: Vec<f32>,
}

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

/// One block of the result, all of its sums; see [`super::product`].
#[allow(unsafe_code, reason = "blocks of one matrix are written by several threads")]
pub(super) fn block(job: &Job<'_>, rows: Range<usize>, cols: Range<usize>) {
    let mut scratch = SCRATCH.take();
    let Scratch { parts, sums } = &mut scratch;
    match job.out {
        Place::F32 { start, stride } => {
            let start = SharedPtr(start.at(rows.start * stride + cols.start));
            add_all(job, &rows, &cols, (start, stride), parts);
        }
        Place::Bf16 { start, stride } => {
            let width = cols.len();
            let row = |i: usize| start.at((rows.start + i) * stride + cols.start);
            sums.clear();
            sums.resize(rows.len() * width, 0.0);
            if job.beta != 0.0 {
                for (i, sums) in sums.chunks_mut(width).enumerate() {
                    // SAFETY: the caller has checked that C holds the block, and no other task
                    // touches it.
                    let old = unsafe { std::slice::from_raw_parts(row(i), width) };
                    sums.iter_mut().zip(old).for_each(|(sum, old)| *sum = old.to_f32());
                }
            }
            add_all(job, &rows, &cols, (SharedPtr(sums.as_mut_ptr()), width), parts);
            for (i, sums) in sums.chunks(width).enumerate() {
                // SAFETY: as above.
                let to = unsafe { std::slice::from_raw_parts_mut(row(i), width) };
                to.iter_mut().zip(sums).for_each(|(to, &sum)| *to = bf16::from_f32(sum));
            }
        }
    }
    SCRATCH.set(scratch);
}

/// A block of the result at `out`, its rows so far apart.
fn add_all(
    job: &Job<'_>,
    rows: &Range<usize>,
    cols: &Range<usize>,
    (out, stride): (SharedPtr<f32>, usize),
    parts: &mut [Vec<f32>; 2],
) {
    for (nth, run) in runs(job.k, job.right.run_max()).enumerate() {
        let beta = if nth == 0 { job.beta } else { 1.0 };
        let sides = (rows.len(), cols.len(), run.len());
        let [a_part, b_part] = &mut *parts;
        let a = widen(job.a, rows.clone(), run.clone(), 1.0, a_part);
        let b = match job.right {
            Right::Factor(b) => widen(b, cols.clone(), run, 1.0, b_part),
            Right::Rows(Frozen::Packed(weight)) => {
                (unpack(weight, cols.clone(), run.clone(), b_part), 1)
            }
            Right::Columns(Frozen::Packed(weight)) => {
                (1, unpack(weight, run, cols.clone(), b_part))
            }
            _ => unreachable!("`takes_4bit` says no, and nothing is laid out for this engine"),
        };
        add(sides, (a, b), (job.alpha, beta), (out, stride), parts);
    }
    for Tail { u, v, rank, cols: (first, n), scale } in job.tails {
        let (start, end) = (cols.start.max(*first), cols.end.min(first + n));
        if start < end {
            let [u_part, v_part] = &mut *parts;
            let u = widen(*u, rows.clone(), 0..*rank, *scale, u_part);
            let v = widen(*v, start - first..end - first, 0..*rank, 1.0, v_part);
            let out = SharedPtr(out.at(start - cols.start));
            add((rows.len(), end - start, *rank), (u, v), (1.0, 1.0), (out, stride), parts);
        }
    }
}

/// The (m, n) block at `out` <- `alpha` A B + `beta` times itself, sums of `k` terms, the parts of A
/// and B having these strides by lane and by depth.
#[allow(unsafe_code, reason = "blocks of one matrix are written by several threads")]
fn add(
    (m, n, k): (usize, usize, usize),
    (a, b): ((isize, isize), (isize, isize)),
    (alpha, beta): (f32, f32),
    (out, stride): (SharedPtr<f32>, usize),
    [a_part, b_part]: &[Vec<f32>; 2],
) {
    // SAFETY: the caller has filled both parts, (m, k) and (n, k) with those strides, and has checked
    // that the result holds the block; no other task touches it.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.at(0),
            1,
            stride as isize,
            beta != 0.0,
            a_part.as_ptr(),
            a.1,
            a.0,
            b_part.as_ptr(),
            b.0,
            b.1,
            beta,
            alpha,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// `part` <- rows of a frozen weight from the first to the last of some columns; returns the
/// distance between rows.
fn unpack(
    weight: &PackedHalf,
    rows: Range<usize>,
    cols: Range<usize>,
    part: &mut Vec<f32>,
) -> isize {
    let width = cols.len();
    part.clear();
    part.resize(rows.len() * width, 0.0);
    for (row, part) in rows.zip(part.chunks_mut(width.max(1))) {
        weight.read_row(row, cols.start, part);
    }
    width as isize
}

/// `part` <- `scale` times lanes of a factor along a run, rounded; returns its strides by lane and by depth.
fn widen(
    x: Factor<'_>,
    lanes: Range<usize>,
    run: Range<usize>,
    scale: f32,
    part: &mut Vec<f32>,
) -> (isize, isize) {
    part.clear();
    let by_lane = x.depth_stride == 1;
    let (lines, line, stride) =
        if by_lane { (lanes, run, x.lane_stride) } else { (run, lanes, x.depth_stride) };
    for at in lines {
        let values = at * stride + line.start..at * stride + line.end;
        match x.values {
            _ if line.is_empty() => {}
            Values::F32(x) => {
                part.extend(x[values].iter().map(|&x| Compute::Bf16.round(scale * x)))
            }
            Values::Bf16(x) => {
                part.extend(x[values].iter().map(|x| Compute::Bf16.round(scale * x.to_f32())));
            }
        }
    }
    let len = line.len() as isize;
    if by_lane { (len, 1) } else { (1, len) }
}
