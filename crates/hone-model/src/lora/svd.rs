//! The largest singular values and vectors of a matrix.
//!
//! A block of vectors is multiplied by W Wt over and over (subspace iteration, with ten vectors
//! more than are wanted; Halko, Martinsson and Tropp 2011), and the singular values of the small
//! matrix that is left are found by rotating pairs of its rows until all are orthogonal (one-sided
//! Jacobi; Hestenes 1958). Small matrices are rotated as they are, which is exact.

use hone_kernels::{Backend, Cpu, Mat, MatMut, Op, rng};

/// Vectors carried beside the wanted ones.
const OVERSAMPLE: usize = 10;

/// Multiplications by W Wt: errors shrink by the fourth power of the ratio of singular values a
/// round.
const ROUNDS: usize = 16;

/// Smaller side up to which a matrix is rotated as it is.
const EXACT_MAX: usize = 96;

/// Most sweeps over all pairs of rows; fewer than ten do for well-separated values.
const SWEEPS_MAX: usize = 60;

/// r singular triplets, the largest first: U (m, r), S (r), Vt (r, n).
pub(super) struct Svd {
    pub(super) u: Vec<f64>,
    pub(super) s: Vec<f64>,
    pub(super) vt: Vec<f64>,
}

/// The `r` largest of `w` (m, n); where there are fewer, the rest are zero.
pub(super) fn largest(w: &[f32], (m, n): (usize, usize), r: usize, seed: u64) -> Svd {
    let side = m.min(n);
    let k = if side <= EXACT_MAX { side } else { (r + OVERSAMPLE).min(side) };
    // An orthonormal Q (k, m) whose rows span what W's columns mostly lie in, and Y = Q W (k, n).
    let q = if k == m { identity(m) } else { basis(w, (m, n), k, seed) };
    let mut y = product(&q, w, (k, m, n));
    let mut turned = q;
    let norms = rotate(&mut y, &mut turned, (k, n, m));
    let mut order: Vec<usize> = (0..k).collect();
    order.sort_by(|&a, &b| norms[b].total_cmp(&norms[a]));
    let mut svd = Svd { u: vec![0.0; m * r], s: vec![0.0; r], vt: vec![0.0; r * n] };
    for (rank, &row) in order.iter().take(r).enumerate() {
        let norm = norms[row];
        if norm <= f64::MIN_POSITIVE {
            continue;
        }
        svd.s[rank] = norm;
        for (v, y) in svd.vt[rank * n..][..n].iter_mut().zip(&y[row * n..][..n]) {
            *v = y / norm;
        }
        for i in 0..m {
            svd.u[i * r + rank] = turned[row * m + i];
        }
    }
    svd
}

fn identity(n: usize) -> Vec<f64> {
    (0..n * n).map(|i| if i % (n + 1) == 0 { 1.0 } else { 0.0 }).collect()
}

/// k orthonormal rows (k, m) near the span of the k largest left singular vectors.
fn basis(w: &[f32], (m, n): (usize, usize), k: usize, seed: u64) -> Vec<f64> {
    let cpu = Cpu::new();
    let weight = cpu.upload(w);
    let start: Vec<f64> = (0..k * m).map(|i| rng::normal(seed, i as u64)).collect();
    let mut q = orthonormal(start, m);
    let (mut left, mut right) = (cpu.zeros(k * m), cpu.zeros(k * n));
    for _ in 0..ROUNDS {
        for is_right in [true, false] {
            let f32s: Vec<f32> = q.iter().map(|&x| x as f32).collect();
            let values = if is_right {
                cpu.write(&mut left, 0, &f32s);
                let (x, w) = (Mat::new(&left, k, m), Mat::new(&weight, m, n));
                cpu.gemm(x, Op::N, w, Op::N, MatMut::new(&mut right, k, n), 1.0, 0.0);
                cpu.download(&right)
            } else {
                cpu.write(&mut right, 0, &f32s);
                let (x, w) = (Mat::new(&right, k, n), Mat::new(&weight, m, n));
                cpu.gemm(x, Op::N, w, Op::T, MatMut::new(&mut left, k, m), 1.0, 0.0);
                cpu.download(&left)
            };
            let width = if is_right { n } else { m };
            q = orthonormal(values.into_iter().map(f64::from).collect(), width);
        }
    }
    q
}

