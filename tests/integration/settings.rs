//! Every setting of `[train]` through the real program: that it changes what it should and nothing else, and what is said of one that
//! cannot be.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::fixture::{Place, differing, tensors};

/// Prepared packs.
fn place() -> Place {
    Place::after(&["ingest", "template", "tokenize"])
}

/// Three steps with these settings, and the files that they leave.
fn train(place: &Place, settings: &[&str]) -> (Place, BTreeMap<String, Vec<u8>>) {
    let place = place.copy();
    place.done("train", &flags(settings));
    let files = place.artefact("train");
    (place, files)
}

fn flags<'a>(settings: &[&'a str]) -> Vec<&'a str> {
    let short = ["--set", "train.max_steps=3", "--set", "train.eval_every=0"];
    short.into_iter().chain(settings.iter().flat_map(|set| ["--set", *set])).collect()
}

const ADAPTER: &str = "runs/p/train/adapter_model.safetensors";

/// Settings that each learn something of their own.
const LEARN: &[&[&str]] = &[
    &[],
    &["train.optimizer=adamw8bit", "train.rank=512"],
    &["train.optimizer=lion"],
    &["train.optimizer={name='lion', beta2=0.9}"],
    &["train.optimizer=adafactor"],
    &["train.optimizer={name='adafactor', relative_step=true, scale_parameter=true}"],
    &["train.optimizer=sgd"],
    &["train.optimizer={name='sgd', momentum=0.5, nesterov=true}"],
    &["train.optimizer=muon"],
    &["train.beta2=0.9"],
    &["train.weight_decay=0.3"],
    &["train.groups=[{match='q_proj', lr_scale=0.1}]"],
    &["train.groups=[{match='q_proj', lr=1e-4}, {match='.', weight_decay=0.1}]"],
    &["train.groups=[{match='.', lora_plus_ratio=16.0}]"],
    &["train.ema_decay=0.9"],
    &["train.label_smoothing=0.1"],
    &["train.z_loss=0.1"],
    &["train.neftune_alpha=5.0"],
    &["train.dft=true"],
    &["train.soft_cap=2.0"],
    &["train.schedule=constant"],
    &["train.schedule=linear"],
    &["train.schedule={name='cosine_restarts', cycles=2}"],
    &["train.schedule={name='polynomial', power=3.0}"],
    &["train.schedule={name='wsd', decay_steps=2}", "train.min_lr_ratio=0.5"],
    &["train.schedule={name='inverse_sqrt', timescale=2}"],
    &["train.warmup_steps=1"],
    &["train.warmup_steps=1", "train.schedule_convention=hone"],
    &["train.order=sequential"],
    &["train.exclude_modules=['down_proj']"],
    &["train.layers_to_transform=[0]"],
    &["train.rank_pattern={q_proj = 2}"],
    &["train.alpha_pattern={q_proj = 1.0}"],
];

#[test]
fn every_way_of_learning_is_one_of_its_own() {
    let place = place();
    let mut seen: BTreeMap<Vec<u8>, &[&str]> = BTreeMap::new();
    for settings in LEARN {
        let (_, files) = train(&place, settings);
        if let Some(other) = seen.insert(files[ADAPTER].clone(), settings) {
            panic!("{settings:?} and {other:?} learn the same");
        }
    }
    assert_eq!(seen.len(), LEARN.len());
}

