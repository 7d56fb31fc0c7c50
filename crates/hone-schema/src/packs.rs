//! Packs: token ids and loss weights of documents laid end to end.

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, BooleanArray, Float32Array, LargeStringArray, ListArray, ListBuilder,
    RecordBatch, StructArray, UInt32Array, UInt32Builder, UInt64Array,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Fields, Schema, SchemaRef};

use crate::columns::{column, item};
use crate::roles::{Roles, roles_at, roles_column, run_field};
use crate::rows::ids_column;
use crate::{Kind, RowError};

const INPUT_IDS: &str = "input_ids";
const LOSS_WEIGHT: &str = "loss_weight";
const SEQ_LENS: &str = "seq_lens";
const ROLES: &str = "roles";

/// A row of a `packs` artefact: documents end to end, each isolated from the others by whoever computes with it.
#[derive(Clone, Debug, PartialEq)]
pub struct Pack {
    /// Token ids of all documents.
    pub input_ids: Vec<u32>,
    /// Weight of the loss of predicting each token; 0 = not trained. The first token of a document is never predicted.
    pub loss_weight: Vec<f32>,
    /// Whose words the trained tokens are, in runs over all ids.
    pub roles: Roles,
    /// The documents, in order; their lengths add up to the number of ids.
    pub docs: Vec<Doc>,
}

/// A document in a pack, and which tokens of which row it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Doc {
    /// Its number of tokens, at least 1.
    pub len: u32,
    /// Index of its row among the rendered rows, from 0.
    pub row: u64,
    /// Id of its row.
    pub row_id: String,
    /// Source of its row.
    pub source: String,
    /// Kind of its row.
    pub kind: Kind,
    /// Index in the row's own token sequence of its first token: above 0 when a long row was split or its head cut.
    pub offset: u32,
    /// Whether tokens of the row are missing from it.
    pub truncated: bool,
    /// Which tokens of its row it has, where some were taken out from between others: ranges of indexes in the row's own token
    /// sequence, in order and apart from each other. Empty where it has them all from [`Doc::offset`] on.
    pub kept: Vec<Range<u32>>,
}

impl Doc {
    /// Index in the row's own token sequence of each of its tokens.
    pub fn row_tokens(&self) -> impl Iterator<Item = u32> + use<> {
        let whole = self.offset..self.offset.saturating_add(self.len);
        let ranges = if self.kept.is_empty() { vec![whole] } else { self.kept.clone() };
        ranges.into_iter().flatten()
    }

    fn check(&self, index: usize) -> Result<(), PackError> {
        if self.len == 0 {
            return Err(PackError::EmptyDoc { index });
        }
        if self.offset.checked_add(self.len).is_none() {
            return Err(PackError::Kept { index, found: "tokens beyond the 2^32nd".to_owned() });
        }
        let Some(first) = self.kept.first() else {
            return Ok(());
        };
        let n: u64 = self.kept.iter().map(|r| u64::from(r.end.saturating_sub(r.start))).sum();
        let apart = self.kept.windows(2).all(|pair| pair[0].end < pair[1].start);
        let full = self.kept.iter().all(|range| range.start < range.end);
        if n != u64::from(self.len) || !apart || !full || first.start != self.offset {
            return Err(PackError::Kept { index, found: format!("{:?}", self.kept) });
        }
        Ok(())
    }
}

/// Why a pack contradicts itself.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PackError {
    /// Ids and weights of different number.
    #[error("a pack has {ids} ids and {weights} loss weights")]
    Weights {
        /// Number of ids.
        ids: usize,
        /// Number of weights.
        weights: usize,
    },
    /// Documents that do not add up to the pack.
    #[error("a pack has {ids} ids, its documents have {docs}")]
    Docs {
        /// Number of ids.
        ids: usize,
        /// Sum of the documents' lengths.
        docs: u64,
    },
    /// A document without tokens.
    #[error("document {index} of a pack is empty")]
    EmptyDoc {
        /// Its index.
        index: usize,
    },
    /// Kept ranges of tokens that are not those of the document.
    #[error("document {index} of a pack keeps {found} of its row, which are not its tokens")]
    Kept {
        /// Its index.
        index: usize,
        /// The ranges, as text.
        found: String,
    },
    /// Roles that are not those of the tokens.
    #[error("a pack has {ids} ids, and its roles are {found}")]
    Roles {
        /// Number of ids.
        ids: usize,
        /// What is wrong with them.
        found: String,
    },
    /// A weight that is negative or not a number.
    #[error("token {index} of a pack has loss weight {weight}")]
    Weight {
        /// Its index.
        index: usize,
        /// The weight, as text.
        weight: String,
    },
}

