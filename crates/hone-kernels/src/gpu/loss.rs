//! Cross-entropy and its gradient; `kernels/masked_ce.cu`.

use super::{Arg, Device, Gpu, GpuBuf, blocks, view_mut};
use crate::{Compute, LossOptions, LossSums, MatMut};

/// What a kernel does with the logits beside the sums.
#[derive(Clone, Copy)]
enum Writes {
    Nothing = 0,
    Capped = 1,
    Gradient = 2,
}

/// Where a kernel writes, and how many values it goes on from row to row.
struct To {
    writes: Writes,
    at: Arg,
    stride: Arg,
    holds: Compute,
}

pub(super) fn cross_entropy_with<D: Device>(
    gpu: &Gpu<D>,
    mut logits: MatMut<'_, Gpu<D>>,
    targets: &[u32],
    weights: &[f32],
    grad_scale: Option<f32>,
    row_loss: Option<&mut [f32]>,
    options: LossOptions,
) -> LossSums {
    let view = view_mut(gpu, &logits);
    let writes = match (grad_scale, options.soft_cap) {
        (Some(_), _) => Writes::Gradient,
        (None, Some(_)) => Writes::Capped,
        (None, None) => Writes::Nothing,
    };
    let to = To { writes, at: view.at, stride: view.stride, holds: view.holds };
    let scale = grad_scale.unwrap_or(0.0);
    run(gpu, logits.again(), (targets, weights), (scale, to), row_loss, options)
}

pub(super) fn cross_entropy_into<D: Device>(
    gpu: &Gpu<D>,
    logits: MatMut<'_, Gpu<D>>,
    targets: &[u32],
    weights: &[f32],
    (scale, dlogits): (f32, &mut GpuBuf<D>),
    row_loss: Option<&mut [f32]>,
    options: LossOptions,
) -> LossSums {
    let (n, stride) = (logits.rows * logits.cols, logits.cols.into());
    let (writes, holds) = (Writes::Gradient, dlogits.holds);
    let to = To { writes, at: dlogits.first(n), stride, holds };
    run(gpu, logits, (targets, weights), (scale, to), row_loss, options)
}

/// Values that a kernel gives for a row: its loss, its cross-entropy, and whether its target's logit is
/// the largest.
const RESULTS: usize = 3;

fn run<D: Device>(
    gpu: &Gpu<D>,
    logits: MatMut<'_, Gpu<D>>,
    (targets, weights): (&[u32], &[f32]),
    (scale, to): (f32, To),
    row_loss: Option<&mut [f32]>,
    options: LossOptions,
) -> LossSums {
    let (n_rows, cols, from) = (logits.rows, logits.cols, view_mut(gpu, &logits));
    assert!(targets.len() == n_rows && weights.len() == n_rows, "one target and weight a row");
    assert!(targets.iter().all(|&id| (id as usize) < cols), "a target outside of {cols}");
    assert!(options.soft_cap.is_none_or(|cap| cap > 0.0), "{options:?}");
    let pairs = targets.iter().zip(weights);
    let rows: Vec<u32> = pairs.flat_map(|(&target, weight)| [target, weight.to_bits()]).collect();
    let (rows, results) = (gpu.put_u32(&rows), gpu.unset(RESULTS * n_rows, Compute::F32));
    let args = [
        from.at,
        from.stride,
        cols.into(),
        rows.arg(),
        results.first(RESULTS * n_rows),
        (to.writes as i32).into(),
        to.at,
        to.stride,
        scale.into(),
        options.label_smoothing.into(),
        options.z_loss.into(),
        options.reweight.into(),
        options.soft_cap.unwrap_or(f32::INFINITY).into(),
    ];
    gpu.launch("masked_ce", &[from.holds, to.holds], blocks(n_rows), &args);
    let mut values = vec![0.0; RESULTS * n_rows];
    gpu.read_values(&results, 0, &mut values);
    collect(&values, weights, row_loss)
}

/// The sums over the rows, in their order.
fn collect(results: &[f32], weights: &[f32], mut row_loss: Option<&mut [f32]>) -> LossSums {
    let mut sums = LossSums { n_rows: weights.len() as u64, ..LossSums::default() };
    for (i, (result, &weight)) in results.chunks_exact(RESULTS).zip(weights).enumerate() {
        let weight = f64::from(weight);
        sums.weighted_loss += weight * f64::from(result[0]);
        sums.weighted_ce += weight * f64::from(result[1]);
        sums.weight += weight;
        sums.n_correct += u64::from(result[2] != 0.0);
        if let Some(row_loss) = row_loss.as_deref_mut() {
            row_loss[i] = result[0];
        }
    }
    sums
}
