//! A byte-level BPE vocabulary from texts.
//!
//! Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", 2016, over GPT-2's byte alphabet and its
//! word pattern. The alphabet holds all 256 bytes, so every text can be written. Of pairs that occur equally often the one
//! with the lower ids is merged first, so equal texts in any order give equal bytes.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap};

use serde_json::{Map, Value, json};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

/// Bytes of the alphabet.
const N_BYTES: usize = 256;

/// A pair that occurs once is no pattern: it would fill the vocabulary with what one text says.
const PAIR_COUNT_MIN: i64 = 2;

/// What a vocabulary should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VocabSpec {
    size: usize,
    specials: Vec<String>,
}

/// Why there is no such vocabulary.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum VocabSpecError {
    /// Too small for what it must hold.
    #[error("a vocabulary of {size} cannot hold 256 bytes and {specials} special tokens")]
    TooSmall {
        /// The size asked for.
        size: usize,
        /// Number of special tokens.
        specials: usize,
    },
    /// A special token that is empty, given twice, or a byte.
    #[error("special token {0:?} is empty, given twice, or the name of a byte")]
    Special(String),
}

impl VocabSpec {
    /// A vocabulary of `size` tokens, of which `specials` are the first.
    ///
    /// # Errors
    /// See [`VocabSpecError`].
    pub fn new(size: usize, specials: Vec<String>) -> Result<Self, VocabSpecError> {
        let n_specials = specials.len();
        if size < N_BYTES + n_specials {
            return Err(VocabSpecError::TooSmall { size, specials: n_specials });
        }
        let mut seen = BTreeSet::new();
        for special in &specials {
            if special.chars().count() < 2 || !seen.insert(special) {
                return Err(VocabSpecError::Special(special.clone()));
            }
        }
        Ok(VocabSpec { size, specials })
    }
}

type Pair = (u32, u32);

/// The bytes of a `tokenizer.json` for `texts`. Ids: the special tokens in the order of `spec`, the bytes, the merges. Has
/// fewer tokens than asked for when the texts have no pair left that occurs twice.
pub fn train_vocab<T: AsRef<str>>(texts: impl IntoIterator<Item = T>, spec: &VocabSpec) -> Vec<u8> {
    let mut trainer = Trainer::new(words(texts), spec);
    while trainer.tokens.len() < spec.size {
        let Some(pair) = trainer.next() else { break };
        trainer.merge(pair);
    }
    let json = trainer.into_json(&spec.specials);
    let mut bytes = serde_json::to_vec_pretty(&json).expect("a JSON value has only string keys");
    bytes.push(b'\n');
    bytes
}

fn pre_tokenizer() -> ByteLevel {
    ByteLevel::new(false, true, true)
}

/// Words of the texts in the byte alphabet, with the number of times each occurs.
fn words<T: AsRef<str>>(texts: impl IntoIterator<Item = T>) -> BTreeMap<String, i64> {
    let pre_tokenizer = pre_tokenizer();
    let mut counts: HashMap<String, i64> = HashMap::new();
    for text in texts {
        let mut split = PreTokenizedString::from(text.as_ref());
        pre_tokenizer
            .pre_tokenize(&mut split)
            .expect("the word pattern is a constant and does not backtrack");
        for (word, ..) in split.get_splits(OffsetReferential::Normalized, OffsetType::None) {
            match counts.get_mut(word) {
                Some(count) => *count += 1,
                None => {
                    counts.insert(word.to_owned(), 1);
                }
            }
        }
    }
    counts.into_iter().collect()
}

struct Trainer {
    /// Text of each token.
    tokens: Vec<String>,
    ids: HashMap<String, u32>,
    merges: Vec<Pair>,
    /// Each distinct word as tokens, and how often it occurs.
    words: Vec<(Vec<u32>, i64)>,
    /// How often each pair stands in the words, and in which.
    pairs: HashMap<Pair, (i64, BTreeSet<usize>)>,
    /// Candidates; one whose count is no longer true is put back with the true one.
    heap: BinaryHeap<(i64, Reverse<Pair>)>,
}

impl Trainer {
    fn new(words: BTreeMap<String, i64>, spec: &VocabSpec) -> Self {
        let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
        alphabet.sort_unstable();
        let mut tokens = spec.specials.clone();
        tokens.extend(alphabet.iter().map(char::to_string));
        let ids = |(id, token): (usize, &String)| (token.clone(), id as u32);
        let ids: HashMap<String, u32> = tokens.iter().enumerate().map(ids).collect();
        let words = words
            .into_iter()
            .map(|(word, n)| (word.chars().map(|c| ids[&c.to_string()]).collect(), n))
            .collect();
        let mut trainer = Trainer {
            tokens,
            ids,
            merges: Vec::new(),
            words,
            pairs: HashMap::new(),
            heap: BinaryHeap::new(),
        };
        for word in 0..trainer.words.len() {
            trainer.count(word, 1);
        }
        trainer.heap = trainer.pairs.iter().map(|(pair, (n, _))| (*n, Reverse(*pair))).collect();
        trainer
    }

    /// Adds the pairs of a word to the counts, or takes them away.
    fn count(&mut self, word: usize, sign: i64) {
        let (tokens, n) = &self.words[word];
        for pair in tokens.windows(2) {
            let entry = self.pairs.entry((pair[0], pair[1])).or_default();
            entry.0 += sign * n;
            if sign > 0 {
                entry.1.insert(word);
            } else {
                entry.1.remove(&word);
            }
        }
    }

