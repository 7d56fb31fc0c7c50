//! Bytes that a run will hold, estimated before anything is loaded.

use hone_kernels::Cpu;

use crate::buffers::{BackScratch, Dims, NActs, Scratch, StreamGrad, exact, planned_bytes};
use crate::config::{LinearShape, Map, layer_prefix};
use crate::head::{HeadActs, HeadBack};
use crate::held::VALUE_BYTES;
use crate::layer::N_SITES;
use crate::linear::LoraNeeds;
use crate::lora::{EMBED, HEAD, PREFIX, modules};
use crate::param::{ParamInfo, ParamKind};
use crate::workspace::n_streams;
use crate::{Compute, LoraConfig, ModelConfig, ModelError, QuantSpec, Recompute};

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method<'a> {
    /// Nothing: evaluation and generation.
    Inference,
    /// All weights.
    Full,
    /// An adapter.
    Lora(&'a LoraConfig),
    /// An adapter on linear maps of 4 bits.
    Qlora(&'a LoraConfig, QuantSpec),
}

impl<'a> Method<'a> {
    /// The adapter that is trained.
    fn lora(self) -> Option<&'a LoraConfig> {
        match self {
            Method::Lora(lora) | Method::Qlora(lora, _) => Some(lora),
            Method::Inference | Method::Full => None,
        }
    }
}

/// What a memory plan is made for, beside the model's shape.
#[derive(Clone, Copy, Debug)]
pub struct MemoryNeeds<'a> {
    /// What is trained.
    pub method: Method<'a>,
    /// The tensors that get a gradient: [`trained_params`], but for those that are frozen.
    pub trained: &'a [ParamInfo],
    /// Bytes that the update rule keeps of them from step to step.
    pub optimizer: u64,
    /// Whether a moving average of them is kept.
    pub average: bool,
    /// Whether the state is written down on the way.
    pub checkpoints: bool,
    /// Tokens of the largest micro-batch.
    pub n_tokens: usize,
    /// What the backward computes again.
    pub recompute: Recompute,
    /// What products compute in: frozen matrices are kept in it. Trained weights are f32 in either,
    /// and rounded as they are multiplied: there is no second copy of them.
    pub compute: Compute,
    /// Whether the file has the embedding in bf16 ([`crate::TensorSource::is_bf16`]): it is kept so
    /// where products are of bf16 and it is not trained.
    pub half_embedding: bool,
    /// Bytes of the files that the weights are read from, which are mapped meanwhile.
    pub files: u64,
}

/// Bytes held during a run, by purpose. The program itself is not in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Base weights and adapters, and what these need to be put on.
    pub weights: u64,
    /// Scales of quantised weights.
    pub quantisation: u64,
    /// Gradients of what is trained.
    pub gradients: u64,
    /// What the update rule keeps: of AdamW both moments.
    pub optimizer: u64,
    /// The moving average of the weights.
    pub average: u64,
    /// Activations, residual streams and the buffers of the passes.
    pub activations: u64,
    /// The chunk of logits, and the head's other buffers.
    pub head: u64,
    /// Held beside the weights while they are read, and not after it: the mapped files, and the
    /// largest tensor on its way.
    pub loading: u64,
    /// The copy of the state that a checkpoint is written from.
    pub checkpoint: u64,
    /// The copy of the weights that the result is written from, when the update rule's state is gone.
    pub saving: u64,
}

