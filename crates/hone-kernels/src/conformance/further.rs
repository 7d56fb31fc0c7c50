//! Cases of the update rules, of the loss's options and of noise.

use super::cases::{Case, Output, data, output};
use crate::{
    Adafactor, AdamW, Backend, CODE_BLOCK, Lion, LossOptions, MatMut, SecondMoment, Sgd, rng,
};

/// Every option alone and all together.
pub fn all_options() -> Vec<LossOptions> {
    let none = LossOptions::default();
    vec![
        LossOptions { label_smoothing: 0.1, ..none },
        LossOptions { z_loss: 1e-3, ..none },
        LossOptions { reweight: true, ..none },
        LossOptions { soft_cap: Some(30.0), ..none },
        LossOptions { label_smoothing: 0.2, z_loss: 1e-2, reweight: true, soft_cap: Some(2.0) },
    ]
}

/// Every case of this file.
pub(super) fn further_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for magnitude in [0.0, 1e-15, 1.0, 1e4] {
        for (rows, cols) in [(1, 1), (1, 37), (37, 1), (5, 33), (300, 170), (2, 40_000)] {
            cases.push(Case::Rules(rows, cols, magnitude));
        }
        for options in all_options() {
            for (rows, v) in [(1, 1), (5, 33), (40, 2048)] {
                cases.push(Case::Loss(rows, v, magnitude, options));
            }
        }
    }
    cases.push(Case::Noise(&[1], 1));
    cases.push(Case::Noise(&[3, 0, 1, 70], 33));
    cases.push(Case::Noise(&[300, 17], 128));
    cases
}

/// Steps of each rule.
const N_STEPS: u64 = 3;

/// The parts of the buffers outside the tensor: they must stay as they are.
const BEFORE: usize = 3;
const AFTER: usize = 2;

/// Runs `step(number, p, g)` three times on a tensor inside a larger buffer.
fn steps<B: Backend>(
    b: &B,
    n: usize,
    magnitude: f32,
    mut step: impl FnMut(u64, &mut B::Buf, &B::Buf),
) -> Vec<f32> {
    let start = data(1, BEFORE + n + AFTER, 1.0);
    let mut p = b.upload(&start);
    for number in 1..=N_STEPS {
        let g = b.upload(&data(1 + number, BEFORE + n + AFTER, magnitude));
        step(number, &mut p, &g);
    }
    let found = b.download(&p);
    assert_eq!(found[..BEFORE], start[..BEFORE], "values before the tensor changed");
    assert_eq!(found[BEFORE + n..], start[BEFORE + n..], "values behind the tensor changed");
    found[BEFORE..BEFORE + n].to_vec()
}

pub(super) fn rules<B: Backend>(b: &B, rows: usize, cols: usize, magnitude: f32) -> Vec<Output> {
    let n = rows * cols;
    let mut outputs = lion(b, n, magnitude);
    outputs.extend(sgd(b, n, magnitude));
    outputs.extend(adafactor(b, rows, cols, magnitude));
    outputs.extend(adamw_8bit(b, n, magnitude));
    let x = b.upload(&data(1, n + BEFORE, 1.0));
    let mut y = b.upload(&data(2, n + AFTER, magnitude));
    b.axpby(0.3, (&x, BEFORE), 0.9, (&mut y, AFTER), n);
    outputs.push(output("axpby", b.download(&y), 2e-7));
    let part = b.sum_squares_part(&x, BEFORE..n + BEFORE);
    outputs.push(output("part", vec![part as f32], 1e-7));
    outputs
}

fn lion<B: Backend>(b: &B, n: usize, magnitude: f32) -> Vec<Output> {
    let update = Lion { lr: 1e-2, beta1: 0.9, beta2: 0.99, weight_decay: 0.1, grad_scale: 0.7 };
    let mut m = b.zeros(n);
    let p = steps(b, n, magnitude, |_, p, g| b.lion(p, g, BEFORE, &mut m, update));
    vec![output("lion p", p, 5e-7), output("lion m", b.download(&m), 5e-7)]
}

fn sgd<B: Backend>(b: &B, n: usize, magnitude: f32) -> Vec<Output> {
    let plain = Sgd {
        lr: 1e-2,
        momentum: 0.0,
        dampening: 0.0,
        nesterov: false,
        weight_decay: 0.1,
        first: false,
        grad_scale: 0.7,
    };
    let part = BEFORE..BEFORE + n;
    let bare = steps(b, n, magnitude, |_, p, g| b.sgd(p, g, part.clone(), None, plain));
    let mut outputs = vec![output("sgd p", bare, 5e-7)];
    for (name, nesterov, dampening) in [("sgd momentum", false, 0.2), ("sgd nesterov", true, 0.0)] {
        let mut m = b.zeros(n);
        let p = steps(b, n, magnitude, |step, p, g| {
            let first = step == 1;
            let update = Sgd { momentum: 0.9, dampening, nesterov, first, ..plain };
            b.sgd(p, g, part.clone(), Some(&mut m), update);
        });
        outputs.push(output(name, p, 5e-7));
        outputs.push(output("sgd m", b.download(&m), 5e-7));
    }
    outputs
}

