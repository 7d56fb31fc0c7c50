//! A worker as a child process.

use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use super::WORKER;
use super::frame::{self, Tag};
use crate::Failure;

/// What is kept of a worker's last words, in bytes.
const LAST_WORDS_BYTES: usize = 4096;

/// What a worker may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Memory, in bytes, for each of its threads on top of `memory`.
    pub memory_per_thread: u64,
    /// Memory, in bytes.
    pub memory: u64,
    /// Time to get ready.
    pub start: Duration,
    /// Time for one batch; a single row has as much.
    pub batch: Duration,
}

impl Limits {
    pub(super) fn bytes(&self, threads: Option<usize>) -> u64 {
        let threads =
            threads.or_else(|| std::thread::available_parallelism().ok().map(usize::from));
        self.memory + self.memory_per_thread * threads.unwrap_or(1) as u64
    }
}

/// A running worker.
pub(super) struct Process {
    child: Child,
    /// Frames on their way; a thread writes them, so that a worker that does not read holds nobody up.
    to: Option<Sender<Vec<u8>>>,
    answers: Receiver<std::io::Result<(Tag, Vec<u8>)>>,
    last_words: Option<JoinHandle<Vec<u8>>>,
}

/// Why there is no answer.
pub(super) struct Death {
    /// In words.
    pub(super) why: String,
}

impl Process {
    /// Starts a worker and gives it its limits and its job.
    pub(super) fn start(
        limits: &Limits,
        threads: Option<usize>,
        job: &[u8],
    ) -> Result<Self, Failure> {
        let cannot =
            |e: std::io::Error| Failure::environment(format!("cannot start a worker: {e}"));
        let mut command = Command::new(std::env::current_exe().map_err(cannot)?);
        command.arg(WORKER);
        if let Some(threads) = threads {
            command.args(["--threads", &threads.to_string()]);
        }
        // What it says when it dies is kept in the output: it may not depend on the environment.
        command.env_remove("RUST_BACKTRACE");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // Signals of a terminal are for the stage, which ends its worker by closing the pipe.
        command.process_group(0);
        let mut child = command.spawn().map_err(cannot)?;
        let mut out = child.stdout.take().expect("it was asked for");
        let (send, answers) = channel();
        std::thread::spawn(move || {
            while let Some(answer) = frame::read(&mut out).transpose() {
                let is_end = answer.is_err();
                if send.send(answer).is_err() || is_end {
                    break;
                }
            }
        });
        let mut err = child.stderr.take().expect("it was asked for");
        let last_words = std::thread::spawn(move || first_bytes(&mut err));
        let mut pipe = child.stdin.take().expect("it was asked for");
        let (to, frames) = channel::<Vec<u8>>();
        // Ends with the sender, or with the worker.
        std::thread::spawn(move || {
            frames.iter().all(|bytes| frame::write(&mut pipe, Tag::Data, &bytes).is_ok())
        });
        let mut process = Process { child, to: Some(to), answers, last_words: Some(last_words) };
        // A worker that is dead already is noticed where its answer is missed.
        process.send(limits.bytes(threads).to_le_bytes().to_vec());
        process.send(job.to_vec());
        Ok(process)
    }

    /// Sends a frame. A broken pipe is noticed where the answer is missed.
    pub(super) fn send(&mut self, bytes: Vec<u8>) {
        if let Some(to) = &self.to
            && to.send(bytes).is_err()
        {
            self.to = None;
        }
    }

    /// The next answer, within `time`.
    pub(super) fn answer(&mut self, time: Duration) -> Result<(Tag, Vec<u8>), Death> {
        match self.answers.recv_timeout(time) {
            Ok(Ok(answer)) => Ok(answer),
            Err(RecvTimeoutError::Timeout) => {
                self.end();
                Err(Death { why: format!("it took longer than {} s", time.as_secs()) })
            }
            Ok(Err(_)) | Err(RecvTimeoutError::Disconnected) => Err(Death { why: self.autopsy() }),
        }
    }

    fn end(&mut self) {
        self.to = None;
        // Dead already, or dead now: both are what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// What it died of.
    fn autopsy(&mut self) -> String {
        self.to = None;
        let status = self.child.wait();
        let words = self.last_words.take().and_then(|thread| thread.join().ok());
        let words = String::from_utf8_lossy(&words.unwrap_or_default()).trim().to_owned();
        if words.contains("memory allocation of") {
            return "it asked for more memory than it may have".to_owned();
        }
        let first: String = words.lines().next().unwrap_or_default().chars().take(200).collect();
        match status {
            Ok(status) => match (status.signal(), status.code()) {
                (Some(signal), _) => format!("signal {signal} ended it {first}"),
                (None, Some(code)) => format!("it ended with code {code} {first}"),
                (None, None) => format!("it ended {first}"),
            },
            Err(e) => format!("it is gone: {e}"),
        }
        .trim_end()
        .to_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

/// Reads to the end and keeps the first bytes.
fn first_bytes(from: &mut impl Read) -> Vec<u8> {
    let (mut kept, mut buffer) = (Vec::new(), [0; LAST_WORDS_BYTES]);
    while let Ok(n) = from.read(&mut buffer) {
        if n == 0 {
            break;
        }
        let room = LAST_WORDS_BYTES - kept.len();
        kept.extend_from_slice(&buffer[..n.min(room)]);
    }
    kept
}
