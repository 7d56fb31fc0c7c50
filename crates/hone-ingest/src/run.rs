//! The stage: two passes over the sources, one decision between them.

use std::path::PathBuf;

use hone_cli::{Common, Context, Exit, Failure, Outcome, Pipeline, Progress, StagePlan, run_stage};
use hone_schema::{ArtefactKind, Conversation, InputRef, Ledger, Reject, SourceLedger, sha256};
use hone_store::{Draft, ParquetFile, input};
use rayon::prelude::*;

use crate::args::{Args, Command, Config};
use crate::convert::{Row, convert, fields, object};
use crate::fault::Fault;
use crate::index::{Identity, Index};
use crate::plan::{Plan, Source};
use crate::read::{self, RawRow, ReadError};
use crate::report::{self, Tally};
use crate::schema::{Detected, Detector};
use crate::select::{Fate, Selection, select};

/// Rows looked at to find the schema of a source.
pub(crate) const LOOK_ROWS: usize = 200;
/// Rows converted side by side, and written at a time.
const CHUNK_ROWS: usize = 2048;
/// Bytes of raw rows after which a chunk is full earlier.
const CHUNK_BYTES: usize = 32 << 20;

const GATE_HINT: &str =
    "look at rejects.parquet, then mend the rows or raise `ingest.max_reject_share`";

/// A source with its files and its schema.
pub(crate) struct Opened<'a> {
    pub(crate) source: &'a Source,
    pub(crate) files: Vec<PathBuf>,
    pub(crate) detected: Detected,
}

/// Runs what the flags ask for.
///
/// # Errors
/// See the exit codes of hone.
pub(crate) fn main(args: &Args, ctx: &Context) -> Result<Exit, Failure> {
    match &args.command {
        Some(Command::Inspect(inspect)) => crate::inspect::inspect(inspect, &args.common, ctx),
        None => stage(&args.common, ctx),
    }
}

pub(crate) fn stage(common: &Common, ctx: &Context) -> Result<Exit, Failure> {
    let pipeline = Pipeline::load(common)?;
    let mut config: Config = pipeline.stage("ingest")?;
    config.seed.get_or_insert(pipeline.seed);
    let plan = config.resolve(pipeline.seed).map_err(|failure| pipeline.at("ingest", failure))?;
    let files = plan.sources.iter().map(|s| files(s, ctx)).collect::<Result<Vec<_>, _>>()?;
    let mut inputs = Vec::new();
    for (source, files) in plan.sources.iter().zip(&files) {
        inputs.push(input_ref(source, files)?);
    }
    let stage_plan = StagePlan {
        stage: "ingest",
        kind: ArtefactKind::Conversations,
        dir: pipeline.dir("ingest"),
        config: serde_json::to_value(&config).map_err(|e| Failure::usage(e.to_string()))?,
        inputs,
    };
    run_stage(ctx, common, stage_plan, |draft, _| work(ctx, &plan, files, draft))
}

/// The files of a source; of a directory those whose names say rows.
fn files(source: &Source, ctx: &Context) -> Result<Vec<PathBuf>, Failure> {
    let mut files = Vec::new();
    for path in &source.paths {
        if !input::is_dir(path) {
            files.push(path.clone());
            continue;
        }
        let (rows, other): (Vec<_>, Vec<_>) =
            input::list(path)?.into_iter().partition(|file| read::is_rows(file));
        if !other.is_empty() {
            let names = other.iter().filter_map(|file| file.file_name()?.to_str());
            let names: Vec<&str> = names.collect();
            ctx.note(format!("ingest: {}: {} left aside", source.name, names.join(", ")));
        }
        if rows.is_empty() {
            let text =
                format!("source `{}`: `{}` holds no file of rows", source.name, path.display());
            return Err(Failure::input(text)
                .hint("rows are .jsonl, .json, .csv, .tsv (also .gz and .zst) and .parquet"));
        }
        files.extend(rows);
    }
    Ok(files)
}

/// The content of a source: of one file its hash, of several the hash of theirs in order.
fn input_ref(source: &Source, files: &[PathBuf]) -> Result<InputRef, Failure> {
    let mut hashes = Vec::new();
    for file in files {
        read::check_regular(file)?;
        hashes.push(input::hash(file)?.0.to_string());
    }
    let sha256 = match hashes.as_slice() {
        [one] => one.clone().try_into().map_err(Failure::environment)?,
        many => sha256(many.join("\n").as_bytes()),
    };
    Ok(InputRef { role: format!("source {}", source.name), sha256 })
}

impl From<ReadError> for Failure {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Store(error) => error.into(),
            ReadError::Refused { hint, .. } => {
                let failure = Failure::input(error.to_string());
                match hint {
                    Some(hint) => failure.hint(hint),
                    None => failure,
                }
            }
        }
    }
}

