//! `import`: a Parquet table of `input_ids` and `labels` as a sealed output, for training on labels that another tool made.
//!
//! Who wrote a token, and whether it should be trained, cannot be known from labels: such an output has no certificate, and its
//! report says so. What can be seen is checked: labels are ids or -100, documents are told apart without contradiction, every id
//! is one of the model's, and something is trained.

use std::path::PathBuf;

use hone_cli::{Common, Context, Exit, Failure, Outcome, Pipeline, StagePlan, run_stage};
use hone_schema::{
    ArtefactKind, InputRef, Kind, Ledger, Pack, Prompt, Reject, Roles, Split, TEXT, UNKNOWN,
};
use hone_store::{Draft, ForeignTable, IpcFile, ParquetFile};
use hone_tokens::{Counts, Reason, Refusal, Row, Taken, TooLong};
use serde_json::json;

use crate::args::{Config, split};
use crate::conserve::{Multiset, RoleKeys};
use crate::inputs::Tokenizer;
use crate::labels::{LabelledDoc, rows};
use crate::packs;
use crate::record::{self, AsideWriter};
use crate::tally::Tally;

/// Packs written at a time.
const PACKS_A_BATCH: usize = 256;

/// Which table, and as what.
#[derive(clap::Args)]
pub(crate) struct ImportArgs {
    /// Parquet table with `input_ids` and `labels`; `position_ids`, `seq_lengths` or a numbered `attention_mask` tell documents
    /// apart, `loss_weights`, `ids` and `sources` are taken where they are.
    #[arg(value_name = "FILE.parquet")]
    file: PathBuf,
    /// Split that the rows become.
    #[arg(long, value_name = "SPLIT", value_parser = split, default_value = "train")]
    split: Split,
    /// Name of the source, where rows do not name theirs; the file's name when not given.
    #[arg(long, value_name = "NAME")]
    source: Option<String>,
    /// Name of a source whose rows are replay; may be given several times.
    #[arg(long, value_name = "NAME")]
    replay: Vec<String>,
    /// Take packed rows apart, and pack their documents as the pipeline says. Without this a row stays one pack, in its order.
    #[arg(long)]
    unpack: bool,
}

/// What decides what becomes of a row.
struct Import<'a> {
    args: &'a ImportArgs,
    config: Config,
    tokenizer: Tokenizer,
    source: String,
    n_ids: u32,
}

/// Imports a table.
pub(crate) fn import(ctx: &Context, common: &Common, args: &ImportArgs) -> Result<Exit, Failure> {
    let pipeline = Pipeline::load(common)?;
    let (config, notes) = Config::read(&pipeline)?;
    notes.iter().for_each(|note| ctx.note(format!("tokenize: {note}")));
    if !matches!(config.too_long, TooLong::Drop | TooLong::Error) {
        let message =
            "rows that are imported are not cut: nothing says which of their tokens matter";
        return Err(Failure::usage(message).hint("add `--set tokenize.too_long=drop` or `=error`"));
    }
    let tokenizer = Tokenizer::open(&pipeline, &config)?;
    let (sha256, _) = hone_store::input::hash(&args.file)?;
    let stem = || args.file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let source = args.source.clone().unwrap_or_else(stem);
    let mut inputs = vec![InputRef { role: "rows".to_owned(), sha256 }];
    inputs.extend(tokenizer.refs.iter().cloned());
    let mut resolved = serde_json::to_value(&config).expect("the configuration is plain data");
    resolved["import"] = json!({"split": args.split.as_str(), "source": source,
        "replay": args.replay, "unpack": args.unpack});
    let plan = StagePlan {
        stage: "import",
        kind: ArtefactKind::Packs,
        dir: pipeline.dir("tokenize"),
        config: resolved,
        inputs,
    };
    let size = tokenizer.vocab.size() as u32;
    let n_ids = tokenizer.n_embeddings.unwrap_or(size);
    let import = Import { args, config, tokenizer, source, n_ids };
    run_stage(ctx, common, plan, |draft, _| import.work(ctx, draft))
}

/// Where documents go.
struct Sinks {
    tally: Tally,
    rejects: ParquetFile,
    refused: Vec<Reject>,
    /// With `--unpack`: the documents put aside, and their tokens.
    aside: Option<(AsideWriter, Multiset)>,
    /// Without: the file, and packs that wait to be written.
    file: Option<IpcFile>,
    packs: Vec<Pack>,
    /// Documents whose first token had a label.
    firsts: u64,
}

