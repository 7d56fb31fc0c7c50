//! Whose words each trained token is; what a role is stands at [`Roles`].
//!
//! A token is of the span that its weight comes from: of the first that it has bytes of and that a
//! message said, else of the first. An untrained token is counted with the trained ones before it,
//! those at the start with the first.

use std::ops::Range;

use hone_schema::{Kind, Part, Rendered, Roles, Span, TEMPLATE, TEXT, THOUGHTS, UNKNOWN};

use crate::encode::Encoded;
use crate::mask::{bytes, touched_from};

/// The roles of a row's tokens.
pub(crate) fn roles(row: &Rendered, encoded: &Encoded, weights: &[f32]) -> Roles {
    let n = weights.len() as u32;
    if row.kind == Kind::Text {
        return Roles::one(TEXT, n);
    }
    let mut roles = Roles::default();
    let (mut from, mut start) = (0, 0);
    // The span of the run that is being counted.
    let mut current: Option<usize> = None;
    for (at, token) in encoded.offsets.iter().enumerate().filter(|(at, _)| weights[*at] > 0.0) {
        // Nearly every token lies wholly in the span of the one before it.
        if current.is_some_and(|span| holds(&row.spans[span], token)) {
            continue;
        }
        let touched = touched_from(&row.spans, token, from);
        from = touched.start;
        let said = touched.clone().find(|span| row.spans[*span].part.is_said());
        let Some(span) = said.or_else(|| touched.clone().next()) else { continue };
        if let Some(before) = current.filter(|before| *before != span) {
            push(&mut roles, row, before, at as u32 - start);
            start = at as u32;
        }
        current = Some(span);
    }
    match current {
        Some(last) => push(&mut roles, row, last, n - start),
        None => roles.push(UNKNOWN, n),
    }
    roles
}

/// Whether a token has bytes of this span alone.
fn holds(span: &Span, token: &Range<usize>) -> bool {
    let span = bytes(span);
    span.start <= token.start && token.start < span.end && token.end <= span.end
}

fn push(roles: &mut Roles, row: &Rendered, span: usize, n_tokens: u32) {
    let (span, before) = (&row.spans[span], &row.spans[..span]);
    let is_own = |span: &&Span| span.message.is_some();
    // Text of the template between messages is the end of the turn before it.
    match std::iter::once(span).chain(before.iter().rev()).find(is_own) {
        None => roles.push(TEMPLATE, n_tokens),
        Some(owner) if span.part == Part::Reasoning => {
            roles.push(&format!("{}{THOUGHTS}", owner.role), n_tokens);
        }
        Some(owner) => roles.push(&owner.role, n_tokens),
    }
}
