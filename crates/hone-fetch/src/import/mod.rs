//! A GGUF file as a Hugging Face model directory.
//!
//! The reverse of what llama.cpp's converters do: metadata become `config.json` and the tokenizer's
//! files, quantised blocks become bf16 or f32, names become Hugging Face's, and the rows of the
//! query and key projections go back to the order in which Hugging Face's rotary embedding expects
//! them. What cannot be brought back exactly is refused by name.

mod llama;
mod pretokenizer;
mod tokenizer;

use std::io::{Read, Seek, Write};

use hone_model::TensorSource;
use hone_model::{
    ModelConfig, ModelError, NamedTensor, SafetensorsWriter, StoredType, TensorEntry,
};
use serde_json::{Value, json};

use crate::gguf::{Gguf, GgufError, read_f32};
use llama::Plan;
use tokenizer::Tokenizer;

/// Why a GGUF file cannot become a model directory.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImportError {
    /// The file itself is damaged.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The file is good, but asks for something that hone does not do.
    #[error("{what} is not supported: {reason}")]
    Unsupported { what: String, reason: String },
    /// The parts of the file do not fit each other.
    #[error("{0}")]
    Inconsistent(String),
    /// Tensors and configuration do not fit each other, or the model is of a kind that hone does
    /// not train.
    #[error(transparent)]
    Model(#[from] ModelError),
}

/// A GGUF file that was understood: everything of the model directory but the weights is at hand.
#[derive(Debug)]
pub(crate) struct Import {
    config: ModelConfig,
    plan: Plan,
    tokenizer: Tokenizer,
    stored: StoredType,
}

impl Import {
    /// Understands a header. Reads no tensor.
    pub(crate) fn new(gguf: &Gguf, stored: StoredType) -> Result<Self, ImportError> {
        let architecture = gguf.metadata.str("general.architecture")?;
        if architecture != "llama" {
            let what = format!("the architecture `{architecture}`");
            let reason = "only `llama` (Llama, SmolLM2, Mistral) can be imported".to_owned();
            return Err(ImportError::Unsupported { what, reason });
        }
        let tokenizer = Tokenizer::from_metadata(&gguf.metadata)?;
        let mut config = llama::config(gguf)?;
        config.bos_token_id = tokenizer.bos;
        config.eos_token_ids.clone_from(&tokenizer.eos);
        config.pad_token_id = tokenizer.pad;
        let plan = Plan::new(gguf, &config)?;
        config.check_source(&plan)?;
        if tokenizer.n_tokens > config.vocab_size {
            let (n, rows) = (tokenizer.n_tokens, config.vocab_size);
            let what = format!("the tokenizer has {n} tokens, the embedding only {rows} rows");
            return Err(ImportError::Inconsistent(what));
        }
        Ok(Import { config, plan, tokenizer, stored })
    }

    /// The configuration of the model.
    pub(crate) fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Number of tensors that will be written.
    pub(crate) fn n_tensors(&self) -> usize {
        self.plan.entries().len()
    }

    /// Name and bytes of every file of the directory but the weights.
    pub(crate) fn small_files(&self) -> Vec<(&'static str, Vec<u8>)> {
        let context_len = self.config.max_position_embeddings;
        let mut files = vec![
            ("config.json", self.config_json()),
            ("generation_config.json", pretty(&self.tokenizer.generation_config())),
            ("special_tokens_map.json", pretty(&self.tokenizer.special_tokens_map())),
            ("tokenizer.json", self.tokenizer.json.clone().into_bytes()),
            ("tokenizer_config.json", pretty(&self.tokenizer.config(context_len))),
        ];
        if let Some(template) = &self.tokenizer.chat_template {
            files.push(("chat_template.jinja", template.clone().into_bytes()));
        }
        files
    }

    fn config_json(&self) -> Vec<u8> {
        let mut value: Value =
            serde_json::from_str(&self.config.to_json()).expect("it was just written as JSON");
        value["torch_dtype"] = match self.stored {
            StoredType::F32 => json!("float32"),
            StoredType::Bf16 => json!("bfloat16"),
        };
        pretty(&value)
    }

    /// Decodes every tensor and writes `model.safetensors`, one tensor in memory at a time. Asks
    /// `step` after each whether to go on, and says whether it came to the end.
    pub(crate) fn write_weights(
        &self,
        mut file: impl Read + Seek,
        out: impl Write,
        mut step: impl FnMut() -> bool,
    ) -> Result<bool, ImportError> {
        let mut writer = SafetensorsWriter::new(out, &self.plan.entries(), self.stored)?;
        for (entry, part) in self.plan.parts() {
            let stored = read_f32(&mut file, &part.tensor)?;
            let data = match part.n_heads {
                Some(n_heads) => llama::unpermute(&stored, &entry.shape, n_heads),
                None => stored,
            };
            let tensor = NamedTensor::new(&entry.name, entry.shape.clone(), data);
            tensor.check_finite()?;
            writer.put(&tensor)?;
            if !step() {
                return Ok(false);
            }
        }
        writer.finish()?;
        Ok(true)
    }
}

fn pretty(value: &Value) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(value).expect("plain JSON can be written");
    bytes.push(b'\n');
    bytes
}

/// The part of [`TensorSource`] that checks of names and shapes need; there is nothing to read yet.
impl TensorSource for Plan {
    fn entries(&self) -> Vec<TensorEntry> {
        self.parts().map(|(entry, _)| entry.clone()).collect()
    }

    fn tensor(&self, name: &str) -> Result<NamedTensor, ModelError> {
        Err(ModelError::NoTensor(name.to_owned()))
    }
}

#[cfg(test)]
mod tests;
