//! Model files: what is written is read back, and what is broken is refused in words.

use crate::common::*;
use hone_kernels::Cpu;
use hone_model::{
    Adapter, Decoder, LoraConfig, NamedTensor, SafetensorsRegions, SafetensorsWriter, StoredType,
    Targets, TensorEntry, TensorSource, Tensors, Training,
};
use proptest::prelude::*;

#[test]
fn tensors_round_trip() {
    let config = config(true);
    let tensors = weights(&config, 5);
    let bytes = tensors.to_safetensors(StoredType::F32).unwrap();
    assert_eq!(bytes, tensors.to_safetensors(StoredType::F32).unwrap());
    assert_eq!(Tensors::from_safetensors(&[&bytes]).unwrap(), tensors);
    // The reader of the ecosystem finds the metadata that transformers wants.
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
    let half = tensors.to_safetensors(StoredType::Bf16).unwrap();
    assert!(half.len() < bytes.len() * 6 / 10);
    let rounded = Tensors::from_safetensors(&[&half]).unwrap();
    assert!(relative_distance(&tensors, &rounded) < 1.0 / 256.0);
    // What is already rounded stays as it is.
    assert_eq!(rounded.to_safetensors(StoredType::Bf16).unwrap(), half);
}

#[test]
fn a_model_may_lie_in_several_files() {
    let config = config(false);
    let tensors = weights(&config, 3);
    let (mut one, mut two) = (Tensors::new(), Tensors::new());
    for (i, tensor) in tensors.iter().enumerate() {
        if i % 2 == 0 { one.insert(tensor.clone()) } else { two.insert(tensor.clone()) }
    }
    let one = one.to_safetensors(StoredType::F32).unwrap();
    let two = two.to_safetensors(StoredType::F32).unwrap();
    let regions = SafetensorsRegions::new(&[&one, &two]).unwrap();
    assert_eq!(regions.entries(), tensors.entries());
    let loaded = Decoder::load(Cpu::new(), &config, &regions, Training::Frozen).unwrap();
    assert_eq!(loaded.export(), tensors);
    let twice = SafetensorsRegions::new(&[&one, &one]).err().unwrap().to_string();
    assert!(twice.contains("in two files"), "{twice}");
}

/// Loads weights that were changed, and checks the message.
fn check(change: impl Fn(&mut Tensors), expected: &str) {
    let config = config(true);
    let mut tensors = weights(&config, 3);
    change(&mut tensors);
    let result = Decoder::load(Cpu::new(), &config, &tensors, Training::Frozen);
    let message = result.expect_err("the weights are wrong").to_string();
    assert!(message.contains(expected), "{message}");
}

#[test]
fn wrong_weights_are_refused() {
    check(|t| drop(t.remove("model.norm.weight")), "missing model.norm.weight");
    check(|t| drop(t.remove("lm_head.weight")), "missing lm_head.weight");
    check(|t| t.insert(NamedTensor::new("x", vec![1], vec![0.0])), "unexpected x");
    check(
        |t| t.insert(NamedTensor::new("model.norm.weight", vec![3], vec![0.0; 3])),
        "`model.norm.weight` has shape [3], the configuration says [20]",
    );
    let name = "model.layers.1.mlp.up_proj.weight";
    check(|t| t.get_mut(name).unwrap().data[7] = f32::NAN, "not finite at index 7");
}

#[test]
fn a_tied_head_that_differs_is_refused() {
    let config = config(false);
    let mut tensors = weights(&config, 3);
    let mut head = tensors.get("model.embed_tokens.weight").unwrap().clone();
    head.name = "lm_head.weight".to_owned();
    tensors.insert(head);
    assert!(Decoder::load(Cpu::new(), &config, &tensors, Training::Frozen).is_ok());
    tensors.get_mut("lm_head.weight").unwrap().data[0] += 1.0;
    let result = Decoder::load(Cpu::new(), &config, &tensors, Training::Frozen);
    assert!(result.err().unwrap().to_string().contains("tie_word_embeddings"));
}

