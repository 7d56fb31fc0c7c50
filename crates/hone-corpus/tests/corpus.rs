//! What the data files promise: same bytes, no leak between parts, every fact told often enough,
//! no wrong grammar, and no question at the start of anything but a list of questions.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use hone_corpus::World;
use hone_corpus::documents::{Kind, Stream, document, documents};
use hone_corpus::facts::{Fact, Relation};
use hone_corpus::files::small_files;
use hone_corpus::phrasing::{Use, indefinite};
use hone_corpus::rows::{PairRow, evaluation, instructions, questions};
use hone_corpus::split::{Part, part};
use sha2::{Digest, Sha256};

const SEED: u64 = 1;

fn world() -> World {
    World::load().expect("the compiled-in tables parse")
}

fn sha256_hex(texts: impl Iterator<Item = String>) -> String {
    let mut hash = Sha256::new();
    for text in texts {
        hash.update(text.as_bytes());
        hash.update([0]);
    }
    hash.finalize().iter().fold(String::new(), |mut out, byte| {
        write!(out, "{byte:02x}").expect("a string takes any text");
        out
    })
}

/// Made by this generator when the tiny base model of the repository was; another value means
/// that the model can no longer be made again.
#[test]
fn bytes_of_the_streams_are_pinned() {
    let world = world();
    let check = |stream, pinned: &str| {
        let texts = documents(&world, SEED, stream, 1000).map(|document| document.text);
        assert_eq!(sha256_hex(texts), pinned, "{stream:?}");
    };
    check(Stream::Plain, "1c2c98e4f434b9cfae33976f6b69a9f82af1182e8fccedd25b2586224a776dd4");
    check(Stream::Heldout, "912796e33aca9ec3c5016c32f693be192e856928f05dbc8116cfed55db64e906");
    check(Stream::Replay, "b07d88b8dfe0a0a12d7951791b03ba5314e11a5abad56085bd559e83d29841b6");
}

#[test]
fn a_document_depends_on_its_number_alone() {
    let world = world();
    let in_order: Vec<_> = documents(&world, SEED, Stream::Plain, 50).collect();
    for idx in (0..50).rev() {
        assert_eq!(document(&world, SEED, Stream::Plain, idx), in_order[idx as usize]);
    }
    assert_ne!(document(&world, 2, Stream::Plain, 0).text, in_order[0].text);
}

#[test]
fn kinds_have_their_shares_and_documents_their_length() {
    let world = world();
    let mut counts: BTreeMap<Kind, usize> = BTreeMap::new();
    let mut n_bytes = 0;
    for document in documents(&world, SEED, Stream::Plain, 20_000) {
        *counts.entry(document.kind).or_default() += 1;
        n_bytes += document.text.len();
    }
    assert_eq!(Kind::ALL.map(Kind::share_percent).iter().sum::<usize>(), 100);
    for kind in Kind::ALL {
        let percent = counts[&kind] as f64 / 200.0;
        assert!((percent - kind.share_percent() as f64).abs() < 1.0, "{kind:?}: {percent}");
    }
    assert!((200..280).contains(&(n_bytes / 20_000)), "{} bytes a document", n_bytes / 20_000);
}

#[test]
fn only_lists_of_questions_begin_with_a_question() {
    let world = world();
    let mut n_lists = 0;
    for document in documents(&world, SEED, Stream::Plain, 20_000) {
        let text = &document.text;
        assert!(text.is_ascii() && !text.contains(['{', '}']), "{text}");
        assert!(text.starts_with(|first: char| first.is_ascii_alphanumeric()), "{text}");
        let end = text.find(['.', '?', '!', ':', '\n']).expect("a document has a sentence");
        let begins_with_question = text.as_bytes()[end] == b'?' && !text[..end].contains('"');
        assert_eq!(begins_with_question, document.kind == Kind::Questions, "{text}");
        if document.kind == Kind::Questions {
            n_lists += 1;
            assert!(!text.contains('.') && text.matches('?').count() == document.asked.len());
        }
    }
    assert!(n_lists > 3500, "{n_lists}");
}

/// Every fact is told in the text that pre-trains the model, those that tuning leaves out most of
/// all: what the model was never told it cannot answer.
#[test]
fn every_fact_is_told_and_asked_often() {
    let world = world();
    let mut told = vec![0usize; world.facts().len()];
    let mut asked = vec![0usize; world.facts().len()];
    for document in documents(&world, SEED, Stream::Plain, 150_000) {
        document.stated.iter().for_each(|fact| told[*fact] += 1);
        document.asked.iter().for_each(|fact| asked[*fact] += 1);
    }
    let least = |counts: &[usize]| counts.iter().copied().min().unwrap_or(0);
    assert!(least(&told) >= 250, "a fact is told only {} times", least(&told));
    assert!(least(&asked) >= 200, "a fact is asked only {} times", least(&asked));
}

