//! The extraction task for a real model: read one short text, reply with one JSON object that has
//! exactly the keys that were asked for, in their order.
//!
//! A text always tells four things, and two to four of them are asked for, in any order: so a model
//! must read the instruction. Values stand in the text as they stand in the answer; numbers go
//! without quotation marks. Names, places, titles and the like come from lists of which training
//! uses three quarters and the test the rest, so an answer of the test cannot be remembered.

mod shapes;

use serde::Serialize;

use crate::phrasing::indefinite;
use crate::rng::SplitMix64;
use crate::rows::{Message, exchange};
use shapes::{Field, INSTRUCTIONS, INSTRUCTIONS_UNSEEN, SHAPES, Shape, Source};

/// Rows for training.
pub const N_TRAIN: usize = 300;

/// Rows of the test: [`Group::SeenForm`], [`Group::UnseenForm`], [`Group::UnseenShape`].
pub const N_TEST: [usize; 3] = [40, 30, 30];

/// How far a row is from what training shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Group {
    /// A row of training.
    Train,
    /// A shape, a text form and an instruction of training, with other values.
    SeenForm,
    /// A shape of training in a text form and under an instruction that training lacks.
    UnseenForm,
    /// A shape, and with it keys, that training lacks.
    UnseenShape,
}

/// One extraction task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct JsonRow {
    /// Instruction and text; one JSON object.
    pub messages: [Message; 2],
    /// What the text is about.
    pub shape: &'static str,
    /// How far the row is from training.
    pub group: Group,
}

/// The rows for training.
#[must_use]
pub fn train(seed: u64) -> Vec<JsonRow> {
    rows(seed, Group::Train, N_TRAIN)
}

/// The rows of the test, group by group.
#[must_use]
pub fn test(seed: u64) -> Vec<JsonRow> {
    let groups = [Group::SeenForm, Group::UnseenForm, Group::UnseenShape];
    let sized = groups.into_iter().zip(N_TEST);
    sized.flat_map(|(group, n_rows)| rows(seed, group, n_rows)).collect()
}

/// Rows of one group, no text twice.
fn rows(seed: u64, group: Group, n_rows: usize) -> Vec<JsonRow> {
    let mut rng = SplitMix64::keyed(seed, &["json", &format!("{group:?}")]);
    let shapes: Vec<&Shape> =
        SHAPES.iter().filter(|shape| shape.in_training != (group == Group::UnseenShape)).collect();
    let mut rows: Vec<JsonRow> = Vec::with_capacity(n_rows);
    while rows.len() < n_rows {
        let shape = shapes[rows.len() % shapes.len()];
        let row = row(shape, group, &mut rng);
        if rows.iter().all(|earlier| earlier.messages != row.messages) {
            rows.push(row);
        }
    }
    rng.shuffle(&mut rows);
    rows
}

fn row(shape: &Shape, group: Group, rng: &mut SplitMix64) -> JsonRow {
    let for_test = group != Group::Train;
    let values: Vec<(Field, String)> =
        shape.fields.iter().map(|field| (*field, value(field.source, for_test, rng))).collect();
    let unseen = group == Group::UnseenForm;
    let mut text = (*rng.choose(if unseen { shape.unseen_texts } else { shape.texts })).to_owned();
    for (field, value) in &values {
        let with_article = format!("{} {value}", indefinite(value));
        text = text.replace(&format!("{{a {}}}", field.key), &with_article);
        text = text.replace(&format!("{{{}}}", field.key), value);
    }
    let mut asked = values;
    rng.shuffle(&mut asked);
    asked.truncate(rng.between(2, 4));
    let keys: Vec<&str> = asked.iter().map(|(field, _)| field.key).collect();
    let forms: &[&str] = if unseen { &INSTRUCTIONS_UNSEEN } else { &INSTRUCTIONS };
    let user = rng.choose(forms).replace("{keys}", &keys.join(", ")).replace("{text}", &text);
    JsonRow { messages: exchange(user, object(&asked)), shape: shape.name, group }
}

/// The object on one line, with a space after each colon and comma.
fn object(fields: &[(Field, String)]) -> String {
    let member = |(field, value): &(Field, String)| match field.source {
        Source::Words(_) | Source::TwoWords(_, _) | Source::Date => {
            format!("\"{}\": \"{value}\"", field.key)
        }
        Source::Whole(_, _) | Source::Price => format!("\"{}\": {value}", field.key),
    };
    let members: Vec<String> = fields.iter().map(member).collect();
    format!("{{{}}}", members.join(", "))
}

