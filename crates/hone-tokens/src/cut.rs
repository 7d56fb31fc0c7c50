//! Rows that are longer than a pack.
//!
//! There is no default: whatever is done loses something, and the pipeline says what.
//!
//! - `drop`: the row is left out. `error`: the stage stops.
//! - `split`: pieces of at most [`Rules::max_len`] tokens, each a document of its own. Their weights are as they were, but for
//!   their first tokens, which nothing predicts any more; a beginning-of-text token is not repeated. A piece without a trained
//!   token is refused. A cut never falls between a response and its stop token: it moves one token back.
//! - `truncate = "head"`: the first `max_len` tokens are kept.
//! - `truncate = "tail"`: the last ones, and before them the beginning-of-text token, where the row begins with it.
//! - `truncate = "keep-response"`: every trained token and all that the template wrote are kept, so the chat stays well formed.
//!   What goes is what untrained messages say: the oldest first, each from its beginning, a system message last of all. Where
//!   that is not enough, the row is refused. Of a plain text, which is all response, the head is kept.
//!
//! A stop token is never invented at a cut, and what remains is looked at again: a trained response that is whole has its stop
//! token, and that is trained where the policy trains stops; at least one token is trained.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use hone_schema::{Kind, Part, Roles};
use serde::de::{self, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::certificate::{Ending, Proof};
use crate::role::roles;
use crate::row::{Counts, Reason, Refusal, Row, Rules, Taken, Work};
use crate::vocab::Vocab;

/// What happens to a row that is longer than a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TooLong {
    /// It is left out.
    Drop,
    /// It becomes several rows.
    Split,
    /// The whole stage stops.
    Error,
    /// It is cut, and this is kept.
    Truncate(Keep),
}

/// What is kept of a row that is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Keep {
    /// All that is trained and all that the template wrote.
    #[serde(rename = "keep-response")]
    Response,
    /// Its first tokens.
    Head,
    /// Its last tokens.
    Tail,
}

impl Serialize for TooLong {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            TooLong::Drop => serializer.serialize_str("drop"),
            TooLong::Split => serializer.serialize_str("split"),
            TooLong::Error => serializer.serialize_str("error"),
            TooLong::Truncate(keep) => BTreeMap::from([("truncate", keep)]).serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for TooLong {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TooLongVisitor)
    }
}

struct TooLongVisitor;

/// The ways to cut a row, as they are written.
const TRUNCATES: &str =
    "`{ truncate = \"keep-response\" }`, `{ truncate = \"head\" }` or `{ truncate = \"tail\" }`";

