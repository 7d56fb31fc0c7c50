//! An adapter folded into its base: W + s B A, one tensor at a time.

use candle_core::{Device, Tensor};

use crate::lora::modules;
use crate::tensors::{NamedTensor, TensorSource};
use crate::{Adapter, ModelConfig, ModelError, TensorEntry};

/// A base model seen through an adapter. It is a [`TensorSource`]: a decoder can be loaded from it,
/// and a streaming writer fed with it, in the memory of its largest tensor.
pub struct Merge<'a> {
    base: &'a dyn TensorSource,
    adapter: &'a Adapter,
    config: &'a ModelConfig,
}

impl<'a> Merge<'a> {
    /// Checks that base, configuration and adapter belong together.
    pub fn new(
        config: &'a ModelConfig,
        base: &'a dyn TensorSource,
        adapter: &'a Adapter,
    ) -> Result<Self, ModelError> {
        config.check_source(base)?;
        adapter.check(config)?;
        Ok(Merge { base, adapter, config })
    }

    /// Whether the adapter changes that tensor.
    pub fn changes(&self, name: &str) -> bool {
        name.strip_suffix(".weight").is_some_and(|module| {
            modules(self.config).any(|(known, _)| known == module)
                && self.adapter.config.targets(module)
        })
    }

    /// s B A, what the adapter adds to that tensor; `None` where it adds nothing.
    pub fn delta(&self, name: &str) -> Result<Option<NamedTensor>, ModelError> {
        let Some(module) = name.strip_suffix(".weight") else {
            return Ok(None);
        };
        let Some((_, shape)) = modules(self.config).find(|(known, _)| known == module) else {
            return Ok(None);
        };
        let Some((a, b)) = self.adapter.factors(module, shape.out, shape.inp)? else {
            return Ok(None);
        };
        let tensor =
            |t: &NamedTensor| Tensor::from_slice(&t.data, t.shape.as_slice(), &Device::Cpu);
        let product = || -> candle_core::Result<Vec<f32>> {
            let delta = tensor(b)?.matmul(&tensor(a)?)?;
            (delta * f64::from(self.adapter.config.scaling()))?.flatten_all()?.to_vec1()
        };
        let data = product().expect("`factors` has checked both shapes");
        Ok(Some(NamedTensor::new(name, vec![shape.out, shape.inp], data)))
    }
}

impl TensorSource for Merge<'_> {
    fn entries(&self) -> Vec<TensorEntry> {
        self.base.entries()
    }

    fn tensor(&self, name: &str) -> Result<NamedTensor, ModelError> {
        let mut tensor = self.base.tensor(name)?;
        if let Some(delta) = self.delta(name)? {
            for (value, change) in tensor.data.iter_mut().zip(&delta.data) {
                *value += change;
            }
        }
        tensor.check_finite()?;
        Ok(tensor)
    }

    fn has(&self, name: &str) -> bool {
        self.base.has(name)
    }
}
