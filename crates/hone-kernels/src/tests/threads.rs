//! Every case on pools of 1, 2 and 8 threads: the bytes must be the same.

use crate::Cpu;
use crate::conformance::{Case, all_cases};

/// The bits of all that a case computes on a pool of `n` threads.
fn bits(case: &Case, n: usize) -> Vec<Vec<u32>> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build().expect("threads can be had");
    let outputs = pool.install(|| case.run(&Cpu::new()));
    outputs.iter().map(|o| o.values.iter().map(|x| x.to_bits()).collect()).collect()
}

#[test]
fn bytes_do_not_depend_on_the_number_of_threads() {
    let mut cases = all_cases();
    // Large enough to be cut, along rows and along columns.
    cases.extend([Case::Linear(600, 1152, 576), Case::Linear(8, 20_000, 128)]);
    cases.extend([Case::Linear4Bit(600, 1152, 576), Case::Linear4Bit(8, 10_000, 128)]);
    cases.push(Case::CrossEntropy(300, 5000, 1.0));
    for case in cases {
        let one = bits(&case, 1);
        for n in [2, 8] {
            assert!(bits(&case, n) == one, "{case:?} differs on {n} threads");
        }
    }
}
