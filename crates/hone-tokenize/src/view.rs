//! A row as people look at it: each token with its text, the span it comes from, its weight, and the rule that gave it.

use std::ops::Range;

use hone_schema::{Part, Rendered, Span};
use hone_tokens::{Counts, Look, Refusal, Rules, Taken, Vocab, look, tokenize};

/// Why a token has its weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rule {
    /// It is the first of its row: nothing comes before it that could predict it.
    First,
    /// The template wrote it, outside of every response.
    Template,
    /// The row gives its message, or its part of it, the weight 0.
    Data,
    /// The mask policy does not take it.
    Policy,
    /// It is of a thought, and the policy masks those.
    Thought,
    /// It ends a turn of which nothing is trained, or the policy does not train such ends.
    UntrainedStop,
    /// It holds trained bytes, and untrained ones beside them.
    Straddles,
    /// A message said it, and it is trained.
    Said,
    /// The template wrote it inside a response, where the model has to write it too.
    Inside,
    /// It ends a trained response.
    Stop,
    /// It ends what is not trained, and the policy trains every end.
    AnyStop,
}

impl Rule {
    /// One word or two.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Rule::First => "first",
            Rule::Template => "template",
            Rule::Data => "weight 0",
            Rule::Policy => "policy",
            Rule::Thought => "masked thought",
            Rule::UntrainedStop => "untrained stop",
            Rule::Straddles => "straddles",
            Rule::Said => "said",
            Rule::Inside => "inside response",
            Rule::Stop => "stop",
            Rule::AnyStop => "any stop",
        }
    }
}

/// A token of a row.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Token {
    pub(crate) id: u32,
    /// Bytes of the row's text that it stands for.
    pub(crate) bytes: Range<usize>,
    /// Those of them that no token before it has shown: several tokens may share a character.
    pub(crate) shown: Range<usize>,
    pub(crate) weight: f32,
    /// The span that decides about it.
    pub(crate) span: Option<usize>,
    pub(crate) rule: Rule,
    /// Whether it goes out, or is cut off.
    pub(crate) kept: bool,
}

/// Some bytes of a row's text.
pub(crate) struct Piece {
    pub(crate) bytes: Range<usize>,
    /// The token that shows them.
    pub(crate) token: Option<usize>,
}

/// A row, its tokens, and what became of it.
pub(crate) struct View {
    pub(crate) rendered: Rendered,
    pub(crate) tokens: Vec<Token>,
    /// The row as it goes out, perhaps in pieces, or why it does not.
    pub(crate) fate: Result<Taken, Refusal>,
}

impl View {
    /// Looks at a row under the rules of a configuration.
    pub(crate) fn new(vocab: &Vocab, rules: &Rules, rendered: Rendered) -> Self {
        let fate = tokenize(vocab, &rendered, rules);
        let tokens = match look(vocab, &rendered, rules) {
            Ok(look) => tokens(&rendered, &look, fate.as_ref().ok()),
            // Then the row is refused for just that, and its text is all there is to see.
            Err(_) => Vec::new(),
        };
        View { rendered, tokens, fate }
    }

    /// All its tokens, before anything was cut.
    pub(crate) fn before(&self) -> Counts {
        count(self.tokens.iter())
    }

    /// The tokens that go out: none of a row that is refused.
    pub(crate) fn outcome(&self) -> Counts {
        let rows = self.fate.iter().flat_map(|taken| &taken.rows);
        rows.map(|row| row.counts()).fold(Counts::default(), |sum, row| Counts {
            tokens: sum.tokens + row.tokens,
            trained: sum.trained + row.trained,
        })
    }

    /// Whether it goes out with tokens missing, or in pieces.
    pub(crate) fn is_cut(&self) -> bool {
        self.fate.iter().flat_map(|taken| &taken.rows).any(|row| row.is_cut())
    }

    /// The span that decides about a token.
    pub(crate) fn span(&self, token: &Token) -> Option<&Span> {
        self.rendered.spans.get(token.span?)
    }

    /// The text that a token stands for.
    pub(crate) fn text(&self, token: &Token) -> &str {
        &self.rendered.text[token.bytes.clone()]
    }

