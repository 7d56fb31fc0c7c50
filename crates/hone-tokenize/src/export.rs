//! `export`: packs as a Parquet table of `input_ids` and `labels`, which the ecosystem's trainers read without tokenizing anew.
//!
//! A label is its token's id where that is trained and -100 elsewhere, so also on the first token of every document, which
//! nothing predicts. Documents are told apart by `position_ids`, which begin anew at 0, and by `seq_lengths`.

use std::path::PathBuf;
use std::sync::Arc;

use arrow::array::{ArrayRef, Float32Array, Int32Array, ListArray, RecordBatch, StringArray};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use clap::ValueEnum;
use hone_cli::{Common, Context, Exit, Failure, Pipeline};
use hone_schema::{Pack, Split};
use hone_store::output;
use serde_json::json;

use crate::args::split;
use crate::documents::{Document, Packs, documents};
use hone_cli::text::one_line;

/// The label of a token that is not trained.
pub(crate) const IGNORED: i32 = -100;

/// Tokens written at a time.
const TOKENS_A_BATCH: usize = 1 << 20;

/// Where to, and in which form.
#[derive(clap::Args)]
pub(crate) struct ExportArgs {
    /// File to write.
    #[arg(long, value_name = "FILE.parquet")]
    to: PathBuf,
    /// Split to export.
    #[arg(long, value_name = "SPLIT", value_parser = split, default_value = "train")]
    split: Split,
    /// A row a document, instead of a row a pack.
    #[arg(long)]
    rows: bool,
    /// What becomes of weights other than 0 and 1, which labels cannot say; without this they are refused.
    #[arg(long, value_enum)]
    weights: Option<Weights>,
    /// Add `attention_mask`: the number of each token's document in its row, from 1. Trainers that pack by `seq_lengths` or
    /// `position_ids` do without.
    #[arg(long)]
    attention_mask: bool,
    /// Add `ids` and `sources`: the names of each row's documents, and where they come from.
    #[arg(long)]
    ids: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Weights {
    /// Whatever is above 0 is trained alike.
    Drop,
    /// They stand in a column of their own, `loss_weights`.
    Column,
}

/// What was written.
#[derive(Default)]
struct Written {
    rows: u64,
    tokens: u64,
    trained: u64,
    /// Tokens whose weight is neither 0 nor 1.
    weighted: u64,
}

/// Exports a split.
pub(crate) fn export(ctx: &Context, common: &Common, args: &ExportArgs) -> Result<Exit, Failure> {
    let pipeline = Pipeline::load(common)?;
    let packs = Packs::of(&pipeline, common)?;
    if !packs.has(args.split) {
        let at = packs.sealed.dir().display();
        return Err(Failure::input(format!("{at} has no row of split {}", args.split)));
    }
    let written = write(ctx, &packs, args)?;
    let Written { rows, tokens, trained, weighted } = written;
    if weighted > 0 && args.weights == Some(Weights::Drop) {
        ctx.warn(format!("{weighted} tokens have a weight other than 0 and 1, which is dropped"));
    }
    ctx.note(format!("{rows} rows, {tokens} tokens, {trained} trained: {}", args.to.display()));
    if !args.rows {
        ctx.note("they are packed: turn packing off in the trainer, and padding-free batches on");
    }
    if common.json {
        let object = json!({
            "file": args.to.display().to_string(),
            "rows": rows,
            "tokens": tokens,
            "trained_tokens": trained,
            "weighted_tokens": weighted,
        });
        ctx.print(object.to_string());
    }
    Ok(Exit::Done)
}

fn write(ctx: &Context, packs: &Packs, args: &ExportArgs) -> Result<Written, Failure> {
    let mut file = output::Table::create(&args.to, schema(args))?;
    let mut written = Written::default();
    let mut batch = Batch::default();
    for pack in packs.read(args.split)? {
        if let Some(exit) = ctx.stop() {
            return Err(Failure::stopped(exit));
        }
        let pack = pack?;
        written.count(&pack, args.weights)?;
        let docs = documents(&pack);
        let rows: Vec<&[Document<'_>]> =
            if args.rows { docs.chunks(1).collect() } else { vec![&docs] };
        for row in rows {
            written.rows += 1;
            batch.add(row)?;
        }
        if batch.ids.values.len() >= TOKENS_A_BATCH {
            file.write(&std::mem::take(&mut batch).finish(args)?)?;
        }
    }
    file.write(&batch.finish(args)?)?;
    file.finish()?;
    Ok(written)
}

impl Written {
    fn count(&mut self, pack: &Pack, weights: Option<Weights>) -> Result<(), Failure> {
        self.tokens += pack.input_ids.len() as u64;
        self.trained += pack.n_trained();
        let weighted = pack.loss_weight.iter().filter(|w| **w != 0.0 && **w != 1.0).count();
        self.weighted += weighted as u64;
        if weighted > 0 && weights.is_none() {
            let names: Vec<String> =
                pack.docs.iter().map(|d| one_line(&d.row_id)).take(3).collect();
            let message = format!(
                "labels cannot say the weights of {weighted} tokens in the pack of {}",
                names.join(", ")
            );
            return Err(Failure::input(message).hint(
                "`--weights drop` trains them as if they weighed 1, `--weights column` writes `loss_weights` beside the labels",
            ));
        }
        Ok(())
    }
}

/// A list column in the making.
#[derive(Default)]
struct Lists<T> {
    values: Vec<T>,
    lens: Vec<usize>,
}

impl<T> Lists<T> {
    fn add(&mut self, values: impl Iterator<Item = T>) {
        let before = self.values.len();
        self.values.extend(values);
        self.lens.push(self.values.len() - before);
    }

    fn finish(self, to_array: impl FnOnce(Vec<T>) -> ArrayRef) -> Result<ArrayRef, Failure> {
        let values = to_array(self.values);
        let field = Arc::new(Field::new("item", values.data_type().clone(), true));
        let list = ListArray::try_new(field, OffsetBuffer::from_lengths(self.lens), values, None);
        Ok(Arc::new(list.map_err(|e| Failure::environment(e.to_string()))?))
    }
}

/// Rows in the making.
#[derive(Default)]
struct Batch {
    ids: Lists<i32>,
    labels: Lists<i32>,
    positions: Lists<i32>,
    lengths: Lists<i32>,
    mask: Lists<i32>,
    weights: Lists<f32>,
    names: Lists<String>,
    sources: Lists<String>,
}

impl Batch {
    fn add(&mut self, docs: &[Document<'_>]) -> Result<(), Failure> {
        let too_large = docs.iter().flat_map(|doc| doc.ids).find(|id| i32::try_from(**id).is_err());
        if let Some(id) = too_large {
            return Err(Failure::input(format!("token id {id} does not fit into 32 bits")));
        }
        let tokens = || docs.iter().flat_map(|doc| doc.ids.iter().zip(doc.weights).enumerate());
        let weight = |n: usize, w: f32| if n == 0 { 0.0 } else { w };
        self.ids.add(tokens().map(|(_, (id, _))| *id as i32));
        self.labels.add(
            tokens().map(|(n, (id, w))| if weight(n, *w) > 0.0 { *id as i32 } else { IGNORED }),
        );
        self.positions.add(tokens().map(|(n, _)| n as i32));
        self.lengths.add(docs.iter().map(|doc| doc.ids.len() as i32));
        let numbers = docs.iter().zip(1..);
        self.mask.add(numbers.flat_map(|(doc, nr)| std::iter::repeat_n(nr, doc.ids.len())));
        self.weights.add(tokens().map(|(n, (_, w))| weight(n, *w)));
        self.names.add(docs.iter().map(|doc| doc.doc.row_id.clone()));
        self.sources.add(docs.iter().map(|doc| doc.doc.source.clone()));
        Ok(())
    }

    fn finish(self, args: &ExportArgs) -> Result<RecordBatch, Failure> {
        let ints = |values: Vec<i32>| Arc::new(Int32Array::from(values)) as ArrayRef;
        let texts = |values: Vec<String>| Arc::new(StringArray::from(values)) as ArrayRef;
        let mut columns = vec![
            self.ids.finish(ints)?,
            self.labels.finish(ints)?,
            self.positions.finish(ints)?,
            self.lengths.finish(ints)?,
        ];
        if args.attention_mask {
            columns.push(self.mask.finish(ints)?);
        }
        if args.weights == Some(Weights::Column) {
            columns.push(self.weights.finish(|w| Arc::new(Float32Array::from(w)))?);
        }
        if args.ids {
            columns.push(self.names.finish(texts)?);
            columns.push(self.sources.finish(texts)?);
        }
        let batch = RecordBatch::try_new(schema(args), columns);
        batch.map_err(|e| Failure::environment(e.to_string()))
    }
}

fn schema(args: &ExportArgs) -> SchemaRef {
    let list = |name: &str, of: DataType| {
        Field::new(name, DataType::List(Arc::new(Field::new("item", of, true))), false)
    };
    let mut fields: Vec<Field> = ["input_ids", "labels", "position_ids", "seq_lengths"]
        .into_iter()
        .map(|name| list(name, DataType::Int32))
        .collect();
    if args.attention_mask {
        fields.push(list("attention_mask", DataType::Int32));
    }
    if args.weights == Some(Weights::Column) {
        fields.push(list("loss_weights", DataType::Float32));
    }
    if args.ids {
        fields.push(list("ids", DataType::Utf8));
        fields.push(list("sources", DataType::Utf8));
    }
    Arc::new(Schema::new(fields))
}
