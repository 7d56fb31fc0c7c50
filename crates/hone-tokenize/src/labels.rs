//! Rows of `input_ids` and `labels` as other tools write them: read, checked, and cut into their documents.

use arrow::array::{Array, AsArray, ListArray, RecordBatch};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Float32Type, Int64Type};

use crate::export::IGNORED;

/// A row: its documents in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Labelled {
    pub(crate) docs: Vec<LabelledDoc>,
}

/// A document: tokens that attend to each other alone.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct LabelledDoc {
    pub(crate) ids: Vec<u32>,
    /// Weight of each token; that of the first is 0.
    pub(crate) weights: Vec<f32>,
    /// Whether the first token had a label, which nothing can predict.
    pub(crate) first_was_labelled: bool,
    /// The name and the source that came with it.
    pub(crate) name: Option<String>,
    pub(crate) source: Option<String>,
}

/// A row that is not one of labels: its number in the batch, and what is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) row: usize,
    pub(crate) what: String,
}

/// The columns of a batch.
struct Columns {
    ids: ListArray,
    labels: ListArray,
    positions: Option<ListArray>,
    lengths: Option<ListArray>,
    mask: Option<ListArray>,
    weights: Option<ListArray>,
    names: Option<ListArray>,
    sources: Option<ListArray>,
}

/// A row as it stands in its columns.
struct Raw {
    ids: Vec<i64>,
    labels: Vec<i64>,
    positions: Option<Vec<i64>>,
    lengths: Option<Vec<i64>>,
    mask: Option<Vec<i64>>,
    weights: Option<Vec<f32>>,
}

/// The rows of a batch.
///
/// # Errors
/// The first row that is not what it should be; row 0 for a column that is not.
pub(crate) fn rows(batch: &RecordBatch) -> Result<Vec<Labelled>, Fault> {
    let columns = Columns::of(batch).map_err(|what| Fault { row: 0, what })?;
    (0..batch.num_rows())
        .map(|row| {
            let fault = |what| Fault { row, what };
            let raw = columns.raw(row).map_err(fault)?.without_padding().map_err(fault)?;
            let mut labelled = Labelled { docs: raw.documents().map_err(fault)? };
            columns.name(row, &mut labelled).map_err(fault)?;
            Ok(labelled)
        })
        .collect()
}

impl Columns {
    fn of(batch: &RecordBatch) -> Result<Self, String> {
        let ints = |name| list(batch, name, &DataType::Int64);
        let need = |name: &str, list: Option<ListArray>| {
            list.ok_or_else(|| format!("there is no column `{name}`"))
        };
        let texts = |name| list(batch, name, &DataType::Utf8);
        Ok(Columns {
            ids: need("input_ids", ints("input_ids")?)?,
            labels: need("labels", ints("labels")?)?,
            positions: ints("position_ids")?,
            lengths: ints("seq_lengths")?,
            mask: ints("attention_mask")?,
            weights: list(batch, "loss_weights", &DataType::Float32)?,
            names: texts("ids")?,
            sources: texts("sources")?,
        })
    }

    fn raw(&self, row: usize) -> Result<Raw, String> {
        let ints = |name, list: &ListArray| ints_at(name, list, row);
        let maybe =
            |name, list: &Option<ListArray>| list.as_ref().map(|l| ints(name, l)).transpose();
        let weights = self.weights.as_ref().map(|list| {
            let values = value_at("loss_weights", list, row)?;
            Ok::<_, String>(values.as_primitive::<Float32Type>().values().to_vec())
        });
        Ok(Raw {
            ids: ints("input_ids", &self.ids)?,
            labels: ints("labels", &self.labels)?,
            positions: maybe("position_ids", &self.positions)?,
            lengths: maybe("seq_lengths", &self.lengths)?,
            mask: maybe("attention_mask", &self.mask)?,
            weights: weights.transpose()?,
        })
    }

