//! What is seen to hold on every row that is taken.
//!
//! This looks at tokens and at the template's spans, not at how the mask was made, so that a mistake there is found here:
//! no token begins a text twice; every trained response has a stop marker, that marker is one token, and that token is
//! trained; no trained token holds a byte of a header or of a message that the policy leaves out; at least one is trained.

use std::collections::BTreeSet;
use std::ops::Range;

use hone_schema::{Kind, Part, Span};

use crate::mask::{RESPONSE, TrainOn, bytes};
use crate::row::{Reason, Rules, Work};
use crate::vocab::Vocab;

/// What was seen.
pub(crate) struct Proof {
    /// Ids of the stop tokens.
    pub(crate) stops: BTreeSet<u32>,
    /// Number of trained responses.
    pub(crate) turns: u32,
}

type Fault = (Reason, String);

/// Certifies a row.
///
/// # Errors
/// The first thing that does not hold, and where.
pub(crate) fn certify(vocab: &Vocab, work: &Work, rules: &Rules) -> Result<Proof, Fault> {
    if work.weights.iter().all(|weight| *weight == 0.0) {
        let detail = format!("{} tokens, none of them trained", work.weights.len());
        return Err((Reason::NoTrainedToken, detail));
    }
    one_bos(work, rules.bos)?;
    no_foreign_byte(work, rules.train_on)?;
    no_header(vocab, work)?;
    stops(work)
}

/// Indexes of the tokens that share a byte with `bytes`.
fn tokens_of(work: &Work, bytes: &Range<usize>) -> Range<usize> {
    let offsets = &work.encoded.offsets;
    let from = offsets.partition_point(|o| o.end <= bytes.start);
    let n = offsets[from..].partition_point(|o| o.start < bytes.end);
    from..from + n
}

/// A beginning-of-text token stands first, or behind the stop of the turn before (as Llama-2's template has it).
fn one_bos(work: &Work, bos: Option<u32>) -> Result<(), Fault> {
    let Some(bos) = bos else { return Ok(()) };
    let spans = &work.row.spans;
    let mut text_begins = true;
    for (id, at) in work.encoded.ids.iter().zip(&work.encoded.offsets) {
        let span = spans.partition_point(|s| (s.end as usize) <= at.start);
        let part = spans.get(span).map(|s| s.part);
        if *id == bos && part == Some(Part::Scaffold) && !text_begins {
            let detail = format!("again at byte {}", at.start);
            return Err((Reason::DoubledBos, detail));
        }
        let is_blank = work.row.text[at.clone()].trim().is_empty();
        text_begins = part == Some(Part::Stop) || (text_begins && is_blank && *id != bos);
    }
    Ok(())
}

fn no_foreign_byte(work: &Work, train_on: TrainOn) -> Result<(), Fault> {
    if work.row.kind == Kind::Text || train_on == TrainOn::All {
        return Ok(());
    }
    let last = work.row.spans.iter().rev().find(|s| s.role == RESPONSE);
    let last = last.and_then(|span| span.message);
    let is_foreign = |span: &&Span| {
        span.part != Part::Scaffold
            && (span.role != RESPONSE || (train_on == TrainOn::Last && span.message != last))
    };
    for span in work.row.spans.iter().filter(is_foreign) {
        for token in tokens_of(work, &bytes(span)) {
            if work.weights[token] > 0.0 {
                let detail = format!("token {token} has bytes of a {} message", span.role);
                return Err((Reason::ForeignByteTrained, detail));
            }
        }
    }
    Ok(())
}

/// A header is what the template writes before a message speaks and a served model is given: no control token of it, and
/// nothing of it but blanks, may be trained.
fn no_header(vocab: &Vocab, work: &Work) -> Result<(), Fault> {
    let row = work.row;
    let fault = |token: usize| {
        let detail = format!("token {token}, {:?}", &row.text[work.encoded.offsets[token].clone()]);
        Err((Reason::HeaderTrained, detail))
    };
    let own_end =
        |span: &Span| {
            // Behind its first content a message's scaffold is part of what it says, up to its stop.
            let spoke = row.spans.iter().any(|s| {
                s.message == span.message && s.part == Part::Content && s.end <= span.start
            });
            let stops = row.spans.iter().any(|s| {
                s.message == span.message && s.part != Part::Scaffold && s.start >= span.end
            });
            span.message.is_some() && spoke && stops
        };
    let given = lead_len(work);
    for (idx, span) in row.spans.iter().enumerate() {
        if span.part != Part::Scaffold || own_end(span) {
            continue;
        }
        let header = header_of(&row.spans[idx..], given);
        for token in tokens_of(work, &header) {
            let at = &work.encoded.offsets[token];
            let inside = at.start.max(header.start)..at.end.min(header.end);
            let is_text = !row.text[inside].trim().is_empty();
            let is_control = vocab.is_control(work.encoded.ids[token]);
            if work.weights[token] > 0.0 && (is_text || is_control) {
                return fault(token);
            }
        }
    }
    Ok(())
}

/// The bytes of the first of `spans`, a scaffold, that are a header: not those just before a response that are part of it.
fn header_of(spans: &[Span], given: usize) -> Range<usize> {
    let Range { start, end } = bytes(&spans[0]);
    let speaks = spans.iter().find(|span| span.part != Part::Scaffold);
    match speaks.filter(|span| span.role == RESPONSE) {
        Some(span) => start..end.min((span.start as usize).saturating_sub(given)).max(start),
        None => start..end,
    }
}

/// Length of what the template writes between the prompt that a served model is given and the response.
fn lead_len(work: &Work) -> usize {
    let first = crate::mask::first_of_last_response(work.row);
    let prompt_len = work.row.prompt_len.map(|len| len as usize);
    match (first, prompt_len) {
        (Some(first), Some(len)) => (work.row.spans[first].start as usize).saturating_sub(len),
        _ => 0,
    }
}

fn stops(work: &Work) -> Result<Proof, Fault> {
    let row = work.row;
    let mut proof = Proof { stops: BTreeSet::new(), turns: 0 };
    let is_trained = |span: &Span| tokens_of(work, &bytes(span)).any(|t| work.weights[t] > 0.0);
    let mut trained: Vec<Option<u32>> = row
        .spans
        .iter()
        .filter(|span| span.part != Part::Scaffold && is_trained(span))
        .map(|span| span.message)
        .collect();
    trained.sort_unstable();
    trained.dedup();
    for message in trained {
        proof.turns += 1;
        let mut stops = row.spans.iter().filter(|s| s.message == message && s.part == Part::Stop);
        // A text may go on where its row ends; a response may not.
        if row.kind != Kind::Text && stops.clone().next().is_none() {
            let detail = message.map_or_else(String::new, |m| format!("message {m}"));
            return Err((Reason::NoStop, detail));
        }
        stops.try_for_each(|span| stop(work, span, &mut proof))?;
    }
    Ok(proof)
}

fn stop(work: &Work, span: &Span, proof: &mut Proof) -> Result<(), Fault> {
    let bytes = bytes(span);
    let tokens = tokens_of(work, &bytes);
    let text = &work.row.text[bytes.clone()];
    let is_one = tokens.len() == 1 && work.encoded.offsets[tokens.start] == bytes;
    if !is_one {
        let detail = format!("{text:?} is {} tokens, or part of one", tokens.len());
        return Err((Reason::StopInPieces, detail));
    }
    if work.weights[tokens.start] == 0.0 {
        return Err((Reason::StopNotTrained, format!("{text:?} at byte {}", bytes.start)));
    }
    proof.stops.insert(work.encoded.ids[tokens.start]);
    Ok(())
}
