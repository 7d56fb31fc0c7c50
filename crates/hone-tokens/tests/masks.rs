//! Which tokens of a row are trained, and which rows are refused. `·` is a run of untrained tokens, `⏎` a line end.

mod support;

use hone_schema::{Kind, Part, Rendered, Roles, Share};
use hone_tokens::{
    Learn, Policy, Reason, Row, Rules, TooLong, TrainOn, TrainOnStop, Vocab, tokenize,
};
use proptest::prelude::*;
use support::{Bit, byte_level, chat, outcome, pieces, rendered, rules, vocab_of, with};

fn check_with(json: &serde_json::Value, row: &Rendered, rules: &Rules, expect: &str) {
    assert_eq!(outcome(&vocab_of(json), row, rules), expect, "{:?}", row.text);
}

fn check(row: &Rendered, expect: &str) {
    check_with(&byte_level(), row, &rules(), expect);
}

fn check_on(train_on: TrainOn, row: &Rendered, expect: &str) {
    check_policy(&Policy { train_on, ..Policy::default() }, row, expect);
}

fn check_policy(policy: &Policy, row: &Rendered, expect: &str) {
    check_with(&byte_level(), row, &Rules { policy: policy.clone(), ..rules() }, expect);
}

/// The one row that `row` becomes.
fn one(vocab: &Vocab, row: &Rendered, rules: &Rules) -> Row {
    let mut taken = tokenize(vocab, row, rules).expect("the row is taken");
    assert_eq!((taken.rows.len(), taken.refused.len()), (1, 0));
    taken.rows.remove(0)
}

/// A row is refused where something of a trained text has no token, and where offsets may be off because something before it
/// has none; what others say may lack something.
#[test]
fn text_that_has_no_token() {
    let lacking = |token: &str| {
        with(|j| {
            j["model"]["merges"] = serde_json::json!([]);
            let vocab = j["model"]["vocab"].as_object_mut().expect("an object");
            assert!(vocab.remove(token).is_some(), "{token}");
        })
    };
    let mut characters = pieces(serde_json::Value::Null, serde_json::Value::Null);
    characters["model"]["unk_token"] = serde_json::Value::Null;
    let says = |user, assistant| chat(&[("u", user), ("a", assistant)]);
    // Without markers a turn is in one piece with the next.
    let plain = |user, stop_weight| {
        let bits: [Bit; 5] = [
            ("Q:", None, "", Part::Scaffold, 0.0),
            (user, Some(0), "user", Part::Content, 1.0),
            ("|A:", None, "", Part::Scaffold, 0.0),
            ("yo", Some(1), "assistant", Part::Content, stop_weight),
            ("<e>", Some(1), "assistant", Part::Stop, 1.0),
        ];
        rendered(Kind::Sft, &bits, None)
    };
    let lost = "refused: text that the vocabulary cannot write";
    let (no_e, no_second) = (lacking("e"), lacking("©"));
    let table = [
        (&no_e, says("hi", "hello"), lost),
        (&no_e, says("hello", "yo"), "·yo<e>·"),
        (&no_e, says("hi", "yo e"), lost),
        (&no_e, says("hi", "the"), lost),
        (&no_second, says("hi", "é"), lost),
        (&no_second, says("é", "ñ"), "·ññ<e>·"),
        (&characters, says("hi", "yéo"), lost),
        (&characters, says("é", "yo"), "·yo<e>·"),
        (&characters, plain("hi", 1.0), "·yo<e>"),
        (&characters, plain("é", 1.0), lost),
        (&characters, plain("é", 0.0), "refused: no trained token"),
    ];
    for (json, row, expect) in table {
        check_with(json, &row, &rules(), expect);
        let reference = Vocab::reference(json.to_string().as_bytes()).expect("it is a vocabulary");
        assert_eq!(outcome(&reference, &row, &rules()), expect, "{:?}", row.text);
    }
}

const TWO: [(&str, &str); 4] = [("u", "hello"), ("a", "yo"), ("u", "there"), ("a", "no")];

