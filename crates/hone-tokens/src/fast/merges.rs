//! Byte-pair merging: of all neighbours that a merge knows, the earliest merge first and of its places the leftmost.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::hash::{BuildHasher, RandomState};

/// The rank of a pair that no merge knows.
const NEVER: u32 = u32::MAX;

/// Words of up to this many symbols are merged by scanning for the least rank, which is quadratic and faster there.
const SCANNED_MAX: usize = 48;

/// What a pair of tokens becomes, and which merge says so.
#[derive(Clone, Copy)]
struct Merge {
    pair: u64,
    rank: u32,
    id: u32,
}

/// The merges, by pair: a hash table with linear probing, at most half full.
pub(crate) struct Merges {
    slots: Vec<Merge>,
    seed: u64,
}

impl Merges {
    /// A table for `n` merges.
    pub(crate) fn with_capacity(n: usize) -> Self {
        let free = Merge { pair: u64::MAX, rank: NEVER, id: 0 };
        // The seed differs from run to run, so that no file can be made whose merges all fall into one place.
        let seed = RandomState::new().hash_one(n) | 1;
        Merges { slots: vec![free; (n * 2).next_power_of_two().max(2)], seed }
    }

    /// Adds a merge; of two for the same pair the later counts, as in the reference.
    pub(crate) fn insert(&mut self, left: u32, right: u32, rank: u32, id: u32) {
        let slot = self.slot(pair_of(left, right));
        self.slots[slot] = Merge { pair: pair_of(left, right), rank, id };
    }

    /// The rank of a pair, [`NEVER`] if there is none, and the id it becomes.
    fn get(&self, left: u32, right: u32) -> (u32, u32) {
        let merge = &self.slots[self.slot(pair_of(left, right))];
        (merge.rank, merge.id)
    }

    fn slot(&self, pair: u64) -> usize {
        let mask = self.slots.len() - 1;
        let product = u128::from(pair ^ self.seed) * 0x9e37_79b9_7f4a_7c15;
        let mut slot = ((product >> 64) as u64 ^ product as u64) as usize & mask;
        while self.slots[slot].pair != pair && self.slots[slot].rank != NEVER {
            slot = (slot + 1) & mask;
        }
        slot
    }
}

fn pair_of(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

/// A word as symbols, each with the bytes it stands for; and room to work in.
#[derive(Default)]
pub(crate) struct Word {
    /// Id and length of each symbol.
    pub(crate) symbols: Vec<(u32, u32)>,
    /// For each symbol the rank of it and the next, and what they become.
    next: Vec<(u32, u32)>,
    heap: BinaryHeap<Reverse<u64>>,
    /// Neighbours of each symbol in the long way.
    links: Vec<(u32, u32)>,
}

impl Word {
    /// Merges until nothing can be merged.
    pub(crate) fn merge(&mut self, merges: &Merges) {
        match self.symbols.len() {
            0 | 1 => {}
            2..=SCANNED_MAX => self.merge_scanning(merges),
            _ => self.merge_with_heap(merges),
        }
    }

    pub(crate) fn merge_scanning(&mut self, merges: &Merges) {
        self.next.clear();
        self.next.extend(self.symbols.windows(2).map(|w| merges.get(w[0].0, w[1].0)));
        loop {
            let (mut at, mut least) = (0, (NEVER, 0));
            for (idx, next) in self.next.iter().enumerate() {
                if next.0 < least.0 {
                    (at, least) = (idx, *next);
                }
            }
            if least.0 == NEVER {
                return;
            }
            let (_, len) = self.symbols.remove(at + 1);
            self.next.remove(at);
            self.symbols[at] = (least.1, self.symbols[at].1 + len);
            if at > 0 {
                self.next[at - 1] = merges.get(self.symbols[at - 1].0, least.1);
            }
            if at < self.next.len() {
                self.next[at] = merges.get(least.1, self.symbols[at + 1].0);
            }
        }
    }

    /// The same in O(n log n): a heap of (rank, place), and neighbours as a list. An entry is stale when the pair at its place
    /// has another rank by now: symbols only grow, so a pair never comes back.
    pub(crate) fn merge_with_heap(&mut self, merges: &Merges) {
        const NONE: u32 = u32::MAX;
        let n = self.symbols.len() as u32;
        self.links.clear();
        self.links
            .extend((0..n).map(|i| (i.wrapping_sub(1), if i + 1 < n { i + 1 } else { NONE })));
        let entry = |rank: u32, at: u32| Reverse(u64::from(rank) << 32 | u64::from(at));
        let mut entries = std::mem::take(&mut self.heap).into_vec();
        entries.clear();
        entries.extend(self.symbols.windows(2).enumerate().filter_map(|(at, w)| {
            let (rank, _) = merges.get(w[0].0, w[1].0);
            (rank != NEVER).then(|| entry(rank, at as u32))
        }));
        let mut heap = BinaryHeap::from(entries);
        while let Some(Reverse(top)) = heap.pop() {
            let (rank, at) = ((top >> 32) as u32, top as u32);
            let (before, after) = self.links[at as usize];
            let symbol = self.symbols[at as usize];
            if symbol.1 == 0 || after == NONE {
                continue;
            }
            let right = self.symbols[after as usize];
            let (found, id) = merges.get(symbol.0, right.0);
            if found != rank {
                continue;
            }
            self.symbols[at as usize] = (id, symbol.1 + right.1);
            self.symbols[after as usize].1 = 0;
            let behind = self.links[after as usize].1;
            self.links[at as usize].1 = behind;
            if behind != NONE {
                self.links[behind as usize].0 = at;
                let (rank, _) = merges.get(id, self.symbols[behind as usize].0);
                if rank != NEVER {
                    heap.push(entry(rank, at));
                }
            }
            if before != NONE {
                let (rank, _) = merges.get(self.symbols[before as usize].0, id);
                if rank != NEVER {
                    heap.push(entry(rank, before));
                }
            }
        }
        self.heap = heap;
        self.symbols.retain(|(_, len)| *len != 0);
    }
}
