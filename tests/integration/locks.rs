//! One writer at a time, and signals.

use std::time::{Duration, Instant};

use crate::fixture::{Place, rows, wait_until};

/// Settings of a training that does not end by itself while a test lasts.
const LONG: [&str; 2] = ["--set", "train.epochs=100000"];

const DATA_STAGES: [&str; 3] = ["ingest", "template", "tokenize"];

#[test]
fn a_second_writer_is_told_who_the_first_is() {
    let place = Place::after(&DATA_STAGES);
    let mut holder = place.start("train", &LONG);
    assert!(wait_until(&mut holder, || place.live_lines() > 3));

    for args in [&LONG[..], &[], &["--force"]] {
        let start = Instant::now();
        let second = place.run("train", args);
        assert_eq!(second.code, Some(4), "{}", second.stderr);
        let expect = format!(
            "train: runs because there is no sealed output yet\n\
             error: `runs/p/train` is being written by process {}\n\
             hint: wait for it, or stop it\n",
            holder.pid()
        );
        assert_eq!(second.stderr, expect);
        assert!(start.elapsed() < Duration::from_secs(10), "it waited for the lock");
    }
    // Elsewhere there is no lock.
    place.done("train", &["--set", "train.max_steps=2", "--runs", "runs", "--out", "other/train"]);

    holder.signal("KILL");
    assert_eq!(holder.end().code, None);
    // It has left a checkpoint, of other settings.
    place.done("train", &["--set", "train.max_steps=2", "--restart"]);
    assert_eq!(place.leftovers(), Vec::<String>::new());
}

#[test]
fn eight_processes_have_one_winner() {
    let place = Place::after(&DATA_STAGES);
    let before = place.visible();
    let mut all: Vec<_> = (0..8).map(|_| place.start("train", &LONG)).collect();
    let first = Instant::now();
    // Seven end by themselves; the one that does not holds the lock.
    while all.iter_mut().filter_map(|one| one.is_running().then_some(())).count() > 1 {
        assert!(first.elapsed() < Duration::from_secs(60), "two hold the lock");
        std::thread::sleep(Duration::from_millis(5));
    }
    let (mut winner, mut losers) = (None, Vec::new());
    for mut one in all {
        if one.is_running() { winner = Some(one) } else { losers.push(one.end()) }
    }
    let mut winner = winner.expect("one is left");
    assert_eq!(losers.len(), 7);
    for loser in losers {
        assert_eq!(loser.code, Some(4));
        let named = format!("is being written by process {}\n", winner.pid());
        assert!(loser.stderr.contains(&named), "{}", loser.stderr);
    }
    winner.signal("KILL");
    winner.end();
    let mut after = place.visible();
    after.retain(|path, _| !path.contains("/logs/") && !path.contains("/train-checkpoints/"));
    assert_eq!(after.into_keys().collect::<Vec<_>>(), before.into_keys().collect::<Vec<_>>());
}

/// Stops a stage by a signal while it works: the exit code says which, and nothing is left of it.
fn check(stage: &str, signal: &str, code: i32) {
    let place = Place::new();
    place.tree.write("rows.jsonl", rows(60_000));
    for before in DATA_STAGES.iter().take_while(|s| **s != stage) {
        place.done(before, &[]);
    }
    let before = place.visible();
    let mut running = place.start(stage, &[]);
    // A scratch directory with a file in it says that the work has begun.
    assert!(wait_until(&mut running, || !place.leftovers().is_empty()), "{stage} was too fast");
    running.signal(signal);
    let output = running.end();
    assert_eq!(output.code, Some(code), "{stage}: {}", output.stderr);
    assert!(output.stderr.ends_with("error: stopped\n"), "{stage}: {}", output.stderr);
    assert_eq!(place.visible(), before, "{stage}");
    assert_eq!(place.leftovers(), Vec::<String>::new(), "{stage}");
}

#[test]
fn a_signal_stops_a_data_stage_cleanly() {
    check("ingest", "INT", 130);
    check("template", "TERM", 143);
    check("template", "INT", 130);
}