/// Other ways to write the same run: the output of one is fresh for the other, and it is said what each name means.
#[test]
fn names_of_other_trainers_mean_the_same_run() {
    let place = place();
    let text = std::fs::read_to_string(place.tree.path("p.toml")).unwrap();
    let given = ["rank =", "epochs =", "lr =", "batch_size =", "micro_batch_size ="];
    let rest = text.lines().filter(|line| !given.iter().any(|key| line.starts_with(key)));
    place.tree.write("p.toml", rest.map(|line| format!("{line}\n")).collect::<String>());
    let ours = [
        "train.lr=2e-3",
        "train.epochs=3",
        "train.schedule=constant",
        "train.rank=2",
        "train.alpha=6",
        "train.batch_size=6",
        "train.micro_batch_size=2",
        "train.shuffle=none",
    ];
    let theirs = [
        "train.learning_rate=2e-3",
        "train.num_train_epochs=3.0",
        "train.lr_scheduler_type=constant_with_warmup",
        "train.lora_r=2",
        "train.lora_alpha=6",
        "train.per_device_train_batch_size=2",
        "train.gradient_accumulation_steps=3",
        "train.order=sequential",
        "train.optim=adamw_torch",
        "train.logging_steps=1",
    ];
    let (place, _) = train(&place, &ours);
    let again = place.done("train", &flags(&theirs));
    for said in [
        "train: `learning_rate = 0.002` is `lr = 0.002`",
        "train: `num_train_epochs = 3.0` is `epochs = 3`",
        "train: `gradient_accumulation_steps = 3` is `batch_size = 6`",
        "train: `order = \"sequential\"` is `shuffle = \"none\"`",
        "train: `logging_steps = 1` changes nothing",
        "train: fresh",
    ] {
        assert!(again.stderr.contains(said), "{said}: {}", again.stderr);
    }
    for same in [&["train.optimizer=adamw"][..], &["train.save=last"], &["train.order=sequential"]]
    {
        let ours: Vec<&str> = ours.iter().chain(same).copied().collect();
        let again = place.done("train", &flags(&ours));
        assert!(again.stderr.contains("train: fresh"), "{same:?}: {}", again.stderr);
    }
}

/// With an average, the weights after the last step are those of a run without one.
#[test]
fn the_last_weights_are_there_beside_an_average() {
    let place = place();
    let (_, plain) = train(&place, &[]);
    let (_, last) = train(&place, &["train.ema_decay=0.9", "train.save=last"]);
    assert_eq!(plain[ADAPTER], last[ADAPTER]);
}

#[test]
fn a_run_goes_on_from_an_adapter() {
    let place = place();
    let (place, files) = train(&place, &[]);
    for name in ["adapter_model.safetensors", "adapter_config.json"] {
        place.tree.write(&format!("start/{name}"), &files[&format!("runs/p/train/{name}")]);
    }
    // At a rate of zero it stays what it was, wherever it lies, and as an artefact of hone too.
    let still = ["train.adapter_init=start", "train.lr=0.0"];
    let (other, stayed) = train(&place, &still);
    assert_eq!(stayed[ADAPTER], files[ADAPTER]);
    for name in ["adapter_model.safetensors", "adapter_config.json"] {
        other.tree.write(&format!("elsewhere/{name}"), &files[&format!("runs/p/train/{name}")]);
    }
    other.tree.remove("start");
    let again = other.done("train", &flags(&["train.adapter_init=elsewhere", "train.lr=0.0"]));
    assert!(again.stderr.contains("train: fresh"), "{}", again.stderr);
    let sealed =
        ["--out", "next", "--set", "train.adapter_init=runs/p/train", "--set", "train.lr=0"];
    place.done("train", &[&flags(&[])[..], &sealed].concat());
    assert_eq!(place.tree.files("next")["next/adapter_model.safetensors"], files[ADAPTER]);

    let refused = |settings: &[&str], said: &str| {
        let output = place.run("train", &flags(settings));
        assert_eq!(output.said(), said, "{settings:?}");
    };
    refused(
        &["train.adapter_init=start", "train.rank=8", "train.target_modules=['q_proj']"],
        "exit 2\n\
         error: `--set train.adapter_init=start`: [train] `adapter_init` = \"start\" does not fit: \
         `rank` is 4 there and 8 here; `alpha` is 8 there and 16 here; `target_modules` is \
         [\"down_proj\", \"gate_proj\", \"k_proj\", \"o_proj\", \"q_proj\", \"up_proj\", \"v_proj\"] \
         there and [\"q_proj\"] here\n\
         hint: give the settings that it was made with, or leave it out\n",
    );
}

