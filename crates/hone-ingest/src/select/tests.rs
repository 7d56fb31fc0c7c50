//! Decisions on small data sets.

use super::*;
use crate::args::{Config, Paths, SourceConfig};
use crate::convert::{Options, convert};
use crate::index::Identity;
use crate::schema::Schema;

fn source(name: &str) -> SourceConfig {
    SourceConfig {
        name: Some(name.into()),
        path: Paths::One("x.jsonl".into()),
        ..SourceConfig::default()
    }
}

fn replay(name: &str) -> SourceConfig {
    SourceConfig { replay: true, ..source(name) }
}

fn plan(sources: Vec<SourceConfig>) -> Plan {
    Config { source: sources, eval_share: 0.2, test_share: 0.1, ..Config::default() }
        .resolve(7)
        .unwrap_or_else(|failure| panic!("{}", failure.message))
}

/// An index of texts with ids; an empty id is none.
fn index(plan: &Plan, rows: &[(u32, &str, &str)]) -> Index {
    let mut index = Index::default();
    for (source, id, text) in rows {
        let json = format!("{{\"id\":\"{id}\",\"text\":\"{text}\"}}");
        let row = convert(json.as_bytes(), Schema::Text, &Options::default()).expect("a good row");
        index.push(*source, plan.seed, &Identity::of(&row), &row);
    }
    index
}

fn fates(plan: &Plan, rows: &[(u32, &str, &str)]) -> Vec<Fate> {
    select(&index(plan, rows), plan).expect("polars selects").fates
}

fn numbered(source: u32, prefix: &str, n: usize) -> Vec<(u32, String, String)> {
    (0..n).map(|k| (source, String::new(), format!("{prefix} {k}"))).collect()
}

fn borrowed(rows: &[(u32, String, String)]) -> Vec<(u32, &str, &str)> {
    rows.iter().map(|(s, id, text)| (*s, id.as_str(), text.as_str())).collect()
}

fn splits(fates: &[Fate]) -> [usize; 3] {
    SPLITS
        .map(|split| fates.iter().filter(|f| matches!(f, Fate::Keep(s, _) if *s == split)).count())
}

#[test]
fn shares_hold_and_a_row_keeps_its_split() {
    let plan = plan(vec![source("a")]);
    let rows = numbered(0, "row", 10_000);
    let all = fates(&plan, &borrowed(&rows));
    let [train, eval, test] = splits(&all);
    assert_eq!(train + eval + test, 10_000);
    // Four standard deviations of the binomial are 160 and 120 rows.
    assert!(eval.abs_diff(2000) < 160 && test.abs_diff(1000) < 120, "{train} {eval} {test}");
    let every_third: Vec<_> = borrowed(&rows).into_iter().step_by(3).collect();
    let expect: Vec<Fate> = all.iter().copied().step_by(3).collect();
    assert_eq!(fates(&plan, &every_third), expect);
    let other_seed = Plan { seed: 8, ..plan };
    assert_ne!(fates(&other_seed, &borrowed(&rows)), all);
}

#[test]
fn a_source_may_force_its_split() {
    let test = SourceConfig { split: "test".into(), ..source("b") };
    let plan = plan(vec![source("a"), test]);
    let rows = [numbered(0, "a", 50), numbered(1, "b", 50)].concat();
    let all = fates(&plan, &borrowed(&rows));
    assert!(all[50..].iter().all(|fate| *fate == Fate::Keep(Split::Test, 0)));
}

#[test]
fn of_duplicates_the_held_out_one_stays_then_the_first() {
    let test = SourceConfig { split: "test".into(), ..source("b") };
    let train = SourceConfig { split: "train".into(), ..source("a") };
    let plan = plan(vec![train, test]);
    let rows = [(0, "", "x"), (0, "", "y"), (0, "k", "y"), (1, "", "x"), (1, "", "z")];
    let keep = |split| Fate::Keep(split, 0);
    let expect = [
        Fate::Duplicate,
        keep(Split::Train),
        Fate::Duplicate,
        keep(Split::Test),
        keep(Split::Test),
    ];
    assert_eq!(fates(&plan, &rows), expect);
    let without = Plan { dedup: false, ..plan };
    let kept = fates(&without, &rows);
    assert!(kept.iter().all(|fate| matches!(fate, Fate::Keep(..))), "{kept:?}");
    // Rows without an id of their own have that of their content, so the second `x` is numbered.
    assert_eq!(kept[3], Fate::Keep(Split::Test, 1));
}

#[test]
fn equal_ids_stay_together_and_are_numbered() {
    let plan = plan(vec![source("a"), source("b")]);
    let rows = [(0, "same", "x"), (0, "other", "y"), (1, "same", "z"), (1, "same", "w")];
    let selection = select(&index(&plan, &rows), &plan).unwrap();
    let [Fate::Keep(split, 0), Fate::Keep(_, 0), Fate::Keep(second, 1), Fate::Keep(third, 2)] =
        selection.fates[..]
    else {
        panic!("{:?}", selection.fates)
    };
    assert_eq!((split, split), (second, third));
    assert_eq!(selection.repeated_ids, 2);
}

