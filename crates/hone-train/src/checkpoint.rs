//! Checkpoints: sealed directories beside the output. `step-<n>` is everything a resumed run needs; the newest that verifies, and
//! whose key is this run's, is taken. `best-<n>` is the weights after the step with the least held-out loss, kept as long as a
//! checkpoint, or the run itself, may still go back to it.

use std::cell::Cell;
use std::path::{Path, PathBuf};

use hone_cli::{Context, Failure, StagePlan, changes};
use hone_kernels::Backend;
use hone_learn::Learner;
use hone_model::{StoredType, Tensors};
use hone_schema::{ArtefactKind, InputRef, Ledger, Program, Sha256Hex};
use hone_store::{Draft, Seal, Sealed, children, remove_sealed, sweep_all};
use serde_json::{Value, json};

use crate::args::EarlierArgs;
use crate::watch::Watch;
use crate::weights;

const TENSORS: &str = "state.safetensors";
const STATE: &str = "state.json";
const METRICS: &str = "metrics.jsonl";
const SELF_TEST: &str = "self_test.json";
const WATCH: &str = "watch.json";

/// Beginnings of the names of both kinds of directory.
const STEP: &str = "step-";
const BEST: &str = "best-";

/// Role of a checkpoint among the inputs of a run that goes on from its weights.
const ROLE: &str = "checkpoint";

/// What a run has found out so far, word for word, so that a resumed run says the same.
#[derive(Clone, Default)]
pub(crate) struct Found {
    /// The lines of the metrics.
    pub(crate) metrics: String,
    /// The self-test of the first step, as JSON; empty before it.
    pub(crate) self_test: String,
    /// The held-out loss so far, and the watchdog's memory.
    pub(crate) watch: Watch,
}

/// What is done with checkpoints of an earlier run that had other settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Earlier {
    /// The difference is named, and nothing is done.
    Refuse,
    /// Its weights are gone on from, with fresh moments.
    ResetOptimizer,
    /// They are dropped.
    Restart,
}

/// Where a run keeps its checkpoints, and what makes them its own.
pub(crate) struct Checkpoints {
    dir: PathBuf,
    stage: StagePlan,
    key: Sha256Hex,
    program: Program,
    kept: usize,
    earlier: Earlier,
    /// Whether this process has written one.
    written: Cell<bool>,
}

impl From<EarlierArgs> for Earlier {
    fn from(args: EarlierArgs) -> Self {
        match (args.reset_optimizer, args.restart) {
            (true, _) => Earlier::ResetOptimizer,
            (_, true) => Earlier::Restart,
            _ => Earlier::Refuse,
        }
    }
}

/// A checkpoint, whole and as it was sealed.
struct Read {
    sealed: Sealed,
    tensors: Tensors,
    state: Value,
    found: Found,
}

fn name(start: &str, step: u64) -> String {
    format!("{start}{step:09}")
}

impl Checkpoints {
    /// The checkpoints of the run that writes `out`, the newest `kept` of them. A run that goes on, or has gone on, from another's
    /// weights gets that checkpoint as an input in `stage`: it is another run than the one from the base. `again`: though it is sealed.
    pub(crate) fn beside(
        out: &Path,
        stage: &mut StagePlan,
        kept: usize,
        (earlier, again): (Earlier, bool),
    ) -> Result<Self, Failure> {
        let stem = out.file_name().map_or("train".into(), |name| name.to_string_lossy());
        let dir = out.with_file_name(format!("{stem}-checkpoints"));
        if let Some(origin) = origin(out, &dir, stage, (earlier, again))? {
            stage.inputs.push(origin);
        }
        let (key, program) = stage.key()?;
        let written = Cell::new(false);
        Ok(Checkpoints { dir, stage: stage.clone(), key, program, kept, earlier, written })
    }

    /// Whether this process has written a checkpoint.
    pub(crate) fn has_written(&self) -> bool {
        self.written.get()
    }