#[test]
fn what_is_frozen_stays() {
    let place = place();
    let frozen = "train.freeze=['layers\\.0\\.', 'embed_tokens']";
    let (_, files) = train(&place, &["train.method=full", frozen]);
    let tensors = |bytes: &[u8]| -> BTreeMap<String, Vec<u8>> {
        tensors(bytes).into_iter().map(|(name, _, bytes)| (name, bytes)).collect()
    };
    let before = tensors(&std::fs::read(place.tree.path("base/model.safetensors")).unwrap());
    let after = tensors(&files["runs/p/train/model.safetensors"]);
    assert_eq!(before.len(), after.len());
    let changed = differing(&before, &after);
    let is_frozen = |name: &String| name.contains("layers.0.") || name.contains("embed_tokens");
    let trained: Vec<String> = before.keys().filter(|name| !is_frozen(name)).cloned().collect();
    assert_eq!(changed, trained);
}

/// Settings that are refused, and what is said: exit code and stderr.
#[test]
fn settings_that_cannot_be_are_refused() {
    let place = place();
    let before = place.visible();
    for (settings, said) in REFUSED {
        let args: Vec<&str> = settings.iter().flat_map(|set| ["--set", *set]).collect();
        let output = place.run("train", &args);
        assert_eq!(output.said(), *said, "{settings:?}");
    }
    assert!(differing(&before, &place.visible()).is_empty());
}

