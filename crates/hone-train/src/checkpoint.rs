//! Checkpoints: sealed directories `step-<n>` beside the output. The newest that verifies, and whose key is this run's, is taken.

use std::path::{Path, PathBuf};

use hone_cli::{Context, Failure};
use hone_kernels::Cpu;
use hone_learn::Learner;
use hone_model::{StoredType, Tensors};
use hone_schema::{ArtefactKind, Ledger, Program, Sha256Hex};
use hone_store::{Draft, Seal, Sealed, children, remove_sealed, sweep_all};
use serde_json::Value;

/// Checkpoints kept: the newest, and one before it in case the newest is lost to the disk.
const KEPT: usize = 2;

const TENSORS: &str = "state.safetensors";
const STATE: &str = "state.json";
const METRICS: &str = "metrics.jsonl";
const SELF_TEST: &str = "self_test.json";

/// What a run has found out so far, word for word, so that a resumed run says the same.
pub(crate) struct Found {
    /// The lines of the metrics.
    pub(crate) metrics: String,
    /// The self-test of step 0, as JSON.
    pub(crate) self_test: String,
}

/// Where a run keeps its checkpoints, and the key that makes them its own.
pub(crate) struct Checkpoints {
    dir: PathBuf,
    key: Sha256Hex,
    program: Program,
}

fn name(step: u64) -> String {
    format!("step-{step:09}")
}

impl Checkpoints {
    /// The checkpoints of the run that writes `out`.
    pub(crate) fn beside(out: &Path, key: Sha256Hex, program: Program) -> Self {
        let stem = out.file_name().map_or("train".into(), |name| name.to_string_lossy());
        Checkpoints { dir: out.with_file_name(format!("{stem}-checkpoints")), key, program }
    }

    /// A short name of this run, the same after a restart.
    pub(crate) fn run(&self) -> &str {
        self.key.short()
    }

    /// Seals the learner's state and what was found so far, then drops older checkpoints.
    pub(crate) fn save(
        &self,
        learner: &Learner<Cpu>,
        metrics: &str,
        self_test: &str,
    ) -> Result<(), Failure> {
        let (tensors, state) = learner.state();
        let bytes = tensors
            .to_safetensors(StoredType::F32)
            .map_err(|e| Failure::environment(e.to_string()))?;
        let draft = Draft::open(&self.dir.join(name(learner.step())))?;
        draft.write(TENSORS, &bytes, None)?;
        draft.write(STATE, state.to_string().as_bytes(), None)?;
        draft.write(METRICS, metrics.as_bytes(), None)?;
        draft.write(SELF_TEST, self_test.as_bytes(), None)?;
        draft.seal(Seal {
            kind: ArtefactKind::Checkpoint,
            stage: "train".to_owned(),
            key: self.key.clone(),
            program: self.program.clone(),
            config: Value::Null,
            inputs: Vec::new(),
            ledger: Ledger::default(),
            report: Value::Null,
        })?;
        self.keep(KEPT)
    }

    /// Puts the learner where the newest good checkpoint of this run was, and returns the metrics up to there; `None` when there is
    /// none, and the run starts at step 0.
    pub(crate) fn resume(
        &self,
        ctx: &Context,
        learner: &mut Learner<Cpu>,
    ) -> Result<Option<Found>, Failure> {
        for name in children(&self.dir)?.iter().rev() {
            let dir = self.dir.join(name);
            match self.read(&dir) {
                Ok(None) => {}
                Ok(Some((tensors, state, found))) => {
                    learner
                        .restore(&tensors, &state)
                        .map_err(|e| Failure::input(format!("{}: {e}", dir.display())))?;
                    ctx.note(format!("train: resumes after step {} ({})", learner.step(), name));
                    return Ok(Some(found));
                }
                Err(failure) => ctx.warn(format!("passing over a checkpoint: {failure}")),
            }
        }
        Ok(None)
    }

    fn read(&self, dir: &Path) -> Result<Option<(Tensors, Value, Found)>, Failure> {
        let sealed = Sealed::open(dir, ArtefactKind::Checkpoint)?;
        if sealed.manifest().key != self.key {
            return Ok(None);
        }
        let bad = |e: &dyn std::fmt::Display| Failure::input(format!("{}: {e}", dir.display()));
        let bytes = sealed.read(TENSORS)?;
        let tensors = Tensors::from_safetensors(&[&bytes]).map_err(|e| bad(&e))?;
        let state = serde_json::from_slice(&sealed.read(STATE)?).map_err(|e| bad(&e))?;
        let text = |name| String::from_utf8(sealed.read(name)?).map_err(|e| bad(&e));
        let found = Found { metrics: text(METRICS)?, self_test: text(SELF_TEST)? };
        Ok(Some((tensors, state, found)))
    }

    /// Drops all checkpoints of this run but the newest `n`, and all of other runs.
    fn keep(&self, n: usize) -> Result<(), Failure> {
        let mut kept = 0;
        for name in children(&self.dir)?.iter().rev() {
            let dir = self.dir.join(name);
            let is_ours = Sealed::open(&dir, ArtefactKind::Checkpoint)
                .is_ok_and(|sealed| sealed.manifest().key == self.key);
            if is_ours && kept < n {
                kept += 1;
            } else {
                remove_sealed(&dir)?;
            }
        }
        Ok(())
    }

    /// Drops all, and what killed runs left beside them: the run is sealed.
    pub(crate) fn clear(&self) -> Result<(), Failure> {
        self.keep(0)?;
        Ok(sweep_all(&self.dir)?)
    }
}