impl Pack {
    /// A pack of no document yet, with room for `n_tokens`.
    pub fn with_capacity(n_tokens: usize) -> Self {
        Pack {
            input_ids: Vec::with_capacity(n_tokens),
            loss_weight: Vec::with_capacity(n_tokens),
            roles: Roles::default(),
            docs: Vec::new(),
        }
    }

    /// What writer and reader both check.
    ///
    /// # Errors
    /// See [`PackError`].
    pub fn check(&self) -> Result<(), PackError> {
        let ids = self.input_ids.len();
        if ids != self.loss_weight.len() {
            return Err(PackError::Weights { ids, weights: self.loss_weight.len() });
        }
        self.docs.iter().enumerate().try_for_each(|(index, doc)| doc.check(index))?;
        let docs: u64 = self.docs.iter().map(|doc| u64::from(doc.len)).sum();
        if docs != ids as u64 {
            return Err(PackError::Docs { ids, docs });
        }
        let n_roles = self.roles.n_tokens();
        let of_others = (n_roles != ids as u64).then(|| format!("those of {n_roles} tokens"));
        if let Some(found) = of_others.or_else(|| self.roles.fault()) {
            return Err(PackError::Roles { ids, found });
        }
        match self.loss_weight.iter().position(|w| !(w.is_finite() && *w >= 0.0)) {
            Some(index) => {
                Err(PackError::Weight { index, weight: self.loss_weight[index].to_string() })
            }
            None => Ok(()),
        }
    }

    /// Number of tokens that a model is trained to predict: weight above 0, and not first of their document.
    pub fn n_trained(&self) -> u64 {
        let trained = |(_, tokens): (&Doc, Range<usize>)| {
            let weights = &self.loss_weight[tokens.start + 1..tokens.end];
            weights.iter().filter(|w| **w > 0.0).count() as u64
        };
        self.documents().map(trained).sum()
    }

    /// The documents in order, each with the places of its tokens in the pack.
    pub fn documents(&self) -> impl Iterator<Item = (&Doc, Range<usize>)> {
        let mut at = 0;
        self.docs.iter().map(move |doc| {
            let start = at;
            at += doc.len as usize;
            (doc, start..at)
        })
    }

    /// Columns of the table. `seq_lens` repeats the documents' lengths as a plain list for readers of other tools.
    pub fn schema() -> SchemaRef {
        let list = |name: &str, of: DataType| {
            Field::new(name, DataType::List(Arc::new(Field::new("item", of, false))), false)
        };
        Arc::new(Schema::new(vec![
            list(INPUT_IDS, DataType::UInt32),
            list(LOSS_WEIGHT, DataType::Float32),
            list(SEQ_LENS, DataType::UInt32),
            Field::new(ROLES, DataType::List(Arc::new(run_field())), false),
            list("docs", DataType::Struct(doc_fields())),
        ]))
    }

    /// Packs as one batch.
    ///
    /// # Errors
    /// A pack that contradicts itself.
    pub fn to_batch(packs: &[Self]) -> Result<RecordBatch, RowError> {
        for (row, pack) in packs.iter().enumerate() {
            pack.check().map_err(|e| wrong(row, &e))?;
        }
        let lens: Vec<Vec<u32>> =
            packs.iter().map(|p| p.docs.iter().map(|d| d.len).collect()).collect();
        let columns: Vec<ArrayRef> = vec![
            Arc::new(ids_column(packs.iter().map(|p| p.input_ids.as_slice()))?),
            Arc::new(weights_column(packs)?),
            Arc::new(ids_column(lens.iter().map(Vec::as_slice))?),
            Arc::new(roles_column(packs.iter().map(|p| &p.roles))?),
            Arc::new(docs_column(packs)?),
        ];
        Ok(RecordBatch::try_new(Self::schema(), columns)?)
    }

