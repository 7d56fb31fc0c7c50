//! Rows of the tables that stages exchange, and how they lie in Arrow.

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, BooleanArray, BooleanBuilder, Float32Array, Float32Builder, Int32Array,
    Int32Builder, LargeStringArray, LargeStringBuilder, ListArray, RecordBatch, StringArray,
    StringBuilder, StructArray, UInt32Array, UInt32Builder, UInt64Array, UInt64Builder,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Fields, Schema, SchemaRef};
use arrow::error::ArrowError;

use crate::columns::{column, item};
use crate::share::Share;

/// What a row is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A conversation whose answers are learned.
    Sft,
    /// A conversation with a chosen and a rejected answer.
    Preference,
    /// Plain text, learned whole: pre-training and replay.
    Text,
}

/// Which part of the data a row belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Split {
    /// Trained on.
    Train,
    /// Looked at during training: the held-out loss.
    Eval,
    /// Looked at by `hone-eval` alone.
    Test,
}

/// Which part of a message, or of the template, wrote some bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// What a message says (or a plain text row).
    Content,
    /// What a message thinks before it speaks: `reasoning_content`, `thinking`.
    Reasoning,
    /// Names and arguments of the tools that a message calls.
    ToolCall,
    /// Markers, headers, separators.
    Scaffold,
    /// The marker that ends a turn: learned with the response before it.
    Stop,
}

/// Gives an enum its names in files and in configuration.
macro_rules! names {
    ($type:ty { $($variant:ident = $name:literal),+ $(,)? }) => {
        impl $type {
            /// Every value.
            pub const ALL: &'static [$type] = &[$(<$type>::$variant),+];

            /// Its name in files and in configuration.
            pub fn as_str(self) -> &'static str {
                match self { $(<$type>::$variant => $name),+ }
            }

            /// The value of that name.
            pub fn from_name(name: &str) -> Option<Self> {
                match name { $($name => Some(<$type>::$variant),)+ _ => None }
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

names!(Kind { Sft = "sft", Preference = "preference", Text = "text" });
names!(Split { Train = "train", Eval = "eval", Test = "test" });
names!(Part {
    Content = "content",
    Reasoning = "reasoning",
    ToolCall = "tool_call",
    Scaffold = "scaffold",
    Stop = "stop",
});

impl Part {
    /// Whether a message wrote it. The rest is the template's: only there may control tokens stand.
    pub fn is_said(self) -> bool {
        matches!(self, Part::Content | Part::Reasoning | Part::ToolCall)
    }
}

/// A row of a `conversations` artefact.
#[derive(Clone, Debug, PartialEq)]
pub struct Conversation {
    /// Stable name of the row: the one it came with, else a hash of its content.
    pub id: String,
    /// Name of its source in the configuration.
    pub source: String,
    /// Its row (or line, from 1) in that source.
    pub source_row: u64,
    /// Its split.
    pub split: Split,
    /// What it is for.
    pub kind: Kind,
    /// The messages as canonical JSON; `[]` for plain text.
    pub messages: String,
    /// The tools offered, as JSON.
    pub tools: Option<String>,
    /// Variables of the chat template that are the row's own (`documents`, `enable_thinking`), as a JSON object.
    pub variables: Option<String>,
    /// The text of a [`Kind::Text`] row.
    pub text: Option<String>,
    /// Weight of its loss: source times row.
    pub weight: f32,
    /// The chosen answer of a preference, as JSON messages.
    pub chosen: Option<String>,
    /// The rejected answer of a preference, as JSON messages.
    pub rejected: Option<String>,
    /// Further columns of the row, as a JSON object.
    pub meta: Option<String>,
}

/// Some bytes of a rendered text, and who wrote them.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// First byte.
    pub start: u32,
    /// Behind the last byte.
    pub end: u32,
    /// Index of the message that these bytes belong to; `None` for what belongs to none.
    pub message: Option<u32>,
    /// Role of that message, `text` for plain text, empty for what belongs to none.
    pub role: String,
    /// Which part wrote them.
    pub part: Part,
    /// Weight of their loss as the data has it (source x row x message x span), before the mask policy.
    pub weight: f32,
    /// The row itself says that these bytes are trained (`train: true` on a message or a part of it), whatever the policy
    /// makes of their role.
    pub chosen: bool,
}

/// A row of a `rendered` artefact.
#[derive(Clone, Debug, PartialEq)]
pub struct Rendered {
    /// The conversation's id.
    pub id: String,
    /// The conversation's source.
    pub source: String,
    /// The conversation's split.
    pub split: Split,
    /// The conversation's kind.
    pub kind: Kind,
    /// The whole text.
    pub text: String,
    /// Spans that cover the text from its first byte to its last, in order, without gap or overlap.
    pub spans: Vec<Span>,
    /// Which of the conversation's answers it is there for.
    pub share: Share,
    /// The text up to where the last response begins, when the last message is a response: what a served model is given.
    pub prompt_len: Option<u32>,
    /// Further columns of the row, as a JSON object.
    pub meta: Option<String>,
}

/// A row of the `prompts` table of a `packs` artefact: something to generate from, and the reference answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    /// The conversation's id.
    pub id: String,
    /// The conversation's source.
    pub source: String,
    /// The conversation's split.
    pub split: Split,
    /// Ids up to where the response begins.
    pub prompt_ids: Vec<u32>,
    /// Ids of the last user message alone, after the beginning-of-text token if there is one: what a base model understands.
    pub bare_ids: Vec<u32>,
    /// The prompt as text.
    pub prompt: String,
    /// The last user message as text.
    pub question: String,
    /// The reference answer.
    pub reference: String,
    /// Further columns of the row, as a JSON object.
    pub meta: Option<String>,
}

/// A row of `rejects.parquet`: something that was not taken, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Reject {
    /// Name of its source in the configuration.
    pub source: String,
    /// The file it came from; for later stages the row's id.
    pub file: String,
    /// Line (from 1) or row in that file.
    pub line: u64,
    /// The reason, as in the ledger.
    pub reason: String,
    /// What exactly was wrong.
    pub detail: String,
    /// The raw row, cut at a limit.
    pub raw: String,
}

