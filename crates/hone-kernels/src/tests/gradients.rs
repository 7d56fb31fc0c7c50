//! Every backward of the plain twin against finite differences of its forward, in f64.

use crate::conformance::all_options;
use crate::conformance::{data, heads};
use crate::{AttnMask, Backend, Heads, LossOptions, Mat, MatMut, NormMore, Op, Reference, RmsNorm};

type Buf = <Reference as Backend>::Buf;

/// Step of the central differences.
const STEP: f64 = 1e-5;

/// Largest error relative to the largest gradient: the differences' own, with three decimal places
/// to spare.
const TOLERANCE: f64 = 1e-7;

/// `n` normal values of stream `seed`.
fn normals(seed: u64, n: usize) -> Buf {
    Reference.upload(&data(seed, n, 1.0))
}

/// Scalar product: the loss of an operator's output against a made-up gradient.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// Checks `gradient` of `loss` at `x`.
fn check(name: &str, x: &[f64], gradient: &[f64], loss: impl Fn(&Buf) -> f64) {
    assert_eq!(x.len(), gradient.len(), "{name}");
    let top = gradient.iter().fold(0.0, |top: f64, g| top.max(g.abs()));
    assert!(top > 0.0, "{name}: a gradient of zeros tests nothing");
    let mut at = Buf::from(x.to_vec());
    for i in 0..x.len() {
        at[i] = x[i] + STEP;
        let above = loss(&at);
        at[i] = x[i] - STEP;
        let below = loss(&at);
        at[i] = x[i];
        let slope = (above - below) / (2.0 * STEP);
        let error = (slope - gradient[i]).abs() / top;
        assert!(error < TOLERANCE, "{name}[{i}]: {} is not the slope {slope}", gradient[i]);
    }
}

#[test]
fn linear() {
    let (t, out, inp) = (3, 4, 5);
    let (x, w, dy) = (normals(1, t * inp), normals(2, out * inp), normals(3, t * out));
    let forward = |x: &Buf, w: &Buf| {
        let mut y = Reference.zeros(t * out);
        let to = MatMut::new(&mut y, t, out);
        Reference.gemm(Mat::new(x, t, inp), Op::N, Mat::new(w, out, inp), Op::T, to, 1.0, 0.0);
        dot(&y, &dy)
    };
    let (mut dx, mut dw) = (Reference.zeros(t * inp), Reference.zeros(out * inp));
    let (dy_mat, x_mat) = (Mat::new(&dy, t, out), Mat::new(&x, t, inp));
    let frozen = Reference.freeze(&data(2, out * inp, 1.0), out, inp);
    Reference.linear_dx(dy_mat, &frozen, MatMut::new(&mut dx, t, inp), 0.0);
    Reference.gemm(dy_mat, Op::T, x_mat, Op::N, MatMut::new(&mut dw, out, inp), 1.0, 0.0);
    check("x", &x, &dx, |x| forward(x, &w));
    check("w", &w, &dw, |w| forward(&x, w));
}

#[test]
fn bias() {
    let (rows, cols) = (4, 3);
    let (y, b, dy) = (normals(1, rows * cols), normals(2, cols), normals(3, rows * cols));
    let mut db = Reference.zeros(cols);
    Reference.bias_grad(Mat::new(&dy, rows, cols), &mut db);
    check("bias", &b, &db, |b| {
        let mut y = y.clone();
        Reference.add_bias(MatMut::new(&mut y, rows, cols), b);
        dot(&y, &dy)
    });
}

#[test]
fn embedding() {
    let (ids, d) = ([2, 0, 2, 4], 3);
    let (table, dy) = (normals(1, 5 * d), normals(2, ids.len() * d));
    let mut dtable = Reference.zeros(5 * d);
    Reference.scatter_add_rows(&dy, &ids, d, &mut dtable);
    check("table", &table, &dtable, |table| {
        let mut y = Reference.zeros(ids.len() * d);
        Reference.gather_rows(table, &ids, d, &mut y);
        dot(&y, &dy)
    });
}

