//! The arithmetic of `hone-eval`: what is measured in bf16 is near what is measured in f32, and the record says which it was.

use serde_json::Value;

use crate::fixture::{PIPELINE, Place, STAGES, differing};

/// Largest distance of a loss in bf16 from that in f32, of itself: 2^-9, by which rounding one factor may be off. With seeds 1 to 8 it
/// was 1.4e-5 to 3.5e-4 for both models.
const APART_MAX: f64 = 1.0 / 512.0;

const BF16: [&str; 2] = ["--set", "eval.compute=bf16"];

fn results(place: &Place) -> Value {
    place.json("runs/p/eval/results.json")
}

#[test]
fn eval_in_bf16_measures_nearly_what_it_does_in_f32() {
    let place = Place::new();
    // The embedding is f32 in the file of the base, and bf16 in that of the tuned model.
    place.tree.write("p.toml", PIPELINE.replace("\"f32\"", "\"bf16\""));
    for stage in STAGES {
        place.done(stage, &[]);
    }
    let exact = results(&place);
    assert_eq!(exact["compute"], "f32");
    let same = place.done("eval", &["--set", "eval.compute=f32"]);
    assert!(same.stderr.starts_with("eval: fresh"), "{}", same.stderr);
    let why = place.done("eval", &[&BF16[..], &["--why"]].concat());
    assert_eq!(why.stderr, "eval: runs because `compute` was not given and is \"bf16\"\n");

    place.done("eval", &[&BF16[..], &["--threads", "1"]].concat());
    let rounded = results(&place);
    assert_eq!(rounded["compute"], "bf16");
    for model in ["base", "tuned"] {
        let of = |results: &Value| results[model]["test_loss"].as_f64().unwrap();
        let apart = (of(&rounded) / of(&exact) - 1.0).abs();
        assert!(0.0 < apart && apart < APART_MAX, "{model}: {apart:e} of {}", of(&exact));
        assert_eq!(rounded[model]["n_prompts"], exact[model]["n_prompts"]);
        assert!(rounded[model]["mean_new_tokens"].as_f64().unwrap() >= 1.0, "{rounded}");
    }
    let page = String::from_utf8(place.artefact("eval")["runs/p/eval/report.html"].clone());
    assert!(page.unwrap().contains("in bf16, sums in f32"));

    let files = place.artefact("eval");
    place.done("eval", &[&BF16[..], &["--force", "--threads", "3"]].concat());
    assert_eq!(differing(&files, &place.artefact("eval")), Vec::<String>::new());
}
