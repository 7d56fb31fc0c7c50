//! Numbers over every row that was looked at, shown or not.

use std::collections::BTreeMap;

use hone_tokens::Counts;

use crate::view::View;

/// Bars of the histogram of trained shares.
pub(crate) const SHARES: usize = 20;

/// Counts of one source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Source {
    pub(crate) rows: u64,
    pub(crate) refused: u64,
    pub(crate) cut: u64,
    pub(crate) tokens: Counts,
}

/// Counts of all rows.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Stats {
    pub(crate) all: Source,
    /// Trained tokens that do not go out, of refused rows and of cut ones.
    pub(crate) lost: Counts,
    pub(crate) sources: BTreeMap<String, Source>,
    pub(crate) refused: BTreeMap<&'static str, u64>,
    /// Tokens by role and part, of the rows that go out.
    pub(crate) parts: BTreeMap<(String, &'static str), Counts>,
    /// Rows that go out, by the share of their tokens that is trained.
    pub(crate) shares: [u64; SHARES],
    /// Rows by their tokens before anything was cut, in half octaves; see [`octave`].
    pub(crate) lengths: BTreeMap<u32, u64>,
}

/// The half octave of a length: two of them double it.
pub(crate) fn octave(tokens: u64) -> u32 {
    let n = tokens.max(1);
    let whole = n.ilog2();
    // The border inside an octave is that of the square root of two: n² ≥ 2^(2·whole + 1).
    2 * whole + u32::from(u128::from(n).pow(2) >= 1 << (2 * whole + 1))
}

/// The least length of a half octave.
pub(crate) fn octave_from(octave: u32) -> u64 {
    (f64::from(octave) / 2.0).exp2().ceil() as u64
}

impl Stats {
    /// Counts a row.
    pub(crate) fn add(&mut self, view: &View) {
        let (before, now) = (view.before(), view.outcome());
        let source = self.sources.entry(view.rendered.source.clone()).or_default();
        for source in [&mut self.all, source] {
            source.rows += 1;
            source.refused += u64::from(view.fate.is_err());
            source.cut += u64::from(view.is_cut());
            source.tokens.tokens += now.tokens;
            source.tokens.trained += now.trained;
        }
        self.lost.tokens += before.tokens - now.tokens;
        self.lost.trained += before.trained - now.trained;
        *self.lengths.entry(octave(before.tokens)).or_default() += 1;
        if let Err(refusal) = &view.fate {
            *self.refused.entry(refusal.reason.as_str()).or_default() += 1;
            return;
        }
        let bar = (SHARES as u64 * now.trained / now.tokens.max(1)) as usize;
        self.shares[bar.min(SHARES - 1)] += 1;
        let mut spans = vec![Counts::default(); view.rendered.spans.len()];
        for token in view.tokens.iter().filter(|token| token.kept) {
            let Some(span) = token.span else { continue };
            spans[span].tokens += 1;
            spans[span].trained += u64::from(token.weight > 0.0);
        }
        for (span, counts) in view.rendered.spans.iter().zip(spans) {
            if counts.tokens > 0 {
                let sum = self.parts.entry((span.role.clone(), span.part.as_str())).or_default();
                sum.tokens += counts.tokens;
                sum.trained += counts.trained;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_half_octaves_double_a_length() {
        let found: Vec<u32> = [0, 1, 2, 3, 4, 5, 6, 8, 11, 12, 16, 23, 1024].map(octave).to_vec();
        assert_eq!(found, [0, 0, 2, 3, 4, 4, 5, 6, 6, 7, 8, 9, 20]);
        for n in 1..5000 {
            let octave = octave(n);
            assert!(octave_from(octave) <= n && n < octave_from(octave + 1), "{n} in {octave}");
        }
    }
}