/// Why a batch does not hold rows of the expected kind.
#[derive(Debug, thiserror::Error)]
pub enum RowError {
    /// A column that should be there is not.
    #[error("column `{name}` is missing")]
    MissingColumn {
        /// The column.
        name: &'static str,
    },
    /// A column of another type.
    #[error("column `{name}` has type {found}, which is not the one this program writes")]
    ColumnType {
        /// The column.
        name: &'static str,
        /// Its type.
        found: String,
    },
    /// A value outside its range.
    #[error("row {row}: column `{name}` holds {found}")]
    Value {
        /// The row in its batch.
        row: usize,
        /// The column.
        name: &'static str,
        /// The value.
        found: String,
    },
    /// Spans that do not cover their text.
    #[error("row {row}: spans do not cover the text: {found}")]
    Spans {
        /// The row in its batch.
        row: usize,
        /// What is wrong.
        found: String,
    },
    /// From Arrow.
    #[error(transparent)]
    Arrow(#[from] ArrowError),
}

fn utf8(name: &str) -> Field {
    Field::new(name, DataType::LargeUtf8, false)
}

fn utf8_null(name: &str) -> Field {
    Field::new(name, DataType::LargeUtf8, true)
}

fn texts<'a>(values: impl Iterator<Item = &'a str>) -> ArrayRef {
    let mut builder = LargeStringBuilder::new();
    values.for_each(|value| builder.append_value(value));
    Arc::new(builder.finish())
}

fn texts_null<'a>(values: impl Iterator<Item = Option<&'a str>>) -> ArrayRef {
    let mut builder = LargeStringBuilder::new();
    values.for_each(|value| builder.append_option(value));
    Arc::new(builder.finish())
}

fn text_at(array: &LargeStringArray, row: usize) -> String {
    array.value(row).to_owned()
}

fn text_null_at(array: &LargeStringArray, row: usize) -> Option<String> {
    (!array.is_null(row)).then(|| text_at(array, row))
}