    /// Packs of a batch.
    ///
    /// # Errors
    /// A missing or mistyped column, a pack that contradicts itself.
    pub fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>, RowError> {
        let columns = PackColumns::of(batch)?;
        let (roles, docs) =
            (column::<ListArray>(batch, ROLES)?, column::<ListArray>(batch, "docs")?);
        (0..batch.num_rows())
            .map(|row| {
                let pack = Pack {
                    input_ids: columns.input_ids(row)?.values().to_vec(),
                    loss_weight: columns.loss_weight(row)?.values().to_vec(),
                    roles: roles_at(roles, row)?,
                    docs: docs_at(docs, row)?,
                };
                pack.check().map_err(|e| wrong(row, &e))?;
                let lens = columns.seq_lens(row)?;
                let lens: &[u32] = lens.values();
                if !lens.iter().copied().eq(pack.docs.iter().map(|doc| doc.len)) {
                    let docs: Vec<u32> = pack.docs.iter().map(|doc| doc.len).collect();
                    let found = format!("{lens:?}, and its documents have {docs:?} tokens");
                    return Err(RowError::Value { row, name: SEQ_LENS, found });
                }
                Ok(pack)
            })
            .collect()
    }
}

/// The columns of packs that a model computes with, as they lie in a batch: for whoever read the batch as [`Pack`]s once, which
/// checks what they hold.
#[derive(Clone, Debug)]
pub struct PackColumns {
    input_ids: ListArray,
    loss_weight: ListArray,
    seq_lens: ListArray,
}

impl PackColumns {
    /// The columns of a batch.
    ///
    /// # Errors
    /// A missing column, or one that is no list.
    pub fn of(batch: &RecordBatch) -> Result<Self, RowError> {
        let list = |name| column::<ListArray>(batch, name).cloned();
        Ok(PackColumns {
            input_ids: list(INPUT_IDS)?,
            loss_weight: list(LOSS_WEIGHT)?,
            seq_lens: list(SEQ_LENS)?,
        })
    }

    /// Token ids of a pack.
    ///
    /// # Errors
    /// A list of something else.
    pub fn input_ids(&self, row: usize) -> Result<UInt32Array, RowError> {
        item(&self.input_ids, row, INPUT_IDS)
    }

    /// Weight of each token of a pack.
    ///
    /// # Errors
    /// A list of something else.
    pub fn loss_weight(&self, row: usize) -> Result<Float32Array, RowError> {
        item(&self.loss_weight, row, LOSS_WEIGHT)
    }

    /// Lengths of the documents of a pack.
    ///
    /// # Errors
    /// A list of something else.
    pub fn seq_lens(&self, row: usize) -> Result<UInt32Array, RowError> {
        item(&self.seq_lens, row, SEQ_LENS)
    }
}

fn wrong(row: usize, error: &PackError) -> RowError {
    RowError::Value { row, name: "pack", found: error.to_string() }
}

fn doc_fields() -> Fields {
    Fields::from(vec![
        Field::new("len", DataType::UInt32, false),
        Field::new("row", DataType::UInt64, false),
        Field::new("row_id", DataType::LargeUtf8, false),
        Field::new("source", DataType::LargeUtf8, false),
        Field::new("kind", DataType::LargeUtf8, false),
        Field::new("offset", DataType::UInt32, false),
        Field::new("truncated", DataType::Boolean, false),
        Field::new("kept", DataType::List(Arc::new(kept_field())), true),
    ])
}

/// First token and token behind the last of each kept range, one after the other.
fn kept_field() -> Field {
    Field::new("item", DataType::UInt32, false)
}

fn weights_column(packs: &[Pack]) -> Result<ListArray, RowError> {
    let offsets = OffsetBuffer::from_lengths(packs.iter().map(|p| p.loss_weight.len()));
    let values: Vec<f32> = packs.iter().flat_map(|p| p.loss_weight.iter().copied()).collect();
    let field = Arc::new(Field::new("item", DataType::Float32, false));
    Ok(ListArray::try_new(field, offsets, Arc::new(Float32Array::from(values)), None)?)
}

