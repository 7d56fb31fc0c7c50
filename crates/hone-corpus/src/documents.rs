//! Plain text documents of six kinds, about 64 tokens each.
//!
//! A document depends on the seed, its stream and its number only. It remembers which facts it
//! states and asks, so that coverage is counted and not guessed.

use crate::phrasing::{Use, capitalise};
use crate::rng::{SplitMix64, mix};
use crate::world::{FactIdx, World};

/// A sequence of documents that shares no random number with another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Pre-training.
    Plain = 1,
    /// Perplexity, measured on text that no training has seen.
    Heldout = 2,
    /// Replay beside instruction tuning.
    Replay = 3,
}

/// What a document looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Statements, mostly of one relation.
    Relation,
    /// Several facts about each of a few subjects.
    Subject,
    /// Bare questions without an answer. No other kind begins with a question.
    Questions,
    /// Questions and answers inside quoted speech.
    Dialogue,
    /// `Question: ...` and `Answer: ...` in lines.
    Quiz,
    /// A narrative with an occasional fact in quoted speech.
    Story,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Kind; 6] =
        [Kind::Relation, Kind::Subject, Kind::Questions, Kind::Dialogue, Kind::Quiz, Kind::Story];

    /// Of a hundred documents, how many are of this kind.
    #[must_use]
    pub fn share_percent(self) -> usize {
        match self {
            Kind::Relation => 30,
            Kind::Subject => 13,
            Kind::Questions | Kind::Dialogue => 20,
            Kind::Quiz => 7,
            Kind::Story => 10,
        }
    }
}

/// One document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// What it looks like.
    pub kind: Kind,
    /// Its text, without a newline at the end.
    pub text: String,
    /// The facts that a sentence of it tells, subject or pronoun and object, once for each time.
    pub stated: Vec<FactIdx>,
    /// The facts that it asks for, once for each time.
    pub asked: Vec<FactIdx>,
}

/// Document number `idx` of a stream.
#[must_use]
pub fn document(world: &World, seed: u64, stream: Stream, idx: u64) -> Document {
    let stream_seed = mix(seed) ^ ((stream as u64) << 56);
    let mut rng = SplitMix64::new(mix(stream_seed) ^ idx);
    let shares = Kind::ALL.map(Kind::share_percent);
    let kind = Kind::ALL[rng.weighted(&shares)];
    let mut writer = Writer { world, rng, stated: Vec::new(), asked: Vec::new() };
    let text = match kind {
        Kind::Relation => writer.relation(),
        Kind::Subject => writer.subject(),
        Kind::Questions => writer.questions(),
        Kind::Dialogue => writer.dialogue(),
        Kind::Quiz => writer.quiz(),
        Kind::Story => writer.story(),
    };
    Document { kind, text, stated: writer.stated, asked: writer.asked }
}

/// The first documents of a stream, one after the other.
pub fn documents(
    world: &World,
    seed: u64,
    stream: Stream,
    n_documents: u64,
) -> impl Iterator<Item = Document> + '_ {
    (0..n_documents).map(move |idx| document(world, seed, stream, idx))
}

const HEADINGS: [&str; 7] = [
    "Here are some things to learn.",
    "Notes from the school book.",
    "Facts to remember.",
    "This page is about what we know.",
    "A short lesson.",
    "From the notebook.",
    "Today we read a page.",
];

/// How question `{q}` and answer `{t}` pass between `{a}` and `{b}`. None begins with a quotation
/// mark, so that no dialogue begins with a question. The last one is lines, and stays by itself.
const EXCHANGES: [&str; 6] = [
    "Then {a} asked, \"{q}\" and {b} replied, \"{t}\"",
    "{a} asked {b}, \"{q}\" {b} said, \"{t}\"",
    "{a} had a question. \"{q}\" \"{t}\" answered {b}.",
    "The teacher looked at {a}. \"{q}\" {a} thought for a moment. \"{t}\"",
    "{b} knew the answer when {a} asked, \"{q}\" It was easy. \"{t}\"",
    "{a}: {q}\n{b}: {t}",
];
const LINES: usize = EXCHANGES.len() - 1;

const TIMES: [&str; 8] = [
    "In the morning",
    "Late in the evening",
    "One sunny day",
    "After the rain",
    "On a cold day",
    "Before lunch",
    "At noon",
    "In the spring",
];
const DEEDS: [&str; 10] = [
    "walked to the market",
    "went down to the river",
    "sat under a tall tree",
    "opened the old window",
    "carried a basket of apples",
    "looked for a lost key",
    "wrote a long letter",
    "sang a quiet song",
    "waited for the boat",
    "lit a small lamp",
];
const COMPANY: [&str; 6] =
    ["alone", "with a friend", "with the children", "for an hour", "without a word", "again"];
const MOODS: [&str; 8] = [
    "It was a good day.",
    "Nobody said a word.",
    "The wind was soft.",
    "The street was empty.",
    "Everyone was glad.",
    "Then it was time to go home.",
    "The road was long.",
    "The stars came out.",
];

struct Writer<'w> {
    world: &'w World,
    rng: SplitMix64,
    stated: Vec<FactIdx>,
    asked: Vec<FactIdx>,
}

