//! What must not change a result: packing, batching, recomputation, merging, the backend.

use crate::common::*;
use hone_kernels::{Backend, Compute, Cpu, Reference};
use hone_model::{
    Adapter, Batch, Decoder, Generator, LoraConfig, Merge, Recompute, Tensors, Training,
};

/// Lengths of the documents: one token, two, odd ones, a long one.
const LENS: [usize; 8] = [5, 1, 17, 2, 33, 8, 3, 29];

/// Largest difference allowed between two orders of f32 arithmetic, logits being of order one.
const ROUNDING: f64 = 1e-5;

fn both(check: impl Fn(bool)) {
    check(false);
    check(true);
}

/// A document's logits alone are those that it has inside a pack: neighbours are not seen.
#[test]
fn a_document_alone_is_the_document_in_a_pack() {
    both(|odd| check_alone(&config(odd), &LENS, ROUNDING, if odd { "odd" } else { "plain" }));
}

/// Gradients and loss of all documents, cut into micro-batches of `size`.
fn gradients<B: Backend>(
    decoder: &mut Decoder<B>,
    documents: &[(Vec<u32>, Vec<f32>)],
    size: usize,
    seed: Option<u64>,
) -> (Tensors, f64) {
    let weight = pack(documents).weight();
    decoder.zero_gradients();
    let mut loss = 0.0;
    for part in documents.chunks(size) {
        let sums = decoder.accumulate(&pack(part), (1.0 / weight) as f32, seed).unwrap();
        loss += sums.weighted_loss / weight;
    }
    (decoder.gradients(), loss)
}

#[test]
fn the_cut_into_micro_batches_does_not_matter() {
    both(|odd| {
        let config = config(odd);
        let mut decoder = decoder(Cpu::new(), &config, Training::Full);
        let documents = documents(&config, &LENS);
        let (expected, expected_loss) = gradients(&mut decoder, &documents, 8, None);
        for size in [1, 2, 3, 4] {
            let (found, loss) = gradients(&mut decoder, &documents, size, None);
            assert!((loss - expected_loss).abs() < 1e-6);
            let off = relative_distance(&expected, &found);
            assert!(off <= ROUNDING, "by {size}: {off:e}");
        }
    });
}

/// Recomputation gives the same bytes, with adapters and dropout too, and where activations are kept
/// as bf16.
#[test]
fn recomputed_gradients_are_the_same_bytes() {
    both(|odd| {
        let config = config(odd);
        // A factor that is no power of two: what it multiplies is rounded before and after it.
        let mut lora = LoraConfig::all_linear(3, 7.0);
        lora.lora_dropout = 0.3;
        let documents = documents(&config, &LENS);
        let check = |mut decoder: Decoder<Cpu>| {
            decoder.set_recompute(Recompute::None);
            let kept = gradients(&mut decoder, &documents, 4, Some(5));
            for recompute in Recompute::ALL {
                decoder.set_recompute(recompute);
                let again = gradients(&mut decoder, &documents, 4, Some(5));
                assert_eq!(kept, again, "{recompute:?}");
            }
        };
        for compute in [Compute::F32, Compute::Bf16] {
            let cpu = Cpu::new().with_compute(compute);
            check(decoder(cpu, &config, Training::Full));
            let mut adapted = decoder(cpu, &config, Training::Frozen);
            adapted.attach(&adapter(&config, lora.clone()), true).unwrap();
            check(adapted);
        }
    });
}

/// Dropout is a function of the seed, off without one, and keeps the gradient's scale.
#[test]
fn dropout_follows_its_seed() {
    let config = config(false);
    let mut lora = LoraConfig::all_linear(3, 6.0);
    lora.lora_dropout = 0.5;
    let mut dropping = decoder(Cpu::new(), &config, Training::Frozen);
    dropping.attach(&adapter(&config, lora.clone()), true).unwrap();
    let documents = documents(&config, &LENS);
    let one = gradients(&mut dropping, &documents, 8, Some(1));
    assert_eq!(one, gradients(&mut dropping, &documents, 8, Some(1)));
    assert_ne!(one, gradients(&mut dropping, &documents, 8, Some(2)));
    let off = gradients(&mut dropping, &documents, 8, None);
    lora.lora_dropout = 0.0;
    let mut plain = decoder(Cpu::new(), &config, Training::Frozen);
    plain.attach(&adapter(&config, lora), true).unwrap();
    assert_eq!(off, gradients(&mut plain, &documents, 8, Some(1)));
}

/// Both backends agree on loss and gradients.
#[test]
fn cpu_is_its_reference() {
    both(|odd| {
        let config = config(odd);
        let documents = documents(&config, &LENS);
        let mut fast = decoder(Cpu::new(), &config, Training::Full);
        let mut plain = decoder(Reference, &config, Training::Full);
        let (found, loss) = gradients(&mut fast, &documents, 3, None);
        let (expected, expected_loss) = gradients(&mut plain, &documents, 3, None);
        assert!((loss - expected_loss).abs() < 1e-5, "{loss} {expected_loss}");
        let off = relative_distance(&expected, &found);
        assert!(off <= ROUNDING, "{off:e}");
    });
}