fn docs_column(packs: &[Pack]) -> Result<ListArray, RowError> {
    let docs = || packs.iter().flat_map(|p| &p.docs);
    let text = |of: fn(&Doc) -> &str| -> ArrayRef {
        Arc::new(LargeStringArray::from_iter_values(docs().map(of)))
    };
    let columns: Vec<ArrayRef> = vec![
        Arc::new(UInt32Array::from_iter_values(docs().map(|d| d.len))),
        Arc::new(UInt64Array::from_iter_values(docs().map(|d| d.row))),
        text(|d| &d.row_id),
        text(|d| &d.source),
        text(|d| d.kind.as_str()),
        Arc::new(UInt32Array::from_iter_values(docs().map(|d| d.offset))),
        Arc::new(BooleanArray::from_iter(docs().map(|d| Some(d.truncated)))),
        Arc::new(kept_column(docs())),
    ];
    let values = StructArray::try_new(doc_fields(), columns, None)?;
    let offsets = OffsetBuffer::from_lengths(packs.iter().map(|p| p.docs.len()));
    let field = Arc::new(Field::new("item", DataType::Struct(doc_fields()), false));
    Ok(ListArray::try_new(field, offsets, Arc::new(values), None)?)
}

fn kept_column<'a>(docs: impl Iterator<Item = &'a Doc>) -> ListArray {
    let mut column = ListBuilder::new(UInt32Builder::new()).with_field(kept_field());
    for doc in docs {
        doc.kept.iter().for_each(|range| column.values().append_slice(&[range.start, range.end]));
        column.append(!doc.kept.is_empty());
    }
    column.finish()
}

fn kept_at(list: &ListArray, doc: usize) -> Result<Vec<Range<u32>>, RowError> {
    if list.is_null(doc) {
        return Ok(Vec::new());
    }
    let ends: UInt32Array = item(list, doc, "kept")?;
    Ok(ends.values().chunks_exact(2).map(|ends| ends[0]..ends[1]).collect())
}

