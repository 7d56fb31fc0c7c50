//! Every way to train, from packs to a merged model, through the real programs: what is learned is what is merged, and a run that
//! was killed ends with the same bytes.

use serde_json::Value;

use crate::fixture::{Files, Place, STAGES, differing, file_of, tensors, wait_until};

/// Settings that say which way is taken.
const METHODS: [&[&str]; 19] = [
    &[],
    &["train.method=qlora"],
    &["train.method=qlora", "train.quant_type=fp4"],
    &["train.method=qlora", "train.double_quant=false", "train.dora=true"],
    &["train.method=qlora", "train.lora_init=loftq", "train.optimizer=adamw8bit", "train.rank=8"],
    &["train.lora_init=gaussian", "train.optimizer=lion"],
    &["train.lora_init=pissa", "train.optimizer=sgd"],
    &["train.lora_init=pissa", "train.rslora=true", "train.rank_pattern={q_proj = 2}"],
    &["train.dora=true", "train.optimizer={name='adafactor', relative_step=true}"],
    &["train.modules_to_save=['norm']", "train.ema_decay=0.9"],
    &["train.modules_to_save=['lm_head']", "train.optimizer=muon"],
    &["train.modules_to_save=['embed_tokens']"],
    &["train.trainable_tokens=[5, '<|im_end|>']"],
    &["train.target_modules='.*layers.1.*_proj'", "train.exclude_modules=['down_proj']"],
    &["train.target_modules=['all-linear', 'lm_head']"],
    &["train.method=full", "train.optimizer=muon", "train.ema_decay=0.9"],
    &["train.compute=bf16"],
    &["train.compute=bf16", "train.method=qlora", "train.recompute=attention"],
    &["train.compute=bf16", "train.method=full", "train.recompute=layer"],
];

fn flags<'a>(settings: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
    let settings = settings.iter().chain(more);
    settings.flat_map(|set| ["--set", *set]).collect()
}

fn ready() -> Place {
    Place::after(&["ingest", "template", "tokenize"])
}

/// The weights of a run, whichever they are.
fn weights(files: &Files) -> &[u8] {
    let names = ["adapter_model.safetensors", "model.safetensors"];
    let found = names.iter().find_map(|name| files.get(&format!("runs/p/train/{name}")));
    found.expect("a run leaves weights")
}

/// Held-out loss at the end of the last run.
fn held_out(place: &Place) -> f64 {
    let report = place.json("runs/p/train/manifest.json")["report"].clone();
    report["eval"]["loss"].as_f64().expect("there is a held-out split")
}

/// Held-out loss of the merged model, by the trainer's own measure.
fn held_out_when_merged(place: &Place) -> f64 {
    let still = ["base=\"runs/p/merge\"", "train.lr=0", "train.max_steps=1"];
    place.done("train", &with_out(&flags(&still, &[])));
    let report = place.json("again/manifest.json")["report"].clone();
    report["eval"]["loss"].as_f64().expect("there is a held-out split")
}

fn with_out<'a>(args: &[&'a str]) -> Vec<&'a str> {
    [args, &["--out", "again"]].concat()
}

#[test]
fn what_each_method_learns_is_what_is_merged() {
    let place = ready();
    let mut seen = Vec::new();
    for settings in METHODS {
        let place = place.copy();
        place.done("train", &flags(settings, &["train.epochs=3"]));
        let files = place.artefact("train");
        assert!(!seen.contains(&weights(&files).to_vec()), "{settings:?} learns what another does");
        seen.push(weights(&files).to_vec());
        // The merge compares logits, of base and adapter as they were trained, with those of the file.
        place.done("merge", &[]);
        let check = place.json("runs/p/merge/merge.json")["check"].clone();
        assert_eq!(check["passed"], true, "{settings:?}: {check}");
        let (trained, merged) = (held_out(&place), held_out_when_merged(&place));
        // The merged model is measured in f32.
        let bound = if settings.contains(&"train.compute=bf16") { 1e-2 } else { 1e-5 };
        let apart = (trained - merged).abs() / trained;
        assert!(apart < bound, "{settings:?}: {trained} when trained, {merged} when merged");
    }
}

