//! Rows that are longer than a pack: what is kept, what is refused, and what is counted as lost.

mod support;

use hone_schema::{Kind, Part, Rendered};
use hone_tokens::{Counts, Keep, Reason, Row, Rules, TooLong, tokenize};
use proptest::prelude::*;
use support::{Bit, byte_level, chat, outcome, rendered, rules, vocab_of};

const HEAD: TooLong = TooLong::Truncate(Keep::Head);
const TAIL: TooLong = TooLong::Truncate(Keep::Tail);
const RESPONSE: TooLong = TooLong::Truncate(Keep::Response);

fn cut(max_len: u32, too_long: TooLong) -> Rules {
    Rules { max_len, too_long, ..rules() }
}

fn check(row: &Rendered, rules: &Rules, expect: &str) {
    assert_eq!(outcome(&vocab_of(&byte_level()), row, rules), expect, "{:?}", row.text);
}

/// The one row that `row` becomes.
fn one(row: &Rendered, rules: &Rules) -> Row {
    let mut taken = tokenize(&vocab_of(&byte_level()), row, rules).expect("the row is taken");
    assert_eq!((taken.rows.len(), taken.refused.len()), (1, 0));
    taken.rows.remove(0)
}

/// The text of a row's tokens, those that are not kept as `~`.
fn text(rendered: &Rendered, row: &Row) -> String {
    let mut out = String::new();
    let mut behind = 0;
    let mut at = 0;
    for range in &row.kept {
        if range.start > behind {
            out.push('~');
        }
        let n = (range.end - range.start) as usize;
        row.offsets[at..at + n].iter().for_each(|o| out.push_str(&rendered.text[o.clone()]));
        (behind, at) = (range.end, at + n);
    }
    if behind < row.n_whole {
        out.push('~');
    }
    out
}

#[test]
fn too_long_a_row() {
    // <u> ⏎ h i <e> ⏎ <a> ⏎ yo ` no` ` yo` ` no` <e> ⏎
    let row = chat(&[("u", "hi"), ("a", "yo no yo no")]);
    check(&row, &cut(14, TooLong::Drop), "·yo no yo no<e>·");
    check(&row, &cut(13, TooLong::Drop), "refused: too long");
    check(&row, &cut(13, TooLong::Error), "refused: too long");
    check(&row, &cut(13, HEAD), "·yo no yo no<e>");
    check(&row, &cut(12, HEAD), "refused: stop token cut off");
    check(&row, &cut(11, HEAD), "·yo no yo");
    check(&row, &cut(9, HEAD), "·yo");
    check(&row, &cut(8, HEAD), "refused: response cut off");
    check(&row, &cut(8, TAIL), "·yo no yo no<e>·");
    // Nothing stands before the first token any more that could predict it.
    check(&row, &cut(6, TAIL), "· no yo no<e>·");
    check(&row, &cut(2, TAIL), "refused: response cut off");
}

#[test]
fn a_beginning_of_text_stays_where_the_tail_is_kept() {
    let bits: Vec<Bit> = vec![
        ("<s>", None, "", Part::Scaffold, 0.0),
        ("<u>", None, "", Part::Scaffold, 0.0),
        ("hi hi hi", Some(0), "user", Part::Content, 1.0),
        ("<a>", None, "", Part::Scaffold, 0.0),
        ("yo", Some(1), "assistant", Part::Content, 1.0),
        ("<e>", Some(1), "assistant", Part::Stop, 1.0),
    ];
    let row = rendered(Kind::Sft, &bits, None);
    let bos = vocab_of(&byte_level()).id_of("<s>");
    let tail = |max_len, bos| Rules { bos, ..cut(max_len, TAIL) };
    assert_eq!(text(&row, &one(&row, &tail(5, bos))), "<s>~i<a>yo<e>");
    assert_eq!(
        text(&row, &one(&row, &tail(5, None))),
        "~hi<a>yo<e>".replace("hi", " hi").replace(' ', "")
    );
    // With nothing but it before them, the trained tokens are still predicted from something.
    check(&row, &tail(3, bos), "·yo<e>");
    check(&row, &tail(3, None), "·yo<e>");
    check(&row, &tail(2, None), "·<e>");
}

#[test]
fn the_response_is_kept_and_questions_go_the_oldest_first() {
    let row = chat(&[("s", "xyz"), ("u", "abc"), ("a", "yo"), ("u", "def"), ("a", "no")]);
    let whole = one(&row, &rules());
    let n = whole.n_whole;
    let check = |fewer: u32, expect: &str| {
        let kept = one(&row, &cut(n - fewer, RESPONSE));
        assert_eq!(text(&row, &kept).replace('\n', ""), expect);
        assert_eq!(kept.counts().trained, whole.counts().trained);
        assert_eq!(kept.ids.len() as u32, n - fewer);
        assert!(kept.is_cut() && kept.offset() == 0 && kept.doc(0).truncated);
    };
    check(1, "<sys>xyz<e><u>~bc<e><a>yo<e><u>def<e><a>no<e>");
    check(3, "<sys>xyz<e><u>~<e><a>yo<e><u>def<e><a>no<e>");
    check(4, "<sys>xyz<e><u>~<e><a>yo<e><u>~ef<e><a>no<e>");
    check(7, "<sys>~yz<e><u>~<e><a>yo<e><u>~<e><a>no<e>");
    check(9, "<sys>~<e><u>~<e><a>yo<e><u>~<e><a>no<e>");
    self::check(&row, &cut(n - 10, RESPONSE), "refused: response does not fit");
    // A response that is not trained is history like any other.
    let last = |max_len| {
        let mut rules = cut(max_len, RESPONSE);
        rules.policy.train_on = hone_tokens::TrainOn::Last;
        rules
    };
    assert_eq!(
        text(&row, &one(&row, &last(n - 4))).replace('\n', ""),
        "<sys>xyz<e><u>~<e><a>~<e><u>def<e><a>no<e>"
    );
}

