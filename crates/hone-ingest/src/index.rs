//! The index of all usable rows: what is decided on, without the rows themselves.

use crate::convert::Row;
use hone_schema::sha256;

/// One entry a row, in the order of the sources and their rows.
#[derive(Clone, Debug, Default)]
pub(crate) struct Index {
    pub(crate) source: Vec<u32>,
    /// Orders the rows for the split: a row's place on the line from 0 to 2^64.
    pub(crate) split_hash: Vec<u64>,
    /// Orders the rows for sampling, independent of the split.
    pub(crate) sample_hash: Vec<u64>,
    pub(crate) content: [Vec<u64>; 2],
    pub(crate) id: [Vec<u64>; 2],
    pub(crate) n_bytes: Vec<u64>,
    pub(crate) n_messages: Vec<u32>,
}

/// The hashes of one row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    /// The id it came with, else the first 32 digits of its content's hash.
    pub(crate) id: String,
    id_hash: [u64; 2],
    content: [u64; 2],
}

impl Identity {
    pub(crate) fn of(row: &Row) -> Self {
        let content = row.content();
        let id = row.id.clone().unwrap_or_else(|| content.as_str()[..32].to_owned());
        let id_hash = words(sha256(id.as_bytes()).as_str());
        Identity { id, id_hash, content: words(content.as_str()) }
    }

    /// Whether this is the row that the index has at `at`.
    pub(crate) fn is_at(&self, index: &Index, at: usize) -> bool {
        let there =
            |words: &[Vec<u64>; 2]| words[0].get(at).copied().zip(words[1].get(at).copied());
        there(&index.content) == Some((self.content[0], self.content[1]))
            && there(&index.id) == Some((self.id_hash[0], self.id_hash[1]))
    }
}

/// The first 128 bits of a hash in hexadecimal.
fn words(hex: &str) -> [u64; 2] {
    let word =
        |at: usize| u64::from_str_radix(&hex[at..at + 16], 16).expect("a hash is hexadecimal");
    [word(0), word(16)]
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014): every bit of the input moves every bit of
/// the output.
fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Index {
    pub(crate) fn len(&self) -> usize {
        self.source.len()
    }

    /// Enters the next row.
    pub(crate) fn push(&mut self, source: u32, seed: u64, identity: &Identity, row: &Row) {
        let drawn = |purpose: u64| mix(identity.id_hash[0] ^ mix(mix(seed) ^ purpose));
        self.source.push(source);
        self.split_hash.push(drawn(1));
        self.sample_hash.push(drawn(2));
        for word in 0..2 {
            self.content[word].push(identity.content[word]);
            self.id[word].push(identity.id_hash[word]);
        }
        self.n_bytes.push(row.n_bytes());
        self.n_messages.push(row.n_messages);
    }
}
