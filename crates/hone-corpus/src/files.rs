//! The small files: all but the plain text for pre-training, which is large and never kept.

use serde::Serialize;

use crate::documents::Stream;
use crate::rows::{evaluation, instructions, questions, text_rows};
use crate::split::Part;
use crate::{World, json_task};

/// Documents for perplexity: as many as give its second digit a meaning, and few to evaluate.
pub const N_HELDOUT: u64 = 300;

/// Documents for replay: at a tenth of the rows, three epochs of tuning draw 270.
pub const N_REPLAY: u64 = 600;

/// One JSONL file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SmallFile {
    /// Its name among all files of the generator.
    pub name: &'static str,
    /// Where the repository keeps it, under `data/`.
    pub kept_at: &'static str,
    /// Its lines.
    pub n_rows: u64,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// Every small file, made from one seed.
#[must_use]
pub fn small_files(world: &World, seed: u64) -> Vec<SmallFile> {
    let text = |stream, n_rows| text_rows(world, seed, stream, n_rows);
    vec![
        file("instructions.jsonl", "tiny/instructions.jsonl", instructions(world, seed)),
        file("eval_dev.jsonl", "tiny/eval_dev.jsonl", evaluation(world, seed, Part::Dev)),
        file("eval_test.jsonl", "tiny/eval_test.jsonl", evaluation(world, seed, Part::Test)),
        file("questions.jsonl", "tiny/questions.jsonl", questions(world, seed)),
        file("replay.jsonl", "tiny/replay.jsonl", text(Stream::Replay, N_REPLAY)),
        file("plain_heldout.jsonl", "tiny/plain_heldout.jsonl", text(Stream::Heldout, N_HELDOUT)),
        file("json_train.jsonl", "json_task/train.jsonl", json_task::train(seed)),
        file("json_test.jsonl", "json_task/test.jsonl", json_task::test(seed)),
    ]
}

/// One row as one line of JSON, with its line end.
#[must_use]
pub fn line(row: &impl Serialize) -> Vec<u8> {
    // Rows are structs of strings: no map key that is not a string, no number that is not finite.
    let mut bytes = serde_json::to_vec(row).expect("rows hold nothing that JSON cannot");
    bytes.push(b'\n');
    bytes
}

fn file<R: Serialize>(
    name: &'static str,
    kept_at: &'static str,
    rows: impl IntoIterator<Item = R>,
) -> SmallFile {
    let mut small = SmallFile { name, kept_at, n_rows: 0, bytes: Vec::new() };
    for row in rows {
        small.bytes.extend(line(&row));
        small.n_rows += 1;
    }
    small
}
