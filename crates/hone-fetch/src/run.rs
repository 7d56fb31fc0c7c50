//! The two commands: bring a model in, and look into a GGUF file.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use hone_cli::{Common, Context, Exit, Failure, Outcome, Progress, StagePlan, run_stage};
use hone_model::ModelConfig;
use hone_schema::{ArtefactKind, InputRef, Ledger};
use hone_store::{Draft, ModelDir, input};
use serde_json::{Value, json};

use crate::args::{Args, Command, Dtype, HubId, Source};
use crate::directory::{self, INDEX, SMALL_BYTES_MAX, SMALL_FILES};
use crate::gguf::{Gguf, GgufError};
use crate::hub::{Hub, HubError, RemoteFile, Settings, Snapshot};
use crate::import::{Import, ImportError};
use crate::inspect::inspect;
use crate::{quantize, tokens};

/// Bytes copied at a time.
const BLOCK: usize = 1 << 20;

/// Runs what was asked for.
pub(crate) fn run(args: Args, ctx: &Context) -> Result<Exit, Failure> {
    let common = &args.common;
    if common.pipeline.is_some() || !common.set.is_empty() {
        let message = "hone-fetch reads no pipeline file, so `--pipeline` and `--set` do nothing";
        return Err(Failure::usage(message).hint("leave them out"));
    }
    let out = || {
        let message = "`--out` is missing: where shall the model lie?";
        let missing = || Failure::usage(message).hint("for example `--out runs/base/model`");
        common.out.clone().ok_or_else(missing)
    };
    match args.command {
        Command::Inspect { file } => inspect(ctx, common, &file),
        Command::Tokens { base, add, pad_to } => {
            tokens::add(ctx, common, out()?, &base, &add, pad_to)
        }
        Command::Quantize { base, book, no_double_quant } => {
            quantize::quantize(ctx, common, out()?, &base, (book, !no_double_quant))
        }
        Command::Model { source, dtype } => {
            let out = out()?;
            match Source::parse(&source)? {
                Source::Directory(dir) => from_directory(ctx, common, out, &dir),
                Source::Gguf(file) => from_gguf(ctx, common, out, &file, dtype),
                Source::Hub(id) => from_hub(ctx, common, out, &id),
            }
        }
    }
}

pub(crate) fn plan(out: PathBuf, config: Value, inputs: Vec<InputRef>) -> StagePlan {
    StagePlan { stage: "fetch", kind: ArtefactKind::Weights, dir: out, config, inputs }
}

/// What is said about a model that was brought in.
pub(crate) fn outcome(config: &ModelConfig, n_tensors: usize, origin: Value) -> Outcome {
    let n_params = config.n_params();
    Outcome {
        ledger: Ledger::default(),
        report: json!({
            "model_type": config.family.model_type(),
            "n_params": n_params,
            "n_tensors": n_tensors,
            "vocab_size": config.vocab_size,
            "origin": origin,
        }),
        exit: Exit::Done,
        summary: format!("{n_params} weights in {n_tensors} tensors"),
    }
}

pub(crate) fn check_stop(ctx: &Context) -> Result<(), Failure> {
    ctx.stop().map_or(Ok(()), |exit| Err(Failure::stopped(exit)))
}

/// Copies all of `from` into the file `name` of the draft. Returns where it lies.
fn copy(ctx: &Context, mut from: impl Read, draft: &Draft, name: &str) -> Result<PathBuf, Failure> {
    let mut to = draft.file(name)?;
    let path = to.path().to_owned();
    let mut block = vec![0; BLOCK];
    loop {
        check_stop(ctx)?;
        let failed = |what: &str, error: std::io::Error| {
            Failure::environment(format!("cannot {what} `{name}`: {error}"))
        };
        let n = match from.read(&mut block) {
            Ok(0) => {
                to.finish(None)?;
                return Ok(path);
            }
            Ok(n) => n,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(failed("read", error)),
        };
        to.write_all(&block[..n]).map_err(|error| failed("write", error))?;
    }
}

