//! Products of matrices, which a GPU has a library for.

use half::bf16;
use hone_kernels::gpu::{Matrix, Product};
use hone_kernels::{Compute, Op};

/// Values of a matrix, widened.
///
/// # Safety
///
/// The values must be there and hold what they are said to hold.
unsafe fn load(at: Matrix, index: usize, holds: Compute) -> f32 {
    // SAFETY: the caller's.
    unsafe {
        match holds {
            Compute::F32 => *(at.address as *const f32).add(index),
            Compute::Bf16 => (*(at.address as *const bf16).add(index)).to_f32(),
        }
    }
}

/// op(X) (rows, cols), dense and row-major.
///
/// # Safety
///
/// As for [`load`].
unsafe fn gathered((x, op): (Matrix, Op), rows: usize, cols: usize, holds: Compute) -> Vec<f32> {
    let mut values = Vec::with_capacity(rows * cols);
    for i in 0..rows {
        for j in 0..cols {
            let index = if op == Op::N { i * x.stride + j } else { j * x.stride + i };
            // SAFETY: the caller's.
            values.push(unsafe { load(x, index, holds) });
        }
    }
    values
}

/// Runs `product`.
///
/// # Safety
///
/// All of its matrices must be there, and nobody else may use the result.
pub(crate) unsafe fn run(product: &Product) {
    let Product { a, b, c, y, sides: (m, n, k), factors: (alpha, beta), inputs, output } = *product;
    // SAFETY: the caller's.
    let (a, b) = unsafe { (gathered(a, m, k, inputs), gathered(b, k, n, inputs)) };
    let mut sums = vec![0.0_f64; n];
    for i in 0..m {
        sums.fill(0.0);
        for (l, &x) in a[i * k..(i + 1) * k].iter().enumerate() {
            let row = &b[l * n..(l + 1) * n];
            sums.iter_mut().zip(row).for_each(|(sum, &z)| *sum += f64::from(x) * f64::from(z));
        }
        for (j, &sum) in sums.iter().enumerate() {
            let index = i * y.stride + j;
            // SAFETY: the caller's.
            unsafe {
                let kept = if beta == 0.0 { 0.0 } else { beta * load(c, i * c.stride + j, output) };
                let value = alpha * sum as f32 + kept;
                match output {
                    Compute::F32 => *(y.address as *mut f32).add(index) = value,
                    Compute::Bf16 => {
                        *(y.address as *mut bf16).add(index) = bf16::from_f32(value);
                    }
                }
            }
        }
    }
}
