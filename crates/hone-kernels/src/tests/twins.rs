//! Every case through the fast backend, at every instruction set, against the plain twin.

use super::cases::{self, Output};
use crate::{Cpu, Reference};

/// Largest difference relative to the largest magnitude wanted; infinite where one is not a number
/// alone.
pub(super) fn error(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let top = want.iter().filter(|x| x.is_finite()).fold(f32::MIN_POSITIVE, |a, x| a.max(x.abs()));
    let pairs = got.iter().zip(want);
    pairs.fold(0.0, |worst: f32, (&g, &w)| {
        let same = g == w || (g.is_nan() && w.is_nan());
        let far = if same { 0.0 } else { (g - w).abs() / top };
        worst.max(if far.is_nan() { f32::INFINITY } else { far })
    })
}

#[test]
fn cpu_matches_its_plain_twin() {
    let mut worst = std::collections::BTreeMap::new();
    let mut faults = Vec::new();
    let cases = cases::all();
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
