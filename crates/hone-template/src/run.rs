//! The stage: conversations in, rendered rows out.

use std::collections::BTreeMap;

use hone_chat::{ChatTemplate, Dialect, TemplateError};
use hone_cli::{Common, Context, Exit, Failure, Outcome, Pipeline, StagePlan, run_stage};
use hone_schema::{ArtefactKind, Conversation, Ledger, Reject, Rendered};
use hone_store::{Draft, ModelDir, Sealed};
use rayon::prelude::*;
use serde_json::{Value, json};

use crate::args::{Args, Command, Config};
use crate::rows;
use crate::source::{self, Source, Tokenizer};

/// Rows rendered side by side, and written at a time.
const CHUNK_ROWS: usize = 2048;

/// What to do when a template asks for today's date.
const DATE_HINT: &str = "this template wants a date: set `template.date`, such as 2026-01-31";

/// Runs what the flags ask for.
///
/// # Errors
/// See the exit codes of hone.
pub(crate) fn main(args: &Args, ctx: &Context) -> Result<Exit, Failure> {
    match &args.command {
        Some(Command::Render(render)) => crate::render::render(render, &args.common, ctx),
        None => stage(&args.common, ctx),
    }
}

fn stage(common: &Common, ctx: &Context) -> Result<Exit, Failure> {
    let pipeline = Pipeline::load(common)?;
    let config: Config = pipeline.stage("template")?;
    let date = config.date().map_err(|failure| pipeline.at("template", failure))?;
    let conversations = Sealed::open(&pipeline.dir("ingest"), ArtefactKind::Conversations)?;
    let model = ModelDir::open(pipeline.need_base()?)?;
    let tokenizer = Tokenizer::read(&model)?;
    let source = source::find(&config.template, &tokenizer)?;
    let dialect = Dialect {
        tokens: tokenizer.tokens,
        added_tokens: tokenizer.added,
        date,
        variables: config.variables.clone(),
    };
    let template = compile(&source, dialect)?;
    let plan = StagePlan {
        stage: "template",
        kind: ArtefactKind::Rendered,
        dir: pipeline.dir("template"),
        config: serde_json::to_value(&config).map_err(|e| Failure::usage(e.to_string()))?,
        inputs: vec![
            conversations.input("conversations"),
            source::model_input(&model)?,
            source::file_input(&source),
        ],
    };
    run_stage(ctx, common, plan, |draft, _| {
        if template.appends_eos() {
            ctx.note(format!(
                "template: {} ends no answer, so the end-of-text token is put behind each last one",
                source.name
            ));
        }
        describe(draft, &source, &template, &config)?;
        work(ctx, &conversations, &template, &config, draft)
    })
}

/// Compiles a template and says what to do when it is not valid.
///
/// # Errors
/// It is not valid.
pub(crate) fn compile(source: &Source, dialect: Dialect) -> Result<ChatTemplate, Failure> {
    ChatTemplate::new(&source.text, dialect).map_err(|e| failure(&source.name, &e))
}

/// A template's error as a failure of the program.
pub(crate) fn failure(name: &str, error: &TemplateError) -> Failure {
    let failure = Failure::input(format!("{name}: {error}"));
    match error.to_string().contains("strftime_now") {
        true => failure.hint(DATE_HINT),
        false => failure,
    }
}

/// Writes down which template it was.
fn describe(
    draft: &Draft,
    source: &Source,
    template: &ChatTemplate,
    config: &Config,
) -> Result<(), Failure> {
    let what = json!({
        "name": source.name,
        "bos_token": template.token("bos_token"),
        "eos_token": template.token("eos_token"),
        "stops": template.stops(),
        "generation_prompt": template.generation_prompt(),
        "appends_eos": template.appends_eos(),
        "date": config.date,
        "variables": config.variables,
    });
    draft.write("template.jinja", source.text.as_bytes(), None)?;
    draft.write("template.json", format!("{what:#}\n").as_bytes(), None)?;
    Ok(())
}

