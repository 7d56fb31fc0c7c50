//! Fresh adapters: random ones that change nothing yet, and ones that take over a part of the base.

use hone_kernels::quant::ValueType;
use hone_kernels::rng;

use super::svd::{Svd, largest};
use super::{Adapter, InitMethod, LoraConfig, Place, places};
use super::{
    EMBED, HEAD, base_tensors, embedding_names, factor_names, magnitude_name, tokens_name,
};
use crate::init::named_seed;
use crate::linear::{as_multiplied, finite};
use crate::merge::scaled_product;
use crate::tensors::{NamedTensor, TensorSource, Tensors};
use crate::{ModelConfig, ModelError};

impl LoraConfig {
    /// Whether a fresh adapter of this kind depends on the base's weights.
    pub fn needs_weights(&self, model: &ModelConfig) -> bool {
        let is_plain = matches!(self.init, InitMethod::Default | InitMethod::Gaussian);
        let whole = base_tensors(model).iter().any(|entry| self.whole_name(&entry.name).is_some());
        self.use_dora || !is_plain || whole || !self.trainable_tokens.is_empty()
    }
}

impl Adapter {
    /// A fresh adapter, as PEFT starts it, that changes nothing yet. Settings that start from the
    /// base's weights ([`LoraConfig::needs_weights`]) need [`Adapter::init_from`].
    pub fn init(model: &ModelConfig, config: LoraConfig, seed: u64) -> Result<Self, ModelError> {
        if config.needs_weights(model) {
            let what = "its settings start from the base's weights: DoRA, PiSSA, LoftQ, biases, \
                        `modules_to_save` or `trainable_token_indices`";
            return Err(ModelError::Adapter(what.to_owned()));
        }
        Self::init_from(model, config, &Tensors::new(), seed)
    }

    /// [`Adapter::init`] from the base's weights. With [`InitMethod::Pissa`] the base must be read
    /// through [`crate::Merge::residual`] from then on, with [`InitMethod::Loftq`] it must hold
    /// 4-bit weights beside the values that they were made of ([`crate::QuantizeOnLoad`]).
    pub fn init_from(
        model: &ModelConfig,
        config: LoraConfig,
        base: &dyn TensorSource,
        seed: u64,
    ) -> Result<Self, ModelError> {
        config.check_against(model)?;
        let config = LoraConfig { target_modules: config.target_modules.named(model), ..config };
        let mut tensors = Tensors::new();
        for place in places(model).filter(|place| config.targets(&place.name)) {
            match place.name == EMBED {
                true => embedding(&config, &place, seed, &mut tensors),
                false => factors(&config, &place, base, seed, &mut tensors)?,
            }
        }
        for entry in base_tensors(model) {
            if let Some(name) = config.whole_name(&entry.name) {
                let tensor = finite(base, stored_name(model, &entry.name))?;
                tensors.insert(NamedTensor { name, ..tensor });
            }
        }
        for module in [EMBED, HEAD] {
            let ids = config.token_ids(module);
            if !ids.is_empty() {
                let weight = finite(base, stored_name(model, &format!("{module}.weight")))?;
                let d = model.hidden_size;
                let rows = ids.iter().flat_map(|&id| &weight.data[id as usize * d..][..d]);
                let data = rows.copied().collect();
                tensors.insert(NamedTensor::new(tokens_name(module), vec![ids.len(), d], data));
            }
        }
        let adapter = Adapter { config, tensors };
        adapter.check(model)?;
        Ok(adapter)
    }

    /// Of a PiSSA adapter trained on [`crate::Merge::residual`] of `initial`, the plain LoRA
    /// adapter of the unchanged base: s (B A - B0 A0) as one product of twice the rank.
    pub fn to_plain(&self, model: &ModelConfig, initial: &Adapter) -> Result<Self, ModelError> {
        self.check(model)?;
        initial.check(model)?;
        if self.config != initial.config {
            let what = "an adapter and what it started from have different settings";
            return Err(ModelError::Adapter(what.to_owned()));
        }
        let mut config = self.config.clone();
        // Twice the rank at the same scaling.
        let grow = if config.use_rslora { 2_f64.sqrt() } else { 2.0 };
        config.r *= 2;
        config.lora_alpha *= grow;
        config.rank_pattern.iter_mut().for_each(|(_, r)| *r *= 2);
        config.alpha_pattern.iter_mut().for_each(|(_, alpha)| *alpha *= grow);
        config.init = InitMethod::Default;
        let mut tensors = self.tensors.clone();
        for Place { name, out, inp } in places(model).filter(|p| p.name != EMBED) {
            let (now, then) = (self.factors(&name, out, inp)?, initial.factors(&name, out, inp)?);
            let (Some((a, b)), Some((a0, b0))) = (now, then) else { continue };
            let r = self.config.rank_of(&name);
            let mut joined = a.data.clone();
            joined.extend(&a0.data);
            tensors.insert(NamedTensor::new(a.name.clone(), vec![2 * r, inp], joined));
            let rows = b.data.chunks(r).zip(b0.data.chunks(r));
            let joined = rows.flat_map(|(b, b0)| {
                b.iter().copied().chain(b0.iter().map(|x| -x)).collect::<Vec<f32>>()
            });
            tensors.insert(NamedTensor::new(b.name.clone(), vec![out, 2 * r], joined.collect()));
        }
        let adapter = Adapter { config, tensors };
        adapter.check(model)?;
        Ok(adapter)
    }
}