    /// A short name of this run, the same after a restart.
    pub(crate) fn run(&self) -> &str {
        self.key.short()
    }

    /// The step of the newest checkpoint.
    pub(crate) fn newest(&self) -> Option<u64> {
        let newest = steps(&self.dir).ok()?.pop()?;
        shown(&newest).strip_prefix(STEP)?.parse().ok()
    }

    /// Seals the learner's state, what was found so far and the step of the best weights, if they are kept; then drops older ones.
    pub(crate) fn save<B: Backend>(
        &self,
        learner: &Learner<B>,
        found: &Found,
        best: Option<u64>,
    ) -> Result<(), Failure> {
        self.written.set(true);
        let (tensors, state) = learner.state();
        let draft = Draft::open(&self.dir.join(name(STEP, learner.step())))?;
        write_tensors(&draft, &tensors)?;
        draft.write(STATE, state.to_string().as_bytes(), None)?;
        draft.write(METRICS, found.metrics.as_bytes(), None)?;
        draft.write(SELF_TEST, found.self_test.as_bytes(), None)?;
        draft.write(WATCH, found.watch.to_json().as_bytes(), None)?;
        self.seal(draft, json!({"step": learner.step(), "best": best}))?;
        self.tidy(self.kept, best)
    }

    /// Seals the weights as they are: those with the least held-out loss so far.
    pub(crate) fn save_best<B: Backend>(&self, learner: &Learner<B>) -> Result<(), Failure> {
        let draft = Draft::open(&self.dir.join(name(BEST, learner.step())))?;
        write_tensors(&draft, &learner.decoder().trained())?;
        self.seal(draft, json!({"step": learner.step()}))?;
        self.tidy(self.kept, Some(learner.step()))
    }

    /// The best weights, sealed after `step`.
    pub(crate) fn best(&self, step: u64) -> Result<Tensors, Failure> {
        let dir = self.dir.join(name(BEST, step));
        let sealed = Sealed::open(&dir, ArtefactKind::Checkpoint)?;
        if sealed.manifest().key != self.key {
            return Err(Failure::input(format!("{}: it is another run's", dir.display())));
        }
        tensors(&sealed)
    }

    fn seal(&self, draft: Draft, report: Value) -> Result<(), Failure> {
        draft.seal(Seal {
            kind: ArtefactKind::Checkpoint,
            stage: "train".to_owned(),
            key: self.key.clone(),
            program: self.program.clone(),
            config: self.stage.config.clone(),
            inputs: self.stage.inputs.clone(),
            ledger: Ledger::default(),
            report,
        })?;
        Ok(())
    }

    /// Puts the learner where the newest good checkpoint of this run was, and returns what was found up to there; `None` when there
    /// is none, and the run starts at step 0. Errors: there are only those of a run with other settings, and nothing was said about them.
    pub(crate) fn resume<B: Backend>(
        &self,
        ctx: &Context,
        learner: &mut Learner<B>,
    ) -> Result<Option<Found>, Failure> {
        let mut other = None;
        for dir in steps(&self.dir)?.iter().rev() {
            match self.read(dir) {
                Ok(read) if read.sealed.manifest().key != self.key => other = other.or(Some(read)),
                Ok(read) => {
                    learner.restore(&read.tensors, &read.state).map_err(|e| bad(dir, &e))?;
                    let (step, name) = (learner.step(), shown(dir));
                    ctx.note(format!("train: resumes after step {step} ({name})"));
                    return Ok(Some(read.found));
                }
                Err(failure) => ctx.warn(format!("passing over a checkpoint: {failure}")),
            }
        }
        match (other, self.earlier) {
            (Some(other), Earlier::Refuse) => Err(self.refuse(&other.sealed)),
            (Some(other), Earlier::ResetOptimizer) => self.go_on(ctx, learner, other).map(Some),
            (Some(_), Earlier::Restart) => {
                ctx.note("train: starts over; the checkpoints of an earlier run are dropped");
                self.tidy(0, None)?;
                Ok(None)
            }
            (None, _) if self.stage.inputs.iter().any(|input| input.role == ROLE) => {
                let message = format!("{}: the checkpoint is gone", self.dir.display());
                Err(Failure::input(message).hint("`--force --restart` starts over from the base"))
            }
            (None, _) => Ok(None),
        }
    }

