//! The written weights against what was trained, by their logits on real rows.

use hone_kernels::Cpu;
use hone_model::{Adapter, Batch, Decoder, ModelConfig, ModelError, TensorSource, Training};
use serde_json::{Value, json};

use crate::inputs::Document;

/// Bytes of logits kept of the reference; with more documents or a larger vocabulary fewer
/// positions of each are looked at.
const LOGIT_BYTES_MAX: usize = 64 << 20;

/// A document with the positions that are compared.
struct Row {
    batch: Batch,
    positions: Vec<u32>,
}

/// What base and adapter (or the weights as they were trained) say.
pub(crate) struct Reference {
    rows: Vec<Row>,
    row_ids: Vec<String>,
    /// Per row, (positions, V).
    logits: Vec<Vec<f32>>,
    vocab: usize,
}

/// How far another model is from the reference.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Difference {
    /// Largest absolute difference of two logits.
    pub(crate) max_logit_diff: f64,
    /// KL(reference, other) in nats, averaged over positions.
    pub(crate) mean_kl: f64,
    /// Its largest value.
    pub(crate) max_kl: f64,
    /// Share of positions where both have the same likeliest token.
    pub(crate) same_choice: f64,
}

impl Difference {
    /// For reports.
    pub(crate) fn to_json(self) -> Value {
        json!({
            "max_logit_diff": self.max_logit_diff,
            "mean_kl": self.mean_kl,
            "max_kl": self.max_kl,
            "same_choice": self.same_choice,
        })
    }
}

/// `n` of `all`, evenly spaced over them, so that every split and every kind has its chance.
pub(crate) fn choose(all: Vec<Document>, n: usize) -> Vec<Document> {
    let total = all.len();
    let n = n.min(total);
    let mut wanted = (0..n).map(|i| i * total / n).peekable();
    let keep = |(at, document)| wanted.next_if_eq(&at).map(|_| document);
    all.into_iter().enumerate().filter_map(keep).collect()
}

impl Reference {
    /// Runs the documents through the reference.
    pub(crate) fn new(
        model: &ModelConfig,
        source: &dyn TensorSource,
        adapter: Option<&Adapter>,
        documents: Vec<Document>,
    ) -> Result<Self, ModelError> {
        let vocab = model.vocab_size;
        let kept = LOGIT_BYTES_MAX / (size_of::<f32>() * vocab * documents.len().max(1));
        let mut decoder = load(model, source)?;
        if let Some(adapter) = adapter {
            decoder.attach(adapter, false)?;
        }
        let (mut rows, mut row_ids, mut logits) = (Vec::new(), Vec::new(), Vec::new());
        for document in documents {
            let mut batch = Batch::new();
            batch.push(&document.ids, &vec![0.0; document.ids.len()])?;
            let positions = spread(document.ids.len(), kept.max(1));
            logits.push(decoder.logits(&batch, &positions)?);
            rows.push(Row { batch, positions });
            row_ids.push(document.row_id);
        }
        Ok(Reference { rows, row_ids, logits, vocab })
    }

    /// Ids of the rows that are compared.
    pub(crate) fn row_ids(&self) -> &[String] {
        &self.row_ids
    }

    /// Number of positions that are compared.
    pub(crate) fn n_positions(&self) -> usize {
        self.rows.iter().map(|row| row.positions.len()).sum()
    }

    /// Runs the same documents through other weights.
    pub(crate) fn compare(
        &self,
        model: &ModelConfig,
        source: &dyn TensorSource,
    ) -> Result<Difference, ModelError> {
        let mut decoder = load(model, source)?;
        let mut sum = Difference::default();
        for (row, expected) in self.rows.iter().zip(&self.logits) {
            let found = decoder.logits(&row.batch, &row.positions)?;
            let pairs = expected.chunks_exact(self.vocab).zip(found.chunks_exact(self.vocab));
            pairs.for_each(|(p, q)| add(&mut sum, p, q));
        }
        let n = self.n_positions().max(1) as f64;
        sum.mean_kl /= n;
        sum.same_choice /= n;
        Ok(sum)
    }
}

