//! The mean of f32 values as PyTorch adds it up: what decides the last bit of double quantisation.
//!
//! PyTorch sums a contiguous row in eight lanes (its AVX2 kernel, which it uses on wider machines
//! too), four vectors at a time, and carries partial sums through four levels so that the error
//! grows with the logarithm of the length (its "cascade sum").

/// Lanes of a vector.
const LANES: usize = 8;
/// Vectors summed side by side.
const ROWS: usize = 4;
/// Levels of partial sums.
const LEVELS: usize = 4;

/// The mean of `x`, 0 of nothing.
pub(super) fn mean(x: &[f32]) -> f32 {
    if x.is_empty() { 0.0 } else { sum(x) / x.len() as f32 }
}

/// The sum of `x`.
fn sum(x: &[f32]) -> f32 {
    if x.len() < LANES {
        return row_sum::<1>(x)[0];
    }
    let whole = x.len() / LANES * LANES;
    let lanes = row_sum::<LANES>(&x[..whole]);
    x[whole..].iter().chain(&lanes).fold(0.0, |sum, x| sum + x)
}

/// Sums of the columns of `x`, rows of `L` values.
fn row_sum<const L: usize>(x: &[f32]) -> [f32; L] {
    let n_rows = x.len() / L;
    let n_quads = n_rows / ROWS;
    let mut sums = cascade::<L>(&x[..n_quads * ROWS * L], n_quads);
    for row in x[n_quads * ROWS * L..].chunks_exact(L) {
        add(&mut sums[0], row);
    }
    let [mut total, rest @ ..] = sums;
    rest.iter().for_each(|row| add(&mut total, row));
    total
}

/// Sums over `n` groups of [`ROWS`] rows, each row of the group on its own.
fn cascade<const L: usize>(x: &[f32], n: usize) -> [[f32; L]; ROWS] {
    let log2 = if n <= 1 { 0 } else { (n - 1).ilog2() as usize + 1 };
    let power = (log2 / LEVELS).max(4);
    let (step, mask) = (1 << power, (1 << power) - 1);
    let mut sums = [[[0.0; L]; ROWS]; LEVELS];
    let add_group = |level: &mut [[f32; L]; ROWS], i: usize| {
        let group = &x[i * ROWS * L..(i + 1) * ROWS * L];
        level.iter_mut().zip(group.chunks_exact(L)).for_each(|(sum, row)| add(sum, row));
    };
    let mut i = 0;
    while i + step <= n {
        for _ in 0..step {
            add_group(&mut sums[0], i);
            i += 1;
        }
        for j in 1..LEVELS {
            let below = std::mem::replace(&mut sums[j - 1], [[0.0; L]; ROWS]);
            sums[j].iter_mut().zip(&below).for_each(|(sum, row)| add(sum, row));
            if i & (mask << (j * power)) != 0 {
                break;
            }
        }
    }
    while i < n {
        add_group(&mut sums[0], i);
        i += 1;
    }
    let [mut total, rest @ ..] = sums;
    for level in &rest {
        total.iter_mut().zip(level).for_each(|(sum, row)| add(sum, row));
    }
    total
}

/// `sum <- sum + row`.
fn add(sum: &mut [f32], row: &[f32]) {
    sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
}
