//! A base model with room for new tokens.

use hone_kernels::quant::Quantized;

use crate::tensors::{NamedTensor, TensorSource};
use crate::{ModelConfig, ModelError, TensorEntry};

/// Largest vocabulary that a model is grown to.
const VOCAB_MAX: usize = 1 << 20;

/// A base whose embedding and head have more rows than its file: those of new tokens are the mean
/// of the others, as transformers makes them (less its noise of 1e-9 of their covariance), so that
/// a new token starts as an average one. Train them with [`crate::LoraConfig::trainable_tokens`] or
/// `modules_to_save`.
pub struct ResizedVocab<'a> {
    source: &'a dyn TensorSource,
    config: ModelConfig,
}

impl<'a> ResizedVocab<'a> {
    /// `source`, a model of `config`, with `vocab_size` tokens. Errors: fewer than it has.
    pub fn new(
        config: &ModelConfig,
        source: &'a dyn TensorSource,
        vocab_size: usize,
    ) -> Result<Self, ModelError> {
        let old = config.vocab_size;
        if !(old..=VOCAB_MAX).contains(&vocab_size) {
            let what =
                format!("`vocab_size` = {vocab_size} is not from {old}, which the model has,");
            let reason = format!("{what} to {VOCAB_MAX}");
            return Err(ModelError::Config { file: "config.json", reason });
        }
        config.check_source(source)?;
        Ok(ResizedVocab { source, config: ModelConfig { vocab_size, ..config.clone() } })
    }

    /// The configuration of the grown model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn grows(name: &str) -> bool {
        matches!(name, "model.embed_tokens.weight" | "lm_head.weight")
    }
}

impl TensorSource for ResizedVocab<'_> {
    fn entries(&self) -> Vec<TensorEntry> {
        let mut entries = self.source.entries();
        for entry in entries.iter_mut().filter(|entry| Self::grows(&entry.name)) {
            entry.shape[0] = self.config.vocab_size;
        }
        entries
    }

    fn tensor(&self, name: &str) -> Result<NamedTensor, ModelError> {
        let mut tensor = self.source.tensor(name)?;
        if Self::grows(name) {
            let (rows, d) = (tensor.shape[0], tensor.shape[1]);
            let mut mean = vec![0.0_f64; d];
            for row in tensor.data.chunks(d) {
                mean.iter_mut().zip(row).for_each(|(mean, &x)| *mean += f64::from(x));
            }
            let mean: Vec<f32> = mean.iter().map(|sum| (sum / rows as f64) as f32).collect();
            tensor.shape[0] = self.config.vocab_size;
            for _ in rows..self.config.vocab_size {
                tensor.data.extend(&mean);
            }
        }
        Ok(tensor)
    }

    fn has(&self, name: &str) -> bool {
        self.source.has(name)
    }

    fn quantized(&self, name: &str) -> Result<Option<Quantized>, ModelError> {
        self.source.quantized(name)
    }

    fn original(&self, name: &str) -> Result<Option<NamedTensor>, ModelError> {
        self.source.original(name)
    }
}
