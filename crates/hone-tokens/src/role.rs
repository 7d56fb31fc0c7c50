//! Whose words each trained token is; what a role is stands at [`Roles`].
//!
//! A token is of the span that its weight comes from: of the first that it has bytes of and that a
//! message said, else of the first. An untrained token is counted with the trained ones before it,
//! those at the start with the first.

use std::ops::Range;

use hone_schema::{Kind, Part, Rendered, Roles, Span, TEMPLATE, TEXT, THOUGHTS, UNKNOWN};

use crate::encode::Encoded;
use crate::mask::touched_from;

/// The roles of a row's tokens.
pub(crate) fn roles(row: &Rendered, encoded: &Encoded, weights: &[f32]) -> Roles {
    let n = weights.len() as u32;
    if row.kind == Kind::Text {
        return Roles::one(TEXT, n);
    }
    let mut roles = Roles::default();
    let (mut at, mut from, mut start) = (0, 0, 0);
    // The span of the run that is being counted.
    let mut current: Option<usize> = None;
    while let Some(skipped) = weights[at..].iter().position(|weight| *weight > 0.0) {
        at += skipped;
        let touched = touched_from(&row.spans, &encoded.offsets[at], from);
        from = touched.start;
        let said = touched.clone().find(|span| row.spans[*span].part.is_said());
        let Some(span) = said.or_else(|| touched.clone().next()) else {
            at += 1;
            continue;
        };
        if let Some(before) = current.filter(|before| *before != span) {
            push(&mut roles, row, before, at as u32 - start);
            start = at as u32;
        }
        current = Some(span);
        // The tokens that lie wholly in the same span are looked past together.
        let end = row.spans[span].end as usize;
        let is_inside = |token: &Range<usize>| token.start < end && token.end <= end;
        at += encoded.offsets[at..].partition_point(is_inside).max(1);
    }
    match current {
        Some(last) => push(&mut roles, row, last, n - start),
        None => roles.push(UNKNOWN, n),
    }
    roles
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