fn named<T>(
    array: &LargeStringArray,
    row: usize,
    name: &'static str,
    from: impl Fn(&str) -> Option<T>,
) -> Result<T, RowError> {
    let found = array.value(row);
    from(found).ok_or_else(|| RowError::Value { row, name, found: format!("{found:?}") })
}

impl Conversation {
    /// Columns of the table.
    pub fn schema() -> SchemaRef {
        Arc::new(Schema::new(vec![
            utf8("id"),
            utf8("source"),
            Field::new("source_row", DataType::UInt64, false),
            utf8("split"),
            utf8("kind"),
            utf8("messages"),
            utf8_null("tools"),
            utf8_null("variables"),
            utf8_null("text"),
            Field::new("weight", DataType::Float32, false),
            utf8_null("chosen"),
            utf8_null("rejected"),
            utf8_null("meta"),
        ]))
    }

    /// Rows as one batch.
    ///
    /// # Errors
    /// None that rows of this type can cause; Arrow's own are passed on.
    pub fn to_batch(rows: &[Self]) -> Result<RecordBatch, RowError> {
        let columns: Vec<ArrayRef> = vec![
            texts(rows.iter().map(|r| r.id.as_str())),
            texts(rows.iter().map(|r| r.source.as_str())),
            Arc::new(UInt64Array::from_iter_values(rows.iter().map(|r| r.source_row))),
            texts(rows.iter().map(|r| r.split.as_str())),
            texts(rows.iter().map(|r| r.kind.as_str())),
            texts(rows.iter().map(|r| r.messages.as_str())),
            texts_null(rows.iter().map(|r| r.tools.as_deref())),
            texts_null(rows.iter().map(|r| r.variables.as_deref())),
            texts_null(rows.iter().map(|r| r.text.as_deref())),
            Arc::new(Float32Array::from_iter_values(rows.iter().map(|r| r.weight))),
            texts_null(rows.iter().map(|r| r.chosen.as_deref())),
            texts_null(rows.iter().map(|r| r.rejected.as_deref())),
            texts_null(rows.iter().map(|r| r.meta.as_deref())),
        ];
        Ok(RecordBatch::try_new(Self::schema(), columns)?)
    }

    /// Rows of a batch.
    ///
    /// # Errors
    /// A missing or mistyped column, an unknown split or kind, a negative weight.
    pub fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>, RowError> {
        let text = |name| column::<LargeStringArray>(batch, name);
        let (id, source, split, kind) =
            (text("id")?, text("source")?, text("split")?, text("kind")?);
        let source_row = column::<UInt64Array>(batch, "source_row")?;
        let weight = column::<Float32Array>(batch, "weight")?;
        let (messages, tools, plain) = (text("messages")?, text("tools")?, text("text")?);
        let (chosen, rejected, meta) = (text("chosen")?, text("rejected")?, text("meta")?);
        let variables = text("variables")?;
        (0..batch.num_rows())
            .map(|row| {
                Ok(Conversation {
                    id: text_at(id, row),
                    source: text_at(source, row),
                    source_row: source_row.value(row),
                    split: named(split, row, "split", Split::from_name)?,
                    kind: named(kind, row, "kind", Kind::from_name)?,
                    messages: text_at(messages, row),
                    tools: text_null_at(tools, row),
                    variables: text_null_at(variables, row),
                    text: text_null_at(plain, row),
                    weight: weight_at(weight, row, "weight")?,
                    chosen: text_null_at(chosen, row),
                    rejected: text_null_at(rejected, row),
                    meta: text_null_at(meta, row),
                })
            })
            .collect()
    }
}

fn weight_at(array: &Float32Array, row: usize, name: &'static str) -> Result<f32, RowError> {
    let weight = array.value(row);
    if weight.is_finite() && weight >= 0.0 {
        Ok(weight)
    } else {
        Err(RowError::Value { row, name, found: weight.to_string() })
    }
}

