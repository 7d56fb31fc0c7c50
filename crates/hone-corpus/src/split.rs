//! Which facts tuning sees, and which halves of the rest are looked at when.
//!
//! The split is by entity over all relations: of an entity that is left out, no fact is in tuning.
//! It depends on the entity's name alone, not on a seed, an order or a count: a fact added to a
//! table moves no other fact.

use crate::facts::Fact;
use crate::rng::SplitMix64;

/// Names this split; another number would be another split. Of 600 numbers it is among those that
/// deal every relation most evenly; it was chosen before any model was trained on the corpus.
const SPLIT_SEED: u64 = 2456;

/// Of a thousand entities, how many are left out of tuning: a third.
const HELD_PERMILLE: usize = 333;

/// The part of the data to which an entity belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// Instruction pairs for tuning.
    Tune,
    /// Left out of tuning; may be looked at while a recipe is being chosen.
    Dev,
    /// Left out of tuning; looked at only to report a recipe that is settled.
    Test,
}

/// The part to which a fact belongs, by its entity.
#[must_use]
pub fn part(fact: &Fact) -> Part {
    let mut rng = SplitMix64::keyed(SPLIT_SEED, &[&fact.entity]);
    match (rng.below(1000) < HELD_PERMILLE, rng.one_in(2)) {
        (false, _) => Part::Tune,
        (true, false) => Part::Dev,
        (true, true) => Part::Test,
    }
}
