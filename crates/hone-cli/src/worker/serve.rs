//! The worker's side.

use std::io::{BufWriter, Write, stdin, stdout};
use std::sync::mpsc::sync_channel;

use arrow::array::RecordBatch;
use rayon::prelude::*;
use rustix::process::{Resource, Rlimit, setrlimit};
use serde_json::{Value, json};

use super::frame::{self, Tag};
use super::{decode_rows, join};
use crate::{Exit, Failure};

/// Rows that are answered together: few enough to keep all threads busy with one batch.
const CHUNK_ROWS: usize = 128;

/// Is a worker until its stage closes the pipe: takes its limits, builds what answers rows from the job, greets, and answers
/// batch after batch, each in chunks on all threads.
///
/// # Errors
/// Pipes that break. What `build` and the answers fail with goes to the stage.
pub fn serve<A>(build: impl FnOnce(&[u8]) -> Result<(Vec<u8>, A), Failure>) -> Result<Exit, Failure>
where
    A: Fn(RecordBatch) -> Result<Vec<u8>, Failure> + Sync,
{
    let broken = |e: std::io::Error| Failure::environment(format!("a worker's pipe broke: {e}"));
    let mut from = stdin().lock();
    let mut to = BufWriter::new(stdout().lock());
    let Some((_, memory)) = frame::read(&mut from).map_err(broken)? else {
        return Ok(Exit::Done);
    };
    let limit = <[u8; 8]>::try_from(memory.as_slice()).map(u64::from_le_bytes);
    limit_memory(limit.map_err(|_| Failure::environment("a worker was given no limit"))?)?;
    let Some((_, job)) = frame::read(&mut from).map_err(broken)? else {
        return Ok(Exit::Done);
    };
    let built = build(&job).map(|(greeting, answers)| (greeting, Some(answers)));
    let (greeting, answers) = built.map_or_else(|e| (Err(e), None), |(g, a)| (Ok(g), a));
    say(&mut to, greeting).map_err(broken)?;
    let Some(answers) = answers else {
        return Ok(Exit::Done);
    };
    drop((from, to));
    converse(&answers).map_err(broken)?;
    Ok(Exit::Done)
}

/// Answers batches until the pipe ends: one is read and one is written while another is worked on.
fn converse(
    answers: &(impl Fn(RecordBatch) -> Result<Vec<u8>, Failure> + Sync),
) -> std::io::Result<()> {
    let (give, given) = sync_channel(1);
    let (tell, told) = sync_channel(1);
    std::thread::scope(|threads| {
        let reader = threads.spawn(move || {
            let mut from = stdin().lock();
            while let Some((_, bytes)) = frame::read(&mut from)? {
                if give.send(bytes).is_err() {
                    break;
                }
            }
            Ok(())
        });
        let writer = threads.spawn(move || {
            let mut to = BufWriter::new(stdout().lock());
            told.iter().try_for_each(|answer| say(&mut to, answer))
        });
        for bytes in given {
            let answer = decode_rows(&bytes).and_then(|rows| in_chunks(&rows, answers));
            if tell.send(answer).is_err() {
                break;
            }
        }
        drop(tell);
        let joined = |thread: std::thread::ScopedJoinHandle<'_, std::io::Result<()>>| {
            thread.join().unwrap_or_else(|_| Err(std::io::Error::other("a thread panicked")))
        };
        joined(writer).and(joined(reader))
    })
}

/// The answers to the chunks of a batch, in order.
fn in_chunks(
    rows: &RecordBatch,
    answer: &(impl Fn(RecordBatch) -> Result<Vec<u8>, Failure> + Sync),
) -> Result<Vec<u8>, Failure> {
    let starts: Vec<usize> = (0..rows.num_rows()).step_by(CHUNK_ROWS).collect();
    let chunk = |start: usize| rows.slice(start, CHUNK_ROWS.min(rows.num_rows() - start));
    let answers: Vec<_> = starts.into_par_iter().map(|start| answer(chunk(start))).collect();
    let answers = answers.into_iter().collect::<Result<Vec<_>, _>>()?;
    Ok(join(&answers.iter().map(Vec::as_slice).collect::<Vec<_>>()))
}

/// What the kernel refuses beyond: allocations, not mapped files or address space that a thread only reserves.
pub(super) fn limit_memory(bytes: u64) -> Result<(), Failure> {
    let limit = |bytes| Rlimit { current: Some(bytes), maximum: Some(bytes) };
    setrlimit(Resource::Data, limit(bytes))
        .and_then(|()| setrlimit(Resource::Core, limit(0)))
        .map_err(|e| Failure::environment(format!("cannot limit a worker's memory: {e}")))
}

fn say(to: &mut impl Write, answer: Result<Vec<u8>, Failure>) -> std::io::Result<()> {
    match answer {
        Ok(bytes) => frame::write(to, Tag::Data, &bytes),
        Err(failure) => frame::write(to, Tag::Failure, to_json(&failure).to_string().as_bytes()),
    }
}

fn to_json(failure: &Failure) -> Value {
    json!({"exit": failure.exit as u8, "message": failure.message, "hint": failure.hint})
}

/// The failure of a frame.
pub(super) fn from_json(bytes: &[u8]) -> Failure {
    let value: Value = serde_json::from_slice(bytes).unwrap_or_default();
    let text = |key: &str| value[key].as_str().map(str::to_owned);
    let exits = [Exit::GateFailed, Exit::Usage, Exit::Input, Exit::Environment];
    let exit = exits.into_iter().find(|exit| value["exit"] == *exit as u8);
    Failure {
        exit: exit.unwrap_or(Exit::Environment),
        message: text("message").unwrap_or_else(|| "a worker failed without a word".to_owned()),
        hint: text("hint"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_goes_through_the_pipe() {
        let failure = Failure::input("row 3").hint("look");
        let back = from_json(to_json(&failure).to_string().as_bytes());
        assert_eq!(
            (back.exit, back.message, back.hint),
            (failure.exit, failure.message, failure.hint)
        );
        assert_eq!(from_json(b"").exit, Exit::Environment);
    }
}
