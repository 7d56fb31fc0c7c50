//! Forward and gradients of the fast backend against candle's autograd in f64: a second opinion on
//! the formulas.

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::ops::{silu, softmax};

use crate::conformance::{data, heads};
use crate::{AttnMask, Backend, Cpu, Heads, MatMut, NormMore, RmsNorm};

/// A variable of shape `shape` holding `values`.
fn var(values: &[f32], shape: &[usize]) -> Result<Var> {
    let tensor = Tensor::from_slice(values, shape, &Device::Cpu)?;
    Var::from_tensor(&tensor.to_dtype(DType::F64)?)
}

/// A constant of shape `shape` holding `values`.
fn constant(values: &[f32], shape: &[usize]) -> Result<Tensor> {
    Tensor::from_slice(values, shape, &Device::Cpu)?.to_dtype(DType::F64)
}

/// Checks `got` against candle's tensor: within 2e-6 of its largest value.
fn check(name: &str, got: &[f32], want: &Tensor) -> Result<()> {
    let want = want.flatten_all()?.to_vec1::<f64>()?;
    assert_eq!(got.len(), want.len(), "{name}");
    let top = want.iter().fold(0.0, |top: f64, x| top.max(x.abs()));
    for (i, (&g, &w)) in got.iter().zip(&want).enumerate() {
        assert!((f64::from(g) - w).abs() <= 2e-6 * top, "{name}[{i}]: {g} is not candle's {w}");
    }
    Ok(())
}

#[test]
fn rms_norm() -> Result<()> {
    let (cpu, rows, d, eps) = (Cpu::new(), 9, 70, 1e-5);
    let (x, w, dy) = (data(1, rows * d, 1.0), data(2, d, 1.0), data(3, rows * d, 1.0));
    let (x_var, w_var) = (var(&x, &[rows, d])?, var(&w, &[d])?);
    let mean = x_var.sqr()?.mean_keepdim(D::Minus1)?;
    let root = mean.affine(1.0, f64::from(eps))?.sqrt()?;
    let want = x_var.broadcast_div(&root)?.broadcast_mul(&w_var)?;
    let grads = want.mul(&constant(&dy, &[rows, d])?)?.sum_all()?.backward()?;

    let (x, w, dy) = (cpu.upload(&x), cpu.upload(&w), cpu.upload(&dy));
    let (mut y, mut r) = (cpu.zeros(rows * d), cpu.zeros(rows));
    let (mut dx, mut dw) = (cpu.zeros(rows * d), cpu.zeros(d));
    let norm = RmsNorm { eps, offset: 0.0 };
    cpu.rms_norm(&x, &w, norm, (rows, d), &mut y, &mut r);
    cpu.rms_norm_backward(&dy, &x, &w, norm, &r, (rows, d), &mut dx, NormMore::dw(Some(&mut dw)));
    check("y", &y, &want)?;
    check("dx", &dx, grads.get(&x_var).expect("x is a variable"))?;
    check("dw", &dw, grads.get(&w_var).expect("w is a variable"))
}

#[test]
fn swiglu() -> Result<()> {
    let (cpu, rows, i) = (Cpu::new(), 9, 35);
    let (x, dh) = (data(1, rows * 2 * i, 2.0), data(2, rows * i, 1.0));
    let x_var = var(&x, &[rows, 2 * i])?;
    let (gate, up) = (x_var.narrow(1, 0, i)?, x_var.narrow(1, i, i)?);
    let want = silu(&gate)?.mul(&up)?;
    let grads = want.mul(&constant(&dh, &[rows, i])?)?.sum_all()?.backward()?;

    let (mut x, mut dh, mut h) = (cpu.upload(&x), cpu.upload(&dh), cpu.zeros(rows * i));
    cpu.swiglu(&x, (rows, i), &mut h);
    cpu.swiglu_backward(&mut dh, (rows, i), &mut x);
    check("h", &h, &want)?;
    check("dx", &x, grads.get(&x_var).expect("x is a variable"))
}