#[test]
fn wrong_adapters_are_refused() {
    let config = config(false);
    let lora = LoraConfig::all_linear(3, 6.0);
    let check = |change: &dyn Fn(&mut Adapter), expected: &str| {
        let mut adapter = adapter(&config, lora.clone());
        change(&mut adapter);
        let mut decoder = decoder(Cpu::new(), &config, Training::Frozen);
        let message = decoder.attach(&adapter, false).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    };
    let name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight";
    check(&|a| drop(a.tensors.remove(name)), "has no `lora_A.weight`");
    check(&|a| drop(a.tensors.remove(&name.replace("_A", "_B"))), "lora_B.weight");
    check(&|a| a.config.r = 4, "has shape [3,");
    let targets = |names: &[&str]| Targets::Names(names.iter().map(|&n| n.into()).collect());
    let near = "`c_attn` in `target_modules` names no module";
    check(&|a| a.config.target_modules = targets(&["q_proj", "c_attn"]), near);
    check(&|a| a.config.target_modules = targets(&["q_proj"]), "its targets need");
    let stranger = NamedTensor::new("x", vec![1], vec![0.0]);
    check(&|a| a.tensors.insert(stranger.clone()), "it has 43 tensors");
}

#[test]
fn the_writer_wants_its_order() {
    let entry = |name: &str| TensorEntry { name: name.to_owned(), shape: vec![2] };
    let tensor = |name: &str| NamedTensor::new(name, vec![2], vec![1.0, 2.0]);
    let entries = [entry("a"), entry("b")];
    let new = || SafetensorsWriter::new(Vec::new(), &entries, StoredType::F32).unwrap();
    let message = new().put(&tensor("b")).unwrap_err().to_string();
    assert!(message.contains("wrote `b` where `a` was due"), "{message}");
    let mut writer = new();
    writer.put(&tensor("a")).unwrap();
    assert!(writer.finish().unwrap_err().to_string().contains("`b` was never written"));
    let twice = SafetensorsWriter::new(Vec::new(), &[entry("a"), entry("a")], StoredType::F32);
    assert!(twice.err().unwrap().to_string().contains("twice"));
}

#[test]
fn broken_files_are_refused() {
    let good = weights(&config(false), 1).to_safetensors(StoredType::Bf16).unwrap();
    let check = |bytes: &[u8], expected: &str| {
        let message = Tensors::from_safetensors(&[bytes]).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    };
    check(b"", "only 0 bytes");
    check(&good[..7], "only 7 bytes");
    check(&good[..100], "claims");
    check(&good[..good.len() - 1], "not a valid safetensors file");
    check(&(17_u64 << 20).to_le_bytes(), "the limit is 16 MiB");
    check(&[0xff; 64], "the limit is 16 MiB");
    let header = br#"{"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}  "#;
    let mut integers = (header.len() as u64).to_le_bytes().to_vec();
    integers.extend_from_slice(header);
    integers.extend_from_slice(&[0; 8]);
    check(&integers, "tensor `a` is stored as I64");
}

proptest! {
    /// No byte of a file can make the reader panic.
    #[test]
    fn damaged_files_do_not_panic(at in 0_usize..600, value: u8, cut in 0_usize..2000) {
        let mut bytes = weights(&config(false), 1).to_safetensors(StoredType::Bf16).unwrap();
        bytes[at] = value;
        bytes.truncate(bytes.len() - cut);
        let _ = Tensors::from_safetensors(&[&bytes]);
    }

    /// No text can make the readers of configurations panic.
    #[test]
    fn damaged_configurations_do_not_panic(at in 0_usize..600, value in "[\\[\\]{}:,\"0-9a-z-]") {
        for text in [config(false).to_json(), LoraConfig::all_linear(2, 4.0).to_json()] {
            let mut text = text;
            let at = at % text.len();
            text.replace_range(at..=at, &value);
            let _ = hone_model::ModelConfig::from_json(&text);
            let _ = LoraConfig::from_json(&text);
        }
    }
}