/// The rows of `x`, each less what the ones above it hold and of length one (Gram and Schmidt,
/// twice over). Rows that hold nothing more become zero.
fn orthonormal(mut x: Vec<f64>, width: usize) -> Vec<f64> {
    for i in 0..x.len() / width {
        let (above, rest) = x.split_at_mut(i * width);
        let row = &mut rest[..width];
        for _ in 0..2 {
            for other in above.chunks(width) {
                let along: f64 = row.iter().zip(other).map(|(a, b)| a * b).sum();
                row.iter_mut().zip(other).for_each(|(a, b)| *a -= along * b);
            }
        }
        let norm = row.iter().map(|a| a * a).sum::<f64>().sqrt();
        let scale = if norm > f64::MIN_POSITIVE { 1.0 / norm } else { 0.0 };
        row.iter_mut().for_each(|a| *a *= scale);
    }
    x
}

/// Q (k, m) W (m, n).
fn product(q: &[f64], w: &[f32], (k, m, n): (usize, usize, usize)) -> Vec<f64> {
    let mut y = vec![0.0; k * n];
    for (row, out) in q.chunks(m).zip(y.chunks_mut(n)) {
        for (&factor, w) in row.iter().zip(w.chunks(n)).filter(|(factor, _)| **factor != 0.0) {
            out.iter_mut().zip(w).for_each(|(out, &w)| *out += factor * f64::from(w));
        }
    }
    y
}

/// Turns pairs of rows of `y` (k, n), and of `q` (k, m) with them, until all rows of `y` are
/// orthogonal; their norms.
fn rotate(y: &mut [f64], q: &mut [f64], (k, n, m): (usize, usize, usize)) -> Vec<f64> {
    for _ in 0..SWEEPS_MAX {
        let mut turned = false;
        for i in 0..k {
            for j in i + 1..k {
                let (a, b) = (&y[i * n..][..n], &y[j * n..][..n]);
                let sum = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
                let (aa, bb, ab) = (sum(a, a), sum(b, b), sum(a, b));
                if ab.abs() <= 1e-15 * (aa * bb).sqrt() {
                    continue;
                }
                turned = true;
                let zeta = (bb - aa) / (2.0 * ab);
                let tan = zeta.signum() / (zeta.abs() + zeta.hypot(1.0));
                let cos = 1.0 / tan.hypot(1.0);
                turn(y, (i * n, j * n, n), cos, cos * tan);
                turn(q, (i * m, j * m, m), cos, cos * tan);
            }
        }
        if !turned {
            break;
        }
    }
    y.chunks(n).map(|row| row.iter().map(|x| x * x).sum::<f64>().sqrt()).collect()
}

/// (a, b) <- (cos a - sin b, sin a + cos b) for two rows.
fn turn(x: &mut [f64], (i, j, width): (usize, usize, usize), cos: f64, sin: f64) {
    let (low, high) = x.split_at_mut(j);
    for (a, b) in low[i..i + width].iter_mut().zip(&mut high[..width]) {
        (*a, *b) = (cos * *a - sin * *b, sin * *a + cos * *b);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A matrix of known singular values: products of two random orthonormal sets.
    fn made(m: usize, n: usize, values: &[f64]) -> Vec<f32> {
        let draw = |seed, len: usize| (0..len).map(|i| rng::normal(seed, i as u64)).collect();
        let u = orthonormal(draw(1, values.len() * m), m);
        let v = orthonormal(draw(2, values.len() * n), n);
        let mut w = vec![0.0; m * n];
        for (rank, s) in values.iter().enumerate() {
            for i in 0..m {
                for j in 0..n {
                    w[i * n + j] += s * u[rank * m + i] * v[rank * n + j];
                }
            }
        }
        w.into_iter().map(|x| x as f32).collect()
    }

    #[test]
    fn singular_values_are_found() {
        let fall = |k: usize| (0..k).map(|i| 10.0 * 0.8_f64.powi(i as i32)).collect::<Vec<f64>>();
        for (m, n, k) in [(5, 9, 5), (9, 5, 4), (40, 40, 40), (300, 150, 60), (150, 300, 60)] {
            let values = fall(k);
            let w = made(m, n, &values);
            let r = 4.min(k);
            let Svd { u, s, vt } = largest(&w, (m, n), r, 3);
            for (found, expected) in s.iter().zip(&values) {
                assert!((found - expected).abs() < 1e-5 * values[0], "{m} {n}: {s:?}");
            }
            // W V = U S, column by column.
            for rank in 0..r {
                for i in 0..m {
                    let row = w[i * n..][..n].iter().zip(&vt[rank * n..]);
                    let along: f64 = row.map(|(&w, v)| f64::from(w) * v).sum();
                    assert!((along - u[i * r + rank] * s[rank]).abs() < 1e-4 * values[0]);
                }
            }
        }
    }

    #[test]
    fn nothing_gives_zeros() {
        let Svd { u, s, vt } = largest(&[0.0; 6], (2, 3), 4, 1);
        assert!(u.iter().chain(&s).chain(&vt).all(|&x| x == 0.0));
    }
}
