//! Models from this machine: GGUF files and directories.

use std::path::Path;

use crate::{MODEL_FILES, fetch, fixture, names, tiny_model};

#[test]
fn a_gguf_file_becomes_a_sealed_model() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_model(dir.path());
    assert_eq!(names(&model), MODEL_FILES);
    let weights = std::fs::read(model.join("model.safetensors")).unwrap();
    let source = dir.path().join("tiny.gguf");
    let (source, out) = (source.to_str().unwrap(), model.to_str().unwrap());
    fetch(&["model", source, "--out", out], &[]).check(0, "fresh");
    let ended = fetch(&["model", source, "--out", out, "--dtype", "f32", "--json"], &[]);
    ended.check(0, "`dtype` was \"bf16\" and is \"f32\"");
    let said: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(said["report"]["n_params"], 2440);
    assert_eq!(said["report"]["origin"]["name"], "tiny");
    let wider = std::fs::read(model.join("model.safetensors")).unwrap();
    assert!(wider.len() > weights.len() + 4000);
}

#[test]
fn inspect_prints_the_header() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tiny.gguf");
    std::fs::write(&file, fixture::tiny().bytes()).unwrap();
    let path = file.to_str().unwrap();
    let ended = fetch(&["inspect", path], &[]);
    ended.check(0, "");
    for line in [
        "GGUF version 3",
        "general.architecture = \"llama\"",
        "tokenizer.ggml.tokens = [\"Ā\", \"ā\", \"Ă\", \"ă\", ..] (260 values)",
        "11 tensors, 2440 values, 9760 bytes",
    ] {
        assert!(ended.stdout.lines().any(|found| found == line), "{}\n{line}", ended.stdout);
    }
    let ended = fetch(&["inspect", path, "--json"], &[]);
    let said: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(said["tensors"].as_array().unwrap().len(), 11);
    assert_eq!(said["metadata"]["llama.block_count"], 1);
}

#[test]
fn wrong_flags_and_wrong_sources() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let out = out.to_str().unwrap();
    let text = dir.path().join("text.gguf");
    std::fs::write(&text, "hello").unwrap();
    let text = text.to_str().unwrap();
    let gone = dir.path().join("gone.gguf");
    let gone = gone.to_str().unwrap();
    fetch(&["model", text], &[]).check(2, "`--out` is missing");
    fetch(&["model", text, "--out", out, "--set", "a=b"], &[]).check(2, "reads no pipeline file");
    fetch(&["model", gone, "--out", out], &[]).check(3, "does not exist");
    fetch(&["model", text, "--out", out], &[]).check(3, "not a GGUF file");
    fetch(&["inspect", text], &[]).check(3, "not a GGUF file");
    fetch(&["inspect", gone], &[]).check(3, "does not exist");
    let mut cut = fixture::tiny().bytes();
    cut.truncate(cut.len() - 1);
    std::fs::write(text, cut).unwrap();
    let ended = fetch(&["model", text, "--out", out], &[]);
    ended.check(3, "tensor `blk.0.ffn_down.weight`: its 192 bytes");
    ended.check(3, "hint: is the file whole?");
    assert!(!Path::new(out).exists());
    assert_eq!(names(dir.path()), ["text.gguf"], "nothing half-written stays");
}

#[test]
fn a_directory_is_checked_and_copied() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_model(dir.path());
    let copy = dir.path().join("copy");
    let (source, out) = (model.to_str().unwrap(), copy.to_str().unwrap());
    std::fs::write(model.join("README.md"), "not a part of the model").unwrap();
    fetch(&["model", source, "--out", out], &[]).check(0, "2440 weights in 11 tensors");
    assert_eq!(names(&copy), MODEL_FILES);
    for name in MODEL_FILES.iter().filter(|name| **name != "manifest.json") {
        let read = |dir: &Path| std::fs::read(dir.join(name)).unwrap();
        assert!(read(&copy) == read(&model), "{name}");
    }
    fetch(&["model", source, "--out", out], &[]).check(0, "fresh");
}

/// Mistral's directories hold the weights twice, the second time as `consolidated.safetensors`.
#[test]
fn weights_that_are_not_the_models_are_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_model(dir.path());
    std::fs::remove_file(model.join("manifest.json")).unwrap();
    let weights = model.join("model.safetensors");
    std::fs::copy(&weights, model.join("consolidated.safetensors")).unwrap();
    let base = model.to_str().unwrap();
    let made = |what: &[&str]| {
        let out = dir.path().join(format!("of-{}", what[0]));
        fetch(&[what, &[base, "--out", out.to_str().unwrap()]].concat(), &[]).check(0, "");
        assert_eq!(names(&out), MODEL_FILES, "{what:?}");
    };
    made(&["model"]);
    made(&["tokens", "--add", "<|note|>"]);
    made(&["quantize"]);
}