fn work(
    ctx: &Context,
    plan: &Plan,
    files: Vec<Vec<PathBuf>>,
    draft: &mut Draft,
) -> Result<Outcome, Failure> {
    let mut sources = Vec::new();
    for (source, files) in plan.sources.iter().zip(files) {
        let detected = detect(source, &files)?;
        ctx.note(format!(
            "ingest: {}: schema {} ({})",
            source.name,
            detected.schema.name(),
            detected.why
        ));
        sources.push(Opened { source, files, detected });
    }
    let mut tallies = vec![Tally::default(); sources.len()];
    let index = first_pass(ctx, plan, &sources, &mut tallies)?;
    for (opened, tally) in sources.iter().zip(&mut tallies) {
        tally.refuse_if_nothing_is_left(opened)?;
        tally.remark(opened);
        tally
            .notes
            .iter()
            .for_each(|note| ctx.warn(format!("ingest: {}: {note}", opened.source.name)));
    }
    let selection = select(&index, plan)
        .map_err(|e| Failure::environment(format!("polars cannot select rows: {e}")))?;
    second_pass(ctx, &sources, &index, &selection, draft)?;
    outcome(ctx, plan, &sources, &tallies, &index, &selection)
}

fn outcome(
    ctx: &Context,
    plan: &Plan,
    sources: &[Opened],
    tallies: &[Tally],
    index: &Index,
    selection: &Selection,
) -> Result<Outcome, Failure> {
    let mut ledger = Ledger::default();
    for (opened, tally) in sources.iter().zip(tallies) {
        let replay = opened.source.replay;
        *ledger.source(&opened.source.name) = SourceLedger { replay, ..tally.ledger.clone() };
    }
    for (source, fate) in index.source.iter().zip(&selection.fates) {
        let account = ledger.source(&sources[*source as usize].source.name);
        match fate.reason() {
            None => account.pass(),
            Some(reason) => account.reject(reason),
        }
    }
    let failed = report::gate(plan, sources, tallies);
    failed.iter().for_each(|text| ctx.error(text, Some(GATE_HINT)));
    let short = selection.replay.0 > selection.replay.1 && plan.sources.iter().any(|s| s.replay);
    if short {
        let (asked, there) = selection.replay;
        ctx.warn(format!(
            "ingest: replay: {there} rows are there, {asked} would be the share asked for"
        ));
    }
    Ok(Outcome {
        report: report::report(plan, sources, tallies, selection, &failed),
        summary: report::summary(&ledger, selection),
        exit: if failed.is_empty() { Exit::Done } else { Exit::GateFailed },
        ledger,
    })
}

/// Finds the schema of a source from its first rows.
pub(crate) fn detect(source: &Source, files: &[PathBuf]) -> Result<Detected, Failure> {
    let (mut rows, mut note) = (Vec::new(), None);
    for file in files {
        let mut reader = read::open(file, &source.table)?;
        note = note.or(reader.note.take());
        while rows.len() < LOOK_ROWS
            && let Some(row) = reader.next()
        {
            rows.push(row?);
        }
        if source.schema.is_some() || rows.len() >= LOOK_ROWS {
            break;
        }
    }
    if let Some(schema) = source.schema {
        let why = note.unwrap_or_else(|| "set in the configuration".to_owned());
        return Ok(Detected { schema, why });
    }
    let (mut detector, mut fault) = (Detector::default(), None);
    for row in &rows {
        match looked_at(row, source, &mut detector) {
            Ok(()) => {}
            Err(found) => fault = fault.or(Some((row.line, found))),
        }
    }
    detector.verdict(note).map_err(|mut text| {
        let file = files.first().map(|file| file.display().to_string()).unwrap_or_default();
        if rows.is_empty() {
            return Failure::input(format!("{file}: there are no rows"));
        }
        if let Some((line, fault)) = fault {
            let (reason, detail) = (fault.reason.as_str(), fault.detail);
            text.push_str(&format!("; line {line}: {reason}: {detail}"));
        }
        Failure::input(format!("{file}: {text}")).hint(
            "known are alpaca, sharegpt, messages, prompt-completion, flan, text, preference, one \
             object a line or in one array; `rename = { old = \"new\" }` gives columns the names \
             they have there",
        )
    })
}

fn looked_at(row: &RawRow, source: &Source, detector: &mut Detector) -> Result<(), Fault> {
    if let Some(fault) = &row.fault {
        return Err(fault.clone());
    }
    let text = object(&row.bytes)?;
    detector.look(&fields(&text, &source.convert)?);
    Ok(())
}

/// What the passes do with each row in order: its file, its raw form, and what it became.
type Take<'a> = dyn FnMut(&str, RawRow, Result<Row, Fault>) -> Result<(), Failure> + 'a;