fn from_directory(
    ctx: &Context,
    common: &Common,
    out: PathBuf,
    dir: &Path,
) -> Result<Exit, Failure> {
    let model = ModelDir::open(dir)?;
    let verified = directory::verify(&model)?;
    let small = SMALL_FILES.iter().copied().filter(|name| model.has(name));
    let names: Vec<&str> = small.chain(verified.weight_files.iter().map(String::as_str)).collect();
    let inputs = vec![model.input_of("model", &names)?];
    let config = json!({"source": "directory"});
    run_stage(ctx, common, plan(out, config, inputs), |draft, _| {
        let mut progress = ctx.progress(names.len() as u64, "files");
        for name in &names {
            copy(ctx, input::open(&model.dir().join(name))?, draft, name)?;
            progress.inc(1);
        }
        progress.finish();
        Ok(outcome(&verified.config, verified.n_tensors, json!("directory")))
    })
}

/// An error of a GGUF file, with the file and the exit code.
pub(crate) fn gguf_failure(file: &Path, error: ImportError) -> Failure {
    let message = format!("{}: {error}", file.display());
    match error {
        ImportError::Gguf(GgufError::Io(_))
        | ImportError::Model(hone_model::ModelError::Write(_)) => Failure::environment(message),
        ImportError::Gguf(GgufError::Magic) => Failure::input(message)
            .hint("a single file must be GGUF; for safetensors give the model's directory"),
        ImportError::Gguf(GgufError::Truncated { .. } | GgufError::Tensor { .. }) => {
            Failure::input(message).hint("is the file whole? compare its length with its origin's")
        }
        _ => Failure::input(message),
    }
}

fn from_gguf(
    ctx: &Context,
    common: &Common,
    out: PathBuf,
    path: &Path,
    dtype: Dtype,
) -> Result<Exit, Failure> {
    let failure = |error: ImportError| gguf_failure(path, error);
    let mut file = input::open(path)?;
    let gguf = Gguf::read(&mut file).map_err(|error| failure(error.into()))?;
    let import = Import::new(&gguf, dtype.stored()).map_err(failure)?;
    let (sha256, _) = input::hash(path)?;
    let inputs = vec![InputRef { role: "gguf".to_owned(), sha256 }];
    let text = |key: &str| gguf.metadata.try_str(key).ok().flatten();
    let origin = json!({"name": text("general.name"), "license": text("general.license")});
    let config = json!({"source": "gguf", "dtype": dtype.name()});
    run_stage(ctx, common, plan(out, config, inputs), |draft, _| {
        for (name, bytes) in import.small_files() {
            draft.write(name, &bytes, None)?;
        }
        let mut weights = draft.file(directory::SINGLE)?;
        let mut progress = ctx.progress(import.n_tensors() as u64, "tensors");
        let written = import.write_weights(&mut file, &mut weights, || {
            progress.inc(1);
            !ctx.stop_requested()
        });
        progress.finish();
        if !written.map_err(failure)? {
            check_stop(ctx)?;
        }
        weights.finish(None)?;
        Ok(outcome(import.config(), import.n_tensors(), origin))
    })
}

fn from_hub(ctx: &Context, common: &Common, out: PathBuf, id: &HubId) -> Result<Exit, Failure> {
    let settings = Settings::from_variables(|name| std::env::var(name).ok());
    if settings.is_offline {
        let Some(dir) = settings.cached(id) else {
            let message = format!("`{}@{}` is not in the hub's cache", id.repo, id.revision);
            return Err(Failure::input(message).hint("unset HF_HUB_OFFLINE to ask the hub"));
        };
        return from_directory(ctx, common, out, &dir);
    }
    let hub = Hub::new(&settings)?;
    let snapshot = hub.snapshot(id)?;
    ctx.note(format!("{}@{} is commit {}", id.repo, id.revision, snapshot.commit));
    let config = json!({"source": "hub", "repo": id.repo, "commit": snapshot.commit});
    let origin = json!({"repo": id.repo, "commit": snapshot.commit});
    run_stage(ctx, common, plan(out, config, Vec::new()), |draft, _| {
        let fetch = Fetch { ctx, hub: &hub, settings: &settings, snapshot: &snapshot, draft };
        let index = fetch.small_files()?;
        let shards = directory::shards(index.as_deref(), |name| snapshot.file(name).is_some())?;
        let scratch = fetch.weights(&shards)?;
        let verified = directory::verify(&ModelDir::open(&scratch)?)?;
        Ok(outcome(&verified.config, verified.n_tensors, origin))
    })
}

