//! Attention on bf16 against plain loops in f64 over the same rounded inputs.

use super::*;
use crate::{AttnMask, Heads, rng};

/// Units of rounding: half a step at 1 of bf16 and of f32.
const HALF_UNIT: f64 = 1.0 / (1 << 8) as f64;
const UNIT: f64 = 1.0 / (1 << 24) as f64;

/// What may vanish: the least normal number times sums of what tests draw.
const TINY: f64 = 1e-30;

/// A table entry: shape, documents, mask, and the magnitude of the queries.
#[derive(Clone, Copy, Debug)]
struct Case {
    heads: Heads,
    lens: &'static [usize],
    mask: AttnMask,
    size: f32,
}

fn cases() -> Vec<Case> {
    let heads = |n_q, n_kv, dim| Heads { n_q, n_kv, dim };
    let shapes = [
        (heads(1, 1, 1), &[1][..]),
        (heads(2, 1, 3), &[1, 5, 0, 2]),
        (heads(4, 4, 32), &[128, 31, 32, 33, 1, 127]),
        (heads(9, 3, 64), &[150]),
        (heads(4, 2, 20), &[300, 17]),
        (heads(2, 2, 33), &[129]),
        (heads(3, 1, 80), &[64, 65, 30, 30]),
        // Long enough that its keys are cut into ranges.
        (heads(2, 1, 16), &[600, 40]),
    ];
    let mut cases = Vec::new();
    for (heads, lens) in shapes {
        let scale = 1.0 / (heads.dim as f32).sqrt();
        let mut add = |window, soft_cap, size| {
            let mask = AttnMask { window, scale, soft_cap };
            cases.push(Case { heads, lens, mask, size });
        };
        for window in [None, Some(1), Some(7), Some(100)] {
            add(window, None, 1.0);
        }
        for size in [0.0, 1e-20, 30.0] {
            add(None, None, size);
        }
        add(None, Some(2.5), 1.0);
        add(Some(9), Some(0.5), 3.0);
    }
    cases
}

impl Case {
    fn n_tokens(&self) -> usize {
        self.lens.iter().sum()
    }

    fn plan(&self) -> Plan {
        Plan { heads: self.heads, mask: self.mask }
    }

    /// Start and length of each document.
    fn docs(&self) -> Vec<(usize, usize)> {
        let mut start = 0;
        let doc = |&len: &usize| {
            start += len;
            (start - len, len)
        };
        self.lens.iter().map(doc).collect()
    }

    /// qkv and the gradient of the output, rounded.
    fn inputs(&self) -> [Vec<bf16>; 2] {
        let (width, t) = (self.heads.qkv_width(), self.n_tokens());
        let normal = |seed, i: usize| rng::normal(seed, i as u64) as f32;
        let size = |i: usize| if i % width < self.heads.out_width() { self.size } else { 1.0 };
        let qkv = (0..t * width).map(|i| bf16::from_f32(size(i) * normal(1, i)));
        let dout = (0..t * self.heads.out_width()).map(|i| bf16::from_f32(normal(2, i)));
        [qkv.collect(), dout.collect()]
    }
}

/// Results, and beside each the sum of the magnitudes of its terms and what bounds their own
/// errors in units of f32.
#[derive(Default)]
struct Twin {
    out: Vec<[f64; 3]>,
    lse: Vec<f64>,
    dqkv: Vec<[f64; 3]>,
    /// Largest sum of magnitudes of a score's terms.
    score: f64,
}

impl Twin {
    /// Both directions; the backward from the given outputs and log-sum-exps, or from its own.
    fn new(case: &Case, qkv: &[f64], dout: &[f64], given: Option<(&[f64], &[f64])>) -> Twin {
        let (heads, t) = (case.heads, case.n_tokens());
        let mut twin = Twin {
            out: vec![[0.0; 3]; t * heads.out_width()],
            lse: vec![0.0; t * heads.n_q],
            dqkv: vec![[0.0; 3]; t * heads.qkv_width()],
            score: 0.0,
        };
        for (start, len) in case.docs() {
            for query in start..start + len {
                for head in 0..heads.n_q {
                    let from = start + case.plan().first_key(query - start);
                    twin.query(case, qkv, dout, given, (query, head, from));
                }
            }
        }
        twin
    }

