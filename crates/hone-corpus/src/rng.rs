//! SplitMix64: 64-bit integer arithmetic only, so that every machine draws the same numbers.
//!
//! Reference: Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014);
//! the constants are those of its mixing function.

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// A stream of pseudorandom numbers. Two generators made from one seed draw the same stream.
#[derive(Debug, Clone)]
pub struct SplitMix64 {
    state: u64,
}

impl SplitMix64 {
    /// The stream that belongs to `seed`. Neighbouring seeds give unrelated streams.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self { state: mix(seed) }
    }

    /// The stream of one item: it depends on the seed and the words of its name only, so that items
    /// may be made in any order, and adding one changes no other.
    #[must_use]
    pub fn keyed(seed: u64, key: &[&str]) -> Self {
        // FNV-1a over the parts, each closed by a byte that no UTF-8 text contains.
        let mut hash = 0xCBF2_9CE4_8422_2325_u64;
        for byte in key.iter().flat_map(|part| part.bytes().chain([0xFF])) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3);
        }
        Self::new(hash ^ mix(seed))
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(GOLDEN);
        mix(self.state)
    }

    /// A number in `0..n`, by Lemire's multiplication; 0 where `n` is 0.
    ///
    /// The bias is at most `n / 2^64`, which no table of this crate can notice.
    pub fn below(&mut self, n: usize) -> usize {
        let product = u128::from(self.next_u64()) * n as u128;
        (product >> 64) as usize
    }

    /// A number in `low..=high`. `low` must not be above `high`.
    pub fn between(&mut self, low: usize, high: usize) -> usize {
        low + self.below(high - low + 1)
    }

    /// True in one draw of `n`.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// One element of a list that is not empty.
    pub fn choose<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }

    /// The index of one weight, drawn in proportion to the weights. Their sum must not be 0.
    pub fn weighted(&mut self, weights: &[usize]) -> usize {
        let mut rest = self.below(weights.iter().sum());
        for (idx, weight) in weights.iter().enumerate() {
            if rest < *weight {
                return idx;
            }
            rest -= weight;
        }
        0
    }

    /// Fisher-Yates, from the end.
    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        for last in (1..list.len()).rev() {
            let other = self.below(last + 1);
            list.swap(last, other);
        }
    }
}

/// The mixing function of SplitMix64: a bijection of 64-bit numbers that looks like chance.
#[must_use]
pub fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first outputs of the published generator for state 1234567, as its reference code
    /// prints them; our constructor mixes the seed first, so the state is set here.
    #[test]
    fn draws_the_published_numbers() {
        let mut rng = SplitMix64 { state: 1_234_567 };
        let drawn: Vec<u64> = (0..5).map(|_| rng.next_u64()).collect();
        let published = [
            6_457_827_717_110_365_317,
            3_203_168_211_198_807_973,
            9_817_491_932_198_370_423,
            4_593_380_528_125_082_431,
            16_408_922_859_458_223_821,
        ];
        assert_eq!(drawn, published);
    }

    #[test]
    fn draws_stay_inside_their_bounds() {
        let mut rng = SplitMix64::new(3);
        let mut seen = [0usize; 7];
        for _ in 0..7000 {
            seen[rng.below(7)] += 1;
            assert!((3..=5).contains(&rng.between(3, 5)));
            assert_ne!(rng.weighted(&[2, 0, 1]), 1);
        }
        assert!(seen.iter().all(|n| (850..1150).contains(n)), "{seen:?}");
        assert_eq!(rng.below(0), 0);
    }

    #[test]
    fn keys_are_told_apart_by_their_parts() {
        let first = |key: &[&str]| SplitMix64::keyed(1, key).next_u64();
        assert_ne!(first(&["ab", "c"]), first(&["a", "bc"]));
        assert_ne!(first(&["ab"]), SplitMix64::keyed(2, &["ab"]).next_u64());
    }
}
