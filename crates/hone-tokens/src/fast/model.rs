//! The model: a word's first symbols, and what becomes of them.

use rayon::prelude::*;

use crate::fast::joins::Joins;
use crate::fast::json;
use crate::fast::merges::{Merges, Word};
use crate::fast::texts::Texts;

/// What a word is made of before anything is merged.
enum Alphabet {
    /// Bytes. One that is no token is dropped, as in the reference: families whose vocabulary was trained on clean text lack
    /// bytes that begin characters of the empty planes.
    Bytes(Box<[Option<u32>; 256]>),
    /// Characters.
    Characters {
        /// The tokens of the most usual ones.
        ascii: Box<[Option<u32>; 128]>,
        /// Tokens for the bytes of characters that are none.
        bytes: Option<Box<[Option<u32>; 256]>>,
        /// The token for what is none at all.
        unknown: Option<u32>,
        /// Whether neighbours that are unknown become one.
        fuses: bool,
    },
}

impl Alphabet {
    fn bytes(model: &json::Model<'_>, texts: &Texts) -> Option<Self> {
        let id = |byte: usize| texts.id(letter(byte as u8).encode_utf8(&mut [0; 4]));
        let ids: Box<[Option<u32>; 256]> = Box::new(std::array::from_fn(id));
        let can_be_lacking = model.unk_token.is_none() && !model.byte_fallback.unwrap_or(false);
        (can_be_lacking || ids.iter().all(Option::is_some)).then_some(Alphabet::Bytes(ids))
    }

    fn characters(model: &json::Model<'_>, texts: &Texts) -> Option<Self> {
        let bytes = || Box::new(std::array::from_fn(|b| texts.id(&format!("<0x{b:02X}>"))));
        let id = |c: usize| texts.id(char::from(c as u8).encode_utf8(&mut [0; 4]));
        Some(Alphabet::Characters {
            ascii: Box::new(std::array::from_fn(id)),
            bytes: model.byte_fallback.unwrap_or(false).then(bytes),
            unknown: match &model.unk_token {
                Some(token) => Some(texts.id(token)?),
                None => None,
            },
            fuses: model.fuse_unk.unwrap_or(false),
        })
    }
}

/// A BPE model.
pub(crate) struct Model {
    pub(crate) texts: Texts,
    merges: Merges,
    alphabet: Alphabet,
    /// Whether a word that is a token is that token, whatever its merges say.
    whole_words: bool,
    /// Where words can be cut that come uncut.
    pub(crate) joins: Option<Joins>,
}

impl Model {
    /// Compiles the model of a `tokenizer.json`, or says that it is not of the kind that can be.
    /// `mark` is what blanks are written as, if they are.
    pub(crate) fn new(model: &json::Model<'_>, by_bytes: bool, mark: Option<char>) -> Option<Self> {
        let is_empty = |affix: &Option<String>| affix.as_deref().unwrap_or("").is_empty();
        if model.kind != "BPE"
            || model.dropout.is_some_and(|share| share != 0.0)
            || !is_empty(&model.continuing_subword_prefix)
            || !is_empty(&model.end_of_word_suffix)
        {
            return None;
        }
        let texts = Texts::new(&model.vocab.0)?;
        let alphabet = match by_bytes {
            true => Alphabet::bytes(model, &texts)?,
            false => Alphabet::characters(model, &texts)?,
        };
        let whole_words = model.ignore_merges.unwrap_or(false);
        // Where something may be dropped, offsets move up to the end of the word, and it matters which that is.
        let drops = model.unk_token.is_none();
        let joins = mark.filter(|_| !by_bytes && !whole_words && !drops);
        let joins = joins.map(|mark| Joins::new(model, &texts, mark));
        // Looking the texts up is most of the work.
        let ids = model.merges.0.par_iter().map_init(String::new, |whole, (left, right)| {
            whole.clear();
            whole.push_str(left);
            whole.push_str(right);
            Some([texts.id(left)?, texts.id(right)?, texts.id(whole)?])
        });
        let ids: Vec<[u32; 3]> = ids.collect::<Option<_>>()?;
        let mut merges = Merges::with_capacity(ids.len());
        for (rank, [left, right, whole]) in ids.into_iter().enumerate() {
            merges.insert(left, right, rank as u32, whole);
        }
        Some(Model { texts, merges, alphabet, whole_words, joins })
    }

    /// Puts the tokens of `text`, which is not empty, into `word`. Returns whether they are all of it: nothing was dropped.
    pub(crate) fn tokens(&self, text: &str, word: &mut Word) -> bool {
        word.symbols.clear();
        let mut is_whole = true;
        match &self.alphabet {
            Alphabet::Bytes(ids) => {
                if self.whole_words {
                    let letters: String = text.bytes().map(letter).collect();
                    if let Some(id) = self.texts.id(&letters) {
                        word.symbols.push((id, text.len() as u32));
                        return true;
                    }
                }
                let mut len = 0;
                for byte in text.bytes() {
                    len += 1;
                    // The next token of its character has the bytes that are dropped.
                    if let Some(id) = ids[byte as usize] {
                        word.symbols.push((id, len));
                        len = 0;
                    } else {
                        is_whole = false;
                    }
                }
            }
            Alphabet::Characters { .. } => {
                if let Some(id) = self.texts.id(text).filter(|_| self.whole_words) {
                    word.symbols.push((id, text.len() as u32));
                    return true;
                }
                is_whole = self.characters(text, word);
            }
        }
        word.merge(&self.merges);
        is_whole
    }

    /// As the reference does it, to the letter: bytes do not end a run of unknown characters before them, so that the run's
    /// token comes behind theirs; and what is unknown, where there is no token for that, is dropped. Returns whether nothing was.
    fn characters(&self, text: &str, word: &mut Word) -> bool {
        let Alphabet::Characters { ascii, bytes, unknown, fuses } = &self.alphabet else {
            return true;
        };
        let mut is_whole = true;
        let mut pending: Option<(u32, u32)> = None;
        let mut buffer = [0; 4];
        for c in text.chars() {
            let c = &*c.encode_utf8(&mut buffer);
            let len = c.len() as u32;
            let id = match c.as_bytes() {
                [byte] => ascii[*byte as usize],
                _ => self.texts.id(c),
            };
            if let Some(id) = id {
                word.symbols.extend(pending.take());
                word.symbols.push((id, len));
                continue;
            }
            let bytes =
                bytes.as_ref().filter(|bytes| c.bytes().all(|b| bytes[b as usize].is_some()));
            if let Some(bytes) = bytes {
                word.symbols.extend(c.bytes().filter_map(|b| Some((bytes[b as usize]?, 1))));
                continue;
            }
            let Some(id) = *unknown else {
                is_whole = false;
                continue;
            };
            pending = match pending {
                Some((id, run)) if *fuses => Some((id, run + len)),
                before => {
                    word.symbols.extend(before);
                    Some((id, len))
                }
            };
        }
        word.symbols.extend(pending);
        is_whole
    }
}

/// The letter that a byte-level vocabulary writes a byte as: itself if that can be seen, else one from U+0100 on.
fn letter(byte: u8) -> char {
    let shifted = |n: u8| char::from_u32(256 + u32::from(n)).expect("below the surrogates");
    match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
        0..=b' ' => shifted(byte),
        0x7f..=0xa0 => shifted(byte - 0x7f + 33),
        0xad => shifted(67),
    }
}
