//! Training that is killed, stopped or damaged ends with the bytes of one that was not.

use std::time::Instant;

use hone_testkit::Output;
use serde_json::Value;

use crate::fixture::{Files, Place, differing, wait_until};

/// Steps that the fixture trains.
const STEPS: usize = 180;

fn ready() -> Place {
    Place::after(&["ingest", "template", "tokenize"])
}

/// The artefact of a training that nothing happened to.
fn straight(place: &Place) -> Files {
    let place = place.copy();
    let output = place.done("train", &[]);
    assert!(output.stderr.contains(&format!("train: {STEPS} steps, ")), "{}", output.stderr);
    place.artefact("train")
}

/// Starts training, waits for `n_lines` more lines in its live metrics, and sends a signal.
fn stop_after(place: &Place, n_lines: usize, signal: &str) -> Output {
    if checkpoints(place).is_empty() {
        // It will start over; an old log must not be taken for a new one.
        place.tree.remove("runs/p/logs");
    }
    let enough = place.live_lines() + n_lines;
    let mut running = place.start("train", &[]);
    assert!(wait_until(&mut running, || place.live_lines() >= enough), "it ended too early");
    running.signal(signal);
    running.end()
}

/// Runs the same command to its end: same bytes, and nothing left of the first tries.
fn check_end(place: &Place, straight: &Files, says: &[&str]) {
    let output = place.done("train", &[]);
    for text in says {
        assert!(output.stderr.contains(text), "{text:?} is not in {}", output.stderr);
    }
    assert_eq!(differing(straight, &place.artefact("train")), Vec::<String>::new());
    assert_eq!(place.leftovers(), Vec::<String>::new());
    assert!(!place.tree.path("runs/p/train-checkpoints").exists(), "checkpoints stay");
    assert_eq!(place.done("train", &[]).stderr, "train: fresh  runs/p/train\n");
}

#[test]
fn killed_training_goes_on_to_the_same_bytes() {
    let place = ready();
    let straight = straight(&place);
    assert!(straight.len() == 5, "{:?}", straight.keys());
    // Before the first checkpoint, around some, and near the end; then several kills of one run.
    let cases: [&[usize]; 7] = [&[1], &[4], &[6], &[17], &[71], &[131], &[3, 9, 2, 14, 21]];
    for kills in cases {
        let place = place.copy();
        for n_lines in kills {
            let output = stop_after(&place, *n_lines, "KILL");
            assert_eq!(output.code, None, "{}", output.stderr);
            assert!(!place.tree.path("runs/p/train").exists(), "something is half-written");
        }
        check_end(&place, &straight, &[]);
    }
}

#[test]
fn a_stop_is_clean_and_goes_on_to_the_same_bytes() {
    let place = ready();
    let straight = straight(&place);
    for (signal, code) in [("TERM", 143), ("INT", 130)] {
        let place = place.copy();
        for _ in 0..2 {
            let output = stop_after(&place, 13, signal);
            assert_eq!(output.code, Some(code), "{}", output.stderr);
            let said = output.stderr.lines().rev().take(2).collect::<Vec<_>>();
            let hint = "hint: run the same command again to go on from the checkpoint";
            assert_eq!(said[0], hint, "{}", output.stderr);
            assert!(said[1].starts_with("error: stopped after step "), "{}", output.stderr);
        }
        check_end(&place, &straight, &["train: resumes after step "]);
    }
}

/// What is done to a checkpoint, by its directory.
type Spoil = dyn Fn(&Place, &str);

/// Visible checkpoints, oldest first. By their paths alone: a run may be making one meanwhile.
fn checkpoints(place: &Place) -> Vec<String> {
    let is_visible = |path: &String| !path.split('/').any(|part| part.starts_with('.'));
    let of = |path: String| path.strip_suffix("/state.json").map(str::to_owned);
    place.tree.paths("runs").into_iter().filter(is_visible).filter_map(of).collect()
}

#[test]
fn a_damaged_checkpoint_is_passed_over() {
    let place = ready();
    let straight = straight(&place);
    stop_after(&place, 22, "KILL");
    let mut all = checkpoints(&place);
    if all.len() == 3 {
        // Killed between sealing the newest and dropping the oldest, which the next run would drop.
        place.tree.remove(&all.remove(0));
    }
    assert_eq!(all.len(), 2, "{all:?}");
    let spoil: [(&str, &Spoil); 4] = [
        (
            "state.safetensors` was changed after it was sealed: its hash was",
            &flip("state.safetensors"),
        ),
        ("metrics.jsonl` was changed after it was sealed: its hash was", &flip("metrics.jsonl")),
        ("the manifest is not one of hone's", &|place, dir| {
            place.tree.write(&format!("{dir}/manifest.json"), "{}");
        }),
        ("state.json` does not exist", &|place, dir| {
            place.tree.remove(&format!("{dir}/state.json"));
        }),
    ];
    for (says, spoil) in spoil {
        let place = place.copy();
        spoil(&place, &all[1]);
        let older = all[0].rsplit('/').next().unwrap();
        let warning = format!("warning: passing over a checkpoint: `{}", all[1]);
        check_end(&place, &straight, &[&warning, says, &format!("({older})")]);
    }
    // With both lost it starts over.
    for dir in &all {
        flip("state.safetensors")(&place, dir);
    }
    check_end(&place, &straight, &["warning: passing over a checkpoint"]);
}

