//! The number of threads changes no byte.

use crate::fixture::{Place, STAGES, differing, rows};

#[test]
fn one_two_and_eight_threads_give_the_same_bytes() {
    let make = |threads: &str| {
        let place = Place::new();
        // More rows than the stages take at once.
        place.tree.write("rows.jsonl", rows(3000));
        for stage in STAGES {
            place.done(stage, &["--threads", threads, "--set", "train.max_steps=12"]);
        }
        place
    };
    let one = make("1");
    for threads in ["2", "8"] {
        let many = make(threads);
        for stage in STAGES {
            let (one, many) = (one.artefact(stage), many.artefact(stage));
            assert!(one.len() >= 3, "{stage} has {} files", one.len());
            assert_eq!(differing(&one, &many), Vec::<String>::new(), "{threads} threads");
        }
    }
}