fn work(
    ctx: &Context,
    conversations: &Sealed,
    template: &ChatTemplate,
    config: &Config,
    draft: &mut Draft,
) -> Result<Outcome, Failure> {
    let name = "conversations.parquet";
    let n_rows = conversations.manifest().file(name).and_then(|file| file.rows).unwrap_or(0);
    let mut progress = ctx.progress(n_rows, "rows");
    let mut out = draft.parquet("rendered.parquet", Rendered::schema())?;
    let mut rejects = draft.parquet("rejects.parquet", Reject::schema())?;
    let mut tally = Tally::default();
    for batch in conversations.parquet(name)? {
        let rows = Conversation::from_batch(&batch?)?;
        for chunk in rows.chunks(CHUNK_ROWS) {
            if let Some(exit) = ctx.stop() {
                return Err(Failure::stopped(exit));
            }
            let done: Vec<_> = chunk.par_iter().map(|row| rows::render(template, row)).collect();
            let (good, bad) = tally.sort(chunk, done);
            out.write(&Rendered::to_batch(&good)?)?;
            rejects.write(&Reject::to_batch(&bad)?)?;
            progress.inc(chunk.len() as u64);
        }
    }
    progress.finish();
    out.finish()?;
    rejects.finish()?;
    tally.outcome(ctx, config)
}

/// Counts of the stage.
#[derive(Default)]
struct Tally {
    ledger: Ledger,
    notes: BTreeMap<&'static str, u64>,
    /// The first reject of each reason, for people.
    examples: BTreeMap<String, String>,
    n_in: u64,
    n_out: u64,
    bytes: u64,
}

impl Tally {
    fn sort(
        &mut self,
        chunk: &[Conversation],
        done: Vec<Result<rows::Done, Box<Reject>>>,
    ) -> (Vec<Rendered>, Vec<Reject>) {
        let (mut good, mut bad) = (Vec::new(), Vec::new());
        for (row, done) in chunk.iter().zip(done) {
            let account = self.ledger.source(&row.source);
            account.rows_in += 1;
            self.n_in += 1;
            match done {
                Ok((rendered, notes)) => {
                    account.rows_out += 1;
                    self.n_out += 1;
                    self.bytes += rendered.text.len() as u64;
                    let mut notes = notes;
                    notes.dedup();
                    notes.into_iter().for_each(|note| *self.notes.entry(note).or_default() += 1);
                    good.push(rendered);
                }
                Err(reject) => {
                    *account.rejected.entry(reject.reason.clone()).or_default() += 1;
                    self.examples
                        .entry(reject.reason.clone())
                        .or_insert_with(|| format!("row `{}`: {}", reject.file, reject.detail));
                    bad.push(*reject);
                }
            }
        }
        (good, bad)
    }

    fn outcome(self, ctx: &Context, config: &Config) -> Result<Outcome, Failure> {
        let n_rejected = self.n_in - self.n_out;
        for (reason, example) in &self.examples {
            ctx.warn(format!("template: {reason}, for example {example}"));
            if example.contains("strftime_now") {
                ctx.note(DATE_HINT);
            }
        }
        if self.n_out == 0 && self.n_in > 0 {
            return Err(Failure::input(format!("none of {} rows can be rendered", self.n_in))
                .hint("the first row of each reason is shown above"));
        }
        let share = n_rejected as f64 / self.n_in.max(1) as f64;
        let exit = if share > config.max_reject_share {
            ctx.warn(format!(
                "template: {n_rejected} of {} rows rejected, more than `max_reject_share` = {}",
                self.n_in, config.max_reject_share
            ));
            Exit::GateFailed
        } else {
            Exit::Done
        };
        let mut report = json!({
            "rows_in": self.n_in,
            "rows_out": self.n_out,
            "rejected": n_rejected,
            "text_bytes": self.bytes,
        });
        report["notes"] = Value::from_iter(self.notes.iter().map(|(k, v)| (k.to_string(), *v)));
        let notes: String = self.notes.iter().map(|(note, n)| format!(", {note}: {n}")).collect();
        Ok(Outcome {
            ledger: self.ledger,
            report,
            exit,
            summary: format!("{} rows rendered, {n_rejected} rejected{notes}", self.n_out),
        })
    }
}