    /// The text of some tokens in pieces, in order: each token's, and between neighbours the bytes that no token stands for.
    pub(crate) fn pieces(&self, tokens: &[usize]) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let mut last = None;
        for idx in tokens.iter().copied() {
            let bytes = self.tokens[idx].shown.clone();
            let is_next = last.map_or(idx == 0, |last: usize| last + 1 == idx);
            let before = if idx == 0 { 0 } else { self.tokens[idx - 1].shown.end };
            if is_next && before < bytes.start {
                pieces.push(Piece { bytes: before..bytes.start, token: None });
            }
            pieces.push(Piece { bytes, token: Some(idx) });
            last = Some(idx);
        }
        let end = self.tokens.last().map_or(0, |token| token.shown.end);
        if last.is_some_and(|last| last + 1 == self.tokens.len()) && end < self.rendered.text.len()
        {
            pieces.push(Piece { bytes: end..self.rendered.text.len(), token: None });
        }
        pieces
    }

    /// All its tokens.
    pub(crate) fn all(&self) -> Vec<usize> {
        (0..self.tokens.len()).collect()
    }

    /// The rule behind a token's weight, as a sentence without its full stop.
    pub(crate) fn sentence(&self, token: &Token) -> String {
        let Some(span) = self.span(token) else {
            return "not trained: it belongs to no message".to_owned();
        };
        let whose = whose(span);
        match token.rule {
            Rule::First => {
                "not trained: the first token of a row is predicted by nothing".to_owned()
            }
            Rule::Template => format!("not trained: text of the template, {whose}"),
            Rule::Data => format!("not trained: the row gives {whose} the weight 0"),
            Rule::Policy => {
                format!("not trained: the policy does not take the {} of {whose}", span.part)
            }
            Rule::Thought => {
                format!("not trained: a thought of {whose}, and the policy masks those")
            }
            Rule::UntrainedStop => {
                format!("not trained: it ends {whose}, and that end is not learned")
            }
            Rule::Straddles => format!(
                "not trained: it straddles trained bytes and untrained ones, the {} of {whose}",
                span.part
            ),
            Rule::Said => format!("trained: {} of {whose}, weight {}", span.part, token.weight),
            Rule::Inside => {
                format!("trained: the template's own text inside {whose}, weight {}", token.weight)
            }
            Rule::Stop => format!("trained: it ends {whose}, weight {}", token.weight),
            Rule::AnyStop => {
                format!("trained: it ends a turn, as every stop is, weight {}", token.weight)
            }
        }
    }
}

/// Whose bytes a span holds.
fn whose(span: &Span) -> String {
    match span.message {
        Some(message) => format!("message {message} ({})", span.role),
        None if span.part == Part::Scaffold => "between messages".to_owned(),
        None => "the text".to_owned(),
    }
}

fn count<'a>(tokens: impl Iterator<Item = &'a Token>) -> Counts {
    tokens.fold(Counts::default(), |sum, token| Counts {
        tokens: sum.tokens + 1,
        trained: sum.trained + u64::from(token.weight > 0.0),
    })
}

fn tokens(rendered: &Rendered, look: &Look, taken: Option<&Taken>) -> Vec<Token> {
    // What a refused row would have had is all there.
    let mut is_kept = vec![taken.is_none(); look.weights.len()];
    for range in taken.into_iter().flat_map(|taken| &taken.rows).flat_map(|row| &row.kept) {
        is_kept[range.start as usize..range.end as usize].fill(true);
    }
    let mut end = 0;
    (0..look.weights.len())
        .map(|idx| {
            let bytes = look.encoded.offsets[idx].clone();
            let shown = bytes.start.max(end)..bytes.end.max(end);
            end = shown.end;
            let (span, rule) = why(rendered, look, idx);
            Token {
                id: look.encoded.ids[idx],
                bytes,
                shown,
                weight: look.weights[idx],
                span,
                rule,
                kept: is_kept[idx],
            }
        })
        .collect()
}

/// The span that decides about a token, and the rule. Read off the weights that the mask gave: a token that is trained has the
/// weight of a span that it touches, and one that is not touches a span of weight 0 or a masked thought, or is the first.
fn why(rendered: &Rendered, look: &Look, idx: usize) -> (Option<usize>, Rule) {
    let weight = look.weights[idx];
    let touched = || look.touched[idx].clone();
    let decides = |span: &usize| look.span_weights[*span] == weight;
    // What the template wrote before a word is in its token, but decides nothing while anything else can.
    let said = touched().find(|span| decides(span) && rendered.spans[*span].part != Part::Scaffold);
    let decider = said.or_else(|| touched().find(decides));
    let Some(at) = decider.or_else(|| touched().next()) else {
        return (None, if idx == 0 { Rule::First } else { Rule::Template });
    };
    let span = &rendered.spans[at];
    let is_thought = || {
        let bytes = &look.encoded.offsets[idx];
        let end = bytes.end.max(bytes.start + 1);
        look.masked.iter().any(|masked| masked.start < end && bytes.start < masked.end)
    };
    let rule = match (weight > 0.0, span.part) {
        (true, _) if decider.is_none() => Rule::AnyStop,
        (true, Part::Stop) => Rule::Stop,
        (true, Part::Scaffold) => Rule::Inside,
        (true, _) => Rule::Said,
        (false, _) if idx == 0 => Rule::First,
        (false, _) if is_thought() => Rule::Thought,
        (false, _) if touched().any(|span| look.span_weights[span] > 0.0) => Rule::Straddles,
        (false, Part::Stop) => Rule::UntrainedStop,
        (false, Part::Scaffold) if span.weight == 0.0 => Rule::Template,
        (false, _) if span.weight == 0.0 => Rule::Data,
        (false, _) => Rule::Policy,
    };
    (Some(at), rule)
}