#[test]
fn dropout() {
    let (rows, cols) = (5, 7);
    let (x, dy) = (normals(1, rows * cols), normals(2, rows * cols));
    let drop = |x: &Buf| {
        let mut y = Reference.zeros(rows * cols);
        Reference.dropout(Mat::new(x, rows, cols), MatMut::new(&mut y, rows, cols), 0.4, 11);
        y
    };
    check("x", &x, &drop(&dy), |x| dot(&drop(x), &dy));
}

#[test]
fn rms_norm() {
    let (rows, d) = (3, 6);
    let (x, w, dy) = (normals(1, rows * d), normals(2, d), normals(3, rows * d));
    for offset in [0.0, 1.0] {
        let norm = RmsNorm { eps: 1e-3, offset };
        let forward = |x: &Buf, w: &Buf| {
            let (mut y, mut r) = (Reference.zeros(rows * d), Reference.zeros(rows));
            Reference.rms_norm(x, w, norm, (rows, d), &mut y, &mut r);
            (y, r)
        };
        let r = forward(&x, &w).1;
        let (mut dx, mut dw) = (Reference.zeros(rows * d), Reference.zeros(d));
        Reference.rms_norm_backward(
            &dy,
            &x,
            &w,
            norm,
            &r,
            (rows, d),
            &mut dx,
            NormMore::dw(Some(&mut dw)),
        );
        check("x", &x, &dx, |x| dot(&forward(x, &w).0, &dy));
        check("w", &w, &dw, |w| dot(&forward(&x, w).0, &dy));
    }
}

#[test]
fn group_norm() {
    let (rows, groups, width, stride) = (3, 2, 4, 10);
    let (x, w, dy) = (normals(1, rows * stride), normals(2, width), normals(3, rows * stride));
    let norm = RmsNorm { eps: 1e-3, offset: 1.0 };
    let forward = |x: &Buf, w: &Buf| {
        let (mut y, mut raw) = (x.clone(), Reference.zeros(rows * groups * width));
        let view = MatMut::columns(&mut y, rows, 1, groups * width, stride);
        Reference.group_norm(view, w, norm, width, &mut raw);
        (y, raw)
    };
    let raw = forward(&x, &w).1;
    let (mut dx, mut dw) = (dy.clone(), Reference.zeros(width));
    let view = MatMut::columns(&mut dx, rows, 1, groups * width, stride);
    Reference.group_norm_backward(view, &raw, &w, norm, width, Some(&mut dw));
    check("x", &x, &dx, |x| dot(&forward(x, &w).0, &dy));
    check("w", &w, &dw, |w| dot(&forward(&x, w).0, &dy));
}

#[test]
fn rope() {
    // Six of eight columns, by angles whose cosines and sines are scaled as YaRN's.
    let (shape, rotary) = (heads(4, 2, 8), 6);
    let positions = [0, 3, 1];
    let angles = normals(1, 4 * 3);
    let rows = angles.chunks(3);
    let cos_sin: Vec<f64> = rows
        .flat_map(|row| row.iter().map(|a| 1.2 * a.cos()).chain(row.iter().map(|a| 1.2 * a.sin())))
        .collect();
    let cos_sin = Buf::from(cos_sin);
    let n = positions.len() * shape.qkv_width();
    let (x, mut dx) = (normals(2, n), normals(3, n));
    let dy = dx.clone();
    Reference.rope(&mut dx, shape, rotary, &positions, &cos_sin, true);
    check("qkv", &x, &dx, |x| {
        let mut y = x.clone();
        Reference.rope(&mut y, shape, rotary, &positions, &cos_sin, false);
        dot(&y, &dy)
    });
}

/// An activation of gates and ups, into `h` or the gradient.
type Glu = fn(&Buf, (usize, usize), &mut Buf);
/// Its backward.
type GluBackward = fn(&mut Buf, (usize, usize), &mut Buf);

/// Checks the gradient of a gated activation.
fn check_glu(forward: Glu, backward: GluBackward) {
    let (rows, i) = (3, 5);
    let (x, dh) = (normals(1, rows * 2 * i), normals(2, rows * i));
    let mut dx = x.clone();
    backward(&mut dh.clone(), (rows, i), &mut dx);
    check("gate_up", &x, &dx, |x| {
        let mut h = Reference.zeros(rows * i);
        forward(x, (rows, i), &mut h);
        dot(&h, &dh)
    });
}

