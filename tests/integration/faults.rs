//! A process killed at any of its changes to the file system, and a disk that is full at any of its
//! writes. Needs `strace`, which injects both; without it these tests say that they were skipped.

use std::process::Command;

use hone_testkit::Output;

use crate::fixture::{Files, Place, STAGES, differing};

/// System calls that change files or make the changes durable.
const CHANGES: &str = "write,pwrite64,ftruncate,fsync,flock,mkdir,renameat2,unlink,unlinkat,rmdir";

/// System calls that a full disk refuses.
const WRITES: &str = "write,pwrite64,fsync";

/// Whether this machine can inject faults; says so when it cannot.
#[allow(clippy::print_stderr, reason = "a skipped test says so")]
fn can_inject() -> bool {
    let works = Command::new("strace").args(["-qq", "-o", "/dev/null", "true"]).output();
    let works = works.is_ok_and(|output| output.status.success());
    if !works {
        eprintln!("skipped: `strace` is not installed, or may not trace here");
    }
    works
}

/// Runs a stage under strace on one thread, so that its calls come in the same order every time.
fn traced(place: &Place, stage: &str, args: &[&str], flags: &[&str]) -> Output {
    let stage = place.command(stage, &[&["--threads", "1"], args].concat());
    let mut command = Command::new("strace");
    command.args(["-qq", "-o", "trace.txt"]).args(flags).arg("--").arg(stage.get_program());
    command.args(stage.get_args()).current_dir(place.tree.path(""));
    command.env("POLARS_MAX_THREADS", "1");
    place.tree.output(command)
}

/// Names of the calls that a run makes, in order.
fn calls(place: &Place, stage: &str, args: &[&str], set: &str) -> Vec<String> {
    let output = traced(place, stage, args, &["-e", &format!("trace={set}")]);
    assert_eq!(output.code, Some(0), "{}", output.stderr);
    let trace = std::fs::read_to_string(place.tree.path("trace.txt")).unwrap();
    let name = |line: &str| line.split_once('(').map(|(name, _)| name.to_owned());
    trace.lines().filter_map(name).collect()
}

/// The numbers of the calls to spoil: by the name of the call, as strace counts them.
fn points(calls: &[String]) -> Vec<(String, usize)> {
    let mut points = Vec::new();
    for (idx, name) in calls.iter().enumerate() {
        let nth = calls[..=idx].iter().filter(|other| *other == name).count();
        points.push((name.clone(), nth));
    }
    points
}

struct Case {
    stage: &'static str,
    /// Stages run before.
    before: &'static [&'static str],
    /// Settings of the output that lies there already, if one does.
    old: Option<&'static str>,
}

/// Over nothing and over an older output by turns: that is the store's business, not the stage's.
const CASES: [Case; 5] = [
    Case { stage: "ingest", before: &[], old: None },
    Case { stage: "template", before: &["ingest"], old: Some("template.template=plain") },
    Case { stage: "tokenize", before: &["ingest", "template"], old: None },
    Case { stage: "merge", before: STAGES.split_at(4).0, old: Some("merge.dtype=bf16") },
    Case { stage: "eval", before: STAGES.split_at(5).0, old: None },
];

impl Case {
    /// The place before the run that is spoilt, and the outputs that may be seen after it: none
    /// or the old one, and the new one.
    fn ready(&self) -> (Place, Files, Files) {
        let place = Place::after(self.before);
        if let Some(set) = self.old {
            place.done(self.stage, &["--set", set]);
        }
        let undisturbed = place.copy();
        undisturbed.done(self.stage, &["--threads", "1"]);
        let (old, new) = (place.artefact(self.stage), undisturbed.artefact(self.stage));
        (place, old, new)
    }

    /// Runs the same command again: the new output, and nothing else.
    fn check_rerun(&self, place: &Place, new: &Files, point: &str) {
        place.done(self.stage, &["--threads", "1"]);
        assert_eq!(differing(&place.artefact(self.stage), new), Vec::<String>::new(), "{point}");
        assert_eq!(place.leftovers(), Vec::<String>::new(), "{} {point}", self.stage);
    }
}