fn load(model: &ModelConfig, source: &dyn TensorSource) -> Result<Decoder<Cpu>, ModelError> {
    Decoder::load(Cpu::new(), model, source, Training::Frozen)
}

/// Up to `n` positions of `len`, evenly spaced, the last among them.
fn spread(len: usize, n: usize) -> Vec<u32> {
    let n = n.min(len);
    (1..=n).map(|i| (i * len / n - 1) as u32).collect()
}

/// Adds the difference of one position's logits. A logit that is not finite makes the difference
/// infinite.
fn add(sum: &mut Difference, p: &[f32], q: &[f32]) {
    let worst = p
        .iter()
        .zip(q)
        .map(|(a, b)| f64::from((a - b).abs()))
        .fold(0.0, |max, d| if d.is_finite() { f64::max(max, d) } else { f64::INFINITY });
    let kl = divergence(p, q);
    sum.max_logit_diff = sum.max_logit_diff.max(worst);
    sum.mean_kl += kl;
    sum.max_kl = sum.max_kl.max(kl);
    sum.same_choice += f64::from(u8::from(likeliest(p) == likeliest(q)));
}

/// KL(p, q) = sum_i p_i (log p_i - log q_i) of two rows of logits, in f64; never below 0 by
/// rounding.
fn divergence(p: &[f32], q: &[f32]) -> f64 {
    let (norm_p, norm_q) = (log_sum_exp(p), log_sum_exp(q));
    let term = |(a, b): (&f32, &f32)| {
        let (log_p, log_q) = (f64::from(*a) - norm_p, f64::from(*b) - norm_q);
        log_p.exp() * (log_p - log_q)
    };
    let sum: f64 = p.iter().zip(q).map(term).sum();
    if sum.is_nan() { f64::INFINITY } else { sum.max(0.0) }
}

fn log_sum_exp(row: &[f32]) -> f64 {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|z| f64::from(z - max).exp()).sum();
    f64::from(max) + sum.ln()
}

fn likeliest(row: &[f32]) -> usize {
    (0..row.len()).reduce(|best, i| if row[i] > row[best] { i } else { best }).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(p: &[f32], q: &[f32], max_logit_diff: f64, kl: f64, same: f64) {
        let mut sum = Difference::default();
        add(&mut sum, p, q);
        assert_eq!((sum.max_logit_diff, sum.same_choice), (max_logit_diff, same));
        assert!((sum.mean_kl - kl).abs() < 1e-12 || sum.mean_kl == kl, "{} {kl}", sum.mean_kl);
    }

    #[test]
    fn differences_are_those_of_the_distributions() {
        check(&[1.0, 2.0], &[1.0, 2.0], 0.0, 0.0, 1.0);
        // A shift of all logits is no change of the distribution.
        check(&[1.0, 2.0], &[2.0, 3.0], 1.0, 0.0, 1.0);
        // p = (1/2, 1/2), q = (1/4, 3/4): ln 2 - (ln 3) / 2.
        let q = [0.0, 3.0_f32.ln()];
        let kl = 0.5 * (0.5_f64 / 0.25).ln() + 0.5 * (0.5_f64 / 0.75).ln();
        let mut sum = Difference::default();
        add(&mut sum, &[0.0, 0.0], &q);
        assert!((sum.mean_kl - kl).abs() < 1e-7, "{}", sum.mean_kl);
        check(&[0.0, 1.0], &[0.0, f32::NAN], f64::INFINITY, f64::INFINITY, 0.0);
    }

    #[test]
    fn documents_and_positions_are_spread() {
        let document = |i: usize| Document { row_id: i.to_string(), ids: vec![1] };
        let chosen = |total: usize, n: usize| -> Vec<String> {
            choose((0..total).map(document).collect(), n).into_iter().map(|d| d.row_id).collect()
        };
        assert_eq!(chosen(10, 3), ["0", "3", "6"]);
        assert_eq!(chosen(2, 8), ["0", "1"]);
        assert_eq!(chosen(0, 8), [""; 0]);
        assert_eq!(spread(10, 3), [2, 5, 9]);
        assert_eq!(spread(2, 8), [0, 1]);
    }
}