/// Replay and perplexity must not be text of pre-training; a short document may recur by chance.
#[test]
fn streams_share_hardly_a_text() {
    let world = world();
    let plain: BTreeSet<String> =
        documents(&world, SEED, Stream::Plain, 150_000).map(|document| document.text).collect();
    for (stream, n_documents) in [(Stream::Heldout, 300), (Stream::Replay, 600)] {
        let texts = documents(&world, SEED, stream, n_documents);
        let n_shared = texts.filter(|document| plain.contains(&document.text)).count();
        assert_eq!(n_shared, 0, "{stream:?}");
    }
}

#[test]
fn no_entity_is_in_two_parts() {
    let world = world();
    let mut parts: BTreeMap<String, BTreeSet<Part>> = BTreeMap::new();
    let mut counts: BTreeMap<Part, usize> = BTreeMap::new();
    for fact in world.facts() {
        // Not by `fact.entity`, which the split itself uses: by the names a reader sees.
        let mut names = vec![fact.subject.to_ascii_lowercase()];
        match fact.relation {
            Relation::Opposite => names.push(fact.object.to_ascii_lowercase()),
            Relation::Sum => {
                let (a, b) = fact.subject.split_once(" plus ").expect("a sum has two sides");
                names.push(format!("{b} plus {a}"));
            }
            _ => {}
        }
        for name in names {
            parts.entry(name).or_default().insert(part(fact));
        }
        *counts.entry(part(fact)).or_default() += 1;
    }
    assert!(parts.values().all(|parts| parts.len() == 1));
    let entities: BTreeSet<(Part, &str)> =
        world.facts().iter().map(|fact| (part(fact), fact.entity.as_str())).collect();
    let n_entities = |wanted| entities.iter().filter(|(part, _)| *part == wanted).count();
    assert_eq!([Part::Tune, Part::Dev, Part::Test].map(n_entities), [477, 121, 119]);
    assert_eq!(counts.values().sum::<usize>(), 1178);
    assert_eq!([Part::Tune, Part::Dev, Part::Test].map(|part| counts[&part]), [797, 193, 188]);
}

#[test]
fn every_relation_is_in_every_part() {
    let world = world();
    for relation in Relation::ALL {
        for wanted in [Part::Tune, Part::Dev, Part::Test] {
            let n_facts = world
                .facts()
                .iter()
                .filter(|f| f.relation == relation && part(f) == wanted)
                .count();
            assert!(n_facts >= 2, "{relation:?} {wanted:?}: {n_facts}");
        }
    }
}

#[test]
fn rows_are_of_their_part_and_their_phrasing() {
    let world = world();
    let of_part = |wanted| -> BTreeSet<(&str, &str)> {
        let facts = world.facts().iter().filter(|fact| part(fact) == wanted);
        facts.map(|fact| (fact.relation.name(), fact.subject.as_str())).collect()
    };
    let named = |rows: &[PairRow]| -> BTreeSet<(String, String)> {
        rows.iter().map(|row| (row.relation.to_owned(), row.entity.clone())).collect()
    };
    let check = |rows: &[PairRow], wanted, phrasings: &[&str]| {
        let facts = of_part(wanted);
        let owned = facts.iter().map(|(r, s)| ((*r).to_owned(), (*s).to_owned())).collect();
        assert_eq!(named(rows), owned);
        assert_eq!(rows.len(), facts.len() * phrasings.len());
        for row in rows {
            assert!(phrasings.contains(&row.phrasing));
            assert!(row.messages[0].content.contains(&row.entity), "{row:?}");
            assert!(row.messages[1].content.contains(&row.entity), "{row:?}");
        }
    };
    check(&instructions(&world, SEED), Part::Tune, &["tuned"]);
    check(&evaluation(&world, SEED, Part::Dev), Part::Dev, &["tuned", "unseen"]);
    check(&evaluation(&world, SEED, Part::Test), Part::Test, &["tuned", "unseen"]);
    assert_eq!(questions(&world, SEED).len(), of_part(Part::Dev).len());
}