const REFUSED: &[(&[&str], &str)] = &[
    (
        &["train.optimizer=lion", "train.beta2=0.9"],
        "exit 2\n\
         error: `--set train.beta2=0.9`: [train] `beta2` is AdamW's, and `optimizer` is \"lion\"\n\
         hint: write `optimizer = { name = \"lion\", beta2 = 0.9 }`\n",
    ),
    (
        &["train.optimizer=sgd", "train.eps=1e-6"],
        "exit 2\n\
         error: `--set train.eps=1e-6`: [train] `eps` is AdamW's, and `optimizer` is \"sgd\"\n\
         hint: sgd has no such knob: leave it out\n",
    ),
    (
        &["train.optimizer={beta1=0.8}", "train.beta1=0.9"],
        "exit 2\n\
         error: `--set train.beta1=0.9`: [train] `beta1` stands in the table `optimizer` as well\n\
         hint: keep one of them\n",
    ),
    (
        &["train.save=average"],
        "exit 2\n\
         error: `--set train.save=average`: [train] `save` is \"average\", and there is no average\n\
         hint: give `ema_decay`, 0.999 for example: the average's decay at each step\n",
    ),
    (
        &["train.learning_rate=1e-3"],
        "exit 2\n\
         error: `--set train.learning_rate=1e-3`: [train] `learning_rate` is 0.001 and `lr` is 0.01, \
         which contradict each other\n\
         hint: one is `lr = 0.001`, the other `lr = 0.01`: keep one of them\n",
    ),
    (
        &["train.seed=3"],
        "exit 2\n\
         error: `--set train.seed=3`: [train] `seed` is 3, which has no counterpart\n\
         hint: `seed` stands at the top of the file, and is that of all stages\n",
    ),
    (
        &["train.freeze=['mlp']"],
        "exit 2\nerror: `--set train.freeze=['mlp']`: [train] `freeze` needs `method = \"full\"`\n",
    ),
    (
        &["train.method=full", "train.adapter_init=x"],
        "exit 2\n\
         error: `--set train.adapter_init=x`: [train] `adapter_init` needs `method = \"lora\"`\n",
    ),
    (
        &["train.alpha=nan"],
        "exit 2\nerror: `--set train.alpha=nan`: [train] `alpha` = NaN is not above 0\n",
    ),
    (
        &["train.dropout=1.0"],
        "exit 2\n\
         error: `--set train.dropout=1.0`: [train] `dropout` = 1 is not at least 0 and below 1\n",
    ),
    (
        &["train.bias=false"],
        "exit 2\n\
         error: `--set train.bias=false`: [train] one of its names, in quotes, is expected\n",
    ),
    (
        &["train.quant_type=nf4"],
        "exit 2\n\
         error: `--set train.quant_type=nf4`: [train] `quant_type` needs `method = \"qlora\"`\n",
    ),
    (
        &["train.lora_init=loftq"],
        "exit 2\n\
         error: `--set train.lora_init=loftq`: [train] `lora_init` = \"loftq\" needs `method = \"qlora\"`\n",
    ),
    (
        &["train.method=full", "train.dora=true"],
        "exit 2\n\
         error: `--set train.dora=true`: [train] `dora` needs `method = \"lora\"`\n",
    ),
    (
        &["train.lora_init=pissa", "train.adapter_init=x"],
        "exit 2\n\
         error: `--set train.lora_init=pissa`: [train] `lora_init` is of a fresh adapter, and `adapter_init` names one\n\
         hint: leave one of them out\n",
    ),
    (
        &["train.lora_init=pissa", "train.method=qlora"],
        "exit 2\n\
         error: `--set train.lora_init=pissa`: [train] `lora_init` = \"pissa\" takes its part out of the base before that is cut to 4 bits: \
         the adapter would fit no base that there is\n\
         hint: use `lora_init = \"loftq\"`, or `method = \"lora\"`\n",
    ),
    (
        &["train.trainable_tokens=['<|nothing|>']"],
        "exit 2\n\
         error: `--set train.trainable_tokens=['<|nothing|>']`: [train] `trainable_tokens` names \"<|nothing|>\", which is no token\n\
         hint: `hone-fetch tokens` makes a base with new tokens, and rows of the embedding for them\n",
    ),
    (
        &["train.trainable_tokens=[5000]"],
        "exit 2\n\
         error: `--set train.trainable_tokens=[5000]`: [train] token 5000 in `trainable_tokens` lies outside the vocabulary of 2048\n",
    ),
    (
        &["train.trainable_tokens={head=[3]}"],
        "exit 2\n\
         error: `--set train.trainable_tokens={head=[3]}`: [train] a list of tokens, or a table with `embed_tokens` and `lm_head`, is expected\n",
    ),
    (
        &["train.target_modules=3"],
        "exit 2\n\
         error: `--set train.target_modules=3`: [train] a list of names, or an expression in quotes, is expected\n",
    ),
    (
        &["train.target_modules='layers.9.*'"],
        "exit 2\n\
         error: `--set train.target_modules='layers.9.*'`: [train] `layers.9.*` in `target_modules` names no module of the model; near it are q_proj, k_proj, v_proj\n",
    ),
    (
        &["train.modules_to_save=['nrm']"],
        "exit 2\n\
         error: `--set train.modules_to_save=['nrm']`: [train] `nrm` in `modules_to_save` names no module of the model; near it are norm, lm_head, embed_tokens\n",
    ),
    (
        &["train.method=full", "train.freeze=['layers.0.selfattn']"],
        "exit 2\n\
         error: `--set train.freeze=['layers.0.selfattn']`: [train] `freeze` = \"layers.0.selfattn\": it matches no tensor; the nearest are \
         `model.layers.0.self_attn.k_proj.weight`, `model.layers.0.self_attn.o_proj.weight`, \
         `model.layers.0.self_attn.q_proj.weight`\n",
    ),
    (
        &["train.method=full", "train.freeze=['k_proj']"],
        "exit 2\n\
         error: `--set train.freeze=['k_proj']`: [train] `freeze`: `model.layers.0.self_attn.k_proj.weight` cannot be frozen without \
         `model.layers.0.self_attn.q_proj.weight`: both read the same input, as one map\n",
    ),
    (
        &["train.method=full", "train.freeze=['.']"],
        "exit 2\nerror: `--set train.freeze=['.']`: [train] `freeze` leaves nothing to train\n",
    ),
    (
        &["train.groups=[{match='(', lr=1.0}]"],
        "exit 2\n\
         error: p.toml:19: [train] group `match` = \"(\": it is no regular expression: unclosed group\n",
    ),
    (
        &["train.groups=[{match='q_prj', lr=1.0}]"],
        "exit 2\n\
         error: p.toml:19: [train] group `match` = \"q_prj\": it matches no trained tensor; the nearest are \
         `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`, \
         `base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight`, \
         `base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight`\n",
    ),
];

