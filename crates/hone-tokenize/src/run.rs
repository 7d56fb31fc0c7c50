//! The stage: rendered rows in, packs out.

use std::path::PathBuf;

use hone_cli::{Common, Context, Exit, Failure, Outcome, Pipeline, StagePlan, run_stage};
use hone_schema::{ArtefactKind, InputRef, Pack, Prompt, Reject, Rendered, Split};
use hone_store::{Draft, ModelDir, Sealed, StoreError};
use hone_tokens::{
    PromptIds, Reason, Refusal, Row, Rules, TooLong, Vocab, assemble, best_fit, one_each,
    prompt_of, tokenize as tokenize_row,
};
use rayon::prelude::*;
use serde_json::{Value, json};

use crate::args::Config;
use crate::tally::{Conserved, Tally};

/// Longest file beside the weights of a model that is read, in bytes.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// Packs written at a time.
const PACKS_A_BATCH: usize = 1024;

/// The table of rendered rows.
const RENDERED: &str = "rendered.parquet";

/// Everything the stage reads, open.
pub(crate) struct Inputs {
    pub(crate) config: Config,
    pub(crate) rendered: Sealed,
    pub(crate) rules: Rules,
    pub(crate) vocab: Vocab,
    tokenizer_json: Vec<u8>,
    eos: Vec<u32>,
    refs: Vec<InputRef>,
}

/// Runs the stage.
pub(crate) fn tokenize(ctx: &Context, common: &Common) -> Result<Exit, Failure> {
    let pipeline = Pipeline::load(common)?;
    let inputs = Inputs::open(&pipeline)?;
    let plan = StagePlan {
        stage: "tokenize",
        kind: ArtefactKind::Packs,
        dir: pipeline.dir("tokenize"),
        config: serde_json::to_value(&inputs.config).expect("the configuration is plain data"),
        inputs: inputs.refs.clone(),
    };
    run_stage(ctx, common, plan, |draft, _| work(ctx, &inputs, draft))
}

impl Inputs {
    /// Opens what the pipeline names.
    pub(crate) fn open(pipeline: &Pipeline) -> Result<Self, Failure> {
        let config: Config = pipeline.stage("tokenize")?;
        let config = config.check().map_err(|failure| pipeline.at("tokenize", failure))?;
        let rendered = Sealed::open(&pipeline.dir("template"), ArtefactKind::Rendered)?;
        let source = TokenizerSource::open(pipeline, &config)?;
        let tokenizer_json = source.read("tokenizer.json")?.ok_or_else(|| {
            Failure::input(format!("{}: there is no tokenizer.json", source.dir.display()))
                .hint("hone needs the tokenizer in the form of the tokenizers library")
        })?;
        let wrong = |e: &dyn std::fmt::Display| {
            Failure::input(format!("{}: {e}", source.dir.join("tokenizer.json").display()))
        };
        let mut vocab = Vocab::from_json(&tokenizer_json).map_err(|e| wrong(&e))?;
        for token in &config.allow_in_messages {
            vocab
                .allow(token)
                .map_err(|e| Failure::usage(format!("tokenize.allow_in_messages: {e}")))?;
        }
        let bos = bos_of(&rendered)?;
        let rules = Rules {
            max_len: config.max_len,
            too_long: config.too_long,
            train_on: config.train_on,
            bos: bos.and_then(|token| vocab.id_of(&token)),
        };
        let refs = vec![rendered.input("rendered"), source.input()?];
        Ok(Inputs { eos: source.eos()?, config, rendered, rules, vocab, tokenizer_json, refs })
    }

    /// The rendered rows, a batch at a time.
    pub(crate) fn batches(
        &self,
    ) -> Result<impl Iterator<Item = Result<Vec<Rendered>, Failure>> + use<>, Failure> {
        let path = self.rendered.path(RENDERED);
        let batches = self.rendered.parquet(RENDERED)?;
        Ok(batches.map(move |batch| {
            let rows = Rendered::from_batch(&batch?);
            rows.map_err(|e| Failure::input(format!("{}: {e}", path.display())))
        }))
    }
}

/// Where the tokenizer lies: the base model, or a directory of its own.
struct TokenizerSource {
    dir: PathBuf,
    model: Option<ModelDir>,
}

impl TokenizerSource {
    fn open(pipeline: &Pipeline, config: &Config) -> Result<Self, Failure> {
        match &config.tokenizer {
            Some(dir) => Ok(TokenizerSource { dir: dir.clone(), model: None }),
            None => {
                let model = ModelDir::open(pipeline.need_base()?)?;
                Ok(TokenizerSource { dir: model.dir().to_owned(), model: Some(model) })
            }
        }
    }

