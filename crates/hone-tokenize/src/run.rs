//! The stage: rendered rows in, packs out.
//!
//! Rows stream: a batch is tokenized, counted and put aside on disk, and of each row no more than its length and its place stays in
//! memory. When all have been seen, packs are found by the lengths and filled from the disk, a batch at a time.

use arrow::array::RecordBatch;
use hone_cli::worker::{Answer, Sandbox, join};
use hone_cli::{Common, Context, Exit, Failure, Outcome, Pipeline, StagePlan, run_stage};
use hone_schema::{ArtefactKind, Prompt, Reject, Split};
use hone_store::{Draft, ParquetFile};
use hone_tokens::{Counts, Reason, Refusal};
use serde_json::json;

use crate::conserve::Multiset;
use crate::inputs::Files;
use crate::packs;
use crate::record::AsideWriter;
use crate::tally::Tally;
use crate::worker::{self, Batch, Greeting};

/// Runs the stage.
pub(crate) fn tokenize(ctx: &Context, common: &Common) -> Result<Exit, Failure> {
    let pipeline = Pipeline::load(common)?;
    let files = Files::open(&pipeline)?;
    files.notes.iter().for_each(|note| ctx.note(format!("tokenize: {note}")));
    let plan = StagePlan {
        stage: "tokenize",
        kind: ArtefactKind::Packs,
        dir: pipeline.dir("tokenize"),
        config: serde_json::to_value(&files.job.config).expect("the configuration is plain data"),
        inputs: files.refs.clone(),
    };
    run_stage(ctx, common, plan, |draft, _| work(ctx, common, &files, draft))
}

fn work(
    ctx: &Context,
    common: &Common,
    files: &Files,
    draft: &mut Draft,
) -> Result<Outcome, Failure> {
    let config = &files.job.config;
    let job = serde_json::to_vec(&files.job).expect("a job is plain data");
    let job = join(&[&job, &files.tokenizer_json]);
    let (mut sandbox, greeting) = Sandbox::start("tokenizer", job, worker::LIMITS, common)?;
    let greeting: Greeting = serde_json::from_slice(&greeting)
        .map_err(|e| Failure::environment(format!("a worker's greeting is not JSON: {e}")))?;
    let mut sinks = Sinks::new(files, draft)?;
    read(ctx, files, &mut sandbox, &mut sinks)?;
    // Its memory is better used for packs.
    drop(sandbox);
    let Sinks { mut tally, rows, prompts, rejects, .. } = sinks;
    tally.ledger.mark_replay(&files.rendered.manifest().ledger);
    tally.warn_of_roles(ctx);
    if tally.rows() == 0 {
        return Err(nothing_left(&tally));
    }
    prompts.finish()?;
    rejects.finish()?;
    for (split, rows) in Split::ALL.iter().zip(rows) {
        if let Some((aside, tokens)) = rows {
            let rows = (*split, &aside.finish()?, tokens);
            packs::write(ctx, draft, config, rows, &mut tally)?;
        }
    }
    draft.write("tokenizer.json", &files.tokenizer_json, None)?;
    let stops = json!({"stop_ids": tally.stop_ids()});
    let stops = format!("{stops}\n");
    draft.write("stops.json", stops.as_bytes(), None)?;
    tally.warn(ctx, config.max_len);
    let failed = tally.gate(config.max_violation_share);
    failed.iter().for_each(|what| ctx.warn(what));
    Ok(Outcome {
        report: tally.report(greeting.vocab_size, config.max_len, failed.as_deref()),
        summary: tally.summary(config.max_len),
        ledger: tally.ledger,
        exit: if failed.is_some() { Exit::GateFailed } else { Exit::Done },
    })
}