#[test]
fn gated_activations() {
    check_glu(
        |x, size, h| Reference.swiglu(x, size, h),
        |dh, size, x| Reference.swiglu_backward(dh, size, x),
    );
    check_glu(
        |x, size, h| Reference.geglu(x, size, h),
        |dh, size, x| Reference.geglu_backward(dh, size, x),
    );
}

/// Checks the gradient of attention.
fn check_attention(shape: Heads, lens: &[usize], window: Option<usize>, soft_cap: Option<f32>) {
    let t: usize = lens.iter().sum();
    let mask = AttnMask { window, scale: 0.6, soft_cap };
    let (x, dout) = (normals(1, t * shape.qkv_width()), normals(2, t * shape.out_width()));
    let forward = |x: &Buf| {
        let (mut out, mut lse) =
            (Reference.zeros(t * shape.out_width()), Reference.zeros(t * shape.n_q));
        Reference.attention(x, shape, lens, mask, &mut out, &mut lse);
        (out, lse)
    };
    let (out, lse) = forward(&x);
    let mut dx = Buf::from(vec![f64::NAN; x.len()]);
    Reference.attention_backward(&dout, &x, &out, &lse, shape, lens, mask, &mut dx);
    check("qkv", &x, &dx, |x| dot(&forward(x).0, &dout));
}

#[test]
fn attention() {
    check_attention(heads(1, 1, 3), &[5], None, None);
    check_attention(heads(4, 2, 2), &[3, 0, 1, 4], None, None);
    check_attention(heads(2, 1, 4), &[6, 2], Some(3), None);
    check_attention(heads(2, 1, 4), &[6, 2], Some(3), Some(0.75));
}

#[test]
fn cross_entropy() {
    let (rows, v) = (4, 6);
    let (z, targets, weights) = (normals(1, rows * v), [0, 5, 2, 2], [1.0, 0.0, 0.25, 2.0]);
    let forward = |z: &Buf, scale| {
        let mut z = z.clone();
        let view = MatMut::new(&mut z, rows, v);
        let loss = Reference.cross_entropy(view, &targets, &weights, scale, None).weighted_loss;
        (loss, z)
    };
    let dz = forward(&z, Some(0.5)).1;
    check("logits", &z, &dz, |z| 0.5 * forward(z, None).0);
}

/// Every option of the loss. A token's own probability is a constant there: the slope is taken of
/// the loss whose weights have it in them.
#[test]
fn cross_entropy_with_options() {
    let (rows, v) = (4, 6);
    let (z, targets, weights) = (normals(1, rows * v), [0, 5, 2, 2], [1.0, 0.0, 0.25, 2.0_f32]);
    let run = |z: &Buf, weights: &[f32], scale, options| {
        let (mut z, mut row_loss) = (z.clone(), vec![0.0; rows]);
        let view = MatMut::new(&mut z, rows, v);
        let sums = Reference.cross_entropy_with(
            view,
            &targets,
            weights,
            scale,
            Some(&mut row_loss),
            options,
        );
        (sums, z, row_loss)
    };
    let mut n_checked = 0;
    for mut options in all_options() {
        let mut weights = weights;
        if options.reweight {
            // The squared log-sum-exp has no such factor, and its own slope is another case's.
            options.z_loss = 0.0;
            let capped = LossOptions { soft_cap: options.soft_cap, ..LossOptions::default() };
            let (_, dz, _) = run(&z, &weights, Some(0.5), options);
            let (_, _, plain) = run(&z, &weights, None, capped);
            weights.iter_mut().zip(plain).for_each(|(w, ce)| *w *= (-ce).exp());
            options.reweight = false;
            // The factor is rounded to f32 on its way into the weights.
            let (_, expected, _) = run(&z, &weights, Some(0.5), options);
            let pairs = dz.iter().zip(&*expected);
            assert!(pairs.fold(0.0, |top: f64, (a, b)| top.max((a - b).abs())) < 1e-6);
        }
        let dz = run(&z, &weights, Some(0.5), options).1;
        check("logits", &z, &dz, |z| 0.5 * run(z, &weights, None, options).0.weighted_loss);
        n_checked += 1;
    }
    assert_eq!(n_checked, 5);
}