    fn read(&self, name: &str) -> Result<Option<Vec<u8>>, Failure> {
        match &self.model {
            Some(model) => Ok(model.try_read(name, FILE_BYTES_MAX)?),
            None => {
                let path = self.dir.join(name);
                let is_there = hone_store::input::is_file(&path);
                let read = || hone_store::input::read(&path, FILE_BYTES_MAX);
                Ok(is_there.then(read).transpose()?)
            }
        }
    }

    fn input(&self) -> Result<InputRef, Failure> {
        let role = "tokenizer".to_owned();
        match &self.model {
            Some(model) => {
                Ok(model.input_of(&role, &["tokenizer.json", "generation_config.json"])?)
            }
            None => {
                let (sha256, _) = hone_store::input::hash(&self.dir.join("tokenizer.json"))?;
                Ok(InputRef { role, sha256 })
            }
        }
    }

    /// The ids that `generation_config.json` ends a text with.
    fn eos(&self) -> Result<Vec<u32>, Failure> {
        if self.model.is_none() {
            return Ok(Vec::new());
        }
        let name = "generation_config.json";
        let Some(bytes) = self.read(name)? else {
            return Ok(Vec::new());
        };
        let path = self.dir.join(name);
        let wrong = |what: String| Failure::input(format!("{}: {what}", path.display()));
        let config: Value = serde_json::from_slice(&bytes).map_err(|e| wrong(e.to_string()))?;
        let ids = match config.get("eos_token_id") {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(ids)) => ids.clone(),
            Some(id) => vec![id.clone()],
        };
        ids.iter()
            .map(|id| {
                let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
                id.ok_or_else(|| wrong("`eos_token_id` is neither an id nor a list of ids".into()))
            })
            .collect()
    }
}

/// The token that begins a text, by the template.
fn bos_of(rendered: &Sealed) -> Result<Option<String>, Failure> {
    let name = "template.json";
    let facts: Value = serde_json::from_slice(&rendered.read(name)?)
        .map_err(|e| Failure::input(format!("{}: {e}", rendered.path(name).display())))?;
    Ok(facts
        .get("bos_token")
        .and_then(Value::as_str)
        .filter(|token| !token.is_empty())
        .map(str::to_owned))
}

/// One rendered row's way through the stage.
type Made = Result<(Row, Option<PromptIds>), Refusal>;

/// What is kept of the rows until all have been seen.
#[derive(Default)]
struct Kept {
    splits: [Vec<Row>; 3],
    prompts: Vec<Prompt>,
    rejects: Vec<Reject>,
}

fn work(ctx: &Context, inputs: &Inputs, draft: &mut Draft) -> Result<Outcome, Failure> {
    let mut tally = Tally::new(&inputs.eos);
    let kept = read(ctx, inputs, &mut tally)?;
    if tally.rows() == 0 {
        return Err(nothing_left(&tally));
    }
    for (split, rows) in Split::ALL.iter().zip(&kept.splits) {
        if !rows.is_empty() {
            write_packs(inputs, draft, *split, rows, &mut tally)?;
        }
    }
    write_rows(draft, "prompts.parquet", &kept.prompts, Prompt::to_batch)?;
    write_rows(draft, "rejects.parquet", &kept.rejects, Reject::to_batch)?;
    draft.write("tokenizer.json", &inputs.tokenizer_json, None)?;
    let stops = json!({"stop_ids": tally.stop_ids()});
    let stops = format!("{stops}\n");
    draft.write("stops.json", stops.as_bytes(), None)?;
    tally.warn(ctx, inputs.config.max_len);
    Ok(Outcome {
        report: tally.report(inputs.vocab.size(), inputs.config.max_len),
        summary: tally.summary(inputs.config.max_len),
        ledger: tally.ledger,
        exit: Exit::Done,
    })
}

