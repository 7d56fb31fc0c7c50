//! Every case through the fast backend, at every instruction set, against the plain twin.

use crate::conformance::{Output, all_cases, error};
use crate::{Cpu, Reference};

#[test]
fn cpu_matches_its_plain_twin() {
    let mut worst = std::collections::BTreeMap::new();
    let mut faults = Vec::new();
    let cases = all_cases();
    assert!(cases.len() > 200, "{} cases", cases.len());
    for case in cases {
        let want = case.run(&Reference);
        for cpu in Cpu::all_levels() {
            for (Output { name, values, tolerance }, want) in case.run(&cpu).iter().zip(&want) {
                let error = error(values, &want.values);
                if error > *tolerance {
                    faults.push(format!("{cpu:?} {case:?} {name}: {error:e} > {tolerance:e}"));
                }
                let kind = format!("{case:?}").split('(').next().unwrap_or("").to_owned();
                let entry = worst.entry((kind, *name)).or_insert(0.0_f32);
                *entry = entry.max(error);
            }
        }
    }
    assert!(faults.is_empty(), "{}\n{worst:#?}", faults.join("\n"));
}