/// The name under which a base tensor is read: a tied head is the embedding.
fn stored_name<'a>(model: &ModelConfig, name: &'a str) -> &'a str {
    match model.tie_word_embeddings && name == "lm_head.weight" {
        true => "model.embed_tokens.weight",
        false => name,
    }
}

/// Factors of the embedding as PEFT draws them: A zeros, B standard normal.
fn embedding(config: &LoraConfig, place: &Place, seed: u64, into: &mut Tensors) {
    let [name_a, name_b] = embedding_names();
    let r = config.rank_of(&place.name);
    let stream = named_seed(seed, &name_b);
    let b = (0..place.inp * r).map(|i| rng::normal(stream, i as u64) as f32).collect();
    into.insert(NamedTensor::new(name_a, vec![r, place.out], vec![0.0; r * place.out]));
    into.insert(NamedTensor::new(name_b, vec![place.inp, r], b));
}

/// Factors of a linear map, and the magnitudes of its rows.
fn factors(
    config: &LoraConfig,
    place: &Place,
    base: &dyn TensorSource,
    seed: u64,
    into: &mut Tensors,
) -> Result<(), ModelError> {
    let Place { name, out, inp } = place;
    let (out, inp, r) = (*out, *inp, config.rank_of(name));
    let (name_a, name_b) = factor_names(name);
    let stream = named_seed(seed, &name_a);
    let weight = format!("{name}.weight");
    let scaling = config.scaling_of(name);
    let zeros = || vec![0.0; out * r];
    let (a, b) = match config.init {
        InitMethod::Default => {
            let bound = 1.0 / (inp as f64).sqrt();
            let value = |i| ((2.0 * rng::uniform(stream, i as u64) - 1.0) * bound) as f32;
            ((0..r * inp).map(value).collect(), zeros())
        }
        InitMethod::Gaussian => {
            let value = |i| (rng::normal(stream, i as u64) / r as f64) as f32;
            ((0..r * inp).map(value).collect(), zeros())
        }
        InitMethod::Pissa => {
            let weight = finite(base, &weight)?;
            split(largest(&weight.data, (out, inp), r, stream), r, scaling)
        }
        InitMethod::Loftq => {
            let lost = lost(base, &weight)?;
            split(largest(&lost, (out, inp), r, stream), r, scaling)
        }
    };
    let a = NamedTensor::new(name_a, vec![r, inp], a);
    let b = NamedTensor::new(name_b, vec![out, r], b);
    if config.use_dora {
        // Row norms of W + s B A, so that the fresh adapter does what it does without them.
        let mut rows = as_multiplied(base, &weight)?.data;
        if config.init == InitMethod::Pissa {
            // W less s B A is what the adapter is put on: together they are W.
        } else if config.init == InitMethod::Loftq {
            let delta = scaled_product(&a, &b, scaling);
            rows.iter_mut().zip(&delta).for_each(|(w, delta)| *w += delta);
        }
        let norm = |row: &[f32]| row.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>().sqrt();
        let norms = rows.chunks(inp).map(|row| norm(row) as f32).collect();
        into.insert(NamedTensor::new(magnitude_name(name), vec![out], norms));
    }
    into.insert(a);
    into.insert(b);
    Ok(())
}

/// What quantisation took from a weight.
fn lost(base: &dyn TensorSource, name: &str) -> Result<Vec<f32>, ModelError> {
    let (Some(quantized), Some(original)) = (base.quantized(name)?, base.original(name)?) else {
        let what = format!("LoftQ needs `{name}` in 4 bits beside its values");
        return Err(ModelError::Adapter(what));
    };
    original.check_finite()?;
    let values = quantized.with_values(ValueType::F32).dequantize();
    Ok(original.data.iter().zip(values).map(|(w, q)| w - q).collect())
}

/// A = sqrt(S / s) Vt and B = U sqrt(S / s): their product times s is U S Vt.
fn split(svd: Svd, r: usize, scaling: f32) -> (Vec<f32>, Vec<f32>) {
    let Svd { u, s, vt } = svd;
    let roots: Vec<f64> = s.iter().map(|s| (s / f64::from(scaling)).sqrt()).collect();
    let inp = vt.len() / r;
    let a = vt.chunks(inp).zip(&roots).flat_map(|(row, root)| row.iter().map(move |v| v * root));
    let b = u.chunks(r).flat_map(|row| row.iter().zip(&roots).map(|(u, root)| u * root));
    (a.map(|x| x as f32).collect(), b.map(|x| x as f32).collect())
}