/// Flips a bit in the middle of a file of a checkpoint.
fn flip(name: &'static str) -> impl Fn(&Place, &str) {
    move |place, dir| place.flip(&format!("{dir}/{name}"))
}

/// Settings with everything that a run can carry from step to step.
const FULL: [&str; 18] = [
    "--set",
    "train.eval_every=30",
    "--set",
    "train.ema_decay=0.9",
    "--set",
    "train.keep_best=true",
    "--set",
    "train.early_stopping={patience = 99, min_delta = 0.01}",
    "--set",
    "train.neftune_alpha=5.0",
    "--set",
    "train.log_layers_every=7",
    "--set",
    "train.sample_every=25",
    "--set",
    "train.sample_tokens=8",
    "--set",
    "train.sample_prompts=2",
];

/// Threads that a run is taken up with, by turns: never those that it was begun with.
const THREADS: [&str; 3] = ["1", "3", "2"];

fn with<'a>(args: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
    [args, more].concat()
}

/// Fewest runs that are killed before their end.
const KILLS_MIN: usize = 20;

#[test]
fn killed_at_any_moment_it_ends_with_the_same_bytes() {
    let place = ready();
    let settings = with(&FULL, &["--set", "train.epochs=10", "--set", "train.checkpoint_every=9"]);
    // When checkpoints are made is no part of what a run is; fewer are quicker.
    let rest = with(&settings, &["--set", "train.checkpoint_every=0", "--threads"]);
    let straight_place = place.copy();
    let start = Instant::now();
    straight_place.done("train", &with(&settings, &["--threads", "2"]));
    // What a run takes: less when nothing else runs here, so that some end before they are killed.
    let mut whole = start.elapsed();
    let straight = straight_place.artefact("train");
    let (mut n_kills, mut n_resumed) = (0, 0);
    for seed in 0..64_u64 {
        if seed >= 24 && n_kills >= KILLS_MIN {
            break;
        }
        let place = place.copy();
        let moment = whole.mul_f64((seed.wrapping_mul(0x9e37_79b9) >> 8 & 0xff) as f64 / 256.0);
        let mut running = place.start("train", &with(&settings, &["--threads", "2"]));
        std::thread::sleep(moment);
        running.signal("KILL");
        if running.end().code.is_none() {
            n_kills += 1;
        } else {
            whole = whole.mul_f64(0.8);
        }
        n_resumed += usize::from(!checkpoints(&place).is_empty());
        let threads = THREADS[seed as usize % 3];
        place.done("train", &with(&rest, &[threads]));
        let found = differing(&straight, &place.artefact("train"));
        assert_eq!(found, Vec::<String>::new(), "seed {seed}, after {moment:?}");
        assert_eq!(place.leftovers(), Vec::<String>::new());
    }
    assert!(n_kills >= KILLS_MIN, "only {n_kills} runs were killed before their end");
    assert!(n_resumed >= 5, "only {n_resumed} runs had got as far as a checkpoint");
}

#[test]
fn killed_at_every_checkpoint_it_ends_with_the_same_bytes() {
    let place = ready();
    let every = with(&FULL, &["--set", "train.checkpoint_every=9"]);
    let rest = with(&FULL, &["--set", "train.checkpoint_every=0", "--threads"]);
    let straight_place = place.copy();
    straight_place.done("train", &with(&rest, &["2"]));
    let straight = straight_place.artefact("train");
    // A run that keeps all of them, stopped before its end: what lies there up to any one of them is what a kill behind it leaves.
    let all = with(&every, &["--threads", "2", "--set", "train.keep_checkpoints=99"]);
    let mut running = place.start("train", &all);
    let last = place.tree.path("runs/p/train-checkpoints/step-000000171");
    assert!(wait_until(&mut running, || last.exists()), "it ended too early");
    running.signal("KILL");
    running.end();
    let dirs = checkpoints(&place);
    assert!(dirs.len() >= STEPS / 9 - 1, "{dirs:?}");
    for n in 0..dirs.len() {
        let place = place.copy();
        dirs[n + 1..].iter().for_each(|dir| place.tree.remove(dir));
        let threads = THREADS[n % 3];
        let output = place.done("train", &with(&rest, &[threads]));
        let says = format!("({})", dirs[n].rsplit('/').next().unwrap());
        assert!(output.stderr.contains(&says), "{says}: {}", output.stderr);
        assert_eq!(differing(&straight, &place.artefact("train")), Vec::<String>::new(), "{n}");
        assert!(!place.tree.path("runs/p/train-checkpoints").exists(), "checkpoints stay");
    }
}