#[test]
fn a_plan_counts_memory_and_finds_settings_that_fit() {
    let place = place();
    let json = |args: &[&str]| -> Value {
        serde_json::from_str(&place.done("train", args).stdout).unwrap()
    };
    let memory = json(&["plan", "--json"])["memory"].clone();
    let part = |name: &str| memory[name].as_u64().unwrap_or_else(|| panic!("no {name}"));
    let sum: u64 = ["weights", "gradients", "optimizer", "activations", "head", "packs", "program"]
        .map(part)
        .iter()
        .sum();
    assert!(part("peak") >= sum, "{memory}");
    assert_eq!(part("optimizer"), 2 * part("gradients"), "AdamW keeps two moments");
    let full = json(&["plan", "--json", "--set", "train.method=full"])["memory"].clone();
    let eight = "train.optimizer={name='adamw8bit', f32_embeddings=false, min_8bit_size=0}";
    let codes = json(&["plan", "--json", "--set", "train.method=full", "--set", eight]);
    let of = |plan: &Value| plan["optimizer"].as_u64().unwrap();
    assert!(of(&full) > 3 * of(&codes["memory"]), "{full} {codes}");

    let budget = (part("peak") - 1).to_string();
    let large = ["plan", "--json", "--set", "train.micro_batch_size=8", "--fit", &budget];
    let fit = json(&large);
    let first = &fit["fitting"][0];
    assert!(first["peak"].as_u64().unwrap() < part("peak"), "{fit}");
    assert_ne!(first["change"][0], Value::Null, "{fit}");
    let none = place.run("train", &["plan", "--fit", "1MiB"]);
    assert_eq!(none.code, Some(1), "{}", none.stderr);
    assert!(!place.tree.path("runs/p/train").exists(), "a plan trains nothing");
}

/// A model that no machine has memory for is refused before its weights are looked at.
#[test]
fn a_model_larger_than_memory_is_refused() {
    let place = place();
    let mut config = place.json("base/config.json");
    for (key, value) in [
        ("hidden_size", 65_536),
        ("intermediate_size", 262_144),
        ("num_hidden_layers", 512),
        ("num_attention_heads", 8192),
    ] {
        config[key] = value.into();
    }
    place.tree.write("base/config.json", config.to_string());
    let output = place.run("train", &[]);
    assert_eq!(output.code, Some(4), "{}", output.stderr);
    for part in ["error: the run would hold ", " GiB: weights ", "`hone-train plan --fit "] {
        assert!(output.stderr.contains(part), "{part}: {}", output.stderr);
    }
    assert!(!place.tree.path("runs/p/train").exists());
}

/// What a run took is said beside what was planned, and is no part of the result.
#[test]
fn a_run_says_what_memory_it_took() {
    let (place, _) = train(&place(), &[]);
    let memory = place.json("runs/p/logs/train/memory.json");
    let (planned, measured) = (memory["peak"].as_u64(), memory["measured"].as_u64());
    assert!(planned.is_some_and(|bytes| bytes > 0) && measured.is_some_and(|bytes| bytes > 0));
    let report = &place.json("runs/p/train/manifest.json")["report"];
    assert_eq!(report["memory_plan"]["weights"], memory["weights"]);
    assert_eq!(report["memory_plan"]["measured"], Value::Null);
}