fn span_fields() -> Fields {
    Fields::from(vec![
        Field::new("start", DataType::UInt32, false),
        Field::new("end", DataType::UInt32, false),
        Field::new("message", DataType::Int32, false),
        Field::new("role", DataType::Utf8, false),
        Field::new("part", DataType::Utf8, false),
        Field::new("weight", DataType::Float32, false),
        Field::new("chosen", DataType::Boolean, false),
    ])
}

impl Rendered {
    /// Columns of the table.
    pub fn schema() -> SchemaRef {
        let span = Field::new("item", DataType::Struct(span_fields()), false);
        Arc::new(Schema::new(vec![
            utf8("id"),
            utf8("source"),
            utf8("split"),
            utf8("kind"),
            utf8("text"),
            Field::new("spans", DataType::List(Arc::new(span)), false),
            utf8("share"),
            Field::new("prompt_len", DataType::UInt32, true),
            utf8_null("meta"),
        ]))
    }

    /// Rows as one batch.
    ///
    /// # Errors
    /// Spans that do not cover their text.
    pub fn to_batch(rows: &[Self]) -> Result<RecordBatch, RowError> {
        for (row, rendered) in rows.iter().enumerate() {
            rendered.check(row)?;
        }
        let columns: Vec<ArrayRef> = vec![
            texts(rows.iter().map(|r| r.id.as_str())),
            texts(rows.iter().map(|r| r.source.as_str())),
            texts(rows.iter().map(|r| r.split.as_str())),
            texts(rows.iter().map(|r| r.kind.as_str())),
            texts(rows.iter().map(|r| r.text.as_str())),
            Arc::new(spans_column(rows)?),
            texts(rows.iter().map(|r| r.share.as_str())),
            Arc::new(UInt32Array::from_iter(rows.iter().map(|r| r.prompt_len))),
            texts_null(rows.iter().map(|r| r.meta.as_deref())),
        ];
        Ok(RecordBatch::try_new(Self::schema(), columns)?)
    }

    /// Rows of a batch.
    ///
    /// # Errors
    /// A missing or mistyped column, an unknown name, spans that do not cover their text.
    pub fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>, RowError> {
        let text = |name| column::<LargeStringArray>(batch, name);
        let (id, source, split, kind) =
            (text("id")?, text("source")?, text("split")?, text("kind")?);
        let (whole, share, meta) = (text("text")?, text("share")?, text("meta")?);
        let spans = column::<ListArray>(batch, "spans")?;
        let prompt_len = column::<UInt32Array>(batch, "prompt_len")?;
        (0..batch.num_rows())
            .map(|row| {
                let rendered = Rendered {
                    id: text_at(id, row),
                    source: text_at(source, row),
                    split: named(split, row, "split", Split::from_name)?,
                    kind: named(kind, row, "kind", Kind::from_name)?,
                    text: text_at(whole, row),
                    spans: spans_at(spans, row)?,
                    share: named(share, row, "share", Share::from_name)?,
                    prompt_len: (!prompt_len.is_null(row)).then(|| prompt_len.value(row)),
                    meta: text_null_at(meta, row),
                };
                rendered.check(row)?;
                Ok(rendered)
            })
            .collect()
    }

    /// Whether the spans cover the text exactly, at character boundaries; `row` is for the message.
    ///
    /// # Errors
    /// The first span that does not fit.
    pub fn check(&self, row: usize) -> Result<(), RowError> {
        let wrong = |found: String| Err(RowError::Spans { row, found });
        let mut at = 0;
        for span in &self.spans {
            if span.start != at || span.end <= span.start {
                return wrong(format!("{}..{} does not follow {at}", span.start, span.end));
            }
            if !self.text.is_char_boundary(span.end as usize) {
                return wrong(format!("{} is not between two characters", span.end));
            }
            at = span.end;
        }
        if at as usize != self.text.len() {
            return wrong(format!("they end at {at}, the text at {}", self.text.len()));
        }
        if self.prompt_len.is_some_and(|len| !self.text.is_char_boundary(len as usize)) {
            return wrong("the prompt does not end between two characters".to_owned());
        }
        Ok(())
    }
}

