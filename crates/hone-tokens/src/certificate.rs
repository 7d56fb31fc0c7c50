//! What is seen to hold on every row that is taken.
//!
//! This looks at tokens, at the template's spans and at the policy, not at how the mask was made, so that a mistake there is
//! found here: no token begins a text twice; every trained response has a stop marker, that marker is one token, and that token
//! is trained, as far as the policy has it so; no trained token holds a byte of a header or of a message that is not to be
//! trained; none weighs more than the data says; the first token is not trained; no text that is to be trained is in no token; at
//! least one token is trained. What remains of a row that was cut is looked at again.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use hone_schema::{Kind, Part, Rendered, Share, Span};

use crate::mask::bytes;
use crate::policy::{Learn, Policy, RESPONSE, TrainOn, TrainOnStop};
use crate::row::{Reason, Rules, Work};
use crate::thought::thoughts;
use crate::vocab::Vocab;

/// What was seen.
pub(crate) struct Proof {
    /// Ids of the stop tokens of trained responses.
    pub(crate) stops: BTreeSet<u32>,
    /// Number of trained responses.
    pub(crate) turns: u32,
    /// The tokens of each of them: first, behind the last before its stop, and that of its stop.
    pub(crate) endings: Vec<Ending>,
}

/// Where a trained response lies, in tokens.
pub(crate) struct Ending {
    /// Tokens of what it says.
    pub(crate) said: Range<usize>,
    /// Its stop token.
    pub(crate) stop: usize,
}

type Fault = (Reason, String);

/// Certifies a row.
///
/// # Errors
/// The first thing that does not hold, and where.
pub(crate) fn certify(vocab: &Vocab, work: &Work, rules: &Rules) -> Result<Proof, Fault> {
    if work.weights.iter().all(|weight| *weight == 0.0) {
        return Err(untrained(work, &rules.policy));
    }
    in_model(work, rules)?;
    let stop_ids = stop_ids(work);
    one_bos(work, rules.bos, &stop_ids)?;
    let may = May::new(work.row, &rules.policy);
    nothing_else(vocab, work, &may, &stop_ids)?;
    not_the_first(work)?;
    nothing_lost(work, &may)?;
    no_thought(work, &rules.policy)?;
    stops(work, &may)
}

/// Why nothing of a row is trained: it is as it should be where that is another sample's part.
fn untrained(work: &Work, policy: &Policy) -> Fault {
    let reason = match (work.row.share, &policy.train_on) {
        (Share::Earlier, TrainOn::Last) => Reason::NotTheLast,
        (Share::Rest, _) => Reason::TrainedElsewhere,
        _ => Reason::NoTrainedToken,
    };
    (reason, format!("{} tokens, none of them trained", work.weights.len()))
}

fn in_model(work: &Work, rules: &Rules) -> Result<(), Fault> {
    let Some(n) = rules.n_embeddings else { return Ok(()) };
    match work.encoded.ids.iter().position(|id| *id >= n) {
        Some(token) => {
            let (id, at) = (work.encoded.ids[token], work.encoded.offsets[token].clone());
            let text = &work.row.text[at];
            let detail = format!("token {token}, {text:?}, has id {id}, the model has {n}");
            Err((Reason::NotInModel, detail))
        }
        None => Ok(()),
    }
}

/// Indexes of the tokens that share a byte with `bytes`.
fn tokens_of(work: &Work, bytes: &Range<usize>) -> Range<usize> {
    let offsets = &work.encoded.offsets;
    let from = offsets.partition_point(|o| o.end <= bytes.start);
    let n = offsets[from..].partition_point(|o| o.start < bytes.end);
    from..from + n
}

/// The tokens that end the responses of a row, trained or not.
fn stop_ids(work: &Work) -> BTreeSet<u32> {
    let stops = work.row.spans.iter().filter(|span| span.part == Part::Stop);
    stops.flat_map(|span| tokens_of(work, &bytes(span))).map(|t| work.encoded.ids[t]).collect()
}

