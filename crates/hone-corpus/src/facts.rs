//! The facts of the tiny world: thirteen relations from a subject to one object each.
//!
//! Tables under `tables/` hold what is common knowledge or invented; sums are computed. Reading a
//! table refuses a subject that has two answers in one relation, because a model asked about it
//! could not be marked.

use std::collections::{BTreeMap, BTreeSet};

use crate::TableError;

/// What a fact says of its subject.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Relation {
    /// A country and its capital.
    Capital,
    /// A country and its continent.
    Continent,
    /// An animal and what it says.
    Sound,
    /// An animal and its young.
    Young,
    /// An animal and where it lives.
    Home,
    /// A thing and its usual colour.
    Colour,
    /// A word and its opposite.
    Opposite,
    /// A noun and its plural.
    Plural,
    /// A verb and its past tense.
    Past,
    /// A tool and what it is used to do.
    Tool,
    /// An invented person and their job.
    Job,
    /// An invented person and their home town.
    Town,
    /// A sum of two numbers from 1 to 10 and its result.
    Sum,
}

impl Relation {
    /// Every relation, in the order in which facts are listed.
    pub const ALL: [Relation; 13] = [
        Relation::Capital,
        Relation::Continent,
        Relation::Sound,
        Relation::Young,
        Relation::Home,
        Relation::Colour,
        Relation::Opposite,
        Relation::Plural,
        Relation::Past,
        Relation::Tool,
        Relation::Job,
        Relation::Town,
        Relation::Sum,
    ];

    /// The name in data rows and in `tables/phrasings.txt`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Relation::Capital => "capital",
            Relation::Continent => "continent",
            Relation::Sound => "sound",
            Relation::Young => "young",
            Relation::Home => "home",
            Relation::Colour => "colour",
            Relation::Opposite => "opposite",
            Relation::Plural => "plural",
            Relation::Past => "past",
            Relation::Tool => "tool",
            Relation::Job => "job",
            Relation::Town => "town",
            Relation::Sum => "sum",
        }
    }
}

/// One fact: the `relation` of `subject` is `object`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fact {
    /// What is said.
    pub relation: Relation,
    /// Of whom or what.
    pub subject: String,
    /// The one right answer.
    pub object: String,
    /// The name under which the split keeps or leaves out everything that belongs together:
    /// the smallest, in lower case, of the subjects tied to this one (see `entity_keys`).
    pub entity: String,
}

/// A table of two columns and the relation that it holds.
const PAIRS: [(&str, &str, Relation); 8] = [
    ("sounds.txt", include_str!("../tables/sounds.txt"), Relation::Sound),
    ("young.txt", include_str!("../tables/young.txt"), Relation::Young),
    ("homes.txt", include_str!("../tables/homes.txt"), Relation::Home),
    ("colours.txt", include_str!("../tables/colours.txt"), Relation::Colour),
    ("opposites.txt", include_str!("../tables/opposites.txt"), Relation::Opposite),
    ("plurals.txt", include_str!("../tables/plurals.txt"), Relation::Plural),
    ("past_tenses.txt", include_str!("../tables/past_tenses.txt"), Relation::Past),
    ("tools.txt", include_str!("../tables/tools.txt"), Relation::Tool),
];

/// Highest number that is added in a sum.
const ADDEND_MAX: usize = 10;

/// Reads every table and computes the sums: all facts, relation by relation.
///
/// # Errors
/// A line without its columns, a text that is not plain ASCII, or a subject told of twice.
pub fn read_facts() -> Result<Vec<Fact>, TableError> {
    let mut told = Vec::new();
    let countries = read_table("countries.txt", include_str!("../tables/countries.txt"))?;
    for [country, capital, continent] in countries {
        told.push((Relation::Capital, country.clone(), capital));
        told.push((Relation::Continent, country, continent));
    }
    for (name, text, relation) in PAIRS {
        for [subject, object] in read_table(name, text)? {
            if relation == Relation::Opposite {
                told.push((relation, object.clone(), subject.clone()));
            }
            told.push((relation, subject, object));
        }
    }
    for [person, job, town] in read_table("people.txt", include_str!("../tables/people.txt"))? {
        told.push((Relation::Job, person.clone(), job));
        told.push((Relation::Town, person, town));
    }
    for a in 1..=ADDEND_MAX {
        for b in 1..=ADDEND_MAX {
            told.push((Relation::Sum, format!("{a} plus {b}"), (a + b).to_string()));
        }
    }
    // The sort is stable, so within a relation the order is that of the tables.
    told.sort_by_key(|(relation, _, _)| *relation);
    refuse_two_answers(&told)?;
    let keys = entity_keys(&told);
    let with_key = |(relation, subject, object): Told| {
        let entity = keys[&subject.to_ascii_lowercase()].clone();
        Fact { relation, subject, object, entity }
    };
    Ok(told.into_iter().map(with_key).collect())
}

/// Relation, subject, object.
type Told = (Relation, String, String);

fn refuse_two_answers(told: &[Told]) -> Result<(), TableError> {
    let mut seen = BTreeSet::new();
    for (relation, subject, _) in told {
        if !seen.insert((*relation, subject.to_ascii_lowercase())) {
            let what = format!("the {} of `{subject}` is told twice", relation.name());
            return Err(TableError { table: "facts", line: 0, what });
        }
    }
    Ok(())
}