#[test]
fn a_checkpoint_is_made_when_it_is_asked_for() {
    let place = ready();
    let straight = straight(&place);
    let place = place.copy();
    let mut running = place.start("train", &["--set", "train.checkpoint_every=0"]);
    assert!(wait_until(&mut running, || place.live_lines() >= 3), "it ended too early");
    running.signal("USR1");
    let is_there = || !checkpoints(&place).is_empty();
    assert!(wait_until(&mut running, is_there), "no checkpoint was made");
    let output = running.end();
    assert_eq!(output.code, Some(0), "{}", output.stderr);
    assert!(output.stderr.contains("train: checkpoint after step "), "{}", output.stderr);
    // When checkpoints are made is no part of what a run is.
    assert_eq!(differing(&straight, &place.artefact("train")), Vec::<String>::new());
}

fn last_step(place: &Place) -> u64 {
    checkpoints(place).last().unwrap().rsplit('-').next().unwrap().parse().unwrap()
}

#[test]
fn a_checkpoint_of_other_settings_is_refused_by_name_gone_on_from_or_dropped() {
    let place = ready();
    stop_after(&place, 23, "TERM");
    let before = place.visible();
    let step = last_step(&place);
    let other = ["--set", "train.lr=5e-3"];
    let output = place.run("train", &other);
    assert_eq!(output.code, Some(2), "{}", output.stderr);
    let name = format!("runs/p/train-checkpoints/step-{step:09}");
    let says = format!(
        "error: {name} is of a run with other settings: `lr` was 0.01 and is 0.005\n\
         hint: set it back to go on exactly; `--reset-optimizer` goes on from its weights with fresh \
         moments, `--restart` drops it and starts at step 0\n"
    );
    assert!(output.stderr.ends_with(&says), "{}", output.stderr);
    assert_eq!(differing(&before, &place.visible()), Vec::<String>::new());

    // Started over: as if nothing had been there.
    let fresh = ready();
    fresh.done("train", &other);
    let again = place.copy();
    again.done("train", &with(&other, &["--restart"]));
    assert_eq!(differing(&fresh.artefact("train"), &again.artefact("train")), Vec::<String>::new());

    // Not gone on from where the weights belong to a base with a part taken out.
    let pissa = ["--set", "train.lora_init=pissa", "--reset-optimizer"];
    let output = place.copy().run("train", &pissa);
    assert_eq!(output.code, Some(2), "{}", output.stderr);
    let says = format!(
        "error: {name} belongs to another base: `lora_init` was not given and is \"pissa\"\n\
         hint: set `lora_init` back, or start at step 0 with `--restart`\n"
    );
    assert!(output.stderr.ends_with(&says), "{}", output.stderr);

    // Gone on from, in one go and killed on the way, with the flag or without it.
    let reset = with(&other, &["--reset-optimizer"]);
    let straight = place.copy();
    let output = straight.done("train", &reset);
    let says = format!(
        "train: goes on after step {step} from the weights of step-{step:09}, with fresh moments: \
         `lr` was 0.01 and is 0.005\n"
    );
    assert!(output.stderr.contains(&says), "{}", output.stderr);
    let n_lines = place.live_lines() + 8;
    let mut running = place.start("train", &reset);
    assert!(wait_until(&mut running, || place.live_lines() >= n_lines), "it ended too early");
    running.signal("KILL");
    running.end();
    let kept = place.copy();
    place.done("train", &other);
    kept.done("train", &reset);
    for place in [&place, &kept] {
        let found = differing(&straight.artefact("train"), &place.artefact("train"));
        assert_eq!(found, Vec::<String>::new());
        assert_eq!(place.done("train", &other).stderr, "train: fresh  runs/p/train\n");
    }
    let record =
        String::from_utf8(straight.artefact("train")["runs/p/train/metrics.jsonl"].clone());
    let record = record.unwrap();
    let steps = record.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let steps: Vec<u64> = steps
        .filter(|line| line.get("loss").is_some())
        .map(|line| line["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, (1..=STEPS as u64).collect::<Vec<_>>());
    // The weights differ from those of a run that had this rate from the start.
    let name = "runs/p/train/adapter_model.safetensors";
    assert_ne!(straight.artefact("train")[name], fresh.artefact("train")[name]);
}

#[test]
fn best_weights_that_are_damaged_take_their_checkpoint_with_them() {
    let place = ready();
    let best = ["--set", "train.keep_best=true"];
    let untouched = place.copy();
    untouched.done("train", &best);
    let mut running = place.start("train", &best);
    let later = place.tree.path("runs/p/train-checkpoints/step-000000035");
    assert!(wait_until(&mut running, || later.exists()), "it ended too early");
    running.signal("KILL");
    running.end();
    let files = place.visible().into_keys();
    let weights: Vec<String> =
        files.filter(|f| f.contains("/best-") && f.ends_with("state.safetensors")).collect();
    assert!(!weights.is_empty());
    weights.iter().for_each(|file| place.flip(file));
    let output = place.done("train", &best);
    assert!(output.stderr.contains("warning: passing over a checkpoint: "), "{}", output.stderr);
    let found = differing(&untouched.artefact("train"), &place.artefact("train"));
    assert_eq!(found, Vec::<String>::new());
}
