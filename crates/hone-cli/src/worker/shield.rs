//! A command that runs foreign code once, for a person: the same program again, with limits.
//!
//! What it prints goes where it would have gone. When it asks for too much, that is an exit code and a message, and not the end of
//! a process in the middle of a word.

use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use super::process::Limits;
use super::serve::limit_memory;
use crate::{Common, Exit, Failure};

/// Set in the environment of a program that runs behind a shield.
const BEHIND: &str = "HONE_SHIELDED";

/// Time between two looks at whether it is done.
const LOOK: Duration = Duration::from_millis(5);

/// Runs `run` in a process of its own with limits of memory and time; `what` is foreign, in words. Time is that of a batch.
///
/// # Errors
/// What `run` says; a process that died or took too long.
pub fn shielded(
    what: &str,
    limits: Limits,
    common: &Common,
    run: impl FnOnce() -> Result<Exit, Failure>,
) -> Result<Exit, Failure> {
    if std::env::var_os(BEHIND).is_some() {
        limit_memory(limits.bytes(common.threads))?;
        return run();
    }
    let cannot = |e: std::io::Error| Failure::environment(format!("cannot start a worker: {e}"));
    let mut command = Command::new(std::env::current_exe().map_err(cannot)?);
    command.args(std::env::args_os().skip(1)).env(BEHIND, "1").env_remove("RUST_BACKTRACE");
    let mut child = command.spawn().map_err(cannot)?;
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().map_err(cannot)? {
            return exit_of(what, status);
        }
        if start.elapsed() > limits.batch {
            // Dead already, or dead now: both are what is wanted.
            let _ = child.kill();
            let _ = child.wait();
            let seconds = limits.batch.as_secs();
            return Err(Failure::input(format!("the {what} took longer than {seconds} s")));
        }
        std::thread::sleep(LOOK);
    }
}

fn exit_of(what: &str, status: ExitStatus) -> Result<Exit, Failure> {
    let known = [
        Exit::Done,
        Exit::GateFailed,
        Exit::Usage,
        Exit::Input,
        Exit::Environment,
        Exit::Interrupted,
        Exit::Terminated,
    ];
    match known.into_iter().find(|exit| status.code() == Some(i32::from(*exit as u8))) {
        Some(exit) => Ok(exit),
        None => Err(Failure::input(format!("the {what} took down the program that ran it"))
            .hint("it asks for more memory than it may have, or it is damaged")),
    }
}