/// A tiny model directory without a manifest, damaged, and what is said of it.
fn check_damage(damage: impl FnOnce(&Path), said: &str) {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_model(dir.path());
    std::fs::remove_file(model.join("manifest.json")).unwrap();
    damage(&model);
    let out = dir.path().join("out");
    let args = ["model", model.to_str().unwrap(), "--out", out.to_str().unwrap()];
    fetch(&args, &[]).check(3, said);
    assert!(!out.exists());
}

/// Replaces a text in a file of the model.
fn edit(model: &Path, name: &str, from: &str, to: &str) {
    let text = std::fs::read_to_string(model.join(name)).unwrap();
    assert!(text.contains(from), "{name} has no {from}");
    std::fs::write(model.join(name), text.replacen(from, to, 1)).unwrap();
}

#[test]
fn damaged_directories_are_refused() {
    let remove =
        |name: &'static str| move |model: &Path| std::fs::remove_file(model.join(name)).unwrap();
    let weights = |model: &Path| std::fs::read(model.join("model.safetensors")).unwrap();
    let put = |model: &Path, bytes: &[u8]| {
        std::fs::write(model.join("model.safetensors"), bytes).unwrap()
    };
    let index = |model: &Path, text: &str| {
        std::fs::write(model.join("model.safetensors.index.json"), text).unwrap();
    };
    check_damage(remove("config.json"), "config.json");
    check_damage(remove("tokenizer.json"), "tokenizer.json");
    check_damage(remove("model.safetensors"), "there are no weights in safetensors files");
    check_damage(|m| put(m, &weights(m)[..4]), "it has only 4 bytes");
    check_damage(|m| put(m, &weights(m)[..4000]), "its header promises 4880 bytes of tensors");
    check_damage(|m| put(m, &[weights(m), vec![0]].concat()), "the file has 4881");
    let huge = |m: &Path| {
        let mut bytes = weights(m);
        bytes[..8].copy_from_slice(&(1u64 << 60).to_le_bytes());
        put(m, &bytes);
    };
    check_damage(huge, "its header claims 1152921504606846976 bytes");
    check_damage(|m| index(m, "{}"), "is not an index of shards");
    check_damage(|m| index(m, r#"{"weight_map": {}}"#), "it names no files");
    let shard = r#"{"weight_map": {"a": "model-00001-of-00001.safetensors"}}"#;
    check_damage(|m| index(m, shard), "names the file `model-00001-of-00001.safetensors`");
    let pickle = r#"{"weight_map": {"a": "../../x.bin"}}"#;
    check_damage(|m| index(m, pickle), "which is no safetensors file");
    let model_type = |m: &Path| edit(m, "config.json", "\"llama\"", "\"mamba\"");
    check_damage(model_type, "`model_type` = \"mamba\" is not supported");
    let layers = |m: &Path| {
        edit(m, "config.json", "\"num_hidden_layers\": 1", "\"num_hidden_layers\": 2");
    };
    check_damage(layers, "missing model.layers.1");
    let rows = |m: &Path| edit(m, "config.json", "\"vocab_size\": 260", "\"vocab_size\": 259");
    check_damage(rows, "a token with the id 259, the embedding only 259 rows");
    check_damage(|m| edit(m, "tokenizer.json", "\"BPE\"", "\"BPX\""), "does not load");
}

/// A base in 4 bits is a model that is brought in again as it is.
#[test]
fn a_base_in_4_bits_is_a_base() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_model(dir.path());
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (base, small, copy) = (model.to_str().unwrap(), at("small"), at("copy"));
    let again = at("again");
    let quantize =
        |more: &[&str], out: &str| fetch(&[&["quantize", base, "--out", out], more].concat(), &[]);
    quantize(&[], &small).check(0, "linear maps as nf4 of 4.13 bits a weight");
    quantize(&[], &small).check(0, "fresh");
    assert_eq!(names(Path::new(&small)), MODEL_FILES);
    fetch(&["model", &small, "--out", &copy], &[]).check(0, "2440 weights in ");
    let read = |dir: &str| std::fs::read(Path::new(dir).join("model.safetensors")).unwrap();
    assert!(read(&small) == read(&copy));
    quantize(&["--type", "fp4", "--no-double-quant"], &again).check(0, "fp4 of 4.5 bits");
    assert!(read(&again) != read(&small));
    fetch(&["quantize", &small, "--out", &again], &[]).check(3, "it lies in 4 bits already");
}
