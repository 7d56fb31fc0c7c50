//! Adapters of every kind against PEFT's: losses, logits, gradients, merged weights, and the files.
//! tests/golden/make_adapters.py wrote the files.

use std::path::PathBuf;

use crate::common::*;
use hone_kernels::{Backend, Compute, Cpu, Reference};
use hone_model::{
    Adapter, Batch, BiasMode, BnbConfig, Decoder, Generator, InitMethod, LoraConfig, Merge,
    ModelConfig, NamedTensor, QuantizeOnLoad, Recompute, ResizedVocab, Targets, TensorSource,
    Tensors, Training, ValueType,
};
use serde_json::Value;

/// Largest absolute difference of a logit or a loss; PEFT's own distance from f64 is up to 4e-6.
const LOGITS: f64 = 1e-5;
/// Largest difference of a gradient over the tensor's largest; PEFT's own is up to 3e-6.
const GRADIENTS: f64 = 1e-5;

const N_CASES: usize = 34;

fn root() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden"))
}

fn text(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn json(path: &str) -> Value {
    serde_json::from_str(&text(path)).unwrap()
}

fn tensors(path: &str) -> Tensors {
    let bytes = std::fs::read(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
    Tensors::from_safetensors(&[&bytes]).unwrap()
}

/// The tensors whose names begin so, without that.
fn part(all: &Tensors, prefix: &str) -> Tensors {
    let named = all.iter().filter_map(|t| {
        let name = t.name.strip_prefix(prefix)?;
        Some(NamedTensor::new(name, t.shape.clone(), t.data.clone()))
    });
    named.collect()
}

/// One case: its base, its adapter, and what PEFT found.
pub(crate) struct Golden {
    pub(crate) name: String,
    pub(crate) config: ModelConfig,
    pub(crate) weights: Tensors,
    pub(crate) adapter: Adapter,
    batch: Batch,
    loss: f64,
    logits: Vec<f32>,
    gradients: Tensors,
}

impl Golden {
    fn open(name: &str) -> Self {
        let case = |file: &str| format!("adapters/{name}/{file}");
        let golden = json(&case("golden.json"));
        let base = golden["base"].as_str().unwrap();
        let is_llama = root().join("llama").join(base).exists();
        let dir = format!("{}/{base}", if is_llama { "llama" } else { "families" });
        let weights = if is_llama {
            tensors(&format!("{dir}/model.safetensors"))
        } else {
            part(&tensors(&format!("{dir}/tensors.safetensors")), "model/")
        };
        let rows = &json(&format!("{dir}/golden.json"))["rows"];
        let mut batch = Batch::new();
        for row in rows.as_array().unwrap() {
            let numbers = |key: &str| row[key].as_array().unwrap().iter();
            let ids: Vec<u32> = numbers("input_ids").map(|v| v.as_u64().unwrap() as u32).collect();
            let weights: Vec<f32> =
                numbers("weights").map(|v| v.as_f64().unwrap() as f32).collect();
            batch.push(&ids, &weights).unwrap();
        }
        let file = tensors(&case("adapter_model.safetensors"));
        Golden {
            name: name.to_owned(),
            config: ModelConfig::from_json(&text(&format!("{dir}/config.json"))).unwrap(),
            weights,
            adapter: Adapter::from_parts(&text(&case("adapter_config.json")), file).unwrap(),
            batch,
            loss: golden["loss"].as_f64().unwrap(),
            logits: tensors(&case("logits.safetensors")).get("logits").unwrap().data.clone(),
            gradients: tensors(&case("grads.safetensors")),
        }
    }

    pub(crate) fn all() -> Vec<Self> {
        let index = json("adapters/index.json");
        let names = index["cases"].as_array().unwrap();
        assert_eq!(names.len(), N_CASES);
        names.iter().map(|name| Golden::open(name.as_str().unwrap())).collect()
    }

    fn check<B: Backend>(&self, backend: B) {
        let what = format!("{} on {}", self.name, backend.name());
        let rows = every_row(&self.batch);
        let mut decoder =
            Decoder::load(backend, &self.config, &self.weights, Training::Frozen).unwrap();
        let before = decoder.logits(&self.batch, &rows).unwrap();
        decoder.attach(&self.adapter, true).unwrap_or_else(|error| panic!("{what}: {error}"));
        let logits = decoder.logits(&self.batch, &rows).unwrap();
        let off = distance(&logits, &self.logits);
        assert!(off <= LOGITS, "{what}: logits off by {off:e}");
        assert!(distance(&before, &logits) > 1e-2, "{what}: it changes nothing");
        let scale = (1.0 / self.batch.weight()) as f32;
        let sums = decoder.accumulate(&self.batch, scale, None).unwrap();
        let off = (sums.weighted_loss / sums.weight - self.loss).abs();
        assert!(off <= LOGITS, "{what}: loss off by {off:e}");
        let found = decoder.gradients();
        let names = |t: &Tensors| t.iter().map(|t| t.name.clone()).collect::<Vec<_>>();
        assert_eq!(names(&found), names(&self.gradients), "{what}");
        let off = relative_distance(&self.gradients, &found);
        assert!(off <= GRADIENTS, "{what}: gradients off by {off:e}");
        // What is trained is the adapter, what is exported the base, and off it leaves no trace.
        assert_eq!(decoder.trained(), self.adapter.tensors, "{what}");
        assert_eq!(decoder.export(), self.weights, "{what}");
        decoder.detach();
        assert_eq!(decoder.logits(&self.batch, &rows).unwrap(), before, "{what}");
        assert_eq!(decoder.export(), self.weights, "{what}");
        assert!(decoder.trained().is_empty(), "{what}");
    }
}

#[test]
fn every_kind_is_pefts_on_the_cpu() {
    Golden::all().iter().for_each(|golden| golden.check(Cpu::new()));
}

#[test]
fn every_kind_is_pefts_on_the_reference() {
    Golden::all().iter().for_each(|golden| golden.check(Reference));
}

/// Merged weights give PEFT's logits with the adapter on.
#[test]
fn merged_weights_compute_the_same() {
    for golden in Golden::all() {
        let merge = Merge::new(&golden.config, &golden.weights, &golden.adapter).unwrap();
        let mut merged =
            Decoder::load(Cpu::new(), merge.config(), &merge, Training::Frozen).unwrap();
        let logits = merged.logits(&golden.batch, &every_row(&golden.batch)).unwrap();
        let off = distance(&logits, &golden.logits);
        assert!(off <= LOGITS, "{}: off by {off:e}", golden.name);
        for entry in merge.entries() {
            let delta = merge.delta(&entry.name).unwrap();
            assert_eq!(delta.is_some(), merge.changes(&entry.name), "{}", entry.name);
        }
        let n_changed = merge.entries().iter().filter(|e| merge.changes(&e.name)).count();
        assert!(n_changed > 0, "{}", golden.name);
    }
}

/// Generation, which goes through the cache, sees every kind of adapter too.
#[test]
fn generation_with_an_adapter_is_that_of_the_merged_model() {
    for golden in Golden::all() {
        let merge = Merge::new(&golden.config, &golden.weights, &golden.adapter).unwrap();
        let mut merged =
            Decoder::load(Cpu::new(), merge.config(), &merge, Training::Frozen).unwrap();
        let mut decoder =
            Decoder::load(Cpu::new(), &golden.config, &golden.weights, Training::Frozen).unwrap();
        decoder.attach(&golden.adapter, false).unwrap();
        let prompts = vec![vec![5, 36, 7], vec![1], vec![2, 3, 4, 5, 6, 7, 8]];
        let generator = Generator::greedy(12, &[]);
        let expected = generator.run(&mut merged, &prompts).unwrap();
        assert_eq!(generator.run(&mut decoder, &prompts).unwrap(), expected, "{}", golden.name);
    }
}

/// Every key that we write has the value that PEFT wrote, but for how a single name is put.
#[test]
fn settings_are_written_as_peft_writes_them() {
    for golden in Golden::all() {
        let theirs = json(&format!("adapters/{}/adapter_config.json", golden.name));
        let ours: Value = serde_json::from_str(&golden.adapter.config.to_json()).unwrap();
        for (key, value) in ours.as_object().unwrap() {
            let same = match (value, &theirs[key]) {
                (Value::Array(list), Value::String(one)) => list == &[Value::from(one.as_str())],
                (Value::Number(a), Value::Number(b)) => a.as_f64() == b.as_f64(),
                (Value::Object(a), Value::Object(b)) => {
                    let number = |v: &Value| v.as_f64();
                    let pair =
                        |(k, v): (&String, &Value)| (k.clone(), number(v), v.as_array().cloned());
                    a.iter().map(pair).eq(b.iter().map(pair))
                }
                (a, b) => a == b,
            };
            assert!(same, "{}: `{key}` is {value}, not {}", golden.name, theirs[key]);
        }
    }
}

/// Fresh adapters of every kind change nothing, whatever they start from.
#[test]
fn fresh_adapters_are_silent() {
    for golden in Golden::all() {
        let rows = every_row(&golden.batch);
        let settings = golden.adapter.config.clone();
        let fresh = Adapter::init_from(&golden.config, settings, &golden.weights, 5).unwrap();
        let mut decoder =
            Decoder::load(Cpu::new(), &golden.config, &golden.weights, Training::Frozen).unwrap();
        let before = decoder.logits(&golden.batch, &rows).unwrap();
        decoder.attach(&fresh, true).unwrap();
        let off = distance(&decoder.logits(&golden.batch, &rows).unwrap(), &before);
        assert!(off <= 5e-6, "{}: {off:e}", golden.name);
        decoder.accumulate(&golden.batch, 0.1, None).unwrap();
        let live = decoder.gradients().iter().filter(|t| t.data.iter().any(|&g| g != 0.0)).count();
        assert!(live * 2 >= decoder.gradients().len(), "{}: {live} tensors live", golden.name);
    }
}

/// PiSSA: on the residual it starts as the base; as plain LoRA it is the same model on the base.
#[test]
fn pissa_is_plain_lora_in_the_end() {
    let (config, batch) = (config(false), pack(&documents(&config(false), &[7, 4, 11])));
    let base = weights(&config, 3);
    let mut settings = LoraConfig::all_linear(3, 6.0);
    settings.init = InitMethod::Pissa;
    for rslora in [false, true] {
        settings.use_rslora = rslora;
        settings.rank_pattern = vec![("up_proj".to_owned(), 5)];
        let initial = Adapter::init_from(&config, settings.clone(), &base, 1).unwrap();
        let residual = Merge::residual(&config, &base, &initial).unwrap();
        let mut trained = Decoder::load(Cpu::new(), &config, &residual, Training::Frozen).unwrap();
        let rows = every_row(&batch);
        let mut plain = decoder(Cpu::new(), &config, Training::Frozen);
        let before = plain.logits(&batch, &rows).unwrap();
        assert!(distance(&trained.logits(&batch, &rows).unwrap(), &before) > 1e-2);
        trained.attach(&initial, true).unwrap();
        assert!(distance(&trained.logits(&batch, &rows).unwrap(), &before) < 2e-5);
        let mut after = initial.clone();
        let names: Vec<String> = after.tensors.iter().map(|t| t.name.clone()).collect();
        for name in names {
            after.tensors.get_mut(&name).unwrap().data.iter_mut().for_each(|v| *v *= 1.1);
        }
        trained.attach(&after, false).unwrap();
        let joined = after.to_plain(&config, &initial).unwrap();
        assert_eq!(joined.config.r, 6);
        plain.attach(&joined, false).unwrap();
        let expected = trained.logits(&batch, &rows).unwrap();
        assert!(distance(&expected, &before) > 1e-2);
        assert!(distance(&plain.logits(&batch, &rows).unwrap(), &expected) < 2e-5);
    }
}

/// LoftQ brings a 4-bit base nearer to the weights that it was made of.
#[test]
fn loftq_takes_back_what_quantisation_took() {
    let config = config(true);
    let base = weights(&config, 3);
    let quant = BnbConfig::qlora(ValueType::F32);
    let small = QuantizeOnLoad::new(&config, &base, &quant);
    let mut settings = LoraConfig::all_linear(6, 12.0);
    settings.init = InitMethod::Loftq;
    let adapter = Adapter::init_from(&config, settings.clone(), &small, 1).unwrap();
    let merge = Merge::new(&config, &small, &adapter).unwrap();
    for name in ["model.layers.0.self_attn.q_proj.weight", "model.layers.2.mlp.down_proj.weight"] {
        let far = |source: &dyn TensorSource| {
            let (a, b) = (source.tensor(name).unwrap().data, &base.get(name).unwrap().data);
            a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
        };
        let (without, with) = (far(&small), far(&merge));
        assert!(with < 0.8 * without, "{name}: {with} of {without}");
    }
    let error = Adapter::init_from(&config, settings.clone(), &base, 1).unwrap_err().to_string();
    assert!(error.contains("in 4 bits beside its values"), "{error}");
    let error = Adapter::init(&config, settings, 1).unwrap_err().to_string();
    assert!(error.contains("start from the base's weights"), "{error}");
}

/// An adapter of every kind on a 4-bit base has the gradients of one on the dequantised weights.
#[test]
fn adapters_on_a_4bit_base() {
    for name in [
        "dora",
        "saved",
        "embedding_tied",
        "tokens",
        "bias_all",
        "gemma3_dora",
        "gemma3_embedding",
        "phi3_dora",
        "phi3_saved",
        "granite_dora",
        "granite_head",
        "granite_saved",
    ] {
        let golden = Golden::open(name);
        let quant = BnbConfig::qlora(ValueType::F32);
        let small = QuantizeOnLoad::new(&golden.config, &golden.weights, &quant);
        let entries = small.entries();
        let full: Tensors = entries.iter().map(|e| small.tensor(&e.name).unwrap()).collect();
        let run = |source: &dyn TensorSource| {
            let mut decoder =
                Decoder::load(Cpu::new(), &golden.config, source, Training::Frozen).unwrap();
            decoder.attach(&golden.adapter, true).unwrap();
            decoder.accumulate(&golden.batch, 0.1, None).unwrap();
            decoder.gradients()
        };
        let off = relative_distance(&run(&full), &run(&small));
        assert!(off <= 2e-6, "{name}: {off:e}");
    }
}

/// What was trained on 4-bit weights is what is merged, and starts as the base, though the weights'
/// own type is bf16.
#[test]
fn merging_on_a_4bit_base_computes_the_same() {
    for name in ["dora", "gemma3_dora", "phi3_dora", "granite_dora"] {
        check_merging_on_a_4bit_base(&Golden::open(name));
    }
}

fn check_merging_on_a_4bit_base(golden: &Golden) {
    let quant = BnbConfig::qlora(ValueType::Bf16);
    let small = QuantizeOnLoad::new(&golden.config, &golden.weights, &quant);
    let rows = every_row(&golden.batch);
    let mut decoder = Decoder::load(Cpu::new(), &golden.config, &small, Training::Frozen).unwrap();
    let before = decoder.logits(&golden.batch, &rows).unwrap();
    let settings = golden.adapter.config.clone();
    let fresh = Adapter::init_from(&golden.config, settings, &small, 5).unwrap();
    decoder.attach(&fresh, false).unwrap();
    let off = distance(&decoder.logits(&golden.batch, &rows).unwrap(), &before);
    assert!(off <= 5e-6, "{}, fresh: {off:e}", golden.name);
    decoder.attach(&golden.adapter, false).unwrap();
    let merge = Merge::new(&golden.config, &small, &golden.adapter).unwrap();
    let mut merged = Decoder::load(Cpu::new(), merge.config(), &merge, Training::Frozen).unwrap();
    let expected = decoder.logits(&golden.batch, &rows).unwrap();
    let off = distance(&merged.logits(&golden.batch, &rows).unwrap(), &expected);
    assert!(off <= LOGITS, "{}, merged: {off:e}", golden.name);
}

/// Every kind gets the same gradients, byte by byte, at every level of recomputation.
#[test]
fn recomputation_serves_every_kind() {
    for mut golden in Golden::all() {
        golden.adapter.config.lora_dropout = 0.2;
        for compute in [Compute::F32, Compute::Bf16] {
            let cpu = Cpu::new().with_compute(compute);
            let mut decoder =
                Decoder::load(cpu, &golden.config, &golden.weights, Training::Frozen).unwrap();
            decoder.attach(&golden.adapter, true).unwrap();
            let found = Recompute::ALL.map(|recompute| {
                decoder.set_recompute(recompute);
                decoder.zero_gradients();
                decoder.accumulate(&golden.batch, 0.1, Some(1)).unwrap();
                decoder.gradients()
            });
            let what = format!("{}, {compute:?}", golden.name);
            assert!(found.iter().all(|gradients| *gradients == found[0]), "{what}");
        }
    }
}

/// With dropout on, recomputing gives the same bytes, and DoRA's and the head's masks are drawn.
#[test]
fn dropout_reaches_every_kind() {
    for name in [
        "dora",
        "head",
        "head_tied",
        "embedding",
        "bias_lora_only",
        "gemma3_dora",
        "phi3_dora",
        "granite_head",
    ] {
        let mut golden = Golden::open(name);
        golden.adapter.config.lora_dropout = 0.4;
        let mut decoder =
            Decoder::load(Cpu::new(), &golden.config, &golden.weights, Training::Frozen).unwrap();
        decoder.attach(&golden.adapter, true).unwrap();
        let mut run = |recompute, seed| {
            decoder.set_recompute(recompute);
            decoder.zero_gradients();
            decoder.accumulate(&golden.batch, 0.1, seed).unwrap();
            decoder.gradients()
        };
        use hone_model::Recompute::{Attention, Layer, None as Keep};
        let one = run(Keep, Some(1));
        assert!(run(Attention, Some(1)) == one, "{name}, attention");
        assert!(run(Layer, Some(1)) == one, "{name}, layer");
        assert_ne!(run(Keep, Some(2)), one, "{name}");
        assert_ne!(run(Keep, Option::None), one, "{name}");
    }
}

fn check_refused(change: impl Fn(&mut LoraConfig), expected: &str) {
    let config = config(false);
    let mut settings = LoraConfig::all_linear(3, 6.0);
    change(&mut settings);
    let result = Adapter::init_from(&config, settings, &weights(&config, 3), 1);
    let message = result.expect_err("the settings are wrong").to_string();
    assert!(message.contains(expected), "{message}");
}

#[test]
fn wrong_settings_are_refused() {
    let names = |names: &[&str]| names.iter().map(|&n| n.to_owned()).collect::<Vec<_>>();
    check_refused(
        |c| c.target_modules = Targets::Names(vec!["q_porj".to_owned()]),
        "`q_porj` in `target_modules` names no module of the model; near it are q_proj",
    );
    check_refused(
        |c| c.target_modules = Targets::Pattern(".*c_attn".to_owned()),
        "`.*c_attn` in `target_modules` names no module of the model; near it are ",
    );
    check_refused(
        |c| c.target_modules = Targets::Pattern("q_proj".to_owned()),
        "`target_modules` = \"q_proj\" is a text, and so an expression for the whole name of a \
         module, which no module has; for the ends of names give a list: [\"q_proj\"]",
    );
    check_refused(
        |c| c.exclude_modules = Some(vec!["q_proj".to_owned(), "vproj".to_owned()].into()),
        "`vproj` in `exclude_modules` names no module of the model; near it are v_proj",
    );
    check_refused(
        |c| c.exclude_modules = Some(Targets::Pattern("v_proj".to_owned())),
        "`exclude_modules` = \"v_proj\" is a text",
    );
    check_refused(
        |c| c.exclude_modules = Some(Targets::Pattern(".*_proj".to_owned())),
        "less what is excluded, name no linear map",
    );
    check_refused(
        |c| c.layers_to_transform = Some(vec![0, 99]),
        "`layers_to_transform` names layer 99; the model has 3, from 0 to 2",
    );
    check_refused(|c| c.layers_pattern = names(&["layers"]), "`layers_pattern` says where");
    check_refused(
        |c| {
            c.layers_to_transform = Some(vec![0]);
            c.layers_pattern = names(&["h", "blocks"]);
        },
        "`h`, `blocks` in `layers_pattern` names no list of layers; that of the model is `layers`",
    );
    check_refused(|c| c.rank_pattern = vec![("qproj".to_owned(), 2)], "near it are q_proj");
    check_refused(|c| c.alpha_pattern = vec![("gate".to_owned(), 2.0)], "`alpha_pattern`");
    check_refused(|c| c.modules_to_save = names(&["lmhead"]), "near it are lm_head");
    check_refused(
        |c| c.modules_to_save = names(&["lm_.*"]),
        "`lm_.*` in `modules_to_save` names no module of the model; near it are norm, lm_head",
    );
    for name in ["q_proj", "proj", "mlp", "layers.0"] {
        check_refused(|c| c.modules_to_save = names(&[name]), "which is a linear map of a layer");
    }
    check_refused(
        |c| {
            c.target_modules = names(&["lm_head", "q_proj"]).into();
            c.modules_to_save = names(&["head"]);
        },
        "`lm_head` is one of `target_modules`, and `head` in `modules_to_save` trains it whole",
    );
    check_refused(|c| c.r = 0, "`r` = 0");
    check_refused(|c| c.lora_alpha = f64::NAN, "`lora_alpha` = NaN");
    check_refused(|c| c.trainable_tokens.embed_tokens = vec![67], "outside the vocabulary of 67");
    check_refused(|c| c.trainable_tokens.embed_tokens = vec![6, 6], "token 6 twice");
    check_refused(|c| c.trainable_tokens.lm_head = vec![6], "the head is tied");
    check_refused(
        |c| {
            c.use_dora = true;
            c.target_modules = Targets::Names(vec!["lm_head".to_owned()]);
        },
        "`use_dora` is for the linear maps",
    );
    check_refused(
        |c| {
            c.trainable_tokens.embed_tokens = vec![1];
            c.modules_to_save = names(&["embed_tokens"]);
        },
        "not trained otherwise",
    );
    let dora = LoraConfig { use_dora: true, ..LoraConfig::all_linear(2, 4.0) };
    let config = config(true);
    let adapter = Adapter::init_from(&config, dora, &weights(&config, 3), 1).unwrap();
    let error = decoder(Cpu::new(), &config, Training::Full).attach(&adapter, true).unwrap_err();
    assert!(error.to_string().contains("frozen base weights"));
    assert_eq!(BiasMode::default(), BiasMode::None);
}

/// An expression that takes too long is an error, not one that matches nothing.
#[test]
fn expressions_that_give_up_are_refused() {
    // Every way to cut a name into pieces is tried, for there is no such end.
    let endless = r"(?=m)(?:(?:[a-z0-9_.])+)+(?<=q_proj)!";
    let expect = |key: &str| format!("`{key}` holds `{endless}`, an expression that gives up on");
    let own = || endless.to_owned();
    check_refused(|c| c.target_modules = Targets::Pattern(own()), &expect("target_modules"));
    check_refused(
        |c| c.exclude_modules = Some(Targets::Pattern(own())),
        &expect("exclude_modules"),
    );
    check_refused(|c| c.rank_pattern = vec![(own(), 2)], &expect("rank_pattern"));
    check_refused(|c| c.alpha_pattern = vec![(own(), 2.0)], &expect("alpha_pattern"));
    check_refused(
        |c| (c.layers_to_transform, c.layers_pattern) = (Some(vec![0]), vec![own()]),
        &expect("layers_pattern"),
    );
    // Of an adapter that there is, too: it would be merged without what it targets.
    let mut golden = Golden::open("regex");
    golden.adapter.config.exclude_modules = Some(Targets::Pattern(own()));
    let message = golden.adapter.check(&golden.config).unwrap_err().to_string();
    assert!(message.contains(&expect("exclude_modules")), "{message}");
}

/// What PiSSA cannot do is known before any weight is read.
#[test]
fn the_limits_of_pissa_are_known_from_the_settings() {
    let check = |odd: bool, change: &dyn Fn(&mut LoraConfig), expected: &str| {
        let mut settings = LoraConfig::all_linear(3, 6.0);
        settings.target_modules = vec!["q_proj".to_owned()].into();
        change(&mut settings);
        assert!(settings.check_against(&config(odd)).is_ok(), "plain LoRA, {expected}");
        settings.init = InitMethod::Pissa;
        let found = settings.check_against(&config(odd));
        match expected {
            "" => assert!(found.is_ok()),
            _ => assert!(found.unwrap_err().to_string().contains(expected), "{expected}"),
        }
    };
    let targets = |name: &str| Targets::from(vec!["q_proj".to_owned(), name.to_owned()]);
    check(false, &|c| c.r = 8192, "");
    check(false, &|c| c.r = 8193, "`r` = 8193 is not a whole number from 1 to 8192: PiSSA's");
    let pattern = |r| vec![("q_proj".to_owned(), r)];
    check(false, &|c| c.rank_pattern = pattern(8192), "");
    check(false, &|c| c.rank_pattern = pattern(9000), "`rank_pattern.q_proj` = 9000");
    check(false, &|c| c.target_modules = targets("embed_tokens"), "the embedding has no part");
    check(false, &|c| c.target_modules = targets("lm_head"), "a tied head's are the embedding");
    check(true, &|c| c.target_modules = targets("embed_tokens"), "the embedding has no part");
    check(true, &|c| c.target_modules = targets("lm_head"), "");
}

/// PEFT takes settings that mean nothing in a model, and its adapters are read; new ones are not
/// made so.
#[test]
fn adapters_of_peft_may_be_about_more() {
    let check = |change: &dyn Fn(&mut LoraConfig), expected: &str| {
        let mut golden = Golden::open("layers");
        assert!(golden.adapter.config.check_against(&golden.config).is_ok());
        change(&mut golden.adapter.config);
        golden.adapter.check(&golden.config).unwrap();
        let error = golden.adapter.config.check_against(&golden.config).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    check(&|c| c.layers_to_transform = Some(vec![1, 40]), "names layer 40");
    let names = ["k_proj", "mlp.up_proj", "vision_tower"].map(str::to_owned);
    check(
        &|c| c.exclude_modules = Some(names.to_vec().into()),
        "`vision_tower` in `exclude_modules`",
    );
}

/// New tokens: the others keep their logits, and the new ones are learnt alone.
#[test]
fn a_vocabulary_grows() {
    for odd in [false, true] {
        let config = config(odd);
        let base = weights(&config, 3);
        let grown = ResizedVocab::new(&config, &base, 70).unwrap();
        let batch = pack(&documents(&config, &[7, 4, 11]));
        let rows = every_row(&batch);
        let before = decoder(Cpu::new(), &config, Training::Frozen).logits(&batch, &rows).unwrap();
        let mut decoder =
            Decoder::load(Cpu::new(), grown.config(), &grown, Training::Frozen).unwrap();
        let after = decoder.logits(&batch, &rows).unwrap();
        for (before, after) in before.chunks(67).zip(after.chunks(70)) {
            assert!(distance(before, &after[..67]) < 2e-6);
            let mean = before.iter().sum::<f32>() / 67.0;
            assert!(distance(&after[67..], &[mean; 3]) < 2e-6);
        }
        // Only the new rows move, and both their matrices where there are two.
        let mut settings = LoraConfig::all_linear(2, 4.0);
        settings.target_modules = Targets::Names(vec!["q_proj".to_owned()]);
        settings.trainable_tokens.embed_tokens = vec![69, 67];
        if odd {
            settings.trainable_tokens.lm_head = vec![67, 68, 69];
        }
        let adapter = Adapter::init_from(grown.config(), settings, &grown, 1).unwrap();
        decoder.attach(&adapter, true).unwrap();
        assert!(distance(&decoder.logits(&batch, &rows).unwrap(), &after) < 2e-6);
        let mut moved = adapter.clone();
        let name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta";
        moved.tensors.get_mut(name).unwrap().data.iter_mut().for_each(|x| *x += 0.5);
        decoder.set_trained(&moved.tensors).unwrap();
        let logits = decoder.logits(&batch, &rows).unwrap();
        // Tied, the logits of 67 and 69 move; no id of the batch is new, so nothing else does.
        for (now, then) in logits.chunks(70).zip(after.chunks(70)) {
            assert!(distance(&now[..67], &then[..67]) < 2e-6);
            assert_eq!((now[67] - then[67]).abs() > 1e-3, !odd);
        }
        let error = ResizedVocab::new(&config, &base, 66).err().unwrap().to_string();
        assert!(error.contains("`vocab_size` = 66 is not from 67"), "{error}");
    }
}