    /// One query of one head, which sees the keys from `from` on.
    fn query(
        &mut self,
        case: &Case,
        qkv: &[f64],
        dout: &[f64],
        given: Option<(&[f64], &[f64])>,
        (query, head, from): (usize, usize, usize),
    ) {
        let Heads { n_q, n_kv, dim } = case.heads;
        let (width, kv) = (case.heads.qkv_width(), head / (n_q / n_kv));
        let q_at = query * width + head * dim;
        let k_at = |key: usize| key * width + (n_q + kv) * dim;
        let v_at = |key: usize| k_at(key) + n_kv * dim;
        let o_at = query * n_q * dim + head * dim;
        let row = |at: usize| &qkv[at..at + dim];
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let size = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a * b).abs()).sum::<f64>();
        let scale = f64::from(case.mask.scale);
        let score = |key: usize| {
            let x = scale * dot(row(q_at), row(k_at(key)));
            match case.mask.soft_cap.map(f64::from) {
                None => (x, 1.0),
                Some(cap) => (cap * (x / cap).tanh(), 1.0 - (x / cap).tanh().powi(2)),
            }
        };
        let max = (from..=query).map(|key| score(key).0).fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = (from..=query).map(|key| (score(key).0 - max).exp()).sum();
        self.lse[query * n_q + head] = max + sum.ln();
        for key in from..=query {
            let p = (score(key).0 - max).exp() / sum;
            self.score = self.score.max(scale * size(row(q_at), row(k_at(key))));
            for c in 0..dim {
                let v = qkv[v_at(key) + c];
                add(&mut self.out[o_at + c], p * v, 0.0);
            }
        }
        let Some((out, lse)) = given else { return };
        let (dout, out) = (&dout[o_at..o_at + dim], &out[o_at..o_at + dim]);
        for key in from..=query {
            let (x, slope) = score(key);
            let p = (x - lse[query * n_q + head]).exp();
            let ds = p * scale * slope * (dot(dout, row(v_at(key))) - dot(dout, out));
            let noise = p * scale * (size(dout, row(v_at(key))) + size(dout, out));
            for c in 0..dim {
                let (q, k) = (qkv[q_at + c], qkv[k_at(key) + c]);
                add(&mut self.dqkv[q_at + c], ds * k, noise * k.abs());
                add(&mut self.dqkv[k_at(key) + c], ds * q, noise * q.abs());
                add(&mut self.dqkv[v_at(key) + c], p * dout[c], 0.0);
            }
        }
    }
}

/// One more term of a sum, of which `noise` units may be wrong.
fn add(to: &mut [f64; 3], term: f64, noise: f64) {
    to[0] += term;
    to[1] += term.abs();
    to[2] += noise;
}

/// Both directions at one level: outputs in O, log-sum-exps, gradients in O.
fn run<T: Value, O: Value>(
    case: &Case,
    with: (Level, Engine),
    [qkv, dout]: [&[T]; 2],
    rounds: impl Fn(f32) -> T,
) -> [Vec<f32>; 3] {
    let (plan, docs, t) = (case.plan(), case.docs(), case.n_tokens());
    let mut out = vec![O::of(f32::NAN); t * case.heads.out_width()];
    let mut lse = vec![f32::NAN; t * case.heads.n_q];
    forward(with, plan, &docs, qkv, &mut out, &mut lse);
    let out = O::widened(&out).into_owned();
    let given: Vec<T> = out.iter().map(|&x| rounds(bf16::from_f32(x).to_f32())).collect();
    let saved = Saved { dout, qkv, out: &given, lse: &lse };
    let mut dqkv = vec![O::of(f32::NAN); t * case.heads.qkv_width()];
    backward(with, plan, &docs, saved, &mut dqkv);
    [out, lse, O::widened(&dqkv).into_owned()]
}

/// Every level of vectors with every engine.
fn machines() -> Vec<(Level, Engine)> {
    let engines = Engine::all();
    let mut all: Vec<_> = engines.into_iter().map(|engine| (Level::all()[0], engine)).collect();
    all.push((Level::Baseline, Engine::all()[0]));
    all
}