#[test]
fn every_method_goes_on_to_the_same_bytes() {
    let place = ready();
    for (idx, settings) in METHODS.iter().enumerate() {
        let straight = place.copy();
        straight.done("train", &flags(settings, &["train.epochs=6"]));
        let place = place.copy();
        let often = ["train.epochs=6", "train.checkpoint_every=1", "train.keep_checkpoints=99"];
        let mut running = place.start("train", &flags(settings, &often));
        let last = place.tree.path("runs/p/train-checkpoints/step-000000013");
        assert!(wait_until(&mut running, || last.exists()), "{settings:?}: it ended too early");
        running.signal("KILL");
        running.end();
        let mut again = flags(settings, &["train.epochs=6"]);
        let threads = ["1", "3"][idx % 2];
        again.extend(["--threads", threads]);
        let output = place.done("train", &again);
        assert!(output.stderr.contains("train: resumes after step "), "{}", output.stderr);
        let found = differing(&straight.artefact("train"), &place.artefact("train"));
        assert_eq!(found, Vec::<String>::new(), "{settings:?} with {threads} threads");
    }
}

#[test]
fn what_pissa_leaves_is_an_adapter_of_the_unchanged_base() {
    let place = ready();
    let pissa = ["train.lora_init=pissa", "train.max_steps=12", "train.rank=3", "train.alpha=6"];
    place.done("train", &flags(&pissa, &[]));
    let learned = held_out(&place);
    for (name, bytes) in place.artefact("train") {
        if let Some(name) = name.strip_prefix("runs/p/train/adapter_") {
            place.tree.write(&format!("start/adapter_{name}"), bytes);
        }
    }
    // Twice the rank at the same scaling; at a rate of zero it stays what it was.
    let still = [
        "train.adapter_init=start",
        "train.rank=6",
        "train.alpha=12",
        "train.lr=0",
        "train.max_steps=1",
    ];
    place.done("train", &flags(&still, &[]));
    let found = held_out(&place);
    assert!((found - learned).abs() < 1e-5 * learned, "{found} is not {learned}");
    let untrained = ["train.lr=0", "train.max_steps=1"];
    place.done("train", &flags(&untrained, &[]));
    assert!((held_out(&place) - learned).abs() > 1e-2, "it has learned nothing");
}

#[test]
fn a_base_of_4_bits_is_the_one_that_is_quantised_on_the_way() {
    let place = ready();
    let small = ["quantize", "base", "--out", "small", "--type", "fp4"];
    let output = place.tree.run("hone-fetch", &small);
    assert_eq!(output.code, Some(0), "{}", output.stderr);
    let learned = |settings: &[&str]| {
        let place = place.copy();
        place.done("train", &flags(settings, &["train.epochs=3"]));
        weights(&place.artefact("train")).to_vec()
    };
    let on_the_way = learned(&["train.method=qlora", "train.quant_type=fp4"]);
    let stored = "base=\"small\"";
    assert!(learned(&[stored]) == on_the_way, "an adapter on weights that lie in 4 bits");
    assert!(learned(&[stored, "train.method=qlora", "train.quant_type=fp4"]) == on_the_way);
    assert!(learned(&[]) != on_the_way);
    let refused = |settings: &[&str], said: &str| {
        let output = place.run("train", &flags(settings, &[stored]));
        assert_eq!(output.said(), said, "{settings:?}");
    };
    refused(
        &["train.method=qlora"],
        "exit 2\n\
         error: p.toml:19: [train] `quant_type`: the base lies in 4 bits already, with quant_type = \"fp4\", \
         double_quant = true\n\
         hint: give those, or the base that it was made from\n",
    );
    refused(
        &["train.method=full"],
        "exit 2\n\
         error: `--set train.method=full`: [train] `method` is \"full\", and the base's weights lie \
         in 4 bits\n\
         hint: train an adapter on them, `method = \"qlora\"`, or give another base\n",
    );
}

