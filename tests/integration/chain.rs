//! The stages one after another: what they hand over, and what is fresh.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::fixture::{PIPELINE, Place, STAGES, differing, rows};

/// The one JSON object that a program prints.
fn object(stdout: &str) -> Value {
    assert_eq!(stdout.lines().count(), 1, "{stdout}");
    serde_json::from_str(stdout).unwrap()
}

#[test]
fn every_stage_is_done_once_and_then_fresh() {
    let place = Place::new();
    let mut reports = Vec::new();
    for stage in STAGES {
        let first = place.done(stage, &["--json"]);
        let report = object(&first.stdout);
        assert_eq!((&report["stage"], &report["status"]), (&stage.into(), &"done".into()));
        assert_eq!(report["dir"], format!("runs/p/{stage}"));
        let manifest = place.json(&format!("runs/p/{stage}/manifest.json"));
        for key in ["key", "files", "ledger"] {
            assert_eq!(report[key], manifest[key], "{stage}: {key}");
        }
        reports.push(report);
    }
    let before = place.visible();
    for (stage, mut report) in STAGES.into_iter().zip(reports) {
        let again = place.done(stage, &["--json"]);
        report["status"] = "fresh".into();
        assert_eq!(object(&again.stdout), report);
        // The last stage shows its table again.
        let (said, rest) = again.stderr.split_once('\n').unwrap();
        assert_eq!(said, format!("{stage}: fresh  runs/p/{stage}"));
        assert!(rest.is_empty() || stage == "eval", "{rest}");
    }
    assert_eq!(differing(&before, &place.visible()), Vec::<String>::new());
    assert_eq!(place.leftovers(), Vec::<String>::new());
}

/// Runs the stages after a change, and compares why each runs again with what is expected;
/// stages not named are fresh.
fn check(place: &Place, args: &[&str], expect: &[(&str, &str)]) {
    let expect: BTreeMap<&str, &str> = expect.iter().copied().collect();
    for stage in STAGES {
        let fresh = format!("{stage}: fresh  runs/p/{stage}\n");
        let said = match expect.get(stage) {
            Some(why) => format!("{stage}: runs because {why}\n"),
            None => fresh.clone(),
        };
        let before = place.visible();
        let why = place.done(stage, &[args, &["--why"]].concat());
        assert_eq!(why.stderr, said, "{stage} {args:?}");
        assert_eq!(
            differing(&before, &place.visible()),
            Vec::<String>::new(),
            "--why does nothing"
        );
        let run = place.done(stage, args);
        assert!(run.stderr.starts_with(&said), "{stage} {args:?}: {}", run.stderr);
    }
}

#[test]
fn a_change_reruns_what_depends_on_it_and_nothing_else() {
    let place = Place::after(&STAGES);
    let input = |role: &str| format!("the input `{role}` changed");
    let (packs, trained) = (input("packs"), input("trained"));
    let (rendered, template) = (input("rendered"), input("template"));
    let train = format!("eval: runs because {}", input("train"));
    let tuned = format!("{}\n{train}", input("tuned"));
    check(
        &place,
        &["--set", "train.lr=5e-3"],
        &[("train", "`lr` was 0.01 and is 0.005"), ("merge", &trained), ("eval", &tuned)],
    );
    check(
        &place,
        &["--set", "train.lr=5e-3", "--set", "merge.dtype=bf16"],
        &[("merge", "`dtype` was \"f32\" and is \"bf16\""), ("eval", &input("tuned"))],
    );
    check(&place, &["--set", "train.lr=5e-3", "--set", "merge.dtype=bf16"], &[]);

    // A longer row changes what is learned: everything from the first stage on.
    place.tree.write("rows.jsonl", rows(41));
    place.tree.write("p.toml", PIPELINE.replace("1e-2", "5e-3").replace("f32", "bf16"));
    let merge = format!("{trained}\nmerge: runs because {packs}\nmerge: runs because {template}");
    check(
        &place,
        &[],
        &[
            ("ingest", &input("source sums")),
            ("template", &input("conversations")),
            ("tokenize", &rendered),
            ("train", &packs),
            ("merge", &merge),
            ("eval", &format!("{packs}\neval: runs because {tuned}")),
        ],
    );
}

#[test]
fn rows_that_come_out_of_a_stage_go_into_the_next() {
    let place = Place::after(&STAGES);
    let mut left: Option<u64> = None;
    for stage in STAGES {
        let manifest = place.json(&format!("runs/p/{stage}/manifest.json"));
        let account = &manifest["ledger"]["sources"]["sums"];
        let (n_in, n_out) = (&account["rows_in"], &account["rows_out"]);
        let (n_in, n_out) = (n_in.as_u64().unwrap(), n_out.as_u64().unwrap());
        let rejected = account["rejected"].as_object().into_iter().flat_map(|r| r.values());
        let n_rejected: u64 = rejected.map(|n| n.as_u64().unwrap()).sum();
        assert_eq!(n_in, n_out + n_rejected, "{stage}");
        assert!(left.is_none_or(|left| left == n_in), "{stage}: {left:?} came, {n_in} are counted");
        left = Some(n_out);
        let expect = match stage {
            "ingest" => (42, 41),
            "template" => (41, 41),
            "tokenize" => (41, 40),
            _ => (40, 40),
        };
        assert_eq!((n_in, n_out), expect, "{stage}");
    }
}

#[test]
fn stderr_is_talk_in_the_form_asked_for() {
    let place = Place::new();
    for stage in STAGES {
        let quiet = place.done(stage, &["--quiet"]);
        assert_eq!((quiet.stdout.as_str(), quiet.stderr.as_str()), ("", ""), "{stage}");
        let lines = place.done(stage, &["--force", "--log-format", "json"]).stderr;
        assert!(lines.lines().count() >= 2, "{stage}: {lines}");
        for line in lines.lines() {
            let line: Value = serde_json::from_str(line).unwrap();
            assert!(line["level"].is_string() && line["message"].is_string(), "{line}");
        }
    }
}
