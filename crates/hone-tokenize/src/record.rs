//! Tokenized rows on their way to their packs: put aside on disk, one record a row.
//!
//! A record is the row's [`Doc`], its roles, its ids and its weights. Numbers are written in seven bits a byte, lowest first, the high bit saying
//! that more follow; weights as runs, since a row has few of them.

use hone_cli::Failure;
use hone_schema::{Doc, Kind, Roles};
use hone_store::{Draft, Spill, SpillWriter};

/// A row as tokens, with its place in its row.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Record {
    /// Which tokens of which row these are.
    pub(crate) doc: Doc,
    /// Whose words they are.
    pub(crate) roles: Roles,
    /// Their ids.
    pub(crate) ids: Vec<u32>,
    /// The weights of their losses.
    pub(crate) weights: Vec<f32>,
}

/// The bytes of a record.
pub(crate) fn to_bytes(doc: &Doc, roles: &Roles, ids: &[u32], weights: &[f32]) -> Vec<u8> {
    let mut out = Vec::with_capacity(3 * ids.len() + doc.row_id.len() + doc.source.len() + 32);
    put(&mut out, doc.row);
    put_text(&mut out, &doc.row_id);
    put_text(&mut out, &doc.source);
    put_text(&mut out, doc.kind.as_str());
    put(&mut out, doc.offset.into());
    put(&mut out, doc.truncated.into());
    put(&mut out, doc.kept.len() as u64);
    for range in &doc.kept {
        put(&mut out, range.start.into());
        put(&mut out, range.end.into());
    }
    put(&mut out, roles.runs().len() as u64);
    for (role, n) in roles.runs() {
        put_text(&mut out, role);
        put(&mut out, n.into());
    }
    put(&mut out, ids.len() as u64);
    ids.iter().for_each(|id| put(&mut out, (*id).into()));
    for run in weights.chunk_by(|a, b| a.to_bits() == b.to_bits()) {
        put(&mut out, run.len() as u64);
        out.extend(run[0].to_le_bytes());
    }
    out
}

impl Record {
    /// The record of these bytes; `None` when they are not one.
    pub(crate) fn from_bytes(mut bytes: &[u8]) -> Option<Self> {
        let from = &mut bytes;
        let (row, row_id, source) = (take(from)?, take_text(from)?, take_text(from)?);
        let kind = Kind::from_name(&take_text(from)?)?;
        let (offset, truncated) = (take_u32(from)?, take(from)? != 0);
        let kept = (0..take(from)?)
            .map(|_| Some(take_u32(from)?..take_u32(from)?))
            .collect::<Option<Vec<_>>>()?;
        let mut roles = Roles::default();
        for _ in 0..take(from)? {
            roles.push(&take_text(from)?, take_u32(from)?);
        }
        let len = take_u32(from)?;
        let ids = (0..len).map(|_| take_u32(from)).collect::<Option<Vec<u32>>>()?;
        let mut weights = Vec::with_capacity(ids.len());
        while weights.len() < ids.len() {
            let n = usize::try_from(take(from)?).ok()?;
            let (weight, rest) = from.split_first_chunk()?;
            *from = rest;
            if n == 0 || n > ids.len() - weights.len() {
                return None;
            }
            weights.resize(weights.len() + n, f32::from_le_bytes(*weight));
        }
        let doc = Doc { len, row, row_id, source, kind, offset, truncated, kept };
        from.is_empty().then_some(Record { doc, roles, ids, weights })
    }
}

fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    put(out, text.len() as u64);
    out.extend(text.as_bytes());
}

fn take(from: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = from.split_first()?;
        *from = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn take_u32(from: &mut &[u8]) -> Option<u32> {
    u32::try_from(take(from)?).ok()
}

fn take_text(from: &mut &[u8]) -> Option<String> {
    let n = usize::try_from(take(from)?).ok()?;
    let (text, rest) = from.split_at_checked(n)?;
    *from = rest;
    String::from_utf8(text.to_vec()).ok()
}

/// The rows of a split while they are put aside: in memory is only how long each one is and where it lies.
pub(crate) struct AsideWriter {
    file: SpillWriter,
    lens: Vec<u32>,
    places: Vec<u64>,
}

/// The rows of a split, put aside.
pub(crate) struct Aside {
    file: Spill,
    /// Tokens of each row.
    pub(crate) lens: Vec<u32>,
    places: Vec<u64>,
}

impl AsideWriter {
    /// Room for rows in the draft; `name` is for messages.
    pub(crate) fn new(draft: &Draft, name: &str) -> Result<Self, Failure> {
        Ok(AsideWriter { file: draft.spill(name)?, lens: Vec::new(), places: Vec::new() })
    }

    /// Puts a record of `len` tokens aside.
    pub(crate) fn push(&mut self, len: u32, record: &[u8]) -> Result<(), Failure> {
        if self.lens.len() + 1 >= u32::MAX as usize {
            return Err(Failure::input("a split has more rows than packs can be found for")
                .hint("split the data, or give each part a pipeline of its own"));
        }
        self.places.push(self.file.append(record)?);
        self.lens.push(len);
        Ok(())
    }

    /// The rows, to be read.
    pub(crate) fn finish(self) -> Result<Aside, Failure> {
        let file = self.file.finish()?;
        Ok(Aside { file, lens: self.lens, places: self.places })
    }
}

impl Aside {
    /// A row, by its number in the split.
    pub(crate) fn record(&self, row: u32) -> Result<Record, Failure> {
        let row = row as usize;
        let start = self.places[row];
        let end = self.places.get(row + 1).copied().unwrap_or(self.file.bytes());
        let bytes = self.file.read(start, (end - start) as usize)?;
        Record::from_bytes(&bytes).ok_or_else(|| {
            Failure::environment("a row that was put aside on disk did not come back as it was")
                .hint("look after the disk that the runs lie on")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ops::Range;

    fn record(ids: &[u32], weights: &[f32], kept: &[Range<u32>]) -> Record {
        let doc = Doc {
            len: ids.len() as u32,
            row: 1 << 40,
            row_id: "ä-1".into(),
            source: String::new(),
            kind: Kind::Preference,
            offset: 300,
            truncated: !kept.is_empty(),
            kept: kept.to_vec(),
        };
        let (roles, ids) = (Roles::one("tool", doc.len), ids.to_vec());
        Record { doc, roles, ids, weights: weights.to_vec() }
    }

    fn check(record: &Record) {
        let bytes = to_bytes(&record.doc, &record.roles, &record.ids, &record.weights);
        assert_eq!(Record::from_bytes(&bytes).as_ref(), Some(record));
        for end in 0..bytes.len() {
            assert_eq!(Record::from_bytes(&bytes[..end]), None, "cut at {end}");
        }
        assert_eq!(Record::from_bytes(&[&bytes[..], &[0]].concat()), None);
    }

    #[test]
    fn a_record_reads_back_whole_or_not_at_all() {
        check(&record(&[], &[], &[]));
        check(&record(&[0, 127, 128, u32::MAX], &[0.0, 0.5, 0.5, -0.0], &[]));
        check(&record(&[5; 300], &[1.0; 300], &[300..400, 401..601]));
    }

    #[test]
    fn more_weights_than_ids_are_no_record() {
        let Record { doc, roles, .. } = record(&[1], &[1.0], &[]);
        let mut bytes = to_bytes(&doc, &roles, &[1], &[1.0]);
        let n = bytes.len();
        bytes[n - 5] = 2;
        assert_eq!(Record::from_bytes(&bytes), None);
    }
}
