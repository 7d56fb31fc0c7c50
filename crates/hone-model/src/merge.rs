//! An adapter folded into its base, one tensor at a time: W + s B A, its rows drawn to their
//! magnitudes with DoRA, and what was trained whole in place of what it was.

use candle_core::{Device, Tensor};

use crate::linear::as_multiplied;
use crate::lora::{EMBED, HEAD, Place, places};
use crate::tensors::{NamedTensor, TensorSource};
use crate::{Adapter, ModelConfig, ModelError, TensorEntry};

/// A base model seen through an adapter. It is a [`TensorSource`]: a decoder can be loaded from it,
/// and a streaming writer fed with it, in the memory of its largest tensor.
pub struct Merge<'a> {
    base: &'a dyn TensorSource,
    adapter: &'a Adapter,
    config: &'a ModelConfig,
    /// The configuration of what comes out.
    merged: ModelConfig,
    /// 1, or -1 to take the adapter out.
    sign: f32,
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
        let mut merged = config.clone();
        // A head that is no longer the embedding needs a matrix of its own.
        let parts = [EMBED, HEAD].map(|m| adapter.config.targets(m) || adapter.config.saves(m));
        merged.tie_word_embeddings &= parts == [false, false];
        Ok(Merge { base, adapter, config, merged, sign: 1.0 })
    }

    /// The base less the adapter, W - s B A: what PiSSA trains on. Errors: an adapter that is more
    /// than factors of linear maps.
    pub fn residual(
        config: &'a ModelConfig,
        base: &'a dyn TensorSource,
        adapter: &'a Adapter,
    ) -> Result<Self, ModelError> {
        let targets_embed = adapter.config.targets(EMBED);
        if targets_embed {
            let what = "the embedding has no part in PiSSA: exclude embed_tokens".to_owned();
            return Err(ModelError::Adapter(what));
        }
        Ok(Merge { sign: -1.0, merged: config.clone(), ..Merge::new(config, base, adapter)? })
    }

    /// The configuration of the merged model: that of the base, but for a tied head that the
    /// adapter has made another matrix than the embedding.
    pub fn config(&self) -> &ModelConfig {
        &self.merged
    }

    /// Whether the tied head becomes a matrix of its own.
    fn unties(&self) -> bool {
        self.config.tie_word_embeddings && !self.merged.tie_word_embeddings
    }

    /// Whether the adapter changes that tensor.
    pub fn changes(&self, name: &str) -> bool {
        let settings = &self.adapter.config;
        if self.sign > 0.0 && settings.whole_name(name).is_some() {
            return true;
        }
        name.strip_suffix(".weight").is_some_and(|module| {
            places(self.config).any(|place| place.name == module)
                && (settings.targets(module) || !self.tokens_of(module).is_empty())
        })
    }

    /// Ids of the rows of a module that are trained by themselves; a tied head has the embedding's.
    fn tokens_of(&self, module: &str) -> &[u32] {
        match module {
            EMBED => self.adapter.config.token_ids(EMBED),
            HEAD => self.adapter.config.token_ids(HEAD),
            _ => &[],
        }
    }

    /// What the adapter adds to that tensor; `None` where it changes nothing.
    pub fn delta(&self, name: &str) -> Result<Option<NamedTensor>, ModelError> {
        if !self.changes(name) {
            return Ok(None);
        }
        if let Some((_, delta)) = self.product(name)?
            && !self.adapter.config.use_dora
        {
            return Ok(Some(delta));
        }
        let base = self.base_tensor(name)?;
        let mut merged = self.tensor(name)?;
        merged.data.iter_mut().zip(&base.data).for_each(|(value, base)| *value -= base);
        Ok(Some(merged))
    }

    /// The module of a weight and s B A for it.
    fn product(&self, name: &str) -> Result<Option<(Place, NamedTensor)>, ModelError> {
        let Some(module) = name.strip_suffix(".weight") else { return Ok(None) };
        let Some(place) = places(self.config).find(|place| place.name == module) else {
            return Ok(None);
        };
        let scaling = self.sign * self.adapter.config.scaling_of(module);
        let shape = vec![place.out, place.inp];
        let data = if module == EMBED {
            let Some((a, b)) = self.adapter.embedding() else { return Ok(None) };
            // B A is (D, V), the matrix (V, D).
            let turned = scaled_product(a, b, scaling);
            let at = |i: usize| turned[i % place.inp * place.out + i / place.inp];
            (0..turned.len()).map(at).collect()
        } else {
            let factors = self.adapter.factors(module, place.out, place.inp)?;
            let Some((a, b)) = factors else { return Ok(None) };
            scaled_product(a, b, scaling)
        };
        Ok(Some((place, NamedTensor::new(name, shape, data))))
    }

    /// The base's tensor, as the decoder multiplies with it; that of a tied head is the embedding.
    fn base_tensor(&self, name: &str) -> Result<NamedTensor, ModelError> {
        if self.config.tie_word_embeddings && name == "lm_head.weight" {
            let embedding = as_multiplied(self.base, "model.embed_tokens.weight")?;
            return Ok(NamedTensor { name: name.to_owned(), ..embedding });
        }
        as_multiplied(self.base, name)
    }
}

