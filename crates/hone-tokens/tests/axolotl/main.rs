//! Axolotl's own fixture: a ShareGPT conversation, and the ids and labels that its tests expect of it under Llama's vocabulary.
//!
//! The format is FastChat's Vicuna 1.1: a system sentence, `USER: `, `ASSISTANT: `, `</s>` behind each answer. The fixture differs
//! from what a tokenizer makes of that text, in two ways, and this test says exactly where:
//!
//! 1. Axolotl encodes each turn alone and puts the ids together. A blank at the end of a turn becomes a token of its own, and the
//!    next turn begins with the blank that the tokenizer adds to every text: two blanks where the format has one.
//! 2. It spells `</s>` at the end of each answer and appends the end-of-text token as well. The spelled one was not recognised, so
//!    it is three text tokens (`.</`, `s`, `>`), which its model is trained to write before it stops.
//!
//! Both can be written down as text: two blanks before `USER` and `ASSISTANT`, and answers whose content ends in the text `</s>`,
//! which is content here and becomes no control token. Then every id and every label is that of the fixture. Under the format as it
//! is meant, ids and labels are the fixture's without those tokens.

mod spm;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;

use hone_chat::{ChatTemplate, Dialect};
use hone_schema::{Kind, Rendered, Split, parse_messages};
use hone_tokens::{Policy, Row, Rules, TooLong, Vocab, tokenize};
use serde_json::{Map, Value, json};

const SYSTEM: &str = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, \
                      detailed, and polite answers to the user's questions.";

/// The blank that stands alone.
const BLANK: u32 = 29871;

/// `.</`, `s`, `>` and `.` of the vocabulary.
const SPELLED_STOP: [u32; 3] = [21106, 29879, 29958];
const DOT: u32 = 29889;

struct World {
    vocab: Vocab,
    turns: Vec<(String, String)>,
    ids: Vec<u32>,
    labels: Vec<i64>,
}

fn world() -> Option<World> {
    let Some(corpus) = std::env::var_os("HONE_CORPUS").map(PathBuf::from) else {
        let said = writeln!(std::io::stderr(), "skipped: HONE_CORPUS is not set");
        said.expect("stderr is open");
        return None;
    };
    let gguf = std::fs::read(corpus.join("vocab/ggml-vocab-llama-spm.gguf")).expect("a vocabulary");
    let vocab = spm::tokenizer_json(&gguf).to_string();
    let fixtures = corpus.join("conformance/axolotl_fixtures");
    let json = |name: &str| -> Value {
        let bytes = std::fs::read(fixtures.join(name)).expect("a fixture");
        serde_json::from_slice(&bytes).expect("JSON")
    };
    let turns = json("conversation.json")["conversations"]
        .as_array()
        .expect("turns")
        .chunks(2)
        .map(|pair| {
            let value = |turn: &Value| turn["value"].as_str().expect("a text").to_owned();
            assert_eq!((&pair[0]["from"], &pair[1]["from"]), (&json!("human"), &json!("gpt")));
            (value(&pair[0]), value(&pair[1]))
        })
        .collect();
    let tokenized = json("conversation.tokenized.json");
    let ids = serde_json::from_value(tokenized["input_ids"].clone()).expect("ids");
    let labels = serde_json::from_value(tokenized["labels"].clone()).expect("labels");
    let vocab = Vocab::from_json(vocab.as_bytes()).expect("a vocabulary");
    Some(World { vocab, turns, ids, labels })
}

