//! The frame of every stage: key, freshness, lock, work, seal, summary.

use std::path::PathBuf;

use hone_schema::{ArtefactKind, InputRef, Ledger, Manifest, Program, Sha256Hex, stage_key};
use hone_store::{Draft, Seal, Sealed, StoreError};
use serde_json::{Value, json};

use crate::{Common, Context, Exit, Failure};

/// Key of a report that says that a gate failed, so that a fresh output fails again.
const GATE_FAILED: &str = "gate_failed";

/// What a stage is about to do, resolved: everything that decides its bytes.
#[derive(Clone, Debug)]
pub struct StagePlan {
    /// Name of the stage.
    pub stage: &'static str,
    /// What it writes.
    pub kind: ArtefactKind,
    /// Where, unless `--out` says otherwise.
    pub dir: PathBuf,
    /// Its resolved configuration.
    pub config: Value,
    /// What it reads.
    pub inputs: Vec<InputRef>,
}

/// What a stage has done.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Where every row went.
    pub ledger: Ledger,
    /// What it has to say; the same for the same work, so no times here.
    pub report: Value,
    /// [`Exit::Done`], or [`Exit::GateFailed`] with the reason already said; then the report, an object, is marked so that the
    /// output fails again while it is fresh.
    pub exit: Exit,
    /// One line for people.
    pub summary: String,
}

impl StagePlan {
    /// The key of this work by this program.
    ///
    /// # Errors
    /// The program's own file cannot be read.
    pub fn key(&self) -> Result<(Sha256Hex, Program), Failure> {
        let program = hone_store::program(env!("CARGO_PKG_VERSION"))?;
        Ok((stage_key(self.stage, &self.config, &self.inputs, &program), program))
    }
}

/// Runs a stage, unless its sealed output has the key of this very work.
///
/// # Errors
/// Whatever `work` says; the lock; the file system. Nothing half-written becomes visible.
pub fn run_stage(
    ctx: &Context,
    common: &Common,
    plan: StagePlan,
    work: impl FnOnce(&mut Draft, &Sha256Hex) -> Result<Outcome, Failure>,
) -> Result<Exit, Failure> {
    let dir = common.out.clone().unwrap_or_else(|| plan.dir.clone());
    let (key, program) = plan.key()?;
    let reasons = match Sealed::open_any(&dir) {
        Ok(old) if old.manifest().key == key && old.manifest().kind == plan.kind => {
            if !common.force || common.why {
                ctx.note(format!("{}: fresh  {}", plan.stage, dir.display()));
                print_json(ctx, common, &plan, &dir, "fresh", old.manifest());
                if !common.why {
                    hone_store::sweep(&dir)?;
                }
                return Ok(if common.why {
                    Exit::Done
                } else {
                    fresh_exit(ctx, &plan, old.manifest())
                });
            }
            vec!["--force was given".to_owned()]
        }
        Ok(old) => differences(old.manifest(), &plan, &program),
        Err(StoreError::NotFound { path } | StoreError::NotSealed { path }) if path == dir => {
            vec!["there is no sealed output yet".to_owned()]
        }
        Err(error) => vec![format!("its output cannot be used: {error}")],
    };
    for reason in &reasons {
        ctx.note(format!("{}: runs because {reason}", plan.stage));
    }
    if common.why {
        if common.json {
            let object = json!({
                "stage": plan.stage,
                "status": "stale",
                "dir": dir.display().to_string(),
                "reasons": reasons,
            });
            ctx.print(object.to_string());
        }
        return Ok(Exit::Done);
    }
    let _span = tracing::info_span!("stage", name = plan.stage, key = key.short()).entered();
    let mut draft = Draft::open(&dir)?;
    let mut outcome = work(&mut draft, &key)?;
    if outcome.exit == Exit::GateFailed && outcome.report.is_object() {
        outcome.report[GATE_FAILED] = true.into();
    }
    let sealed = draft.seal(Seal {
        kind: plan.kind,
        stage: plan.stage.to_owned(),
        key,
        program,
        config: plan.config.clone(),
        inputs: plan.inputs.clone(),
        ledger: outcome.ledger,
        report: outcome.report,
    })?;
    ctx.note(format!("{}: {}  {}", plan.stage, outcome.summary, dir.display()));
    print_json(ctx, common, &plan, &dir, "done", sealed.manifest());
    Ok(outcome.exit)
}

/// What is fresh may have failed a gate when it was made; it has not got better since. A report says which in `gate.failed`.
fn fresh_exit(ctx: &Context, plan: &StagePlan, manifest: &Manifest) -> Exit {
    let report = &manifest.report;
    if report[GATE_FAILED] != Value::Bool(true) {
        return Exit::Done;
    }
    ctx.warn(format!("{}: a gate failed when this was made", plan.stage));
    let failed = report["gate"]["failed"].as_array();
    failed.into_iter().flatten().filter_map(Value::as_str).for_each(|text| ctx.warn(text));
    Exit::GateFailed
}

fn print_json(
    ctx: &Context,
    common: &Common,
    plan: &StagePlan,
    dir: &std::path::Path,
    status: &str,
    manifest: &Manifest,
) {
    if common.json {
        let object = json!({
            "stage": plan.stage,
            "status": status,
            "dir": dir.display().to_string(),
            "key": manifest.key,
            "files": manifest.files,
            "ledger": manifest.ledger,
            "report": manifest.report,
        });
        ctx.print(object.to_string());
    }
}

