//! What must not change a result, for every knob of the families: packing, batching, recomputation,
//! threads, merging, the backend; and the gradients against the loss itself.

use crate::common::*;
use crate::finite_differences;
use hone_kernels::{Backend, Cpu, Reference};
use hone_model::{
    Adapter, Compute, Decoder, Generator, LoraConfig, MemoryNeeds, MemoryPlan, Merge, Method,
    ModelConfig, ParamInfo, Recompute, Targets, Training, trained_params,
};
use proptest::prelude::*;

/// Largest difference allowed between two orders of f32 arithmetic, logits being of order one.
const ROUNDING: f64 = 1e-5;

/// Lengths of the documents, on both sides of windows and original contexts.
const LENS: [usize; 7] = [5, 1, 17, 8, 9, 2, 23];

/// Keys of a family and its `model_type`; together they turn every knob.
const FAMILIES: [(&str, &str); 9] = [
    ("smollm3", r#""no_rope_layers": [1, 0, 1], "sliding_window": 6, "use_sliding_window": true"#),
    ("mistral", r#""sliding_window": 6"#),
    (
        "qwen2",
        r#""use_sliding_window": true, "sliding_window": 7, "max_window_layers": 1,
           "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 8}"#,
    ),
    ("gemma2", r#""sliding_window": 6, "attn_logit_softcapping": 2, "query_pre_attn_scalar": 5"#),
    (
        "gemma3_text",
        r#""sliding_window": 6, "sliding_window_pattern": 2, "final_logit_softcapping": 4,
           "rope_scaling": {"type": "linear", "factor": 4}"#,
    ),
    (
        "phi3",
        r#""partial_rotary_factor": 0.5, "original_max_position_embeddings": 8, "rope_scaling": {
           "type": "longrope", "short_factor": [1, 1.5], "long_factor": [2, 5]}"#,
    ),
    (
        "granite",
        r#""attention_bias": true, "mlp_bias": true, "attention_multiplier": 0.3,
           "embedding_multiplier": 2, "residual_multiplier": 0.5, "logits_scaling": 0.7"#,
    ),
    ("olmo2", r#""attention_bias": true, "tie_word_embeddings": true"#),
    ("llama", r#""max_position_embeddings": 10, "rope_scaling": {"type": "dynamic", "factor": 4}"#),
];

/// A small model of every family.
pub(crate) fn each(check: impl Fn(&ModelConfig, &str)) {
    for (model_type, more) in FAMILIES {
        let context =
            if more.contains("dynamic") { "" } else { r#""max_position_embeddings": 64,"# };
        let text = format!(
            r#"{{"model_type": "{model_type}", "vocab_size": 43, "hidden_size": 20,
                "intermediate_size": 28, "num_hidden_layers": 3, "num_attention_heads": 4,
                "num_key_value_heads": 2, "head_dim": 8, {context} "initializer_range": 0.3,
                {more}}}"#
        );
        let config = ModelConfig::from_json(&text).unwrap_or_else(|e| panic!("{model_type}: {e}"));
        check(&config, model_type);
    }
}

/// An adapter on every linear map, with dropout.
pub(crate) fn lora(dropout: f32) -> LoraConfig {
    LoraConfig {
        lora_dropout: dropout,
        target_modules: Targets::AllLinear,
        ..LoraConfig::all_linear(3, 6.0)
    }
}

#[test]
fn a_document_alone_is_the_document_in_a_pack() {
    each(|config, family| check_alone(config, &LENS, ROUNDING, family));
}

#[test]
fn recomputation_and_threads_do_not_change_a_byte() {
    each(|config, family| {
        let documents = documents(config, &LENS);
        let plain = adapter(config, lora(0.25));
        let dora = LoraConfig { use_dora: true, ..lora(0.25) };
        let dora = Adapter::init_from(config, dora, &weights(config, 3), 11).unwrap();
        let run = |compute, recompute, (training, adapter): (Training, &Adapter), n_threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
            pool.install(|| {
                let mut decoder = decoder(Cpu::new().with_compute(compute), config, training);
                decoder.attach(adapter, true).unwrap();
                decoder.set_recompute(recompute);
                for part in documents.chunks(3) {
                    decoder.accumulate(&pack(part), 0.1, Some(7)).unwrap();
                }
                decoder.gradients()
            })
        };
        for kind in
            [(Training::Frozen, &plain), (Training::Full, &plain), (Training::Frozen, &dora)]
        {
            for compute in [Compute::F32, Compute::Bf16] {
                let expected = run(compute, Recompute::None, kind, 1);
                for (recompute, n_threads) in Recompute::ALL.into_iter().zip([2, 1, 8]) {
                    let found = run(compute, recompute, kind, n_threads);
                    assert_eq!(found, expected, "{family}, {compute:?}, {recompute:?}");
                }
                assert_eq!(run(compute, Recompute::Attention, kind, 3), expected, "{family}");
                assert_eq!(run(compute, Recompute::Layer, kind, 1), expected, "{family}");
            }
        }
    });
}

/// Whatever is trained and whatever is frozen, which decides what the backward reads.
#[test]
fn recomputation_serves_every_choice_of_what_is_trained() {
    each(|config, family| {
        let batch = pack(&documents(config, &LENS));
        let mut full = decoder(Cpu::new(), config, Training::Full);
        full.accumulate(&batch, 0.1, Some(3)).unwrap();
        let all = full.gradients();
        let check = |decoder: &mut Decoder<Cpu>, what: &str| {
            let found = Recompute::ALL.map(|recompute| {
                decoder.set_recompute(recompute);
                decoder.zero_gradients();
                decoder.accumulate(&batch, 0.1, Some(3)).unwrap();
                decoder.gradients()
            });
            assert!(found.iter().all(|gradients| *gradients == found[0]), "{family}, {what}");
            let mut n_known = 0;
            for tensor in found[0].iter().filter(|tensor| all.get(&tensor.name).is_some()) {
                assert_eq!(all.get(&tensor.name), Some(tensor), "{family}, {what}");
                n_known += 1;
            }
            n_known
        };
        let names = config.linear_names();
        assert!(names.len() >= 4);
        for name in names {
            let settings =
                LoraConfig { target_modules: vec![name.to_owned()].into(), ..lora(0.25) };
            let mut decoder = decoder(Cpu::new(), config, Training::Frozen);
            decoder.attach(&adapter(config, settings), true).unwrap();
            assert_eq!(check(&mut decoder, name), 0);
        }
        let parts = [
            "norm.",
            "self_attn.",
            "mlp.",
            "layers.1.",
            "layers.2.",
            "model.norm",
            "embed_tokens",
            "bias",
        ];
        for left in parts {
            let mut decoder = decoder(Cpu::new(), config, Training::Full);
            decoder.freeze(&|name| !name.contains(left)).unwrap();
            let n_left = all.iter().filter(|tensor| tensor.name.contains(left)).count();
            assert_eq!(check(&mut decoder, left), n_left, "{family}, {left}");
        }
    });
}

#[test]
fn cpu_is_its_reference() {
    each(|config, family| {
        let batch = pack(&documents(config, &LENS));
        let mut fast = decoder(Cpu::new(), config, Training::Full);
        let mut plain = decoder(Reference, config, Training::Full);
        fast.accumulate(&batch, 0.1, None).unwrap();
        plain.accumulate(&batch, 0.1, None).unwrap();
        let off = relative_distance(&plain.gradients(), &fast.gradients());
        assert!(off <= ROUNDING, "{family}: {off:e}");
    });
}

#[test]
fn merged_is_unmerged() {
    each(|config, family| {
        let base = weights(config, 3);
        let batch = pack(&documents(config, &LENS));
        let adapter = adapter(config, lora(0.0));
        let mut unmerged = decoder(Cpu::new(), config, Training::Frozen);
        let before = unmerged.logits(&batch, &every_row(&batch)).unwrap();
        unmerged.attach(&adapter, false).unwrap();
        let expected = unmerged.logits(&batch, &every_row(&batch)).unwrap();
        assert!(distance(&before, &expected) > 1e-2, "{family}: the adapter does nothing");
        let merge = Merge::new(config, &base, &adapter).unwrap();
        let mut merged = Decoder::load(Cpu::new(), config, &merge, Training::Frozen).unwrap();
        let off = distance(&merged.logits(&batch, &every_row(&batch)).unwrap(), &expected);
        assert!(off <= 2.0 * ROUNDING, "{family}: {off:e}");
        assert_eq!(unmerged.export(), base, "{family}");
    });
}

#[test]
fn gradients_are_slopes() {
    each(|config, _| {
        let batch = pack(&documents(config, &[7, 4, 11]));
        let n = config.tensors().len();
        finite_differences::check(decoder(Reference, config, Training::Full), &batch, n);
    });
}

/// Sequences that leave a window or an original context give the same ids side by side and alone,
/// and stop at the end of the context.
#[test]
fn generation_does_not_depend_on_the_batch() {
    each(|config, family| {
        let mut decoder = decoder(Cpu::new(), config, Training::Frozen);
        let prompts: Vec<Vec<u32>> =
            documents(config, &[3, 9, 1, 20, 7]).into_iter().map(|(ids, _)| ids).collect();
        let mut run = |batch_size| {
            let generator = Generator { batch_size, ..Generator::sampled(60, &[5], 1.3, 0.9, 1) };
            generator.run(&mut decoder, &prompts).unwrap()
        };
        let expected = run(5);
        assert_eq!(run(1), expected, "{family}");
        assert_eq!(run(3), expected, "{family}");
        for (prompt, found) in prompts.iter().zip(expected) {
            let most = 60.min(config.context() - prompt.len() + 1);
            assert!(found.stopped() || found.ids.len() == most, "{family}: {}", found.ids.len());
        }
    });
}

/// Fresh weights leave every norm at its neutral value, so that logits are of ordinary size.
#[test]
fn fresh_weights_are_neutral() {
    each(|config, family| {
        let weights = hone_model::init_weights(config, 1);
        let neutral = if config.knobs.norm_plus_one { 0.0 } else { 1.0 };
        let norms = weights.iter().filter(|t| t.name.ends_with("norm.weight"));
        let mut n_norms = 0;
        for norm in norms {
            assert!(norm.data.iter().all(|&w| w == neutral), "{family}: {}", norm.name);
            n_norms += 1;
        }
        let by_layer = config.tensors().iter().filter(|t| t.shape.len() == 1).count();
        let n_biases = weights.iter().filter(|t| t.name.ends_with(".bias")).count();
        assert_eq!(n_norms + n_biases, by_layer, "{family}");
    });
}

/// What is trained is known from the shape alone; what is frozen gets no gradient, and the others the
/// same as before.
#[test]
fn what_is_trained_is_known_before_it_is_loaded() {
    let facts = |mut infos: Vec<ParamInfo>| {
        infos.sort_by(|a, b| a.name.cmp(&b.name));
        infos.into_iter().map(|info| (info.name, info.shape, info.kind)).collect::<Vec<_>>()
    };
    each(|config, family| {
        let mut frozen = decoder(Cpu::new(), config, Training::Frozen);
        let lora = lora(0.0);
        frozen.attach(&adapter(config, lora.clone()), true).unwrap();
        let planned = trained_params(config, Method::Lora(&lora));
        assert_eq!(facts(frozen.trained_params()), facts(planned), "{family}");

        let mut full = decoder(Cpu::new(), config, Training::Full);
        let planned = trained_params(config, Method::Full);
        assert_eq!(facts(full.trained_params()), facts(planned), "{family}");

        let batch = pack(&documents(config, &LENS));
        full.accumulate(&batch, 0.1, None).unwrap();
        let all = full.gradients();
        let is_frozen = |name: &str| name.contains("layers.0.") || name.contains("embed_tokens");
        full.freeze(&is_frozen).unwrap();
        full.zero_gradients();
        full.accumulate(&batch, 0.1, None).unwrap();
        let left = full.gradients();
        assert!(left.len() < all.len() && left.iter().all(|t| !is_frozen(&t.name)), "{family}");
        assert!(left.iter().all(|tensor| all.get(&tensor.name) == Some(tensor)), "{family}");
        assert_eq!(full.trained_params().len(), left.len());
        let mut one_bias = decoder(Cpu::new(), config, Training::Full);
        let is_bias = |name: &str| name.ends_with("layers.1.self_attn.k_proj.bias");
        one_bias.freeze(&is_bias).unwrap();
        one_bias.accumulate(&batch, 0.1, None).unwrap();
        let left = one_bias.gradients();
        let n_biases = all.iter().filter(|tensor| is_bias(&tensor.name)).count();
        assert_eq!(n_biases, usize::from(config.attention_bias), "{family}");
        assert_eq!(left.len() + n_biases, all.len(), "{family}");
        assert!(left.iter().all(|tensor| all.get(&tensor.name) == Some(tensor)), "{family}");
        if !config.knobs.fused_weights {
            let error = full.freeze(&|name| name.ends_with("layers.1.self_attn.k_proj.weight"));
            let message = error.unwrap_err().to_string();
            assert!(message.contains("cannot be frozen without"), "{message}");
        }
    });
}

/// The plan counts what the family holds beside Llama.
#[test]
fn plans_grow_with_the_knobs() {
    let plan = |config: &ModelConfig| {
        let trained = trained_params(config, Method::Full);
        let needs = MemoryNeeds {
            method: Method::Full,
            trained: &trained,
            optimizer: 0,
            average: false,
            checkpoints: false,
            n_tokens: 512,
            recompute: Recompute::None,
            compute: Compute::F32,
            half_embedding: false,
            files: 0,
        };
        MemoryPlan::new(config, &needs)
    };
    each(|config, family| {
        let bare = ModelConfig { knobs: hone_model::Knobs::default(), ..config.clone() };
        let (found, base) = (plan(config), plan(&bare));
        let has_end_norms = config.knobs.norm_places.after();
        assert_eq!(found.activations > base.activations, has_end_norms, "{family}");
        // Logits are capped in place.
        assert_eq!(found.head, base.head, "{family}");
    });
}

proptest! {
    /// No text can make the reader of configurations panic, and what it takes can be run.
    #[test]
    fn damaged_configurations_do_not_panic(
        family in 0..FAMILIES.len(), at in 0_usize..900, value in "[\\[\\]{}:,\"0-9a-z-]",
    ) {
        each(|config, model_type| {
            if model_type != FAMILIES[family].0 {
                return;
            }
            let mut text = config.to_json();
            let at = at % text.len();
            text.replace_range(at..=at, &value);
            let Ok(damaged) = ModelConfig::from_json(&text) else { return };
            if damaged.n_params() < 100_000 {
                let mut decoder = decoder(Reference, &damaged, Training::Frozen);
                let batch = pack(&documents(&damaged, &[3]));
                let _ = decoder.loss(&batch, None);
            }
        });
    }
}