/// Reads all rows of a source, converts them side by side, and hands them over in order.
pub(crate) fn walk(ctx: &Context, opened: &Opened, take: &mut Take) -> Result<(), Failure> {
    for file in &opened.files {
        let shown = file.display().to_string();
        let mut reader = read::open(file, &opened.source.table)?;
        loop {
            let (mut chunk, mut n_bytes) = (Vec::new(), 0);
            while chunk.len() < CHUNK_ROWS
                && n_bytes < CHUNK_BYTES
                && let Some(row) = reader.next()
            {
                let row = row?;
                n_bytes += row.bytes.len();
                chunk.push(row);
            }
            if chunk.is_empty() {
                break;
            }
            if let Some(exit) = ctx.stop() {
                return Err(Failure::stopped(exit));
            }
            let converted: Vec<_> = chunk.par_iter().map(|row| convert_raw(row, opened)).collect();
            for (raw, row) in chunk.into_iter().zip(converted) {
                take(&shown, raw, row)?;
            }
        }
    }
    Ok(())
}

fn convert_raw(raw: &RawRow, opened: &Opened) -> Result<Row, Fault> {
    match &raw.fault {
        Some(fault) => Err(fault.clone()),
        None => convert(&raw.bytes, opened.detected.schema, &opened.source.convert),
    }
}

fn first_pass(
    ctx: &Context,
    plan: &Plan,
    sources: &[Opened],
    tallies: &mut [Tally],
) -> Result<Index, Failure> {
    let mut index = Index::default();
    for (idx, (opened, tally)) in sources.iter().zip(tallies).enumerate() {
        walk(ctx, opened, &mut |file, raw, row| {
            match row {
                Ok(row) => {
                    tally.pass(&row);
                    index.push(idx as u32, plan.seed, &Identity::of(&row), &row);
                }
                Err(fault) => tally.reject(&fault, file, raw.line),
            }
            Ok(())
        })?;
    }
    if u32::try_from(index.len()).is_err() {
        let text = format!("{} rows are more than one run takes ({})", index.len(), u32::MAX);
        return Err(Failure::input(text).hint("ingest parts of the sources on their own"));
    }
    Ok(index)
}

/// Where rows and rejects are written, a chunk at a time.
struct Writer {
    rows: Vec<Conversation>,
    rejects: Vec<Reject>,
    conversations: ParquetFile,
    rejected: ParquetFile,
    progress: Progress,
}

impl Writer {
    fn flush(&mut self, n_at_least: usize) -> Result<(), Failure> {
        if self.rows.len() >= n_at_least && !self.rows.is_empty() {
            self.conversations.write(&Conversation::to_batch(&self.rows)?)?;
            self.rows.clear();
        }
        if self.rejects.len() >= n_at_least && !self.rejects.is_empty() {
            self.rejected.write(&Reject::to_batch(&self.rejects)?)?;
            self.rejects.clear();
        }
        Ok(())
    }
}

fn second_pass(
    ctx: &Context,
    sources: &[Opened],
    index: &Index,
    selection: &Selection,
    draft: &mut Draft,
) -> Result<(), Failure> {
    let mut writer = Writer {
        rows: Vec::new(),
        rejects: Vec::new(),
        conversations: draft.parquet("conversations.parquet", Conversation::schema())?,
        rejected: draft.parquet("rejects.parquet", Reject::schema())?,
        progress: ctx.progress(index.len() as u64, "rows"),
    };
    let mut at = 0;
    for opened in sources {
        let (source, mut row_number) = (opened.source, 0);
        walk(ctx, opened, &mut |file, raw, row| {
            row_number += 1;
            let row = match row {
                Ok(row) => row,
                Err(fault) => {
                    writer.rejects.push(fault.reject(&source.name, file, raw.line, &raw.bytes));
                    return writer.flush(CHUNK_ROWS);
                }
            };
            let identity = Identity::of(&row);
            if !identity.is_at(index, at) {
                return Err(changed(file, raw.line));
            }
            if let Fate::Keep(split, nth) = selection.fates[at] {
                let id =
                    if nth == 0 { identity.id } else { format!("{}#{}", identity.id, nth + 1) };
                // With several files a line says little, so rows are counted through.
                let source_row = if opened.files.len() == 1 { raw.line } else { row_number };
                let row = conversation(row, id, source, source_row, split);
                writer.rows.push(row);
            }
            at += 1;
            writer.progress.inc(1);
            writer.flush(CHUNK_ROWS)
        })?;
    }
    if at != index.len() {
        let file = sources.last().and_then(|s| s.files.last()).map(|f| f.display().to_string());
        return Err(changed(&file.unwrap_or_default(), 0));
    }
    writer.flush(1)?;
    writer.progress.finish();
    writer.conversations.finish()?;
    writer.rejected.finish()?;
    Ok(())
}

fn changed(file: &str, line: u64) -> Failure {
    Failure::input(format!("{file}:{line}: the file changed while it was read"))
        .hint("run hone-ingest again when nobody writes to it")
}

fn conversation(
    row: Row,
    id: String,
    source: &Source,
    source_row: u64,
    split: hone_schema::Split,
) -> Conversation {
    Conversation {
        id,
        source: source.name.clone(),
        source_row,
        split,
        kind: row.kind,
        messages: row.messages,
        tools: row.tools,
        variables: row.variables,
        text: row.text,
        weight: source.weight * row.weight,
        chosen: row.chosen,
        rejected: row.rejected,
        meta: row.meta,
    }
}

#[cfg(test)]
mod tests;
