//! Reading and writing the safetensors file format.
//!
//! A file is a little-endian u64 (length of the header), a JSON header {name: {dtype, shape,
//! data_offsets}}, and the tensors' bytes. Reading checks the header's length before the parser
//! sees it; writing streams one tensor at a time, so that a model of any size is written in the
//! memory of its largest tensor.

use std::collections::BTreeMap;
use std::io::Write;

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};

use crate::ModelError;
use crate::tensors::{NamedTensor, TensorSource};

/// Longest header read. A tensor's entry is about 120 bytes, so this is room for 100,000 of them.
pub(crate) const HEADER_BYTES_MAX: u64 = 16 << 20;

/// Largest number of values converted at once when writing: bounds the scratch memory.
const CHUNK_VALUES: usize = 1 << 16;

/// How values lie in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoredType {
    /// IEEE single precision: exact.
    F32,
    /// bfloat16, rounded to nearest even.
    Bf16,
}

impl StoredType {
    /// Bytes of one value.
    pub fn n_bytes(self) -> usize {
        match self {
            StoredType::F32 => 4,
            StoredType::Bf16 => 2,
        }
    }

    /// Name in a safetensors header.
    fn tag(self) -> &'static str {
        match self {
            StoredType::F32 => "F32",
            StoredType::Bf16 => "BF16",
        }
    }
}

/// Name and shape of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorEntry {
    /// Name in the file.
    pub name: String,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
}

/// The tensors of one or more safetensors files whose bytes are in memory (mapped, as a rule).
pub struct SafetensorsRegions<'a> {
    files: Vec<SafeTensors<'a>>,
    /// File of each tensor.
    file_of: BTreeMap<String, usize>,
}

impl<'a> SafetensorsRegions<'a> {
    /// Reads the headers. Errors: a malformed file, a value type other than f32, bf16 and f16, one
    /// name in two files.
    pub fn new(regions: &[&'a [u8]]) -> Result<Self, ModelError> {
        Self::with_types(regions, &[Dtype::F32, Dtype::BF16, Dtype::F16])
    }

    /// [`SafetensorsRegions::new`] of files whose values have one of the given types.
    pub(crate) fn with_types(regions: &[&'a [u8]], types: &[Dtype]) -> Result<Self, ModelError> {
        let mut files = Vec::with_capacity(regions.len());
        let mut file_of = BTreeMap::new();
        for (file_idx, bytes) in regions.iter().enumerate() {
            let file = parse(bytes)?;
            for (name, view) in file.iter() {
                if !types.contains(&view.dtype()) {
                    let what = format!("tensor `{name}` is stored as {:?}", view.dtype());
                    return Err(ModelError::Format(format!("{what}, not as F32, BF16 or F16")));
                }
                if file_of.insert(name.to_owned(), file_idx).is_some() {
                    return Err(ModelError::Format(format!("tensor `{name}` is in two files")));
                }
            }
            files.push(file);
        }
        Ok(SafetensorsRegions { files, file_of })
    }

    /// A tensor's type and bytes as they are stored.
    pub(crate) fn raw(&self, name: &str) -> Option<(Dtype, &[u8])> {
        let file = *self.file_of.get(name)?;
        let view = self.files[file].tensor(name).expect("`file_of` was read from this file");
        Some((view.dtype(), view.data()))
    }

    /// Whether every tensor is stored as bfloat16.
    pub fn is_all_bf16(&self) -> bool {
        self.files.iter().flat_map(SafeTensors::iter).all(|(_, view)| view.dtype() == Dtype::BF16)
    }
}

/// Checks the length of the header, then lets the parser check everything else.
fn parse(bytes: &[u8]) -> Result<SafeTensors<'_>, ModelError> {
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(ModelError::Format(format!("it has only {} bytes", bytes.len())));
    };
    let length = u64::from_le_bytes(*length);
    if length > HEADER_BYTES_MAX {
        let limit = HEADER_BYTES_MAX >> 20;
        let what = format!("its header claims {length} bytes, the limit is {limit} MiB");
        return Err(ModelError::Format(what));
    }
    if length > rest.len() as u64 {
        let what = format!("its header claims {length} bytes, the file has {}", bytes.len());
        return Err(ModelError::Format(what));
    }
    SafeTensors::deserialize(bytes).map_err(|error| ModelError::Format(error.to_string()))
}

