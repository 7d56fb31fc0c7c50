//! The world as the writers of documents see it: facts, their phrasings, and how often each is
//! drawn.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::TableError;
use crate::facts::{Fact, Relation, read_facts, read_table};
use crate::phrasing::{Phrasings, Use, read_phrasings};
use crate::rng::SplitMix64;

/// Relations that one text may tell of one subject, a pronoun carrying it along.
const GROUPS: [&[Relation]; 4] = [
    &[Relation::Capital, Relation::Continent],
    &[Relation::Sound, Relation::Young, Relation::Home, Relation::Colour],
    &[Relation::Plural, Relation::Opposite, Relation::Past],
    &[Relation::Job, Relation::Town],
];

/// The number of a fact in [`World::facts`].
pub type FactIdx = usize;

/// A subject with several facts of one group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// Its facts, at least two, in the order of the group.
    pub facts: Vec<FactIdx>,
}

/// Facts, phrasings and names, read once.
#[derive(Debug, Clone)]
pub struct World {
    facts: Vec<Fact>,
    ranges: Vec<Range<usize>>,
    weights: Vec<usize>,
    phrasings: Vec<Phrasings>,
    subjects: Vec<Subject>,
    /// First names of people in dialogues and stories.
    pub(crate) first_names: Vec<String>,
    /// Towns in which stories happen.
    pub(crate) towns: Vec<String>,
}

impl World {
    /// Reads the tables that are compiled in.
    ///
    /// # Errors
    /// A table that does not parse or contradicts itself; a test reads them all, so a released
    /// program never returns one.
    pub fn load() -> Result<Self, TableError> {
        let facts = read_facts()?;
        let names: Vec<&str> = Relation::ALL.iter().map(|relation| relation.name()).collect();
        let phrasings = read_phrasings(include_str!("../tables/phrasings.txt"), &names)?;
        let range_of = |relation: &Relation| {
            let start = facts.partition_point(|fact| fact.relation < *relation);
            start..facts.partition_point(|fact| fact.relation <= *relation)
        };
        let ranges: Vec<Range<usize>> = Relation::ALL.iter().map(range_of).collect();
        let weights = Relation::ALL.iter().map(|r| weight(*r, ranges[*r as usize].len())).collect();
        let text = include_str!("../tables/first_names.txt");
        let first_names = read_table("first_names.txt", text)?.into_iter().map(|[n]| n).collect();
        let mut towns: Vec<String> = facts[ranges[Relation::Town as usize].clone()]
            .iter()
            .map(|fact| fact.object.clone())
            .collect();
        towns.sort();
        towns.dedup();
        let subjects = subjects(&facts);
        Ok(Self { facts, ranges, weights, phrasings, subjects, first_names, towns })
    }

    /// Every fact, relation by relation.
    #[must_use]
    pub fn facts(&self) -> &[Fact] {
        &self.facts
    }

    /// The phrasings of a relation.
    #[must_use]
    pub fn phrasings(&self, relation: Relation) -> &Phrasings {
        &self.phrasings[relation as usize]
    }

    /// The subjects that have several facts of one group.
    #[must_use]
    pub fn subjects(&self) -> &[Subject] {
        &self.subjects
    }

    /// A relation, drawn by its weight.
    pub(crate) fn draw_relation(&self, rng: &mut SplitMix64) -> Relation {
        Relation::ALL[rng.weighted(&self.weights)]
    }

    /// A fact of one relation, or of one drawn by weight.
    pub(crate) fn draw_fact(&self, rng: &mut SplitMix64, relation: Option<Relation>) -> FactIdx {
        let relation = relation.unwrap_or_else(|| self.draw_relation(rng));
        let range = &self.ranges[relation as usize];
        range.start + rng.below(range.len())
    }

    /// A sentence about a fact, in a phrasing drawn from those of one use.
    pub(crate) fn say(&self, rng: &mut SplitMix64, wanted: Use, fact: FactIdx) -> String {
        let fact = &self.facts[fact];
        let phrasing = rng.choose(self.phrasings(fact.relation).of(wanted));
        phrasing.fill(&fact.subject, &fact.object)
    }

    /// The reference answer to a question about a fact.
    #[must_use]
    pub fn answer(&self, fact: FactIdx) -> String {
        let fact = &self.facts[fact];
        self.phrasings(fact.relation).answer().fill(&fact.subject, &fact.object)
    }
}

/// How often a relation is drawn: the square root of its number of facts, so that small relations
/// are not lost and large ones are not starved. Opposites, tools and sums get 1.4 times that: most
/// of their subjects have no second relation, so the documents about subjects pass them by, and in
/// trials they were the last to be learned.
fn weight(relation: Relation, n_facts: usize) -> usize {
    let tenfold_root = (n_facts * 100).isqrt();
    match relation {
        Relation::Opposite | Relation::Tool | Relation::Sum => tenfold_root * 7 / 5,
        _ => tenfold_root,
    }
}

fn subjects(facts: &[Fact]) -> Vec<Subject> {
    let mut all = Vec::new();
    for group in GROUPS {
        let mut by_name: BTreeMap<&str, Vec<FactIdx>> = BTreeMap::new();
        for (idx, fact) in facts.iter().enumerate().filter(|(_, f)| group.contains(&f.relation)) {
            by_name.entry(&fact.subject).or_default().push(idx);
        }
        let several = by_name.into_values().filter(|list| list.len() > 1);
        all.extend(several.map(|facts| Subject { facts }));
    }
    all
}