fn adafactor<B: Backend>(b: &B, rows: usize, cols: usize, magnitude: f32) -> Vec<Output> {
    let n = rows * cols;
    let update = |step: u64, scale_min| Adafactor {
        lr: 1e-2,
        beta2: 1.0 - (step as f64).powf(-0.8),
        beta1: 0.9,
        eps: 1e-30,
        scale_min,
        clip_threshold: 1.0,
        weight_decay: 0.1,
        grad_scale: 0.7,
    };
    let (mut row, mut col, mut first) = (b.zeros(rows), b.zeros(cols), b.zeros(n));
    let factored = steps(b, n, magnitude, |step, p, g| {
        let second = SecondMoment::Factored(&mut row, &mut col);
        b.adafactor(p, g, BEFORE, second, None, update(step, Some(1e-3)));
    });
    let mut v = b.zeros(n);
    let full = steps(b, n, magnitude, |step, p, g| {
        let second = SecondMoment::Full(&mut v);
        b.adafactor(p, g, BEFORE, second, Some(&mut first), update(step, None));
    });
    vec![
        output("factored p", factored, 1e-6),
        output("row", b.download(&row), 1e-6),
        output("col", b.download(&col), 1e-6),
        output("full p", full, 1e-6),
        output("full v", b.download(&v), 1e-6),
        output("full m", b.download(&first), 1e-6),
    ]
}

/// Bit by bit: the rounding of a moment is part of what is computed.
fn adamw_8bit<B: Backend>(b: &B, n: usize, magnitude: f32) -> Vec<Output> {
    let n_blocks = n.div_ceil(CODE_BLOCK);
    let (mut m, mut m_max) = (b.zero_codes(n), b.zeros(n_blocks));
    let (mut v, mut v_max) = (b.zero_codes(n), b.zeros(n_blocks));
    let p = steps(b, n, magnitude, |step, p, g| {
        let update = AdamW {
            lr: 1e-2,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.1,
            step,
            grad_scale: 0.7,
        };
        b.adamw_8bit(p, g, BEFORE, [(&mut m, &mut m_max), (&mut v, &mut v_max)], update);
    });
    let codes = |codes: &B::Codes| b.read_codes(codes).into_iter().map(f32::from).collect();
    vec![
        output("8-bit p", p, 0.0),
        output("m codes", codes(&m), 0.0),
        output("v codes", codes(&v), 0.0),
        output("m max", b.download(&m_max), 0.0),
        output("v max", b.download(&v_max), 0.0),
    ]
}

pub(super) fn loss<B: Backend>(
    b: &B,
    rows: usize,
    v: usize,
    magnitude: f32,
    options: LossOptions,
) -> Vec<Output> {
    let targets: Vec<u32> = (0..rows as u64).map(|i| (rng::mix(5, i) % v as u64) as u32).collect();
    let weights: Vec<f32> = (0..rows).map(|i| i as f32 % 3.0 * 0.5).collect();
    let start = data(1, rows * (v + 1), magnitude);
    let mut row_loss = vec![0.0; rows];
    let run = |scale, row_loss| {
        let mut logits = b.upload(&start);
        let view = MatMut::columns(&mut logits, rows, 1, v, v + 1);
        let sums = b.cross_entropy_with(view, &targets, &weights, scale, row_loss, options);
        (sums, b.download(&logits))
    };
    let (sums, capped) = run(None, Some(&mut row_loss));
    let (with_gradient, mut gradient) = run(Some(0.1), None);
    assert_eq!(sums, with_gradient, "the gradient does not change the loss");
    let (mut logits, mut dlogits) = (b.upload(&start), b.zeros(rows * v));
    let (view, grad) = (MatMut::columns(&mut logits, rows, 1, v, v + 1), (0.1, &mut dlogits));
    let elsewhere = b.cross_entropy_into(view, &targets, &weights, grad, None, options);
    assert_eq!(sums, elsewhere, "where the gradient goes does not change the loss");
    let rows_of = b.download(&dlogits);
    for (row, moved) in gradient.chunks(v + 1).zip(rows_of.chunks(v)) {
        assert_eq!(&row[1..], moved, "where the gradient goes does not change it");
    }
    for (row, old) in gradient.chunks_mut(v + 1).zip(start.chunks(v + 1)) {
        assert_eq!(row[0], old[0], "a value outside the view changed");
        row[0] = 0.0;
    }
    let totals = [sums.weighted_loss, sums.weighted_ce, sums.weight];
    let counts = [sums.n_correct as f32, sums.n_rows as f32];
    assert!(gradient.iter().all(|x| x.is_finite()));
    // Where every logit is all of its cap, slopes are the rounding of 1 - tanh^2.
    let is_flat = options.soft_cap.is_some() && magnitude > 1.0;
    vec![
        output("option row loss", row_loss, 2e-6),
        output("option sums", totals.map(|x| x as f32).to_vec(), 2e-6),
        // Capped logits of 1e4 are all the cap, so that any may be the largest.
        output("option counts", counts.to_vec(), if magnitude > 1.0 { 1.0 } else { 0.0 }),
        output("capped", capped, 1e-6),
        output("option dlogits", gradient, if is_flat { f32::INFINITY } else { 4e-6 }),
    ]
}

pub(super) fn noise<B: Backend>(b: &B, lens: &[usize], d: usize) -> Vec<Output> {
    let n = lens.iter().sum::<usize>() * d;
    let start = data(1, n + AFTER, 1.0);
    let mut x = b.upload(&start);
    b.add_noise(&mut x, d, lens, 5.0, (7, 40));
    let found = b.download(&x);
    assert_eq!(found[n..], start[n..], "values behind the documents changed");
    vec![output("noisy", found, 2e-7)]
}