#[test]
fn the_response_and_its_stop_token() {
    check(&chat(&[("u", "hi"), ("a", "yo")]), "·yo<e>·");
    check(&chat(&[("s", "x"), ("u", "hi"), ("a", "yo hello")]), "·yo hello<e>·");
    check(&chat(&[("u", "hi"), ("a", "yo\n\n")]), "·yo⏎⏎<e>·");
    // Two tokens for the two bytes of é, four for those of the cat: each stands for the whole character.
    check(&chat(&[("u", "hi"), ("a", "é🐈")]), "·éé🐈🐈🐈🐈<e>·");
}

#[test]
fn policies() {
    check(&chat(&TWO), "·yo<e>·no<e>·");
    check_on(TrainOn::Last, &chat(&TWO), "·no<e>·");
    check_on(TrainOn::Every, &chat(&TWO), "·hello·yo<e>·there·no<e>·");
    check_on(TrainOn::Every, &chat(&[("s", "x"), ("u", "y"), ("a", "z")]), "·x·y·z<e>·");
    // The last response, though a user speaks after it.
    check_on(TrainOn::Last, &chat(&[("u", "a"), ("a", "b"), ("u", "c")]), "·b<e>·");
}

#[test]
fn roles_by_name_and_what_the_row_itself_wants() {
    let roles = |names: &[&str]| TrainOn::Roles(names.iter().map(|r| (*r).to_owned()).collect());
    check_on(roles(&["user"]), &chat(&TWO), "·hello·there·");
    check_on(roles(&["user", "assistant"]), &chat(&TWO), "·hello·yo<e>·there·no<e>·");
    check_on(roles(&["tool"]), &chat(&TWO), "refused: no trained token");
    let mut row = chat(&TWO);
    // `train: true` on the first question, and `train: false` on the second answer, whose weight is 0 then.
    for span in &mut row.spans {
        span.chosen = span.message == Some(0);
        if span.message == Some(3) {
            span.weight = 0.0;
        }
    }
    check(&row, "·hello·yo<e>·");
    check_on(TrainOn::Last, &row, "·hello·");
    row.spans.iter_mut().for_each(|span| span.weight = 0.0);
    check(&row, "refused: no trained token");
}

/// Samples that the template stage made of one row.
#[test]
fn samples_of_a_row() {
    let share = |share, turns: &[(&str, &str)]| Rendered { share, ..chat(turns) };
    let (earlier, rest) = (share(Share::Earlier, &TWO), share(Share::Rest, &[("u", "hi")]));
    check(&earlier, "·yo<e>·no<e>·");
    check_on(TrainOn::Last, &earlier, "refused: not the last answer");
    check_on(TrainOn::Last, &share(Share::Main, &TWO), "·no<e>·");
    check(&rest, "refused: trained in other samples");
    check_on(TrainOn::Last, &rest, "refused: trained in other samples");
    check_on(TrainOn::Every, &rest, "·hi·");
    // What the row itself wants is trained wherever it is.
    let mut chosen = earlier;
    chosen.spans.iter_mut().for_each(|span| span.chosen = span.message == Some(0));
    check_on(TrainOn::Last, &chosen, "·hello·");
}

#[test]
fn stop_markers_by_policy() {
    let check = |stop, row: &Rendered, expect: &str| {
        check_policy(&Policy { stop, ..Policy::default() }, row, expect);
    };
    check(TrainOnStop::Turn, &chat(&TWO), "·yo<e>·no<e>·");
    check(TrainOnStop::Last, &chat(&TWO), "·yo·no<e>·");
    let earlier = Rendered { share: Share::Earlier, ..chat(&TWO) };
    check(TrainOnStop::Last, &earlier, "·yo·no·");
    check(TrainOnStop::Turn, &earlier, "·yo<e>·no<e>·");
    check(TrainOnStop::None, &chat(&TWO), "·yo·no·");
    // The user's turns end with the same token.
    check(TrainOnStop::All, &chat(&TWO), "·<e>·yo<e>·<e>·no<e>·");
    let first_only = {
        let mut row = chat(&TWO);
        row.spans.iter_mut().filter(|s| s.message == Some(3)).for_each(|s| s.weight = 0.0);
        row.spans.iter_mut().filter(|s| s.message == Some(1)).for_each(|s| s.weight *= 0.5);
        row
    };
    check(TrainOnStop::Turn, &first_only, "·yo(0.5)<e>(0.5)·");
    check(TrainOnStop::Last, &first_only, "·yo(0.5)<e>(0.5)·");
    let half = "·<e>(0.5)·yo(0.5)<e>(0.5)·<e>(0.5)·<e>(0.5)·";
    let mut light = first_only.clone();
    light.spans.iter_mut().for_each(|s| s.weight = s.weight.min(0.5));
    check(TrainOnStop::All, &light, half);
    // A stop that is none is no fault where none is wanted; nor is one in pieces.
    let no_stop = response(&[("<a>", S, 0.0), ("yo", C, 1.0)], None);
    check(TrainOnStop::None, &no_stop, "·yo");
    check(TrainOnStop::Last, &no_stop, "refused: no stop marker");
    let in_pieces = response(&[("<a>", S, 0.0), ("yo", C, 1.0), ("</end>", E, 1.0)], None);
    check(TrainOnStop::None, &in_pieces, "·yo·");
    check(TrainOnStop::All, &in_pieces, "refused: stop marker is not one token");
}

