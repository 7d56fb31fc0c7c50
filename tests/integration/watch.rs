//! What people watch while a model is trained, and what ends a training before its last step.

use serde_json::Value;

use crate::fixture::{PIPELINE, Place, rows};

fn ready() -> Place {
    Place::after(&["ingest", "template", "tokenize"])
}

/// The lines of the sealed record that have a key.
fn lines(place: &Place, key: &str) -> Vec<Value> {
    let record = place.artefact("train")["runs/p/train/metrics.jsonl"].clone();
    let record = String::from_utf8(record).unwrap();
    let lines = record.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|line| line.get(key).is_some()).collect()
}

fn report(place: &Place) -> Value {
    place.json("runs/p/train/manifest.json")["report"].clone()
}

#[test]
fn a_run_whose_held_out_loss_gets_no_better_ends_with_its_best_weights() {
    let place = ready();
    let early = "train.early_stopping={patience = 2, min_delta = 0.05}";
    // Long enough at this rate that it learns forty sums by heart.
    let args = ["--set", early, "--set", "train.epochs=60"];
    let output = place.done("train", &args);
    let evaluations = lines(&place, "eval_loss");
    let loss = |line: &Value| line["eval_loss"].as_f64().unwrap();
    let best = evaluations.iter().min_by(|a, b| loss(a).total_cmp(&loss(b))).unwrap();
    let report = report(&place);
    assert_eq!(report["stopped_early"], true, "{evaluations:?}");
    assert_eq!(report["best"]["step"], best["step"]);
    // What is left was evaluated again, and is what it was.
    assert!((report["eval"]["loss"].as_f64().unwrap() - loss(best)).abs() < 1e-12);
    let n = report["n_steps"].as_u64().unwrap();
    assert!(output.stderr.contains(&format!("train: ends after step {n} of 540")));
    // The same weights as those of a run that is told to keep its best, and has no more steps.
    let other = ready();
    let until = format!("train.max_steps={n}");
    other.done(
        "train",
        &["--set", "train.keep_best=true", "--set", &until, "--set", "train.schedule=constant"],
    );
    let constant = ready();
    constant.done("train", &[&args[..], &["--set", "train.schedule=constant"]].concat());
    if self::report(&constant)["n_steps"] == n {
        let name = "runs/p/train/adapter_model.safetensors";
        assert_eq!(other.artefact("train")[name], constant.artefact("train")[name]);
    }
}

/// Trains, which must go wrong: exit 1, nothing sealed, checkpoints kept; returns what was said.
fn goes_wrong(settings: &[&str]) -> (Place, String) {
    let place = ready();
    let output = place.run("train", settings);
    assert_eq!(output.code, Some(1), "{}", output.stderr);
    assert!(!place.tree.path("runs/p/train").exists());
    assert!(output.stderr.contains("\nhint: "), "{}", output.stderr);
    (place, output.stderr)
}

#[test]
fn a_training_that_goes_wrong_is_ended() {
    let check = |settings: &[&str], says: &str, keeps: bool| {
        let (place, said) = goes_wrong(settings);
        assert!(said.contains(says), "{says:?} is not in {said}");
        assert_eq!(said.contains(" is kept: "), keeps, "{said}");
        assert_eq!(place.tree.path("runs/p/train-checkpoints").exists(), keeps);
    };
    // Not a number, in the second step and after a checkpoint.
    check(
        &["--set", "train.lr=1e38"],
        "error: step 2: the loss is NaN\nhint: lower `train.lr`",
        false,
    );
    let late = ["train.lr=1e38", "train.warmup_steps=40", "train.checkpoint_every=1"];
    let late: Vec<&str> = late.iter().flat_map(|set| ["--set", set]).collect();
    check(&late, " is NaN\nhint: the checkpoint after step ", true);
    // Without dropout and with every pack in every step, a rate of nothing gives the same loss for ever.
    let dead = [
        "train.lr=1e-30",
        "train.dropout=0",
        "train.batch_size=64",
        "train.shuffle=none",
        "train.epochs=60",
    ];
    let dead: Vec<&str> = dead.iter().flat_map(|set| ["--set", set]).collect();
    check(&dead, "the same loss for 20 steps in a row", true);
    // Learns while the rate is low, and unlearns when it has risen.
    let spikes = [
        "train.lr=0.3",
        "train.warmup_steps=180",
        "train.dropout=0",
        "train.watchdog={spike = 1.15, window = 40, spikes = 2}",
    ];
    let spikes: Vec<&str> = spikes.iter().flat_map(|set| ["--set", set]).collect();
    check(&spikes, "steps in a row above", true);
}

