//! `rows.parquet`: every prompt with every model's answer.

use std::sync::Arc;

use arrow::array::{
    ArrayRef, BooleanArray, LargeStringArray, LargeStringBuilder, RecordBatch, UInt32Array,
};
use arrow::datatypes::{Field, Schema};
use hone_cli::Failure;
use hone_schema::Prompt;

use crate::results::{Answers, Results};

/// The table. For each of `base_bare`, `base` and `tuned`: what it said, in how many tokens,
/// whether it stopped, whether it is exact, and, where JSON was asked for, whether it is valid and
/// how many fields are right.
pub(crate) fn table(prompts: &[Prompt], results: &Results) -> Result<RecordBatch, Failure> {
    let mut columns: Vec<(String, ArrayRef)> = vec![
        ("id".into(), texts(prompts.iter().map(|p| p.id.as_str()))),
        ("source".into(), texts(prompts.iter().map(|p| p.source.as_str()))),
        ("meta".into(), texts_null(prompts.iter().map(|p| p.meta.as_deref()))),
        ("prompt".into(), texts(prompts.iter().map(|p| p.prompt.as_str()))),
        ("question".into(), texts(prompts.iter().map(|p| p.question.as_str()))),
        ("reference".into(), texts(prompts.iter().map(|p| p.reference.as_str()))),
    ];
    let models = [
        ("base_bare", &results.bare),
        ("base", &results.base.asked),
        ("tuned", &results.tuned.asked),
    ];
    for (name, answers) in models {
        columns.extend(columns_of(name, answers));
    }
    let fields: Vec<Field> = columns
        .iter()
        .map(|(name, column)| {
            let is_nullable = name == "meta" || name.contains("_json_");
            Field::new(name, column.data_type().clone(), is_nullable)
        })
        .collect();
    let arrays = columns.into_iter().map(|(_, column)| column).collect();
    RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays)
        .map_err(|e| Failure::input(format!("rows.parquet: {e}")))
}

fn columns_of(name: &str, all: &Answers) -> Vec<(String, ArrayRef)> {
    let (answers, scores) = (&all.answers, &all.scores);
    let json = || scores.iter().map(|score| score.json);
    let column = |what: &str, values: ArrayRef| (format!("{name}_{what}"), values);
    vec![
        column("text", texts(answers.iter().map(|a| a.text.as_str()))),
        column(
            "n_new",
            Arc::new(UInt32Array::from_iter_values(answers.iter().map(|a| a.n_new as u32))),
        ),
        column("stopped", flags(scores.iter().map(|s| Some(s.is_stopped)))),
        column("exact", flags(scores.iter().map(|s| Some(s.is_exact)))),
        column("json_valid", flags(json().map(|j| j.map(|j| j.is_valid)))),
        column(
            "json_fields_right",
            Arc::new(UInt32Array::from_iter(json().map(|j| j.map(|j| j.n_right as u32)))),
        ),
    ]
}

fn texts<'a>(values: impl Iterator<Item = &'a str>) -> ArrayRef {
    Arc::new(LargeStringArray::from_iter_values(values))
}

fn texts_null<'a>(values: impl Iterator<Item = Option<&'a str>>) -> ArrayRef {
    let mut builder = LargeStringBuilder::new();
    values.for_each(|value| builder.append_option(value));
    Arc::new(builder.finish())
}

fn flags(values: impl Iterator<Item = Option<bool>>) -> ArrayRef {
    Arc::new(BooleanArray::from_iter(values))
}