    /// Gives documents the names that came with them.
    fn name(&self, row: usize, labelled: &mut Labelled) -> Result<(), String> {
        let texts = |name, list: &Option<ListArray>| -> Result<Vec<Option<String>>, String> {
            let Some(list) = list else { return Ok(vec![None; labelled.docs.len()]) };
            let values = value_at(name, list, row)?;
            let values: Vec<_> =
                values.as_string::<i32>().iter().map(|v| v.map(str::to_owned)).collect();
            if values.len() != labelled.docs.len() {
                let (n, docs) = (values.len(), labelled.docs.len());
                return Err(format!("`{name}` has {n} values for {docs} documents"));
            }
            Ok(values)
        };
        let (names, sources) = (texts("ids", &self.names)?, texts("sources", &self.sources)?);
        for (doc, (name, source)) in labelled.docs.iter_mut().zip(names.into_iter().zip(sources)) {
            (doc.name, doc.source) = (name, source);
        }
        Ok(())
    }
}

/// A column of lists as lists of `of`; none when it is not there. Numbers of another kind are no ids: a float is refused.
fn list(batch: &RecordBatch, name: &str, of: &DataType) -> Result<Option<ListArray>, String> {
    let Some(column) = batch.column_by_name(name) else {
        return Ok(None);
    };
    let found = column.data_type();
    let inner = match found {
        DataType::List(field) | DataType::LargeList(field) => field.data_type(),
        DataType::FixedSizeList(field, _) => field.data_type(),
        _ => return Err(format!("column `{name}` is {found}, not a list")),
    };
    let fits = match of {
        DataType::Int64 => inner.is_integer(),
        DataType::Float32 => inner.is_floating(),
        _ => matches!(inner, DataType::Utf8 | DataType::LargeUtf8),
    };
    if !fits {
        return Err(format!("column `{name}` is {found}, not a list of {of}"));
    }
    let target = DataType::List(Field::new("item", of.clone(), true).into());
    let array = cast(column, &target).map_err(|e| format!("column `{name}`: {e}"))?;
    Ok(Some(array.as_list::<i32>().clone()))
}

fn value_at(name: &str, list: &ListArray, row: usize) -> Result<arrow::array::ArrayRef, String> {
    if list.is_null(row) {
        return Err(format!("`{name}` is null"));
    }
    let values = list.value(row);
    // A number beyond 64 bits becomes null on its way there.
    if values.null_count() > 0 {
        return Err(format!("`{name}` holds a null"));
    }
    Ok(values)
}

fn ints_at(name: &str, list: &ListArray, row: usize) -> Result<Vec<i64>, String> {
    Ok(value_at(name, list, row)?.as_primitive::<Int64Type>().values().to_vec())
}

impl Raw {
    /// The row without the tokens whose attention mask is 0, which must not be trained.
    fn without_padding(mut self) -> Result<Self, String> {
        let n = self.ids.len();
        let mut of_tokens = vec![("labels", self.labels.len())];
        of_tokens.extend(self.positions.as_ref().map(|v| ("position_ids", v.len())));
        of_tokens.extend(self.mask.as_ref().map(|v| ("attention_mask", v.len())));
        of_tokens.extend(self.weights.as_ref().map(|v| ("loss_weights", v.len())));
        if let Some((name, len)) = of_tokens.into_iter().find(|(_, len)| *len != n) {
            return Err(format!("{n} `input_ids` and {len} `{name}`"));
        }
        let Some(mask) = self.mask.take() else { return Ok(self) };
        if let Some(at) = (0..n).find(|at| mask[*at] == 0 && self.labels[*at] != i64::from(IGNORED))
        {
            return Err(format!("token {at} is masked by `attention_mask`, and has a label"));
        }
        fn keep<T: Copy>(values: &mut Vec<T>, mask: &[i64]) {
            let mut at = 0;
            values.retain(|_| {
                at += 1;
                mask[at - 1] != 0
            });
        }
        keep(&mut self.ids, &mask);
        keep(&mut self.labels, &mask);
        self.positions.iter_mut().for_each(|values| keep(values, &mask));
        self.weights.iter_mut().for_each(|values| keep(values, &mask));
        self.mask = Some(mask.into_iter().filter(|m| *m != 0).collect());
        Ok(self)
    }

