//! What `hone-train plan` says before a run is what the run's own record says after it.

use serde_json::Value;

use crate::fixture::Place;

#[test]
fn every_step_of_a_run_is_the_planned_one() {
    for settings in [
        &["--set", "train.max_steps=25"][..],
        &["--set", "train.epochs=2", "--set", "train.shuffle=batches"],
    ] {
        let place = Place::after(&["ingest", "template", "tokenize"]);
        let args = [&["plan", "--json", "--steps", "0"], settings].concat();
        let plan: Value = serde_json::from_str(&place.done("train", &args).stdout).unwrap();
        let steps = plan["steps"].as_array().unwrap();
        assert_eq!(plan["n_steps"], steps.len());
        assert!(steps.len() > 10, "{} steps", steps.len());
        assert!(!place.tree.path("runs/p/train").exists(), "a plan trains nothing");

        place.done("train", settings);
        let record = place.artefact("train");
        let metrics = String::from_utf8(record["runs/p/train/metrics.jsonl"].clone()).unwrap();
        let lines = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let lines: Vec<Value> = lines.filter(|line| line.get("loss").is_some()).collect();
        assert_eq!(lines.len(), steps.len());
        let mut tokens = 0;
        for (idx, (line, step)) in lines.iter().zip(steps).enumerate() {
            tokens += step["tokens"].as_u64().unwrap();
            assert_eq!(line["step"], idx + 1);
            assert_eq!(line["num_tokens"], tokens);
            assert_eq!(line["num_trained_tokens"], step["trained_tokens"]);
            assert_eq!(line["learning_rate"], step["learning_rate"]);
        }
        assert_eq!(plan["tokens"], tokens);
        assert!(record["runs/p/train/plan.parquet"].starts_with(b"PAR1"));
    }
}

#[test]
fn a_plan_is_read_by_people_too() {
    let place = Place::after(&["ingest", "template", "tokenize"]);
    let output = place.done("train", &["plan", "--steps", "3"]);
    assert!(
        output.stdout.starts_with("180 steps, 9 an epoch (20.00 epochs) over "),
        "{}",
        output.stdout
    );
    // Three lines, a blank one, the memory by purpose, another blank one, and the steps below their heads.
    let lines: Vec<&str> = output.stdout.lines().collect();
    assert_eq!(lines.len(), 3 + 1 + 11 + 1 + 1 + 3, "{}", output.stdout);
    assert!(lines[4].trim_start().starts_with("weights "), "{}", output.stdout);
    assert!(lines[14].trim_start().starts_with("peak "), "{}", output.stdout);
}
