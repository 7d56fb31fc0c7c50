//! Which bytes of a row are trained, and from them which tokens.
//!
//! Bytes first. The spans of a row come with weights: those of the data (source x row x message x span), and 0 where the template
//! writes a header, a separator or anything else that a served model is given. Scaffold with a weight lies inside a response (a
//! space, an empty thought, the marks around a tool call), and the model has to write it as well. Of that, trained are
//!
//! - the spans of the messages that the [`Policy`] takes, and those that the row itself wants trained, with their weights;
//! - by [`TrainOnStop`], the stop marker of a response of which anything is trained, whatever its own weight: a response that is
//!   learned without its end never ends.
//!
//! Not trained is anything of a response of which no said byte is trained: its thought's marks and its stop alone would teach to
//! say nothing. A response that says nothing is trained as that.
//!
//! Not trained is what a response thinks, where the policy masks it: the spans of reasoning, and what stands between the marks of
//! a thought that opens a response. The marks themselves stay: that a thought ends is learned. An empty thought is masked with
//! its marks.
//!
//! A text row is trained whole, but for its beginning-of-text token.
//!
//! Then tokens, by **the rule for those that straddle a border: a token has the smallest weight of its bytes**, so a token that
//! holds any untrained byte is not trained, wherever the border lies in it. One exception: blanks of the template at its start do
//! not count, because many vocabularies write the space before a word and the word as one token. Peers differ: transformers
//! (`return_assistant_tokens_mask`) trains a straddling token at either end of a response, with the header's or the separator's
//! bytes in it; Axolotl compares where turns begin and end in tokens and leaves a token out that is not wholly inside.
//!
//! The first token of a row is predicted by nothing and never trained.

use std::collections::BTreeMap;
use std::ops::Range;

use hone_schema::{Kind, Part, Rendered, Share, Span};

use crate::encode::Encoded;
use crate::policy::{Learn, Policy, RESPONSE, TrainOnStop, last_response};
use crate::thought::thoughts;
use crate::vocab::Vocab;

/// Bytes of a span.
pub(crate) fn bytes(span: &Span) -> Range<usize> {
    span.start as usize..span.end as usize
}

/// Which bytes are trained.
pub(crate) struct Mask {
    /// The weight of each span.
    pub(crate) spans: Vec<f32>,
    /// Bytes that are not trained whatever their span, in order and apart from each other.
    pub(crate) masked: Vec<Range<usize>>,
    /// The weight of stop markers that the template writes behind messages that are not trained.
    foreign_stop: Option<f32>,
}

impl Mask {
    /// The mask of a row under a policy.
    pub(crate) fn new(row: &Rendered, policy: &Policy) -> Self {
        let last = last_response(row);
        let mut mask = Mask { spans: Vec::new(), masked: Vec::new(), foreign_stop: None };
        let weigh = |span| if policy.train_on.takes(row, span, last) { span.weight } else { 0.0 };
        mask.spans = row.spans.iter().map(weigh).collect();
        if row.kind == Kind::Text {
            return mask;
        }
        mask.mask_thoughts(row, policy);
        mask.silence(row);
        mask.weigh_stops(row, policy.stop);
        mask
    }

    fn mask_thoughts(&mut self, row: &Rendered, policy: &Policy) {
        if policy.reasoning == Learn::Train && policy.empty_thoughts == Learn::Train {
            return;
        }
        if policy.reasoning == Learn::Mask {
            for (weight, span) in self.spans.iter_mut().zip(&row.spans) {
                *weight = if span.part == Part::Reasoning { 0.0 } else { *weight };
            }
        }
        for thought in thoughts(row) {
            match thought.is_empty {
                true if policy.empty_thoughts == Learn::Mask => self.masked.push(thought.whole),
                false if policy.reasoning == Learn::Mask => self.masked.push(thought.inside),
                _ => {}
            }
        }
    }