#[test]
fn watching_that_makes_no_sense_is_refused() {
    let place = ready();
    let check = |set: &str, says: &str| {
        let output = place.run("train", &["--set", set]);
        assert_eq!(output.code, Some(2), "{set}: {}", output.stderr);
        assert!(output.stderr.contains(says), "{set}: {}", output.stderr);
    };
    check("train.keep_checkpoints=0", "`keep_checkpoints` is at least 1");
    check("train.early_stopping={patience = 0}", "`early_stopping.patience` is at least 1");
    check("train.early_stopping={patience = 1, min_delta = -1.0}", "`early_stopping.min_delta`");
    check("train.early_stopping={patienc = 1}", "patienc");
    check("train.watchdog={spike = 0.5}", "`watchdog.spike` is above 1, or 0 for none");
    check("train.watchdog={window = 3}", "`watchdog.window` is at least 10");
    check("train.watchdog={spikes = 0}", "`watchdog.spikes` is at least 1");
    check("train.sample_tokens=0", "`sample_tokens` are at least 1");
    // No held-out rows.
    let place = Place::new();
    place.tree.write("p.toml", PIPELINE.replace("eval_share = 0.1", "eval_share = 0.0"));
    for stage in ["ingest", "template", "tokenize"] {
        place.done(stage, &[]);
    }
    let output = place.run("train", &["--set", "train.keep_best=true"]);
    assert_eq!(output.code, Some(2), "{}", output.stderr);
    assert!(output.stderr.contains("go by the held-out split, and it is empty"));
    let output = place.run("train", &["--set", "train.sample_every=5"]);
    assert_eq!(output.code, Some(3), "{}", output.stderr);
    assert!(output.stderr.contains("there is no held-out prompt to make samples from"));
}

#[test]
fn losses_are_told_apart_by_source_and_gradients_by_layer() {
    let place = Place::new();
    let two = "\n[[ingest.source]]\nname = \"more\"\npath = \"more.jsonl\"\n\n[template]";
    place.tree.write("p.toml", PIPELINE.replacen("\n[template]", two, 1));
    place.tree.write("more.jsonl", rows(30).replace("What is", "How much is"));
    for stage in ["ingest", "template", "tokenize"] {
        place.done(stage, &[]);
    }
    let sets = [
        "train.max_steps=12",
        "train.batch_size=16",
        "train.log_layers_every=4",
        "train.sample_every=6",
        "train.sample_tokens=4",
    ];
    let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
    place.done("train", &sets);

    let steps = lines(&place, "loss");
    assert_eq!(steps.len(), 12);
    for line in &steps {
        let of = |name: &str| line["losses"][name].as_f64().unwrap();
        let (low, high) = (of("sums").min(of("more")), of("sums").max(of("more")));
        let loss = line["loss"].as_f64().unwrap();
        assert!(low - 1e-6 <= loss && loss <= high + 1e-6, "{line}");
    }
    let evaluations = lines(&place, "eval_loss");
    assert!(evaluations.iter().all(|line| line["eval_losses"]["sums"].is_f64()), "{evaluations:?}");
    assert!(evaluations.iter().all(|line| line["eval_losses"]["more"].is_f64()), "{evaluations:?}");

    let layers = lines(&place, "grad_norms");
    assert_eq!(layers.iter().map(|line| &line["step"]).collect::<Vec<_>>(), [4, 8, 12]);
    for line in &layers {
        let parts = line["grad_norms"].as_object().unwrap();
        assert_eq!(parts.keys().collect::<Vec<_>>(), ["layer_000", "layer_001"]);
        let squares: f64 = parts.values().map(|norm| norm.as_f64().unwrap().powi(2)).sum();
        let step = steps.iter().find(|step| step["step"] == line["step"]).unwrap();
        let whole = step["grad_norm"].as_f64().unwrap();
        assert!((squares.sqrt() - whole).abs() < 1e-6 * whole, "{line} {whole}");
    }

    let samples = lines(&place, "samples");
    assert_eq!(samples.iter().map(|line| &line["step"]).collect::<Vec<_>>(), [6, 12]);
    for sample in samples.iter().flat_map(|line| line["samples"].as_array().unwrap()) {
        assert!(
            sample["answer"].is_string()
                && sample["reference"].as_str().unwrap().starts_with("It is")
        );
    }

    let events = place.tree.files("runs/p/logs/train").into_iter();
    let (_, events) = events.into_iter().find(|(name, _)| name.contains("tfevents")).unwrap();
    let text = String::from_utf8_lossy(&events);
    for tag in [
        "train/loss",
        "train/grad_norm",
        "train/learning_rate",
        "train/epoch",
        "train/sums/loss",
        "train/grad_norm/layer_001",
        "eval/loss",
        "eval/more/loss",
        "samples/",
    ] {
        assert!(text.contains(tag), "no {tag}");
    }
}

#[test]
fn the_self_test_of_a_run_passes_and_writes_nothing() {
    let place = ready();
    let before = place.visible();
    let methods: [&[&str]; 2] = [&[], &["--set", "train.method=full", "--set", "train.lr=1e-3"]];
    for settings in methods {
        let output = place.done("train", &[&["selftest", "--json"], settings].concat());
        let found: Value = serde_json::from_str(&output.stdout).unwrap();
        assert_eq!(found["passed"], true);
        let checks = found["checks"].as_array().unwrap();
        assert_eq!(checks.len(), 5, "{found}");
        let text = place.done("train", &[&["selftest"], settings].concat()).stdout;
        assert_eq!(text.lines().filter(|line| line.contains("  ok   ")).count(), 5, "{text}");
    }
    assert!(crate::fixture::differing(&before, &place.visible()).is_empty());
    assert_eq!(place.leftovers(), Vec::<String>::new());
}
