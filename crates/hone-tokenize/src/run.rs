//! The stage: rendered rows in, packs out.
//!
//! Rows stream: a batch is tokenized, counted and put aside on disk, and of each row no more than its length and its place stays in
//! memory. When all have been seen, packs are found by the lengths and filled from the disk, a batch at a time.

use hone_cli::{Common, Context, Exit, Failure, Outcome, Pipeline, StagePlan, run_stage};
use hone_schema::{ArtefactKind, Prompt, Reject, Rendered, Split};
use hone_store::Draft;
use hone_tokens::{PromptIds, Reason, Refusal, Row, TooLong};
use serde_json::json;

use crate::conserve::Multiset;
pub(crate) use crate::inputs::Inputs;
use crate::make::{Made, make};
use crate::packs;
use crate::record::{self, AsideWriter};
use crate::table::Table;
use crate::tally::Tally;

/// Runs the stage.
pub(crate) fn tokenize(ctx: &Context, common: &Common) -> Result<Exit, Failure> {
    let pipeline = Pipeline::load(common)?;
    let inputs = Inputs::open(&pipeline)?;
    inputs.notes.iter().for_each(|note| ctx.note(format!("tokenize: {note}")));
    let plan = StagePlan {
        stage: "tokenize",
        kind: ArtefactKind::Packs,
        dir: pipeline.dir("tokenize"),
        config: serde_json::to_value(&inputs.config).expect("the configuration is plain data"),
        inputs: inputs.refs.clone(),
    };
    run_stage(ctx, common, plan, |draft, _| work(ctx, &inputs, draft))
}

fn work(ctx: &Context, inputs: &Inputs, draft: &mut Draft) -> Result<Outcome, Failure> {
    let mut sinks = Sinks::new(inputs, draft)?;
    read(ctx, inputs, &mut sinks)?;
    let Sinks { mut tally, rows, prompts, rejects, .. } = sinks;
    if tally.rows() == 0 {
        return Err(nothing_left(&tally));
    }
    prompts.finish()?;
    rejects.finish()?;
    for (split, rows) in Split::ALL.iter().zip(rows) {
        if let Some((aside, tokens)) = rows {
            let rows = (*split, &aside.finish()?, tokens);
            packs::write(ctx, draft, &inputs.config, rows, &mut tally)?;
        }
    }
    draft.write("tokenizer.json", &inputs.tokenizer_json, None)?;
    let stops = json!({"stop_ids": tally.stop_ids()});
    let stops = format!("{stops}\n");
    draft.write("stops.json", stops.as_bytes(), None)?;
    tally.warn(ctx, inputs.config.max_len);
    let failed = tally.gate(inputs.config.max_violation_share);
    failed.iter().for_each(|what| ctx.warn(what));
    Ok(Outcome {
        report: tally.report(inputs.vocab.size(), inputs.config.max_len, failed.as_deref()),
        summary: tally.summary(inputs.config.max_len),
        ledger: tally.ledger,
        exit: if failed.is_some() { Exit::GateFailed } else { Exit::Done },
    })
}

/// A row's records, and its tokens as a multiset.
struct Ready {
    made: Made,
    records: Vec<(u32, Vec<u8>, Multiset)>,
}

/// Tokenizes every row, a batch at a time, while the next batch is read; the order is that of the input.
fn read(ctx: &Context, inputs: &Inputs, sinks: &mut Sinks) -> Result<(), Failure> {
    let mut progress = ctx.progress(inputs.n_rows(), "rows");
    let mut batches = inputs.batches()?;
    let mut next = batches.next();
    let mut first = 0;
    while let Some(rows) = next {
        if let Some(exit) = ctx.stop() {
            return Err(Failure::stopped(exit));
        }
        let rows = rows?;
        let ready = |idx: usize, made: Made| Ready::new(first + idx as u64, made);
        let (made, after) =
            rayon::join(|| make(&inputs.vocab, &inputs.rules, &rows, ready), || batches.next());
        for (rendered, ready) in rows.iter().zip(made) {
            first += 1;
            sinks.take(rendered, first, ready)?;
        }
        progress.inc(rows.len() as u64);
        next = after;
    }
    progress.finish();
    Ok(())
}

