//! Which rows are kept, and in which split: relations over the index, in polars.
//!
//! 1. **Split.** The source's own; else by the row's place on the line from 0 to 2^64, which the
//!    seed and its id decide: test up to `test_share`, then eval, then train. A row keeps its split
//!    when others are added or taken away.
//! 2. **Duplicates.** Of rows with equal content one is kept: a held-out one before a trained one
//!    (so that nothing is trained on that is also tested), then the first.
//! 3. **Limit.** The rows of a source first in the order of their sampling hash.
//! 4. **Replay.** So many rows of the replay sources that they are `replay_share` of all train
//!    rows, chosen alike. Those that a source holds out (`eval_rows`) are the last in that order,
//!    so that they stay the same whatever the share.
//!
//! Rows with equal ids but unequal content stay; they share a split (replay rows among themselves:
//! the whole id is held out), and all but the first get a number behind their id.

use std::collections::BTreeMap;

use hone_schema::Split;
use polars::prelude::*;

use crate::index::Index;
use crate::plan::Plan;

/// What becomes of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It goes out in this split; the number is of the rows before it with the same id.
    Keep(Split, u32),
    /// Another row has its content.
    Duplicate,
    /// Its source has a limit.
    OverLimit,
    /// A replay row beyond the share.
    NotSampled,
}

impl Fate {
    /// The reason in the ledger for a row that does not go out.
    pub(crate) fn reason(self) -> Option<&'static str> {
        match self {
            Fate::Keep(..) => None,
            Fate::Duplicate => Some("duplicate"),
            Fate::OverLimit => Some("over limit"),
            Fate::NotSampled => Some("not sampled"),
        }
    }
}

/// Counts of the kept rows of a source in a split.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Stats {
    pub(crate) rows: u64,
    pub(crate) messages: u64,
    pub(crate) bytes: u64,
    pub(crate) longest: u64,
}

/// The decision on every row.
#[derive(Debug)]
pub(crate) struct Selection {
    /// In the order of the index.
    pub(crate) fates: Vec<Fate>,
    /// By index of the source and split.
    pub(crate) stats: BTreeMap<(u32, Split), Stats>,
    /// Rows whose id an earlier kept row has.
    pub(crate) repeated_ids: u64,
    /// Replay rows asked for, and to be had.
    pub(crate) replay: (u64, u64),
}

const SPLITS: [Split; 3] = [Split::Train, Split::Eval, Split::Test];
const AUTO: u32 = 3;

fn code(split: Split) -> u32 {
    SPLITS.iter().position(|s| *s == split).expect("all splits are listed") as u32
}

/// A share of the line from 0 to 2^64.
fn threshold(share: f64) -> u64 {
    // The cast saturates, so a share of 1 is the whole line but its last point.
    (share * 18_446_744_073_709_551_616.0) as u64
}

/// How many replay rows make `share` of all rows beside `others`: r / (r + others) = share.
fn replay_rows(share: f64, others: u64) -> u64 {
    (share / (1.0 - share) * others as f64).round() as u64
}

/// Decides on every row of the index.
///
/// # Errors
/// None that an index can cause; polars' own are passed on.
pub(crate) fn select(index: &Index, plan: &Plan) -> PolarsResult<Selection> {
    let mut fates = vec![Fate::Duplicate; index.len()];
    let all = with_split(index, plan)?.lazy();
    let distinct = if plan.dedup { all.filter(first_of_content()?) } else { all };
    let distinct = distinct.drop(cols(["split_hash", "content_0", "content_1"])).collect()?;
    mark(&mut fates, &distinct, Fate::OverLimit)?;
    let within = distinct
        .lazy()
        .sort(["source", "sample_hash", "seq"], SortMultipleOptions::default())
        .with_row_index("at", None)
        .filter(place_in(&["source"])?.cast(DataType::UInt64).lt(col("limit")))
        .drop(cols(["at", "limit"]));
    let within = held_out(within)?.collect()?;
    mark(&mut fates, &within, Fate::NotSampled)?;
    let is_other = col("replay").not().and(col("split").eq(lit(code(Split::Train))));
    let counts = within.clone().lazy();
    let counts = counts.select([is_other.sum().alias("others"), col("replay").sum()]).collect()?;
    let count = |name| PolarsResult::Ok(counts.column(name)?.u32()?.get(0).unwrap_or_default());
    let (others, to_be_had) = (u64::from(count("others")?), u64::from(count("replay")?));
    let asked = replay_rows(plan.replay_share, others);
    let in_share = place_in(&["replay"])?.cast(DataType::UInt64).lt(lit(asked));
    let kept = within
        .lazy()
        .sort(["replay", "sample_hash", "seq"], SortMultipleOptions::default())
        .with_row_index("at", None)
        .filter(col("replay").not().or(in_share))
        .drop(cols(["at", "sample_hash", "replay"]))
        .sort(["id_0", "id_1", "seq"], SortMultipleOptions::default())
        .with_row_index("at", None)
        .with_column(place_in(&["id_0", "id_1"])?.alias("nth"))
        .collect()?;

    let rows = kept.column("seq")?.u32()?.into_no_null_iter();
    let rows = rows.zip(kept.column("split")?.u32()?.into_no_null_iter());
    let rows = rows.zip(kept.column("nth")?.u32()?.into_no_null_iter());
    let mut repeated_ids = 0;
    for ((seq, split), nth) in rows {
        fates[seq as usize] = Fate::Keep(SPLITS[split as usize], nth);
        repeated_ids += u64::from(nth > 0);
    }
    Ok(Selection { fates, stats: stats(kept)?, repeated_ids, replay: (asked, to_be_had) })
}