/// A beginning-of-text token stands first, or behind the token that ends the turn before: as in Llama-2's template, and in
/// SmolLM2's, where it is the marker that opens every turn. A turn that is not trained ends in scaffold, so what ends a turn
/// is known from the stops of responses. Where one token both begins and ends texts, only where it stands says which it does.
fn one_bos(work: &Work, bos: Option<u32>, stops: &BTreeSet<u32>) -> Result<(), Fault> {
    let Some(bos) = bos else { return Ok(()) };
    let spans = &work.row.spans;
    let mut span = 0;
    let mut text_begins = true;
    for (id, at) in work.encoded.ids.iter().zip(&work.encoded.offsets) {
        while span > 0 && spans[span - 1].end as usize > at.start {
            span -= 1;
        }
        while spans.get(span).is_some_and(|s| s.end as usize <= at.start) {
            span += 1;
        }
        let part = spans.get(span).map(|s| s.part);
        if *id == bos && part == Some(Part::Scaffold) && !text_begins {
            let detail = format!("again at byte {}", at.start);
            return Err((Reason::DoubledBos, detail));
        }
        let goes_on = || *id != bos && work.row.text[at.clone()].trim().is_empty();
        let ends_turn = if *id == bos { part == Some(Part::Stop) } else { stops.contains(id) };
        text_begins = ends_turn || (text_begins && goes_on());
    }
    Ok(())
}

/// Which bytes may be trained: the policy, said anew.
struct May<'a> {
    row: &'a Rendered,
    policy: &'a Policy,
    last_response: Option<u32>,
    /// Messages that say something, nothing of which may be trained.
    silent: BTreeSet<u32>,
}

impl<'a> May<'a> {
    fn new(row: &'a Rendered, policy: &'a Policy) -> Self {
        let mut last_response = None;
        for span in &row.spans {
            if span.role == RESPONSE {
                last_response = last_response.max(span.message);
            }
        }
        let mut may = May { row, policy, last_response, silent: BTreeSet::new() };
        let said = || row.spans.iter().filter(|span| span.part.is_said());
        let heard: BTreeSet<u32> =
            said().filter(|span| may.train(span)).filter_map(|span| span.message).collect();
        may.silent =
            said().filter_map(|span| span.message).filter(|m| !heard.contains(m)).collect();
        may
    }

    /// Whether the message of a span is to be trained, as far as roles go.
    fn role(&self, span: &Span) -> bool {
        let is_response = span.role == RESPONSE;
        match (&self.policy.train_on, span.message) {
            (_, None) => false,
            _ if span.chosen => true,
            (TrainOn::All, _) => is_response,
            (TrainOn::Last, message) => {
                let is_here = self.row.share == Share::Main;
                is_here && is_response && message == self.last_response
            }
            (TrainOn::Every, _) => true,
            (TrainOn::Roles(roles), _) => roles.contains(&span.role),
        }
    }

    /// Whether the bytes of a span that is no stop marker may be trained.
    fn train(&self, span: &Span) -> bool {
        let is_thought = span.part == Part::Reasoning && self.policy.reasoning == Learn::Mask;
        // Around what is not trained, the template's marks are not either.
        let is_silent = span.part == Part::Scaffold
            && span.message.is_some_and(|message| self.silent.contains(&message));
        let is_theirs = match self.row.kind {
            Kind::Text => span.part != Part::Scaffold,
            _ => self.role(span) && !is_thought && !is_silent,
        };
        span.weight > 0.0 && is_theirs
    }
}

/// No trained token holds a byte that is not to be trained; of scaffold, blanks before its trained bytes may be in it.
fn nothing_else(
    vocab: &Vocab,
    work: &Work,
    may: &May,
    stop_ids: &BTreeSet<u32>,
) -> Result<(), Fault> {
    let row = work.row;
    let heaviest = heaviest(&row.spans);
    for (idx, span) in row.spans.iter().enumerate().filter(|(_, span)| span.part != Part::Stop) {
        let is_taken = may.train(span);
        let follows_taken = idx.checked_sub(1).is_some_and(|before| may.train(&row.spans[before]));
        let bytes = bytes(span);
        for token in tokens_of(work, &bytes).filter(|token| work.weights[*token] > 0.0) {
            let (id, at) = (work.encoded.ids[token], work.encoded.offsets[token].clone());
            let detail = || format!("token {token}, {:?}", &row.text[at.clone()]);
            if is_taken {
                if work.weights[token] > span.weight {
                    return Err((Reason::TooHeavy, detail()));
                }
                continue;
            }
            if span.part != Part::Scaffold {
                return Err((Reason::ForeignByteTrained, detail()));
            }
            let is_foreign_stop = may.policy.stop == TrainOnStop::All && stop_ids.contains(&id);
            let inside = &row.text[at.start.max(bytes.start)..at.end.min(bytes.end)];
            let is_before = at.end > bytes.end && (at.start >= bytes.start || !follows_taken);
            let is_header = !is_before || !inside.trim().is_empty() || vocab.is_control(id);
            if is_header && !is_foreign_stop {
                return Err((Reason::HeaderTrained, detail()));
            }
            if is_foreign_stop && work.weights[token] > heaviest {
                return Err((Reason::TooHeavy, detail()));
            }
        }
    }
    Ok(())
}

