//! A base whose linear maps lie in 4 bits.

use std::path::{Path, PathBuf};

use hone_cli::{Common, Context, Exit, Failure, Outcome, run_stage};
use hone_model::{
    BnbConfig, CodeBook, ModelError, QuantSpec, StoredType, ValueType, write_bnb_checkpoint,
};
use hone_store::ModelDir;
use serde_json::json;

use crate::args::Book;
use crate::directory::{self, SINGLE, SMALL_BYTES_MAX, SMALL_FILES};
use crate::run::{outcome, plan};

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
            let written =
                write_bnb_checkpoint(&mut file, &verified.config, tensors, &quant, stored);
            Ok(written.map(|()| quant).map_err(|error| match error {
                ModelError::Write(_) => Failure::environment(format!("`{SINGLE}`: {error}")),
                _ => Failure::input(error.to_string()),
            }))
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
