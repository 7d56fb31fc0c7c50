//! `diff`: two outputs, row by row: which rows only one of them has, whose tokens differ, whose labels do, and why as far as
//! that is known.
//!
//! Rows are compared wherever they are packed: first by a hash of what each row's documents hold, so that two outputs of any
//! size fit into memory, then those that differ token by token.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;

use hone_cli::{Common, Context, Exit, Failure, changes};
use hone_schema::{Reject, Split};
use hone_tokens::Vocab;
use serde_json::{Value, json};

use crate::documents::{Packs, documents};
use hone_cli::text::one_line;

/// Most rows whose tokens are compared one by one; beyond that they are counted as rows alone.
const ROWS_MAX: usize = 100_000;

/// Which outputs, and how much of their difference.
#[derive(clap::Args)]
pub(crate) struct DiffArgs {
    /// A sealed output of this program.
    #[arg(value_name = "A")]
    a: PathBuf,
    /// Another one.
    #[arg(value_name = "B")]
    b: PathBuf,
    /// Most rows that are shown of each kind.
    #[arg(long, value_name = "N", default_value_t = 5)]
    limit: usize,
}

/// A row, wherever it is packed.
type Key = (Split, String, String);

/// What the documents of a row hold, in any order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Print {
    ids: u64,
    labels: u64,
}

/// A token of a row: its id and its weight.
type Token = (u32, f32);

/// The tokens of a row that an output has, by their index in the row.
type Tokens = BTreeMap<u32, Token>;

/// How two rows of one name differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    OnlyA,
    OnlyB,
    Ids,
    Labels,
}

impl Kind {
    const ALL: [Kind; 4] = [Kind::OnlyA, Kind::OnlyB, Kind::Ids, Kind::Labels];

    fn name(self) -> &'static str {
        match self {
            Kind::OnlyA => "only in A",
            Kind::OnlyB => "only in B",
            Kind::Ids => "with other tokens",
            Kind::Labels => "with other labels",
        }
    }

    fn key(self) -> &'static str {
        match self {
            Kind::OnlyA => "only_a",
            Kind::OnlyB => "only_b",
            Kind::Ids => "other_ids",
            Kind::Labels => "other_labels",
        }
    }
}

/// Tokens that both have, and that are trained otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Labels {
    no_longer_trained: u64,
    now_trained: u64,
    reweighted: u64,
    /// Those of them that end responses.
    stops: u64,
}

/// What was found.
struct Found {
    why: Vec<String>,
    n_same: usize,
    kinds: BTreeMap<Key, Kind>,
    labels: Labels,
    /// Why the other output refuses rows that only A has, and that only B has.
    refused: [BTreeMap<String, u64>; 2],
    /// Rows that are shown, and how they differ.
    shown: Vec<(Kind, Key, String)>,
}

/// Compares two outputs.
pub(crate) fn diff(ctx: &Context, common: &Common, args: &DiffArgs) -> Result<Exit, Failure> {
    let (a, b) = (Packs::open(&args.a)?, Packs::open(&args.b)?);
    let found = find(ctx, &a, &b, args.limit)?;
    if common.json {
        ctx.print(found.to_json().to_string());
    } else {
        found.lines().iter().for_each(|line| ctx.print(one_line(line)));
    }
    Ok(if found.kinds.is_empty() { Exit::Done } else { Exit::GateFailed })
}

fn find(ctx: &Context, a: &Packs, b: &Packs, limit: usize) -> Result<Found, Failure> {
    let (prints_a, prints_b) = (prints(ctx, a)?, prints(ctx, b)?);
    let kinds = compare(&prints_a, &prints_b);
    let n_same = prints_a.keys().filter(|key| !kinds.contains_key(*key)).count();
    drop((prints_a, prints_b));
    let in_both = kinds.iter().filter(|(_, kind)| matches!(kind, Kind::Ids | Kind::Labels));
    let in_both: BTreeSet<&Key> = in_both.map(|(key, _)| key).take(ROWS_MAX).collect();
    let (rows_a, rows_b) = (tokens(a, &in_both)?, tokens(b, &in_both)?);
    let stops: BTreeSet<u32> = stops(a)?.into_iter().chain(stops(b)?).collect();
    let mut labels = Labels::default();
    for key in &in_both {
        labels.count(&rows_a[*key], &rows_b[*key], &stops);
    }
    let vocab = a.vocab()?;
    let mut shown = Vec::new();
    for kind in Kind::ALL {
        for (key, _) in kinds.iter().filter(|(_, k)| **k == kind).take(limit) {
            let what = match (rows_a.get(key), rows_b.get(key)) {
                (Some(a), Some(b)) => in_words(&vocab, a, b),
                _ => String::new(),
            };
            shown.push((kind, key.clone(), what));
        }
    }
    let refused = [refused(b, &kinds, Kind::OnlyA)?, refused(a, &kinds, Kind::OnlyB)?];
    Ok(Found { why: reasons(a, b), n_same, labels, refused, shown, kinds })
}