#[test]
fn thoughts_by_policy() {
    let check = |reasoning, empty_thoughts, row: &Rendered, expect: &str| {
        check_policy(&Policy { reasoning, empty_thoughts, ..Policy::default() }, row, expect);
    };
    use Learn::{Mask, Train};
    const R: Part = Part::Reasoning;
    let full = response(
        &[
            ("<a>", S, 0.0),
            ("<think>", S, 1.0),
            ("hm", R, 1.0),
            ("</think>", S, 1.0),
            ("yo", C, 1.0),
            ("<e>", E, 1.0),
        ],
        None,
    );
    check(Train, Train, &full, "·<think>hm</think>yo<e>");
    check(Train, Mask, &full, "·<think>hm</think>yo<e>");
    check(Mask, Train, &full, "·<think>·</think>yo<e>");
    // The same where the data wrote the thought into the content.
    let inline =
        response(&[("<a>", S, 0.0), ("<think>hm</think>yo", C, 1.0), ("<e>", E, 1.0)], None);
    check(Train, Train, &inline, "·<think>hm</think>yo<e>");
    check(Mask, Train, &inline, "·<think>·</think>yo<e>");
    let empty = response(
        &[("<a>", S, 0.0), ("<think>\n\n</think>\n\n", S, 1.0), ("yo", C, 1.0), ("<e>", E, 1.0)],
        None,
    );
    check(Train, Train, &empty, "·<think>⏎⏎</think>⏎⏎yo<e>");
    check(Mask, Train, &empty, "·<think>⏎⏎</think>⏎⏎yo<e>");
    check(Train, Mask, &empty, "·yo<e>");
    // Nothing but a thought: then the stop is not trained either.
    let only = response(&[("<a>", S, 0.0), ("hm", R, 1.0), ("<e>", E, 1.0)], None);
    check(Mask, Train, &only, "refused: no trained token");
}

#[test]
fn a_forged_marker_in_a_response_is_trained_as_text() {
    check(&chat(&[("u", "hi<e>"), ("a", "a<e>b")]), "·a<e>b<e>·");
}

/// One response whose spans are given: (text, part, weight).
fn response(spans: &[(&str, Part, f32)], prompt_len: Option<usize>) -> Rendered {
    let mut bits: Vec<Bit> = vec![
        ("<u>", Some(0), "user", Part::Scaffold, 0.0),
        ("hi", Some(0), "user", Part::Content, 1.0),
    ];
    bits.extend(spans.iter().map(|(text, part, weight)| {
        // A header belongs to no message.
        match (*part, *weight) {
            (Part::Scaffold, 0.0) => (*text, None, "", *part, *weight),
            _ => (*text, Some(1), "assistant", *part, *weight),
        }
    }));
    rendered(Kind::Sft, &bits, prompt_len)
}

const C: Part = Part::Content;
const S: Part = Part::Scaffold;
const E: Part = Part::Stop;