/// A frozen base with an adapter computes what the merged weights compute, for every choice of
/// targets.
#[test]
fn merged_is_unmerged() {
    let targets: [&[&str]; 5] =
        [&["q_proj", "v_proj"], &["o_proj"], &["gate_proj"], &["mlp.down_proj"], &["all-linear"]];
    both(|odd| {
        let config = config(odd);
        let base = weights(&config, 3);
        let batch = pack(&documents(&config, &LENS));
        for targets in targets {
            let mut lora = LoraConfig::all_linear(3, 6.0);
            let names: Vec<String> = targets.iter().map(|&name| name.to_owned()).collect();
            lora.target_modules = names.into();
            lora.use_rslora = odd;
            let adapter = adapter(&config, lora);
            let mut unmerged = decoder(Cpu::new(), &config, Training::Frozen);
            let before = unmerged.logits(&batch, &every_row(&batch)).unwrap();
            unmerged.attach(&adapter, false).unwrap();
            let expected = unmerged.logits(&batch, &every_row(&batch)).unwrap();
            assert!(distance(&before, &expected) > 1e-2, "the adapter does nothing");
            let merge = Merge::new(&config, &base, &adapter).unwrap();
            let mut merged = Decoder::load(Cpu::new(), &config, &merge, Training::Frozen).unwrap();
            let off = distance(&merged.logits(&batch, &every_row(&batch)).unwrap(), &expected);
            assert!(off <= 2.0 * ROUNDING, "{targets:?}: {off:e}");
            unmerged.detach();
            assert_eq!(unmerged.logits(&batch, &every_row(&batch)).unwrap(), before);
        }
    });
}

/// A fresh adapter changes nothing.
#[test]
fn a_fresh_adapter_is_silent() {
    let config = config(false);
    let batch = pack(&documents(&config, &LENS));
    let mut decoder = decoder(Cpu::new(), &config, Training::Frozen);
    let before = decoder.logits(&batch, &every_row(&batch)).unwrap();
    let adapter = Adapter::init(&config, LoraConfig::all_linear(4, 8.0), 1).unwrap();
    decoder.attach(&adapter, true).unwrap();
    assert_eq!(decoder.logits(&batch, &every_row(&batch)).unwrap(), before);
}

/// What is exported is what was loaded, frozen or trained; adapters come back too.
#[test]
fn weights_round_trip() {
    both(|odd| {
        let config = config(odd);
        let expected = weights(&config, 3);
        for training in [Training::Frozen, Training::Full] {
            assert_eq!(decoder(Cpu::new(), &config, training).export(), expected);
        }
        let full = decoder(Cpu::new(), &config, Training::Full);
        assert_eq!(full.trained(), expected);
        let adapter = adapter(&config, LoraConfig::all_linear(3, 6.0));
        let mut adapted = decoder(Cpu::new(), &config, Training::Frozen);
        adapted.attach(&adapter, true).unwrap();
        assert_eq!(adapted.trained(), adapter.tensors);
        assert_eq!(adapted.export(), expected);
    });
}

/// Sampled ids depend on the seed, not on who is generated beside whom.
#[test]
fn sampling_does_not_depend_on_the_batch() {
    let config = config(true);
    let mut decoder = decoder(Cpu::new(), &config, Training::Frozen);
    let prompts: Vec<Vec<u32>> =
        documents(&config, &[3, 9, 1, 20, 5]).into_iter().map(|(ids, _)| ids).collect();
    let mut run = |seed, batch_size| {
        let generator = Generator { batch_size, ..Generator::sampled(20, &[5, 6], 1.3, 0.9, seed) };
        generator.run(&mut decoder, &prompts).unwrap()
    };
    let expected = run(1, 5);
    for batch_size in [1, 2, 64] {
        assert_eq!(run(1, batch_size), expected);
    }
    assert_ne!(run(2, 5), expected);
    assert!(expected.iter().all(|g| g.stopped() || g.ids.len() == 20));
}

/// A sequence ends where the model's context does.
#[test]
fn generation_stays_in_the_context() {
    let config = config(false);
    let mut decoder = decoder(Cpu::new(), &config, Training::Frozen);
    let prompts: Vec<Vec<u32>> =
        documents(&config, &[60, 2]).into_iter().map(|(ids, _)| ids).collect();
    let found = Generator::greedy(100, &[]).run(&mut decoder, &prompts).unwrap();
    // The last token generated is never fed back, so it may lie one past the context.
    assert_eq!(found[0].ids.len(), 64 - 60 + 1);
    assert_eq!(found[1].ids.len(), 64 - 2 + 1);
    assert!(Generator::greedy(1, &[]).run(&mut decoder, &[vec![]]).is_err());
    assert!(Generator::greedy(1, &[]).run(&mut decoder, &[vec![1; 64]]).is_err());
    assert!(Generator::greedy(1, &[]).run(&mut decoder, &[vec![67]]).is_err());
    assert_eq!(Generator::greedy(0, &[]).run(&mut decoder, &prompts).unwrap()[0].ids, [0_u32; 0]);
}

/// Batches outside the model are refused, and an empty one is nothing.
#[test]
fn bad_batches_are_refused() {
    let config = config(false);
    let mut decoder = decoder(Cpu::new(), &config, Training::Full);
    let batch = |ids: &[u32]| Batch::from_pack(ids, &vec![1.0; ids.len()], &[ids.len()]).unwrap();
    let message = decoder.loss(&batch(&[1, 67]), None).unwrap_err().to_string();
    assert!(message.contains("token id 67"), "{message}");
    let message = decoder.loss(&batch(&[1; 65]), None).unwrap_err().to_string();
    assert!(message.contains("65 tokens"), "{message}");
    for empty in [Batch::new(), batch(&[1])] {
        assert_eq!(decoder.accumulate(&empty, 1.0, None).unwrap().n_rows, 0);
        assert_eq!(decoder.loss(&empty, None).unwrap().n_rows, 0);
    }
    assert!(decoder.logits(&batch(&[1, 2]), &[2]).is_err());
}