impl Import<'_> {
    fn work(&self, ctx: &Context, draft: &Draft) -> Result<Outcome, Failure> {
        let (args, max_len) = (self.args, self.config.max_len);
        let mut sinks = Sinks {
            tally: Tally::new(&self.tokenizer.eos),
            rejects: draft.parquet("rejects.parquet", Reject::schema())?,
            refused: Vec::new(),
            aside: None,
            file: None,
            packs: Vec::new(),
            firsts: 0,
        };
        if args.unpack {
            let aside = AsideWriter::new(draft, &format!("{}.rows", args.split))?;
            sinks.aside = Some((aside, Multiset::default()));
        } else {
            sinks.file = Some(draft.ipc(&format!("{}.arrow", args.split), Pack::schema())?);
        }
        self.read(ctx, &mut sinks)?;
        if sinks.tally.rows() == 0 {
            let at = args.file.display();
            return Err(Failure::input(format!("{at}: no row of it can be trained")).hint(
                "rows longer than tokenize.max_len, and rows without a label, are left out",
            ));
        }
        sinks.flush(args.split)?;
        let Sinks { mut tally, rejects, aside, file, firsts, .. } = sinks;
        mark_replay(&mut tally.ledger, &args.replay)?;
        rejects.finish()?;
        if let Some((aside, tokens)) = aside {
            let rows = (args.split, &aside.finish()?, tokens);
            packs::write(ctx, draft, &self.config, rows, &mut tally)?;
        }
        file.map(IpcFile::finish).transpose()?;
        draft.parquet("prompts.parquet", Prompt::schema())?.finish()?;
        draft.write("tokenizer.json", &self.tokenizer.json, None)?;
        let stops = format!("{}\n", json!({"stop_ids": tally.stop_ids()}));
        draft.write("stops.json", stops.as_bytes(), None)?;
        if firsts > 0 {
            ctx.warn(format!(
                "{firsts} documents have a label on their first token, which nothing predicts: it is not trained"
            ));
        }
        tally.warn(ctx, max_len);
        let mut report = tally.report(self.tokenizer.vocab.size(), max_len, None);
        report["certificate"] =
            "none: the labels were imported, and nothing says who wrote a token".into();
        report["labelled_first_tokens"] = firsts.into();
        let summary = tally.summary(max_len);
        Ok(Outcome { report, summary, ledger: tally.ledger, exit: Exit::Done })
    }

    fn read(&self, ctx: &Context, sinks: &mut Sinks) -> Result<(), Failure> {
        let at = |row: u64| format!("{}, row {row}", self.args.file.display());
        let mut first = 0;
        for batch in ForeignTable::open(&self.args.file)? {
            if let Some(exit) = ctx.stop() {
                return Err(Failure::stopped(exit));
            }
            let batch = batch?;
            let labelled = rows(&batch).map_err(|fault| {
                Failure::input(format!("{}: {}", at(first + fault.row as u64), fault.what))
                    .hint("`hone-tokenize export` writes such a table; its columns are described in the README")
            })?;
            for (row, labelled) in (first..).zip(labelled) {
                let n = labelled.docs.len();
                let length: usize = labelled.docs.iter().map(|doc| doc.ids.len()).sum();
                let mut taken = Vec::new();
                for (nr, doc) in labelled.docs.into_iter().enumerate() {
                    // A row that stays a pack has to fit as a whole.
                    let length = if self.args.unpack { doc.ids.len() } else { length };
                    sinks.firsts += u64::from(doc.first_was_labelled);
                    let named = if n > 1 { format!("{row}.{nr}") } else { row.to_string() };
                    let made = self.make(doc, named);
                    match self.refuse(&made, length) {
                        None => taken.push(made),
                        Some(refusal) if self.stops_at(&refusal) => {
                            return Err(Failure::input(format!("{}: {}", at(row), refusal.detail))
                                .hint(
                                    "raise tokenize.max_len, or set tokenize.too_long to \"drop\"",
                                ));
                        }
                        Some(refusal) => sinks.reject(&made, row, &refusal),
                    }
                }
                sinks.take(self.args.split, row, taken)?;
            }
            first += batch.num_rows() as u64;
            sinks.flush(self.args.split)?;
        }
        Ok(())
    }

    fn stops_at(&self, refusal: &Refusal) -> bool {
        self.config.too_long == TooLong::Error && refusal.reason == Reason::TooLong
    }

    /// A document as a row of this program.
    fn make(&self, doc: LabelledDoc, named: String) -> Row {
        let LabelledDoc { ids, weights, name, source, .. } = doc;
        let n = ids.len() as u32;
        let trained = || weights.iter().map(|w| *w > 0.0);
        let last = |at: &usize| weights[*at] > 0.0 && weights.get(at + 1).is_none_or(|w| *w == 0.0);
        let ends: Vec<usize> = (0..ids.len()).filter(last).collect();
        // What ends a document's last trained tokens ends a response if it is a special token. Ends before that may be of parts:
        // the marker of a masked thought would end every answer. The model's own ends of a text are stops whatever stands here.
        let stop = ends.last().map(|at| ids[*at]);
        let stops = stop.into_iter().filter(|id| self.tokenizer.vocab.is_special(*id)).collect();
        let counts =
            Counts { tokens: u64::from(n), trained: trained().filter(|is| *is).count() as u64 };
        let source = source.unwrap_or_else(|| self.source.clone());
        // A row that is trained whole is a text.
        let is_text = trained().skip(1).all(|is| is);
        Row {
            id: name.unwrap_or_else(|| format!("{}:{named}", self.source)),
            source,
            split: self.args.split,
            kind: if is_text { Kind::Text } else { Kind::Sft },
            roles: Roles::one(if is_text { TEXT } else { UNKNOWN }, n),
            turns: ends.len() as u32,
            stops,
            offsets: Vec::new(),
            kept: std::iter::once(0..n).collect(),
            n_whole: n,
            before: counts,
            ids,
            weights,
        }
    }

    fn refuse(&self, row: &Row, length: usize) -> Option<Refusal> {
        let max = self.config.max_len as usize;
        let (reason, detail) = if let Some(id) = row.ids.iter().find(|id| **id >= self.n_ids) {
            (Reason::NotInModel, format!("id {id}, and the model has {} ids", self.n_ids))
        } else if row.before.trained == 0 {
            (Reason::NoTrainedToken, format!("{} tokens, none of them trained", row.ids.len()))
        } else if length > max {
            (Reason::TooLong, format!("{length} tokens, a pack holds {max}"))
        } else {
            return None;
        };
        Some(Refusal { reason, detail, counts: row.before })
    }
}