/// What is not as it was when `old` was sealed, in words.
fn differences(old: &Manifest, plan: &StagePlan, program: &Program) -> Vec<String> {
    let mut all = Vec::new();
    if old.stage != plan.stage || old.kind != plan.kind {
        all.push(format!("the directory holds {} of `{}`", old.kind, old.stage));
        return all;
    }
    // The old one was read from text, which may move the last digit of a float.
    let config = serde_json::from_str(&plan.config.to_string()).unwrap_or_default();
    diff_json("", &old.config, &config, &mut all);
    for input in &plan.inputs {
        match old.inputs.iter().find(|was| was.role == input.role) {
            None => all.push(format!("the input `{}` is new", input.role)),
            Some(was) if was.sha256 != input.sha256 => {
                all.push(format!("the input `{}` changed", input.role));
            }
            Some(_) => {}
        }
    }
    for was in &old.inputs {
        if !plan.inputs.iter().any(|input| input.role == was.role) {
            all.push(format!("the input `{}` is gone", was.role));
        }
    }
    if old.program.sha256 != program.sha256 {
        all.push("the program changed".to_owned());
    }
    if all.is_empty() {
        all.push("the order of its inputs changed".to_owned());
    }
    all
}

/// What is not the same in two configurations, in words: `` `max_len` was 64 and is 32 ``.
pub fn changes(old: &Value, new: &Value) -> Vec<String> {
    let mut all = Vec::new();
    diff_json("", old, new, &mut all);
    all
}

fn diff_json(path: &str, old: &Value, new: &Value, all: &mut Vec<String>) {
    match (old, new) {
        (Value::Object(a), Value::Object(b)) => {
            let mut keys: Vec<&String> = a.keys().chain(b.keys()).collect();
            keys.sort();
            keys.dedup();
            for key in keys {
                let inner = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                let null = &Value::Null;
                diff_json(&inner, a.get(key).unwrap_or(null), b.get(key).unwrap_or(null), all);
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (idx, (a, b)) in a.iter().zip(b).enumerate() {
                diff_json(&format!("{path}.{idx}"), a, b, all);
            }
        }
        _ if old == new => {}
        _ => {
            let [old, new] = [old, new].map(|value| match value {
                Value::Null => "not given".to_owned(),
                value => value.to_string(),
            });
            all.push(format!("`{path}` was {old} and is {new}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(dir: PathBuf, lr: f64) -> StagePlan {
        let config = json!({"lr": lr, "inner": {"rank": 8}});
        StagePlan { stage: "train", kind: ArtefactKind::Files, dir, config, inputs: vec![] }
    }

    fn run(dir: PathBuf, lr: f64, common: &Common) -> (bool, Exit) {
        let mut worked = false;
        let ctx = Context::new(common);
        let exit = run_stage(&ctx, common, plan(dir, lr), |draft, _| {
            worked = true;
            draft.write("x.txt", lr.to_string().as_bytes(), None)?;
            Ok(Outcome {
                ledger: Ledger::default(),
                report: Value::Null,
                exit: Exit::Done,
                summary: "one file".to_owned(),
            })
        });
        (worked, exit.expect("the work cannot fail"))
    }

    #[test]
    fn the_same_work_is_fresh_and_other_work_is_not() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("p/train");
        let quiet = Common { quiet: true, ..Common::default() };
        assert_eq!(run(dir.clone(), 0.5, &quiet), (true, Exit::Done));
        assert_eq!(run(dir.clone(), 0.5, &quiet), (false, Exit::Done));
        assert_eq!(run(dir.clone(), 0.25, &quiet), (true, Exit::Done));
        let why = Common { why: true, ..quiet.clone() };
        assert_eq!(run(dir.clone(), 0.5, &why), (false, Exit::Done));
        let force = Common { force: true, ..quiet };
        assert_eq!(run(dir.clone(), 0.25, &force), (true, Exit::Done));
        let bytes = Sealed::open(&dir, ArtefactKind::Files).unwrap().read("x.txt").unwrap();
        assert_eq!(bytes, b"0.25");
    }

    #[test]
    fn a_failed_gate_stays_failed_while_fresh() {
        let temp = tempfile::tempdir().unwrap();
        let quiet = Common { quiet: true, ..Common::default() };
        let ctx = Context::new(&quiet);
        for _ in 0..2 {
            let exit = run_stage(&ctx, &quiet, plan(temp.path().join("x"), 0.5), |_, _| {
                Ok(Outcome {
                    ledger: Ledger::default(),
                    report: json!({}),
                    exit: Exit::GateFailed,
                    summary: String::new(),
                })
            });
            assert_eq!(exit.unwrap(), Exit::GateFailed);
        }
    }

    #[test]
    fn differences_name_the_key() {
        let mut all = Vec::new();
        let old = json!({"lr": 1, "inner": {"rank": 8}, "gone": true, "list": [{"a": 1}, 2]});
        let new = json!({"lr": 2, "inner": {"rank": 16}, "list": [{"a": 3}, 2]});
        diff_json("", &old, &new, &mut all);
        assert_eq!(
            all,
            [
                "`gone` was true and is not given",
                "`inner.rank` was 8 and is 16",
                "`list.0.a` was 1 and is 3",
                "`lr` was 1 and is 2",
            ]
        );
    }
}