    /// Of a message that says something, nothing of which is trained, neither is what the template writes around it.
    fn silence(&mut self, row: &Rendered) {
        let mut is_heard: BTreeMap<u32, bool> = BTreeMap::new();
        for (weight, span) in self.spans.iter().zip(&row.spans) {
            if let (Some(message), true) = (span.message, span.part.is_said()) {
                *is_heard.entry(message).or_default() |= *weight > 0.0;
            }
        }
        for (weight, span) in self.spans.iter_mut().zip(&row.spans) {
            let is_heard = span.message.and_then(|message| is_heard.get(&message));
            if span.part == Part::Scaffold && is_heard == Some(&false) {
                *weight = 0.0;
            }
        }
    }

    fn weigh_stops(&mut self, row: &Rendered, stop: TrainOnStop) {
        let turns = self.turns(row);
        let last = turns.iter().filter(|(_, turn)| turn.stop.is_some_and(|w| w > 0.0));
        let last = last.map(|(message, _)| *message).max().filter(|_| row.share == Share::Main);
        let lightest = self.spans.iter().copied().filter(|w| *w > 0.0).reduce(f32::min);
        for (weight, span) in self.spans.iter_mut().zip(&row.spans) {
            let (Part::Stop, Some(message)) = (span.part, span.message) else { continue };
            let of_turn = turns.get(&message).and_then(|turn| turn.stop).unwrap_or(0.0);
            *weight = match stop {
                TrainOnStop::Turn => of_turn,
                TrainOnStop::All if of_turn == 0.0 => lightest.unwrap_or(0.0),
                TrainOnStop::All => of_turn,
                TrainOnStop::Last if Some(message) == last => of_turn,
                TrainOnStop::Last | TrainOnStop::None => 0.0,
            };
        }
        if stop == TrainOnStop::All {
            self.foreign_stop = lightest;
        }
    }

    /// What the stop marker of each message would weigh with its response: its own weight where anything of the response is
    /// trained or there is nothing else of it, else that of what is trained before it.
    fn turns(&self, row: &Rendered) -> BTreeMap<u32, Turn> {
        let mut turns: BTreeMap<u32, Turn> = BTreeMap::new();
        for (weight, span) in self.spans.iter().zip(&row.spans) {
            let Some(message) = span.message else { continue };
            let turn = turns.entry(message).or_default();
            if span.part != Part::Stop {
                let bytes = bytes(span);
                let is_masked = self
                    .masked_at(&bytes)
                    .is_some_and(|m| m.start <= bytes.start && bytes.end <= m.end);
                turn.has_rest = true;
                if *weight > 0.0 && !is_masked {
                    turn.rest = Some(*weight);
                }
                continue;
            }
            turn.stop = Some(match turn.rest {
                None if !turn.has_rest => *weight,
                None => 0.0,
                Some(_) if span.weight > 0.0 => span.weight,
                Some(rest) => rest,
            });
        }
        turns
    }

    /// The first masked range with a byte of `bytes`; of an empty one, with the byte behind it.
    fn masked_at(&self, bytes: &Range<usize>) -> Option<&Range<usize>> {
        let first = self.masked.get(self.masked.partition_point(|m| m.end <= bytes.start))?;
        (first.start < bytes.end.max(bytes.start + 1)).then_some(first)
    }

    /// Weight of each token of `encoded`.
    pub(crate) fn token_weights(
        &self,
        vocab: &Vocab,
        row: &Rendered,
        encoded: &Encoded,
    ) -> Vec<f32> {
        let mut from = 0;
        let mut weigh = |token: &Range<usize>| {
            let touched = touched_from(&row.spans, token, from);
            from = touched.start;
            self.token_weight(row, token, touched)
        };
        let mut weights: Vec<f32> = encoded.offsets.iter().map(&mut weigh).collect();
        if let Some(weight) = self.foreign_stop {
            self.weigh_foreign_stops(vocab, row, encoded, weight, &mut weights);
        }
        if let Some(first) = weights.first_mut() {
            *first = 0.0;
        }
        weights
    }