impl MemoryPlan {
    /// The plan of a run.
    pub fn new(config: &ModelConfig, needs: &MemoryNeeds<'_>) -> Self {
        let n_trained: u64 = needs.trained.iter().map(|info| info.n_values() as u64).sum();
        let n_adapter = needs.method.lora().map_or(0, |lora| lora.n_params(config));
        let beside = needs.method.lora().map_or(0, |lora| beside_adapter(config, lora) as u64);
        let is_packed = needs.method.lora().is_some_and(|lora| packs_head(config, lora));
        let packed = if is_packed { embed_bytes(config, needs.compute) } else { 0 };
        let (base, quantisation) = base_bytes(config, needs);
        let n_average = if needs.average { n_trained } else { 0 };
        MemoryPlan {
            weights: base + packed + VALUE_BYTES * (n_adapter + beside),
            quantisation,
            gradients: VALUE_BYTES * n_trained,
            optimizer: needs.optimizer,
            average: VALUE_BYTES * n_average,
            activations: activations(config, needs),
            head: head(config, needs),
            loading: needs.files + largest_map(config),
            checkpoint: if needs.checkpoints {
                VALUE_BYTES * (n_trained + n_average) + needs.optimizer
            } else {
                0
            },
            saving: match needs.method {
                Method::Full => VALUE_BYTES * config.n_params() as u64,
                _ => VALUE_BYTES * n_adapter,
            },
        }
    }

    /// Bytes of a step: all but what is held before, beside and after it.
    pub fn step(&self) -> u64 {
        self.weights
            + self.quantisation
            + self.gradients
            + self.optimizer
            + self.average
            + self.activations
            + self.head
    }

    /// Bytes at the worst moment.
    pub fn peak(&self) -> u64 {
        let before = self.gradients + self.weights + self.quantisation + self.loading;
        let after = self.step() - self.optimizer - self.average + self.saving;
        before.max(self.step() + self.checkpoint).max(after)
    }