#[test]
fn replay_is_a_share_of_all_train_rows() {
    let check = |share, n_rows, n_replay, expect: u64| {
        let config = Config {
            source: vec![source("a"), replay("r"), replay("s")],
            replay_share: share,
            eval_share: 0.0,
            test_share: 0.0,
            ..Config::default()
        };
        let plan = config.resolve(1).expect("a good plan");
        let half = n_replay / 2;
        let rows =
            [numbered(0, "a", n_rows), numbered(1, "r", half), numbered(2, "s", n_replay - half)]
                .concat();
        let selection = select(&index(&plan, &borrowed(&rows)), &plan).unwrap();
        let kept = |source| selection.stats.get(&(source, Split::Train)).map_or(0, |s| s.rows);
        assert_eq!((kept(0), kept(1) + kept(2)), (n_rows as u64, expect), "{share}");
        let unsampled = selection.fates.iter().filter(|f| **f == Fate::NotSampled).count();
        assert_eq!(unsampled as u64, n_replay as u64 - expect);
        // Both sources are drawn from alike.
        assert!(expect < 50 || kept(1).abs_diff(kept(2)) < expect / 2);
    };
    check(0.1, 900, 1000, 100);
    check(0.5, 100, 1000, 100);
    check(0.0, 900, 1000, 0);
    check(0.1, 900, 40, 40);
    check(0.1, 5, 10, 1);
}

#[test]
fn a_larger_replay_share_keeps_the_rows_of_a_smaller_one() {
    let with = |share| {
        let config = Config {
            source: vec![source("a"), replay("r")],
            replay_share: share,
            ..Config::default()
        };
        let plan = config.resolve(1).expect("a good plan");
        let rows = [numbered(0, "a", 300), numbered(1, "r", 300)].concat();
        fates(&plan, &borrowed(&rows))
    };
    let (small, large) = (with(0.1), with(0.3));
    let is_kept = |fate: &Fate| matches!(fate, Fate::Keep(..));
    assert!(small.iter().zip(&large).all(|(s, l)| !is_kept(s) || is_kept(l)));
}

#[test]
fn replay_holds_out_the_same_rows_whatever_its_share() {
    let with = |share, eval_rows| {
        let config = Config {
            source: vec![source("a"), SourceConfig { eval_rows, ..replay("r") }, replay("s")],
            replay_share: share,
            eval_share: 0.0,
            test_share: 0.0,
            ..Config::default()
        };
        let plan = config.resolve(1).expect("a good plan");
        let rows = [numbered(0, "a", 90), numbered(1, "r", 100), numbered(2, "s", 100)].concat();
        fates(&plan, &borrowed(&rows))
    };
    let held = |fates: &[Fate]| -> Vec<usize> {
        let is_held = |k: &usize| matches!(fates[*k], Fate::Keep(Split::Eval, _));
        (0..fates.len()).filter(is_held).collect()
    };
    let (none, small, large) = (with(0.1, 0), with(0.1, 20), with(0.6, 20));
    assert_eq!(splits(&none), [100, 0, 0]);
    assert_eq!(splits(&small), [100, 20, 0]);
    assert_eq!(splits(&large), [225, 20, 0]);
    assert_eq!(held(&small), held(&large));
    assert!(held(&small).iter().all(|k| (90..190).contains(k)));
    // More than there are: all of them.
    assert_eq!(splits(&with(0.5, 500)), [180, 100, 0]);
}

#[test]
fn replay_rows_that_share_an_id_are_held_out_together() {
    // Of each id three rows in one replay source and one in another, which holds out none itself.
    let mut rows = numbered(0, "a", 90);
    for k in 0..120 {
        rows.push((1, format!("id {}", k / 3), format!("r {k}")));
    }
    rows.extend((0..40).map(|k| (2, format!("id {k}"), format!("s {k}"))));
    let of = |eval_rows| {
        let config = Config {
            source: vec![source("a"), SourceConfig { eval_rows, ..replay("r") }, replay("s")],
            replay_share: 0.9,
            eval_share: 0.0,
            test_share: 0.0,
            ..Config::default()
        };
        let plan = config.resolve(1).expect("a good plan");
        let all = fates(&plan, &borrowed(&rows));
        let mut splits: BTreeMap<&str, Vec<Split>> = BTreeMap::new();
        for (row, fate) in rows.iter().zip(&all).skip(90) {
            let Fate::Keep(split, _) = fate else { panic!("{row:?}: {fate:?}") };
            splits.entry(&row.1).or_default().push(*split);
        }
        for (id, splits) in &splits {
            assert_eq!((splits.len(), splits.iter().all(|s| *s == splits[0])), (4, true), "{id}");
        }
        splits.values().filter(|splits| splits[0] == Split::Eval).count()
    };
    // Whole ids, until so many rows of the source are held out.
    assert_eq!([0, 1, 3, 4, 20, 120].map(of), [0, 1, 1, 2, 7, 40]);
}

#[test]
fn a_limit_takes_rows_by_hash_order() {
    let limited = SourceConfig { limit: Some(10), ..source("a") };
    let plan = plan(vec![limited, source("b")]);
    let rows = [numbered(0, "a", 100), numbered(1, "b", 20)].concat();
    let all = fates(&plan, &borrowed(&rows));
    let kept: Vec<usize> = (0..100).filter(|k| matches!(all[*k], Fate::Keep(..))).collect();
    assert_eq!(kept.len(), 10);
    assert_ne!(kept, (0..10).collect::<Vec<_>>());
    assert!(all[100..].iter().all(|fate| matches!(fate, Fate::Keep(..))));
}

#[test]
fn statistics_add_up() {
    let plan = plan(vec![source("a")]);
    let rows = numbered(0, "row", 200);
    let index = index(&plan, &borrowed(&rows));
    let selection = select(&index, &plan).unwrap();
    let sum = |of: fn(&Stats) -> u64| selection.stats.values().map(of).sum::<u64>();
    assert_eq!((sum(|s| s.rows), sum(|s| s.messages)), (200, 0));
    assert_eq!(sum(|s| s.bytes), index.n_bytes.iter().sum::<u64>());
    assert_eq!(
        selection.stats.values().map(|s| s.longest).max(),
        index.n_bytes.iter().copied().max()
    );
}
