//! 4-bit models: bitsandbytes' checkpoints read and written, quantising on load, adapters on a
//! 4-bit base. tests/golden/make_quant.py wrote the files.

use std::path::PathBuf;

use crate::common::*;
use hone_kernels::{Backend, Cpu, Reference};
use hone_model::{
    Adapter, Batch, BnbConfig, BnbRegions, CodeBook, Decoder, LoraConfig, ModelConfig, NamedTensor,
    QuantizeOnLoad, StoredType, TensorSource, Tensors, Training, ValueType, write_bnb_checkpoint,
};
use proptest::prelude::*;

/// Largest absolute difference of a logit from PyTorch's: logits are of the order of 1.
const LOGITS: f64 = 1e-5;

/// What make_quant.py ran the model on.
const IDS: [u32; 11] = [1, 7, 33, 12, 47, 5, 20, 2, 9, 9, 31];

fn file(name: &str) -> Vec<u8> {
    let dir = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/quant"));
    std::fs::read(dir.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn text(name: &str) -> String {
    String::from_utf8(file(name)).unwrap()
}

/// The model that the checkpoints were made of.
fn source() -> (ModelConfig, Tensors) {
    let config = ModelConfig::from_json(&text("source/config.json")).unwrap();
    (config, Tensors::from_safetensors(&[&file("source/model.safetensors")]).unwrap())
}

fn check_logits<B: Backend>(backend: B, name: &str) {
    let (config, quant) =
        BnbConfig::read_model_config(&text(&format!("{name}/config.json"))).unwrap();
    let quant = quant.expect("the checkpoint says that it is quantised");
    let bytes = file(&format!("{name}/model.safetensors"));
    let stored = BnbRegions::new(&[&bytes]).unwrap();
    let (_, original) = source();
    let on_load = QuantizeOnLoad::new(&config, &original, &quant);
    let expected =
        Tensors::from_safetensors(&[&file(&format!("{name}/logits.safetensors"))]).unwrap();
    let batch = Batch::from_pack(&IDS, &[1.0; 11], &[11]).unwrap();
    for from in [&stored as &dyn TensorSource, &on_load] {
        let mut decoder = Decoder::load(backend.clone(), &config, from, Training::Frozen).unwrap();
        let logits = decoder.logits(&batch, &every_row(&batch)).unwrap();
        let off = distance(&logits, &expected.get("logits").unwrap().data);
        assert!(off <= LOGITS, "{name} on {}: off by {off:e}", backend.name());
    }
    let mut full = Decoder::load(backend, &config, &original, Training::Frozen).unwrap();
    let logits = full.logits(&batch, &every_row(&batch)).unwrap();
    let off = distance(&logits, &expected.get("logits").unwrap().data);
    assert!(off > 1e-2, "quantisation changes nothing: {off:e}");
}

#[test]
fn logits_are_those_of_transformers_with_bitsandbytes() {
    for name in ["nf4_double", "fp4"] {
        check_logits(Cpu::new(), name);
        check_logits(Reference, name);
    }
}

/// The checkpoint that we write is, byte for byte, the one that transformers wrote.
#[test]
fn checkpoints_are_those_of_transformers() {
    let (config, original) = source();
    for name in ["nf4_double", "fp4"] {
        let golden = text(&format!("{name}/config.json"));
        let (_, quant) = BnbConfig::read_model_config(&golden).unwrap();
        let quant = quant.unwrap();
        let mut bytes = Vec::new();
        write_bnb_checkpoint(&mut bytes, &config, &original, &quant, StoredType::Bf16).unwrap();
        assert!(bytes == file(&format!("{name}/model.safetensors")), "{name}: other bytes");
        // Written again from what was read, it does not change.
        let again = BnbRegions::new(&[&bytes]).unwrap();
        let mut twice = Vec::new();
        write_bnb_checkpoint(&mut twice, &config, &again, &quant, StoredType::Bf16).unwrap();
        assert!(bytes == twice, "{name}: other bytes the second time");

        let ours = quant.into_model_config(&text("source/config.json")).unwrap();
        let (again, found) = BnbConfig::read_model_config(&ours).unwrap();
        assert_eq!((again, found), (config.clone(), Some(quant)));
        let section = |text: &str| {
            let value: serde_json::Value = serde_json::from_str(text).unwrap();
            value["quantization_config"].as_object().unwrap().clone()
        };
        let (ours, theirs) = (section(&ours), section(&golden));
        for (key, value) in &theirs {
            // Products are f32 here, whatever the type of the weights.
            if key != "bnb_4bit_compute_dtype" {
                assert_eq!(ours.get(key), Some(value), "{key}");
            }
        }
        assert_eq!(ours.len(), theirs.len());
    }
}

/// Frozen in 4 bits, a decoder is the decoder of the dequantised weights: logits, and the gradients
/// of an adapter that flow through it.
#[test]
fn a_4bit_base_is_its_dequantised_weights() {
    for odd in [false, true] {
        let config = config(odd);
        let plain = weights(&config, 3);
        for book in [CodeBook::Nf4, CodeBook::Fp4] {
            let mut quant = BnbConfig::qlora(ValueType::F32);
            quant.spec.book = book;
            // A map of which some modules stay: all of it is multiplied in full.
            quant.skip_modules = vec!["k_proj".to_owned(), "model.layers.2".to_owned()];
            let small = QuantizeOnLoad::new(&config, &plain, &quant);
            let values: Tensors =
                plain.iter().map(|tensor| small.tensor(&tensor.name).unwrap()).collect();
            let changed = |t: &&NamedTensor| values.get(&t.name).unwrap().data != t.data;
            let n_changed = plain.iter().filter(changed).count();
            assert_eq!(n_changed, 2 * 6, "of seven maps in two layers");
            let batch = pack(&documents(&config, &[7, 4, 11]));
            let run = |source: &dyn TensorSource| {
                let mut decoder =
                    Decoder::load(Cpu::new(), &config, source, Training::Frozen).unwrap();
                let adapter = adapter(&config, LoraConfig::all_linear(3, 6.0));
                decoder.attach(&adapter, true).unwrap();
                decoder.accumulate(&batch, 0.1, None).unwrap();
                (
                    decoder.logits(&batch, &every_row(&batch)).unwrap(),
                    decoder.gradients(),
                    decoder.export(),
                )
            };
            let (logits, gradients, exported) = run(&small);
            let (logits_full, gradients_full, _) = run(&values);
            assert!(distance(&logits, &logits_full) <= 2e-6);
            assert!(relative_distance(&gradients_full, &gradients) <= 2e-6);
            assert_eq!(exported, values);
        }
    }
}

fn check_refused(change: impl Fn(&str) -> String, expected: &str) {
    let error = BnbConfig::read_model_config(&change(&text("fp4/config.json"))).unwrap_err();
    assert!(error.to_string().contains(expected), "{error}");
}

#[test]
fn other_quantisation_is_refused_by_name() {
    let put = |from: &str, to: &str| {
        let (from, to) = (from.to_owned(), to.to_owned());
        move |text: &str| text.replace(&from, &to)
    };
    check_refused(
        put("\"bitsandbytes\"", "\"gptq\""),
        "`quantization_config.quant_method` = \"gptq\"",
    );
    check_refused(put("\"load_in_4bit\": true", "\"load_in_4bit\": false"), "load_in_4bit");
    check_refused(put("\"load_in_8bit\": false", "\"load_in_8bit\": true"), "load_in_8bit");
    check_refused(put("\"uint8\"", "\"bfloat16\""), "bnb_4bit_quant_storage` = \"bfloat16\"");
    check_refused(put("\"fp4\"", "\"int4\""), "bnb_4bit_quant_type` = \"int4\"");
    check_refused(
        put("\"llm_int8_threshold\"", "\"x\": 1, \"llm_int8_threshold\""),
        "`quantization_config.x`",
    );
}

/// Changes bytes of a checkpoint without changing their number, and checks the message.
fn check_broken(from: &str, to: &str, expected: &str) {
    assert_eq!(from.len(), to.len());
    let mut bytes = file("nf4_double/model.safetensors");
    let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    let (config, _) = source();
    let result = BnbRegions::new(&[&bytes])
        .and_then(|source| Decoder::load(Cpu::new(), &config, &source, Training::Frozen));
    let message = result.expect_err("the checkpoint is broken").to_string();
    assert!(message.contains(expected), "{message}");
}

#[test]
fn broken_checkpoints_are_refused() {
    let state = "the quantisation state of `model.layers.0.mlp.down_proj.weight`";
    check_broken("{\"quant_type\": \"nf4\"", "{\"quant_type\": \"nf5\"", state);
    check_broken("{\"quant_type\": \"nf4\"", "(\"quant_type\": \"nf4\"", state);
    check_broken("\"blocksize\": 64", "\"blocksize\": 65", "a block size of 65");
    check_broken("\"shape\": [64, 128]", "\"shape\": [64, 228]", "has shape [64, 228]");
    check_broken("\"nested_blocksize\": 256", "\"nested_blocksize\": 128", "`nested_blocksize`");
    check_broken(
        "\"nested_dtype\": \"float32\"",
        "\"nested_dtype\": \"float16\"",
        "`nested_dtype`",
    );
    check_broken("0.228759765625", "1e99          ", "scale of block 0");
    check_broken(
        "down_proj.weight.nested_absmax",
        "down_proj.weight.nested_absmix",
        "nested_absmix",
    );
    check_broken(
        "down_proj.weight.quant_state",
        "down_proj.weight.quant_stats",
        "down_proj.weight",
    );
    let mut bytes = file("nf4_double/model.safetensors");
    bytes.truncate(bytes.len() - 1);
    assert!(BnbRegions::new(&[&bytes]).is_err());
    // Weights that cannot be quantised are named.
    let (config, mut tensors) = source();
    let name = "model.layers.1.mlp.up_proj.weight";
    tensors.get_mut(name).unwrap().data[5] = f32::NAN;
    let quant = BnbConfig::qlora(ValueType::F32);
    let source = QuantizeOnLoad::new(&config, &tensors, &quant);
    let error = Decoder::load(Cpu::new(), &config, &source, Training::Frozen).unwrap_err();
    assert!(error.to_string().contains(&format!("`{name}` holds a value that is not finite")));
}

/// LoRA, and DoRA, on 4-bit weights: logits, loss and gradients are PEFT's with bitsandbytes. Both
/// compute in f32; bitsandbytes' products go through the same dequantised values.
#[test]
fn qlora_is_that_of_peft_with_bitsandbytes() {
    let (config, original) = source();
    for (name, book) in [("nf4_double", CodeBook::Nf4), ("fp4", CodeBook::Fp4)] {
        let golden =
            Tensors::from_safetensors(&[&file(&format!("qlora/{name}.safetensors"))]).unwrap();
        let under = |prefix: &str| -> Tensors {
            let part = golden.iter().filter_map(|t| {
                let name = t.name.strip_prefix(prefix)?.to_owned();
                Some(NamedTensor { name, ..t.clone() })
            });
            part.collect()
        };
        let settings = text(&format!("qlora/{name}.adapter_config.json"));
        let adapter = Adapter::from_parts(&settings, under("adapter/")).unwrap();
        assert_eq!(adapter.config.use_dora, book == CodeBook::Fp4);
        let mut quant = BnbConfig::qlora(ValueType::F32);
        (quant.spec.book, quant.spec.nested) = (book, book == CodeBook::Nf4);
        let base = QuantizeOnLoad::new(&config, &original, &quant);
        let mut decoder = Decoder::load(Cpu::new(), &config, &base, Training::Frozen).unwrap();
        decoder.attach(&adapter, true).unwrap();
        let batch = Batch::from_pack(&IDS, &[1.0; 11], &[11]).unwrap();
        let logits = decoder.logits(&batch, &every_row(&batch)).unwrap();
        let off = distance(&logits, &golden.get("logits").unwrap().data);
        assert!(off <= LOGITS, "{name}: logits off by {off:e}");
        let sums = decoder.accumulate(&batch, (1.0 / batch.weight()) as f32, None).unwrap();
        let loss = f64::from(golden.get("loss").unwrap().data[0]);
        assert!((sums.weighted_loss / sums.weight - loss).abs() <= LOGITS, "{name}: loss");
        let off = relative_distance(&under("grads/"), &decoder.gradients());
        assert!(off <= 1e-5, "{name}: gradients off by {off:e}");
    }
}

proptest! {
    /// No byte of a checkpoint can make the reader panic: of its header, of its descriptions, of
    /// its values.
    #[test]
    fn damaged_checkpoints_do_not_panic(at in 0_usize..78_501, value: u8, cut in 0_usize..200) {
        let mut bytes = file("nf4_double/model.safetensors");
        bytes[at] = value;
        bytes.truncate(bytes.len() - cut);
        if let Ok(source) = BnbRegions::new(&[&bytes]) {
            let (config, _) = BnbConfig::read_model_config(&text("nf4_double/config.json")).unwrap();
            let _ = Decoder::load(Cpu::new(), &config, &source, Training::Frozen);
        }
    }

    /// No number in a description can.
    #[test]
    fn damaged_descriptions_do_not_panic(n in "[0-9]{1,3}", from in 0_usize..4) {
        let from = ["\"blocksize\": 64", "\"shape\": [64, 128]", "_offset\": 0.2287", "32\", \"nested_"][from];
        let mut bytes = file("nf4_double/model.safetensors");
        let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
        let at = at + from.find(|c: char| c.is_ascii_digit()).unwrap();
        bytes[at..at + n.len()].copy_from_slice(n.as_bytes());
        if let Ok(source) = BnbRegions::new(&[&bytes]) {
            let (config, _) = BnbConfig::read_model_config(&text("nf4_double/config.json")).unwrap();
            let _ = Decoder::load(Cpu::new(), &config, &source, Training::Frozen);
        }
    }
}