/// The greatest weight that the data gives any of `spans`.
fn heaviest(spans: &[Span]) -> f32 {
    spans.iter().map(|span| span.weight).fold(0.0, f32::max)
}

/// The first token is predicted by nothing.
fn not_the_first(work: &Work) -> Result<(), Fault> {
    if work.weights.first().is_some_and(|weight| *weight > 0.0) {
        let detail = format!("{:?}", &work.row.text[work.encoded.offsets[0].clone()]);
        return Err((Reason::FirstTrained, detail));
    }
    Ok(())
}

/// Text that is to be trained is in its tokens: a vocabulary that lacks a byte or a character leaves it out without a word. Where
/// one did, offsets are not to be trusted, so nothing of that piece may be trained. Between tokens blanks may be lost, because
/// some tokenizers trim.
fn nothing_lost(work: &Work, may: &May) -> Result<(), Fault> {
    for piece in &work.encoded.lost {
        let mut spans = spans_of(work.row, piece).filter(|span| span.part != Part::Stop);
        if spans.any(|span| may.train(span))
            || tokens_of(work, piece).any(|token| work.weights[token] > 0.0)
        {
            return Err(text_lost(work.row, "something in ", piece));
        }
    }
    let mut done = 0;
    let tokens = work.encoded.offsets.iter().map(|at| at.start..at.end);
    let end = work.row.text.len();
    for at in tokens.chain(std::iter::once(end..end)) {
        if at.start > done {
            lost(work, may, done..at.start)?;
        }
        done = done.max(at.end);
    }
    Ok(())
}

fn lost(work: &Work, may: &May, gap: Range<usize>) -> Result<(), Fault> {
    for span in spans_of(work.row, &gap) {
        let inside = gap.start.max(span.start as usize)..gap.end.min(span.end as usize);
        let text = work.row.text.get(inside.clone()).unwrap_or("?");
        if span.part.is_said() && may.train(span) && !text.trim().is_empty() {
            return Err(text_lost(work.row, "", &inside));
        }
    }
    Ok(())
}

/// The spans that share a byte with `bytes`.
fn spans_of<'a>(row: &'a Rendered, bytes: &Range<usize>) -> impl Iterator<Item = &'a Span> {
    let from = row.spans.partition_point(|span| span.end as usize <= bytes.start);
    let end = bytes.end;
    row.spans[from..].iter().take_while(move |span| (span.start as usize) < end)
}

fn text_lost(row: &Rendered, what: &str, bytes: &Range<usize>) -> Fault {
    let shown: String = row.text.get(bytes.clone()).unwrap_or("?").chars().take(40).collect();
    (Reason::TextLost, format!("{what}{shown:?} at byte {}", bytes.start))
}

/// No trained token holds a byte of a thought that the policy masks.
fn no_thought(work: &Work, policy: &Policy) -> Result<(), Fault> {
    if policy.reasoning == Learn::Train && policy.empty_thoughts == Learn::Train {
        return Ok(());
    }
    for thought in thoughts(work.row) {
        let masked = match (thought.is_empty, policy.empty_thoughts, policy.reasoning) {
            (true, Learn::Mask, _) => thought.whole,
            (false, _, Learn::Mask) => thought.inside,
            _ => continue,
        };
        if let Some(token) = tokens_of(work, &masked).find(|token| work.weights[*token] > 0.0) {
            let at = work.encoded.offsets[token].clone();
            let detail = format!("token {token}, {:?} of a thought", &work.row.text[at]);
            return Err((Reason::ForeignByteTrained, detail));
        }
    }
    Ok(())
}