impl Found {
    fn of_kind(&self, kind: Kind) -> usize {
        self.kinds.values().filter(|k| **k == kind).count()
    }

    fn to_json(&self) -> Value {
        let rows: BTreeMap<&str, usize> = Kind::ALL.map(|k| (k.key(), self.of_kind(k))).into();
        let example = |(kind, (split, source, id), what): &(Kind, Key, String)| {
            let split = split.as_str();
            json!({"kind": kind.key(), "split": split, "source": source, "id": id, "what": what})
        };
        json!({
            "equal": self.kinds.is_empty(),
            "why": self.why,
            "same": self.n_same,
            "rows": rows,
            "refused_in_b": self.refused[0],
            "refused_in_a": self.refused[1],
            "labels": self.labels.to_json(),
            "examples": self.shown.iter().map(example).collect::<Vec<_>>(),
        })
    }

    /// The same for people.
    fn lines(&self) -> Vec<String> {
        let mut lines = self.why.clone();
        lines.push(format!("{} rows are the same", self.n_same));
        for kind in Kind::ALL.into_iter().filter(|kind| self.of_kind(*kind) > 0) {
            lines.push(format!("{} rows {}", self.of_kind(kind), kind.name()));
            let refused = match kind {
                Kind::OnlyA => Some((&self.refused[0], "B")),
                Kind::OnlyB => Some((&self.refused[1], "A")),
                Kind::Ids | Kind::Labels => None,
            };
            if let Some((reasons, other)) = refused {
                let line = |(reason, n)| format!("  {n} of them {other} refuses: {reason}");
                lines.extend(reasons.iter().map(line));
            }
            for (_, (split, source, id), what) in self.shown.iter().filter(|(k, ..)| *k == kind) {
                lines.push(format!("  {split} {source} {id}  {what}"));
            }
        }
        if self.labels != Labels::default() {
            lines.push(self.labels.in_words());
        }
        lines
    }
}

/// What the manifests say that was not the same.
fn reasons(a: &Packs, b: &Packs) -> Vec<String> {
    let (a, b) = (a.sealed.manifest(), b.sealed.manifest());
    let changes = changes(&a.config, &b.config).into_iter();
    let mut why: Vec<String> = changes.map(|change| format!("from A to B: {change}")).collect();
    for input in &a.inputs {
        let other = b.inputs.iter().find(|other| other.role == input.role);
        if other.is_none_or(|other| other.sha256 != input.sha256) {
            why.push(format!("the input `{}` is not the same", input.role));
        }
    }
    if a.program != b.program {
        why.push("the program is not the same".to_owned());
    }
    why
}

/// What each row of an output holds.
fn prints(ctx: &Context, packs: &Packs) -> Result<BTreeMap<Key, Print>, Failure> {
    let mut prints: BTreeMap<Key, Print> = BTreeMap::new();
    each_document(packs, |split, doc| {
        if let Some(exit) = ctx.stop() {
            return Err(Failure::stopped(exit));
        }
        let hash = |weights: Option<&[f32]>| {
            let mut hasher = DefaultHasher::new();
            doc.in_row().hash(&mut hasher);
            doc.ids.hash(&mut hasher);
            weights.into_iter().flatten().for_each(|w| w.to_bits().hash(&mut hasher));
            hasher.finish()
        };
        let key = (split, doc.doc.source.clone(), doc.doc.row_id.clone());
        let print = prints.entry(key).or_default();
        // A sum, so that pieces count in any order and twice the same is not none.
        print.ids = print.ids.wrapping_add(hash(None));
        print.labels = print.labels.wrapping_add(hash(Some(doc.weights)));
        Ok(())
    })?;
    Ok(prints)
}

