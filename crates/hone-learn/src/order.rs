//! The order of rows in an epoch.

use hone_kernels::rng;

/// The indexes 0 to `n` - 1 in an order that is a function of `seed` and `epoch` alone: sorted by a
/// random key of each index.
///
/// No state is carried from epoch to epoch, so a resumed run finds its place by counting.
pub fn shuffle(n: usize, seed: u64, epoch: u64) -> Vec<usize> {
    let stream = rng::mix(seed, epoch);
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by_key(|&idx| (rng::mix(stream, idx as u64), idx));
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_is_a_permutation_of_its_own() {
        let epochs: Vec<Vec<usize>> = (0..3).map(|epoch| shuffle(1000, 5, epoch)).collect();
        for order in &epochs {
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..1000).collect::<Vec<_>>());
        }
        assert!(epochs[0] != epochs[1] && epochs[1] != epochs[2]);
        assert_eq!(epochs[1], shuffle(1000, 5, 1));
        assert_ne!(epochs[1], shuffle(1000, 6, 1));
        assert_eq!(shuffle(0, 1, 1), [0_usize; 0]);
    }
}