    /// The pair that occurs most often.
    fn next(&mut self) -> Option<Pair> {
        while let Some((n, Reverse(pair))) = self.heap.pop() {
            let now = self.pairs.get(&pair).map_or(0, |(now, _)| *now);
            if now == n && n >= PAIR_COUNT_MIN {
                return Some(pair);
            }
            if now >= PAIR_COUNT_MIN && now != n {
                self.heap.push((now, Reverse(pair)));
            }
        }
        None
    }

    fn merge(&mut self, pair: Pair) {
        let text = format!("{}{}", self.tokens[pair.0 as usize], self.tokens[pair.1 as usize]);
        let id = *self.ids.entry(text.clone()).or_insert_with(|| {
            self.tokens.push(text);
            self.tokens.len() as u32 - 1
        });
        self.merges.push(pair);
        let touched = self.pairs.get(&pair).map(|(_, words)| words.clone());
        let mut grown = BTreeSet::new();
        for word in touched.unwrap_or_default() {
            self.count(word, -1);
            let merged = replace(&self.words[word].0, pair, id);
            grown.extend(merged.windows(2).filter(|p| p.contains(&id)).map(|p| (p[0], p[1])));
            self.words[word].0 = merged;
            self.count(word, 1);
        }
        for pair in grown {
            self.heap.push((self.pairs[&pair].0, Reverse(pair)));
        }
    }

    fn into_json(self, specials: &[String]) -> Value {
        let added: Vec<Value> = specials
            .iter()
            .enumerate()
            .map(|(id, content)| {
                json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                       "rstrip": false, "normalized": false, "special": true})
            })
            .collect();
        let merges: Vec<[&String; 2]> = self
            .merges
            .iter()
            .map(|(a, b)| [&self.tokens[*a as usize], &self.tokens[*b as usize]])
            .collect();
        let vocab: Map<String, Value> =
            self.tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
        let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false,
                                "trim_offsets": true, "use_regex": true});
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": null,
            "pre_tokenizer": byte_level,
            "post_processor": null,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": null,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": false,
                "byte_fallback": false,
                "ignore_merges": false,
                "vocab": vocab,
                "merges": merges,
            },
        })
    }
}

/// `word` with `pair` replaced by `id`, from the left.
fn replace(word: &[u32], pair: Pair, id: u32) -> Vec<u32> {
    let mut merged = Vec::with_capacity(word.len());
    let mut at = 0;
    while at < word.len() {
        if at + 1 < word.len() && (word[at], word[at + 1]) == pair {
            merged.push(id);
            at += 2;
        } else {
            merged.push(word[at]);
            at += 1;
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Vocab;

    fn spec(size: usize) -> VocabSpec {
        VocabSpec::new(size, vec!["<|end|>".into(), "<|pad|>".into()]).unwrap()
    }

    const TEXTS: [&str; 4] = [
        "the cat sat on the mat, and the cat sat on the hat",
        "Der Bär läßt grüßen: äöü äöü",
        "1 plus 2 is 3; 10 plus 20 is 30",
        "日本語 日本語 🐈🐈",
    ];

    #[test]
    fn ids_are_specials_then_bytes_then_merges() {
        let vocab = Vocab::from_json(&train_vocab(TEXTS, &spec(280))).unwrap();
        assert_eq!(vocab.size(), 280);
        assert_eq!((vocab.id_of("<|end|>"), vocab.id_of("<|pad|>")), (Some(0), Some(1)));
        assert_eq!((vocab.id_of("!"), vocab.id_of("~")), (Some(2), Some(95)));
        assert!(vocab.id_of("Ġthe").is_some_and(|id| id >= 258));
    }

    #[test]
    fn every_text_is_written_and_read_back() {
        let vocab = Vocab::from_json(&train_vocab(TEXTS, &spec(300))).unwrap();
        let odd = ["\0\u{1}\u{7f}", "नमस्ते", "a\r\n\tb  c", "<|end|>", ""];
        for text in TEXTS.into_iter().chain(odd) {
            let ids = vocab.encode_text(text).unwrap();
            assert_eq!(vocab.decode(&ids, false).unwrap(), text);
            assert!(ids.iter().all(|id| *id >= 2), "no special token in {text:?}");
        }
    }

    #[test]
    fn the_order_of_texts_does_not_matter() {
        let reversed = TEXTS.into_iter().rev();
        assert_eq!(train_vocab(TEXTS, &spec(300)), train_vocab(reversed, &spec(300)));
    }

    #[test]
    fn texts_without_pairs_give_the_bytes_alone() {
        let none: [&str; 0] = [];
        assert_eq!(Vocab::from_json(&train_vocab(none, &spec(999))).unwrap().size(), 258);
    }

    #[test]
    fn a_vocabulary_that_cannot_be_is_refused() {
        let check = |size, specials: &[&str], message: &str| {
            let specials = specials.iter().map(|s| (*s).to_owned()).collect();
            let error = VocabSpec::new(size, specials).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        };
        check(256, &["<a>"], "256 bytes and 1 special");
        check(300, &["<a>", "<a>"], "given twice");
        check(300, &[""], "is empty");
        check(300, &["a"], "name of a byte");
    }
}