impl<'de> Visitor<'de> for TooLongVisitor {
    type Value = TooLong;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`drop`, `split`, `error`, {TRUNCATES}")
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<TooLong, E> {
        match name {
            "drop" => Ok(TooLong::Drop),
            "split" => Ok(TooLong::Split),
            "error" => Ok(TooLong::Error),
            "truncate" => {
                Err(E::custom(format!("`truncate` must say what is kept: write {TRUNCATES}")))
            }
            other => Err(E::invalid_value(de::Unexpected::Str(other), &self)),
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<TooLong, A::Error> {
        let key = map.next_key::<String>()?;
        if key.as_deref() != Some("truncate") {
            let key = key.unwrap_or_default();
            return Err(de::Error::custom(format!("`{key}` is not `truncate`: write {TRUNCATES}")));
        }
        let keep = map.next_value()?;
        match map.next_key::<String>()? {
            Some(key) => Err(de::Error::custom(format!("`{key}` beside `truncate`"))),
            None => Ok(TooLong::Truncate(keep)),
        }
    }
}

type Fault = (Reason, String);

/// The row as it goes out, or its pieces.
pub(crate) fn cut(vocab: &Vocab, work: Work, proof: Proof, rules: &Rules) -> Result<Taken, Fault> {
    let n = work.encoded.ids.len();
    let max = rules.max_len as usize;
    if n <= max {
        let whole = whole_row(work, &proof);
        return Ok(Taken { rows: vec![whole], refused: Vec::new() });
    }
    let kept = match rules.too_long {
        TooLong::Drop | TooLong::Error => {
            return Err((Reason::TooLong, format!("{n} tokens, a pack holds {max}")));
        }
        TooLong::Split => return split(work, &proof, max),
        TooLong::Truncate(Keep::Response) if work.row.kind != Kind::Text => {
            without_untrained(vocab, &work, max)?
        }
        TooLong::Truncate(Keep::Tail) => tail(&work, rules.bos, max),
        TooLong::Truncate(Keep::Head | Keep::Response) => one(0..max),
    };
    let endings = &proof.endings;
    if let Some(message) = endings.iter().find(|e| is_whole(e, &kept) && !holds(&kept, e.stop)) {
        let at = work.encoded.offsets[message.stop].start;
        return Err((Reason::StopCutOff, format!("the one at byte {at}")));
    }
    let whole = whole_row(work, &proof);
    let row = part(&whole, &kept);
    if row.counts().trained == 0 {
        let detail = format!(
            "none of its {} trained tokens is among the {max} that are kept",
            whole.before.trained
        );
        return Err((Reason::ResponseCutOff, detail));
    }
    Ok(Taken { rows: vec![row], refused: Vec::new() })
}

fn whole_row(work: Work, proof: &Proof) -> Row {
    let n = work.encoded.ids.len() as u32;
    Row {
        id: work.row.id.clone(),
        source: work.row.source.clone(),
        split: work.row.split,
        kind: work.row.kind,
        before: Counts::of(&work.weights),
        roles: roles(work.row, &work.encoded, &work.weights),
        ids: work.encoded.ids,
        weights: work.weights,
        offsets: work.encoded.offsets,
        kept: std::iter::once(0..n).collect(),
        n_whole: n,
        stops: proof.stops.clone(),
        turns: proof.turns,
    }
}

/// The tokens `kept` of a row. The first is predicted by nothing, whatever it was before.
fn part(whole: &Row, kept: &[Range<usize>]) -> Row {
    let take = |range: &Range<usize>| range.clone();
    let mut weights: Vec<f32> =
        kept.iter().map(take).flat_map(|range| whole.weights[range].iter().copied()).collect();
    if let Some(first) = weights.first_mut() {
        *first = 0.0;
    }
    let mut roles = Roles::default();
    let kept_ids = || kept.iter().map(|range| range.start as u32..range.end as u32);
    kept_ids().for_each(|range| roles.append(&whole.roles.part(&range)));
    Row {
        id: whole.id.clone(),
        source: whole.source.clone(),
        roles,
        ids: kept.iter().map(take).flat_map(|r| whole.ids[r].iter().copied()).collect(),
        weights,
        offsets: kept.iter().map(take).flat_map(|r| whole.offsets[r].iter().cloned()).collect(),
        kept: kept_ids().collect(),
        stops: whole.stops.clone(),
        ..*whole
    }
}

fn one(range: Range<usize>) -> Vec<Range<usize>> {
    std::iter::once(range).collect()
}

fn holds(kept: &[Range<usize>], token: usize) -> bool {
    kept.iter().any(|range| range.contains(&token))
}

/// Whether every token of what a response says is kept.
fn is_whole(ending: &Ending, kept: &[Range<usize>]) -> bool {
    let said = &ending.said;
    kept.iter().any(|range| range.start <= said.start && said.end <= range.end)
}

fn tail(work: &Work, bos: Option<u32>, max: usize) -> Vec<Range<usize>> {
    let n = work.encoded.ids.len();
    let begins = bos.is_some() && work.encoded.ids.first().copied() == bos;
    if begins { vec![0..1, n - (max - 1)..n] } else { one(n - max..n) }
}

/// The tokens that are left when just enough of what untrained messages say is taken out.
fn without_untrained(vocab: &Vocab, work: &Work, max: usize) -> Result<Vec<Range<usize>>, Fault> {
    let n = work.encoded.ids.len();
    let mut left = n - max;
    let mut goes = vec![false; n];
    for message in untrained(vocab, work) {
        for token in message.into_iter().take(left) {
            goes[token] = true;
            left -= 1;
        }
    }
    if left > 0 {
        let detail = format!(
            "{n} tokens, a pack holds {max}, and {} of them say what is not trained",
            n - max - left
        );
        return Err((Reason::ResponseDoesNotFit, detail));
    }
    let mut kept: Vec<Range<usize>> = Vec::new();
    for token in (0..n).filter(|token| !goes[*token]) {
        match kept.last_mut() {
            Some(range) if range.end == token => range.end += 1,
            _ => kept.push(token..token + 1),
        }
    }
    Ok(kept)
}

/// The tokens of what each message says of which nothing is trained: in order, but those of system messages last.
fn untrained(vocab: &Vocab, work: &Work) -> Vec<Vec<usize>> {
    let spans = &work.row.spans;
    let mut messages: BTreeMap<(bool, u32), (bool, Vec<usize>)> = BTreeMap::new();
    let mut token = 0;
    let offsets = &work.encoded.offsets;
    for span in spans.iter() {
        let Some(message) = span.message.filter(|_| span.part != Part::Stop) else { continue };
        let bytes = span.start as usize..span.end as usize;
        token = first_at(offsets, token, bytes.start);
        let is_system = matches!(span.role.as_str(), "system" | "developer");
        let (is_trained, said) = messages.entry((is_system, message)).or_default();
        let touching = offsets.iter().enumerate().skip(token);
        for (idx, at) in touching.take_while(|(_, at)| at.start < bytes.end) {
            *is_trained |= work.weights[idx] > 0.0;
            let is_inside = bytes.start <= at.start && at.end <= bytes.end;
            if is_inside && span.part.is_said() && !vocab.is_control(work.encoded.ids[idx]) {
                said.push(idx);
            }
        }
    }
    messages.into_values().filter(|(is_trained, _)| !is_trained).map(|(_, said)| said).collect()
}

/// The first token that ends behind byte `start`, looked for from `from` on.
fn first_at(offsets: &[Range<usize>], from: usize, start: usize) -> usize {
    let mut at = from.min(offsets.len());
    while at > 0 && offsets[at - 1].end > start {
        at -= 1;
    }
    while at < offsets.len() && offsets[at].end <= start {
        at += 1;
    }
    at
}

fn split(work: Work, proof: &Proof, max: usize) -> Result<Taken, Fault> {
    let n = work.encoded.ids.len();
    let mut stops = proof.endings.iter().map(|ending| ending.stop).peekable();
    let whole = whole_row(work, proof);
    let mut taken = Taken { rows: Vec::new(), refused: Vec::new() };
    let mut start = 0;
    while start < n {
        let mut end = n.min(start + max);
        while stops.next_if(|stop| *stop < end).is_some() {}
        if stops.peek() == Some(&end) && end > start + 1 {
            end -= 1;
        }
        let piece = Counts::of(&whole.weights[start..end]);
        let mut row = part(&whole, &one(start..end));
        row.before = piece;
        if row.counts().trained > 0 {
            row.turns = if taken.rows.is_empty() { whole.turns } else { 0 };
            taken.rows.push(row);
        } else {
            let detail = format!("tokens {start} to {end} of {n}");
            let reason = Reason::UntrainedPiece;
            taken.refused.push(Refusal { reason, detail, counts: piece });
        }
        start = end;
    }
    if taken.rows.is_empty() {
        let detail = format!("in pieces of {max} none of its {n} tokens is trained");
        return Err((Reason::ResponseCutOff, detail));
    }
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(json: &str, expect: Result<TooLong, &str>) {
        match (serde_json::from_str::<TooLong>(json), expect) {
            (Ok(found), Ok(expect)) => {
                assert_eq!(found, expect);
                assert_eq!(serde_json::to_string(&found).expect("plain data"), json);
            }
            (Err(e), Err(part)) => assert!(e.to_string().contains(part), "{e}"),
            (found, expect) => panic!("{json}: {found:?}, not {expect:?}"),
        }
    }

    #[test]
    fn what_happens_to_long_rows_is_read_and_written() {
        check("\"drop\"", Ok(TooLong::Drop));
        check("\"split\"", Ok(TooLong::Split));
        check("\"error\"", Ok(TooLong::Error));
        check(r#"{"truncate":"keep-response"}"#, Ok(TooLong::Truncate(Keep::Response)));
        check(r#"{"truncate":"head"}"#, Ok(TooLong::Truncate(Keep::Head)));
        check(r#"{"truncate":"tail"}"#, Ok(TooLong::Truncate(Keep::Tail)));
        check(
            "\"truncate\"",
            Err("must say what is kept: write `{ truncate = \"keep-response\" }`"),
        );
        check("\"chop\"", Err("expected `drop`, `split`, `error`, `{ truncate = "));
        check(r#"{"truncate":"middle"}"#, Err("expected one of `keep-response`, `head`, `tail`"));
        check(r#"{"truncat":"head"}"#, Err("`truncat` is not `truncate`"));
        check(r#"{"truncate":"head","x":1}"#, Err("`x` beside `truncate`"));
        check("{}", Err("`` is not `truncate`"));
        check("3", Err("invalid type: integer `3`"));
    }
}
