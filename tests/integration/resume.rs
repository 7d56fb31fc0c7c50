//! Training that is killed, stopped or damaged ends with the bytes of one that was not.

use hone_testkit::Output;

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

/// Visible checkpoints, oldest first.
fn checkpoints(place: &Place) -> Vec<String> {
    let files = place.visible().into_keys();
    let of = |path: String| path.strip_suffix("/state.safetensors").map(str::to_owned);
    files.filter_map(of).collect()
}

#[test]
fn a_damaged_checkpoint_is_passed_over() {
    let place = ready();
    let straight = straight(&place);
    stop_after(&place, 22, "KILL");
    let all = checkpoints(&place);
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
