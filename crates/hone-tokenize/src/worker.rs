//! The tokenizer at work: in a process of its own, because a `tokenizer.json` is foreign, and can ask for more memory or time than
//! there is.
//!
//! A batch of rendered rows, each with its index in the table, becomes an answer: counts, the rows that are put aside, prompts and
//! rejects. What goes through the pipe is what is written, so that the stage has nothing to do but to write.

use std::sync::Arc;
use std::time::Duration;

use arrow::array::{Array, ArrayRef, RecordBatch, UInt64Array};
use arrow::datatypes::{DataType, Field, Schema};
use hone_cli::worker::{Limits, decode_rows, encode_rows, join, serve, split};
use hone_cli::{Exit, Failure};
use hone_schema::{Prompt, Reject, Rendered, Split};
use hone_tokens::{Reason, Refusal, Row, TooLong};
use serde::{Deserialize, Serialize};

use crate::args::Config;
use crate::conserve::{Multiset, RoleKeys};
use crate::inputs::Encoder;
use crate::make::{Made, make};
use crate::record;
use crate::tally::Tally;

/// What a tokenizer may take: the largest known one needs a quarter of this.
pub(crate) const LIMITS: Limits = Limits {
    memory: 2 << 30,
    memory_per_thread: 128 << 20,
    start: Duration::from_secs(60),
    batch: Duration::from_secs(60),
};

/// The same for commands that look at rows: some of them at all rows of two outputs.
pub(crate) const LOOK_LIMITS: Limits =
    Limits { memory: 4 << 30, batch: Duration::from_secs(3600), ..LIMITS };

/// Column of the index that a row has among the rendered ones.
const INDEX: &str = "index";

/// What a worker has to know beside the bytes of the tokenizer.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Job {
    /// Where the tokenizer lies, for messages.
    pub(crate) path: String,
    pub(crate) config: Config,
    pub(crate) n_embeddings: Option<u32>,
    /// The token that begins a text, by the template.
    pub(crate) bos: Option<String>,
}

/// What a worker greets with.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Greeting {
    pub(crate) vocab_size: usize,
}

/// A row that is put aside.
pub(crate) struct Aside<'a> {
    pub(crate) split: Split,
    /// Its tokens.
    pub(crate) len: u32,
    /// Its bytes: see [`record`].
    pub(crate) record: &'a [u8],
}

/// What became of a batch.
pub(crate) struct Batch<'a> {
    pub(crate) tally: Tally,
    /// The tokens of each split.
    pub(crate) tokens: [Multiset; 3],
    records: &'a [u8],
    pub(crate) prompts: RecordBatch,
    pub(crate) rejects: RecordBatch,
}

/// Rows with their indexes, the first of which is `first`.
///
/// # Errors
/// Arrow's own.
pub(crate) fn indexed(rows: &RecordBatch, first: u64) -> Result<RecordBatch, Failure> {
    let mut fields: Vec<Arc<Field>> = rows.schema().fields().iter().cloned().collect();
    fields.push(Arc::new(Field::new(INDEX, DataType::UInt64, false)));
    let mut columns = rows.columns().to_vec();
    let index: ArrayRef =
        Arc::new(UInt64Array::from_iter_values(first..first + rows.num_rows() as u64));
    columns.push(index);
    RecordBatch::try_new(Arc::new(Schema::new(fields)), columns)
        .map_err(|e| Failure::input(e.to_string()))
}

/// The rows of a batch that [`indexed`] made, and their indexes.
///
/// # Errors
/// Rows that are none.
pub(crate) fn rows_of(batch: &RecordBatch) -> Result<(Vec<Rendered>, Vec<u64>), Failure> {
    let index = batch.column_by_name(INDEX);
    let index = index.and_then(|column| column.as_any().downcast_ref::<UInt64Array>());
    let index = index.ok_or_else(|| Failure::environment("rows came without their indexes"))?;
    Ok((Rendered::from_batch(batch)?, index.values().to_vec()))
}

/// Is a worker.
///
/// # Errors
/// Pipes that break.
pub(crate) fn work() -> Result<Exit, Failure> {
    serve(|bytes| {
        let [job, tokenizer_json] = split(bytes)?;
        let job: Job = serde_json::from_slice(job)
            .map_err(|e| Failure::environment(format!("a worker cannot read its job: {e}")))?;
        let encoder = Encoder::new(&job, tokenizer_json)?;
        let greeting = Greeting { vocab_size: encoder.vocab.size() };
        let greeting = serde_json::to_vec(&greeting).expect("a greeting is plain data");
        Ok((greeting, move |batch| answer(&encoder, &batch)))
    })
}

/// A row's records, and its tokens as a multiset.
struct Ready {
    made: Made,
    records: Vec<(u32, Vec<u8>, Multiset)>,
}

impl Ready {
    /// The row at `index` among the rendered ones.
    fn new(index: u64, made: Made) -> Self {
        let Ok((taken, _)) = &made else {
            return Ready { made, records: Vec::new() };
        };
        let record = |row: &Row| {
            let doc = row.doc(index);
            let tokens = Multiset::of(&doc, &row.ids, &row.weights, &mut RoleKeys::of(&row.roles));
            (doc.len, record::to_bytes(&doc, &row.roles, &row.ids, &row.weights), tokens)
        };
        let records = taken.rows.iter().map(record).collect();
        Ready { made, records }
    }
}

