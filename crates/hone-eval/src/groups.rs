//! What rows have in common: fields of their meta data with few values, to break scores down by.

use hone_schema::Prompt;
use serde_json::{Map, Value};

/// Most values of a field that is a group: more is a name.
const VALUES_MAX: usize = 24;

/// A field, and the rows of each of its values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Field {
    /// Its name.
    pub(crate) name: String,
    /// Values in the order of their first row, with the indexes of their rows.
    pub(crate) values: Vec<(String, Vec<usize>)>,
}

/// The fields to group prompts by: texts, given for at least half of the prompts, with 2 to 24
/// values.
pub(crate) fn fields(prompts: &[Prompt]) -> Vec<Field> {
    let mut fields: Vec<Field> = Vec::new();
    for (row, prompt) in prompts.iter().enumerate() {
        for (name, value) in meta(prompt) {
            let Value::String(value) = value else { continue };
            let at = fields.iter().position(|field| field.name == name).unwrap_or_else(|| {
                fields.push(Field { name, values: Vec::new() });
                fields.len() - 1
            });
            let values = &mut fields[at].values;
            // One more than the limit tells that it is above it.
            match values.iter().position(|(known, _)| *known == value) {
                Some(at) => values[at].1.push(row),
                None if values.len() <= VALUES_MAX => values.push((value, vec![row])),
                None => {}
            }
        }
    }
    fields.retain(|field| {
        let n_rows: usize = field.values.iter().map(|(_, rows)| rows.len()).sum();
        (2..=VALUES_MAX).contains(&field.values.len()) && 2 * n_rows >= prompts.len()
    });
    fields
}

fn meta(prompt: &Prompt) -> Map<String, Value> {
    let text = prompt.meta.as_deref().unwrap_or("{}");
    serde_json::from_str(text).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt(meta: Option<String>) -> Prompt {
        Prompt {
            id: String::new(),
            source: String::new(),
            split: hone_schema::Split::Test,
            prompt_ids: vec![],
            bare_ids: vec![],
            prompt: String::new(),
            question: String::new(),
            reference: String::new(),
            meta,
        }
    }

    #[test]
    fn fields_with_few_values_are_groups() {
        let row = |i: usize| {
            let relation = if i.is_multiple_of(3) { "b" } else { "a" };
            format!(r#"{{"name": "n{i}", "relation": "{relation}", "one": "x", "n": {i}}}"#)
        };
        let mut prompts: Vec<Prompt> = (0..30).map(|i| prompt(Some(row(i)))).collect();
        prompts.push(prompt(Some(r#"{"rare": "x"}"#.into())));
        prompts.push(prompt(Some(r#"{"rare": "y"}"#.into())));
        prompts.push(prompt(None));
        let found = fields(&prompts);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].name, "relation");
        let sizes: Vec<_> = found[0].values.iter().map(|(v, r)| (v.as_str(), r.len())).collect();
        assert_eq!(sizes, [("b", 10), ("a", 20)]);
    }
}
