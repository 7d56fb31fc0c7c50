//! A base whose linear maps lie in 4 bits.

use std::cell::RefCell;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use hone_cli::{Common, Context, Exit, Failure, Outcome, Progress, run_stage};
use hone_model::{
    BnbConfig, CodeBook, ModelError, NamedTensor, QuantSpec, StoredType, TensorEntry, TensorSource,
    ValueType, write_bnb_checkpoint,
};
use hone_store::ModelDir;
use serde_json::json;

use crate::args::Book;
use crate::directory::{self, SINGLE, SMALL_BYTES_MAX, SMALL_FILES};
use crate::run::{check_stop, outcome, plan};

/// Tensors that are counted as they are asked for, each once, and that are no longer given when a
/// stop was requested.
struct Watched<'a> {
    ctx: &'a Context,
    tensors: &'a dyn TensorSource,
    progress: RefCell<Progress>,
}

impl<'a> Watched<'a> {
    fn new(ctx: &'a Context, tensors: &'a dyn TensorSource) -> Self {
        let progress = ctx.progress(tensors.entries().len() as u64, "tensors");
        Watched { ctx, tensors, progress: RefCell::new(progress) }
    }
}

impl TensorSource for Watched<'_> {
    fn entries(&self) -> Vec<TensorEntry> {
        self.tensors.entries()
    }

    fn tensor(&self, name: &str) -> Result<NamedTensor, ModelError> {
        if self.ctx.stop_requested() {
            return Err(ModelError::Write(ErrorKind::Interrupted.into()));
        }
        self.progress.borrow_mut().inc(1);
        self.tensors.tensor(name)
    }
}

/// Writes the base, and seals it.
pub(crate) fn quantize(
    ctx: &Context,
    common: &Common,
    out: PathBuf,
    base: &Path,
    (book, nested): (Book, bool),
) -> Result<Exit, Failure> {
    let dir = ModelDir::open(base)?;
    let verified = directory::verify(&dir)?;
    let config_json = dir.read("config.json", SMALL_BYTES_MAX)?;
    if directory::config(&config_json)?.1.is_some() {
        return Err(Failure::input(format!("{}: it lies in 4 bits already", base.display())));
    }
    let book = match book {
        Book::Nf4 => CodeBook::Nf4,
        Book::Fp4 => CodeBook::Fp4,
    };
    let settings = json!({"source": "quantize", "type": book.name(), "double_quant": nested});
    let names: Vec<&str> = dir.names().iter().map(String::as_str).collect();
    let inputs = vec![dir.input_of("model", &names)?];
    run_stage(ctx, common, plan(out, settings, inputs), |draft, _| {
        let mut file = draft.file(SINGLE)?;
        let quant = directory::with_tensors(&dir, |tensors| {
            let (values, stored) = match tensors.is_all_bf16() {
                true => (ValueType::Bf16, StoredType::Bf16),
                false => (ValueType::F32, StoredType::F32),
            };
            let spec = QuantSpec { book, nested, ..QuantSpec::qlora(values) };
            let quant = BnbConfig { spec, skip_modules: Vec::new() };
            // What goes wrong here is the writing, or a value that is no number.
            let watched = Watched::new(ctx, tensors);
            let written =
                write_bnb_checkpoint(&mut file, &verified.config, &watched, &quant, stored);
            watched.progress.into_inner().finish();
            // A stop ends the writing with an error of its own, which says nothing.
            Ok(check_stop(ctx).and(written.map(|()| quant).map_err(|error| match error {
                ModelError::Write(_) => Failure::environment(format!("`{SINGLE}`: {error}")),
                _ => Failure::input(error.to_string()),
            })))
        })??;
        file.finish(None)?;
        for name in SMALL_FILES.into_iter().filter(|name| dir.has(name)) {
            let bytes = dir.read(name, SMALL_BYTES_MAX)?;
            if name == "config.json" {
                let text = String::from_utf8_lossy(&bytes);
                let text =
                    quant.into_model_config(&text).map_err(directory::DirectoryError::from)?;
                draft.write(name, text.as_bytes(), None)?;
            } else {
                draft.write(name, &bytes, None)?;
            }
        }
        let found = outcome(&verified.config, verified.n_tensors, json!("directory"));
        let bits = if nested { "4.13" } else { "4.5" };
        let summary =
            format!("{}, linear maps as {} of {bits} bits a weight", found.summary, book.name());
        Ok(Outcome { summary, ..found })
    })
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::{Duration, Instant};

    use clap::Parser;
    use hone_model::Tensors;

    use super::*;
    use crate::args::Args;
    use crate::fixture::tiny;
    use crate::run::run;

    #[test]
    fn a_requested_stop_ends_it() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        std::fs::write(at("tiny.gguf"), tiny().bytes()).unwrap();
        let args = |args: [&str; 4]| Args::try_parse_from(["hone-fetch"].iter().chain(&args));
        let args =
            |what: &str, from: &str, out: &str| args([what, &at(from), "--out", &at(out)]).unwrap();
        let import = args("model", "tiny.gguf", "base");
        let ctx = Context::new(&import.common);
        run(import, &ctx).unwrap();
        let tensors = Tensors::from_iter([NamedTensor::new("x", vec![1], vec![0.0])]);
        let watched = Watched::new(&ctx, &tensors);
        watched.tensor("x").unwrap();
        let me = std::process::id().to_string();
        assert!(Command::new("kill").args(["-TERM", &me]).status().unwrap().success());
        let limit = Instant::now() + Duration::from_secs(60);
        while !ctx.stop_requested() && Instant::now() < limit {
            std::thread::yield_now();
        }
        assert!(matches!(watched.tensor("x"), Err(ModelError::Write(_))), "the next is not begun");
        let failure = run(args("quantize", "base", "small"), &ctx).unwrap_err();
        assert_eq!((failure.exit, failure.message.as_str()), (Exit::Terminated, "stopped"));
        assert!(!dir.path().join("small").exists(), "nothing half-written");
    }
}
