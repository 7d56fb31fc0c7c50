//! Sentences with holes: the phrasings of `tables/phrasings.txt` and how they are filled.

use crate::TableError;

/// What a phrasing is for. The words in `tables/phrasings.txt` are those of [`Use::word`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Use {
    /// A statement that names subject and object. Pre-training.
    State,
    /// A statement about a subject just named, by a pronoun. Pre-training.
    Follow,
    /// A plain question. Pre-training.
    Ask,
    /// An instruction. Tuning and evaluation.
    Instruct,
    /// An instruction that occurs neither in pre-training nor in tuning. Evaluation only.
    Unseen,
    /// The reference answer.
    Answer,
}

impl Use {
    /// Every use, in the order of the table.
    pub const ALL: [Use; 6] =
        [Use::State, Use::Follow, Use::Ask, Use::Instruct, Use::Unseen, Use::Answer];

    /// The word that opens a line of the table.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Use::State => "state",
            Use::Follow => "follow",
            Use::Ask => "ask",
            Use::Instruct => "instruct",
            Use::Unseen => "unseen",
            Use::Answer => "answer",
        }
    }
}

/// A sentence with holes: `{s}` the subject, `{o}` the object, `{a s}` and `{a o}` with an article.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Phrasing {
    pieces: Vec<Piece>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Words(String),
    Hole { object: bool, article: bool },
}

impl Phrasing {
    /// Reads a sentence with holes.
    ///
    /// # Errors
    /// A brace that opens none of the four holes.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut pieces = Vec::new();
        let mut rest = text;
        while let Some(start) = rest.find('{') {
            if start > 0 {
                pieces.push(Piece::Words(rest[..start].to_owned()));
            }
            let end = rest[start..].find('}').ok_or("a brace is not closed")? + start;
            pieces.push(match &rest[start + 1..end] {
                "s" => Piece::Hole { object: false, article: false },
                "o" => Piece::Hole { object: true, article: false },
                "a s" => Piece::Hole { object: false, article: true },
                "a o" => Piece::Hole { object: true, article: true },
                other => return Err(format!("`{{{other}}}` is not a hole")),
            });
            rest = &rest[end + 1..];
        }
        if !rest.is_empty() {
            pieces.push(Piece::Words(rest.to_owned()));
        }
        Ok(Self { pieces })
    }

    /// The sentence about `subject` and `object`, with a capital first letter.
    #[must_use]
    pub fn fill(&self, subject: &str, object: &str) -> String {
        let mut out = String::with_capacity(64);
        for piece in &self.pieces {
            match piece {
                Piece::Words(words) => out.push_str(words),
                Piece::Hole { object: of_object, article } => {
                    let word = if *of_object { object } else { subject };
                    if *article {
                        out.push_str(indefinite(word));
                        out.push(' ');
                    }
                    out.push_str(word);
                }
            }
        }
        capitalise(out)
    }

    /// Whether the sentence has a hole for the subject, and whether it has one for the object.
    #[must_use]
    pub fn names(&self) -> (bool, bool) {
        let has = |wanted: bool| {
            self.pieces.iter().any(|p| matches!(p, Piece::Hole { object, .. } if *object == wanted))
        };
        (has(false), has(true))
    }
}

/// The text with its first letter in upper case. Tables are ASCII, so one byte is one letter.
#[must_use]
pub fn capitalise(mut text: String) -> String {
    if let Some(first) = text.get_mut(..1) {
        first.make_ascii_uppercase();
    }
    text
}

/// `a` or `an`, by sound: a vowel letter asks for `an`, except where it is spoken as a consonant
/// ("a unit"), and so does a silent h ("an hour").
#[must_use]
pub fn indefinite(word: &str) -> &'static str {
    const SPOKEN_AS_CONSONANT: [&str; 5] = ["uni", "use", "eu", "one", "ut"];
    const SILENT_H: [&str; 3] = ["hour", "honest", "heir"];
    let word = word.to_ascii_lowercase();
    let starts = |list: &[&str]| list.iter().any(|start| word.starts_with(start));
    let vowel = word.starts_with(['a', 'e', 'i', 'o', 'u']);
    if (vowel && !starts(&SPOKEN_AS_CONSONANT)) || starts(&SILENT_H) { "an" } else { "a" }
}

