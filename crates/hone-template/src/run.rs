//! The stage: conversations in, rendered rows out.

use arrow::array::RecordBatch;
use hone_chat::TemplateError;
use hone_cli::worker::{Answer, Sandbox, decode_rows, shielded, split};
use hone_cli::{Common, Context, Exit, Failure, Outcome, Pipeline, StagePlan, run_stage};
use hone_schema::{ArtefactKind, Conversation, Reject, Rendered};
use hone_store::{Draft, ModelDir, ParquetFile, Sealed};
use serde_json::Value;

use crate::args::{Args, Command, Config};
use crate::rows;
use crate::source::{self, Source, Tokenizer};
use crate::tally::Tally;
use crate::worker::{self, Job};

/// Rows that go to the worker at a time.
const CHUNK_ROWS: usize = 2048;

/// What to do when a template asks for today's date.
pub(crate) const DATE_HINT: &str =
    "this template wants a date: set `template.date`, such as 2026-01-31";

/// The table of conversations.
const CONVERSATIONS: &str = "conversations.parquet";

/// Runs what the flags ask for.
///
/// # Errors
/// See the exit codes of hone.
pub(crate) fn main(args: &Args, ctx: &Context) -> Result<Exit, Failure> {
    match &args.command {
        Some(Command::Render(render)) => {
            shielded("chat template", worker::LIMITS, &args.common, || {
                crate::render::render(render, &args.common, ctx)
            })
        }
        Some(Command::Worker) => worker::work(),
        None => stage(&args.common, ctx),
    }
}

fn stage(common: &Common, ctx: &Context) -> Result<Exit, Failure> {
    let pipeline = Pipeline::load(common)?;
    let config: Config = pipeline.stage("template")?;
    config.date().map_err(|failure| pipeline.at("template", failure))?;
    let conversations = Sealed::open(&pipeline.dir("ingest"), ArtefactKind::Conversations)?;
    let model = ModelDir::open(pipeline.need_base()?)?;
    let tokenizer = Tokenizer::read(&model)?;
    let source = source::find(&config.template, &tokenizer)?;
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
    let job = Job { source, tokenizer, config };
    run_stage(ctx, common, plan, |draft, _| {
        let bytes = serde_json::to_vec(&job).expect("a job is plain data");
        let (sandbox, facts) = Sandbox::start("chat template", bytes, worker::LIMITS, common)?;
        describe(ctx, draft, &job.source, &facts)?;
        work(ctx, &conversations, sandbox, &job.config, draft)
    })
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
fn describe(ctx: &Context, draft: &Draft, source: &Source, facts: &[u8]) -> Result<(), Failure> {
    let facts: Value = serde_json::from_slice(facts)
        .map_err(|e| Failure::environment(format!("a worker's greeting is not JSON: {e}")))?;
    if facts["appends_eos"] == true {
        ctx.note(format!(
            "template: {} ends no answer, so the end-of-text token is put behind each last one",
            source.name
        ));
    }
    draft.write("template.jinja", source.text.as_bytes(), None)?;
    if let Some(tool_use) = &source.tool_use {
        draft.write("tool_use.jinja", tool_use.as_bytes(), None)?;
    }
    draft.write("template.json", format!("{facts:#}\n").as_bytes(), None)?;
    Ok(())
}

fn work(
    ctx: &Context,
    conversations: &Sealed,
    mut sandbox: Sandbox,
    config: &Config,
    draft: &mut Draft,
) -> Result<Outcome, Failure> {
    let n_rows = conversations.manifest().file(CONVERSATIONS).and_then(|file| file.rows);
    let mut progress = ctx.progress(n_rows.unwrap_or(0), "rows");
    let mut out = Out {
        rendered: draft.parquet("rendered.parquet", Rendered::schema())?,
        rejects: draft.parquet("rejects.parquet", Reject::schema())?,
        tally: Tally::default(),
    };
    for batch in conversations.parquet(CONVERSATIONS)? {
        let batch = batch?;
        for start in (0..batch.num_rows()).step_by(CHUNK_ROWS) {
            let n = CHUNK_ROWS.min(batch.num_rows() - start);
            sandbox.feed(ctx, batch.slice(start, n), |answer| out.take(answer))?;
            progress.inc(n as u64);
        }
    }
    sandbox.finish(ctx, |answer| out.take(answer))?;
    progress.finish();
    out.rendered.finish()?;
    out.rejects.finish()?;
    out.tally.mark_replay(&conversations.manifest().ledger);
    out.tally.outcome(ctx, config)
}

/// What is written.
struct Out {
    rendered: ParquetFile,
    rejects: ParquetFile,
    tally: Tally,
}

impl Out {
    fn take(&mut self, answer: Answer) -> Result<(), Failure> {
        match answer {
            Answer::Done(chunks) => chunks.iter().try_for_each(|bytes| self.chunk(bytes)),
            Answer::Died { rows, why } => self.took_down(&rows, &why),
        }
    }

    fn chunk(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let [tally, rendered, rejects] = split(bytes)?;
        let tally = serde_json::from_slice(tally)
            .map_err(|e| Failure::environment(format!("a worker's counts are not JSON: {e}")))?;
        self.tally.add(tally);
        self.rendered.write(&decode_rows(rendered)?)?;
        Ok(self.rejects.write(&decode_rows(rejects)?)?)
    }

    /// A row that no worker survives.
    fn took_down(&mut self, rows: &RecordBatch, why: &str) -> Result<(), Failure> {
        for row in Conversation::from_batch(rows)? {
            let detail = format!("rendering it took the worker down: {why}");
            let reject = rows::reject(&row, "template limit", detail);
            self.tally.reject(&reject);
            self.rejects.write(&Reject::to_batch(&[reject])?)?;
        }
        Ok(())
    }
}
