//! Named tensors in host memory.

use std::collections::BTreeMap;
use std::io::Write;

use hone_kernels::quant::Quantized;

use crate::safetensors::{SafetensorsRegions, SafetensorsWriter, StoredType, TensorEntry};
use crate::{Compute, ModelError};

/// A dense row-major tensor of f32 with its name.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedTensor {
    /// Name in the file, Hugging Face's for models and PEFT's for adapters.
    pub name: String,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// Values, `shape.product()` of them.
    pub data: Vec<f32>,
}

impl NamedTensor {
    /// A tensor; the caller's proof is that `data` fills `shape`.
    pub fn new(name: impl Into<String>, shape: Vec<usize>, data: Vec<f32>) -> Self {
        let tensor = NamedTensor { name: name.into(), shape, data };
        assert_eq!(tensor.data.len(), tensor.shape.iter().product::<usize>(), "{}", tensor.name);
        tensor
    }

    /// Refuses NaN and infinity, naming the first.
    pub fn check_finite(&self) -> Result<(), ModelError> {
        match self.data.iter().position(|v| !v.is_finite()) {
            Some(index) => Err(ModelError::NotFinite { name: self.name.clone(), index }),
            None => Ok(()),
        }
    }
}

/// Where a model's tensors are read from, one at a time: files need not be in memory as f32 all at
/// once.
pub trait TensorSource {
    /// Names and shapes, sorted by name.
    fn entries(&self) -> Vec<TensorEntry>;
    /// One tensor as f32.
    fn tensor(&self, name: &str) -> Result<NamedTensor, ModelError>;
    /// Whether there is such a tensor.
    fn has(&self, name: &str) -> bool {
        self.entries().iter().any(|entry| entry.name == name)
    }
    /// One tensor in 4 bits, where the source has it so; [`TensorSource::tensor`] then gives its
    /// dequantised values.
    fn quantized(&self, _name: &str) -> Result<Option<Quantized>, ModelError> {
        Ok(None)
    }
    /// Whether the values of a tensor are known to be bf16, so that bf16 holds them exactly.
    fn is_bf16(&self, _name: &str) -> bool {
        false
    }
    /// The values that a 4-bit tensor was made of, where the source still has them.
    fn original(&self, _name: &str) -> Result<Option<NamedTensor>, ModelError> {
        Ok(None)
    }
}

/// A set of named tensors, sorted by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tensors {
    by_name: BTreeMap<String, NamedTensor>,
}

impl Tensors {
    /// No tensors.
    pub fn new() -> Self {
        Self::default()
    }

    /// All tensors of one or more safetensors files given as bytes (f32, bf16 or f16; kept as f32).
    pub fn from_safetensors(regions: &[&[u8]]) -> Result<Self, ModelError> {
        let source = SafetensorsRegions::new(regions)?;
        source.entries().iter().map(|entry| source.tensor(&entry.name)).collect()
    }

    /// Writes all tensors as one safetensors file, sorted by name, with `{"format": "pt"}` as its
    /// metadata.
    pub fn write_safetensors(&self, out: impl Write, stored: StoredType) -> Result<(), ModelError> {
        let mut writer = SafetensorsWriter::new(out, &self.entries(), stored)?;
        for tensor in self.iter() {
            writer.put(tensor)?;
        }
        writer.finish()
    }

    /// The bytes of [`Tensors::write_safetensors`].
    pub fn to_safetensors(&self, stored: StoredType) -> Result<Vec<u8>, ModelError> {
        let mut bytes = Vec::new();
        self.write_safetensors(&mut bytes, stored)?;
        Ok(bytes)
    }

    /// Adds a tensor; one of the same name is replaced.
    pub fn insert(&mut self, tensor: NamedTensor) {
        self.by_name.insert(tensor.name.clone(), tensor);
    }

    /// Takes a tensor out.
    pub fn remove(&mut self, name: &str) -> Option<NamedTensor> {
        self.by_name.remove(name)
    }

    /// The tensor of that name.
    pub fn get(&self, name: &str) -> Option<&NamedTensor> {
        self.by_name.get(name)
    }

    /// The tensor of that name, to change its values.
    pub fn get_mut(&mut self, name: &str) -> Option<&mut NamedTensor> {
        self.by_name.get_mut(name)
    }

    /// All tensors, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = &NamedTensor> {
        self.by_name.values()
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.by_name.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    /// Number of values in all tensors.
    pub fn n_values(&self) -> usize {
        self.iter().map(|tensor| tensor.data.len()).sum()
    }
}

impl FromIterator<NamedTensor> for Tensors {
    fn from_iter<I: IntoIterator<Item = NamedTensor>>(tensors: I) -> Self {
        let by_name = tensors.into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect();
        Tensors { by_name }
    }
}

impl TensorSource for Tensors {
    fn entries(&self) -> Vec<TensorEntry> {
        self.iter().map(|t| TensorEntry { name: t.name.clone(), shape: t.shape.clone() }).collect()
    }

    fn tensor(&self, name: &str) -> Result<NamedTensor, ModelError> {
        self.get(name).cloned().ok_or_else(|| ModelError::NoTensor(name.to_owned()))
    }

    fn has(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    fn is_bf16(&self, name: &str) -> bool {
        let is_bf16 = |x: &f32| Compute::Bf16.round(*x).to_bits() == x.to_bits();
        self.get(name).is_some_and(|tensor| tensor.data.iter().all(is_bf16))
    }
}