/// Marks the sources that are said to be replay.
fn mark_replay(ledger: &mut Ledger, names: &[String]) -> Result<(), Failure> {
    for name in names {
        let Some(source) = ledger.sources.get_mut(name) else {
            let there: Vec<String> = ledger.sources.keys().map(|s| format!("`{s}`")).collect();
            let message = format!("`--replay {name}`: no row is of a source of that name");
            return Err(
                Failure::usage(message).hint(format!("rows are there of {}", there.join(", ")))
            );
        };
        source.replay = true;
    }
    Ok(())
}

impl Sinks {
    fn reject(&mut self, row: &Row, line: u64, refusal: &Refusal) {
        self.tally.refuse(&row.source, refusal);
        let reject = Reject {
            source: row.source.clone(),
            file: row.id.clone(),
            line: line + 1,
            reason: refusal.reason.to_string(),
            detail: refusal.detail.clone(),
            raw: String::new(),
        };
        self.refused.push(reject);
    }

    /// Takes the documents of a row.
    fn take(&mut self, split: Split, index: u64, docs: Vec<Row>) -> Result<(), Failure> {
        if docs.is_empty() {
            return Ok(());
        }
        let mut pack = Pack::with_capacity(docs.iter().map(|row| row.ids.len()).sum());
        for row in docs {
            let doc = row.doc(index);
            if let Some((aside, tokens)) = &mut self.aside {
                let record = record::to_bytes(&doc, &row.roles, &row.ids, &row.weights);
                aside.push(doc.len, &record)?;
                let roles = &mut RoleKeys::of(&row.roles);
                *tokens = tokens.and(Multiset::of(&doc, &row.ids, &row.weights, roles));
            } else {
                pack.input_ids.extend_from_slice(&row.ids);
                pack.loss_weight.extend_from_slice(&row.weights);
                pack.roles.append(&row.roles);
                pack.docs.push(doc);
            }
            self.tally.pass(&Taken { rows: vec![row], refused: Vec::new() }, None);
        }
        if self.aside.is_none() {
            self.packs.push(pack);
        }
        if self.packs.len() >= PACKS_A_BATCH { self.flush(split) } else { Ok(()) }
    }

    /// Writes the packs and the refused documents that wait.
    fn flush(&mut self, split: Split) -> Result<(), Failure> {
        if let Some(file) = self.file.as_mut().filter(|_| !self.packs.is_empty()) {
            file.write(&Pack::to_batch(&self.packs)?)?;
            self.tally.packs(split, &self.packs);
            self.packs.clear();
        }
        self.rejects.write(&Reject::to_batch(&self.refused)?)?;
        self.refused.clear();
        Ok(())
    }
}