/// The name in an answer follows a common word: a model that had to begin with the name would have
/// to copy it before it has seen it inside a sentence.
#[test]
fn phrasings_keep_their_promises() {
    let world = world();
    let sentences = |relation: Relation, uses: &[Use]| -> BTreeSet<String> {
        let lists = uses.iter().map(|wanted| world.phrasings(relation).of(*wanted));
        lists.flatten().map(|phrasing| phrasing.fill("S", "O")).collect()
    };
    for relation in Relation::ALL {
        let phrasings = world.phrasings(relation);
        let counts = Use::ALL.map(|wanted| phrasings.of(wanted).len());
        assert_eq!(counts, [counts[0], 3, 5, 4, 3, 1], "{relation:?}");
        assert!(counts[0] >= 8);
        for wanted in Use::ALL {
            let holes = match wanted {
                Use::State | Use::Answer => (true, true),
                Use::Follow => (false, true),
                Use::Ask | Use::Instruct | Use::Unseen => (true, false),
            };
            for phrasing in phrasings.of(wanted) {
                assert_eq!(phrasing.names(), holes, "{phrasing:?}");
                let filled = phrasing.fill("S", "O");
                let ends = if wanted == Use::Ask { &['?'][..] } else { &['.', '?'][..] };
                assert!(filled.ends_with(ends), "{filled}");
            }
        }
        let answer = phrasings.answer().fill("S", "O");
        assert!(answer.starts_with("The ") || answer.starts_with("A "), "{answer}");
        assert!(sentences(relation, &[Use::State]).contains(&answer), "{answer}");
        let unseen = sentences(relation, &[Use::Unseen]);
        let known = sentences(relation, &[Use::State, Use::Ask, Use::Instruct]);
        assert!(unseen.is_disjoint(&known), "{unseen:?}");
        let plain = sentences(relation, &[Use::Ask]);
        let tuned = sentences(relation, &[Use::Instruct]);
        assert_eq!(tuned.intersection(&plain).count(), 1, "one instruction is a plain question");
    }
}

#[test]
fn articles_are_right_in_every_sentence() {
    let world = world();
    let mut n_articles = 0;
    for fact in world.facts() {
        for sentence in sentences(&world, fact) {
            let words: Vec<&str> = sentence.split([' ', '.', ',', '?']).collect();
            for pair in words.windows(2) {
                let article = pair[0].to_ascii_lowercase();
                if article == "a" || article == "an" {
                    n_articles += 1;
                    assert_eq!(indefinite(pair[1]), article, "{sentence}");
                    // The rule by sound, kept apart from the code's: no word here begins with a
                    // vowel letter that is spoken as a consonant.
                    let vowel = pair[1].starts_with(['a', 'e', 'i', 'o', 'u']);
                    assert_eq!(article == "an", vowel, "{sentence}");
                }
            }
        }
    }
    assert!(n_articles > 1000, "{n_articles}");
}

fn sentences(world: &World, fact: &Fact) -> Vec<String> {
    let phrasings = world.phrasings(fact.relation);
    let all = Use::ALL.into_iter().flat_map(|wanted| phrasings.of(wanted));
    all.map(|phrasing| phrasing.fill(&fact.subject, &fact.object)).collect()
}

#[test]
fn no_sentence_tells_two_facts() {
    let world = world();
    let mut told: BTreeMap<String, (usize, &Fact)> = BTreeMap::new();
    for (idx, fact) in world.facts().iter().enumerate() {
        let answer = world.answer(idx);
        if let Some((_, earlier)) = told.insert(answer, (idx, fact)) {
            panic!("{earlier:?} and {fact:?} have one answer");
        }
    }
    assert_eq!(told.len(), 1178);
}

/// The repository's copies are the generator's bytes: nobody has edited one.
#[test]
fn kept_files_are_what_the_generator_writes() {
    let data = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data");
    let files = small_files(&world(), SEED);
    assert_eq!(files.len(), 8);
    let mut n_bytes = BTreeMap::new();
    for file in &files {
        let path = data.join(file.kept_at);
        let kept = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert!(kept == file.bytes, "{} is not the generator's: see data/README.md", file.kept_at);
        let (folder, _) = file.kept_at.split_once('/').expect("a folder and a name");
        *n_bytes.entry(folder).or_insert(0) += kept.len();
    }
    assert!(n_bytes["tiny"] < 700_000 && n_bytes["json_task"] < 200_000, "{n_bytes:?}");
    for (folder, n_files) in [("tiny", 6), ("json_task", 2)] {
        let found = std::fs::read_dir(data.join(folder)).expect("the folder was just read").count();
        assert_eq!(found, n_files, "files in data/{folder}");
    }
}