/// A message, as its stop markers are judged.
#[derive(Default)]
struct Turn<'a> {
    /// Spans of its stop markers.
    stops: Vec<&'a Span>,
    /// Tokens of its other spans.
    said: Option<Range<usize>>,
    /// Whether any of those is to be trained.
    may_say: bool,
    /// Whether any of those is trained.
    is_said: bool,
    /// The greatest weight that the data gives any of its spans.
    heaviest: f32,
    is_response: bool,
}

fn turns<'a>(work: &Work<'a>, may: &May) -> BTreeMap<Option<u32>, Turn<'a>> {
    let mut turns: BTreeMap<Option<u32>, Turn> = BTreeMap::new();
    for span in work.row.spans.iter() {
        if span.message.is_none() && work.row.kind != Kind::Text {
            continue;
        }
        let turn = turns.entry(span.message).or_default();
        turn.heaviest = turn.heaviest.max(span.weight);
        turn.is_response |= span.role == RESPONSE && work.row.kind != Kind::Text;
        if span.part == Part::Stop {
            turn.stops.push(span);
            continue;
        }
        let mut tokens = tokens_of(work, &bytes(span));
        turn.said = match &turn.said {
            Some(said) => Some(said.start..tokens.end.max(said.end)),
            None => Some(tokens.clone()),
        };
        let may_say = may.train(span);
        turn.may_say |= may_say;
        turn.is_said |= may_say && tokens.any(|token| work.weights[token] > 0.0);
    }
    turns
}

/// The stop markers are trained, or not, as the policy says.
fn stops(work: &Work, may: &May) -> Result<Proof, Fault> {
    let mut proof = Proof { stops: BTreeSet::new(), turns: 0, endings: Vec::new() };
    let turns = turns(work, may);
    let heaviest = heaviest(&work.row.spans);
    let policy = if work.row.kind == Kind::Text { TrainOnStop::Turn } else { may.policy.stop };
    let is_marked = |span: &&Span| {
        let is_theirs = work.row.kind == Kind::Text || may.role(span);
        is_theirs && tokens_of(work, &bytes(span)).any(|token| work.weights[token] > 0.0)
    };
    // A response that says nothing, or shares its only token with its header, is trained when its stop is.
    let is_trained = |turn: &Turn| {
        turn.is_said || ((turn.said.is_none() || turn.may_say) && turn.stops.iter().any(is_marked))
    };
    let last = turns.iter().rev().find(|(_, turn)| turn.is_response && is_trained(turn));
    let last = last.map(|(message, _)| *message).filter(|_| work.row.share == Share::Main);
    for (message, turn) in &turns {
        let is_trained = is_trained(turn);
        let wants = match policy {
            TrainOnStop::Turn => is_trained,
            TrainOnStop::All => true,
            TrainOnStop::Last => is_trained && last == Some(*message),
            TrainOnStop::None => false,
        };
        proof.turns += u32::from(is_trained);
        // A text may go on where its row ends, and what others say is not the model's to end; a response is.
        if wants && is_trained && turn.is_response && turn.stops.is_empty() {
            let detail = message.map_or_else(String::new, |m| format!("message {m}"));
            return Err((Reason::NoStop, detail));
        }
        for span in &turn.stops {
            let stop = stop(work, span, wants)?;
            // Behind what is not trained, the policy gives a stop the weight of others.
            let limit = if policy == TrainOnStop::All { heaviest } else { turn.heaviest };
            if stop.is_some_and(|stop| work.weights[stop] > limit) {
                let text = &work.row.text[bytes(span)];
                return Err((Reason::TooHeavy, format!("{text:?} at byte {}", span.start)));
            }
            if let (Some(stop), true) = (stop, is_trained) {
                proof.stops.insert(work.encoded.ids[stop]);
                let said = turn.said.clone().unwrap_or(stop..stop);
                proof.endings.extend(wants.then_some(Ending { said, stop }));
            }
        }
    }
    Ok(proof)
}

