//! Exit codes, and failures that know theirs.

use hone_store::{ErrorClass, StoreError};

use crate::STAGES;

/// How a program of hone ends. A Rust panic (101) is a bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// The work is done, or was done before and is fresh.
    Done = 0,
    /// The work is done and sealed, but a gate failed: too many rows rejected, a score below its bar.
    GateFailed = 1,
    /// The flags or the pipeline file are wrong.
    Usage = 2,
    /// The input is refused.
    Input = 3,
    /// The machine is to blame: space, permission, a lock, a device.
    Environment = 4,
    /// Stopped cleanly by SIGINT.
    Interrupted = 130,
    /// Stopped cleanly by SIGTERM.
    Terminated = 143,
}

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        std::process::ExitCode::from(exit as u8)
    }
}

/// Why a program ends without its work done: a message, its causes, a hint, and an exit code.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    /// What went wrong, where: lower case, no full stop.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
}

impl Failure {
    fn new(exit: Exit, message: impl Into<String>) -> Self {
        Failure { exit, message: message.into(), hint: None }
    }

    /// Flags or pipeline file are wrong (2).
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }

    /// The input is refused (3).
    pub fn input(message: impl Into<String>) -> Self {
        Self::new(Exit::Input, message)
    }

    /// The machine is to blame (4).
    pub fn environment(message: impl Into<String>) -> Self {
        Self::new(Exit::Environment, message)
    }

    /// A signal asked to stop, and everything worth keeping is on disk.
    pub fn stopped(exit: Exit) -> Self {
        Self::new(exit, "stopped")
    }

    /// Adds what to do about it.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        let exit = match error.class() {
            ErrorClass::Input => Exit::Input,
            ErrorClass::Environment => Exit::Environment,
        };
        let hint = stage_hint(&error).or_else(|| error.hint());
        Failure { exit, message: error.to_string(), hint }
    }
}

/// The command that makes an artefact that is missing or damaged, where its path says whose it is.
fn stage_hint(error: &StoreError) -> Option<String> {
    let parts = error.path()?.iter().rev().take(2);
    let stage = parts.filter_map(|part| part.to_str()).find(|part| STAGES.contains(part))?;
    match error {
        StoreError::NotFound { .. } | StoreError::NotSealed { .. } | StoreError::NoFile { .. } => {
            Some(format!("run `hone-{stage}` first, or say with `--runs` where its output lies"))
        }
        StoreError::Manifest { .. } | StoreError::Changed { .. } => Some(format!(
            "run `hone-{stage} --force` to make it again; artefacts are not edited by hand"
        )),
        StoreError::Kind { .. } => Some(format!("run `hone-{stage}` to make it again")),
        _ => None,
    }
}

impl From<hone_schema::RowError> for Failure {
    fn from(error: hone_schema::RowError) -> Self {
        Failure::input(error.to_string())
    }
}
