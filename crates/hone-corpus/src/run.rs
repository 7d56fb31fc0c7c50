//! The files and their rows.

use std::io::Write;

use hone_cli::{Context, Exit, Failure, Outcome, StagePlan, run_stage};
use hone_corpus::World;
use hone_corpus::documents::Stream;
use hone_corpus::files::{line, small_files};
use hone_corpus::rows::text_rows;
use hone_schema::{ArtefactKind, Ledger};
use hone_store::Draft;
use serde_json::{Map, json};

use crate::args::Plan;

/// Rows between two looks at the signals and the progress bar.
const ROWS_BETWEEN_LOOKS: u64 = 1000;

/// Writes every file into one sealed directory, unless it holds them already.
///
/// # Errors
/// The file system, a lock, or a signal to stop.
pub(crate) fn run(plan: &Plan, context: &Context) -> Result<Exit, Failure> {
    let stage = StagePlan {
        stage: "corpus",
        kind: ArtefactKind::Files,
        dir: plan.common.runs.join("corpus"),
        config: json!({ "documents": plan.n_documents, "seed": plan.seed }),
        inputs: Vec::new(),
    };
    run_stage(context, &plan.common, stage, |draft, _key| write_all(plan, context, draft))
}

fn write_all(plan: &Plan, context: &Context, draft: &Draft) -> Result<Outcome, Failure> {
    // A test loads these very tables, so this error is not the user's to see.
    let world = World::load().map_err(|error| Failure::input(error.to_string()))?;
    write_plain(plan, context, draft, &world)?;
    let mut counts = vec![("plain.jsonl", plan.n_documents)];
    for small in small_files(&world, plan.seed) {
        draft.write(small.name, &small.bytes, Some(small.n_rows))?;
        counts.push((small.name, small.n_rows));
    }
    let mut ledger = Ledger::default();
    let mut rows = Map::new();
    for (name, n_rows) in &counts {
        let account = ledger.source(name);
        (account.rows_in, account.rows_out) = (*n_rows, *n_rows);
        rows.insert((*name).to_owned(), (*n_rows).into());
    }
    let n_facts = world.facts().len();
    let summary = format!(
        "{} documents about {n_facts} facts, and {} small files",
        plan.n_documents,
        counts.len() - 1,
    );
    let report = json!({ "facts": n_facts, "rows": rows });
    Ok(Outcome { ledger, report, exit: Exit::Done, summary })
}

/// The text for pre-training, one document after the other.
fn write_plain(
    plan: &Plan,
    context: &Context,
    draft: &Draft,
    world: &World,
) -> Result<(), Failure> {
    let mut file = draft.file("plain.jsonl")?;
    let mut progress = context.progress(plan.n_documents, "documents");
    for (idx, row) in (1..).zip(text_rows(world, plan.seed, Stream::Plain, plan.n_documents)) {
        file.write_all(&line(&row)).map_err(|error| {
            let message = format!("cannot write `{}`: {error}", file.path().display());
            Failure::environment(message).hint("check the space and the permissions of that place")
        })?;
        if idx % ROWS_BETWEEN_LOOKS == 0 {
            progress.set(idx);
            if let Some(exit) = context.stop() {
                return Err(Failure::stopped(exit));
            }
        }
    }
    progress.finish();
    Ok(file.finish(Some(plan.n_documents))?)
}