impl Ready {
    /// The row at `index` among the rendered ones.
    fn new(index: u64, made: Made) -> Self {
        let Ok((taken, _)) = &made else {
            return Ready { made, records: Vec::new() };
        };
        let record = |row: &Row| {
            let doc = row.doc(index);
            let tokens = Multiset::of(&doc, &row.ids, &row.weights);
            (doc.len, record::to_bytes(&doc, &row.ids, &row.weights), tokens)
        };
        let records = taken.rows.iter().map(record).collect();
        Ready { made, records }
    }
}

/// Where rows go while they are read.
struct Sinks<'a> {
    inputs: &'a Inputs,
    draft: &'a Draft,
    tally: Tally,
    /// By split: the rows put aside, and their tokens.
    rows: [Option<(AsideWriter, Multiset)>; 3],
    prompts: Table<Prompt>,
    rejects: Table<Reject>,
}

impl<'a> Sinks<'a> {
    fn new(inputs: &'a Inputs, draft: &'a Draft) -> Result<Self, Failure> {
        Ok(Sinks {
            inputs,
            draft,
            tally: Tally::new(&inputs.eos),
            rows: [None, None, None],
            prompts: Table::new(draft, "prompts.parquet", Prompt::to_batch)?,
            rejects: Table::new(draft, "rejects.parquet", Reject::to_batch)?,
        })
    }

    /// Takes what became of a row; `line` is its number, from 1.
    fn take(&mut self, rendered: &Rendered, line: u64, ready: Ready) -> Result<(), Failure> {
        match ready.made {
            Ok((taken, prompt)) => {
                self.tally.pass(&taken, prompt.as_ref());
                for refusal in &taken.refused {
                    self.reject(rendered, line, refusal, String::new())?;
                }
                self.aside(rendered.split, ready.records)?;
                self.prompt(prompt)
            }
            Err(refusal) => {
                stop_if_asked(self.inputs, rendered, &refusal)?;
                self.tally.refuse(&rendered.source, &refusal);
                self.reject(rendered, line, &refusal, rendered.text.clone())
            }
        }
    }

    fn aside(
        &mut self,
        split: Split,
        records: Vec<(u32, Vec<u8>, Multiset)>,
    ) -> Result<(), Failure> {
        let at = Split::ALL.iter().position(|s| *s == split).expect("ALL has every split");
        if self.rows[at].is_none() {
            let name = format!("{split}.rows");
            self.rows[at] = Some((AsideWriter::new(self.draft, &name)?, Multiset::default()));
        }
        let (aside, tokens) = self.rows[at].as_mut().expect("made just above");
        for (len, record, more) in records {
            aside.push(len, &record)?;
            *tokens = tokens.and(more);
        }
        Ok(())
    }

    fn prompt(&mut self, prompt: Option<PromptIds>) -> Result<(), Failure> {
        let Some(PromptIds { prompt, .. }) = prompt else {
            return Ok(());
        };
        let bytes = prompt.prompt.len() + prompt.reference.len() + 8 * prompt.prompt_ids.len();
        self.prompts.push(prompt, bytes)
    }

    fn reject(
        &mut self,
        row: &Rendered,
        line: u64,
        refusal: &Refusal,
        raw: String,
    ) -> Result<(), Failure> {
        let bytes = raw.len();
        let reject = Reject {
            source: row.source.clone(),
            file: row.id.clone(),
            line,
            reason: refusal.reason.to_string(),
            detail: refusal.detail.clone(),
            raw,
        };
        self.rejects.push(reject, bytes)
    }
}

fn stop_if_asked(inputs: &Inputs, row: &Rendered, refusal: &Refusal) -> Result<(), Failure> {
    if inputs.config.too_long == TooLong::Error && refusal.reason == Reason::TooLong {
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