/// Naive attention of one document: scores in full, softmax, values.
fn naive_attention(qkv: &Tensor, shape: Heads, scale: f64) -> Result<Tensor> {
    let Heads { n_q, n_kv, dim } = shape;
    let t = qkv.dim(0)?;
    let part = |from: usize, n: usize| {
        qkv.narrow(1, from * dim, n * dim)?.reshape((t, n, dim))?.transpose(0, 1)?.contiguous()
    };
    let spread = |x: Tensor| {
        let x = x.unsqueeze(1)?.broadcast_as((n_kv, n_q / n_kv, t, dim))?;
        x.contiguous()?.reshape((n_q, t, dim))
    };
    let (q, k, v) = (part(0, n_q)?, spread(part(n_q, n_kv)?)?, spread(part(n_q + n_kv, n_kv)?)?);
    let hidden: Vec<f64> =
        (0..t * t).map(|x| if x % t > x / t { f64::NEG_INFINITY } else { 0.0 }).collect();
    let mask = Tensor::from_vec(hidden, (t, t), &Device::Cpu)?;
    let scores = q.matmul(&k.transpose(1, 2)?.contiguous()?)?.affine(scale, 0.0)?;
    let probs = softmax(&scores.broadcast_add(&mask)?, D::Minus1)?;
    probs.matmul(&v)?.transpose(0, 1)?.contiguous()?.reshape((t, n_q * dim))
}

#[test]
fn attention() -> Result<()> {
    let (cpu, lens) = (Cpu::new(), [40, 1, 33]);
    for shape in [heads(4, 4, 32), heads(6, 2, 20)] {
        let t: usize = lens.iter().sum();
        let (x, dout) = (data(1, t * shape.qkv_width(), 1.0), data(2, t * shape.out_width(), 1.0));
        let scale = 1.0 / (shape.dim as f32).sqrt();
        let x_var = var(&x, &[t, shape.qkv_width()])?;
        let mut parts = Vec::new();
        let mut start = 0;
        for len in lens {
            parts.push(naive_attention(&x_var.narrow(0, start, len)?, shape, f64::from(scale))?);
            start += len;
        }
        let want = Tensor::cat(&parts, 0)?;
        let loss = want.mul(&constant(&dout, &[t, shape.out_width()])?)?.sum_all()?;
        let grads = loss.backward()?;

        let (x, dout) = (cpu.upload(&x), cpu.upload(&dout));
        let (mut out, mut lse) = (cpu.zeros(t * shape.out_width()), cpu.zeros(t * shape.n_q));
        let mut dx = cpu.zeros(x.len());
        let mask = AttnMask { window: None, scale, soft_cap: None };
        cpu.attention(&x, shape, &lens, mask, &mut out, &mut lse);
        cpu.attention_backward(&dout, &x, &out, &lse, shape, &lens, mask, &mut dx);
        check("out", &out, &want)?;
        check("dqkv", &dx, grads.get(&x_var).expect("qkv is a variable"))?;
    }
    Ok(())
}

#[test]
fn cross_entropy() -> Result<()> {
    let (cpu, rows, v) = (Cpu::new(), 13, 300);
    let z = data(1, rows * v, 3.0);
    let targets: Vec<u32> = (0..rows as u32).map(|i| i * 23 % v as u32).collect();
    let z_var = var(&z, &[rows, v])?;
    let ids = Tensor::from_slice(&targets, rows, &Device::Cpu)?;
    let want = candle_nn::loss::cross_entropy(&z_var, &ids)?;
    let grads = want.backward()?;

    let mut logits = cpu.upload(&z);
    let (view, weights) = (MatMut::new(&mut logits, rows, v), vec![1.0; rows]);
    let scale = Some(1.0 / rows as f32);
    let sums = cpu.cross_entropy(view, &targets, &weights, scale, None);
    check("loss", &[(sums.weighted_loss / sums.weight) as f32], &want)?;
    check("dlogits", &logits, grads.get(&z_var).expect("the logits are a variable"))
}