fn spans_column(rows: &[Rendered]) -> Result<ListArray, RowError> {
    let n: usize = rows.iter().map(|r| r.spans.len()).sum();
    let (mut start, mut end) = (UInt32Builder::with_capacity(n), UInt32Builder::with_capacity(n));
    let (mut message, mut weight) = (Int32Builder::with_capacity(n), Float32Builder::new());
    let (mut role, mut part) = (StringBuilder::new(), StringBuilder::new());
    let mut chosen = BooleanBuilder::with_capacity(n);
    for span in rows.iter().flat_map(|r| &r.spans) {
        start.append_value(span.start);
        end.append_value(span.end);
        message.append_value(span.message.map_or(-1, |m| m as i32));
        role.append_value(&span.role);
        part.append_value(span.part.as_str());
        weight.append_value(span.weight);
        chosen.append_value(span.chosen);
    }
    let columns: Vec<ArrayRef> = vec![
        Arc::new(start.finish()),
        Arc::new(end.finish()),
        Arc::new(message.finish()),
        Arc::new(role.finish()),
        Arc::new(part.finish()),
        Arc::new(weight.finish()),
        Arc::new(chosen.finish()),
    ];
    let values = StructArray::try_new(span_fields(), columns, None)?;
    let offsets = OffsetBuffer::from_lengths(rows.iter().map(|r| r.spans.len()));
    let field = Arc::new(Field::new("item", DataType::Struct(span_fields()), false));
    Ok(ListArray::try_new(field, offsets, Arc::new(values), None)?)
}

fn spans_at(list: &ListArray, row: usize) -> Result<Vec<Span>, RowError> {
    let values: StructArray = item(list, row, "spans")?;
    let batch = RecordBatch::from(values);
    let start = column::<UInt32Array>(&batch, "start")?;
    let end = column::<UInt32Array>(&batch, "end")?;
    let message = column::<Int32Array>(&batch, "message")?;
    let role = column::<StringArray>(&batch, "role")?;
    let part = column::<StringArray>(&batch, "part")?;
    let weight = column::<Float32Array>(&batch, "weight")?;
    let chosen = column::<BooleanArray>(&batch, "chosen")?;
    (0..batch.num_rows())
        .map(|idx| {
            let name = part.value(idx);
            let unknown = || RowError::Value { row, name: "part", found: format!("{name:?}") };
            Ok(Span {
                start: start.value(idx),
                end: end.value(idx),
                message: u32::try_from(message.value(idx)).ok(),
                role: role.value(idx).to_owned(),
                part: Part::from_name(name).ok_or_else(unknown)?,
                weight: weight_at(weight, idx, "weight")?,
                chosen: chosen.value(idx),
            })
        })
        .collect()
}

impl Prompt {
    /// Columns of the table.
    pub fn schema() -> SchemaRef {
        let ids = || DataType::List(Arc::new(Field::new("item", DataType::UInt32, false)));
        Arc::new(Schema::new(vec![
            utf8("id"),
            utf8("source"),
            utf8("split"),
            Field::new("prompt_ids", ids(), false),
            Field::new("bare_ids", ids(), false),
            utf8("prompt"),
            utf8("question"),
            utf8("reference"),
            utf8_null("meta"),
        ]))
    }

    /// Rows as one batch.
    ///
    /// # Errors
    /// None that rows of this type can cause; Arrow's own are passed on.
    pub fn to_batch(rows: &[Self]) -> Result<RecordBatch, RowError> {
        let columns: Vec<ArrayRef> = vec![
            texts(rows.iter().map(|r| r.id.as_str())),
            texts(rows.iter().map(|r| r.source.as_str())),
            texts(rows.iter().map(|r| r.split.as_str())),
            Arc::new(ids_column(rows.iter().map(|r| r.prompt_ids.as_slice()))?),
            Arc::new(ids_column(rows.iter().map(|r| r.bare_ids.as_slice()))?),
            texts(rows.iter().map(|r| r.prompt.as_str())),
            texts(rows.iter().map(|r| r.question.as_str())),
            texts(rows.iter().map(|r| r.reference.as_str())),
            texts_null(rows.iter().map(|r| r.meta.as_deref())),
        ];
        Ok(RecordBatch::try_new(Self::schema(), columns)?)
    }

