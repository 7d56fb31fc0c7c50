//! The plan of memory against what a decoder holds, buffer by buffer.

use crate::adapters::Golden;
use crate::common::*;
use crate::families::{each, lora};
use hone_kernels::{Backend, Cpu};
use hone_model::{
    Adapter, Batch, BnbConfig, Compute, Decoder, LoraConfig, MemoryNeeds, MemoryPlan, Method,
    ModelConfig, QuantizeOnLoad, Recompute, SafetensorsRegions, StoredType, TensorSource, Training,
    ValueType, trained_params,
};

/// Tokens of a batch: more than a chunk of the head's rows, and fewer.
const TOKENS: [usize; 3] = [1, 50, 20_000];

/// What says of a case that its embedding is stored in bf16.
const HALF: &str = "embedding in bf16";

/// What `decoder` holds is what was planned, at every level.
fn check(decoder: &mut Decoder<Cpu>, config: &ModelConfig, method: Method<'_>, what: &str) {
    check_but(decoder, config, method, &|_| false, what);
}

/// [`check`], without what is frozen. Each level holds less than the one before, if the backward
/// goes through several layers.
fn check_but(
    decoder: &mut Decoder<Cpu>,
    config: &ModelConfig,
    method: Method<'_>,
    is_frozen: &dyn Fn(&str) -> bool,
    what: &str,
) {
    let mut trained = trained_params(config, method);
    // Where nothing is computed again, low-rank adapters keep what lies between their factors.
    let keeps_inner = match method {
        Method::Lora(lora) | Method::Qlora(lora, _) => {
            !lora.use_dora && trained.iter().any(|info| info.name.contains("layers."))
        }
        Method::Inference | Method::Full => false,
    };
    trained.retain(|info| !is_frozen(&info.name));
    let last = format!("layers.{}.", config.num_hidden_layers - 1);
    let is_below = |name: &str| {
        name.contains("embed_tokens") || name.contains("layers.") && !name.contains(&last)
    };
    let goes_deep = trained.iter().any(|info| is_below(&info.name));
    let half_embedding = what.contains(HALF);
    for n_tokens in TOKENS {
        let mut largest = u64::MAX;
        for recompute in Recompute::ALL {
            let needs = MemoryNeeds {
                method,
                trained: &trained,
                optimizer: 0,
                average: false,
                checkpoints: false,
                n_tokens,
                recompute,
                compute: decoder.backend().compute(),
                half_embedding,
                files: 0,
            };
            let planned = MemoryPlan::new(config, &needs);
            if n_tokens > 1000 && recompute != Recompute::Layer {
                // Large for the head's sake.
                continue;
            }
            decoder.set_recompute(recompute);
            decoder.release();
            decoder.reserve(n_tokens);
            let held = decoder.held_bytes();
            let what = format!("{what}, {recompute:?}, {n_tokens} tokens");
            assert_eq!(planned.weights + planned.quantisation, held.weights, "{what}");
            assert_eq!(planned.gradients, held.gradients, "{what}");
            assert_eq!(planned.activations, held.activations, "{what}");
            assert_eq!(planned.head, held.head, "{what}");
            let saves = goes_deep || keeps_inner && recompute == Recompute::Layer;
            assert_eq!(held.activations < largest, saves || largest == u64::MAX, "{what}");
            largest = held.activations;
        }
    }
}

/// Full fine-tuning, plain adapters, DoRA and nothing at all, with every knob of the families.
#[test]
fn every_family_holds_what_is_planned() {
    let one = |config: &ModelConfig, family: &str, compute: Compute| {
        let cpu = Cpu::new().with_compute(compute);
        let mut bare = decoder(cpu, config, Training::Frozen);
        check(&mut bare, config, Method::Inference, family);
        let mut full = decoder(cpu, config, Training::Full);
        check(&mut full, config, Method::Full, family);
        let kinds = [lora(0.0), lora(0.25), LoraConfig { use_dora: true, ..lora(0.25) }];
        for settings in kinds {
            let what = format!("{family}, {compute:?}, {settings:?}");
            let adapter = Adapter::init_from(config, settings, &weights(config, 3), 11).unwrap();
            bare.attach(&adapter, true).unwrap();
            check(&mut bare, config, Method::Lora(&adapter.config), &what);
        }
    };
    each(|config, family| {
        [Compute::F32, Compute::Bf16].into_iter().for_each(|compute| one(config, family, compute));
    });
}