    /// Lengths of the documents, as each column that knows them says, and all that do say the same.
    fn lengths(&self) -> Result<Vec<usize>, String> {
        let n = self.ids.len();
        let mut said: Vec<(&str, Vec<usize>)> = Vec::new();
        if let Some(lengths) = &self.lengths {
            let lens: Option<Vec<usize>> = lengths
                .iter()
                .map(|len| usize::try_from(*len).ok().filter(|len| *len > 0))
                .collect();
            // They are foreign: a sum that wraps around would fit, and its documents would not.
            let sum = |lens: &[usize]| lens.iter().try_fold(0_usize, |sum, n| sum.checked_add(*n));
            let lens = lens.filter(|lens| sum(lens) == Some(n));
            let lens =
                lens.ok_or_else(|| format!("`seq_lengths` {lengths:?} do not add up to {n}"))?;
            said.push(("seq_lengths", lens));
        }
        if let Some(positions) = &self.positions {
            let mut lens: Vec<usize> = Vec::new();
            for (at, position) in positions.iter().enumerate() {
                match (*position, lens.last_mut()) {
                    (0, _) => lens.push(1),
                    (p, Some(len)) if p == *len as i64 => *len += 1,
                    _ => return Err(format!("`position_ids` jump to {position} at token {at}")),
                }
            }
            said.push(("position_ids", lens));
        }
        // A mask of ones numbers no documents.
        if let Some(mask) = self.mask.as_ref().filter(|mask| mask.iter().any(|m| *m > 1)) {
            let lens = mask.chunk_by(|a, b| a == b).map(<[i64]>::len).collect();
            said.push(("attention_mask", lens));
        }
        if let [(one, a), .., (other, b)] = said.as_slice()
            && said.iter().any(|(_, lens)| lens != a)
        {
            return Err(format!("`{one}` and `{other}` have other documents: {a:?} and {b:?}"));
        }
        Ok(said.into_iter().next().map_or_else(|| vec![n], |(_, lens)| lens))
    }

    fn documents(&self) -> Result<Vec<LabelledDoc>, String> {
        if self.ids.is_empty() {
            return Err("it has no token".to_owned());
        }
        let mut docs = Vec::new();
        let mut at = 0;
        for len in self.lengths()? {
            let mut doc = LabelledDoc::default();
            for token in at..at + len {
                let weight = self.weight(token)?;
                doc.ids.push(self.id(token)?);
                doc.weights.push(if token == at { 0.0 } else { weight });
                doc.first_was_labelled |= token == at && weight > 0.0;
            }
            docs.push(doc);
            at += len;
        }
        Ok(docs)
    }

    fn id(&self, token: usize) -> Result<u32, String> {
        let id = self.ids[token];
        u32::try_from(id).map_err(|_| format!("token {token} has the id {id}"))
    }