fn each_document(
    packs: &Packs,
    mut then: impl FnMut(Split, &crate::documents::Document<'_>) -> Result<(), Failure>,
) -> Result<(), Failure> {
    for split in Split::ALL {
        for pack in packs.read(*split)? {
            let pack = pack?;
            documents(&pack).iter().try_for_each(|doc| then(*split, doc))?;
        }
    }
    Ok(())
}

fn compare(a: &BTreeMap<Key, Print>, b: &BTreeMap<Key, Print>) -> BTreeMap<Key, Kind> {
    let mut kinds = BTreeMap::new();
    for (key, print) in a {
        let kind = match b.get(key) {
            None => Kind::OnlyA,
            Some(other) if other.ids != print.ids => Kind::Ids,
            Some(other) if other.labels != print.labels => Kind::Labels,
            Some(_) => continue,
        };
        kinds.insert(key.clone(), kind);
    }
    for key in b.keys().filter(|key| !a.contains_key(*key)) {
        kinds.insert(key.clone(), Kind::OnlyB);
    }
    kinds
}

/// The tokens of some rows.
fn tokens<'a>(
    packs: &Packs,
    wanted: &BTreeSet<&'a Key>,
) -> Result<BTreeMap<&'a Key, Tokens>, Failure> {
    let mut rows: BTreeMap<&Key, Tokens> = BTreeMap::new();
    if wanted.is_empty() {
        return Ok(rows);
    }
    each_document(packs, |split, doc| {
        let key = (split, doc.doc.source.clone(), doc.doc.row_id.clone());
        if let Some(key) = wanted.get(&key) {
            let tokens = doc.ids.iter().copied().zip(doc.weights.iter().copied());
            rows.entry(key).or_default().extend(doc.doc.row_tokens().zip(tokens));
        }
        Ok(())
    })?;
    Ok(rows)
}

/// The ids that end responses.
fn stops(packs: &Packs) -> Result<Vec<u32>, Failure> {
    let name = "stops.json";
    let wrong =
        || Failure::input(format!("{}: not a list of ids", packs.sealed.path(name).display()));
    let value: Value = serde_json::from_slice(&packs.sealed.read(name)?).map_err(|_| wrong())?;
    serde_json::from_value(value["stop_ids"].clone()).map_err(|_| wrong())
}

/// Why `packs` refuses the rows of a kind, by reason.
fn refused(
    packs: &Packs,
    kinds: &BTreeMap<Key, Kind>,
    kind: Kind,
) -> Result<BTreeMap<String, u64>, Failure> {
    let mut reasons = BTreeMap::new();
    let name = "rejects.parquet";
    if !packs.sealed.has(name) || !kinds.values().any(|k| *k == kind) {
        return Ok(reasons);
    }
    let missing: BTreeSet<(&str, &str)> = kinds
        .iter()
        .filter(|(_, k)| **k == kind)
        .map(|((_, source, id), _)| (source.as_str(), id.as_str()))
        .collect();
    for batch in packs.sealed.parquet(name)? {
        for reject in Reject::from_batch(&batch?)? {
            if missing.contains(&(reject.source.as_str(), reject.file.as_str())) {
                *reasons.entry(reject.reason).or_default() += 1;
            }
        }
    }
    Ok(reasons)
}

impl Labels {
    fn count(&mut self, a: &Tokens, b: &Tokens, stops: &BTreeSet<u32>) {
        for (at, (id, was)) in a {
            let Some((_, is)) = b.get(at).filter(|(other, is)| other == id && is != was) else {
                continue;
            };
            match (*was > 0.0, *is > 0.0) {
                (true, false) => self.no_longer_trained += 1,
                (false, true) => self.now_trained += 1,
                _ => self.reweighted += 1,
            }
            self.stops += u64::from(stops.contains(id));
        }
    }

    fn to_json(self) -> Value {
        json!({
            "trained_in_a_alone": self.no_longer_trained,
            "trained_in_b_alone": self.now_trained,
            "reweighted": self.reweighted,
            "of_these_stop_tokens": self.stops,
        })
    }

    fn in_words(self) -> String {
        format!(
            "tokens that both have: {} trained in A alone, {} in B alone, {} with another weight; {} of them end responses",
            self.no_longer_trained, self.now_trained, self.reweighted, self.stops
        )
    }
}

/// How two rows differ: the first token that does, and how many do.
fn in_words(vocab: &Vocab, a: &Tokens, b: &Tokens) -> String {
    let name = |id: u32| format!("{:?} ({id})", vocab.token(id).unwrap_or_default());
    let changed: Vec<(&u32, &Token, &Token)> = a
        .iter()
        .filter_map(|(at, token)| Some((at, token, b.get(at)?)))
        .filter(|(_, token, other)| token != other)
        .collect();
    let only = |x: &Tokens, y: &Tokens| x.keys().filter(|at| !y.contains_key(at)).count();
    let mut words = Vec::new();
    match changed.first() {
        Some((at, (id, was), (other, is))) if id == other => words.push(format!(
            "{} tokens weigh otherwise, the first is token {at}, {}: {was} in A, {is} in B",
            changed.len(),
            name(*id)
        )),
        Some((at, (id, _), (other, _))) => words.push(format!(
            "{} tokens differ, the first is token {at}: {} in A, {} in B",
            changed.len(),
            name(*id),
            name(*other)
        )),
        None => {}
    }
    for (n, which) in [(only(a, b), "A"), (only(b, a), "B")] {
        if n > 0 {
            words.push(format!("{n} tokens are in {which} alone"));
        }
    }
    if words.is_empty() {
        words.push("the same tokens in other pieces".to_owned());
    }
    words.join("; ")
}