/// The backward ends at the first layer with something to train, and nothing is kept below it.
#[test]
fn layers_below_all_that_is_trained_keep_nothing() {
    each(|config, family| {
        let held = |decoder: &mut Decoder<Cpu>| {
            decoder.set_recompute(Recompute::None);
            decoder.release();
            decoder.reserve(50);
            decoder.held_bytes().activations
        };
        let mut full = decoder(Cpu::new(), config, Training::Full);
        let all = held(&mut full);
        let mut kept = Vec::new();
        for left in ["layers.1.", "layers.2.", "lm_head"] {
            let mut decoder = decoder(Cpu::new(), config, Training::Full);
            let is_frozen = |name: &str| !name.contains(left) && name != "model.norm.weight";
            decoder.freeze(&is_frozen).unwrap();
            let what = format!("{family}, {left}");
            check_but(&mut decoder, config, Method::Full, &is_frozen, &what);
            kept.push(held(&mut decoder));
        }
        // Three layers, two, one; and one set of buffers is there in any case.
        assert!(all > kept[0] && kept[0] > kept[1] && kept[1] >= kept[2], "{family}: {kept:?}");
        let upper = LoraConfig { layers_to_transform: Some(vec![1]), ..lora(0.0) };
        let adapter = Adapter::init_from(config, upper, &weights(config, 3), 11).unwrap();
        let mut adapted = decoder(Cpu::new(), config, Training::Frozen);
        adapted.attach(&adapter, true).unwrap();
        check(&mut adapted, config, Method::Lora(&adapter.config), family);
        assert!(held(&mut adapted) < all, "{family}");
    });
}

/// Every kind of adapter of the goldens: on the head and the embedding, biases, modules and rows of
/// tokens that are trained whole, ranks by pattern; with dropout too, and on 4-bit weights.
#[test]
fn every_kind_of_adapter_holds_what_is_planned() {
    for golden in Golden::all() {
        let Golden { name, config, weights, mut adapter, .. } = golden;
        for dropout in [0.0, 0.4] {
            adapter.config.lora_dropout = dropout;
            let what = format!("{name}, dropout {dropout}");
            let mut decoder =
                Decoder::load(Cpu::new(), &config, &weights, Training::Frozen).unwrap();
            decoder.attach(&adapter, true).unwrap();
            check(&mut decoder, &config, Method::Lora(&adapter.config), &what);
        }
        let quant = BnbConfig::qlora(ValueType::Bf16);
        let small = QuantizeOnLoad::new(&config, &weights, &quant);
        let mut decoder = Decoder::load(Cpu::new(), &config, &small, Training::Frozen).unwrap();
        decoder.attach(&adapter, true).unwrap();
        let method = Method::Qlora(&adapter.config, quant.spec);
        check(&mut decoder, &config, method, &format!("{name} in 4 bits"));
    }
}

/// An embedding that is stored in bf16 is kept so where products are of bf16 and nobody writes to
/// it; everything that is computed and saved is the same as with the embedding in f32, with an
/// adapter that has rows of it, or another matrix, and without one again.
#[test]
fn an_embedding_in_bf16_is_kept_so() {
    let name = "model.embed_tokens.weight";
    let mut n_halved = 0;
    for golden in Golden::all() {
        let Golden { name: case, config, mut weights, adapter, .. } = golden;
        let rounded = weights.get_mut(name).unwrap();
        rounded.data.iter_mut().for_each(|x| *x = Compute::Bf16.round(*x));
        let stored = weights.to_safetensors(StoredType::F32).unwrap();
        let plain = SafetensorsRegions::new(&[&stored]).unwrap();
        assert!(weights.is_bf16(name) && !plain.is_bf16(name));
        let batch = Batch::from_pack(&[1, 5, 2, 7, 3], &[1.0; 5], &[3, 2]).unwrap();
        for compute in [Compute::F32, Compute::Bf16] {
            let cpu = Cpu::new().with_compute(compute);
            let load = |source: &dyn TensorSource| {
                Decoder::load(cpu, &config, source, Training::Frozen).unwrap()
            };
            let (mut half, mut full) = (load(&weights), load(&plain));
            let what = format!("{case}, {compute:?}, {HALF}");
            let mut same = |half: &mut Decoder<Cpu>, full: &mut Decoder<Cpu>, method| {
                check(half, &config, method, &what);
                check(full, &config, method, &case);
                let found = half.logits(&batch, &[0, 2, 4]).unwrap();
                assert_eq!(found, full.logits(&batch, &[0, 2, 4]).unwrap(), "{what}");
                assert_eq!(half.export(), full.export(), "{what}");
                n_halved += usize::from(half.held_bytes().weights < full.held_bytes().weights);
            };
            same(&mut half, &mut full, Method::Inference);
            half.attach(&adapter, true).unwrap();
            full.attach(&adapter, true).unwrap();
            same(&mut half, &mut full, Method::Lora(&adapter.config));
            half.detach();
            full.detach();
            same(&mut half, &mut full, Method::Inference);
        }
    }
    assert!(n_halved > 0);
}
