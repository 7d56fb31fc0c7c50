//! Products of rounded factors on machines without an instruction for them.

use std::cell::Cell;

use super::{Block, Factor, Out, Values, runs};
use crate::Compute;

thread_local! {
    /// The parts of both factors that a thread multiplies, kept from call to call.
    static PARTS: Cell<[Vec<f32>; 2]> = Cell::default();
}

/// One block of the result, all of its sums; see [`super::product`].
#[allow(unsafe_code, reason = "blocks of one matrix are written by several threads")]
pub(super) fn block(block: Block, k: usize, a: Factor<'_>, b: Factor<'_>, out: Out) {
    let mut parts = PARTS.take();
    let (m, n) = (block.rows.len(), block.cols.len());
    let at = block.rows.start * out.stride + block.cols.start;
    for (nth, run) in runs(k).enumerate() {
        let beta = if nth == 0 { block.beta } else { 1.0 };
        let [a_part, b_part] = &mut parts;
        let (a_row, a_col) = widen(a, block.rows.clone(), run.clone(), a_part);
        let (b_col, b_row) = widen(b, block.cols.clone(), run.clone(), b_part);
        // SAFETY: `widen` has filled both parts, (m, run) and (n, run) with the strides that it
        // gave; the caller has checked that C holds the block, and no other task touches it.
        unsafe {
            gemm::gemm(
                m,
                n,
                run.len(),
                out.start.at(at),
                1,
                out.stride as isize,
                beta != 0.0,
                a_part.as_ptr(),
                a_col,
                a_row,
                b_part.as_ptr(),
                b_col,
                b_row,
                beta,
                block.alpha,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    }
    PARTS.set(parts);
}

/// `part` <- lanes of a factor along a run, rounded; returns its strides by lane and by depth.
fn widen(
    x: Factor<'_>,
    lanes: std::ops::Range<usize>,
    run: std::ops::Range<usize>,
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
            Values::F32(x) => part.extend(x[values].iter().map(|&x| Compute::Bf16.round(x))),
            Values::Bf16(x) => part.extend(x[values].iter().map(|x| x.to_f32())),
        }
    }
    let len = line.len() as isize;
    if by_lane { (len, 1) } else { (1, len) }
}
