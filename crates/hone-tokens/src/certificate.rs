//! What is seen to hold on every row that is taken.
//!
//! This looks at tokens and at the template's spans, not at how the mask was made, so that a mistake there is found here:
//! no token begins a text twice; every trained response has a stop marker, that marker is one token, and that token is
//! trained; no trained token holds a byte of a header or of a message that is not to be trained; at least one is trained.

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
    nothing_else(vocab, work, rules.train_on)?;
    stops(work)
}

/// Indexes of the tokens that share a byte with `bytes`.
fn tokens_of(work: &Work, bytes: &Range<usize>) -> Range<usize> {
    let offsets = &work.encoded.offsets;
    let from = offsets.partition_point(|o| o.end <= bytes.start);
    let n = offsets[from..].partition_point(|o| o.start < bytes.end);
    from..from + n
}

/// A beginning-of-text token stands first, or behind the token that ends the turn before: as in Llama-2's template, and in
/// SmolLM2's, where it is the marker that opens every turn. A turn that is not trained ends in scaffold, so what ends a turn
/// is known from the stops of those that are.
fn one_bos(work: &Work, bos: Option<u32>) -> Result<(), Fault> {
    let Some(bos) = bos else { return Ok(()) };
    let spans = &work.row.spans;
    let part_at = |at: &Range<usize>| {
        let span = spans.partition_point(|s| (s.end as usize) <= at.start);
        spans.get(span).map(|s| s.part)
    };
    let tokens = || work.encoded.ids.iter().zip(&work.encoded.offsets);
    let stops: BTreeSet<u32> =
        tokens().filter(|(_, at)| part_at(at) == Some(Part::Stop)).map(|(id, _)| *id).collect();
    let mut text_begins = true;
    for (id, at) in tokens() {
        let part = part_at(at);
        if *id == bos && part == Some(Part::Scaffold) && !text_begins {
            let detail = format!("again at byte {}", at.start);
            return Err((Reason::DoubledBos, detail));
        }
        let is_blank = work.row.text[at.clone()].trim().is_empty();
        text_begins = stops.contains(id) || (text_begins && is_blank && *id != bos);
    }
    Ok(())
}

/// No trained token holds a byte that is not to be trained; of scaffold, blanks before trained bytes may be in it.
fn nothing_else(vocab: &Vocab, work: &Work, train_on: TrainOn) -> Result<(), Fault> {
    let row = work.row;
    for span in &row.spans {
        let is_taken = train_on.takes(row, span);
        // A stop marker is trained with its response, whatever its own weight.
        if is_taken && (span.weight > 0.0 || span.part == Part::Stop) {
            continue;
        }
        let bytes = bytes(span);
        for token in tokens_of(work, &bytes).filter(|token| work.weights[*token] > 0.0) {
            let at = work.encoded.offsets[token].clone();
            let detail = format!("token {token}, {:?}", &row.text[at.clone()]);
            if span.part != Part::Scaffold {
                return Err((Reason::ForeignByteTrained, detail));
            }
            let inside = &row.text[at.start.max(bytes.start)..at.end.min(bytes.end)];
            if !inside.trim().is_empty() || vocab.is_control(work.encoded.ids[token]) {
                return Err((Reason::HeaderTrained, detail));
            }
        }
    }
    Ok(())
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
        // A text may go on where its row ends, and what others say is not the model's to end; a response is.
        let is_response = row.spans.iter().any(|s| s.message == message && s.role == RESPONSE);
        if is_response && row.kind != Kind::Text && stops.clone().next().is_none() {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{TooLong, VocabSpec, train_vocab};
    use hone_schema::{Rendered, Split};

    const MARKERS: [&str; 4] = ["<s>", "<u>", "<a>", "<e>"];

    /// A vocabulary of bytes and markers, and `<s><u>q<e><a>. r<e>` with its spans.
    fn world() -> (Vocab, Rendered) {
        let specials = MARKERS.map(str::to_owned).to_vec();
        let spec =
            VocabSpec::new(260, specials).expect("260 tokens hold 256 bytes and four markers");
        let none: [&str; 0] = [];
        let vocab = Vocab::from_json(&train_vocab(none, &spec)).expect("train_vocab writes one");
        let bits = [
            ("<s><u>", None, "", Part::Scaffold, 0.0),
            ("q", Some(0), "user", Part::Content, 1.0),
            ("<e><a>. ", None, "", Part::Scaffold, 0.0),
            ("r", Some(1), "assistant", Part::Content, 1.0),
            ("<e>", Some(1), "assistant", Part::Stop, 1.0),
        ];
        let mut row = Rendered {
            id: "r".into(),
            source: "s".into(),
            split: Split::Train,
            kind: Kind::Sft,
            text: String::new(),
            spans: Vec::new(),
            prompt_len: None,
            meta: None,
        };
        for (text, message, role, part, weight) in bits {
            let start = row.text.len() as u32;
            row.text.push_str(text);
            let end = row.text.len() as u32;
            let role = role.to_owned();
            row.spans.push(Span { start, end, message, role, part, weight, chosen: false });
        }
        (vocab, row)
    }

    /// The certificate of a mask: one digit a token of `<s> <u> q <e> <a> . _ r <e>`.
    fn check(mask: &str, expect: Result<(u32, usize), Reason>) {
        let (vocab, row) = world();
        let written = crate::row::written(&row, row.text.len());
        let encoded = vocab.encode(&row.text, &written).expect("bytes can be written");
        let weights: Vec<f32> = mask.bytes().map(|b| f32::from(b - b'0')).collect();
        assert_eq!(weights.len(), encoded.ids.len(), "one digit a token");
        let work = Work { row: &row, encoded, weights };
        let rules =
            Rules { max_len: 9, too_long: TooLong::Drop, train_on: TrainOn::Assistant, bos: None };
        let found = certify(&vocab, &work, &rules);
        let found =
            found.map(|proof| (proof.turns, proof.stops.len())).map_err(|(reason, _)| reason);
        assert_eq!(found, expect, "{mask}");
    }

    /// Masks that are wrong in one token each: the certificate finds them all, whatever made them.
    #[test]
    fn planted_faults_are_found() {
        check("000000011", Ok((1, 1)));
        check("000000000", Err(Reason::NoTrainedToken));
        check("000000010", Err(Reason::StopNotTrained));
        check("001000011", Err(Reason::ForeignByteTrained));
        check("000100011", Err(Reason::HeaderTrained));
        check("000010011", Err(Reason::HeaderTrained));
        check("000001011", Err(Reason::HeaderTrained));
        check("010000011", Err(Reason::HeaderTrained));
        check("100000011", Err(Reason::HeaderTrained));
        // A blank of the template may stand before what is trained.
        check("000000111", Ok((1, 1)));
    }
}