    /// Its parts with their names, in the order in which they are shown.
    pub fn parts(&self) -> [(&'static str, u64); 11] {
        [
            ("weights", self.weights),
            ("quantisation", self.quantisation),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("average", self.average),
            ("activations", self.activations),
            ("head", self.head),
            ("loading", self.loading),
            ("checkpoint", self.checkpoint),
            ("saving", self.saving),
            ("peak", self.peak()),
        ]
    }
}

/// Bytes of the base's values, and of the scales of those in 4 bits. Norms and biases are f32 always;
/// of a model that is trained in full, all is.
fn base_bytes(config: &ModelConfig, needs: &MemoryNeeds<'_>) -> (u64, u64) {
    let full = VALUE_BYTES * config.n_params() as u64;
    let (v, d) = (config.vocab_size, config.hidden_size);
    let (head, head_bytes) = match config.tie_word_embeddings {
        true => (0, 0),
        false => (v * d, embed_bytes(config, needs.compute)),
    };
    let n_linear: usize = modules(config).map(|(_, shape)| shape.inp * shape.out).sum();
    let plain = full - VALUE_BYTES * (head + n_linear) as u64 + head_bytes;
    let writes = needs.method.lora().is_some_and(|lora| !lora.token_ids(EMBED).is_empty());
    let packs = needs.half_embedding && needs.compute == Compute::Bf16 && !writes;
    let plain = match packs {
        true => plain - VALUE_BYTES * (v * d) as u64 + embed_bytes(config, needs.compute),
        false => plain,
    };
    match needs.method {
        Method::Full => (full, 0),
        Method::Inference | Method::Lora(_) => {
            let bytes = |(out, inp)| needs.compute.frozen_bytes(out, inp) as u64;
            let maps: u64 = maps(config).map(bytes).sum();
            (plain + config.num_hidden_layers as u64 * maps, 0)
        }
        Method::Qlora(_, spec) => {
            let sizes = modules(config).map(|(_, shape)| shape.inp * shape.out);
            sizes.fold((plain, 0), |(values, scales), n| {
                let codes = n.div_ceil(2);
                (values + codes as u64, scales + (spec.n_bytes(n) - codes) as u64)
            })
        }
    }
}

/// Bytes of a frozen head or embedding.
fn embed_bytes(config: &ModelConfig, compute: Compute) -> u64 {
    compute.frozen_bytes(config.vocab_size, config.hidden_size) as u64
}

/// Rows and columns (out, in) of the four maps of a layer, each of them one below the other.
fn maps(config: &ModelConfig) -> impl Iterator<Item = (usize, usize)> {
    let linears = config.linears();
    MAPS.into_iter().map(move |map| {
        let parts = || linears.iter().filter(|shape| shape.map == map);
        let inp = parts().next().map_or(0, |shape| shape.inp);
        (parts().map(|shape| shape.out).sum(), inp)
    })
}

/// Values in buffers that an adapter makes the decoder hold beside the base and the adapter's own
/// tensors.
fn beside_adapter(config: &ModelConfig, lora: &LoraConfig) -> usize {
    let matrix = config.vocab_size * config.hidden_size;
    let squares: usize = match lora.use_dora {
        true => modules(config).filter(|(name, _)| lora.targets(name)).map(|(_, m)| m.out).sum(),
        false => 0,
    };
    let n_tokens: usize = [EMBED, HEAD].map(|module| lora.token_ids(module).len()).iter().sum();
    // Rows are written into a plain copy of a packed head.
    let unpacked = !config.tie_word_embeddings && !lora.token_ids(HEAD).is_empty();
    squares + n_tokens * config.hidden_size + usize::from(unpacked) * matrix
}

/// Whether a tied head is packed: an adapter's embedding takes the place of the base's, which the
/// head goes on with.
fn packs_head(config: &ModelConfig, lora: &LoraConfig) -> bool {
    config.tie_word_embeddings && lora.saves(EMBED) && !lora.saves(HEAD)
}

/// The first layer that a backward goes through: what the embedding learns comes through all of
/// them.
fn first_trained(config: &ModelConfig, trained: &[ParamInfo]) -> usize {
    let n_layers = config.num_hidden_layers;
    let first = trained.iter().map(|info| match info.name.split_once("layers.") {
        Some((_, rest)) => rest.split('.').next().and_then(|n| n.parse().ok()).unwrap_or(0),
        None if info.name.contains("embed_tokens") => 0,
        None => n_layers,
    });
    first.min().unwrap_or(n_layers)
}

/// Residual streams, activations and the buffers of the passes.
fn activations(config: &ModelConfig, needs: &MemoryNeeds<'_>) -> u64 {
    let dims = Dims::new(config);
    let trains = !needs.trained.is_empty();
    let n_layers = config.num_hidden_layers;
    let first = first_trained(config, needs.trained);
    let inner = needs.method.lora().map_or([0; N_SITES], |lora| inner_widths(config, lora));
    let n_acts = NActs::kept(needs.recompute, n_layers - first, inner);
    let (compute, n) = (needs.compute, needs.n_tokens);
    let lora = needs.method.lora().map_or(LoraNeeds::default(), |lora| layer_needs(config, lora));
    let streams = n_streams(n_layers, first);
    let mut bytes = planned_bytes(&[exact(streams * dims.d)], compute, n);
    bytes += n_acts.n_bytes(&dims, compute, n);
    bytes += Scratch::<Cpu>::planned_bytes(&dims, lora, compute, n);
    if trains {
        bytes += planned_bytes(&StreamGrad::<Cpu>::widths(&dims, compute), compute, n);
        bytes += BackScratch::<Cpu>::planned_bytes(&dims, compute, n);
    }
    bytes
}

/// The chunk of logits, and the rows on their way to it.
fn head(config: &ModelConfig, needs: &MemoryNeeds<'_>) -> u64 {
    let (dims, n) = (Dims::new(config), needs.n_tokens);
    let lora = needs.method.lora().map_or(LoraNeeds::default(), |lora| head_needs(config, lora));
    let mut bytes = HeadActs::<Cpu>::planned_bytes(&dims, n, lora, needs.compute);
    if !needs.trained.is_empty() {
        bytes += HeadBack::<Cpu>::planned_bytes(&dims, n, needs.compute);
    }
    bytes
}

/// Buffers of the adapter of maps that read one input, `inp` wide, and give `out` columns.
fn group_needs(lora: &LoraConfig, rank: usize, inp: usize, out: usize) -> LoraNeeds {
    LoraNeeds {
        rank,
        dropout_width: if lora.lora_dropout > 0.0 { inp } else { 0 },
        dora_width: if lora.use_dora { out } else { 0 },
    }
}

/// The maps of a layer in their order.
const MAPS: [Map; N_SITES] = [Map::Qkv, Map::O, Map::GateUp, Map::Down];

/// The adapters of all maps: which map it is, R of its modules, and its sides (out, in).
fn adapted_maps(config: &ModelConfig, lora: &LoraConfig) -> Vec<(usize, usize, (usize, usize))> {
    let linears = config.linears();
    let mut found = Vec::new();
    for layer in 0..config.num_hidden_layers {
        for (site, map) in MAPS.into_iter().enumerate() {
            let name = |shape: &LinearShape| format!("{}.{}", layer_prefix(layer), shape.name);
            let group = || linears.iter().filter(|shape| shape.map == map);
            let adapted = group().map(|shape| (name(shape), shape.inp));
            let adapted: Vec<_> = adapted.filter(|(name, _)| lora.targets(name)).collect();
            let Some((_, inp)) = adapted.first() else { continue };
            let rank = adapted.iter().map(|(name, _)| lora.rank_of(name)).sum();
            found.push((site, rank, (group().map(|shape| shape.out).sum(), *inp)));
        }
    }
    found
}

/// Buffers of the adapters of the layers and of the embedding.
fn layer_needs(config: &ModelConfig, lora: &LoraConfig) -> LoraNeeds {
    let rank = if lora.targets(EMBED) { lora.rank_of(EMBED) } else { 0 };
    let embed = LoraNeeds { rank, ..LoraNeeds::default() };
    let maps = adapted_maps(config, lora).into_iter();
    maps.fold(embed, |widest, (_, rank, (out, inp))| widest.max(group_needs(lora, rank, inp, out)))
}

/// R of each map of a layer where X At is kept; see [`crate::linear::Linear::inner_width`].
fn inner_widths(config: &ModelConfig, lora: &LoraConfig) -> [usize; N_SITES] {
    let mut widths = [0; N_SITES];
    for (site, rank, _) in adapted_maps(config, lora) {
        widths[site] = if lora.use_dora { 0 } else { rank.max(widths[site]) };
    }
    widths
}

/// Buffers of the adapter of the head.
fn head_needs(config: &ModelConfig, lora: &LoraConfig) -> LoraNeeds {
    match lora.targets(HEAD) {
        true => group_needs(lora, lora.rank_of(HEAD), config.hidden_size, config.vocab_size),
        false => LoraNeeds::default(),
    }
}

/// Bytes of the largest matrix on its way from the file into its buffer.
fn largest_map(config: &ModelConfig) -> u64 {
    let largest = maps(config).map(|(out, inp)| out * inp).max();
    // Once as it is read, and once more where several are laid end to end.
    2 * VALUE_BYTES * largest.unwrap_or_default() as u64
}

/// What a run trains, by the shape of its model alone: names, shapes and kinds. Buffers and offsets
/// are those of no decoder.
pub fn trained_params(config: &ModelConfig, method: Method<'_>) -> Vec<ParamInfo> {
    let info = |name: String, shape: Vec<usize>, kind| ParamInfo {
        name,
        shape,
        kind,
        buffer: 0,
        offset: 0,
    };
    match method {
        Method::Inference => Vec::new(),
        Method::Full => {
            let entries = config.tensors().into_iter();
            entries.map(|entry| info(entry.name.clone(), entry.shape, kind(&entry.name))).collect()
        }
        Method::Lora(lora) | Method::Qlora(lora, _) => {
            let entries = lora.tensors(config).into_iter();
            entries.map(|entry| info(entry.name.clone(), entry.shape, kind(&entry.name))).collect()
        }
    }
}

/// Checks that of the weights that read the same input, which lie in one buffer, all are frozen or
/// none; biases lie in buffers of their own, and each can be frozen by itself. Errors: a weight
/// that is, beside one that is not.
pub fn check_frozen(
    config: &ModelConfig,
    is_frozen: &dyn Fn(&str) -> bool,
) -> Result<(), ModelError> {
    let linears: Vec<(String, LinearShape)> = modules(config).collect();
    let same = |(a, one): &(String, LinearShape), (b, other): &(String, LinearShape)| {
        let layer = |name: &str| name.split('.').nth(2).map(str::to_owned);
        one.map == other.map && layer(a) == layer(b)
    };
    for stacked in linears.chunk_by(same) {
        let names = stacked.iter().map(|(module, _)| format!("{module}.weight"));
        let (frozen, trained): (Vec<_>, Vec<_>) = names.partition(|name| is_frozen(name));
        if let ([frozen, ..], [trained, ..]) = (&frozen[..], &trained[..]) {
            let (frozen, trained) = (frozen.clone(), trained.clone());
            return Err(ModelError::Freeze { frozen, trained });
        }
    }
    Ok(())
}

/// What a tensor of that name is: one of the model's, or an adapter's.
fn kind(name: &str) -> ParamKind {
    let name = name.strip_prefix(PREFIX).unwrap_or(name);
    match name {
        name if name.contains(".lora_A.") || name.ends_with(".lora_embedding_A") => {
            ParamKind::LoraA
        }
        name if name.contains(".lora_") => ParamKind::LoraB,
        name if name.ends_with(".trainable_tokens_delta") => ParamKind::Embedding,
        "model.embed_tokens.weight" => ParamKind::Embedding,
        "lm_head.weight" => ParamKind::Head,
        name if name.ends_with("norm.weight") => ParamKind::Norm,
        name if name.ends_with(".bias") => ParamKind::Bias,
        _ => ParamKind::Matrix,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ValueType;

    fn needs<'a>(method: Method<'a>, trained: &'a [ParamInfo]) -> MemoryNeeds<'a> {
        let n: usize = trained.iter().map(ParamInfo::n_values).sum();
        MemoryNeeds {
            method,
            trained,
            optimizer: 8 * n as u64,
            average: false,
            checkpoints: false,
            n_tokens: 2048,
            recompute: Recompute::None,
            compute: Compute::F32,
            half_embedding: false,
            files: 0,
        }
    }

    #[test]
    fn smollm2_fits_as_counted_by_hand() {
        let text = r#"{"model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
            "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
            "num_key_value_heads": 3, "tie_word_embeddings": true}"#;
        let config = ModelConfig::from_json(text).unwrap();
        let lora = LoraConfig::all_linear(16, 32.0);
        let method = Method::Lora(&lora);
        let trained = trained_params(&config, method);
        let needs = needs(method, &trained);
        let plan = MemoryPlan::new(&config, &needs);
        assert_eq!(plan.weights, 4 * (134_515_008 + 4_884_480));
        assert_eq!(plan.gradients, 4 * 4_884_480);
        assert_eq!(plan.optimizer, 2 * plan.gradients);
        // QLoRA: 106,168,320 values of the linear maps in 4 bits, blocks of 64 with double
        // quantisation: 4.127 bits each and a map of 1 KiB for each of 210 matrices.
        let small = Method::Qlora(&lora, QuantSpec::qlora(ValueType::Bf16));
        assert_eq!(trained_params(&config, small), trained);
        let small = MemoryPlan::new(&config, &MemoryNeeds { method: small, ..needs });
        let saved = plan.weights - small.weights;
        assert_eq!(saved, 106_168_320 * 7 / 2);
        let bits = 8.0 * (small.quantisation as f64 - 1028.0 * 210.0) / 106_168_320.0;
        assert!((bits - 0.127).abs() < 1e-3, "{bits}");
        assert_eq!(small.gradients, plan.gradients);
        // In bf16 the linear maps have 2 bytes a value; the embedding, which is the head, stays f32.
        let half = MemoryPlan::new(&config, &MemoryNeeds { compute: Compute::Bf16, ..needs });
        assert_eq!(plan.weights - half.weights, 2 * 106_168_320);
        // So has, of a layer, a row of qkv, attn and gate_up, (960 + 576 + 3072); and the scratch of
        // normed, h, dnormed, dqkv, dattn and dh; and normed of the head. The stream's gradient is
        // there twice, and there is one of 256 rows of logits.
        let rounded = 30 * (960 + 576 + 3072) + (576 + 1536) + (576 + 960 + 576 + 1536);
        // X At of 16 for each of seven modules, and of three in scratch.
        let inner = 30 * 7 * 16;
        assert_eq!(plan.activations - half.activations, 2 * 2048 * (rounded + inner + 48 - 576));
        assert_eq!(plan.head + 2 * 256 * 49_152 - half.head, 2 * 2048 * 576);
        let MemoryPlan { weights, activations, head, .. } = plan;
        assert_eq!(MemoryPlan { weights, activations, head, ..half }, plan);
        // And so does the embedding, where the file has it in bf16.
        let stored = MemoryNeeds { compute: Compute::Bf16, half_embedding: true, ..needs };
        let stored = MemoryPlan::new(&config, &stored);
        assert_eq!(half.weights - stored.weights, 2 * 49_152 * 576);
        let exact = MemoryNeeds { half_embedding: true, ..needs };
        assert_eq!(MemoryPlan::new(&config, &exact), plan);
        let full = |compute| MemoryNeeds { method: Method::Full, compute, ..needs };
        let [full, half] = [Compute::F32, Compute::Bf16].map(full);
        let [full, half] = [full, half].map(|needs| MemoryPlan::new(&config, &needs));
        assert_eq!(full.activations - half.activations, 2 * 2048 * (rounded - 576));
        assert_eq!(plan.activations - full.activations, 4 * 2048 * (inner + 2 * 48));
        assert_eq!((full.weights, full.gradients), (half.weights, half.gradients));
        let untied = ModelConfig { tie_word_embeddings: false, ..config.clone() };
        let [whole, half] = [Compute::F32, Compute::Bf16]
            .map(|compute| MemoryPlan::new(&untied, &MemoryNeeds { compute, ..needs }).weights);
        assert_eq!(whole - half, 2 * (106_168_320 + 49_152 * 576));
        let needs = MemoryNeeds { recompute: Recompute::Layer, ..needs };
        let layer = MemoryPlan::new(&config, &needs);
        assert!(layer.activations * 5 < plan.activations, "{layer:?} {plan:?}");
        let all = MemoryNeeds { files: 1 << 40, average: true, ..needs };
        let all = MemoryPlan::new(&config, &all);
        assert_eq!((all.average, all.step()), (plan.gradients, layer.step() + plan.gradients));
        assert!(all.peak() > 1 << 40, "the files are mapped while they are read");
    }

    /// Mixed precision with Adam has 2 bytes of a weight, 2 of its gradient, 4 of a master copy and 8
    /// of moments: 16 a parameter, 112 GB for seven thousand million. In f32 a weight has 4, its
    /// gradient 4, its moments 8: as many.
    #[test]
    fn full_tuning_of_seven_billion_needs_what_the_textbook_says() {
        let text = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama",
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": false}"#;
        let config = ModelConfig::from_json(text).unwrap();
        let n = config.n_params() as u64;
        assert_eq!(n, 6_738_415_616);
        let mixed = n * (2 + 2 + 4 + 8);
        assert_eq!(mixed, 107_814_649_856);
        assert_eq!(16 * 7_000_000_000_u64, 112_000_000_000);
        let trained = trained_params(&config, Method::Full);
        let plan = MemoryPlan::new(&config, &needs(Method::Full, &trained));
        assert_eq!(plan.weights + plan.gradients + plan.optimizer, mixed);
        assert!(plan.step() > mixed && plan.activations > 10 << 30);
    }
}
