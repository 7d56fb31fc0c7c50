//! The decoder of hone: its configuration, its weights, its adapters, and what runs on them.
//!
//! One decoder, driven by `config.json`, is trained, evaluated and generated from. Forward and
//! backward are explicit and go layer by layer through the operators of [`hone_kernels::Backend`],
//! so that the same code runs on every backend. Nothing here knows a path or a flag: weights come
//! as bytes or as [`Tensors`], configuration as JSON text.
//!
//! Dimensions, one letter each: T tokens of a batch (documents laid end to end), D model width, H
//! query heads, G key/value heads, K head width, I width of the feed-forward layer, V vocabulary, N
//! rows that have a target, R summed rank of adapters.
//!
//! | file | holds |
//! |---|---|
//! | `config/` | [`ModelConfig`]: what `config.json` says, family by family, and what is refused |
//! | `rope` | tables of rotary positions |
//! | `tensors`, `safetensors` | named tensors on the host, and their file format |
//! | `init` | random weights for pre-training |
//! | `batch` | [`Batch`]: packed documents with shifted targets and weights |
//! | `decoder`, `layer`, `head`, `linear`, `param`, `buffers`, `workspace` | the model |
//! | `lora` | [`LoraConfig`], [`Adapter`]: PEFT's adapter layout |
//! | `generate` | [`Generator`]: decoding with a key/value cache |
//! | `bnb` | 4-bit models: quantising on load, bitsandbytes' checkpoints |
//! | `merge` | [`Merge`]: an adapter folded into its base, tensor by tensor |
//! | `resize` | [`ResizedVocab`]: a base with room for new tokens |
//! | `plan` | [`MemoryPlan`]: bytes that a run will hold |
//! | `held` | [`HeldBytes`]: bytes that a decoder holds |

mod batch;
mod bnb;
mod buffers;
mod config;
mod decoder;
mod error;
mod generate;
mod head;
mod held;
mod init;
mod layer;
mod linear;
mod lora;
mod merge;
mod param;
mod pass;
mod plan;
mod resize;
mod rope;
mod safetensors;
mod tensors;
mod workspace;

pub use batch::Batch;
pub use bnb::{BnbConfig, BnbRegions, QuantizeOnLoad, write_bnb_checkpoint};
pub use config::{
    Activation, Family, Knobs, LayerKnobs, LayerRope, ModelConfig, NormPlaces, QkNorm, Rope,
    RopeScaling, ScoreScale,
};
pub use decoder::{Decoder, Training};
pub use error::ModelError;
pub use generate::{Generation, Generator, Sampling};
pub use held::HeldBytes;
pub use hone_kernels::quant::{CodeBook, QuantSpec, ValueType};
pub use hone_kernels::{Compute, LossOptions, LossSums};
pub use init::{init_weights, reinit_rows};
pub use lora::{Adapter, BiasMode, InitMethod, LoraConfig, Targets, TokenRows};
pub use merge::Merge;
pub use param::{ParamInfo, ParamKind};
pub use pass::{EmbeddingNoise, PassOptions, Recompute};
pub use plan::{MemoryNeeds, MemoryPlan, Method, check_frozen, trained_params};
pub use resize::ResizedVocab;
pub use safetensors::{SafetensorsRegions, SafetensorsWriter, StoredType, TensorEntry};
pub use tensors::{NamedTensor, TensorSource, Tensors};

/// The decoder on the CPU.
pub type CpuDecoder = Decoder<hone_kernels::Cpu>;