/// For each subject, in lower case, the key of its entity.
///
/// Subjects are one entity when they are the same word but for case ("Turkey", "turkey"), when they
/// are opposites of each other, or when they are one sum in either order: whoever has seen one of
/// them answered has seen the other. Ties are followed to their end, so "sell" (whose opposite is
/// "buy") and "buy" share a key in every relation.
fn entity_keys(told: &[Told]) -> BTreeMap<String, String> {
    let mut parent: BTreeMap<String, String> = BTreeMap::new();
    for (relation, subject, object) in told {
        let subject = subject.to_ascii_lowercase();
        let tied = match relation {
            Relation::Opposite => object.to_ascii_lowercase(),
            Relation::Sum => {
                let (a, b) = subject.split_once(" plus ").unwrap_or((&subject, ""));
                format!("{b} plus {a}")
            }
            _ => subject.clone(),
        };
        let (a, b) = (root(&parent, &subject), root(&parent, &tied));
        let least = a.clone().min(b.clone());
        for key in [a, b, subject, tied] {
            parent.insert(key, least.clone());
        }
    }
    parent.keys().map(|key| (key.clone(), root(&parent, key))).collect()
}

fn root(parent: &BTreeMap<String, String>, key: &str) -> String {
    let mut at = key;
    while let Some(next) = parent.get(at).filter(|next| *next != at) {
        at = next;
    }
    at.to_owned()
}

/// The rows of a table: columns parted by ` | `, comment lines begin with `#`.
///
/// # Errors
/// A row with another number of columns, an empty column, or a letter outside ASCII.
pub(crate) fn read_table<const N: usize>(
    table: &'static str,
    text: &str,
) -> Result<Vec<[String; N]>, TableError> {
    let mut rows = Vec::new();
    for (idx, line) in text.lines().enumerate() {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let error = |what: &str| TableError { table, line: idx + 1, what: what.to_owned() };
        let columns: Vec<String> = line.split(" | ").map(|c| c.trim().to_owned()).collect();
        if columns.iter().any(|column| column.is_empty() || !column.is_ascii()) {
            return Err(error("a column is empty or not plain ASCII"));
        }
        let row = columns.try_into().map_err(|_| error("not the table's number of columns"))?;
        rows.push(row);
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_world_has_these_facts() {
        let facts = read_facts().unwrap();
        let counts: Vec<(&str, usize)> = Relation::ALL
            .iter()
            .map(|r| (r.name(), facts.iter().filter(|f| f.relation == *r).count()))
            .collect();
        let expected = [
            ("capital", 126),
            ("continent", 126),
            ("sound", 32),
            ("young", 32),
            ("home", 32),
            ("colour", 50),
            ("opposite", 180),
            ("plural", 98),
            ("past", 97),
            ("tool", 65),
            ("job", 120),
            ("town", 120),
            ("sum", 100),
        ];
        assert_eq!(counts, expected);
        assert_eq!(facts.len(), 1178);
    }

    #[test]
    fn no_answer_repeats_its_question_by_accident() {
        // A fact whose object is its subject can be answered by copying: only these are so, truly.
        let same: Vec<String> = read_facts()
            .unwrap()
            .into_iter()
            .filter(|f| f.subject.eq_ignore_ascii_case(&f.object))
            .map(|f| format!("{} {}", f.relation.name(), f.subject))
            .collect();
        let expected = [
            "capital Singapore",
            "sound cuckoo",
            "plural sheep",
            "plural deer",
            "plural fish",
            "past put",
            "past cut",
            "past hit",
        ];
        assert_eq!(same, expected);
    }

    #[test]
    fn what_belongs_together_has_one_entity() {
        let facts = read_facts().unwrap();
        let key = |relation, subject: &str| {
            let found = facts.iter().find(|f| f.relation == relation && f.subject == subject);
            found.unwrap_or_else(|| panic!("no {subject}")).entity.as_str()
        };
        assert_eq!(key(Relation::Past, "sell"), key(Relation::Opposite, "buy"));
        assert_eq!(key(Relation::Sum, "3 plus 8"), key(Relation::Sum, "8 plus 3"));
        assert_eq!(key(Relation::Capital, "Turkey"), key(Relation::Sound, "turkey"));
        assert_eq!(key(Relation::Plural, "fly"), key(Relation::Past, "fly"));
        assert_ne!(key(Relation::Sum, "3 plus 7"), key(Relation::Sum, "8 plus 3"));
    }

    #[test]
    fn opposites_hold_both_ways() {
        let facts = read_facts().unwrap();
        let pairs: BTreeMap<&str, &str> = facts
            .iter()
            .filter(|f| f.relation == Relation::Opposite)
            .map(|f| (f.subject.as_str(), f.object.as_str()))
            .collect();
        assert_eq!(pairs.len(), 180);
        for (subject, object) in &pairs {
            assert_eq!(pairs.get(object), Some(subject));
        }
    }

    #[test]
    fn bad_tables_are_refused_with_their_line() {
        let check = |text: &str, message: &str| {
            assert_eq!(read_table::<2>("t.txt", text).unwrap_err().to_string(), message);
        };
        check("# a | b\ncow", "t.txt:2: not the table's number of columns");
        check("cow | ", "t.txt:1: a column is empty or not plain ASCII");
        check("cow | mu\u{308}h", "t.txt:1: a column is empty or not plain ASCII");
    }

    #[test]
    fn a_subject_with_two_answers_is_refused() {
        let told = |s: &str, o: &str| (Relation::Home, s.to_owned(), o.to_owned());
        let error = refuse_two_answers(&[told("bee", "hive"), told("Bee", "nest")]).unwrap_err();
        assert_eq!(error.to_string(), "facts:0: the home of `Bee` is told twice");
    }
}