/// A model on its way from a hub into a draft.
struct Fetch<'a> {
    ctx: &'a Context,
    hub: &'a Hub,
    settings: &'a Settings,
    snapshot: &'a Snapshot,
    draft: &'a Draft,
}

impl Fetch<'_> {
    fn failure(&self, error: HubError) -> Failure {
        match (error, self.ctx.stop()) {
            (HubError::Stopped, Some(exit)) => Failure::stopped(exit),
            (error, _) => error.into(),
        }
    }

    /// Fetches the configuration first, and refuses what the decoder cannot run before anything
    /// large is fetched. Returns the index of shards, if there is one.
    fn small_files(&self) -> Result<Option<Vec<u8>>, Failure> {
        for required in ["config.json", "tokenizer.json"] {
            if self.snapshot.file(required).is_none() {
                let repo = &self.snapshot.repo;
                return Err(Failure::input(format!("`{repo}` has no file `{required}`")));
            }
        }
        let mut index = None;
        for name in SMALL_FILES.into_iter().chain([INDEX]) {
            let Some(file) = self.snapshot.file(name) else { continue };
            let bytes = self.small_file(file)?;
            if name == "config.json" {
                directory::config(&bytes)?;
            }
            self.draft.write(name, &bytes, None)?;
            if name == INDEX {
                index = Some(bytes);
            }
        }
        Ok(index)
    }

    fn small_file(&self, file: &RemoteFile) -> Result<Vec<u8>, Failure> {
        let mut bytes = Vec::new();
        let mut left = SMALL_BYTES_MAX;
        let mut is_too_long = false;
        let fetched = self.hub.download(self.snapshot, file, &mut bytes, &mut |n| {
            is_too_long = n > left;
            left = left.saturating_sub(n);
            !is_too_long && !self.ctx.stop_requested()
        });
        if is_too_long {
            let what = format!("`{}` is longer than {SMALL_BYTES_MAX} bytes", file.name);
            return Err(Failure::input(what));
        }
        fetched.map_err(|error| self.failure(error))?;
        Ok(bytes)
    }

    /// Fetches the weights. Returns the directory in which everything lies by now.
    fn weights(&self, names: &[String]) -> Result<PathBuf, Failure> {
        let files: Vec<&RemoteFile> =
            names.iter().filter_map(|name| self.snapshot.file(name)).collect();
        let total = files.iter().filter_map(|file| file.n_bytes).sum();
        let mut progress = self.ctx.progress(total, "bytes");
        let mut scratch = PathBuf::new();
        for file in files {
            let path = match self.cached(file) {
                Some(cached) => copy(self.ctx, input::open(&cached)?, self.draft, &file.name)?,
                None => self.weight_file(file, &mut progress)?,
            };
            scratch = path.parent().map(Path::to_owned).unwrap_or_default();
        }
        progress.finish();
        Ok(scratch)
    }

    /// Downloads one file of weights, and checks its hash.
    fn weight_file(&self, file: &RemoteFile, progress: &mut Progress) -> Result<PathBuf, Failure> {
        let mut to = self.draft.file(&file.name)?;
        let path = to.path().to_owned();
        let fetched = self.hub.download(self.snapshot, file, &mut to, &mut |n| {
            progress.inc(n);
            !self.ctx.stop_requested()
        });
        fetched.map_err(|error| self.failure(error))?;
        to.finish(None)?;
        let found = input::hash(&path)?.0.to_string();
        match &file.sha256 {
            Some(promised) if !promised.eq_ignore_ascii_case(&found) => {
                let what = format!("its SHA-256 is {found}, the hub promised {promised}");
                Err(HubError::Wrong { file: file.name.clone(), what }.into())
            }
            _ => Ok(path),
        }
    }

    /// The same file in the cache of the hub's own tools, if it is there and whole.
    fn cached(&self, file: &RemoteFile) -> Option<PathBuf> {
        let promised = file.sha256.as_ref()?;
        let repo = self.snapshot.repo.clone();
        let id = HubId { repo, revision: self.snapshot.commit.clone() };
        let path = self.settings.cached(&id)?.join(&file.name);
        let (found, _) = input::hash(&path).ok()?;
        promised.eq_ignore_ascii_case(&found.to_string()).then_some(path)
    }
}
