//! Random numbers as functions of a seed and a counter.
//!
//! There is no state to save or to hand from thread to thread: value number `index` of the stream
//! `seed` is a pure function of the two, so neither the order of work nor a restart can change it.
//! The mixing is that of SplitMix64 (Steele, Lea and Flood 2014), applied once to the seed and once
//! to the counter.

/// The odd constant closest to 2^64 over the golden ratio: the step of SplitMix64's counter.
const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// Number of distinct values of [`uniform`].
const UNIFORM_STEPS: f64 = (1_u64 << 53) as f64;

/// The finaliser of SplitMix64: a bijection of 64 bits in which every output bit depends on every
/// input bit.
#[inline(always)]
pub(crate) fn finalise(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Where the counter of stream `seed` starts: mixed, so that neighbouring seeds do not give
/// overlapping streams.
#[inline(always)]
pub(crate) fn stream(seed: u64) -> u64 {
    finalise(seed.wrapping_add(GAMMA))
}

/// Value `index` of a stream that starts at `stream(seed)`.
#[inline(always)]
pub(crate) fn draw(stream: u64, index: u64) -> u64 {
    finalise(stream.wrapping_add(index.wrapping_mul(GAMMA)))
}

/// 64 random bits: value `index` of the stream `seed`.
#[inline]
pub fn mix(seed: u64, index: u64) -> u64 {
    draw(stream(seed), index)
}

/// A uniform value in [0, 1), a multiple of 2^-53.
#[inline]
pub fn uniform(seed: u64, index: u64) -> f64 {
    (mix(seed, index) >> 11) as f64 / UNIFORM_STEPS
}

/// A uniform value in [-bound, bound), rounded to f32: value `index` of the stream `seed`.
#[inline]
pub fn noise(seed: u64, index: u64, bound: f64) -> f32 {
    ((2.0 * uniform(seed, index) - 1.0) * bound) as f32
}

/// A value of the standard normal distribution (Box and Muller 1958), from draws `2 index` and `2
/// index + 1`.
pub fn normal(seed: u64, index: u64) -> f64 {
    // One minus a value below one is never zero, so the logarithm is finite.
    let radius = (-2.0 * (1.0 - uniform(seed, index.wrapping_mul(2))).ln()).sqrt();
    let angle = std::f64::consts::TAU * uniform(seed, index.wrapping_mul(2).wrapping_add(1));
    radius * angle.cos()
}

/// The 32-bit limit below which a draw is dropped, for a dropout of probability `p`.
#[inline]
pub(crate) fn drop_below(p: f32) -> u64 {
    (f64::from(p).clamp(0.0, 1.0) * (1_u64 << 32) as f64) as u64
}

/// Whether dropout of probability `p` keeps value `index`: true with probability 1 - p, to within
/// 2^-32.
#[inline]
pub fn keep(seed: u64, index: u64, p: f32) -> bool {
    mix(seed, index) >> 32 >= drop_below(p)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Draws per statistic below.
    const N: u64 = 200_000;

    /// Mean and variance of `f` over the first [`N`] indexes.
    fn moments(f: impl Fn(u64) -> f64) -> (f64, f64) {
        let mean = (0..N).map(&f).sum::<f64>() / N as f64;
        let var = (0..N).map(|i| (f(i) - mean).powi(2)).sum::<f64>() / N as f64;
        (mean, var)
    }

    #[test]
    fn values_are_fixed_for_ever() {
        // The first three outputs of SplitMix64 started at stream(7) - GAMMA; resuming an old run
        // relies on them.
        let got: Vec<u64> = (0..3).map(|i| mix(7, i)).collect();
        let mut state = stream(7).wrapping_sub(GAMMA);
        for value in got {
            state = state.wrapping_add(GAMMA);
            assert_eq!(value, finalise(state));
        }
        // First output of the published generator for state 0.
        assert_eq!(finalise(GAMMA), 0xe220_a839_7b1d_cdaf);
    }

    #[test]
    fn uniform_has_its_moments() {
        for seed in [0, 1, 2, u64::MAX] {
            let (mean, var) = moments(|i| uniform(seed, i));
            assert!((mean - 0.5).abs() < 0.003 && (var - 1.0 / 12.0).abs() < 0.001, "{mean} {var}");
        }
    }

    #[test]
    fn normal_has_its_moments() {
        for seed in [0, 1, 2, u64::MAX] {
            let (mean, var) = moments(|i| normal(seed, i));
            assert!(mean.abs() < 0.01 && (var - 1.0).abs() < 0.02, "{mean} {var}");
            let beyond_two = (0..N).filter(|&i| normal(seed, i).abs() > 2.0).count() as f64;
            assert!((beyond_two / N as f64 - 0.0455).abs() < 0.003);
        }
    }

    #[test]
    fn keep_has_its_rate() {
        for p in [0.0, 0.05, 0.5, 1.0] {
            let kept = (0..N).filter(|&i| keep(3, i, p)).count() as f64 / N as f64;
            assert!((kept - f64::from(1.0 - p)).abs() < 0.004, "{p}: {kept}");
        }
    }

    #[test]
    fn neighbouring_seeds_are_unrelated() {
        let same = (0..N).filter(|&i| (mix(1, i) ^ mix(2, i)).count_ones() == 32).count() as f64;
        // C(64, 32) / 2^64 = 0.0993.
        assert!((same / N as f64 - 0.0993).abs() < 0.004);
    }
}