impl TensorSource for SafetensorsRegions<'_> {
    fn entries(&self) -> Vec<TensorEntry> {
        let entry = |(name, &file): (&String, &usize)| {
            let view = self.files[file].tensor(name).expect("`file_of` was read from this file");
            TensorEntry { name: name.clone(), shape: view.shape().to_vec() }
        };
        self.file_of.iter().map(entry).collect()
    }

    fn tensor(&self, name: &str) -> Result<NamedTensor, ModelError> {
        let file = *self.file_of.get(name).ok_or_else(|| ModelError::NoTensor(name.to_owned()))?;
        let view = self.files[file].tensor(name).expect("`file_of` was read from this file");
        let data = to_f32(view.dtype(), view.data());
        Ok(NamedTensor::new(name, view.shape().to_vec(), data))
    }

    fn has(&self, name: &str) -> bool {
        self.file_of.contains_key(name)
    }

    fn is_bf16(&self, name: &str) -> bool {
        self.raw(name).is_some_and(|(dtype, _)| dtype == Dtype::BF16)
    }
}

/// Little-endian values of a file as f32; exact for all three types.
pub(crate) fn to_f32(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    let pairs = || bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    match dtype {
        Dtype::BF16 => pairs().map(|bits| bf16::from_bits(bits).to_f32()).collect(),
        Dtype::F16 => pairs().map(|bits| f16::from_bits(bits).to_f32()).collect(),
        _ => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
    }
}

/// Writes values as they lie in a file.
pub(crate) fn encode(
    data: &[f32],
    stored: StoredType,
    out: &mut impl Write,
) -> Result<(), ModelError> {
    let mut bytes = Vec::with_capacity(CHUNK_VALUES.min(data.len()) * 4);
    for chunk in data.chunks(CHUNK_VALUES) {
        bytes.clear();
        match stored {
            StoredType::F32 => bytes.extend(chunk.iter().flat_map(|v| v.to_le_bytes())),
            StoredType::Bf16 => {
                bytes.extend(chunk.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()));
            }
        }
        out.write_all(&bytes)?;
    }
    Ok(())
}

/// Writes a safetensors file one tensor at a time: same tensors, same bytes.
pub struct SafetensorsWriter<W: Write> {
    out: W,
    stored: StoredType,
    /// What is still to come, last first.
    pending: Vec<TensorEntry>,
}

impl<W: Write> SafetensorsWriter<W> {
    /// Writes the header. Tensors lie in the order of `entries`, which must be the order of the
    /// calls of [`SafetensorsWriter::put`].
    pub fn new(
        mut out: W,
        entries: &[TensorEntry],
        stored: StoredType,
    ) -> Result<Self, ModelError> {
        let mut header = Map::new();
        header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
        let mut offset = 0;
        for entry in entries {
            let end = offset + entry.shape.iter().product::<usize>() * stored.n_bytes();
            let value = json!({
                "dtype": stored.tag(), "shape": entry.shape, "data_offsets": [offset, end]
            });
            if header.insert(entry.name.clone(), value).is_some() {
                let what = format!("tensor `{}` would be written twice", entry.name);
                return Err(ModelError::Format(what));
            }
            offset = end;
        }
        let mut text = Value::Object(header).to_string();
        // Tensors start at a multiple of eight bytes, which readers that map the file rely on.
        text.extend(std::iter::repeat_n(' ', text.len().next_multiple_of(8) - text.len()));
        out.write_all(&(text.len() as u64).to_le_bytes())?;
        out.write_all(text.as_bytes())?;
        let pending = entries.iter().rev().cloned().collect();
        Ok(SafetensorsWriter { out, stored, pending })
    }

    /// Writes the next tensor. Errors: it is not the next, its shape is another, or the writer
    /// below fails.
    pub fn put(&mut self, tensor: &NamedTensor) -> Result<(), ModelError> {
        match self.pending.pop() {
            Some(next) if next.name == tensor.name && next.shape == tensor.shape => {}
            next => {
                let expected = next.map_or("no more".to_owned(), |next| format!("`{}`", next.name));
                let what = format!("wrote `{}` where {expected} was due", tensor.name);
                return Err(ModelError::Format(what));
            }
        }
        encode(&tensor.data, self.stored, &mut self.out)
    }

    /// Checks that every tensor was written, and flushes.
    pub fn finish(mut self) -> Result<(), ModelError> {
        if let Some(next) = self.pending.last() {
            return Err(ModelError::Format(format!("tensor `{}` was never written", next.name)));
        }
        Ok(self.out.flush()?)
    }
}