/// The conversation under Vicuna's format with `gap` before each turn, and `ending` behind each answer's content.
fn row(world: &World, gap: &str, ending: &str) -> Row {
    let source = format!(
        "{{{{ bos_token }}}}{SYSTEM}{gap}{{% for m in messages %}}{{% if m.role == 'user' %}}USER: {{{{ m.content }}}}{gap}\
         {{% else %}}ASSISTANT: {{{{ m.content }}}}{{{{ eos_token }}}}{{% endif %}}{{% endfor %}}\
         {{% if add_generation_prompt %}}ASSISTANT:{{% endif %}}"
    );
    let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")];
    let dialect = Dialect {
        tokens: tokens.map(|(name, text)| (name.to_owned(), text.to_owned())).into(),
        added_tokens: world.vocab.control_tokens().map(|(_, token)| token).collect(),
        date: None,
        variables: Map::new(),
    };
    let template = ChatTemplate::new(&source, dialect).expect("a template");
    let messages: Vec<Value> = (world.turns.iter())
        .flat_map(|(question, answer)| {
            let answer = format!("{answer}{ending}");
            [
                json!({"role": "user", "content": question}),
                json!({"role": "assistant", "content": answer}),
            ]
        })
        .collect();
    let messages = parse_messages(&Value::Array(messages).to_string()).expect("messages");
    let located = template.locate(&messages, None, 1.0).expect("a rendered row");
    let rendered = Rendered {
        id: "fixture".into(),
        source: "axolotl".into(),
        split: Split::Train,
        kind: Kind::Sft,
        text: located.text,
        spans: located.spans,
        share: hone_schema::Share::Main,
        prompt_len: located.prompt_len,
        meta: None,
    };
    let rules = Rules {
        max_len: 4096,
        too_long: TooLong::Error,
        policy: Policy::default(),
        bos: world.vocab.id_of("<s>"),
        n_embeddings: Some(32_000),
    };
    tokenize(&world.vocab, &rendered, &rules).expect("the row is taken").rows.remove(0)
}

/// Labels as Axolotl writes them.
fn labels(row: &Row) -> Vec<i64> {
    let tokens = row.ids.iter().zip(&row.weights);
    tokens.map(|(id, weight)| if *weight > 0.0 { i64::from(*id) } else { -100 }).collect()
}

#[test]
fn the_vocabulary_is_that_of_llama() {
    let Some(world) = world() else { return };
    let corpus = std::env::var("HONE_CORPUS").expect("the world is there");
    let path = format!("{corpus}/vocab/ggml-vocab-llama-spm.gguf");
    let read = |end: &str| std::fs::read_to_string(format!("{path}{end}")).expect("a table");
    let (texts, ids) = (read(".inp"), read(".out"));
    let mut n = 0;
    for (text, ids) in texts.split("\n__ggml_vocab_test__\n").zip(ids.lines()) {
        let ids: Vec<u32> = ids.split_whitespace().map(|id| id.parse().expect("an id")).collect();
        assert_eq!(world.vocab.encode_text(text).expect("ids"), ids, "{text:?}");
        n += 1;
    }
    assert_eq!(n, 46);
}

#[test]
fn ids_and_labels_are_those_of_the_fixture() {
    let Some(world) = world() else { return };
    let row = row(&world, "  ", "</s>");
    assert_eq!(row.ids, world.ids);
    assert_eq!(labels(&row), world.labels);
    assert_eq!((row.turns, row.stops.len(), row.ids.len()), (6, 1, 1970));
}

#[test]
fn the_format_as_it_is_meant_is_the_fixture_without_what_is_odd_in_it() {
    let Some(world) = world() else { return };
    let row = row(&world, " ", "");
    let (mut ids, mut expected) = (Vec::new(), Vec::new());
    let mut odd: BTreeMap<&str, u32> = BTreeMap::new();
    let mut at = 0;
    while at < world.ids.len() {
        let (id, label) = (world.ids[at], world.labels[at]);
        let next = world.ids.get(at + 1..).unwrap_or_default();
        // `USER` and `ASSISTANT` behind a blank of their own.
        if id == BLANK && label == -100 && matches!(next, [3148, 1001, ..] | [319, 1799, ..]) {
            *odd.entry("blanks").or_default() += 1;
        } else if world.ids[at..].starts_with(&SPELLED_STOP) && next[2] == 2 {
            *odd.entry("spelled stops").or_default() += 1;
            ids.push(DOT);
            expected.push(i64::from(DOT));
            at += SPELLED_STOP.len() - 1;
        } else {
            ids.push(id);
            expected.push(label);
        }
        at += 1;
    }
    assert_eq!(odd, BTreeMap::from([("blanks", 7), ("spelled stops", 6)]));
    assert_eq!(row.ids, ids);
    assert_eq!(labels(&row), expected);
}
