//! Packs from the rows that were put aside: found by lengths alone, filled by reading the disk, written in order.

use std::ops::Range;

use hone_cli::{Context, Failure};
use hone_schema::{Pack, Split};
use hone_store::{Draft, IpcFile};
use hone_tokens::{Bins, by_length, pack, padding_share};
use rayon::prelude::*;

use crate::args::Config;
use crate::conserve::Multiset;
use crate::record::Aside;
use crate::tally::Tally;

/// Tokens written at a time, and packs, where those are short.
const TOKENS_A_BATCH: u64 = 1 << 19;
const PACKS_A_BATCH: usize = 8192;

/// Rows that are sorted by length together where they are not packed: far more than any batch, and a small part of a large set.
const BUCKET_WINDOW: usize = 8192;

/// Sizes of padded batches that the report speaks of.
const PADDED_BATCHES: [usize; 2] = [8, 32];

/// Packs the rows of a split, and writes them; `came_in` are their tokens as they were made.
pub(crate) fn write(
    ctx: &Context,
    draft: &Draft,
    config: &Config,
    (split, aside, came_in): (Split, &Aside, Multiset),
    tally: &mut Tally,
) -> Result<(), Failure> {
    let bins = lay(config, &aside.lens);
    if bins.len() == aside.lens.len() {
        let lens = || bins.iter().flatten().map(|row| aside.lens[*row as usize]);
        let shares = PADDED_BATCHES.map(|n| (n, padding_share(lens(), n)));
        tally.padding(split, &shares);
    }
    let mut file = draft.ipc(&format!("{split}.arrow"), Pack::schema())?;
    let mut progress = ctx.progress(bins.len() as u64, "packs");
    let mut came_out = Multiset::default();
    let mut range = batch(&bins, &aside.lens, 0);
    let mut packs = fill(aside, &bins, range.clone())?;
    while !range.is_empty() {
        if let Some(exit) = ctx.stop() {
            return Err(Failure::stopped(exit));
        }
        // The next packs are filled while these are hashed and written.
        let next = batch(&bins, &aside.lens, range.end);
        let (written, filled) =
            rayon::join(|| write_batch(&mut file, &packs), || fill(aside, &bins, next.clone()));
        came_out = came_out.and(written?);
        tally.packs(split, &packs);
        progress.inc(packs.len() as u64);
        (packs, range) = (filled?, next);
    }
    progress.finish();
    came_in.check(&came_out, split)?;
    Ok(file.finish()?)
}

fn lay(config: &Config, lens: &[u32]) -> Bins {
    if config.length_buckets {
        Bins::one_each(by_length(lens, BUCKET_WINDOW))
    } else {
        pack(lens, config.max_len, config.packing)
    }
}

/// The packs from `start` on that are written together: a function of the lengths, since it decides bytes.
fn batch(bins: &Bins, lens: &[u32], start: usize) -> Range<usize> {
    let mut n_tokens = 0;
    let mut end = start;
    while end < bins.len() && end - start < PACKS_A_BATCH && n_tokens < TOKENS_A_BATCH {
        n_tokens += bins.docs(end).iter().map(|row| u64::from(lens[*row as usize])).sum::<u64>();
        end += 1;
    }
    start..end
}

fn fill(aside: &Aside, bins: &Bins, range: Range<usize>) -> Result<Vec<Pack>, Failure> {
    range.into_par_iter().map(|idx| assemble(aside, bins.docs(idx))).collect()
}

fn assemble(aside: &Aside, rows: &[u32]) -> Result<Pack, Failure> {
    let n_tokens = rows.iter().map(|row| aside.lens[*row as usize] as usize).sum();
    let mut pack = Pack::with_capacity(n_tokens);
    for row in rows {
        let record = aside.record(*row)?;
        pack.input_ids.extend(record.ids);
        pack.loss_weight.extend(record.weights);
        pack.roles.append(&record.roles);
        pack.docs.push(record.doc);
    }
    Ok(pack)
}

/// Writes packs and counts what was written.
fn write_batch(file: &mut IpcFile, packs: &[Pack]) -> Result<Multiset, Failure> {
    file.write(&Pack::to_batch(packs)?)?;
    Ok(packs.par_iter().map(Multiset::of_pack).reduce(Multiset::default, Multiset::and))
}