/// Checks one case on all machines against the bound: a probability and a gradient of a score are
/// each rounded once to bf16, half a unit of the term they are a factor of; what remains is f32,
/// in which a score is wrong by its own terms' rounding. Returns the largest share of the bound.
fn check(case: &Case) -> f64 {
    let [qkv, dout] = case.inputs();
    let [qkv32, dout32] = [&qkv, &dout].map(|x| bf16::widened(x).into_owned());
    let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    let (qkv64, dout64) = (wide(&qkv32), wide(&dout32));
    let mut worst = 0.0_f64;
    for with in machines() {
        let [out, lse, dqkv] = run::<bf16, f32>(case, with, [&qkv, &dout], bf16::from_f32);
        let given: Vec<f32> = out.iter().map(|&x| bf16::from_f32(x).to_f32()).collect();
        let twin = Twin::new(case, &qkv64, &dout64, Some((&wide(&given), &wide(&lse))));
        let (dim, longest) = (case.heads.dim as f64, case.lens.iter().max().unwrap());
        let noise = UNIT * (2.0 * (dim + 8.0) * (twin.score + 1.0) + *longest as f64 + 16.0);
        let mut close = |name: &str, found: &[f32], wanted: &[[f64; 3]], stored: f64| {
            for (i, (&found, &[value, size, spread])) in found.iter().zip(wanted).enumerate() {
                let bound = (HALF_UNIT + noise) * size + noise * spread + stored * value.abs();
                let bound = bound * (1.0 + stored) + TINY;
                let off = (f64::from(found) - value).abs();
                assert!(off <= bound, "{with:?} {case:?} {name} {i}: {found} for {value}, {off:e}");
                worst = worst.max(off / bound);
            }
        };
        close("out", &out, &twin.out, 0.0);
        close("dqkv", &dqkv, &twin.dqkv, 0.0);
        for (&found, &wanted) in lse.iter().zip(&twin.lse) {
            let bound = noise + UNIT * 4.0 * wanted.abs();
            assert!((f64::from(found) - wanted).abs() <= bound, "{with:?} {case:?}: lse {found}");
        }
        // Stored in bf16 a result is rounded once more.
        let [out16, lse16, dqkv16] = run::<bf16, bf16>(case, with, [&qkv, &dout], bf16::from_f32);
        close("out in bf16", &out16, &twin.out, HALF_UNIT);
        close("dqkv in bf16", &dqkv16, &twin.dqkv, HALF_UNIT);
        // It does not matter in which type rounded values come.
        let wide = run::<f32, f32>(case, with, [&qkv32, &dout32], |x| x);
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&lse), bits(&lse16), "{with:?} {case:?}");
        for (a, b) in wide.iter().zip([&out, &lse, &dqkv]) {
            assert_eq!(bits(a), bits(b), "{with:?} {case:?}");
        }
    }
    worst
}

#[test]
fn attention_is_that_of_its_rounded_inputs() {
    let worst = cases().iter().map(check).fold(0.0, f64::max);
    // Below the bound, and far enough above nothing to say that it was looked for.
    assert!(worst > 1e-2, "{worst:e}");
}

#[test]
fn bytes_do_not_depend_on_the_number_of_threads() {
    for case in cases() {
        let [qkv, dout] = case.inputs();
        for with in machines() {
            let bits = |n| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
                let found =
                    pool.install(|| run::<bf16, bf16>(&case, with, [&qkv, &dout], bf16::from_f32));
                found.map(|x| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>())
            };
            let one = bits(1);
            assert!(bits(2) == one && bits(8) == one, "{with:?} {case:?}");
        }
    }
}

/// A value that is no number spoils its document and nothing else.
#[test]
fn what_is_no_number_stays_in_its_document() {
    let mask = AttnMask { window: None, scale: 0.25, soft_cap: None };
    let heads = Heads { n_q: 2, n_kv: 1, dim: 16 };
    let case = Case { heads, lens: &[21, 40, 3], mask, size: 1.0 };
    let [qkv, dout] = case.inputs();
    for with in machines() {
        let clean = run::<bf16, bf16>(&case, with, [&qkv, &dout], bf16::from_f32);
        for token in 21..61 {
            let mut qkv = qkv.clone();
            let at = token * heads.qkv_width();
            qkv[at..at + heads.qkv_width()].fill(bf16::NAN);
            let found = run::<bf16, bf16>(&case, with, [&qkv, &dout], bf16::from_f32);
            for (clean, found) in clean.iter().zip(&found) {
                let width = clean.len() / case.n_tokens();
                for t in (0..21).chain(61..64) {
                    let row = t * width..(t + 1) * width;
                    assert_eq!(clean[row.clone()], found[row], "{with:?}: {t} by {token}");
                }
            }
            assert!(found[0][token * heads.out_width()..][..heads.out_width()][0].is_nan());
        }
    }
}