/// Layer 0 lies as it was, layer 1 in 4 bits: that is what is trained on and merged into, whatever the names in the configuration mean.
#[test]
fn a_base_of_which_a_part_lies_in_4_bits_stays_so() {
    let place = ready();
    let output = place.tree.run("hone-fetch", &["quantize", "base", "--out", "small"]);
    assert_eq!(output.code, Some(0), "{}", output.stderr);
    let read = |name: &str| std::fs::read(place.tree.path(name)).unwrap();
    let is_first = |name: &str| name.contains("layers.0.");
    let mut parts = tensors(&read("base/model.safetensors"));
    parts.retain(|(name, ..)| is_first(name));
    let rest = tensors(&read("small/model.safetensors"));
    parts.extend(rest.into_iter().filter(|(name, ..)| !is_first(name)));
    place.tree.write("mixed/model.safetensors", file_of(parts));
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        place.tree.write(&format!("mixed/{name}"), read(&format!("base/{name}")));
    }
    let mut config = place.json("small/config.json");
    config["quantization_config"]["llm_int8_skip_modules"] = vec!["model.layers.0.*"].into();
    place.tree.write("mixed/config.json", config.to_string());
    let mut learned = Vec::new();
    for settings in [&["train.method=qlora"][..], &[]] {
        let place = place.copy();
        let base = "base=\"mixed\"";
        place.done("train", &flags(settings, &[base, "train.epochs=3"]));
        learned.push(weights(&place.artefact("train")).to_vec());
        place.done("merge", &flags(&[base], &[]));
        let (trained, merged) = (held_out(&place), held_out_when_merged(&place));
        assert!((trained - merged).abs() < 1e-5 * trained, "{trained} {merged}");
        let original = place.run("merge", &flags(&[base, "merge.base=original"], &[]));
        assert_eq!(
            original.said(),
            "exit 2\nerror: [merge] `base` is \"original\", and the adapter learned on the weights as they lie in the base\n\
             hint: leave it out\n"
        );
    }
    assert!(learned[0] == learned[1]);
}

#[test]
fn weights_that_are_none_are_refused() {
    let place = ready();
    let check = |name: &str, edit: &dyn Fn(&mut Value, &mut Vec<u8>), said: &str| {
        let place = place.copy();
        let path = place.tree.path("base/model.safetensors");
        let mut parts = tensors(&std::fs::read(&path).unwrap());
        let (_, entry, bytes) = parts.iter_mut().find(|(found, ..)| found == name).unwrap();
        edit(entry, bytes);
        place.tree.write("base/model.safetensors", file_of(parts));
        let before = place.visible();
        for method in ["lora", "qlora", "full"] {
            let method = format!("train.method={method}");
            let output = place.run("train", &flags(&[&method], &[]));
            assert_eq!(output.code, Some(3), "{}", output.stderr);
            assert!(output.stderr.contains(said), "{method}: {}", output.stderr);
        }
        assert_eq!(differing(&before, &place.visible()), Vec::<String>::new());
    };
    let name = "model.layers.1.mlp.up_proj.weight";
    let nan =
        |_: &mut Value, bytes: &mut Vec<u8>| bytes[8..12].copy_from_slice(&f32::NAN.to_le_bytes());
    check(name, &nan, "tensor `model.layers.1.mlp.up_proj.weight`");
    let turned = |entry: &mut Value, _: &mut Vec<u8>| entry["shape"] = vec![16, 32].into();
    check(name, &turned, "has shape [16, 32], the configuration says [32, 16]");
    let long = |entry: &mut Value, bytes: &mut Vec<u8>| {
        entry["dtype"] = "I64".into();
        bytes.extend_from_within(..);
    };
    check(name, &long, "I64");
}