#[test]
fn killed_at_any_change_the_next_run_gives_the_same_bytes() {
    if !can_inject() {
        return;
    }
    let mut n_points = 0;
    for case in &CASES {
        let (place, old, new) = case.ready();
        let calls = calls(&place.copy(), case.stage, &[], CHANGES);
        for (name, nth) in points(&calls) {
            n_points += 1;
            let point = format!("{name} {nth}");
            let place = place.copy();
            let inject = format!("inject={name}:signal=KILL:when={nth}");
            let output = traced(&place, case.stage, &[], &["-e", &inject]);
            assert_eq!(output.code, None, "{} {point}: {}", case.stage, output.stderr);
            let seen = place.artefact(case.stage);
            let whole = differing(&seen, &old).is_empty() || differing(&seen, &new).is_empty();
            assert!(whole, "{} {point}: something is half-written", case.stage);
            case.check_rerun(&place, &new, &point);
        }
    }
    assert!(n_points >= 100, "only {n_points} points were tried");
}

#[test]
fn on_a_full_disk_the_old_output_stays_and_the_exit_code_is_4() {
    if !can_inject() {
        return;
    }
    let mut n_refused = 0;
    for case in &CASES {
        let (place, old, new) = case.ready();
        let calls = calls(&place.copy(), case.stage, &[], WRITES);
        for (name, nth) in points(&calls) {
            let point = format!("{name} {nth}");
            let place = place.copy();
            let inject = format!("inject={name}:error=ENOSPC:when={nth}");
            let output = traced(&place, case.stage, &[], &["-e", &inject]);
            if output.code == Some(0) {
                // It was a line to people that could not be written: no reason to stop.
                assert_eq!(name, "write", "{} {point}", case.stage);
                continue;
            }
            n_refused += 1;
            assert_eq!(output.code, Some(4), "{} {point}: {}", case.stage, output.stderr);
            let says =
                ["error: cannot ", "`runs/p", "No space left on device", "hint: free some space"];
            for text in says {
                assert!(output.stderr.contains(text), "{} {point}: {}", case.stage, output.stderr);
            }
            let seen = place.artefact(case.stage);
            let is_old = differing(&seen, &old).is_empty();
            // The last sync comes after the new output is in its place.
            assert!(is_old || name == "fsync" && differing(&seen, &new).is_empty(), "{point}");
            case.check_rerun(&place, &new, &point);
        }
    }
    assert!(n_refused >= 30, "only {n_refused} writes were refused");
}

#[test]
fn a_disk_that_fills_up_in_the_middle_of_a_table_is_no_fault_of_the_table() {
    if !can_inject() {
        return;
    }
    let place = Place::new();
    // Larger than what is held back before it is written.
    let row = |i: u64| {
        let noise: String =
            (0..8).map(|n| format!("{:x}", (i + n).wrapping_mul(0x9e37_79b9_7f4a_7c15))).collect();
        format!("{{\"instruction\": \"What is {i}?\", \"output\": \"{noise}\"}}\n")
    };
    place.tree.write("rows.jsonl", (1..20_000).map(row).collect::<String>());
    let writes = calls(&place.copy(), "ingest", &[], "write").len();
    assert!(writes > 8, "the table was written at once, in {writes} writes");
    let inject = format!("inject=write:error=ENOSPC:when={}", writes / 2);
    let output = traced(&place, "ingest", &[], &["-e", &inject]);
    assert_eq!(output.code, Some(4), "{}", output.stderr);
    let says =
        "/conversations.parquet`: No space left on device (os error 28)\nhint: free some space";
    assert!(output.stderr.contains(says), "{}", output.stderr);
    assert_eq!(place.visible(), Files::new());
    assert_eq!(place.leftovers(), Vec::<String>::new());
}
