//! Norms; `kernels/norm.cu`.

use super::{Arg, Device, Gpu, GpuBuf, Launch, blocks, over_columns, view_mut};
use crate::{Compute, MatMut, NormMore, RmsNorm};

/// Values of a group that a warp keeps in registers; longer ones are a block's.
const WARP_VALUES: usize = 512;

/// As [`WARP_VALUES`], of kernels for groups as short as heads are.
const HEAD_VALUES: usize = 128;

/// Warps of a block.
const BLOCK_WARPS: usize = 8;

/// Most sums of a weight's gradient that warps leave, or blocks: enough of either that a GPU is busy, and few
/// enough that it takes little to add them.
const SUMS_MAX: (usize, usize) = (4096, 264);

/// Most blocks of a forward; they go on to further groups.
const BLOCKS_MAX: usize = 1 << 16;

/// How many groups of `width` values there are, and who has one at a time.
#[derive(Clone, Copy)]
struct Teams {
    groups: usize,
    width: usize,
}

impl Teams {
    /// Whether a warp has a group.
    fn warps(self) -> bool {
        self.width <= WARP_VALUES
    }

    /// The kernel, of those for heads, warps and blocks.
    fn pick(self, [by_head, by_warp, by_block]: [&'static str; 3]) -> &'static str {
        if self.width <= HEAD_VALUES {
            by_head
        } else if self.warps() {
            by_warp
        } else {
            by_block
        }
    }

    /// Blocks that have so many teams.
    fn launch(self, teams: usize) -> Launch {
        blocks(if self.warps() { teams.div_ceil(BLOCK_WARPS) } else { teams })
    }

    /// A team a group, as far as that goes.
    fn forward(self) -> Launch {
        let most = if self.warps() { BLOCKS_MAX * BLOCK_WARPS } else { BLOCKS_MAX };
        self.launch(self.groups.min(most))
    }

    /// Groups of a team in the backward, and how many teams that makes.
    fn shares(self, sums: bool) -> (usize, usize) {
        let most = if self.warps() { SUMS_MAX.0 } else { SUMS_MAX.1 };
        let each = if sums { self.groups.div_ceil(most) } else { 1 };
        (each, self.groups.div_ceil(each))
    }
}

/// No buffer.
fn none() -> Arg {
    Arg::pointer(0)
}

/// Runs a backward with a place for each team's sum of the weight's gradient, where that is asked for,
/// and adds these.
fn with_sums<D: Device>(
    gpu: &Gpu<D>,
    teams: Teams,
    dw: Option<&mut GpuBuf<D>>,
    run: impl FnOnce(Launch, Arg, usize),
) {
    let (each, n) = teams.shares(dw.is_some());
    let Some(dw) = dw else { return run(teams.launch(n), none(), each) };
    let (to, sums) = (dw.first_f32(teams.width), gpu.buf(n * teams.width, Compute::F32));
    run(teams.launch(n), sums.first(n * teams.width), each);
    let args = [sums.first(n * teams.width), to, n.into(), teams.width.into()];
    gpu.launch("norm_weight", &[Compute::F32; 2], over_columns(teams.width), &args);
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
        norm.eps.into(),
        norm.offset.into(),
        rows.into(),
        d.into(),
        y.first(rows * d),
        r.first_f32(rows),
    ];
    if rows * d > 0 {
        let teams = Teams { groups: rows, width: d };
        let name = teams.pick(["rms_norm_by_warp", "rms_norm_by_warp", "rms_norm_by_block"]);
        gpu.launch(name, &[y.holds], teams.forward(), &args);
    }
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
    let (n, teams) = (rows * d, Teams { groups: rows, width: d });
    let name = teams.pick([
        "rms_norm_backward_by_warp",
        "rms_norm_backward_by_warp",
        "rms_norm_backward_by_block",
    ]);
    // What is not wanted may be of any kind.
    let wanted = |buf: &Option<&mut GpuBuf<D>>| {
        buf.as_ref().map_or((none(), Compute::F32), |buf| (buf.first(n), buf.holds))
    };
    let (again, y) = (wanted(&more.dx), wanted(&more.y));
    let [inputs, outputs] = [[x.first_f32(n), w.first_f32(d)], [dx.first_f32(n), again.0]];
    if n == 0 {
        return;
    }
    with_sums(gpu, teams, more.dw, |launch, sums, each| {
        let args = [
            dy.first(n),
            inputs[0],
            inputs[1],
            norm.eps.into(),
            norm.offset.into(),
            r.first_f32(rows),
            rows.into(),
            d.into(),
            outputs[0],
            outputs[1],
            y.0,
            sums,
            each.into(),
        ];
        gpu.launch(name, &[dy.holds, again.1, y.1], launch, &args);
    });
}

/// Groups in a row; checks that they are whole.
fn groups_in_row(cols: usize, width: usize) -> usize {
    assert!(width > 0 && cols.is_multiple_of(width), "groups of {width} in {cols} columns");
    cols / width
}

pub(super) fn group_norm<D: Device>(
    gpu: &Gpu<D>,
    x: MatMut<'_, Gpu<D>>,
    w: &GpuBuf<D>,
    norm: RmsNorm,
    width: usize,
    raw: &mut GpuBuf<D>,
) {
    let (rows, cols, in_row) = (x.rows, x.cols, groups_in_row(x.cols, width));
    let at = view_mut(gpu, &x);
    assert!(at.holds == raw.holds, "a group norm and what it keeps are both rounded, or neither");
    let args = [
        at.at,
        at.stride,
        w.first_f32(width),
        norm.eps.into(),
        norm.offset.into(),
        rows.into(),
        in_row.into(),
        width.into(),
        raw.first(rows * cols),
    ];
    if rows * cols > 0 {
        let teams = Teams { groups: rows * in_row, width };
        let name = teams.pick(["group_norm_by_head", "group_norm_by_warp", "group_norm_by_block"]);
        gpu.launch(name, &[at.holds], teams.forward(), &args);
    }
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
    let (rows, cols, in_row) = (dy.rows, dy.cols, groups_in_row(dy.cols, width));
    let at = view_mut(gpu, &dy);
    let (raw_at, factors) = (raw.first(rows * cols), w.first_f32(width));
    if rows * cols == 0 {
        return;
    }
    let teams = Teams { groups: rows * in_row, width };
    let name = teams.pick([
        "group_norm_backward_by_head",
        "group_norm_backward_by_warp",
        "group_norm_backward_by_block",
    ]);
    with_sums(gpu, teams, dw, |launch, sums, each| {
        let args = [
            at.at,
            at.stride,
            raw_at,
            factors,
            norm.eps.into(),
            norm.offset.into(),
            rows.into(),
            in_row.into(),
            width.into(),
            sums,
            each.into(),
        ];
        gpu.launch(name, &[at.holds, raw.holds], launch, &args);
    });
}
