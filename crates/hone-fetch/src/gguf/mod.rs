//! The GGUF file format: a header of typed metadata and a table of tensors, then the tensors'
//! bytes.
//!
//! Nothing that a header claims is believed. Every count, length, shape and offset is checked
//! against the bytes that the file really has before anything is allocated or read for it, so that
//! a file that lies is refused by name of what it lies about. The values of a tensor are decoded by
//! candle's block types; everything before that is read here.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, versions 2 and 3,
//! little-endian.

mod metadata;
mod reader;
mod tensor;

pub(crate) use metadata::{Metadata, Value};
pub(crate) use tensor::{TensorInfo, read_f32};

use std::collections::BTreeSet;
use std::io::{Read, Seek};

use reader::HeaderReader;

/// Most tensors in one file: the largest models known have about three thousand.
const TENSORS_MAX: u64 = 1 << 17;

/// Most metadata keys in one file: real files have less than a hundred.
const KEYS_MAX: u64 = 1 << 14;

/// Multiple at which tensors begin when `general.alignment` does not say otherwise.
const ALIGNMENT_DEFAULT: u64 = 32;

/// Largest multiple accepted for the beginnings of tensors: a huge page.
const ALIGNMENT_MAX: u64 = 1 << 21;

/// What is wrong with a GGUF file.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GgufError {
    /// The first four bytes.
    #[error("not a GGUF file: it does not begin with the letters GGUF")]
    Magic,
    /// Written on a machine of the other byte order.
    #[error("the file is big-endian, only little-endian files are read")]
    BigEndian,
    /// Another version.
    #[error("the file has GGUF version {0}, this program reads 2 and 3")]
    Version(u32),
    /// A field that ends after the file.
    #[error("byte {at}: {what} ends after the file, which has {len} bytes")]
    Truncated { what: String, at: u64, len: u64 },
    /// A number that cannot be true of this file.
    #[error("byte {at}: {what} is {found}, at most {max} can be")]
    TooMany { what: String, at: u64, found: u64, max: u64 },
    /// A field with a value that the format does not allow.
    #[error("byte {at}: {reason}")]
    Field { at: u64, reason: String },
    /// A metadata key that is not there.
    #[error("the metadata has no key `{0}`")]
    NoKey(String),
    /// A metadata key with a value of another type, or one that makes no sense.
    #[error("metadata key `{key}`: {reason}")]
    Key { key: String, reason: String },
    /// A tensor whose place, shape or type cannot be.
    #[error("tensor `{name}`: {reason}")]
    Tensor { name: String, reason: String },
    /// The file cannot be read.
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

/// The header of a GGUF file, checked against the length of the file.
#[derive(Debug)]
pub(crate) struct Gguf {
    /// 2 or 3.
    pub(crate) version: u32,
    /// Keys and values.
    pub(crate) metadata: Metadata,
    /// Tensors in the order of the file.
    pub(crate) tensors: Vec<TensorInfo>,
}

impl Gguf {
    /// Reads and checks the header of a file. Reads no tensor.
    pub(crate) fn read(file: impl Read + Seek) -> Result<Self, GgufError> {
        let mut reader = HeaderReader::new(file)?;
        let version = magic(&mut reader)?;
        let n_tensors = reader.count("the number of tensors", TENSORS_MAX, 32)?;
        let n_keys = reader.count("the number of metadata keys", KEYS_MAX, 13)?;
        let metadata = Metadata::read(&mut reader, n_keys)?;
        let mut tensors = Vec::new();
        let mut names = BTreeSet::new();
        for _ in 0..n_tensors {
            let tensor = TensorInfo::read(&mut reader)?;
            if !names.insert(tensor.name.clone()) {
                return Err(tensor.error("it is in the file twice"));
            }
            tensors.push(tensor);
        }
        let alignment = alignment(&metadata)?;
        let data_start = reader.position().next_multiple_of(alignment);
        for tensor in &mut tensors {
            tensor.place(data_start, alignment, reader.file_len())?;
        }
        refuse_overlap(&tensors)?;
        Ok(Gguf { version, metadata, tensors })
    }
}

fn magic<R: Read + Seek>(reader: &mut HeaderReader<R>) -> Result<u32, GgufError> {
    if reader.file_len() < 4 || reader.array::<4>("the magic number")? != *b"GGUF" {
        return Err(GgufError::Magic);
    }
    match reader.u32("the version")? {
        version @ (2 | 3) => Ok(version),
        version if matches!(version.swap_bytes(), 1..=3) => Err(GgufError::BigEndian),
        version => Err(GgufError::Version(version)),
    }
}

fn alignment(metadata: &Metadata) -> Result<u64, GgufError> {
    const KEY: &str = "general.alignment";
    let alignment = metadata.try_u64(KEY)?.unwrap_or(ALIGNMENT_DEFAULT);
    if alignment.is_power_of_two() && alignment <= ALIGNMENT_MAX {
        return Ok(alignment);
    }
    let reason = format!("{alignment} is not a power of two up to {ALIGNMENT_MAX}");
    Err(GgufError::Key { key: KEY.to_owned(), reason })
}

/// Two tensors that share bytes: one of the two offsets is wrong, and nobody can say which.
fn refuse_overlap(tensors: &[TensorInfo]) -> Result<(), GgufError> {
    let mut by_place: Vec<&TensorInfo> = tensors.iter().collect();
    by_place.sort_by_key(|tensor| tensor.start);
    for pair in by_place.windows(2) {
        if pair[0].start + pair[0].n_bytes > pair[1].start {
            return Err(pair[1].error(format!("its bytes overlap those of `{}`", pair[0].name)));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