/// The token of a stop marker, which is trained when the policy `wants` it and only then; `None` where it may be, and is, not one.
fn stop(work: &Work, span: &Span, wants: bool) -> Result<Option<usize>, Fault> {
    let bytes = bytes(span);
    let mut tokens = tokens_of(work, &bytes);
    let text = &work.row.text[bytes.clone()];
    let is_one = tokens.len() == 1 && work.encoded.offsets[tokens.start] == bytes;
    let first = tokens.start;
    if !wants {
        let is_trained = tokens.any(|token| work.weights[token] > 0.0);
        let detail = || format!("{text:?} at byte {}", bytes.start);
        return if is_trained {
            Err((Reason::StopTrained, detail()))
        } else {
            Ok(is_one.then_some(first))
        };
    }
    if !is_one {
        let detail = format!("{text:?} is {} tokens, or part of one", tokens.len());
        return Err((Reason::StopInPieces, detail));
    }
    if work.weights[first] == 0.0 {
        return Err((Reason::StopNotTrained, format!("{text:?} at byte {}", bytes.start)));
    }
    Ok(Some(first))
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
            share: hone_schema::Share::Main,
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
    fn check_under(
        policy: &Policy,
        edit: impl FnOnce(&mut Rendered),
        mask: &str,
        expect: Result<(u32, usize), Reason>,
    ) {
        let (vocab, mut row) = world();
        edit(&mut row);
        let written = crate::row::written(&row, row.text.len());
        let encoded = vocab.encode(&row.text, &written).expect("bytes can be written");
        let weights: Vec<f32> = mask.bytes().map(|b| f32::from(b - b'0')).collect();
        assert_eq!(weights.len(), encoded.ids.len(), "one digit a token");
        let work = Work { row: &row, encoded, weights };
        let rules = Rules {
            max_len: 9,
            too_long: TooLong::Drop,
            policy: policy.clone(),
            bos: None,
            n_embeddings: Some(260),
        };
        let found = certify(&vocab, &work, &rules);
        let found =
            found.map(|proof| (proof.turns, proof.stops.len())).map_err(|(reason, _)| reason);
        assert_eq!(found, expect, "{mask} under {policy:?}");
    }

    fn check(mask: &str, expect: Result<(u32, usize), Reason>) {
        check_under(&Policy::default(), |_| {}, mask, expect);
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
        check("000000021", Err(Reason::TooHeavy));
        check("000000012", Err(Reason::TooHeavy));
        // A blank of the template may stand before what is trained, in one token with it.
        check("000000111", Err(Reason::HeaderTrained));
    }

    /// Blanks of the template, in the one token ` r ` made of the answer and what is around it.
    #[test]
    fn blanks_of_the_template_stand_only_before_what_is_trained() {
        let cases = [
            ([(" ", 0.0), ("r", 1.0), ("", 0.0)], None),
            ([("", 0.0), ("r", 1.0), (" ", 0.0)], Some(Reason::HeaderTrained)),
            ([("r", 1.0), (" ", 0.0), ("r", 1.0)], Some(Reason::HeaderTrained)),
            ([(" ", 0.0), ("\n", 0.0), ("r", 1.0)], None),
            ([(" ", 0.0), (" ", 0.0), ("\n", 0.0)], Some(Reason::HeaderTrained)),
            ([(" ", 1.0), ("r", 1.0), (" ", 1.0)], None),
        ];
        for (bits, expect) in cases {
            let (vocab, mut row) = world();
            row.spans.truncate(2);
            row.text.truncate(row.spans[1].end as usize);
            let start = row.text.len();
            for (text, weight) in bits.iter().filter(|(text, _)| !text.is_empty()) {
                let part = if text.trim().is_empty() { Part::Scaffold } else { Part::Content };
                let from = row.text.len() as u32;
                row.text.push_str(text);
                let (end, role) = (row.text.len() as u32, RESPONSE.to_owned());
                let (message, weight, chosen) = (Some(1), *weight, false);
                row.spans.push(Span { start: from, end, message, role, part, weight, chosen });
            }
            let mut encoded = vocab.encode("hqr", &[]).expect("bytes can be written");
            encoded.offsets = vec![0..start - 1, start - 1..start, start..row.text.len()];
            let work = Work { row: &row, encoded, weights: vec![0.0, 0.0, 1.0] };
            let policy = Policy::default();
            let may = May::new(&row, &policy);
            let found = nothing_else(&vocab, &work, &may, &BTreeSet::new());
            assert_eq!(found.err().map(|(reason, _)| reason), expect, "{bits:?}");
        }
    }

    #[test]
    fn the_first_token_is_not_trained() {
        // A template may say that the model writes all of it.
        let opens = |row: &mut Rendered| {
            row.spans[0] = Span { end: row.spans[0].end, start: 0, ..row.spans[3].clone() };
            row.spans[0].part = Part::Scaffold;
        };
        let default = Policy::default();
        check_under(&default, opens, "010000011", Ok((1, 1)));
        check_under(&default, opens, "110000011", Err(Reason::FirstTrained));
    }

    #[test]
    fn what_is_around_an_untrained_answer_is_found() {
        let around = |weight: f32| {
            move |row: &mut Rendered| {
                row.spans[2] = Span {
                    start: row.spans[2].start,
                    end: row.spans[2].end,
                    part: Part::Scaffold,
                    ..row.spans[3].clone()
                };
                row.spans[3].weight = weight;
                // Something else is trained.
                row.spans[1].chosen = true;
            }
        };
        let default = Policy::default();
        check_under(&default, around(1.0), "001111111", Ok((2, 1)));
        check_under(&default, around(0.0), "001000000", Ok((1, 0)));
        check_under(&default, around(0.0), "001100000", Err(Reason::HeaderTrained));
        check_under(&default, around(0.0), "001000001", Err(Reason::StopTrained));
    }

    #[test]
    fn planted_faults_are_found_under_every_policy() {
        let same = |_: &mut Rendered| {};
        let roles = |train_on| Policy { train_on, ..Policy::default() };
        let user = roles(TrainOn::Roles(vec!["user".to_owned()]));
        check_under(&user, same, "001000000", Ok((1, 0)));
        check_under(&user, same, "001000010", Err(Reason::ForeignByteTrained));
        check_under(&user, same, "001000001", Err(Reason::StopTrained));
        check_under(&roles(TrainOn::Every), same, "001000011", Ok((2, 1)));
        check_under(&roles(TrainOn::Every), same, "001100011", Err(Reason::HeaderTrained));
        check_under(&roles(TrainOn::Last), same, "000000011", Ok((1, 1)));
        // The row itself wants the question trained; or nothing of the answer.
        let chosen = |row: &mut Rendered| row.spans[1].chosen = true;
        check_under(&Policy::default(), chosen, "001000011", Ok((2, 1)));
        let unchosen = |row: &mut Rendered| row.spans[3].weight = 0.0;
        let default = Policy::default();
        check_under(&default, unchosen, "000000011", Err(Reason::ForeignByteTrained));
        check_under(&default, unchosen, "000000001", Err(Reason::StopTrained));
        let stop = |stop| Policy { stop, ..Policy::default() };
        check_under(&stop(TrainOnStop::None), same, "000000010", Ok((1, 1)));
        check_under(&stop(TrainOnStop::None), same, "000000011", Err(Reason::StopTrained));
        check_under(&stop(TrainOnStop::Last), same, "000000010", Err(Reason::StopNotTrained));
        check_under(&stop(TrainOnStop::All), same, "000100011", Ok((1, 1)));
        check_under(&stop(TrainOnStop::All), same, "000110011", Err(Reason::HeaderTrained));
        check_under(&stop(TrainOnStop::All), same, "000100010", Err(Reason::StopNotTrained));
        check_under(&stop(TrainOnStop::All), same, "000200011", Err(Reason::TooHeavy));
        check_under(&stop(TrainOnStop::All), same, "000100012", Err(Reason::TooHeavy));
        check_under(&stop(TrainOnStop::Last), same, "000000012", Err(Reason::TooHeavy));
        // What others weigh is no measure for this turn's end, but for one that is given what others weigh.
        let heavy = |row: &mut Rendered| row.spans[1].weight = 2.0;
        check_under(&Policy::default(), heavy, "000000012", Err(Reason::TooHeavy));
        let masked = Policy { reasoning: Learn::Mask, ..Policy::default() };
        let thinks = |row: &mut Rendered| row.spans[3].part = Part::Reasoning;
        check_under(&masked, thinks, "000000011", Err(Reason::ForeignByteTrained));
        check_under(&default, thinks, "000000011", Ok((1, 1)));
    }
}