fn mark(fates: &mut [Fate], rows: &DataFrame, fate: Fate) -> PolarsResult<()> {
    for seq in rows.column("seq")?.u32()?.into_no_null_iter() {
        fates[seq as usize] = fate;
    }
    Ok(())
}

/// The index as a frame, joined with what the configuration says of its sources, and each row's
/// split.
fn with_split(index: &Index, plan: &Plan) -> PolarsResult<DataFrame> {
    let words =
        |name: &str, values: &[u64]| UInt64Chunked::from_slice(name.into(), values).into_column();
    let small =
        |name: &str, values: &[u32]| UInt32Chunked::from_slice(name.into(), values).into_column();
    let seq: Vec<u32> = (0..index.len() as u32).collect();
    let rows = DataFrame::new(
        index.len(),
        vec![
            small("seq", &seq),
            small("source", &index.source),
            words("split_hash", &index.split_hash),
            words("sample_hash", &index.sample_hash),
            words("content_0", &index.content[0]),
            words("content_1", &index.content[1]),
            words("id_0", &index.id[0]),
            words("id_1", &index.id[1]),
            words("n_bytes", &index.n_bytes),
            small("n_messages", &index.n_messages),
        ],
    )?;
    let ids: Vec<u32> = (0..plan.sources.len() as u32).collect();
    let forced: Vec<u32> = plan.sources.iter().map(|s| s.split.map_or(AUTO, code)).collect();
    let limits: Vec<u64> = plan.sources.iter().map(|s| s.limit.unwrap_or(u64::MAX)).collect();
    let eval_rows: Vec<u64> = plan.sources.iter().map(|s| s.eval_rows).collect();
    let replay: Vec<bool> = plan.sources.iter().map(|s| s.replay).collect();
    let sources = DataFrame::new(
        plan.sources.len(),
        vec![
            small("source", &ids),
            small("forced", &forced),
            words("limit", &limits),
            words("eval_rows", &eval_rows),
            BooleanChunked::from_slice("replay".into(), &replay).into_column(),
        ],
    )?;
    let split = when(col("forced").neq(lit(AUTO)))
        .then(col("forced"))
        .when(col("replay"))
        .then(lit(code(Split::Train)))
        .when(col("split_hash").lt(lit(threshold(plan.test_share))))
        .then(lit(code(Split::Test)))
        .when(col("split_hash").lt(lit(threshold(plan.test_share + plan.eval_share))))
        .then(lit(code(Split::Eval)))
        .otherwise(lit(code(Split::Train)));
    rows.lazy()
        .join(sources.lazy(), [col("source")], [col("source")], JoinArgs::new(JoinType::Inner))
        .with_column(split.alias("split"))
        .sort(["seq"], SortMultipleOptions::default())
        .collect()
}

/// Makes held-out rows of the last of each replay source; rows come in the order of their sampling
/// hash within their source. What shares an id with such a row, in any replay source, is held out
/// with it.
fn held_out(rows: LazyFrame) -> PolarsResult<LazyFrame> {
    let from_end = col("at").max().over([col("source")])? - col("at");
    let is_last = col("replay").and(from_end.cast(DataType::UInt64).lt(col("eval_rows")));
    let of_its_id = col("held").cast(DataType::UInt32).max().over([col("id_0"), col("id_1")])?;
    let is_held = col("replay").and(of_its_id.gt(lit(0u32)));
    let split = when(col("held")).then(lit(code(Split::Eval))).otherwise(col("split"));
    let replay = col("replay").and(col("held").not());
    Ok(rows
        .with_row_index("at", None)
        .with_column(is_last.alias("held"))
        .with_column(is_held.alias("held"))
        .with_columns([split.alias("split"), replay.alias("replay")])
        .drop(cols(["at", "eval_rows", "held"])))
}

/// Whether a row is the one to keep of those with its content: held out before trained, replay
/// last, then the first.
fn first_of_content() -> PolarsResult<Expr> {
    let rank = when(col("replay")).then(lit(3u32)).otherwise(lit(2u32) - col("split"));
    let order = rank.cast(DataType::UInt64) * lit(1u64 << 40) + col("seq").cast(DataType::UInt64);
    Ok(order.clone().min().over([col("content_0"), col("content_1")])?.eq(order))
}

/// Of rows in order with their index `at`: the place of each among the rows with its `keys`.
fn place_in(keys: &[&str]) -> PolarsResult<Expr> {
    let keys: Vec<Expr> = keys.iter().map(|key| col(*key)).collect();
    Ok(col("at") - col("at").min().over(keys)?)
}

fn stats(kept: DataFrame) -> PolarsResult<BTreeMap<(u32, Split), Stats>> {
    let table = kept
        .lazy()
        .group_by([col("source"), col("split")])
        .agg([
            len().cast(DataType::UInt64).alias("rows"),
            col("n_messages").cast(DataType::UInt64).sum().alias("messages"),
            col("n_bytes").sum().alias("bytes"),
            col("n_bytes").max().alias("longest"),
        ])
        .collect()?;
    let mut stats = BTreeMap::new();
    for row in 0..table.height() {
        let small =
            |name| PolarsResult::Ok(table.column(name)?.u32()?.get(row).unwrap_or_default());
        let word = |name| PolarsResult::Ok(table.column(name)?.u64()?.get(row).unwrap_or_default());
        let (source, split) = (small("source")?, SPLITS[small("split")? as usize]);
        let counts = Stats {
            rows: word("rows")?,
            messages: word("messages")?,
            bytes: word("bytes")?,
            longest: word("longest")?,
        };
        stats.insert((source, split), counts);
    }
    Ok(stats)
}

#[cfg(test)]
mod tests;