/// The phrasings of one relation.
#[derive(Debug, Clone, Default)]
pub struct Phrasings {
    lists: [Vec<Phrasing>; 6],
}

impl Phrasings {
    /// The phrasings for one use, in the order of the table. Never empty in a loaded world.
    #[must_use]
    pub fn of(&self, wanted: Use) -> &[Phrasing] {
        &self.lists[wanted as usize]
    }

    /// The reference answer.
    #[must_use]
    pub fn answer(&self) -> &Phrasing {
        &self.lists[Use::Answer as usize][0]
    }
}

/// Reads `tables/phrasings.txt`: sections `[relation]` with lines `use: sentence`.
///
/// The result has one entry for each of `sections`, in their order.
///
/// # Errors
/// A section or use that is not known, a sentence that does not parse, or a use without a sentence.
pub fn read_phrasings(table: &str, sections: &[&str]) -> Result<Vec<Phrasings>, TableError> {
    let at = |line: usize, what: String| TableError { table: "phrasings.txt", line, what };
    let mut all = vec![Phrasings::default(); sections.len()];
    let mut section = None;
    for (idx, text) in table.lines().enumerate() {
        let line = idx + 1;
        if text.is_empty() || text.starts_with('#') {
            continue;
        }
        if let Some(name) = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            let found = sections.iter().position(|known| *known == name);
            section = Some(found.ok_or_else(|| at(line, format!("no relation `{name}`")))?);
            continue;
        }
        let (word, sentence) =
            text.split_once(": ").ok_or_else(|| at(line, "no `use: sentence`".to_owned()))?;
        let wanted = Use::ALL
            .into_iter()
            .find(|known| known.word() == word)
            .ok_or_else(|| at(line, format!("no use `{word}`")))?;
        let section = section.ok_or_else(|| at(line, "before any section".to_owned()))?;
        let phrasing = Phrasing::parse(sentence).map_err(|what| at(line, what))?;
        all[section].lists[wanted as usize].push(phrasing);
    }
    for (phrasings, name) in all.iter().zip(sections) {
        if let Some(empty) = Use::ALL.into_iter().find(|wanted| phrasings.of(*wanted).is_empty()) {
            return Err(at(0, format!("relation `{name}` has no `{}`", empty.word())));
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_filled_and_the_sentence_starts_with_a_capital() {
        let check = |text: &str, filled: &str| {
            assert_eq!(Phrasing::parse(text).unwrap().fill("owl", "owlet"), filled);
        };
        check("A young {s} is called {a o}.", "A young owl is called an owlet.");
        check("{s} and {o} rhyme.", "Owl and owlet rhyme.");
        check("{a s} hoots.", "An owl hoots.");
    }

    #[test]
    fn articles_go_by_sound() {
        let words = [
            ("eaglet", "an"),
            ("hour", "an"),
            ("unit", "a"),
            ("umbrella", "an"),
            ("cub", "a"),
            ("Orange", "an"),
            ("one-eyed owl", "a"),
        ];
        for (word, article) in words {
            assert_eq!(indefinite(word), article, "{word}");
        }
    }

    #[test]
    fn bad_tables_are_refused_with_their_line() {
        let check = |table: &str, message: &str| {
            let error = read_phrasings(table, &["sum"]).unwrap_err();
            assert_eq!(error.to_string(), message);
        };
        check("[sum]\nstate: {x} is.", "phrasings.txt:2: `{x}` is not a hole");
        check("[sum]\nstate: {s is.", "phrasings.txt:2: a brace is not closed");
        check("[product]", "phrasings.txt:1: no relation `product`");
        check("state: {s}.", "phrasings.txt:1: before any section");
        check("[sum]\nsay: {s}.", "phrasings.txt:2: no use `say`");
        check("[sum]\nstate", "phrasings.txt:2: no `use: sentence`");
        check("[sum]\nstate: {s}.", "phrasings.txt:0: relation `sum` has no `follow`");
    }
}