/// Tokenizes every row, a batch at a time on all threads; the order is that of the input.
fn read(ctx: &Context, inputs: &Inputs, tally: &mut Tally) -> Result<Kept, Failure> {
    let n_rows = inputs.rendered.manifest().file(RENDERED);
    let mut progress = ctx.progress(n_rows.and_then(|f| f.rows).unwrap_or(0), "rows");
    let mut kept = Kept::default();
    let mut line = 0;
    for rows in inputs.batches()? {
        if let Some(exit) = ctx.stop() {
            return Err(Failure::stopped(exit));
        }
        let rows = rows?;
        let made: Vec<Made> = rows.par_iter().map(|row| make(inputs, row)).collect();
        for (rendered, made) in rows.iter().zip(made) {
            line += 1;
            match made {
                Ok((row, prompt)) => {
                    tally.pass(&row, prompt.as_ref());
                    kept.prompts.extend(prompt.map(|p| p.prompt));
                    let split = Split::ALL.iter().position(|s| *s == row.split);
                    kept.splits[split.expect("ALL has every split")].push(row);
                }
                Err(refusal) => {
                    stop_if_asked(inputs, rendered, &refusal)?;
                    tally.refuse(&rendered.source, &refusal);
                    kept.rejects.push(reject(rendered, line, &refusal));
                }
            }
        }
        progress.inc(rows.len() as u64);
    }
    progress.finish();
    Ok(kept)
}

fn make(inputs: &Inputs, rendered: &Rendered) -> Made {
    let mut row = tokenize_row(&inputs.vocab, rendered, &inputs.rules)?;
    // Only pictures need to know which bytes a token stands for.
    row.offsets = Vec::new();
    if rendered.split == Split::Train {
        return Ok((row, None));
    }
    let prompt = prompt_of(&inputs.vocab, rendered, &row.ids, inputs.rules.bos)
        .map_err(|error| Refusal::of_encoding(&error))?;
    Ok((row, prompt))
}

fn stop_if_asked(inputs: &Inputs, row: &Rendered, refusal: &Refusal) -> Result<(), Failure> {
    if inputs.config.too_long == TooLong::Error && refusal.reason == Reason::TooLong {
        let message = format!("row `{}` of `{}`: {}", row.id, row.source, refusal.detail);
        let hint = format!(
            "raise tokenize.max_len, or set tokenize.too_long to \"drop\" or \"truncate\"; \
             `hone-tokenize show --id {}` prints the row",
            row.id
        );
        return Err(Failure::input(message).hint(hint));
    }
    Ok(())
}

fn reject(row: &Rendered, line: u64, refusal: &Refusal) -> Reject {
    Reject {
        source: row.source.clone(),
        file: row.id.clone(),
        line,
        reason: refusal.reason.to_string(),
        detail: refusal.detail.clone(),
        raw: row.text.clone(),
    }
}

fn nothing_left(tally: &Tally) -> Failure {
    let mut reasons: Vec<(&str, u64)> = tally.ledger.rejected().into_iter().collect();
    reasons.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
    match reasons.first() {
        None => Failure::input("there is no rendered row")
            .hint("the reports of `hone-ingest` and `hone-template` say where the rows went"),
        Some((reason, n)) => {
            let message = format!(
                "none of {} rows can be trained: {n} of them for `{reason}`",
                tally.ledger.rows_in()
            );
            let hint = match Reason::ALL.into_iter().find(|r| r.as_str() == *reason) {
                Some(Reason::TooLong | Reason::ResponseCutOff) => "raise tokenize.max_len",
                Some(Reason::StopInPieces | Reason::NoStop) => {
                    "choose a template that ends its responses with a token of this tokenizer"
                }
                _ => "`hone-tokenize show` prints a row with the reason why it is not taken",
            };
            Failure::input(message).hint(hint)
        }
    }
}

fn write_packs(
    inputs: &Inputs,
    draft: &Draft,
    split: Split,
    rows: &[Row],
    tally: &mut Tally,
) -> Result<(), Failure> {
    let lens: Vec<u32> = rows.iter().map(|row| row.ids.len() as u32).collect();
    let bins = if inputs.config.pack {
        best_fit(&lens, inputs.config.max_len)
    } else {
        one_each(rows.len())
    };
    let mut file = draft.ipc(&format!("{split}.arrow"), Pack::schema())?;
    let mut packed = Conserved::default();
    for bins in bins.chunks(PACKS_A_BATCH) {
        let packs: Vec<Pack> = bins.iter().map(|docs| assemble(rows, docs)).collect();
        file.write(&Pack::to_batch(&packs)?)?;
        tally.packs(split, &packs);
        packed.add(&packs);
    }
    Conserved::rows(rows).check(&packed, split)?;
    Ok(file.finish()?)
}

fn write_rows<T>(
    draft: &Draft,
    name: &str,
    rows: &[T],
    to_batch: impl Fn(&[T]) -> Result<arrow::array::RecordBatch, hone_schema::RowError>,
) -> Result<(), Failure> {
    let mut file = draft.parquet(name, to_batch(&[])?.schema())?;
    for rows in rows.chunks(PACKS_A_BATCH) {
        file.write(&to_batch(rows)?)?;
    }
    file.finish().map_err(|e: StoreError| e.into())
}
