//! `vocab`: a vocabulary from texts, as a sealed directory with a `tokenizer.json`.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use hone_cli::{Common, Context, Exit, Failure, Outcome, StagePlan, run_stage};
use hone_schema::{ArtefactKind, InputRef, Ledger};
use hone_tokens::{Vocab, VocabSpec, train_vocab};
use serde::Deserialize;
use serde_json::json;

use crate::args::VocabArgs;

/// Longest line read, in bytes: as ingest has it.
const LINE_BYTES_MAX: u64 = 16 << 20;

#[derive(Deserialize)]
struct Line {
    text: String,
}

/// Trains a vocabulary.
pub(crate) fn vocab(ctx: &Context, common: &Common, args: &VocabArgs) -> Result<Exit, Failure> {
    let dir = common
        .out
        .clone()
        .ok_or_else(|| Failure::usage("`vocab` needs `--out DIR`, the directory that it writes"))?;
    let spec = VocabSpec::new(args.size, args.specials.clone())
        .map_err(|e| Failure::usage(e.to_string()))?;
    let mut inputs = Vec::new();
    for (idx, path) in args.input.iter().enumerate() {
        let (sha256, _) = hone_store::input::hash(path)?;
        let role = format!("texts {idx}");
        inputs.push(InputRef { role, sha256 });
    }
    let plan = StagePlan {
        stage: "vocab",
        kind: ArtefactKind::Files,
        dir,
        config: json!({"size": args.size, "specials": args.specials}),
        inputs,
    };
    run_stage(ctx, common, plan, |draft, _| {
        let mut ledger = Ledger::default();
        let mut texts = Vec::new();
        for path in &args.input {
            let before = texts.len();
            read_texts(path, &mut texts)?;
            let source = path.file_name().unwrap_or_default().to_string_lossy();
            for _ in before..texts.len() {
                ledger.source(&source).pass();
            }
        }
        let bytes: usize = texts.iter().map(String::len).sum();
        let json = train_vocab(&texts, &spec);
        let size = Vocab::from_json(&json)
            .map_err(|e| Failure::environment(format!("the vocabulary does not read back: {e}")))?
            .size();
        if size < args.size {
            ctx.warn(format!("the texts have pairs for {size} tokens only"));
        }
        draft.write("tokenizer.json", &json, None)?;
        Ok(Outcome {
            ledger,
            report: json!({"size": size, "texts": texts.len(), "bytes": bytes}),
            exit: Exit::Done,
            summary: format!("{size} tokens from {} texts", texts.len()),
        })
    })
}

fn read_texts(path: &Path, texts: &mut Vec<String>) -> Result<(), Failure> {
    let mut reader = BufReader::new(hone_store::input::open(path)?);
    let mut line = Vec::new();
    for line_no in 1u64.. {
        let wrong = |what: &dyn std::fmt::Display| {
            Failure::input(format!("{}:{line_no}: {what}", path.display()))
        };
        line.clear();
        let n = reader
            .by_ref()
            .take(LINE_BYTES_MAX + 1)
            .read_until(b'\n', &mut line)
            .map_err(|e| wrong(&e))?;
        if n == 0 {
            break;
        }
        if n as u64 > LINE_BYTES_MAX {
            return Err(wrong(&format!("the line is longer than {LINE_BYTES_MAX} bytes")));
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        let row: Line = serde_json::from_slice(&line)
            .map_err(|e| wrong(&e).hint("each line is a JSON object with a string `text`"))?;
        texts.push(row.text);
    }
    Ok(())
}