fn docs_at(list: &ListArray, row: usize) -> Result<Vec<Doc>, RowError> {
    let values: StructArray = item(list, row, "docs")?;
    let batch = RecordBatch::from(values);
    let len = column::<UInt32Array>(&batch, "len")?;
    let row_idx = column::<UInt64Array>(&batch, "row")?;
    let row_id = column::<LargeStringArray>(&batch, "row_id")?;
    let source = column::<LargeStringArray>(&batch, "source")?;
    let kind = column::<LargeStringArray>(&batch, "kind")?;
    let offset = column::<UInt32Array>(&batch, "offset")?;
    let truncated = column::<BooleanArray>(&batch, "truncated")?;
    let kept = column::<ListArray>(&batch, "kept")?;
    (0..batch.num_rows())
        .map(|idx| {
            let name = kind.value(idx);
            let unknown = || RowError::Value { row, name: "kind", found: format!("{name:?}") };
            Ok(Doc {
                len: len.value(idx),
                row: row_idx.value(idx),
                row_id: row_id.value(idx).to_owned(),
                source: source.value(idx).to_owned(),
                kind: Kind::from_name(name).ok_or_else(unknown)?,
                offset: offset.value(idx),
                truncated: truncated.value(idx),
                kept: kept_at(kept, idx)?,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn doc(len: u32) -> Doc {
        Doc {
            len,
            row: 7,
            row_id: format!("r{len}"),
            source: "s".into(),
            kind: Kind::Sft,
            offset: 0,
            truncated: len > 2,
            kept: Vec::new(),
        }
    }

    fn roles(runs: &[(&str, u32)]) -> Roles {
        let mut roles = Roles::default();
        runs.iter().for_each(|(role, n)| roles.push(role, *n));
        roles
    }

    fn pack() -> Pack {
        Pack {
            input_ids: vec![1, 2, 3, 4, 5],
            loss_weight: vec![1.0, 0.5, 0.0, 1.0, 0.0],
            roles: roles(&[("user", 2), ("assistant", 3)]),
            docs: vec![doc(2), doc(3)],
        }
    }

    #[test]
    fn packs_read_back() {
        let cut = Doc { kept: vec![2..4, 7..8, 9..11], offset: 2, ..doc(5) };
        let packs = vec![pack(), Pack { docs: vec![cut], ..pack() }];
        let batch = Pack::to_batch(&packs).unwrap();
        assert_eq!(Pack::from_batch(&batch).unwrap(), packs);
    }

    #[test]
    fn every_token_of_a_document_has_its_place_in_the_row() {
        let tokens = |doc: Doc| doc.row_tokens().collect::<Vec<_>>();
        assert_eq!(tokens(Doc { offset: 4, ..doc(3) }), [4, 5, 6]);
        assert_eq!(tokens(Doc { kept: vec![2..4, 7..8], offset: 2, ..doc(3) }), [2, 3, 7]);
    }

    #[test]
    fn the_first_token_of_a_document_is_never_trained() {
        assert_eq!(pack().n_trained(), 2);
        assert_eq!(Pack { docs: vec![doc(5)], ..pack() }.n_trained(), 2);
    }

    #[test]
    fn lengths_beside_the_documents_are_theirs() {
        let batch = Pack::to_batch(&[pack(), pack()]).unwrap();
        let with = |lens: ArrayRef| {
            let mut columns = batch.columns().to_vec();
            columns[2] = lens;
            let fields: Vec<Field> = batch
                .schema()
                .fields()
                .iter()
                .zip(&columns)
                .map(|(field, column)| Field::new(field.name(), column.data_type().clone(), true))
                .collect();
            RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).unwrap()
        };
        let lists = |lens: [&[u32]; 2]| Arc::new(ids_column(lens.into_iter()).unwrap());
        let good = with(lists([&[2, 3], &[2, 3]]));
        assert_eq!(Pack::from_batch(&good).unwrap(), [pack(), pack()]);
        assert_eq!(PackColumns::of(&good).unwrap().seq_lens(1).unwrap().values(), &[2, 3]);
        let check = |lens: ArrayRef, message: &str| {
            let error = Pack::from_batch(&with(lens)).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        };
        let theirs = "row 1: column `seq_lens` holds";
        check(
            lists([&[2, 3], &[3, 2]]),
            &format!("{theirs} [3, 2], and its documents have [2, 3]"),
        );
        check(lists([&[2, 3], &[5]]), &format!("{theirs} [5]"));
        check(lists([&[2, 3], &[]]), &format!("{theirs} []"));
        let of = |values: ArrayRef| -> ArrayRef {
            let field = Arc::new(Field::new("item", values.data_type().clone(), false));
            let offsets = OffsetBuffer::from_lengths([2, 2]);
            Arc::new(ListArray::try_new(field, offsets, values, None).unwrap())
        };
        check(
            of(Arc::new(UInt64Array::from(vec![2, 3, 2, 3]))),
            "column `seq_lens` has type UInt64",
        );
        check(Arc::new(UInt32Array::from(vec![5, 5])), "column `seq_lens` has type UInt32");
        let without = batch.project(&[0, 1, 3, 4]).unwrap();
        let error = Pack::from_batch(&without).unwrap_err().to_string();
        assert_eq!(error, "column `seq_lens` is missing");
    }

    fn check(edit: impl FnOnce(&mut Pack), message: &str) {
        let mut pack = pack();
        edit(&mut pack);
        let error = Pack::to_batch(&[pack]).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }

    #[test]
    fn a_pack_that_contradicts_itself_is_refused() {
        check(|p| p.loss_weight.truncate(4), "5 ids and 4 loss weights");
        check(|p| p.docs.truncate(1), "5 ids, its documents have 2");
        check(|p| p.docs[0].len = 0, "document 0 of a pack is empty");
        let one = |range| std::iter::once(range).collect();
        check(|p| p.docs[1].kept = one(0..2), "document 1 of a pack keeps [0..2] of its row");
        check(|p| p.docs[1].kept = vec![0..2, 2..3], "keeps [0..2, 2..3]");
        check(|p| p.docs[1].kept = one(1..4), "keeps [1..4]");
        check(|p| p.docs[1].offset = u32::MAX, "beyond the 2^32nd");
        check(|p| p.roles = roles(&[("user", 4)]), "5 ids, and its roles are those of 4 tokens");
        check(|p| p.roles = Roles::one("", 5), "5 ids, and its roles are [(\"\", 5)]");
        check(|p| p.loss_weight[1] = f32::NAN, "token 1 of a pack has loss weight NaN");
        check(|p| p.loss_weight[1] = -1.0, "loss weight -1");
    }
}
