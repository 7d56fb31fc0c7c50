//! Answers of a model to prompts.

use hone_cli::{Context, Failure};
use hone_kernels::Backend;
use hone_model::{Decoder, Generation, Generator};
use hone_tokens::Vocab;
use serde_json::{Value, json};

use crate::score::Score;

/// What a model said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    /// The new text, without the stop token.
    pub(crate) text: String,
    /// Tokens of it.
    pub(crate) n_new: usize,
    /// Whether it ended by itself.
    pub(crate) is_stopped: bool,
}

/// Answers every prompt; an empty prompt gets an empty answer.
pub(crate) fn ask<B: Backend>(
    ctx: &Context,
    decoder: &mut Decoder<B>,
    vocab: &Vocab,
    generator: &Generator,
    prompts: &[Vec<u32>],
) -> Result<Vec<Answer>, Failure> {
    // Prompts of like length together: a batch is as long as its longest.
    let mut order: Vec<usize> = (0..prompts.len()).filter(|i| !prompts[*i].is_empty()).collect();
    order.sort_by_key(|i| (prompts[*i].len(), *i));
    let mut answers =
        vec![Answer { text: String::new(), n_new: 0, is_stopped: false }; prompts.len()];
    let mut progress = ctx.progress(prompts.len() as u64, "answers");
    for group in order.chunks(generator.batch_size) {
        if let Some(exit) = ctx.stop() {
            return Err(Failure::stopped(exit));
        }
        let ids: Vec<Vec<u32>> = group.iter().map(|i| prompts[*i].clone()).collect();
        let made = generator.run(decoder, &ids).map_err(|e| Failure::input(e.to_string()))?;
        for (i, generation) in group.iter().zip(made) {
            answers[*i] = answer(vocab, &generation)?;
        }
        progress.inc(group.len() as u64);
    }
    progress.finish();
    Ok(answers)
}

fn answer(vocab: &Vocab, generation: &Generation) -> Result<Answer, Failure> {
    // Control tokens stay visible: a model that writes one inside an answer has not given the
    // reference.
    let text = vocab
        .decode(&generation.ids, false)
        .map_err(|e| Failure::input(format!("an answer cannot be decoded: {e}")))?;
    Ok(Answer { text, n_new: generation.ids.len(), is_stopped: generation.stopped() })
}

/// Shares over some answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Rates {
    pub(crate) n: u64,
    n_exact: u64,
    n_stopped: u64,
    n_new: u64,
    n_json: u64,
    n_valid: u64,
    n_fields: u64,
    n_fields_right: u64,
}

impl Rates {
    /// Counts an answer.
    pub(crate) fn add(&mut self, answer: &Answer, score: &Score) {
        self.n += 1;
        self.n_exact += u64::from(score.is_exact);
        self.n_stopped += u64::from(score.is_stopped);
        self.n_new += answer.n_new as u64;
        if let Some(json) = score.json {
            self.n_json += 1;
            self.n_valid += u64::from(json.is_valid);
            self.n_fields += json.n_fields;
            self.n_fields_right += json.n_right;
        }
    }

    /// Share of answers that are the reference and end.
    pub(crate) fn exact_match(&self) -> Option<f64> {
        share(self.n_exact, self.n)
    }

    /// Share of answers that end by themselves.
    pub(crate) fn stop_rate(&self) -> Option<f64> {
        share(self.n_stopped, self.n)
    }

    /// New tokens of an answer, on average.
    pub(crate) fn mean_new_tokens(&self) -> Option<f64> {
        share(self.n_new, self.n)
    }

    /// Share of answers that are JSON as asked for.
    pub(crate) fn json_valid(&self) -> Option<f64> {
        share(self.n_valid, self.n_json)
    }

    /// Share of the references' fields that are right.
    pub(crate) fn field_accuracy(&self) -> Option<f64> {
        share(self.n_fields_right, self.n_fields)
    }

    /// For `results.json`; JSON scores only where there are any.
    pub(crate) fn to_json(self) -> Value {
        let mut value = json!({
            "n_prompts": self.n,
            "exact_match": self.exact_match(),
            "stop_rate": self.stop_rate(),
            "mean_new_tokens": self.mean_new_tokens(),
        });
        if self.n_json > 0 {
            value["json_valid"] = self.json_valid().into();
            value["field_accuracy"] = self.field_accuracy().into();
        }
        value
    }
}

/// `part` of `whole`; `None` of nothing.
pub(crate) fn share(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}