#[test]
fn what_was_learned_on_other_weights_is_not_gone_on_from() {
    let place = ready();
    let loftq = ["train.method=qlora", "train.lora_init=loftq"];
    place.done("train", &flags(&loftq, &["train.max_steps=3"]));
    let place = place.copy();
    let on = ["train.adapter_init=runs/p/train", "train.max_steps=1"];
    let refused = |settings: &[&str], said: &str| {
        let args = with_out(&flags(&on, &[]));
        let output = place.run("train", &[&args[..], &flags(settings, &[])].concat());
        assert_eq!(output.code, Some(2), "{}", output.stderr);
        assert!(output.stderr.contains(said), "{}", output.stderr);
    };
    refused(
        &[],
        "does not fit: `method` is \"qlora\" there and \"lora\" here; `quant_type` is \"nf4\" there",
    );
    refused(
        &["train.method=qlora", "train.quant_type=fp4"],
        "does not fit: `quant_type` is \"nf4\" there and \"fp4\" here",
    );
    place.done(
        "train",
        &[&with_out(&flags(&on, &[]))[..], &["--set", "train.method=qlora"]].concat(),
    );

    // A base that has grown since: its tokens are not those of the packs.
    let args = ["tokens", "base", "--out", "grown", "--add", "<|note|>"];
    assert_eq!(place.tree.run("hone-fetch", &args).code, Some(0));
    let output = place.run("train", &flags(&["base=\"grown\""], &[]));
    assert_eq!(
        output.said(),
        "exit 3\n\
         error: runs/p/tokenize: id 2048 is no token there and \"<|note|>\" in the base: the packs were made for another tokenizer\n\
         hint: run `hone-tokenize` again\n"
    );
    // A token that no pack has is learned by nothing.
    let output = place.done(
        "train",
        &with_out(&flags(&["train.trainable_tokens=[5, 2040]"], &["train.max_steps=1"])),
    );
    let said = "warning: train: `trainable_tokens`: no pack has [";
    assert!(output.stderr.contains(said), "{}", output.stderr);
}

#[test]
fn new_tokens_go_through_the_whole_chain() {
    let place = Place::new();
    let add = |out: &str, more: &[&str]| {
        let args = ["tokens", "base", "--out", out, "--add", "<|note|>", "--add", "<|end|>"];
        place.tree.run("hone-fetch", &[&args[..], more].concat())
    };
    let output = add("grown", &["--pad-to", "64"]);
    assert_eq!(output.code, Some(0), "{}", output.stderr);
    let said = "<|note|> = 2048, <|end|> = 2049; 2112 rows of the embedding";
    assert!(output.stderr.contains(said), "{}", output.stderr);
    assert_eq!(place.json("grown/config.json")["vocab_size"], 2112);
    let tokens = |file: &str| -> Vec<String> {
        let added = place.json(file)["added_tokens"].as_array().unwrap().clone();
        added.iter().map(|token| token["content"].as_str().unwrap().to_owned()).collect()
    };
    let (before, after) = (tokens("base/tokenizer.json"), tokens("grown/tokenizer.json"));
    assert_eq!(after, [before, vec!["<|note|>".into(), "<|end|>".into()]].concat());

    // A template of one's own that writes them.
    let template = "{% for m in messages %}<|note|>{{ m.role }}: {% if m.role == 'assistant' %}\
                    {% generation %}{{ m.content }}<|end|>{% endgeneration %}{% else %}\
                    {{ m.content }}<|end|>{% endif %}{% endfor %}";
    place.tree.write("notes.jinja", template);
    let chain = ["base=\"grown\"", "template.template={file='notes.jinja'}", "train.epochs=3"];
    let rows = ["train.trainable_tokens=['<|note|>', '<|end|>']"];
    for stage in STAGES {
        place.done(stage, &flags(&chain, &rows));
    }
    let merge = place.json("runs/p/merge/merge.json");
    assert_eq!(merge["check"]["passed"], true, "{merge}");
    assert_eq!(place.json("runs/p/merge/config.json")["vocab_size"], 2112);
    let config = place.json("runs/p/train/adapter_config.json");
    assert_eq!(config["trainable_token_indices"], Value::from(vec![2048, 2049]));
}
