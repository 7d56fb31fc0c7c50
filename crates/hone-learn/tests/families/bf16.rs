//! Products in bf16 beside those of transformers and PEFT under autocast, with f32 as the truth:
//! tests/golden/make_bf16.py wrote what they compute.

use std::io::Write;
use std::path::PathBuf;

use hone_kernels::{Backend, Compute, Cpu, Reference};
use hone_model::{Decoder, Tensors, Training};
use serde_json::Value;

use super::rows::{all, batch, integers};
use super::{Golden, VARIANTS, every_row, json, learner};

/// What is compared; the largest distance of ours from f32 over autocast's own in a single case;
/// and the largest of ours from autocast's.
///
/// Over all cases the root mean square of ours is at most autocast's, without a factor: the factors
/// are rounded in the same places, results where they are kept, and none besides. A single case is one draw of rounding noise, and
/// a document may by chance sit where that noise is amplified. A loss has no such bound: its error
/// is a single number, and autocast's may vanish.
const BOUNDS: [(&str, f64, f64); 5] = [
    ("logits", 1.5, 0.2),
    ("loss", f64::INFINITY, 0.02),
    ("gradients", 2.5, 0.12),
    ("losses of the run", 2.0, 0.05),
    ("parameters after it", 2.0, f64::INFINITY),
];

/// Largest distance of `Cpu` from its plain twin, over that of autocast from f32, as root mean
/// square over all cases: sums in f32 and in f64 differ by 1e-7 and fall to either side of a tie of
/// bf16 now and then.
const TWINS: f64 = 0.1;

/// Variants whose goldens have runs of 20 steps.
const N_TRAINED: usize = 9;

fn root() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/bf16"))
}

/// Three distances: of ours from f32, of autocast's from f32, and of ours from autocast's.
#[derive(Clone, Copy, Debug)]
struct Distances {
    ours: f64,
    theirs: f64,
    apart: f64,
}

/// The distances of every case, by kind.
#[derive(Default)]
struct Seen(std::collections::BTreeMap<&'static str, Vec<(String, Distances)>>);

impl Seen {
    fn note(&mut self, kind: &'static str, what: &str, found: Distances) {
        self.0.entry(kind).or_default().push((what.to_owned(), found));
    }

    /// Checks all cases of a kind, and says how near the bounds they came.
    fn check(&self, kind: &str, n: usize, factor: f64, apart: f64) {
        let found = &self.0[kind];
        assert_eq!(found.len(), n, "{kind}");
        let mean = |of: fn(&Distances) -> f64| {
            let squares: f64 = found.iter().map(|(_, d)| of(d).powi(2)).sum();
            (squares / n as f64).sqrt()
        };
        let most = |of: fn(&Distances) -> f64| found.iter().map(|(_, d)| of(d)).fold(0.0, f64::max);
        let text = format!(
            "{kind}: from f32, root mean square {:.2e} beside {:.2e}, largest {:.2e} beside {:.2e}, \
             worst case {:.2} times; apart {:.2e}",
            mean(|d| d.ours),
            mean(|d| d.theirs),
            most(|d| d.ours),
            most(|d| d.theirs),
            most(|d| d.ours / d.theirs),
            most(|d| d.apart),
        );
        writeln!(std::io::stderr().lock(), "{text}").unwrap();
        assert!(mean(|d| d.ours) <= mean(|d| d.theirs), "{text}");
        for (what, d) in found {
            assert!(d.theirs > 0.0 && d.ours > 0.0, "{what} {kind}: not bf16: {d:?}");
            assert!(d.ours <= factor * d.theirs && d.apart <= apart, "{what} {kind}: {d:?}");
        }
    }
}

/// Largest |a - b|.
fn largest(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max)
}

/// |a - b| / |b| over all values of all tensors.
fn distance(a: &Tensors, b: &Tensors) -> f64 {
    assert_eq!(a.len(), b.len());
    let (mut off, mut size) = (0.0, 0.0);
    for wanted in b.iter() {
        let found = &a.get(&wanted.name).unwrap().data;
        assert_eq!(found.len(), wanted.data.len());
        for (&a, &b) in found.iter().zip(&wanted.data) {
            off += (f64::from(a) - f64::from(b)).powi(2);
            size += f64::from(b).powi(2);
        }
    }
    (off / size).sqrt()
}

/// Root of the mean square of a - b.
fn rms(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let sum: f64 = a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum();
    (sum / a.len() as f64).sqrt()
}

