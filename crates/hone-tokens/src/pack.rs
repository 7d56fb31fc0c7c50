//! Documents into packs.
//!
//! Best-fit decreasing over all documents at once: the longest first, each into the fullest pack that still takes it, into a
//! new one when none does. At most 11/9 of the best number of packs and 6/9 of one more (Johnson, 1973); in practice within a
//! percent of what the tokens need. Equal lengths keep their order and equal packs are filled oldest first, so the result
//! depends on the lengths alone.

use std::collections::BTreeSet;

use hone_schema::Pack;

use crate::row::Row;

/// Indexes of the documents of each pack, for documents of `lens` tokens and packs of `capacity`. Every document is in
/// exactly one pack. O(n log n).
///
/// # Panics
/// If a document does not fit into a pack or is empty: rows are cut and certified before.
pub fn best_fit(lens: &[u32], capacity: u32) -> Vec<Vec<usize>> {
    assert!(
        lens.iter().all(|len| (1..=capacity).contains(len)),
        "documents have at least one token and fit into a pack"
    );
    let mut order: Vec<usize> = (0..lens.len()).collect();
    order.sort_by_key(|idx| std::cmp::Reverse(lens[*idx]));
    let mut packs: Vec<Vec<usize>> = Vec::new();
    // (space left, pack) of the packs that have space.
    let mut open: BTreeSet<(u32, usize)> = BTreeSet::new();
    for doc in order {
        let len = lens[doc];
        let fit = open.range((len, 0)..).next().copied();
        let (space, pack) = fit.unwrap_or_else(|| {
            packs.push(Vec::new());
            (capacity, packs.len() - 1)
        });
        open.remove(&(space, pack));
        packs[pack].push(doc);
        if space > len {
            open.insert((space - len, pack));
        }
    }
    packs
}

/// Every document a pack of its own, in order.
pub fn one_each(n_docs: usize) -> Vec<Vec<usize>> {
    (0..n_docs).map(|doc| vec![doc]).collect()
}

/// The pack of the rows with the indexes `docs`.
pub fn assemble(rows: &[Row], docs: &[usize]) -> Pack {
    let n = docs.iter().map(|doc| rows[*doc].ids.len()).sum();
    let mut pack = Pack {
        input_ids: Vec::with_capacity(n),
        loss_weight: Vec::with_capacity(n),
        docs: Vec::with_capacity(docs.len()),
    };
    for row in docs.iter().map(|doc| &rows[*doc]) {
        pack.input_ids.extend_from_slice(&row.ids);
        pack.loss_weight.extend_from_slice(&row.weights);
        pack.docs.push(row.doc());
    }
    pack
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(lens: &[u32], capacity: u32, packs: &[&[usize]]) {
        assert_eq!(best_fit(lens, capacity), packs);
    }

    #[test]
    fn the_longest_goes_first_and_into_the_fullest_pack() {
        check(&[], 8, &[]);
        check(&[8, 8], 8, &[&[0], &[1]]);
        check(&[1, 5, 3, 4, 7], 8, &[&[4, 0], &[1, 2], &[3]]);
        check(&[2, 2, 2, 2], 4, &[&[0, 1], &[2, 3]]);
        check(&[6, 5, 3, 2], 8, &[&[0, 3], &[1, 2]]);
    }

    proptest! {
        #[test]
        fn no_document_is_lost_or_doubled(lens in prop::collection::vec(1u32..=64, 0..300)) {
            let packs = best_fit(&lens, 64);
            let mut all: Vec<usize> = packs.iter().flatten().copied().collect();
            all.sort_unstable();
            prop_assert_eq!(all, (0..lens.len()).collect::<Vec<_>>());
            let size = |pack: &Vec<usize>| pack.iter().map(|d| lens[*d]).sum::<u32>();
            prop_assert!(packs.iter().all(|pack| size(pack) <= 64));
            // Any two packs together are more than one holds: else the later one's first would have gone into the earlier.
            let half_empty = packs.iter().filter(|pack| size(pack) <= 32).count();
            prop_assert!(half_empty <= 1, "{half_empty} packs are half empty");
        }
    }
}
