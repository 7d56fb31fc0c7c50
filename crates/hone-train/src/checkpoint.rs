//! Checkpoints: sealed directories `step-<n>` beside the output. The newest that verifies, and whose key is this run's, is taken.

use std::path::{Path, PathBuf};

use hone_cli::{Context, Failure};
use hone_kernels::Cpu;
use hone_learn::Learner;
use hone_model::{StoredType, Tensors};
use hone_schema::{ArtefactKind, Ledger, Program, Sha256Hex};
use hone_store::{Draft, Seal, Sealed, children, remove_sealed};
use serde_json::Value;

/// Checkpoints kept: the newest, and one before it in case the newest is lost to the disk.
const KEPT: usize = 2;

const TENSORS: &str = "state.safetensors";
const STATE: &str = "state.json";
const METRICS: &str = "metrics.jsonl";

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

    /// Seals the learner's state and the metrics so far, then drops older checkpoints.
    pub(crate) fn save(&self, learner: &Learner<Cpu>, metrics: &str) -> Result<(), Failure> {
        let (tensors, state) = learner.state();
        let bytes = tensors
            .to_safetensors(StoredType::F32)
            .map_err(|e| Failure::environment(e.to_string()))?;
        let draft = Draft::open(&self.dir.join(name(learner.step())))?;
        draft.write(TENSORS, &bytes, None)?;
        draft.write(STATE, state.to_string().as_bytes(), None)?;
        draft.write(METRICS, metrics.as_bytes(), None)?;
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
    ) -> Result<Option<String>, Failure> {
        for name in children(&self.dir)?.iter().rev() {
            let dir = self.dir.join(name);
            match self.read(&dir) {
                Ok(None) => {}
                Ok(Some((tensors, state, metrics))) => {
                    learner
                        .restore(&tensors, &state)
                        .map_err(|e| Failure::input(format!("{}: {e}", dir.display())))?;
                    ctx.note(format!("train: resumes after step {} ({})", learner.step(), name));
                    return Ok(Some(metrics));
                }
                Err(failure) => ctx.warn(format!("passing over a checkpoint: {failure}")),
            }
        }
        Ok(None)
    }

    fn read(&self, dir: &Path) -> Result<Option<(Tensors, Value, String)>, Failure> {
        let sealed = Sealed::open(dir, ArtefactKind::Checkpoint)?;
        if sealed.manifest().key != self.key {
            return Ok(None);
        }
        let bad = |e: &dyn std::fmt::Display| Failure::input(format!("{}: {e}", dir.display()));
        let bytes = sealed.read(TENSORS)?;
        let tensors = Tensors::from_safetensors(&[&bytes]).map_err(|e| bad(&e))?;
        let state = serde_json::from_slice(&sealed.read(STATE)?).map_err(|e| bad(&e))?;
        let metrics = String::from_utf8(sealed.read(METRICS)?).map_err(|e| bad(&e))?;
        Ok(Some((tensors, state, metrics)))
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

    /// Drops all: the run is sealed.
    pub(crate) fn clear(&self) -> Result<(), Failure> {
        self.keep(0)
    }
}
