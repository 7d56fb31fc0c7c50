//! The template at work: in a process of its own, because it is foreign code.

use std::time::Duration;

use arrow::array::RecordBatch;
use hone_chat::{ChatTemplate, Dialect, Rewritten};
use hone_cli::worker::{Limits, encode_rows, join, serve};
use hone_cli::{Exit, Failure};
use hone_schema::{Conversation, Reject, Rendered};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::args::Config;
use crate::rows::{self, Templates};
use crate::run::failure;
use crate::source::{Source, Tokenizer};
use crate::tally::Tally;

/// What a template may take: the largest known one renders a thousand turns in a tenth.
pub(crate) const LIMITS: Limits = Limits {
    memory: 512 << 20,
    memory_per_thread: 64 << 20,
    start: Duration::from_secs(5),
    batch: Duration::from_secs(10),
};

/// Everything that a worker has to know.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Job {
    pub(crate) source: Source,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) config: Config,
}

impl Job {
    /// Compiles the template, and that for rows with tools.
    ///
    /// # Errors
    /// It is not valid; the date is not one.
    pub(crate) fn compile(self) -> Result<(Templates, Config), Failure> {
        let dialect = Dialect {
            tokens: self.tokenizer.tokens,
            added_tokens: self.tokenizer.added,
            date: self.config.date()?,
            variables: self.config.variables.clone(),
        };
        let compile = |text: &str, name: &str| {
            ChatTemplate::new(text, dialect.clone()).map_err(|e| failure(name, &e))
        };
        let plain = compile(&self.source.text, &self.source.name)?;
        let tool_use = self.source.tool_use.as_deref();
        let tool_use = tool_use.map(|text| compile(text, "tool_use")).transpose()?;
        Ok((Templates { plain, tool_use }, self.config))
    }
}

/// Is a worker: greets with what `template.json` says, and answers conversations with their rendered rows.
///
/// # Errors
/// Pipes that break.
pub(crate) fn work() -> Result<Exit, Failure> {
    serve(|job| {
        let job: Job = serde_json::from_slice(job)
            .map_err(|e| Failure::environment(format!("a worker cannot read its job: {e}")))?;
        let name = job.source.name.clone();
        let (templates, config) = job.compile()?;
        let template = templates.of(false);
        let facts = json!({
            "name": name,
            "bos_token": template.token("bos_token"),
            "eos_token": template.token("eos_token"),
            "stops": templates.stops(),
            "generation_prompt": template.generation_prompt(),
            "appends_eos": template.appends_eos(),
            "date": config.date,
            "variables": config.variables,
        });
        let rewritten = config.rewritten;
        Ok((facts.to_string().into_bytes(), move |batch| answer(&templates, rewritten, &batch)))
    })
}

/// Rendered rows, rejected ones, and their counts.
fn answer(
    templates: &Templates,
    rewritten: Rewritten,
    batch: &RecordBatch,
) -> Result<Vec<u8>, Failure> {
    let rows = Conversation::from_batch(batch)?;
    let done = rows.iter().map(|row| rows::render(templates, rewritten, row));
    let (mut good, mut bad) = (Vec::new(), Vec::new());
    let mut tally = Tally::default();
    for (row, done) in rows.iter().zip(done) {
        match done {
            Ok(done) => {
                tally.pass(row, &done);
                good.extend(done.into_iter().map(|(rendered, _)| rendered));
            }
            Err(reject) => {
                tally.reject(&reject);
                bad.push(*reject);
            }
        }
    }
    let tally = serde_json::to_vec(&tally).expect("counts are plain data");
    let good = encode_rows(&Rendered::to_batch(&good)?)?;
    let bad = encode_rows(&Reject::to_batch(&bad)?)?;
    Ok(join(&[&tally, &good, &bad]))
}
