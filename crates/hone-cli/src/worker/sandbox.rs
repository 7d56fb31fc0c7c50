//! The stage's side: batches in, answers out, in order, whatever happens to the workers.

use std::collections::VecDeque;

use arrow::array::RecordBatch;

use super::encode_rows;
use super::frame::Tag;
use super::parts::split_all;
use super::process::{Death, Limits, Process};
use super::serve::from_json;
use crate::{Common, Context, Failure};

/// Batches under way: one that is worked on while another is read or written.
const UNDER_WAY: usize = 2;

/// Rows that may take a worker down before the stage gives up.
const DEATHS_MAX: usize = 64;

/// Rows that may do so while no row has been answered: then it is not the rows.
const DEATHS_AT_ONCE_MAX: usize = 3;

/// What became of a batch, or of a single row of it.
#[derive(Debug)]
pub enum Answer {
    /// What the worker says of the chunks of the batch, in order.
    Done(Vec<Vec<u8>>),
    /// These rows, of which there is one, take a worker down.
    Died {
        /// The row.
        rows: RecordBatch,
        /// How, in words.
        why: String,
    },
}

/// A worker and the batches that it has been given.
pub struct Sandbox {
    what: &'static str,
    job: Vec<u8>,
    limits: Limits,
    threads: Option<usize>,
    process: Process,
    waiting: VecDeque<RecordBatch>,
    is_proven: bool,
    deaths: usize,
}

impl Sandbox {
    /// Starts a worker on a job, `what` in words (`chat template`); with what it greets.
    ///
    /// # Errors
    /// What the worker says of the job; a job that takes it down.
    pub fn start(
        what: &'static str,
        job: Vec<u8>,
        limits: Limits,
        common: &Common,
    ) -> Result<(Self, Vec<u8>), Failure> {
        let threads = common.threads;
        let (process, greeting) = ready(what, &job, &limits, threads)?;
        let sandbox = Sandbox {
            what,
            job,
            limits,
            threads,
            process,
            waiting: VecDeque::new(),
            is_proven: false,
            deaths: 0,
        };
        Ok((sandbox, greeting))
    }

    /// Gives a batch to the worker, and the answers to those before it to `take`, until no more than one is under way beside it:
    /// that keeps the worker busy while the stage reads and writes.
    ///
    /// # Errors
    /// A signal to stop; those of the worker; those of `take`.
    pub fn feed(
        &mut self,
        ctx: &Context,
        rows: RecordBatch,
        take: impl FnMut(Answer) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        self.process.send(encode_rows(&rows)?);
        self.waiting.push_back(rows);
        self.drain(ctx, UNDER_WAY - 1, take)
    }

    /// Gives the answers that are left to `take`.
    ///
    /// # Errors
    /// As [`Sandbox::feed`].
    pub fn finish(
        &mut self,
        ctx: &Context,
        take: impl FnMut(Answer) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        self.drain(ctx, 0, take)
    }

    fn drain(
        &mut self,
        ctx: &Context,
        n_left: usize,
        mut take: impl FnMut(Answer) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        loop {
            if let Some(exit) = ctx.stop() {
                return Err(Failure::stopped(exit));
            }
            if self.waiting.len() <= n_left {
                return Ok(());
            }
            if let Some(answer) = self.pop()? {
                take(answer)?;
            }
        }
    }

    /// The answer to the oldest batch; `None` when all are answered. A batch that takes a worker down is answered row by row.
    fn pop(&mut self) -> Result<Option<Answer>, Failure> {
        while let Some(rows) = self.waiting.pop_front() {
            match self.process.answer(self.limits.batch) {
                Ok((Tag::Data, bytes)) => {
                    self.is_proven = true;
                    return Ok(Some(Answer::Done(split_all(&bytes)?)));
                }
                Ok((Tag::Failure, bytes)) => return Err(from_json(&bytes)),
                Err(Death { why }) if rows.num_rows() > 1 => {
                    tracing::warn!(%why, "a worker died; its rows are tried one at a time");
                    let singles = (0..rows.num_rows()).rev().map(|at| rows.slice(at, 1));
                    singles.for_each(|row| self.waiting.push_front(row));
                    self.restart()?;
                }
                Err(Death { why }) => {
                    self.count_death(&why)?;
                    self.restart()?;
                    return Ok(Some(Answer::Died { rows, why }));
                }
            }
        }
        Ok(None)
    }

    fn count_death(&mut self, why: &str) -> Result<(), Failure> {
        self.deaths += 1;
        let max = if self.is_proven { DEATHS_MAX } else { DEATHS_AT_ONCE_MAX };
        if self.deaths < max {
            return Ok(());
        }
        let message = format!("the {} takes down row after row: {why}", self.what);
        Err(Failure::input(message).hint("it is not one to work with; where is it from?"))
    }

    /// Another worker, with all batches that wait.
    fn restart(&mut self) -> Result<(), Failure> {
        (self.process, _) = ready(self.what, &self.job, &self.limits, self.threads)?;
        for rows in &self.waiting {
            self.process.send(encode_rows(rows)?);
        }
        Ok(())
    }
}

/// A worker that has greeted.
fn ready(
    what: &str,
    job: &[u8],
    limits: &Limits,
    threads: Option<usize>,
) -> Result<(Process, Vec<u8>), Failure> {
    let mut process = Process::start(limits, threads, job)?;
    match process.answer(limits.start) {
        Ok((Tag::Data, greeting)) => Ok((process, greeting)),
        Ok((Tag::Failure, bytes)) => Err(from_json(&bytes)),
        Err(Death { why }) => {
            let mib = limits.bytes(threads) >> 20;
            let failure = Failure::input(format!("the {what} took its worker down: {why}"));
            Err(failure.hint(format!(
                "it may take {mib} MiB and {} s; one that needs more is not one to work with",
                limits.start.as_secs()
            )))
        }
    }
}