fn numbers(list: &Value) -> Vec<f64> {
    list.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

/// One variant and one of its methods.
struct Pair<'a> {
    exact: &'a Golden,
    /// Autocast's logits and gradients.
    tensors: Golden,
    /// Autocast's numbers.
    json: &'a Value,
    method: &'static str,
    /// What its logits and gradients are called.
    of: [&'static str; 2],
}

impl Pair<'_> {
    fn decoder<B: Backend>(&self, backend: &B) -> Decoder<B> {
        let is_full = self.method == "full";
        let training = if is_full { Training::Full } else { Training::Frozen };
        let mut decoder = self.exact.decoder(backend.clone(), training);
        if !is_full {
            decoder.attach(&self.exact.adapter(), true).unwrap();
        }
        decoder
    }

    /// Logits, loss, gradients, a run; returns the gradients.
    fn check<B: Backend>(&self, seen: &mut Seen, backend: &B) -> Tensors {
        let what = format!("{} {} {}", self.exact.variant, self.method, backend.name());
        let rows = &self.exact.json["rows"];
        let mut decoder = self.decoder(backend);
        let mut worst = Distances { ours: 0.0, theirs: 0.0, apart: 0.0 };
        for i in all(rows) {
            let row = batch(rows, &[i]);
            let name = format!("{}.{i}", self.of[0]);
            let ours = decoder.logits(&row, &every_row(&row)).unwrap();
            let (exact, theirs) = (self.exact.logits(&name), self.tensors.logits(&name));
            worst.ours = worst.ours.max(largest(&ours, exact));
            worst.theirs = worst.theirs.max(largest(theirs, exact));
            worst.apart = worst.apart.max(largest(&ours, theirs));
        }
        seen.note("logits", &what, worst);

        let packed = batch(rows, &all(rows));
        let sums = decoder.loss(&packed, None).unwrap();
        let ours = sums.weighted_loss / sums.weight;
        let theirs = self.json["loss"].as_f64().unwrap();
        let exact = &self.exact.json[if self.method == "full" { "loss" } else { "lora" }]["loss"];
        let exact = exact.as_f64().unwrap();
        let [ours, theirs, apart] = [ours - exact, theirs - exact, ours - theirs].map(f64::abs);
        seen.note("loss", &what, Distances { ours, theirs, apart });

        decoder.zero_gradients();
        for i in all(rows) {
            let row = batch(rows, &[i]);
            decoder.accumulate(&row, (1.0 / packed.weight()) as f32, None).unwrap();
        }
        let gradients = decoder.gradients();
        let [exact, theirs] = [self.exact, &self.tensors].map(|golden| golden.part(self.of[1]));
        let found = Distances {
            ours: distance(&gradients, &exact),
            theirs: distance(&theirs, &exact),
            apart: distance(&gradients, &theirs),
        };
        seen.note("gradients", &what, found);
        if !self.exact.json["train"].is_null() {
            self.check_run(seen, &what, decoder);
        }
        gradients
    }

    /// Twenty steps: losses, and where the parameters end.
    fn check_run<B: Backend>(&self, seen: &mut Seen, what: &str, decoder: Decoder<B>) {
        let (mut learner, steps) = learner(&self.exact.json["train"][self.method], decoder);
        let exact: Vec<f64> = steps.iter().map(|step| step["loss"].as_f64().unwrap()).collect();
        let ours: Vec<f64> = steps
            .iter()
            .map(|step| {
                let rows =
                    integers(&step["rows"]).iter().map(|&row| row as usize).collect::<Vec<_>>();
                let rows = batch(&self.exact.json["train_rows"], &rows);
                learner.train_step(&[rows]).unwrap().loss
            })
            .collect();
        let run = &self.json["train"];
        let theirs = numbers(&run["losses"]);
        let found = Distances {
            ours: rms(&ours, &exact),
            theirs: rms(&theirs, &exact),
            apart: rms(&ours, &theirs),
        };
        seen.note("losses of the run", what, found);
        let masters = learner.decoder().trained();
        let end = self.exact.part(&format!("{}_final", self.method));
        let theirs = run["final_from_f32"].as_f64().unwrap();
        let ours = distance(&masters, &end);
        seen.note("parameters after it", what, Distances { ours, theirs, apart: 0.0 });
        // They are f32 masters, of which bf16 is but what products see.
        let is_rounded = |x: &f32| Compute::Bf16.round(*x) == *x;
        let n_rounded = masters.iter().filter(|t| t.data.iter().all(is_rounded)).count();
        assert_eq!(n_rounded, 0, "{what}: masters were rounded");
    }
}

#[test]
fn bf16_is_as_near_to_f32_as_transformers_bf16() {
    let numbers = json(root().join("bf16.json"));
    let numbers = &numbers["variants"];
    assert_eq!(numbers.as_object().unwrap().len(), VARIANTS.len());
    let mut seen = Seen::default();
    let (mut n_trained, mut twins, mut noise) = (0, Vec::new(), Vec::new());
    for (variant, _) in VARIANTS {
        let exact = Golden::open(variant);
        n_trained += usize::from(!exact.json["train"].is_null());
        let bytes = std::fs::read(root().join(format!("{variant}.safetensors"))).unwrap();
        for (method, of) in [("full", ["rows", "grads"]), ("lora", ["lora", "adapter_grads"])] {
            let tensors = Golden {
                variant: variant.to_owned(),
                config: exact.config.clone(),
                json: Value::Null,
                all: Tensors::from_safetensors(&[&bytes]).unwrap(),
            };
            let json = &numbers[variant][method];
            let pair = Pair { exact: &exact, tensors, json, method, of };
            let fast = pair.check(&mut seen, &Cpu::new().with_compute(Compute::Bf16));
            let plain = pair.check(&mut seen, &Reference.with_compute(Compute::Bf16));
            twins.push(distance(&fast, &plain));
            noise.push(distance(&pair.tensors.part(of[1]), &exact.part(of[1])));
        }
    }
    assert_eq!(n_trained, N_TRAINED);
    let zeros = vec![0.0; twins.len()];
    let [twins, noise] = [twins, noise].map(|distances| rms(&distances, &zeros));
    writeln!(std::io::stderr().lock(), "twins: {twins:.2e}, bf16: {noise:.2e}").unwrap();
    assert!(twins <= TWINS * noise, "the twins are {twins:e} apart, bf16 is {noise:e} off");
    for (kind, factor, apart) in BOUNDS {
        let n_variants =
            if kind.contains("run") || kind.contains("after") { N_TRAINED } else { 14 };
        seen.check(kind, 4 * n_variants, factor, apart);
    }
}
