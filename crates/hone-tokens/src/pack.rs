//! Documents into packs, by their lengths alone: indexes in, indexes out.
//!
//! **Best fit** looks at all documents at once: the longest first, each into the fullest pack that still takes it, into a new one
//! when none does. At most 11/9 of the best number of packs and 6/9 of one more (Johnson, 1973); in practice within a percent of
//! what the tokens need. Equal lengths keep their order, and of packs that are equally full the one is filled that has been so
//! for the longest time.
//!
//! **Sequential** (next fit) keeps the order of the documents: each into the pack of the one before it, into a new one when that is
//! full.
//!
//! Both are a function of the lengths, whatever the number of threads. A document costs 12 bytes while packs are being found and 4
//! afterwards, a pack 16: five million documents of an instruction set take 80 MB.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// How documents share packs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Packing {
    /// Longest first, each into the fullest pack that takes it: fewest packs.
    #[default]
    BestFit,
    /// In their order, each into the pack of the one before it.
    Sequential,
    /// Every document a pack of its own.
    None,
}

/// Which documents each pack holds; every document is in exactly one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bins {
    /// Documents, pack by pack.
    docs: Vec<u32>,
    /// Where each pack starts in `docs`, and behind the last where it ends.
    starts: Vec<u32>,
}

impl Bins {
    /// Number of packs.
    pub fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// Whether there is no pack.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The documents of a pack, in order.
    ///
    /// # Panics
    /// If there is no such pack.
    pub fn docs(&self, pack: usize) -> &[u32] {
        &self.docs[self.starts[pack] as usize..self.starts[pack + 1] as usize]
    }

    /// The packs, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[u32]> {
        self.starts.windows(2).map(|ends| &self.docs[ends[0] as usize..ends[1] as usize])
    }

    /// Every document a pack of its own, in this order.
    pub fn one_each(docs: Vec<u32>) -> Self {
        let starts = (0..=docs.len() as u32).collect();
        Bins { docs, starts }
    }
}

/// Packs of `capacity` tokens for documents of `lens` tokens. O(n log n).
///
/// # Panics
/// If a document does not fit into a pack or is empty, or there are 2^32 of them: rows are cut and certified before.
pub fn pack(lens: &[u32], capacity: u32, packing: Packing) -> Bins {
    assert!(
        lens.iter().all(|len| (1..=capacity).contains(len)),
        "documents have at least one token and fit into a pack"
    );
    assert!(lens.len() < NONE as usize, "documents are counted in 32 bits");
    match packing {
        Packing::BestFit => best_fit(lens, capacity),
        Packing::Sequential => sequential(lens, capacity),
        Packing::None => Bins::one_each((0..lens.len() as u32).collect()),
    }
}

/// The documents in an order in which neighbours have similar lengths: sorted by length within windows of `window` documents, so that
/// whoever pads a few neighbours to the longest of them pads little, and what comes first still comes early.
///
/// # Panics
/// If `window` is 0.
pub fn by_length(lens: &[u32], window: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..lens.len() as u32).collect();
    for window in order.chunks_mut(window) {
        window.sort_unstable_by_key(|doc| (lens[*doc as usize], *doc));
    }
    order
}

/// The share of a padded batch that is padding, when every `n` neighbours are padded to the longest of them.
pub fn padding_share(lens: impl IntoIterator<Item = u32>, n: usize) -> f64 {
    let (mut tokens, mut space) = (0u64, 0u64);
    let (mut longest, mut in_batch) = (0u64, 0u64);
    for len in lens {
        tokens += u64::from(len);
        longest = longest.max(u64::from(len));
        in_batch += 1;
        if in_batch == n as u64 {
            space += longest * in_batch;
            (longest, in_batch) = (0, 0);
        }
    }
    space += longest * in_batch;
    if space == 0 { 0.0 } else { (space - tokens) as f64 / space as f64 }
}

/// No pack.
const NONE: u32 = u32::MAX;

fn best_fit(lens: &[u32], capacity: u32) -> Bins {
    let mut order: Vec<u32> = (0..lens.len() as u32).collect();
    order.sort_unstable_by_key(|doc| (std::cmp::Reverse(lens[*doc as usize]), *doc));
    let mut pack_of = vec![NONE; lens.len()];
    // Packs with space left stand in one queue for each amount of it: first and last by space, then each one's successor.
    let mut queues: BTreeMap<u32, (u32, u32)> = BTreeMap::new();
    let mut next: Vec<u32> = Vec::new();
    for doc in &order {
        let len = lens[*doc as usize];
        let fit = queues.range(len..).next().map(|(space, queue)| (*space, *queue));
        let (space, pack) = match fit {
            Some((space, (first, last))) => {
                if first == last {
                    queues.remove(&space);
                } else {
                    queues.insert(space, (next[first as usize], last));
                }
                (space, first)
            }
            None => {
                next.push(NONE);
                (capacity, next.len() as u32 - 1)
            }
        };
        pack_of[*doc as usize] = pack;
        if space > len {
            let queue = queues.entry(space - len).or_insert((pack, pack));
            if queue.1 != pack {
                next[queue.1 as usize] = pack;
                queue.1 = pack;
            }
        }
    }
    let n_packs = next.len();
    drop((queues, next));
    gather(&order, &pack_of, n_packs)
}