    /// Takes the weights of a checkpoint that another run left, and seals what comes of it at once: killed now, it goes on from there.
    fn go_on<B: Backend>(
        &self,
        ctx: &Context,
        learner: &mut Learner<B>,
        Read { sealed: other, tensors, state, found }: Read,
    ) -> Result<Found, Failure> {
        self.check_base(&other)?;
        learner.restart(&tensors, &state).map_err(|e| bad(other.dir(), &e))?;
        ctx.note(format!(
            "train: goes on after step {} from the weights of {}, with fresh moments: {}",
            learner.step(),
            shown(other.dir()),
            self.differences(&other).join(", ")
        ));
        let found = Found { metrics: found.metrics, ..Found::default() };
        self.save(learner, &found, None)?;
        Ok(found)
    }

    /// Refuses weights that belong to another base than the run has: quantised in another way, or with a part taken out of it.
    fn check_base(&self, other: &Sealed) -> Result<(), Failure> {
        let of = |config: &Value, key: &str| config.get(key).cloned().unwrap_or_default();
        let keys = ["method", "quant_type", "double_quant", "lora_init"].into_iter();
        let mut differ =
            keys.filter(|key| of(&other.manifest().config, key) != of(&self.stage.config, key));
        let Some(key) = differ.next() else { return Ok(()) };
        let message = format!(
            "{} belongs to another base: {}",
            other.dir().display(),
            self.differences(other).join(", ")
        );
        let hint = format!("set `{key}` back, or start at step 0 with `--restart`");
        Err(Failure::usage(message).hint(hint))
    }

    fn differences(&self, other: &Sealed) -> Vec<String> {
        let (old, new) = (other.manifest(), &self.stage);
        // The old one was read from text, which may move the last digit of a float.
        let config = serde_json::from_str(&new.config.to_string()).unwrap_or_default();
        let mut all = changes(&old.config, &config);
        for input in new.inputs.iter().filter(|input| input.role != ROLE) {
            let is_same = |was: &InputRef| was.role == input.role && was.sha256 == input.sha256;
            if !old.inputs.iter().any(is_same) {
                all.push(format!("the input `{}` changed", input.role));
            }
        }
        if old.program.sha256 != self.program.sha256 {
            all.push("the program changed".to_owned());
        }
        if all.is_empty() {
            all.push("the settings are the same".to_owned());
        }
        all
    }

    fn refuse(&self, other: &Sealed) -> Failure {
        let message = format!(
            "{} is of a run with other settings: {}",
            other.dir().display(),
            self.differences(other).join(", ")
        );
        Failure::usage(message).hint(
            "set it back to go on exactly; `--reset-optimizer` goes on from its weights with \
             fresh moments, `--restart` drops it and starts at step 0",
        )
    }

    /// Reads a checkpoint, and where it is this run's, checks the best weights that it may go back to.
    fn read(&self, dir: &Path) -> Result<Read, Failure> {
        let read = Read::open(dir)?;
        if let Some(step) = read.sealed.manifest().report["best"].as_u64()
            && read.sealed.manifest().key == self.key
        {
            self.best(step)?;
        }
        Ok(read)
    }