    fn token_weight(&self, row: &Rendered, token: &Range<usize>, touched: Range<usize>) -> f32 {
        if self.masked_at(token).is_some() {
            return 0.0;
        }
        touched
            .skip_while(|idx| self.spans[*idx] == 0.0 && is_blank(row, *idx, token))
            .map(|idx| self.spans[idx])
            .reduce(f32::min)
            // A token of nothing but the template's blanks has no trained byte to be trained for.
            .unwrap_or(0.0)
    }

    /// A template ends the turns of users with the same marker, which is no stop of theirs: a control token of scaffold that is
    /// the stop token of a response is one of all the stops.
    fn weigh_foreign_stops(
        &self,
        vocab: &Vocab,
        row: &Rendered,
        encoded: &Encoded,
        weight: f32,
        weights: &mut [f32],
    ) {
        let stops = stop_ids(vocab, row, encoded);
        for (idx, token) in encoded.offsets.iter().enumerate() {
            let is_stop = stops.binary_search(&encoded.ids[idx]).is_ok();
            let mut parts = touched(&row.spans, token).map(|span| row.spans[span].part);
            if is_stop && weights[idx] == 0.0 && parts.all(|part| part == Part::Scaffold) {
                weights[idx] = weight;
            }
        }
    }
}

/// What is known of a message when its stop marker comes.
#[derive(Default)]
struct Turn {
    has_rest: bool,
    rest: Option<f32>,
    stop: Option<f32>,
}

/// Ids of the control tokens that are stop markers of the row's responses, sorted.
pub(crate) fn stop_ids(vocab: &Vocab, row: &Rendered, encoded: &Encoded) -> Vec<u32> {
    let stops = row.spans.iter().filter(|span| span.part == Part::Stop);
    let mut ids: Vec<u32> = stops
        .filter_map(|span| {
            let bytes = bytes(span);
            let first = encoded.offsets.partition_point(|token| token.end <= bytes.start);
            let id = *encoded.ids.get(first)?;
            (encoded.offsets[first] == bytes && vocab.is_control(id)).then_some(id)
        })
        .collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

fn is_blank(row: &Rendered, idx: usize, token: &Range<usize>) -> bool {
    let span = bytes(&row.spans[idx]);
    let shared = span.start.max(token.start)..span.end.min(token.end);
    row.spans[idx].part == Part::Scaffold && row.text[shared].chars().all(char::is_whitespace)
}

/// The span in which the row's last message begins to speak, when it is a response.
pub(crate) fn first_of_last_response(row: &Rendered) -> Option<usize> {
    let last = row.spans.iter().filter_map(|span| span.message).max()?;
    let first = row
        .spans
        .iter()
        .position(|span| span.message == Some(last) && span.part != Part::Scaffold)?;
    (row.spans[first].role == RESPONSE).then_some(first)
}

/// Indexes of the spans that share a byte with `token`; for an empty one, of the span that holds the byte behind it.
pub(crate) fn touched(spans: &[Span], token: &Range<usize>) -> Range<usize> {
    touched_from(spans, token, spans.partition_point(|s| s.end as usize <= token.start))
}

/// The same, looked for from the span `from` on: tokens come in order, so the next one's spans are near.
pub(crate) fn touched_from(spans: &[Span], token: &Range<usize>, from: usize) -> Range<usize> {
    if spans.is_empty() {
        return 0..0;
    }
    let mut from = from.min(spans.len() - 1);
    while from > 0 && spans[from - 1].end as usize > token.start {
        from -= 1;
    }
    while from + 1 < spans.len() && spans[from].end as usize <= token.start {
        from += 1;
    }
    let end = token.end.max(token.start + 1);
    let n = spans[from..].iter().take_while(|span| (span.start as usize) < end).count();
    from..from + n
}
