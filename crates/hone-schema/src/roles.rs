//! Whose words trained tokens are.
//!
//! The role of a token is that of the message that it belongs to: `assistant`, `user`, `tool`,
//! `system` or any other that the data has. What a message thinks is [apart](THOUGHTS),
//! `assistant/reasoning`. What the template wrote (markers inside a response, the marks of a
//! thought, the end of a turn) has the role whose turn it is. Plain text is [`TEXT`]. Only trained
//! tokens have a role: the others are counted with their neighbours, so that most documents, and
//! most packs, are one run.

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{Array, LargeStringArray, ListArray, RecordBatch, StructArray, UInt32Array};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Fields};

use crate::RowError;
use crate::columns::{column, item};

/// Behind the role of a message: what it thinks before it speaks.
pub const THOUGHTS: &str = "/reasoning";

/// Role of plain text.
pub const TEXT: &str = "text";

/// Role of what the template writes before any message.
pub const TEMPLATE: &str = "template";

/// Role of tokens whose labels came from another tool.
pub const UNKNOWN: &str = "unknown";

/// The roles of some tokens, in runs: neighbouring runs have other roles, and each has a token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Roles {
    runs: Vec<(String, u32)>,
}

impl Roles {
    /// Tokens of one role.
    pub fn one(role: &str, n_tokens: u32) -> Self {
        let mut roles = Roles::default();
        roles.push(role, n_tokens);
        roles
    }

    /// Adds tokens behind the others.
    pub fn push(&mut self, role: &str, n_tokens: u32) {
        match self.runs.last_mut() {
            Some((last, n)) if last == role => *n += n_tokens,
            _ if n_tokens == 0 => {}
            _ => self.runs.push((role.to_owned(), n_tokens)),
        }
    }

    /// Adds the tokens of `others` behind the others.
    pub fn append(&mut self, others: &Roles) {
        others.runs.iter().for_each(|(role, n)| self.push(role, *n));
    }

    /// The roles of these of the tokens.
    pub fn part(&self, tokens: &Range<u32>) -> Roles {
        let mut part = Roles::default();
        let mut start = 0;
        for (role, n) in &self.runs {
            let end = start + n;
            let shared = start.max(tokens.start)..end.min(tokens.end);
            part.push(role, shared.end.saturating_sub(shared.start));
            start = end;
        }
        part
    }

    /// The runs in order: a role, and a number of tokens.
    pub fn runs(&self) -> impl ExactSizeIterator<Item = (&str, u32)> {
        self.runs.iter().map(|(role, n)| (role.as_str(), *n))
    }

    /// Number of tokens.
    pub fn n_tokens(&self) -> u64 {
        self.runs.iter().map(|(_, n)| u64::from(*n)).sum()
    }

    /// The runs with the trained tokens of each, where `weights` are those of the tokens.
    pub fn trained(&self, weights: &[f32]) -> impl Iterator<Item = (&str, u64)> {
        let mut rest = weights;
        self.runs().map(move |(role, n)| {
            let (own, behind) = rest.split_at(rest.len().min(n as usize));
            rest = behind;
            (role, own.iter().filter(|w| **w > 0.0).count() as u64)
        })
    }

    /// What is wrong with runs that are read.
    pub(crate) fn fault(&self) -> Option<String> {
        let empty = |(role, n): &(String, u32)| role.is_empty() || *n == 0;
        let same = |pair: &[(String, u32)]| pair[0].0 == pair[1].0;
        let is_wrong = self.runs.iter().any(empty) || self.runs.windows(2).any(same);
        is_wrong.then(|| format!("{:?}", self.runs))
    }
}

fn fields() -> Fields {
    Fields::from(vec![
        Field::new("role", DataType::LargeUtf8, false),
        Field::new("tokens", DataType::UInt32, false),
    ])
}

/// The field of a list of runs.
pub(crate) fn run_field() -> Field {
    Field::new("item", DataType::Struct(fields()), false)
}

/// A column of roles.
pub(crate) fn roles_column<'a>(
    all: impl Iterator<Item = &'a Roles> + Clone,
) -> Result<ListArray, RowError> {
    let runs = || all.clone().flat_map(Roles::runs);
    let names = LargeStringArray::from_iter_values(runs().map(|(role, _)| role));
    let counts = UInt32Array::from_iter_values(runs().map(|(_, n)| n));
    let values = StructArray::try_new(fields(), vec![Arc::new(names), Arc::new(counts)], None)?;
    let offsets = OffsetBuffer::from_lengths(all.map(|roles| roles.runs.len()));
    Ok(ListArray::try_new(Arc::new(run_field()), offsets, Arc::new(values), None)?)
}

/// The roles of a row of such a column.
pub(crate) fn roles_at(list: &ListArray, row: usize) -> Result<Roles, RowError> {
    let batch = RecordBatch::from(item::<StructArray>(list, row, "roles")?);
    let names = column::<LargeStringArray>(&batch, "role")?;
    let counts = column::<UInt32Array>(&batch, "tokens")?;
    let run = |idx| (names.value(idx).to_owned(), counts.value(idx));
    Ok(Roles { runs: (0..names.len()).map(run).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn roles(runs: &[(&str, u32)]) -> Roles {
        let mut roles = Roles::default();
        runs.iter().for_each(|(role, n)| roles.push(role, *n));
        roles
    }

    #[test]
    fn neighbours_of_one_role_are_one_run() {
        let all = roles(&[("user", 2), ("assistant", 0), ("user", 1), ("assistant", 4)]);
        assert_eq!(all.runs().collect::<Vec<_>>(), [("user", 3), ("assistant", 4)]);
        assert_eq!(all.n_tokens(), 7);
        let mut more = roles(&[("text", 1), ("user", 1)]);
        more.append(&all);
        assert_eq!(more, roles(&[("text", 1), ("user", 4), ("assistant", 4)]));
    }

    #[test]
    fn a_part_has_the_roles_of_its_tokens() {
        let all = roles(&[("user", 3), ("assistant", 4)]);
        assert_eq!(all.part(&(0..7)), all);
        assert_eq!(all.part(&(2..4)), roles(&[("user", 1), ("assistant", 1)]));
        assert_eq!(all.part(&(3..5)), roles(&[("assistant", 2)]));
        assert_eq!(all.part(&(7..9)), Roles::default());
    }

    #[test]
    fn trained_tokens_are_counted_by_run() {
        let weights = [0.0, 1.0, 0.5, 0.0, 1.0, 0.0, 2.0];
        let found = roles(&[("user", 3), ("assistant", 4)]);
        assert_eq!(found.trained(&weights).collect::<Vec<_>>(), [("user", 2), ("assistant", 2)]);
        assert_eq!(found.trained(&weights[..2]).map(|(_, n)| n).sum::<u64>(), 1);
    }

    #[test]
    fn roles_read_back_from_their_column() {
        let all = [roles(&[("user", 3), ("assistant/reasoning", 4)]), Roles::one(TEXT, 9)];
        let column = roles_column(all.iter()).unwrap();
        for (row, expect) in all.iter().enumerate() {
            assert_eq!(&roles_at(&column, row).unwrap(), expect);
            assert_eq!(expect.fault(), None);
        }
        for runs in [[("a", 1), ("a", 2)], [("", 1), ("a", 2)], [("a", 0), ("b", 2)]] {
            let runs = runs.map(|(role, n): (&str, u32)| (role.to_owned(), n)).to_vec();
            assert!(Roles { runs }.fault().is_some());
        }
    }
}