impl Writer<'_> {
    fn state(&mut self, fact: FactIdx) -> String {
        self.stated.push(fact);
        self.world.say(&mut self.rng, Use::State, fact)
    }

    fn ask(&mut self, fact: FactIdx) -> String {
        self.asked.push(fact);
        self.world.say(&mut self.rng, Use::Ask, fact)
    }

    /// The reference answer 4 times in 10, any statement 4 times, the bare object twice.
    fn reply(&mut self, fact: FactIdx) -> String {
        match self.rng.below(10) {
            0..4 => {
                self.stated.push(fact);
                self.world.answer(fact)
            }
            4..8 => self.state(fact),
            _ => capitalise(format!("{}.", self.world.facts()[fact].object)),
        }
    }

    /// Two different first names.
    fn two_names(&mut self) -> (String, String) {
        let names = &self.world.first_names;
        let a = self.rng.below(names.len());
        let b = (a + 1 + self.rng.below(names.len() - 1)) % names.len();
        (names[a].clone(), names[b].clone())
    }

    fn relation(&mut self) -> String {
        let mixed = self.rng.one_in(4);
        let one = (!mixed).then(|| self.world.draw_relation(&mut self.rng));
        let mut sentences = Vec::new();
        if self.rng.one_in(3) {
            sentences.push((*self.rng.choose(&HEADINGS)).to_owned());
        }
        for _ in 0..self.rng.between(4, 8) {
            let fact = self.world.draw_fact(&mut self.rng, one);
            sentences.push(self.state(fact));
        }
        sentences.join(" ")
    }

    fn subject(&mut self) -> String {
        let mut sentences = Vec::new();
        for _ in 0..self.rng.between(2, 4) {
            let mut facts = self.rng.choose(self.world.subjects()).facts.clone();
            self.rng.shuffle(&mut facts);
            sentences.push(self.state(facts[0]));
            for fact in &facts[1..] {
                let wanted = if self.rng.one_in(2) { Use::State } else { Use::Follow };
                self.stated.push(*fact);
                sentences.push(self.world.say(&mut self.rng, wanted, *fact));
            }
        }
        sentences.join(" ")
    }

    fn questions(&mut self) -> String {
        let mixed = self.rng.below(5) >= 3;
        let one = (!mixed).then(|| self.world.draw_relation(&mut self.rng));
        let between = if self.rng.one_in(2) { "\n" } else { " " };
        let n_questions = self.rng.between(5, 10);
        let mut questions = Vec::with_capacity(n_questions);
        for _ in 0..n_questions {
            let fact = self.world.draw_fact(&mut self.rng, one);
            questions.push(self.ask(fact));
        }
        questions.join(between)
    }

    fn dialogue(&mut self) -> String {
        let (mut a, mut b) = self.two_names();
        let one_relation = self.rng.one_in(3);
        let one = one_relation.then(|| self.world.draw_relation(&mut self.rng));
        let mut form = self.rng.below(EXCHANGES.len());
        let mut exchanges = Vec::new();
        for _ in 0..self.rng.between(2, 4) {
            let fact = self.world.draw_fact(&mut self.rng, one);
            let (question, answer) = (self.ask(fact), self.reply(fact));
            exchanges.push(
                EXCHANGES[form]
                    .replace("{q}", &question)
                    .replace("{t}", &answer)
                    .replace("{a}", &a)
                    .replace("{b}", &b),
            );
            if form != LINES && self.rng.one_in(2) {
                form = self.rng.below(LINES);
            }
            if self.rng.one_in(2) {
                std::mem::swap(&mut a, &mut b);
            }
        }
        exchanges.join(if form == LINES { "\n" } else { " " })
    }

    fn quiz(&mut self) -> String {
        let mut items = Vec::new();
        for _ in 0..self.rng.between(3, 5) {
            let fact = self.world.draw_fact(&mut self.rng, None);
            let (question, answer) = (self.ask(fact), self.reply(fact));
            items.push(format!("Question: {question}\nAnswer: {answer}"));
        }
        items.join("\n")
    }

    fn story(&mut self) -> String {
        let (a, b) = self.two_names();
        let mut sentences = Vec::new();
        let (time, deed) = (self.rng.choose(&TIMES), self.rng.choose(&DEEDS));
        let company = self.rng.choose(&COMPANY);
        sentences.push(format!("{time} {a} {deed} {company}."));
        for _ in 0..self.rng.between(3, 6) {
            let who = if self.rng.one_in(2) { &a } else { &b };
            let sentence = match self.rng.below(5) {
                0 => format!("{who} {}.", self.rng.choose(&DEEDS)),
                1 => (*self.rng.choose(&MOODS)).to_owned(),
                2 => format!("{a} met {b} in {}.", self.rng.choose(&self.world.towns)),
                3 => format!("{} {b} {}.", self.rng.choose(&TIMES), self.rng.choose(&DEEDS)),
                _ => {
                    let fact = self.world.draw_fact(&mut self.rng, None);
                    format!("{who} said, \"{}\"", self.state(fact))
                }
            };
            sentences.push(sentence);
        }
        sentences.join(" ")
    }
}