/// Documents by their packs; within a pack they keep the order that they came in.
fn gather(order: &[u32], pack_of: &[u32], n_packs: usize) -> Bins {
    let mut starts = vec![0u32; n_packs + 1];
    for pack in pack_of {
        starts[*pack as usize + 1] += 1;
    }
    for pack in 0..n_packs {
        starts[pack + 1] += starts[pack];
    }
    let mut at = starts.clone();
    let mut docs = vec![0u32; order.len()];
    for doc in order {
        let at = &mut at[pack_of[*doc as usize] as usize];
        docs[*at as usize] = *doc;
        *at += 1;
    }
    Bins { docs, starts }
}

fn sequential(lens: &[u32], capacity: u32) -> Bins {
    let mut starts = Vec::new();
    let mut space = 0;
    for (doc, len) in lens.iter().enumerate() {
        if *len > space {
            starts.push(doc as u32);
            space = capacity;
        }
        space -= len;
    }
    starts.push(lens.len() as u32);
    Bins { docs: (0..lens.len() as u32).collect(), starts }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(packing: Packing, lens: &[u32], capacity: u32, packs: &[&[u32]]) {
        let bins = pack(lens, capacity, packing);
        assert_eq!(bins.iter().collect::<Vec<_>>(), packs);
        assert_eq!((bins.len(), bins.is_empty()), (packs.len(), packs.is_empty()));
        assert!((0..bins.len()).all(|idx| bins.docs(idx) == packs[idx]));
    }

    #[test]
    fn the_longest_goes_first_and_into_the_fullest_pack() {
        check(Packing::BestFit, &[], 8, &[]);
        check(Packing::BestFit, &[8, 8], 8, &[&[0], &[1]]);
        check(Packing::BestFit, &[1, 5, 3, 4, 7], 8, &[&[4, 0], &[1, 2], &[3]]);
        check(Packing::BestFit, &[2, 2, 2, 2], 4, &[&[0, 1], &[2, 3]]);
        check(Packing::BestFit, &[6, 5, 3, 2], 8, &[&[0, 3], &[1, 2]]);
        check(Packing::BestFit, &[5, 5, 5, 3, 3, 3], 8, &[&[0, 3], &[1, 4], &[2, 5]]);
    }

    #[test]
    fn sequential_and_none_keep_the_order() {
        check(Packing::Sequential, &[], 8, &[]);
        check(Packing::Sequential, &[5, 3, 1, 8, 2], 8, &[&[0, 1], &[2], &[3], &[4]]);
        check(Packing::None, &[5, 3], 8, &[&[0], &[1]]);
    }

    #[test]
    fn neighbours_of_similar_length_pad_little() {
        let lens = [9, 1, 8, 2, 7, 3];
        assert_eq!(by_length(&lens, 4), [1, 3, 2, 0, 5, 4]);
        assert_eq!(by_length(&lens, 100), [1, 3, 5, 4, 2, 0]);
        assert_eq!(padding_share(lens, 1), 0.0);
        assert_eq!(padding_share(lens, 2), (48.0 + 2.0 - 2.0 - 30.0) / 48.0);
        assert_eq!(padding_share([4, 4, 2], 2), 0.0);
        assert_eq!(padding_share([], 2), 0.0);
    }

    /// Best fit as one would write it first: every pack is looked at for every document.
    fn plain_best_fit(lens: &[u32], capacity: u32) -> Vec<Vec<u32>> {
        let mut order: Vec<u32> = (0..lens.len() as u32).collect();
        order.sort_by_key(|doc| std::cmp::Reverse(lens[*doc as usize]));
        // Documents, space left, and when it came to have that much.
        let mut packs: Vec<(Vec<u32>, u32, usize)> = Vec::new();
        for (time, doc) in order.into_iter().enumerate() {
            let len = lens[doc as usize];
            let fits = packs.iter_mut().filter(|(_, space, _)| *space >= len);
            match fits.min_by_key(|(_, space, since)| (*space, *since)) {
                Some((docs, space, since)) => {
                    docs.push(doc);
                    (*space, *since) = (*space - len, time);
                }
                None => packs.push((vec![doc], capacity - len, time)),
            }
        }
        packs.into_iter().map(|(docs, ..)| docs).collect()
    }

    proptest! {
        #[test]
        fn no_document_is_lost_or_doubled(lens in prop::collection::vec(1u32..=64, 0..300)) {
            for packing in [Packing::BestFit, Packing::Sequential, Packing::None] {
                let packs = pack(&lens, 64, packing);
                let mut all: Vec<u32> = packs.iter().flatten().copied().collect();
                all.sort_unstable();
                prop_assert_eq!(all, (0..lens.len() as u32).collect::<Vec<_>>());
                let size = |pack: &[u32]| pack.iter().map(|d| lens[*d as usize]).sum::<u32>();
                prop_assert!(packs.iter().all(|pack| size(pack) <= 64));
                // Any two packs together are more than one holds: else the later one's first would be in the earlier.
                let half_empty = packs.iter().filter(|pack| size(pack) <= 32).count();
                prop_assert!(packing != Packing::BestFit || half_empty <= 1, "{} half empty", half_empty);
            }
        }

        #[test]
        fn best_fit_is_its_plain_twin(lens in prop::collection::vec(1u32..=64, 0..300)) {
            let packs = pack(&lens, 64, Packing::BestFit);
            let packs: Vec<Vec<u32>> = packs.iter().map(<[u32]>::to_vec).collect();
            prop_assert_eq!(packs, plain_best_fit(&lens, 64));
        }
    }
}