/// One value, as it stands in text and answer. None needs escaping in JSON, nor has a number a
/// trailing zero: both spellings are then one.
fn value(source: Source, for_test: bool, rng: &mut SplitMix64) -> String {
    let mut word = |list: &[&str]| {
        // Every fourth word is the test's.
        let n_test = list.len() / 4;
        if for_test {
            return list[4 * rng.below(n_test) + 3].to_owned();
        }
        let drawn = rng.below(list.len() - n_test);
        list[drawn + drawn / 3].to_owned()
    };
    match source {
        Source::Words(list) => word(list),
        Source::TwoWords(first, second) => format!("{} {}", word(first), word(second)),
        Source::Date => {
            let month = *rng.choose(&shapes::MONTHS);
            format!("{} {month}", rng.between(1, 28))
        }
        Source::Whole(low, high) => {
            let span = usize::try_from(high - low).unwrap_or(0);
            let above = i64::try_from(rng.between(0, span)).unwrap_or(0);
            (low + above).to_string()
        }
        Source::Price => {
            let cents = rng.choose(&["25", "45", "75", "95", "49", "99"]);
            format!("{}.{cents}", rng.between(1, 89))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::{Map, Value};

    use super::*;

    fn parse(row: &JsonRow) -> Map<String, Value> {
        let answer = &row.messages[1].content;
        match serde_json::from_str(answer) {
            Ok(Value::Object(object)) => object,
            other => panic!("{answer}: {other:?}"),
        }
    }

    #[test]
    fn every_answer_is_one_object_with_the_keys_asked_for_and_values_from_the_text() {
        let rows = [train(1), test(1)].concat();
        assert_eq!(rows.len(), 400);
        for row in &rows {
            let user = &row.messages[0].content;
            let object = parse(row);
            let keys: Vec<&str> = object.keys().map(String::as_str).collect();
            assert!((2..=4).contains(&keys.len()), "{user}");
            assert!(user.contains(&keys.join(", ")), "{keys:?} not in {user}");
            assert!(!user.contains('{') && !user.contains('}'), "{user}");
            assert!(!user.contains(" a a") && !user.contains(" an b"), "{user}");
            for value in object.values() {
                let shown = value.as_str().map_or(value.to_string(), str::to_owned);
                assert!(user.contains(&shown), "{shown} not in {user}");
            }
            let spaced = row.messages[1].content.replace(": ", ":").replace(", ", ",");
            assert_eq!(serde_json::to_string(&object).unwrap(), spaced, "one spelling only");
        }
    }

    #[test]
    fn words_of_the_test_are_not_in_training() {
        let words = |rows: &[JsonRow]| -> BTreeSet<String> {
            let strings = |row| parse(row).into_iter().filter(|(key, _)| key != "date");
            let values = rows.iter().flat_map(strings);
            values.filter_map(|(_, value)| value.as_str().map(str::to_owned)).collect()
        };
        let (train, test) = (words(&train(1)), words(&test(1)));
        assert!(train.len() > 150 && test.len() > 60, "{} {}", train.len(), test.len());
        assert!(train.is_disjoint(&test), "{:?}", train.intersection(&test));
    }

    #[test]
    fn groups_have_their_sizes_and_their_shapes() {
        let test = test(1);
        let count = |group| test.iter().filter(|row| row.group == group).count();
        assert_eq!([Group::SeenForm, Group::UnseenForm, Group::UnseenShape].map(count), N_TEST);
        let trained: BTreeSet<&str> = train(1).iter().map(|row| row.shape).collect();
        assert_eq!(trained.len(), 5);
        for row in &test {
            assert_eq!(trained.contains(row.shape), row.group != Group::UnseenShape);
        }
    }

    #[test]
    fn lists_are_long_enough_and_forms_name_every_field() {
        for shape in &SHAPES {
            for text in shape.texts.iter().chain(shape.unseen_texts) {
                for field in shape.fields {
                    let named = text.contains(&format!("{{{}}}", field.key))
                        || text.contains(&format!("{{a {}}}", field.key));
                    assert!(named, "{} is not in: {text}", field.key);
                }
            }
            assert_eq!(shape.unseen_texts.is_empty(), !shape.in_training);
            for field in shape.fields {
                if let Source::Words(list) | Source::TwoWords(list, _) = field.source {
                    assert!(list.len() >= 12, "{}: {}", field.key, list.len());
                }
            }
        }
    }
}
