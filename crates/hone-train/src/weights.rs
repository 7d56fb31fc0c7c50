//! Named tensors into a file of a draft, one at a time.

use hone_cli::Failure;
use hone_model::{ModelError, StoredType, Tensors};
use hone_store::{Draft, StoreError};

/// Writes `tensors` as the safetensors file `name`.
///
/// # Errors
/// It cannot be written.
pub(crate) fn write(
    draft: &Draft,
    name: &str,
    tensors: &Tensors,
    stored: StoredType,
) -> Result<(), Failure> {
    let mut file = draft.file(name)?;
    let path = file.path().to_owned();
    tensors.write_safetensors(&mut file, stored).map_err(|e| match e {
        ModelError::Write(source) => {
            StoreError::Io { action: "write", path: path.clone(), source }.into()
        }
        other => Failure::environment(format!("{name}: {other}")),
    })?;
    Ok(file.finish(None)?)
}