#[test]
fn weights_of_the_data() {
    let half = [("<a>", S, 0.0), ("yo", C, 0.5), ("<e>", E, 0.5)];
    check(&response(&half, None), "·yo(0.5)<e>(0.5)");
    let parts = [("<a>", S, 0.0), ("yo", C, 0.0), (" no", C, 2.0), ("<e>", E, 1.0)];
    check(&response(&parts, None), "· no(2)<e>");
    // The end of a trained response is trained, whatever the data says of it alone.
    let no_end = [("<a>", S, 0.0), ("yo", C, 0.5), (" no", C, 0.0), ("<e>", E, 0.0)];
    check(&response(&no_end, None), "·yo(0.5)·<e>(0.5)");
    let nothing = [("<a>", S, 0.0), ("yo", C, 0.0), ("<e>", E, 1.0)];
    check(&response(&nothing, None), "refused: no trained token");
    let empty = [("<a>", S, 0.0), ("<e>", E, 1.0)];
    check(&response(&empty, None), "·<e>");
}

#[test]
fn tokens_across_a_border() {
    // ` yo` is one token: the blank is the template's, the word the response's.
    let blank = [("<a> ", S, 0.0), ("yo", C, 1.0), ("<e>", E, 1.0)];
    check(&response(&blank, None), "· yo<e>");
    // `yo` with an untrained `y`, and `..` of which a header has the first: not trained.
    let torn = [("<a>", S, 0.0), ("y", C, 0.0), ("o no", C, 1.0), ("<e>", E, 1.0)];
    check(&response(&torn, None), "· no<e>");
    let header = [("<a>.", S, 0.0), (".yo", C, 1.0), ("<e>", E, 1.0)];
    check(&response(&header, None), "·yo<e>");
    // Two weights in one token: the smaller.
    let two = [("<a>", S, 0.0), ("y", C, 2.0), ("o", C, 0.5), ("<e>", E, 1.0)];
    check(&response(&two, None), "·yo(0.5)<e>");
}

#[test]
fn what_the_template_writes_inside_a_response() {
    // Before it, inside it, and before its stop; not behind the stop.
    let lead = [
        ("<a>\n", S, 0.0),
        ("<think>\n\n", S, 1.0),
        ("yo", C, 1.0),
        ("<e>", E, 1.0),
        ("\n", S, 0.0),
    ];
    check(&response(&lead, None), "·<think>⏎⏎yo<e>·");
    let inside =
        [("<a>", S, 0.0), ("hm", C, 1.0), ("</t>", S, 1.0), ("yo", C, 1.0), ("<e>", E, 1.0)];
    check(&response(&inside, None), "·hm</t>yo<e>");
    let space = [("<a>", S, 0.0), ("yo", C, 1.0), (" ", S, 1.0), ("<e>", E, 1.0)];
    check(&response(&space, None), "·yo <e>");
    // A template that marks what it generates may leave out its own stop and parts of the answer.
    let marked =
        [("<a>", S, 0.0), ("hm", C, 0.0), ("</t>", S, 0.0), ("yo", C, 1.0), ("<e>", E, 0.0)];
    check(&response(&marked, None), "·yo<e>");
}