#[test]
fn of_a_text_the_head_is_kept() {
    let bits: Vec<Bit> = vec![
        ("<s>", None, "text", Part::Scaffold, 0.0),
        ("yo yo yo", None, "text", Part::Content, 1.0),
        ("<e>", None, "text", Part::Stop, 1.0),
    ];
    let row = rendered(Kind::Text, &bits, None);
    check(&row, &cut(3, RESPONSE), "·yo yo");
    check(&row, &cut(3, HEAD), "·yo yo");
    check(&row, &cut(4, HEAD), "refused: stop token cut off");
    check(&row, &cut(3, TooLong::Split), "·yo yo | ·<e>");
}

#[test]
fn pieces_of_a_long_row() {
    let row = chat(&[("u", "hi"), ("a", "yo no yo no")]);
    check(&row, &cut(14, TooLong::Split), "·yo no yo no<e>·");
    // A piece's first token is trained no more, and a piece never begins with a stop.
    check(&row, &cut(12, TooLong::Split), "·yo no yo | ·<e>·");
    check(&row, &cut(10, TooLong::Split), "·yo no | · no<e>·");
    check(
        &row,
        &cut(4, TooLong::Split),
        "· no yo | ·<e>· | refused: piece without a trained token | refused: piece without a \
         trained token",
    );
    let taken = tokenize(&vocab_of(&byte_level()), &row, &cut(4, TooLong::Split)).unwrap();
    let offsets: Vec<u32> = taken.rows.iter().map(Row::offset).collect();
    assert_eq!(offsets, [8, 11]);
    assert_eq!(taken.rows.iter().map(|row| row.turns).collect::<Vec<_>>(), [1, 0]);
    let sum = taken.rows.iter().map(|row| row.before.tokens).sum::<u64>()
        + taken.refused.iter().map(|refusal| refusal.counts.tokens).sum::<u64>();
    assert_eq!(sum, 14);
}

#[test]
fn what_is_cut_is_counted() {
    let row = chat(&[("u", "hi"), ("a", "yo no yo no")]);
    let tokens = one(&row, &cut(10, HEAD));
    assert_eq!((tokens.before.tokens, tokens.before.trained), (14, 5));
    assert_eq!((tokens.counts().tokens, tokens.counts().trained), (10, 2));
    assert!(tokens.doc(0).truncated);
    let refusal = tokenize(&vocab_of(&byte_level()), &row, &cut(10, TooLong::Drop)).unwrap_err();
    assert_eq!(refusal.reason, Reason::TooLong);
    assert!(refusal.reason.is_about_length());
    assert_eq!((refusal.counts.tokens, refusal.counts.trained), (14, 5));
    assert_eq!(refusal.detail, "14 tokens, a pack holds 10");
}

fn chats() -> impl Strategy<Value = Rendered> {
    let said = || prop::sample::select(vec!["yo", "no no", "é🐈", "hello there <e> yo", "x", ""]);
    prop::collection::vec((said(), said()), 1..5).prop_map(|turns| {
        let turns = turns.iter().flat_map(|(u, a)| [("u", *u), ("a", *a)]);
        chat(&turns.collect::<Vec<_>>())
    })
}

proptest! {
    /// However a row is cut: it fits, every kept token is the one that it was, nothing is trained that was not, what is lost is
    /// what is missing, and a response that is whole has its stop.
    #[test]
    fn a_cut_loses_only_what_it_counts(row in chats(), max_len in 2u32..60) {
        let vocab = vocab_of(&byte_level());
        let whole = tokenize(&vocab, &row, &Rules { max_len: 10_000, ..rules() }).unwrap().rows.remove(0);
        for too_long in [HEAD, TAIL, RESPONSE, TooLong::Split] {
            let Ok(taken) = tokenize(&vocab, &row, &cut(max_len, too_long)) else { continue };
            let mut before = Counts::default();
            for piece in &taken.rows {
                prop_assert!(piece.ids.len() <= max_len as usize);
                let kept: Vec<usize> = piece.kept.iter().flat_map(|r| r.start as usize..r.end as usize).collect();
                prop_assert_eq!(kept.len(), piece.ids.len());
                for (idx, token) in kept.iter().enumerate() {
                    prop_assert_eq!(piece.ids[idx], whole.ids[*token]);
                    let weight = if idx == 0 { 0.0 } else { whole.weights[*token] };
                    prop_assert_eq!(piece.weights[idx], weight);
                }
                before.tokens += piece.before.tokens;
                before.trained += piece.before.trained;
                prop_assert!(piece.counts().trained > 0);
                for span in row.spans.iter().filter(|s| s.part == Part::Stop) {
                    let at = |o: &std::ops::Range<usize>| o.start == span.start as usize;
                    let stop = whole.offsets.iter().position(at).unwrap();
                    let last_word = stop - 1;
                    let is_said = whole.weights[last_word] > 0.0;
                    let is_whole = |piece: &Row| piece.kept.iter().any(|r| r.contains(&(last_word as u32)) && (r.start as usize) < last_word);
                    if is_said && is_whole(piece) && too_long == TooLong::Split {
                        prop_assert!(kept.contains(&stop), "a stop was cut off");
                    }
                }
                if too_long == RESPONSE {
                    prop_assert_eq!(piece.counts().trained, whole.counts().trained);
                }
            }
            for refusal in &taken.refused {
                before.tokens += refusal.counts.tokens;
                before.trained += refusal.counts.trained;
            }
            prop_assert_eq!(before, whole.before);
        }
    }
}