    fn weight(&self, token: usize) -> Result<f32, String> {
        let (id, label) = (self.ids[token], self.labels[token]);
        if label == i64::from(IGNORED) {
            return Ok(0.0);
        }
        if label != id {
            return Err(format!(
                "token {token} has the id {id} and the label {label}, which is neither that id nor {IGNORED}; \
                 labels are not shifted"
            ));
        }
        let weight = self.weights.as_ref().map_or(1.0, |weights| weights[token]);
        if weight.is_finite() && weight >= 0.0 {
            Ok(weight)
        } else {
            Err(format!("token {token} has the weight {weight}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(ids: &[i64], labels: &[i64]) -> Raw {
        let (ids, labels) = (ids.to_vec(), labels.to_vec());
        Raw { ids, labels, positions: None, lengths: None, mask: None, weights: None }
    }

    /// The documents as text, such as `1 [2] | 3 [4:0.5]`; or what is wrong.
    fn check(raw: Raw, expect: Result<&str, &str>) {
        let found = raw.without_padding().and_then(|raw| raw.documents());
        let found = found.map(|docs| {
            let token = |(id, w): (&u32, &f32)| match *w {
                0.0 => id.to_string(),
                1.0 => format!("[{id}]"),
                w => format!("[{id}:{w}]"),
            };
            let doc = |doc: &LabelledDoc| {
                doc.ids.iter().zip(&doc.weights).map(token).collect::<Vec<_>>().join(" ")
            };
            docs.iter().map(doc).collect::<Vec<_>>().join(" | ")
        });
        match (found, expect) {
            (Ok(found), Ok(expect)) => assert_eq!(found, expect),
            (Err(found), Err(expect)) => assert!(found.contains(expect), "{found}"),
            (found, expect) => panic!("{found:?}, not {expect:?}"),
        }
    }

    #[test]
    fn documents_are_told_apart_by_any_column_that_knows_them() {
        let four = || raw(&[1, 2, 3, 4], &[-100, 2, -100, 4]);
        check(four(), Ok("1 [2] 3 [4]"));
        check(Raw { lengths: Some(vec![2, 2]), ..four() }, Ok("1 [2] | 3 [4]"));
        check(Raw { positions: Some(vec![0, 1, 0, 1]), ..four() }, Ok("1 [2] | 3 [4]"));
        check(Raw { mask: Some(vec![1, 1, 2, 2]), ..four() }, Ok("1 [2] | 3 [4]"));
        check(Raw { mask: Some(vec![1; 4]), lengths: Some(vec![4]), ..four() }, Ok("1 [2] 3 [4]"));
        let weights = Some(vec![0.0, 1.0, 0.0, 0.5]);
        check(Raw { weights, ..four() }, Ok("1 [2] 3 [4:0.5]"));
        // Padding goes, and the first token of a document is predicted by nothing.
        let padded = raw(&[0, 5, 6, 0], &[-100, 5, 6, -100]);
        check(Raw { mask: Some(vec![0, 1, 1, 0]), ..padded }, Ok("5 [6]"));
    }

    #[test]
    fn what_is_no_row_of_labels_is_refused() {
        let four = || raw(&[1, 2, 3, 4], &[-100, 2, -100, 4]);
        check(raw(&[1, 2], &[2]), Err("2 `input_ids` and 1 `labels`"));
        check(raw(&[1, 2], &[2, -100]), Err("the label 2, which is neither that id nor -100"));
        check(raw(&[1, -2], &[-100, -100]), Err("token 1 has the id -2"));
        check(raw(&[], &[]), Err("no token"));
        check(Raw { lengths: Some(vec![2, 1]), ..four() }, Err("[2, 1] do not add up to 4"));
        check(Raw { lengths: Some(vec![4, 0]), ..four() }, Err("do not add up"));
        check(Raw { lengths: Some(vec![-1, 5]), ..four() }, Err("do not add up"));
        let wraps = vec![i64::MAX, i64::MAX, 6];
        check(Raw { lengths: Some(wraps), ..four() }, Err("do not add up to 4"));
        check(Raw { positions: Some(vec![0, 1, 3, 4]), ..four() }, Err("jump to 3 at token 2"));
        check(Raw { positions: Some(vec![1, 2, 3, 4]), ..four() }, Err("jump to 1 at token 0"));
        let other = Raw { positions: Some(vec![0, 0, 1, 2]), lengths: Some(vec![2, 2]), ..four() };
        check(
            other,
            Err("`seq_lengths` and `position_ids` have other documents: [2, 2] and [1, 3]"),
        );
        check(Raw { mask: Some(vec![1, 1, 1, 0]), ..four() }, Err("token 3 is masked"));
        check(Raw { weights: Some(vec![1.0, f32::NAN, 1.0, 1.0]), ..four() }, Err("weight NaN"));
    }
}
