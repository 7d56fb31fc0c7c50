//! Everything that was measured, and `results.json`.

use hone_model::Compute;
use hone_schema::Prompt;
use serde_json::{Map, Value, json};

use crate::answers::{Answer, Rates, share};
use crate::gates::{Gate, Values};
use crate::groups::Field;
use crate::losses::Losses;
use crate::score::{Score, score};

/// Answers to all prompts, scored.
#[derive(Clone, Debug, Default)]
pub(crate) struct Answers {
    /// In the order of the prompts.
    pub(crate) answers: Vec<Answer>,
    /// Their scores.
    pub(crate) scores: Vec<Score>,
    /// Whether the user's message ends in a question mark.
    pub(crate) asked: Vec<bool>,
}

impl Answers {
    /// Scores answers against the prompts' references.
    pub(crate) fn new(answers: Vec<Answer>, prompts: &[Prompt], is_json: bool) -> Self {
        let scored = answers.iter().zip(prompts);
        let scores = scored
            .map(|(a, prompt)| score(&a.text, a.is_stopped, &prompt.reference, is_json))
            .collect();
        let asked = prompts.iter().map(|p| p.question.trim_end().ends_with('?')).collect();
        Answers { answers, scores, asked }
    }

    /// Shares over all answers.
    pub(crate) fn rates(&self) -> Rates {
        self.rates_of(0..self.answers.len())
    }

    /// Shares over some rows.
    pub(crate) fn rates_of(&self, rows: impl IntoIterator<Item = usize>) -> Rates {
        let mut rates = Rates::default();
        rows.into_iter().for_each(|row| rates.add(&self.answers[row], &self.scores[row]));
        rates
    }

    /// Of the messages that end in a question mark, the share that is carried on with a question: what a base model does.
    pub(crate) fn question_share(&self) -> Option<f64> {
        let carried = |idx: &usize| self.answers[*idx].text.contains('?');
        let questions = (0..self.asked.len()).filter(|idx| self.asked[*idx]);
        let n = questions.clone().filter(carried).count();
        share(n as u64, questions.count() as u64)
    }
}

/// What was measured on one model.
#[derive(Clone, Debug, Default)]
pub(crate) struct Model {
    /// On the test packs.
    pub(crate) losses: Losses,
    /// To the prompts as the template renders them.
    pub(crate) asked: Answers,
}

/// What was measured.
#[derive(Clone, Debug, Default)]
pub(crate) struct Results {
    pub(crate) base: Model,
    /// The base model's answers to bare questions.
    pub(crate) bare: Answers,
    pub(crate) tuned: Model,
    /// What scores are broken down by.
    pub(crate) fields: Vec<Field>,
    /// The bars.
    pub(crate) gates: Vec<Gate>,
    /// Hash of the chat template that the prompts were rendered with: scores of two templates are
    /// not comparable.
    pub(crate) template_sha256: Option<String>,
    /// What both models were computed with; scores of two arithmetics are not comparable to the last digit.
    pub(crate) compute: Compute,
}

impl Results {
    /// What the gates look at.
    pub(crate) fn values(&self) -> Values {
        let tuned = self.tuned.asked.rates();
        let base = [self.base.asked.rates().exact_match(), self.bare.rates().exact_match()];
        Values {
            exact_match: tuned.exact_match(),
            stop_rate: tuned.stop_rate(),
            json_valid: tuned.json_valid(),
            base_exact_match: base.into_iter().flatten().reduce(f64::max),
            plain_perplexity_rise_percent: self.rise_percent(),
        }
    }

    /// How much the perplexity of plain text rose from base to tuned, in percent.
    pub(crate) fn rise_percent(&self) -> Option<f64> {
        let base = self.base.losses.plain().perplexity()?;
        Some(100.0 * (self.tuned.losses.plain().perplexity()? / base - 1.0))
    }

    /// Whether every bar is met.
    pub(crate) fn passed(&self) -> bool {
        self.gates.iter().all(Gate::passed)
    }

    /// `results.json`.
    pub(crate) fn to_json(&self) -> Value {
        let mut bare = self.bare.rates().to_json();
        bare["carries_on_with_questions"] = self.bare.question_share().into();
        let difference = |of: fn(&Model) -> Option<f64>| {
            of(&self.tuned).zip(of(&self.base)).map(|(tuned, base)| tuned - base)
        };
        json!({
            "base": self.model_json(&self.base),
            "base_bare": bare,
            "tuned": self.model_json(&self.tuned),
            "change": {
                "exact_match": difference(|m| m.asked.rates().exact_match()),
                "stop_rate": difference(|m| m.asked.rates().stop_rate()),
                "test_loss": difference(|m| m.losses.total.mean()),
                "plain_perplexity_percent": self.rise_percent(),
            },
            "gates": self.gates.iter().map(Gate::to_json).collect::<Vec<_>>(),
            "passed": self.passed(),
            "template_sha256": self.template_sha256,
            "compute": self.compute,
        })
    }

    fn model_json(&self, model: &Model) -> Value {
        let (total, plain) = (model.losses.total, model.losses.plain());
        let (by_source, by_kind) = model.losses.breakdowns();
        let mut value = model.asked.rates().to_json();
        let more = json!({
            "test_loss": total.mean(),
            "test_perplexity": total.perplexity(),
            "n_test_docs": total.n_docs,
            "n_test_tokens": total.n_tokens,
            "plain_perplexity": plain.perplexity(),
            "n_plain_docs": plain.n_docs,
            "n_plain_tokens": plain.n_tokens,
            "by_source": by_source,
            "by_kind": by_kind,
            "by_field": self.by_field(&model.asked),
        });
        if let (Value::Object(value), Value::Object(more)) = (&mut value, more) {
            value.extend(more);
        }
        value
    }

    fn by_field(&self, asked: &Answers) -> Value {
        let values = |field: &Field| -> Map<String, Value> {
            let rates = |(value, rows): &(String, Vec<usize>)| {
                (value.clone(), asked.rates_of(rows.iter().copied()).to_json())
            };
            field.values.iter().map(rates).collect()
        };
        let fields = self.fields.iter().map(|field| (field.name.clone(), values(field).into()));
        Value::Object(fields.collect())
    }
}
