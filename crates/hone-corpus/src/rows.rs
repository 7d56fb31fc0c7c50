//! Rows of the JSONL files: plain text, instruction pairs, bare questions.

use serde::Serialize;

use crate::documents::{Stream, documents};
use crate::facts::{Fact, Relation};
use crate::phrasing::Use;
use crate::rng::SplitMix64;
use crate::split::{Part, part};
use crate::world::World;

/// Plain text, one document a row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TextRow {
    /// The document.
    pub text: String,
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `user` or `assistant`.
    pub role: &'static str,
    /// What is said.
    pub content: String,
}

/// A question or instruction and its reference answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PairRow {
    /// The user's message and the assistant's.
    pub messages: [Message; 2],
    /// The relation that is asked for.
    pub relation: &'static str,
    /// The subject that is asked about.
    pub entity: String,
    /// `tuned`: tuning uses this phrasing about other entities. `unseen`: neither tuning nor
    /// pre-training has it.
    pub phrasing: &'static str,
}

/// A bare question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct QuestionRow {
    /// The question.
    pub prompt: String,
    /// The relation that is asked for.
    pub relation: &'static str,
    /// The subject that is asked about.
    pub entity: String,
}

/// A user's message and the assistant's.
pub(crate) fn exchange(user: String, assistant: String) -> [Message; 2] {
    let user = Message { role: "user", content: user };
    [user, Message { role: "assistant", content: assistant }]
}

/// The first documents of a stream as rows.
pub fn text_rows(
    world: &World,
    seed: u64,
    stream: Stream,
    n_documents: u64,
) -> impl Iterator<Item = TextRow> + '_ {
    documents(world, seed, stream, n_documents).map(|document| TextRow { text: document.text })
}

/// One instruction for each fact that tuning sees, shuffled.
///
/// One of the relation's four phrasings is drawn for each. One of the four is a plain question of
/// pre-training: that is how the model learns to answer where it used to go on asking.
#[must_use]
pub fn instructions(world: &World, seed: u64) -> Vec<PairRow> {
    let mut rows = pairs(world, seed, Part::Tune, &[Use::Instruct]);
    SplitMix64::keyed(seed, &["instructions"]).shuffle(&mut rows);
    rows
}

/// Two questions for each fact of a part: one in a tuned phrasing, one in an unseen one. In the
/// order of the facts.
#[must_use]
pub fn evaluation(world: &World, seed: u64, held: Part) -> Vec<PairRow> {
    pairs(world, seed, held, &[Use::Instruct, Use::Unseen])
}

/// One bare question of pre-training for each fact of the dev half, in the order of the facts.
#[must_use]
pub fn questions(world: &World, seed: u64) -> Vec<QuestionRow> {
    let row = |fact: &Fact| QuestionRow {
        prompt: draw(world, seed, Use::Ask, fact),
        relation: fact.relation.name(),
        entity: fact.subject.clone(),
    };
    world.facts().iter().filter(|fact| part(fact) == Part::Dev).map(row).collect()
}

fn pairs(world: &World, seed: u64, wanted: Part, uses: &[Use]) -> Vec<PairRow> {
    let mut rows = Vec::new();
    for (idx, fact) in world.facts().iter().enumerate() {
        if part(fact) != wanted {
            continue;
        }
        rows.extend(uses.iter().map(|use_| PairRow {
            messages: exchange(draw(world, seed, *use_, fact), world.answer(idx)),
            relation: fact.relation.name(),
            entity: fact.subject.clone(),
            phrasing: if *use_ == Use::Unseen { "unseen" } else { "tuned" },
        }));
    }
    rows
}

/// A phrasing drawn by the fact's own name, filled.
fn draw(world: &World, seed: u64, wanted: Use, fact: &Fact) -> String {
    let relation: Relation = fact.relation;
    let key = [wanted.word(), relation.name(), &fact.subject];
    let mut rng = SplitMix64::keyed(seed, &key);
    rng.choose(world.phrasings(relation).of(wanted)).fill(&fact.subject, &fact.object)
}
