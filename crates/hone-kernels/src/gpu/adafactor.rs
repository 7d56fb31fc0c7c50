//! Adafactor; `kernels/adafactor.cu`.

use super::update::{Parts, part_f32, squares};
use super::{Arg, Device, Gpu, GpuBuf, Launch, THREADS, blocks, over};
use crate::{Adafactor, Compute, SecondMoment};

/// Columns that a block of the step has.
const COLUMNS: usize = 4 * THREADS;

/// Blocks of the step from which on they go on to further rows.
const STEP_BLOCKS: usize = 1 << 11;

/// Most pieces of the sums of the columns, and fewest rows of one.
const PIECES_MAX: usize = 64;
const PIECE_ROWS_MIN: usize = 32;

/// A gradient (rows, cols) and what its step is made of.
struct Step<'a, D: Device> {
    gpu: &'a Gpu<D>,
    g: Arg,
    rows: usize,
    cols: usize,
    update: Adafactor,
}

fn launch<D: Device>(gpu: &Gpu<D>, name: &str, launch: Launch, args: &[&[Arg]]) {
    gpu.launch(name, &[Compute::F32], launch, &args.concat());
}

impl<D: Device> Step<'_, D> {
    /// What a mean decays by.
    fn decay(&self) -> [Arg; 3] {
        let Adafactor { eps, beta2, grad_scale, .. } = self.update;
        [f64::from(grad_scale).into(), eps.into(), beta2.into()]
    }

    /// Takes the gradient into the means of rows and columns; returns the mean of the rows'.
    fn factored(&self, row: &GpuBuf<D>, col: &GpuBuf<D>) -> GpuBuf<D> {
        let Step { gpu, g, rows, cols, .. } = *self;
        let (by_row, by_col, decay) = (row.first_f32(rows), col.first_f32(cols), self.decay());
        launch(gpu, "adafactor_rows", blocks(rows), &[&[g, cols.into(), by_row], &decay]);
        let height = PIECE_ROWS_MIN.max(rows.div_ceil(PIECES_MAX));
        let n_pieces = rows.div_ceil(height);
        let pieces = Parts::new(gpu, n_pieces * cols);
        let wide = blocks(cols.div_ceil(THREADS));
        let tall = Launch { grid: [wide.grid[0], n_pieces as u32, 1], ..wide };
        let args = [g, rows.into(), cols.into(), height.into(), pieces.arg()];
        launch(gpu, "adafactor_columns", tall, &[&args]);
        let args = [pieces.arg(), n_pieces.into(), rows.into(), cols.into(), by_col];
        launch(gpu, "adafactor_column_means", wide, &[&args, &decay]);
        let mean = gpu.buf(1, Compute::F32);
        launch(gpu, "adafactor_mean", blocks(1), &[&[by_row, rows.into(), mean.first(1)]]);
        mean
    }

    /// Takes the gradient into the second moment of every value.
    fn full(&self, v: &GpuBuf<D>) {
        let n = self.rows * self.cols;
        let args = [self.g, v.first_f32(n), n.into()];
        launch(self.gpu, "adafactor_values", over(n), &[&args, &self.decay()]);
    }

    /// Makes the step of the second moment, and applies it to values `p` and the first moment `m`.
    fn apply(&self, [row, mean, second]: [Arg; 3], (p, m): (Arg, Arg), of_p: Option<&Parts<D>>) {
        let Step { gpu, g, rows, cols, update } = *self;
        let wide = blocks(cols.div_ceil(COLUMNS));
        let height = (STEP_BLOCKS / wide.grid[0] as usize).clamp(1, rows);
        let grid = Launch { grid: [wide.grid[0], height as u32, 1], ..wide };
        let step = [g, rows.into(), cols.into(), row, mean, second, Arg::from(update.grad_scale)];
        let parts = Parts::new(gpu, wide.grid[0] as usize * height);
        launch(gpu, "adafactor_squares", grid, &[&step, &[parts.arg()]]);
        let rates = gpu.buf(2, Compute::F32);
        let (of_p, n_of_p) = of_p.map_or((Arg::pointer(0), 0), |parts| (parts.arg(), parts.n));
        let sums = [of_p, n_of_p.into(), parts.arg(), parts.n.into()];
        let scalars = [
            (rows * cols) as f64,
            update.lr,
            update.scale_min.unwrap_or(0.0),
            update.clip_threshold,
            update.weight_decay,
        ];
        let scalars = scalars.map(Arg::from);
        launch(gpu, "adafactor_rates", blocks(1), &[&sums, &scalars, &[rates.first(2)]]);
        let (beta1, fresh) = (update.beta1 as f32, (1.0 - update.beta1) as f32);
        let to = [p, m, beta1.into(), fresh.into(), rates.first(2)];
        launch(gpu, "adafactor_apply", grid, &[&step, &to]);
    }
}

pub(super) fn adafactor<D: Device>(
    gpu: &Gpu<D>,
    p: &mut GpuBuf<D>,
    g: &GpuBuf<D>,
    at: usize,
    second: SecondMoment<'_, Gpu<D>>,
    first: Option<&mut GpuBuf<D>>,
    update: Adafactor,
) {
    let n = second.n_values(gpu);
    let (p_part, g_part) = (part_f32(p, at, n), part_f32(g, at, n));
    let m = first.map_or(Arg::pointer(0), |m| m.first_f32(n));
    if n == 0 {
        return;
    }
    // Of the weights as they were.
    let of_p = update.scale_min.map(|_| squares(gpu, p, at, n));
    let (rows, cols) = match &second {
        SecondMoment::Factored(row, col) => (row.len, col.len),
        SecondMoment::Full(_) => (1, n),
    };
    let step = Step { gpu, g: g_part, rows, cols, update };
    match second {
        SecondMoment::Factored(row, col) => {
            let mean = step.factored(row, col);
            let of = [row.first_f32(rows), mean.first(1), col.first_f32(cols)];
            step.apply(of, (p_part, m), of_p.as_ref());
        }
        SecondMoment::Full(v) => {
            step.full(v);
            let of = [Arg::pointer(0), Arg::pointer(0), v.first_f32(n)];
            step.apply(of, (p_part, m), of_p.as_ref());
        }
    }
}
