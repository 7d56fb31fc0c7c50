//! What short words became, so that a word is merged once and not each time that it is said.
//!
//! The cache is a table of fixed size, and what does not fit takes the place of something older; no text makes it grow.

/// Longest word that is kept, in bytes: a key holds it whole, with its length in the last byte.
pub(crate) const WORD_BYTES_MAX: usize = 15;

/// Places for words; twice as many as 50,000 instructions have different words.
const PLACES: usize = 1 << 16;

/// A word may stand in one of so many places.
const WAYS: usize = 4;

/// Most tokens of words that have several, all words together.
const TOKENS_MAX: usize = 1 << 18;

/// Where the tokens of a word lie; for a word of one token the token itself.
#[derive(Clone, Copy, Default)]
struct Place {
    key: u128,
    at: u32,
    n: u32,
}

/// Words and their tokens.
pub(crate) struct Cache {
    places: Vec<Place>,
    /// Id and length of each token of the words that have several.
    tokens: Vec<(u32, u32)>,
    /// Which of the ways is given up next.
    turn: usize,
}

/// What the cache knows of a word.
pub(crate) enum Found<'a> {
    /// It is one token.
    One(u32),
    /// It is these tokens, with their lengths.
    Several(&'a [(u32, u32)]),
    /// Nothing.
    Nothing,
}

impl Cache {
    /// An empty cache.
    pub(crate) fn new() -> Self {
        Cache { places: vec![Place::default(); PLACES], tokens: Vec::new(), turn: 0 }
    }

    /// The key of the word `text[start..end]`; `None` for a word that is too long.
    #[inline]
    pub(crate) fn key(text: &[u8], start: usize, end: usize) -> Option<u128> {
        let len = end - start;
        if len > WORD_BYTES_MAX {
            return None;
        }
        let word = match text.get(start..start + 16) {
            Some(bytes) => {
                let bytes: [u8; 16] = bytes.try_into().expect("the slice has 16 bytes");
                u128::from_le_bytes(bytes) & ((1 << (len * 8)) - 1)
            }
            None => {
                let mut bytes = [0; 16];
                bytes[..len].copy_from_slice(&text[start..end]);
                u128::from_le_bytes(bytes)
            }
        };
        Some(word | (len as u128) << 120)
    }

    fn set(key: u128) -> usize {
        let (low, high) = (key as u64, (key >> 64) as u64);
        let product =
            u128::from(low ^ 0x9e37_79b9_7f4a_7c15) * u128::from(high ^ 0xd6e8_feb8_6659_fd93);
        ((product >> 64) as u64 ^ product as u64) as usize & (PLACES - 1) & !(WAYS - 1)
    }

    /// The tokens of a word.
    #[inline]
    pub(crate) fn find(&self, key: u128) -> Found<'_> {
        let set = Self::set(key);
        match self.places[set..set + WAYS].iter().find(|place| place.key == key) {
            None => Found::Nothing,
            Some(Place { at, n: 1, .. }) => Found::One(*at),
            Some(Place { at, n, .. }) => {
                Found::Several(&self.tokens[*at as usize..*at as usize + *n as usize])
            }
        }
    }

    /// Keeps the tokens of a word of which nothing was dropped.
    pub(crate) fn keep(&mut self, key: u128, tokens: &[(u32, u32)]) {
        if self.tokens.len() + tokens.len() > TOKENS_MAX {
            self.tokens.clear();
            self.places.fill(Place::default());
        }
        let at = match tokens {
            [(id, _)] => *id,
            [] => return,
            _ => {
                self.tokens.extend_from_slice(tokens);
                (self.tokens.len() - tokens.len()) as u32
            }
        };
        let set = Self::set(key);
        let free = self.places[set..set + WAYS].iter().position(|place| place.key == 0);
        let way = free.unwrap_or_else(|| {
            self.turn += 1;
            self.turn % WAYS
        });
        self.places[set + way] = Place { key, at, n: tokens.len() as u32 };
    }
}