#[derive(Default)]
struct Writer {
    tally: Tally,
    tokens: [Multiset; 3],
    records: Vec<u8>,
    prompts: Vec<Prompt>,
    rejects: Vec<Reject>,
}

fn answer(encoder: &Encoder, batch: &RecordBatch) -> Result<Vec<u8>, Failure> {
    let (rows, index) = rows_of(batch)?;
    let mut out = Writer::default();
    let asked = encoder.rules.policy.train_on.roles();
    for (row, index) in rows.iter().zip(&index) {
        out.tally.see_roles(asked, row);
        let ready = Ready::new(*index, make(&encoder.vocab, &encoder.rules, row));
        match &ready.made {
            Ok(_) => out.take(row, *index, ready),
            Err(refusal) => {
                stop_if_asked(&encoder.rules.too_long, row, refusal)?;
                out.tally.refuse(&row.source, refusal);
                out.rejects.push(reject(row, *index, refusal, row.text.clone()));
            }
        }
    }
    out.into_bytes()
}

impl Writer {
    fn take(&mut self, row: &Rendered, index: u64, ready: Ready) {
        let Ok((taken, prompt)) = ready.made else {
            return;
        };
        self.tally.pass(&taken, prompt.as_ref());
        let refused = taken.refused.iter();
        self.rejects.extend(refused.map(|refusal| reject(row, index, refusal, String::new())));
        let at = Split::ALL.iter().position(|s| *s == row.split).expect("ALL has every split");
        for (len, record, more) in ready.records {
            self.tokens[at] = self.tokens[at].and(more);
            self.records.push(at as u8);
            self.records.extend(len.to_le_bytes());
            self.records.extend((record.len() as u32).to_le_bytes());
            self.records.extend(record);
        }
        self.prompts.extend(prompt.map(|p| p.prompt));
    }

    fn into_bytes(self) -> Result<Vec<u8>, Failure> {
        let head = serde_json::to_vec(&(self.tally, self.tokens)).expect("counts are plain data");
        let prompts = encode_rows(&Prompt::to_batch(&self.prompts)?)?;
        let rejects = encode_rows(&Reject::to_batch(&self.rejects)?)?;
        Ok(join(&[&head, &self.records, &prompts, &rejects]))
    }
}

/// A rejected row; `index` is its place among the rendered ones.
pub(crate) fn reject(row: &Rendered, index: u64, refusal: &Refusal, raw: String) -> Reject {
    Reject {
        source: row.source.clone(),
        file: row.id.clone(),
        line: index + 1,
        reason: refusal.reason.to_string(),
        detail: refusal.detail.clone(),
        raw,
    }
}

fn stop_if_asked(too_long: &TooLong, row: &Rendered, refusal: &Refusal) -> Result<(), Failure> {
    if *too_long == TooLong::Error && refusal.reason == Reason::TooLong {
        let message = format!("row `{}` of `{}`: {}", row.id, row.source, refusal.detail);
        let hint = format!(
            "raise tokenize.max_len, or set tokenize.too_long to \"drop\", \"split\" or \
             {{ truncate = \"keep-response\" }}; `hone-tokenize show --id {}` prints the row",
            row.id
        );
        return Err(Failure::input(message).hint(hint));
    }
    Ok(())
}

impl<'a> Batch<'a> {
    /// What an answer says.
    ///
    /// # Errors
    /// Bytes that are no answer.
    pub(crate) fn read(bytes: &'a [u8]) -> Result<Self, Failure> {
        let [head, records, prompts, rejects] = split(bytes)?;
        let (tally, tokens) = serde_json::from_slice(head)
            .map_err(|e| Failure::environment(format!("a worker's counts are not JSON: {e}")))?;
        let (prompts, rejects) = (decode_rows(prompts)?, decode_rows(rejects)?);
        Ok(Batch { tally, tokens, records, prompts, rejects })
    }

    /// The rows that are put aside.
    pub(crate) fn records(&self) -> impl Iterator<Item = Result<Aside<'a>, Failure>> + use<'a> {
        let mut rest = self.records;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let aside = take_record(&mut rest);
            if aside.is_none() {
                rest = &[];
            }
            Some(aside.ok_or_else(|| Failure::environment("a worker's rows are cut off")))
        })
    }
}

fn take_record<'a>(rest: &mut &'a [u8]) -> Option<Aside<'a>> {
    let (at, behind) = rest.split_first()?;
    let (len, behind) = behind.split_first_chunk::<4>()?;
    let (size, behind) = behind.split_first_chunk::<4>()?;
    let (record, behind) = behind.split_at_checked(u32::from_le_bytes(*size) as usize)?;
    *rest = behind;
    let split = *Split::ALL.get(usize::from(*at))?;
    Some(Aside { split, len: u32::from_le_bytes(*len), record })
}