/// Qwen3's template writes an empty thought before the last answer, whatever the row trains of that.
#[test]
fn what_is_around_an_answer_is_trained_with_it() {
    let answer = |said: &[(&'static str, f32)]| {
        let mut bits = vec![("<a>", S, 0.0), ("<think>\n\n", S, 1.0)];
        bits.extend(said.iter().map(|(text, weight)| (*text, C, *weight)));
        bits.push(("<e>", E, 1.0));
        response(&bits, None)
    };
    check(&answer(&[("yo", 1.0)]), "·<think>⏎⏎yo<e>");
    check(&answer(&[("yo", 0.0), (" no", 1.0)]), "·<think>⏎⏎· no<e>");
    check(&answer(&[("yo", 0.0)]), "refused: no trained token");
    check(&answer(&[("yo", 0.0), (" no", 0.0)]), "refused: no trained token");
    // The row's answer is empty, and that is what is learned.
    check(&answer(&[]), "·<think>⏎⏎<e>");
    let mut two = chat(&[("u", "hi"), ("a", "yo"), ("u", "there")]);
    let silent = answer(&[("no", 0.0)]);
    let offset = two.text.len() as u32;
    two.text.push_str(&silent.text);
    two.spans.extend(silent.spans.iter().cloned().map(|mut span| {
        (span.start, span.end) = (span.start + offset, span.end + offset);
        span.message = span.message.map(|message| message + 3);
        span
    }));
    check(&two, "·yo<e>·");
    let stop = |stop| Policy { stop, ..Policy::default() };
    check_policy(&stop(TrainOnStop::Last), &two, "·yo<e>·");
    check_policy(&stop(TrainOnStop::All), &two, "·<e>·yo<e>·<e>·<e>");
}

#[test]
fn texts_are_trained_whole_but_for_the_token_that_begins_them() {
    let text = |bits: &[(&str, Part, f32)]| {
        let bits: Vec<Bit> = bits.iter().map(|(t, p, w)| (*t, None, "text", *p, *w)).collect();
        rendered(Kind::Text, &bits, None)
    };
    check(&text(&[("<s>", S, 0.0), ("yo yo", C, 1.0), ("<e>", E, 1.0)]), "·yo yo<e>");
    check(&text(&[("yo yo", C, 0.5), ("<e>", E, 0.5)]), "· yo(0.5)<e>(0.5)");
    check(&text(&[("yo yo", C, 1.0)]), "· yo");
    check(&text(&[("x", C, 1.0)]), "refused: no trained token");
}

#[test]
fn flags_of_added_tokens() {
    // The stop takes the line end behind it along and is trained all the same.
    let strips = with(|j| {
        for token in j["added_tokens"].as_array_mut().unwrap() {
            token["rstrip"] = true.into();
        }
    });
    check_with(&strips, &chat(&[("u", "hi"), ("a", "yo")]), &rules(), "·yo<e>");
}

#[test]
fn a_prefix_that_the_tokenizer_adds_belongs_to_the_response() {
    let always = serde_json::json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
    let row = response(&[("<a>", S, 0.0), ("hi", C, 1.0), ("<e>", E, 1.0)], None);
    // The prefix stands for the letter that it was put before, so that letter is drawn twice.
    check_with(&pieces(serde_json::Value::Null, always), &row, &rules(), "·hhi<e>");
}

#[test]
fn rows_that_are_refused() {
    let no_stop = [("<a>", S, 0.0), ("yo", C, 1.0)];
    check(&response(&no_stop, None), "refused: no stop marker");
    let in_pieces = [("<a>", S, 0.0), ("yo", C, 1.0), ("</end>", E, 1.0)];
    check(&response(&in_pieces, None), "refused: stop marker is not one token");
    // The line end that stops is one token with the template's next one.
    let swallowed = [("<a>", S, 0.0), ("yo", C, 1.0), ("\n", E, 1.0), ("\n", S, 0.0)];
    check(&response(&swallowed, None), "refused: stop marker is not one token");
    check(&chat(&[("u", "hi")]), "refused: no trained token");
    check(&rendered(Kind::Sft, &[], None), "refused: no trained token");
}

#[test]
fn one_beginning_of_text() {
    let vocab = vocab_of(&byte_level());
    let bos = Rules { bos: vocab.id_of("<s>"), ..rules() };
    let chat = |starts: &[&str]| {
        let mut bits: Vec<Bit> = Vec::new();
        for (idx, start) in starts.iter().enumerate() {
            let message = Some(idx as u32);
            bits.push((start, message, "assistant", S, 0.0));
            bits.push(("yo", message, "assistant", C, 1.0));
            bits.push(("<e>", message, "assistant", E, 1.0));
        }
        rendered(Kind::Sft, &bits, None)
    };
    let check = |starts: &[&str], expect| check_with(&byte_level(), &chat(starts), &bos, expect);
    check(&["<s><a>"], "·yo<e>");
    check(&["<a>"], "·yo<e>");
    check(&["<s><s><a>"], "refused: doubled beginning-of-text token");
    check(&["<s>\n<s><a>"], "refused: doubled beginning-of-text token");
    check(&["<a><s>"], "refused: doubled beginning-of-text token");
    // Llama-2 begins each pair of turns anew.
    check(&["<s><a>", "<s><a>"], "·yo<e>·yo<e>");
    check(&["<s><a>", "\n<s><a>"], "·yo<e>·yo<e>");
    check(&["<s><a>", "<a><s>"], "refused: doubled beginning-of-text token");
    // SmolLM2 opens every turn with it, also behind a turn that is not trained.
    check(&["<s><u>hi<e>\n<s><a>", "\n<s><u>hi<e>\n<s><a>"], "·yo<e>·yo<e>");
    check(&["<s><u>hi\n<s><a>"], "refused: doubled beginning-of-text token");
    // One token begins and ends texts, as in GPT-2's vocabulary.
    let both = Rules { bos: vocab.id_of("<e>"), ..rules() };
    let check = |starts: &[&str], expect| check_with(&byte_level(), &chat(starts), &both, expect);
    check(&["<e><a>"], "·yo<e>");
    check(&["<e><a>", "<a>"], "·yo<e>·yo<e>");
    check(&["<e><a>", "\n<e><a>"], "·yo<e>·yo<e>");
    check(&["\n<e><a>"], "·yo<e>");
    check(&["<e><e><a>"], "refused: doubled beginning-of-text token");
    check(&["<e>\n<e><a>"], "refused: doubled beginning-of-text token");
    check(&["<e><a>", "<e><e><a>"], "refused: doubled beginning-of-text token");
}

fn said() -> impl Strategy<Value = String> {
    let word = prop_oneof![
        "[a-z .,\n]{1,6}",
        prop::sample::select(support::MARKERS.to_vec()).prop_map(str::to_owned),
        prop::sample::select(vec!["é", "日", "🐈", "yo"]).prop_map(str::to_owned),
    ];
    prop::collection::vec(word, 1..6).prop_map(|words| words.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn trained_bytes_are_the_responses_and_their_stops(
        turns in prop::collection::vec((said(), said()), 1..4),
    ) {
        let mut messages = Vec::new();
        for (question, answer) in &turns {
            messages.push(("u", question.as_str()));
            messages.push(("a", answer.as_str()));
        }
        let row = chat(&messages);
        let tokens = one(&vocab_of(&byte_level()), &row, &rules());
        prop_assert_eq!(tokens.ids.len(), tokens.weights.len());
        let mut trained = vec![false; row.text.len()];
        for (bytes, weight) in tokens.offsets.iter().zip(&tokens.weights) {
            trained[bytes.clone()].fill(*weight > 0.0);
        }
        // Markers cut the text where responses begin and end; a header's line end may share a token with the response's own.
        for span in &row.spans {
            let is_response = span.role == "assistant" && span.part != Part::Scaffold;
            for (at, c) in row.text[span.start as usize..span.end as usize].char_indices() {
                let at = at + span.start as usize;
                prop_assert!(c.is_whitespace() || trained[at] == is_response, "byte {} of {:?}", at, row.text);
            }
        }
        prop_assert_eq!(tokens.turns as usize, turns.len());
    }
}

/// A message of a random conversation: role, text, weight, and whether the row itself wants it trained.
type Said = (&'static str, String, f32, bool);

fn messages() -> impl Strategy<Value = Vec<Said>> {
    // A text that begins with a line end may share a token with its header: `tokens_across_a_border` is about those.
    let text =
        prop_oneof![4 => said().prop_map(|text| format!("x{text}")), 1 => Just(String::new())];
    let role = prop::sample::select(vec!["u", "a", "a", "s"]);
    let weight = prop::sample::select(vec![0.0f32, 0.5, 1.0, 1.0]);
    let one = (role, text, weight, prop::bool::weighted(0.1));
    prop::collection::vec(one, 1..7)
}

fn policies_of_roles() -> impl Strategy<Value = TrainOn> {
    let roles = prop::sample::subsequence(vec!["assistant", "user", "system", "tool"], 0..4);
    prop_oneof![
        Just(TrainOn::All),
        Just(TrainOn::Last),
        Just(TrainOn::Every),
        roles.prop_map(|roles| TrainOn::Roles(roles.into_iter().map(str::to_owned).collect())),
    ]
}

/// What is trained of a conversation, said message by message and without any token: text, weight.
fn trained_text(said: &[Said], train_on: &TrainOn, stop: TrainOnStop) -> Vec<(String, f32)> {
    let last = said.iter().rposition(|(role, ..)| *role == "a");
    let takes = |idx: usize| {
        let (role, _, weight, chosen) = &said[idx];
        let name = match *role {
            "u" => "user",
            "a" => "assistant",
            _ => "system",
        };
        let by_role = match train_on {
            TrainOn::All => *role == "a",
            TrainOn::Last => Some(idx) == last,
            TrainOn::Every => true,
            TrainOn::Roles(roles) => roles.iter().any(|role| role == name),
        };
        *weight > 0.0 && (by_role || *chosen)
    };
    let taken: Vec<bool> = (0..said.len()).map(takes).collect();
    let lightest = said
        .iter()
        .zip(&taken)
        .filter(|((role, text, ..), taken)| **taken && (*role == "a" || !text.is_empty()));
    let lightest = lightest.map(|((_, _, weight, _), _)| *weight).reduce(f32::min);
    let last_taken = (0..said.len()).rev().find(|idx| taken[*idx] && said[*idx].0 == "a");
    let mut trained = Vec::new();
    for (idx, (role, text, weight, _)) in said.iter().enumerate() {
        if taken[idx] && !text.is_empty() {
            trained.push((text.clone(), *weight));
        }
        let is_response = *role == "a" && taken[idx];
        let stops = match stop {
            TrainOnStop::Turn => is_response,
            TrainOnStop::Last => Some(idx) == last_taken,
            TrainOnStop::None => false,
            // What a stop marker is, is seen at a response.
            TrainOnStop::All => lightest.is_some() && last.is_some(),
        };
        if stops {
            let weight = if is_response { *weight } else { lightest.unwrap_or(0.0) };
            trained.push(("<e>".to_owned(), weight));
        }
    }
    trained
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    /// The trained tokens, decoded, are the texts and the markers that the policy names: no byte more, none less, each with its
    /// weight.
    #[test]
    fn trained_tokens_decode_to_what_the_policy_names(
        said in messages(),
        train_on in policies_of_roles(),
        stop in prop::sample::select(vec![
            TrainOnStop::Turn, TrainOnStop::All, TrainOnStop::Last, TrainOnStop::None,
        ]),
    ) {
        let turns: Vec<(&str, &str)> = said.iter().map(|(role, text, ..)| (*role, text.as_str())).collect();
        let mut row = chat(&turns);
        for span in &mut row.spans {
            if let Some(message) = span.message {
                (span.weight, span.chosen) = (said[message as usize].2, said[message as usize].3);
            }
        }
        let vocab = vocab_of(&byte_level());
        let policy = Policy { train_on: train_on.clone(), stop, ..Policy::default() };
        let expected = trained_text(&said, &train_on, stop);
        let taken = match tokenize(&vocab, &row, &Rules { policy, ..rules() }) {
            Ok(taken) => taken,
            Err(refusal) => {
                prop_assert_eq!(refusal.reason, Reason::NoTrainedToken, "{}", refusal);
                prop_assert!(expected.is_empty(), "{:?} of {:?}", expected, row.text);
                return Ok(());
            }
        };
        let tokens = &taken.rows[0];
        let mut weights: Vec<f32> = Vec::new();
        let mut ids: Vec<u32> = Vec::new();
        for (id, weight) in tokens.ids.iter().zip(&tokens.weights).filter(|(_, w)| **w > 0.0) {
            ids.push(*id);
            weights.push(*weight);
        }
        let whole: String = expected.iter().map(|(text, _)| text.as_str()).collect();
        prop_assert_eq!(vocab.decode(&ids, false).unwrap(), whole);
        let expected: f32 = expected.iter().map(|(_, weight)| *weight).reduce(f32::min).unwrap_or(0.0);
        prop_assert_eq!(weights.into_iter().reduce(f32::min), Some(expected));
    }
}

/// The trained text of each run of roles, `role[text]`.
fn voices(row: &Row, text: &str) -> String {
    let mut at = 0;
    let run = |(role, n): (&str, u32)| {
        let tokens = at..at + n as usize;
        at = tokens.end;
        let trained = tokens.filter(|token| row.weights[*token] > 0.0);
        let said: String = trained.map(|token| &text[row.offsets[token].clone()]).collect();
        format!("{role}[{said}]")
    };
    let voices: Vec<String> = row.roles.runs().map(run).collect();
    assert_eq!(at, row.ids.len(), "a role for every token");
    voices.join(" ")
}

fn check_voices(policy: Policy, row: &Rendered, expect: &str) {
    let rules = Rules { policy, ..rules() };
    let made = one(&vocab_of(&byte_level()), row, &rules);
    assert_eq!(voices(&made, &row.text), expect);
    let whole = 0..made.ids.len() as u32;
    assert_eq!(made.roles.part(&whole), made.roles);
}

#[test]
fn every_trained_token_has_the_role_of_its_message() {
    let every = || Policy { train_on: TrainOn::Every, ..Policy::default() };
    check_voices(Policy::default(), &chat(&TWO), "assistant[yo<e>no<e>]");
    check_voices(every(), &chat(&TWO), "user[hello] assistant[yo<e>] user[there] assistant[no<e>]");
    let three = chat(&[("s", "x"), ("u", "y"), ("a", "z")]);
    check_voices(every(), &three, "system[x] user[y] assistant[z<e>]");
    // The ends of turns are of those whose turns they end, though the template writes them between messages.
    let stops = Policy { stop: TrainOnStop::All, ..Policy::default() };
    check_voices(stops.clone(), &three, "system[<e>] user[<e>] assistant[z<e>]");
    // A turn that no message has.
    let mut bits: Vec<Bit> = vec![("<sys>\n be good <e>\n", None, "", Part::Scaffold, 0.0)];
    bits.extend([
        ("<u>\n", None, "", Part::Scaffold, 0.0),
        ("hello", Some(0), "user", Part::Content, 1.0),
        ("<e>\n<a>\n", None, "", Part::Scaffold, 0.0),
        ("yo", Some(1), "assistant", Part::Content, 1.0),
        ("<e>", Some(1), "assistant", Part::Stop, 1.0),
    ]);
    let own = rendered(Kind::Sft, &bits, None);
    check_voices(stops, &own, "template[<e>] user[<e>] assistant[yo<e>]");
    let text = [("yo hello", None, "text", Part::Content, 1.0)];
    check_voices(Policy::default(), &rendered(Kind::Text, &text, None), "text[ hello]");
}

#[test]
fn what_a_response_thinks_has_a_role_of_its_own() {
    let answer = |text, part| (text, Some(1), "assistant", part, 1.0);
    let frame = |text| (text, None, "", Part::Scaffold, 0.0);
    let bits: [Bit; 13] = [
        frame("<u>\n"),
        ("hello", Some(0), "user", Part::Content, 1.0),
        frame("<e>\n<a>\n"),
        answer("<think>", Part::Scaffold),
        answer("\n", Part::Scaffold),
        answer("there", Part::Reasoning),
        answer("\n\n", Part::Scaffold),
        answer("yo", Part::Content),
        answer(" 12", Part::ToolCall),
        answer("<e>", Part::Stop),
        frame("\n<u>\n"),
        ("no", Some(2), "tool", Part::Content, 0.5),
        frame("<e>\n"),
    ];
    let row = rendered(Kind::Sft, &bits, None);
    // The marks of a thought, and the blanks around it, are the template's: of the answer.
    let answer = "assistant[<think>\n] assistant/reasoning[there] assistant[\n\nyo 12<e>]";
    check_voices(Policy::default(), &row, answer);
    let every = Policy { train_on: TrainOn::Every, ..Policy::default() };
    check_voices(every, &row, &format!("user[hello] {answer} tool[no]"));
    let masked = Policy { reasoning: Learn::Mask, ..Policy::default() };
    check_voices(masked, &row, "assistant[<think>\n\n\nyo 12<e>]");
}

#[test]
fn pieces_of_a_row_have_the_roles_of_their_tokens() {
    let policy = Policy { train_on: TrainOn::Every, ..Policy::default() };
    let row = chat(&[("u", "hello there"), ("a", "yo yo"), ("u", "no no"), ("a", "hello")]);
    let vocab = vocab_of(&byte_level());
    let whole = one(&vocab, &row, &Rules { policy: policy.clone(), ..rules() });
    for max_len in 3..whole.ids.len() as u32 {
        let rules = Rules { max_len, too_long: TooLong::Split, policy: policy.clone(), ..rules() };
        let Ok(taken) = tokenize(&vocab, &row, &rules) else { continue };
        for piece in taken.rows {
            let mut roles = Roles::default();
            piece.kept.iter().for_each(|range| roles.append(&whole.roles.part(range)));
            assert_eq!(piece.roles, roles);
            voices(&piece, &row.text);
        }
    }
}
