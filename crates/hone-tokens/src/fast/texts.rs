//! The tokens of a vocabulary: a text for each id, and an id for each text.

use std::borrow::Cow;
use std::hash::{BuildHasher, RandomState};

/// Ids may leave gaps, but no more than this many for each token; a table over sparser ids would be a gift to whoever writes
/// one token with the id 4,000,000,000.
const GAPS_MAX: usize = 8;

/// A slot of the index that holds no id.
const FREE: u32 = u32::MAX;

/// Tokens by id and by text.
pub(crate) struct Texts {
    all: String,
    /// Where the text of each id lies; empty for an id that is not used.
    spans: Vec<(u32, u32)>,
    /// Ids by the hash of their text, with linear probing.
    index: Vec<u32>,
    hasher: RandomState,
}

impl Texts {
    /// The table, or `None` for entries that are no plain table: an id or a text twice, an empty text, ids far apart.
    pub(crate) fn new(entries: &[(Cow<'_, str>, u32)]) -> Option<Self> {
        let highest = entries.iter().map(|(_, id)| *id).max()? as usize;
        let n_bytes: usize = entries.iter().map(|(text, _)| text.len()).sum();
        if highest > (entries.len() + 1024) * GAPS_MAX || n_bytes > u32::MAX as usize {
            return None;
        }
        let mut texts = Texts {
            all: String::with_capacity(n_bytes),
            spans: vec![(0, 0); highest + 1],
            index: vec![FREE; (entries.len() * 2).next_power_of_two()],
            hasher: RandomState::new(),
        };
        for (text, id) in entries {
            let slot = texts.slot(text);
            let span = &mut texts.spans[*id as usize];
            if text.is_empty() || span.1 != 0 || texts.index[slot] != FREE {
                return None;
            }
            *span = (texts.all.len() as u32, (texts.all.len() + text.len()) as u32);
            texts.all.push_str(text);
            texts.index[slot] = *id;
        }
        Some(texts)
    }

    /// The text of an id.
    pub(crate) fn text(&self, id: u32) -> Option<&str> {
        let (start, end) = *self.spans.get(id as usize)?;
        (start < end).then(|| &self.all[start as usize..end as usize])
    }

    /// The id of a text.
    pub(crate) fn id(&self, text: &str) -> Option<u32> {
        let id = self.index[self.slot(text)];
        (id != FREE).then_some(id)
    }

    /// The highest id and one.
    pub(crate) fn size(&self) -> usize {
        self.spans.len()
    }

    /// The slot that holds `text`, or the free one where it would be put. There is always a free one: the index is twice as
    /// long as the table.
    fn slot(&self, text: &str) -> usize {
        let mask = self.index.len() - 1;
        let mut slot = self.hasher.hash_one(text) as usize & mask;
        while self.index[slot] != FREE && self.text(self.index[slot]) != Some(text) {
            slot = (slot + 1) & mask;
        }
        slot
    }
}