/// Has every row tokenized, a batch at a time, while the next batch is read; the order is that of the input.
fn read(
    ctx: &Context,
    files: &Files,
    sandbox: &mut Sandbox,
    sinks: &mut Sinks,
) -> Result<(), Failure> {
    let mut progress = ctx.progress(files.n_rows(), "rows");
    let mut first = 0;
    for rows in files.tables()? {
        let rows = rows?;
        let indexed = worker::indexed(&rows, first)?;
        first += rows.num_rows() as u64;
        sandbox.feed(ctx, indexed, |answer| sinks.take(answer))?;
        progress.inc(rows.num_rows() as u64);
    }
    sandbox.finish(ctx, |answer| sinks.take(answer))?;
    progress.finish();
    Ok(())
}

/// Where rows go while they are read.
struct Sinks<'a> {
    draft: &'a Draft,
    tally: Tally,
    /// By split: the rows put aside, and their tokens.
    rows: [Option<(AsideWriter, Multiset)>; 3],
    prompts: ParquetFile,
    rejects: ParquetFile,
}

impl<'a> Sinks<'a> {
    fn new(files: &Files, draft: &'a Draft) -> Result<Self, Failure> {
        Ok(Sinks {
            draft,
            tally: Tally::new(&files.eos),
            rows: [None, None, None],
            prompts: draft.parquet("prompts.parquet", Prompt::schema())?,
            rejects: draft.parquet("rejects.parquet", Reject::schema())?,
        })
    }

    /// Takes what became of a batch.
    fn take(&mut self, answer: Answer) -> Result<(), Failure> {
        match answer {
            Answer::Done(chunks) => chunks.iter().try_for_each(|bytes| self.chunk(bytes)),
            Answer::Died { rows, why } => self.took_down(&rows, &why),
        }
    }

    fn chunk(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let batch = Batch::read(bytes)?;
        for row in batch.records() {
            let row = row?;
            self.aside(row.split)?.0.push(row.len, row.record)?;
        }
        for (split, more) in Split::ALL.iter().zip(batch.tokens) {
            if more != Multiset::default() {
                let tokens = &mut self.aside(*split)?.1;
                *tokens = tokens.and(more);
            }
        }
        self.tally.add(batch.tally);
        self.prompts.write(&batch.prompts)?;
        Ok(self.rejects.write(&batch.rejects)?)
    }

    /// A row that no worker survives.
    fn took_down(&mut self, rows: &RecordBatch, why: &str) -> Result<(), Failure> {
        let (rows, index) = worker::rows_of(rows)?;
        for (row, index) in rows.iter().zip(index) {
            let detail = format!("encoding it took the worker down: {why}");
            let reason = Reason::NotEncodable;
            let refusal = Refusal { reason, detail, counts: Counts::default() };
            self.tally.refuse(&row.source, &refusal);
            let reject = worker::reject(row, index, &refusal, row.text.clone());
            self.rejects.write(&Reject::to_batch(&[reject])?)?;
        }
        Ok(())
    }

    fn aside(&mut self, split: Split) -> Result<&mut (AsideWriter, Multiset), Failure> {
        let at = Split::ALL.iter().position(|s| *s == split).expect("ALL has every split");
        if self.rows[at].is_none() {
            let name = format!("{split}.rows");
            self.rows[at] = Some((AsideWriter::new(self.draft, &name)?, Multiset::default()));
        }
        Ok(self.rows[at].as_mut().expect("made just above"))
    }
}

fn nothing_left(tally: &Tally) -> Failure {
    let mut reasons: Vec<(&str, u64)> = tally.ledger.rejected().into_iter().collect();
    reasons.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
    match reasons.first() {
        None => Failure::input("there is no rendered row")
            .hint("the reports of `hone-ingest` and `hone-template` say where the rows went"),
        Some((reason, n)) => {
            let message = format!(
                "none of {} rows can be trained: {n} of them for `{reason}`",
                tally.ledger.rows_in()
            );
            let hint = match Reason::ALL.into_iter().find(|r| r.as_str() == *reason) {
                Some(reason) if reason.is_about_length() => "raise tokenize.max_len",
                Some(Reason::StopInPieces | Reason::NoStop) => {
                    "choose a template that ends its responses with a token of this tokenizer"
                }
                _ => "`hone-tokenize show` prints a row with the reason why it is not taken",
            };
            Failure::input(message).hint(hint)
        }
    }
}