/// s B A.
pub(crate) fn scaled_product(a: &NamedTensor, b: &NamedTensor, scaling: f32) -> Vec<f32> {
    let tensor = |t: &NamedTensor| Tensor::from_slice(&t.data, t.shape.as_slice(), &Device::Cpu);
    let product = || -> candle_core::Result<Vec<f32>> {
        let delta = tensor(b)?.matmul(&tensor(a)?)?;
        (delta * f64::from(scaling))?.flatten_all()?.to_vec1()
    };
    product().expect("the shapes of an adapter's factors are checked first")
}

/// Rows of `weight` drawn to the lengths `magnitude`.
fn set_lengths(weight: &mut NamedTensor, magnitude: &NamedTensor) {
    let inp = weight.shape[1];
    for (row, &length) in weight.data.chunks_mut(inp).zip(&magnitude.data) {
        let norm = row.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>().sqrt();
        let factor = f64::from(length) / norm;
        row.iter_mut().for_each(|w| *w = (f64::from(*w) * factor) as f32);
    }
}

impl TensorSource for Merge<'_> {
    fn entries(&self) -> Vec<TensorEntry> {
        let mut entries = self.base.entries();
        let name = "lm_head.weight";
        if self.unties()
            && let Err(at) = entries.binary_search_by(|entry| entry.name.as_str().cmp(name))
        {
            let shape = vec![self.config.vocab_size, self.config.hidden_size];
            entries.insert(at, TensorEntry { name: name.to_owned(), shape });
        }
        entries
    }

    fn tensor(&self, name: &str) -> Result<NamedTensor, ModelError> {
        let mut tensor = self.base_tensor(name)?;
        if let Some(whole) = self.adapter.whole(name).filter(|_| self.sign > 0.0) {
            tensor.data.clone_from(&whole.data);
        }
        if let Some((place, delta)) = self.product(name)? {
            for (value, change) in tensor.data.iter_mut().zip(&delta.data) {
                *value += change;
            }
            if let Some(magnitude) = self.adapter.magnitude(&place.name)
                && self.sign > 0.0
            {
                set_lengths(&mut tensor, magnitude);
            }
        }
        let module = name.strip_suffix(".weight").unwrap_or_default();
        let rows = match self.tokens_of(module) {
            [] => None,
            _ => self.adapter.token_rows(module),
        };
        if let Some((ids, rows)) = rows.filter(|_| self.sign > 0.0) {
            let d = self.config.hidden_size;
            for (&id, row) in ids.iter().zip(rows.data.chunks(d)) {
                tensor.data[id as usize * d..][..d].copy_from_slice(row);
            }
        }
        tensor.check_finite()?;
        Ok(tensor)
    }

    fn has(&self, name: &str) -> bool {
        self.base.has(name) || (self.unties() && name == "lm_head.weight")
    }
}