    /// Rows of a batch.
    ///
    /// # Errors
    /// A missing or mistyped column, an unknown split.
    pub fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>, RowError> {
        let text = |name| column::<LargeStringArray>(batch, name);
        let (id, source, split) = (text("id")?, text("source")?, text("split")?);
        let (prompt, question) = (text("prompt")?, text("question")?);
        let (reference, meta) = (text("reference")?, text("meta")?);
        let prompt_ids = column::<ListArray>(batch, "prompt_ids")?;
        let bare_ids = column::<ListArray>(batch, "bare_ids")?;
        let ids = |list, row, name| {
            item::<UInt32Array>(list, row, name).map(|values| values.values().to_vec())
        };
        (0..batch.num_rows())
            .map(|row| {
                Ok(Prompt {
                    id: text_at(id, row),
                    source: text_at(source, row),
                    split: named(split, row, "split", Split::from_name)?,
                    prompt_ids: ids(prompt_ids, row, "prompt_ids")?,
                    bare_ids: ids(bare_ids, row, "bare_ids")?,
                    prompt: text_at(prompt, row),
                    question: text_at(question, row),
                    reference: text_at(reference, row),
                    meta: text_null_at(meta, row),
                })
            })
            .collect()
    }
}

/// A list column of ids.
pub(crate) fn ids_column<'a>(
    rows: impl Iterator<Item = &'a [u32]> + Clone,
) -> Result<ListArray, RowError> {
    let offsets = OffsetBuffer::from_lengths(rows.clone().map(<[u32]>::len));
    let values: Vec<u32> = rows.flatten().copied().collect();
    let field = Arc::new(Field::new("item", DataType::UInt32, false));
    Ok(ListArray::try_new(field, offsets, Arc::new(UInt32Array::from(values)), None)?)
}

impl Reject {
    /// Longest piece of a raw row that is kept, in bytes.
    pub const RAW_BYTES_MAX: usize = 4096;

    /// Columns of the table.
    pub fn schema() -> SchemaRef {
        Arc::new(Schema::new(vec![
            utf8("source"),
            utf8("file"),
            Field::new("line", DataType::UInt64, false),
            utf8("reason"),
            utf8("detail"),
            utf8("raw"),
        ]))
    }

    /// Rows as one batch.
    ///
    /// # Errors
    /// None that rows of this type can cause; Arrow's own are passed on.
    pub fn to_batch(rows: &[Self]) -> Result<RecordBatch, RowError> {
        let mut line = UInt64Builder::with_capacity(rows.len());
        rows.iter().for_each(|r| line.append_value(r.line));
        let columns: Vec<ArrayRef> = vec![
            texts(rows.iter().map(|r| r.source.as_str())),
            texts(rows.iter().map(|r| r.file.as_str())),
            Arc::new(line.finish()),
            texts(rows.iter().map(|r| r.reason.as_str())),
            texts(rows.iter().map(|r| r.detail.as_str())),
            texts(rows.iter().map(|r| cut(&r.raw))),
        ];
        Ok(RecordBatch::try_new(Self::schema(), columns)?)
    }

    /// Rows of a batch.
    ///
    /// # Errors
    /// A missing or mistyped column.
    pub fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>, RowError> {
        let text = |name| column::<LargeStringArray>(batch, name);
        let (source, file, reason) = (text("source")?, text("file")?, text("reason")?);
        let (detail, raw) = (text("detail")?, text("raw")?);
        let line = column::<UInt64Array>(batch, "line")?;
        Ok((0..batch.num_rows())
            .map(|row| Reject {
                source: text_at(source, row),
                file: text_at(file, row),
                line: line.value(row),
                reason: text_at(reason, row),
                detail: text_at(detail, row),
                raw: text_at(raw, row),
            })
            .collect())
    }
}