    /// Drops all checkpoints of this run but the newest `n`, all best weights but `best` and those that a kept checkpoint names, and
    /// all of other runs.
    fn tidy(&self, n: usize, best: Option<u64>) -> Result<(), Failure> {
        let mut named: Vec<String> = best.iter().map(|step| name(BEST, *step)).collect();
        let (mut kept, mut dropped) = (0, Vec::new());
        for dir in steps(&self.dir)?.into_iter().rev() {
            match Sealed::open(&dir, ArtefactKind::Checkpoint) {
                Ok(sealed) if sealed.manifest().key == self.key && kept < n => {
                    kept += 1;
                    let best = sealed.manifest().report["best"].as_u64();
                    named.extend(best.map(|step| name(BEST, step)));
                }
                _ => dropped.push(dir),
            }
        }
        for name in children(&self.dir)? {
            if name.starts_with(BEST) && !named.contains(&name) {
                dropped.push(self.dir.join(name));
            }
        }
        dropped.iter().try_for_each(|dir| Ok(remove_sealed(dir)?))
    }

    /// Drops all, and what killed runs left beside them: the run is sealed.
    pub(crate) fn clear(&self) -> Result<(), Failure> {
        self.tidy(0, None)?;
        Ok(sweep_all(&self.dir)?)
    }
}

impl Read {
    fn open(dir: &Path) -> Result<Self, Failure> {
        let sealed = Sealed::open(dir, ArtefactKind::Checkpoint)?;
        let tensors = tensors(&sealed)?;
        let state = serde_json::from_slice(&sealed.read(STATE)?).map_err(|e| bad(dir, &e))?;
        let text = |name| String::from_utf8(sealed.read(name)?).map_err(|e| bad(dir, &e));
        let (metrics, self_test) = (text(METRICS)?, text(SELF_TEST)?);
        let watch = Watch::from_json(&text(WATCH)?).map_err(|e| bad(dir, &e))?;
        Ok(Read { sealed, tensors, state, found: Found { metrics, self_test, watch } })
    }
}

/// The checkpoint that a run goes on from: the one that `out` was made from already, or the newest good one, which is another run's
/// and to be gone on from or went on from another itself.
fn origin(
    out: &Path,
    dir: &Path,
    stage: &StagePlan,
    (earlier, again): (Earlier, bool),
) -> Result<Option<InputRef>, Failure> {
    let of = |sealed: &Sealed| -> Result<Option<InputRef>, Failure> {
        let inputs = &sealed.manifest().inputs;
        let Some(origin) = inputs.iter().find(|input| input.role == ROLE) else {
            return Ok(None);
        };
        let mut same = stage.clone();
        same.inputs.push(origin.clone());
        Ok((same.key()?.0 == sealed.manifest().key).then(|| origin.clone()))
    };
    if !again
        && let Ok(sealed) = Sealed::open_any(out)
        && let Some(origin) = of(&sealed)?
    {
        return Ok(Some(origin));
    }
    let key = stage.key()?.0;
    let Some(newest) = steps(dir)?.iter().rev().find_map(|dir| Read::open(dir).ok()) else {
        return Ok(None);
    };
    let newest = newest.sealed;
    match (of(&newest)?, earlier) {
        (Some(_), Earlier::Restart) => Ok(None),
        (Some(origin), _) => Ok(Some(origin)),
        (None, Earlier::ResetOptimizer) if newest.manifest().key != key => {
            Ok(Some(newest.input(ROLE)))
        }
        (None, _) => Ok(None),
    }
}

/// Directories of checkpoints, oldest first.
fn steps(dir: &Path) -> Result<Vec<PathBuf>, Failure> {
    let names = children(dir)?.into_iter().filter(|name| name.starts_with(STEP));
    Ok(names.map(|name| dir.join(name)).collect())
}

fn shown(dir: &Path) -> String {
    dir.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn bad(dir: &Path, error: &dyn std::fmt::Display) -> Failure {
    Failure::input(format!("{}: {error}", dir.display()))
}

fn write_tensors(draft: &Draft, tensors: &Tensors) -> Result<(), Failure> {
    weights::write(draft, TENSORS, tensors, StoredType::F32)
}

fn tensors(sealed: &Sealed) -> Result<Tensors, Failure> {
    let bytes = sealed.read(TENSORS)?;
    Tensors::from_safetensors(&[&bytes]).map_err(|e| bad(sealed.dir(), &e))
}