/// `raw` up to the limit, at a character boundary.
fn cut(raw: &str) -> &str {
    let mut end = raw.len().min(Reject::RAW_BYTES_MAX);
    while !raw.is_char_boundary(end) {
        end -= 1;
    }
    &raw[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(start: u32, end: u32, message: Option<u32>, part: Part) -> Span {
        let weight = if part == Part::Scaffold { 0.0 } else { 0.5 };
        Span {
            start,
            end,
            message,
            role: "assistant".into(),
            part,
            weight,
            chosen: part == Part::Stop,
        }
    }

    fn rendered(text: &str, spans: Vec<Span>) -> Rendered {
        Rendered {
            id: "r".into(),
            source: "s".into(),
            split: Split::Train,
            kind: Kind::Sft,
            text: text.into(),
            spans,
            share: Share::Main,
            prompt_len: Some(1),
            meta: None,
        }
    }

    #[test]
    fn conversations_read_back_without_invented_nulls() {
        let row = Conversation {
            id: "a".into(),
            source: "s".into(),
            source_row: 3,
            split: Split::Eval,
            kind: Kind::Preference,
            messages: r#"[{"role":"user","content":"é"}]"#.into(),
            tools: Some("[]".into()),
            variables: Some("{}".into()),
            text: None,
            weight: 0.25,
            chosen: Some("[]".into()),
            rejected: None,
            meta: Some(r#"{"k":1}"#.into()),
        };
        let plain = Conversation { text: Some("t".into()), kind: Kind::Text, ..row.clone() };
        let rows = vec![row, plain];
        let batch = Conversation::to_batch(&rows).unwrap();
        assert_eq!(Conversation::from_batch(&batch).unwrap(), rows);
    }

    #[test]
    fn rendered_rows_read_back() {
        let rows = vec![
            rendered("ab", vec![span(0, 1, None, Part::Scaffold), span(1, 2, Some(0), Part::Stop)]),
            rendered("é", vec![span(0, 2, Some(7), Part::Content)]),
        ];
        let rows: Vec<_> = rows
            .into_iter()
            .map(|r| Rendered { prompt_len: None, share: Share::Rest, ..r })
            .collect();
        let batch = Rendered::to_batch(&rows).unwrap();
        assert_eq!(Rendered::from_batch(&batch).unwrap(), rows);
    }

    #[test]
    fn spans_that_do_not_cover_are_refused() {
        let check = |row: Rendered, message: &str| {
            let error = Rendered::to_batch(&[row]).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        };
        check(
            rendered("ab", vec![span(0, 1, None, Part::Content)]),
            "they end at 1, the text at 2",
        );
        check(rendered("ab", vec![span(1, 2, None, Part::Content)]), "1..2 does not follow 0");
        check(rendered("é", vec![span(0, 1, None, Part::Content)]), "not between two characters");
        check(rendered("", vec![span(0, 0, None, Part::Content)]), "0..0 does not follow 0");
    }

    #[test]
    fn prompts_and_rejects_read_back() {
        let prompts = vec![Prompt {
            id: "p".into(),
            source: "s".into(),
            split: Split::Test,
            prompt_ids: vec![1, 2, 3],
            bare_ids: vec![],
            prompt: "q".into(),
            question: "q".into(),
            reference: "a".into(),
            meta: None,
        }];
        let batch = Prompt::to_batch(&prompts).unwrap();
        assert_eq!(Prompt::from_batch(&batch).unwrap(), prompts);
        let reject = Reject {
            source: "s".into(),
            file: "f".into(),
            line: 2,
            reason: "not json".into(),
            detail: "d".into(),
            raw: "é".repeat(3000),
        };
        let batch = Reject::to_batch(std::slice::from_ref(&reject)).unwrap();
        let back = Reject::from_batch(&batch).unwrap();
        assert_eq!(back, vec![Reject { raw: "é".repeat(2048), ..reject }]);
    }

    #[test]
    fn a_foreign_batch_is_refused_by_column() {
        let batch = Prompt::to_batch(&[]).unwrap();
        let error = Conversation::from_batch(&batch).unwrap_err().to_string();
        assert_eq!(error, "column `kind` is missing");
    }
}
