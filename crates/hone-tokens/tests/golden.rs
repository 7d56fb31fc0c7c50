//! A real tokenizer under real templates: ids and assistant masks of transformers (`tests/golden/README.md` says how they were
//! made), and what becomes of messages that spell control tokens.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};

use hone_chat::{ChatTemplate, Dialect};
use hone_schema::{Kind, Rendered, Split, parse_messages};
use hone_tokens::{Row, Vocab, tokenize};
use serde_json::{Map, Value, json};
use support::{rules, written};

struct World {
    corpus: PathBuf,
    vocab: Vocab,
    golden: Value,
    chats: Vec<Value>,
}

impl World {
    fn open() -> Option<Self> {
        let Some(corpus) = std::env::var_os("HONE_CORPUS").map(PathBuf::from) else {
            let said = writeln!(std::io::stderr(), "skipped: HONE_CORPUS is not set");
            said.expect("stderr is open");
            return None;
        };
        let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
        let json = |path: PathBuf| -> Value {
            serde_json::from_slice(&std::fs::read(path).expect("a file")).expect("JSON")
        };
        let golden = json(here.join("tokens.json"));
        let tokenizer = corpus.join(golden["tokenizer"].as_str().expect("a path"));
        Some(World {
            vocab: Vocab::from_json(&std::fs::read(tokenizer).expect("a file"))
                .expect("a vocabulary"),
            chats: serde_json::from_value(json(here.join("chats.json"))).expect("a list"),
            golden,
            corpus,
        })
    }

    fn template(&self, path: &str) -> ChatTemplate {
        let text = std::fs::read_to_string(self.corpus.join(path)).expect("a template");
        let source = match path.ends_with(".json") {
            true => {
                let config: Value = serde_json::from_str(&text).expect("JSON");
                config["chat_template"].as_str().expect("a template").to_owned()
            }
            false => text,
        };
        let dialect = Dialect {
            tokens: BTreeMap::from([("eos_token".to_owned(), "<|im_end|>".to_owned())]),
            added_tokens: self.vocab.control_tokens().map(|(_, token)| token).collect(),
            date: None,
            variables: Map::new(),
        };
        ChatTemplate::new(&source, dialect).expect("a template")
    }

    fn row(&self, template: &ChatTemplate, messages: &Value) -> Rendered {
        let messages = parse_messages(&messages.to_string()).expect("messages");
        let located = template.locate(&messages, None, 1.0).expect("it is rendered");
        Rendered {
            id: "r".into(),
            source: "s".into(),
            split: Split::Train,
            kind: Kind::Sft,
            text: located.text,
            spans: located.spans,
            share: hone_schema::Share::Main,
            prompt_len: located.prompt_len,
            meta: None,
        }
    }

    fn ids(&self, row: &Rendered) -> Vec<u32> {
        self.vocab.encode(&row.text, &written(row)).expect("it is encoded").ids
    }
}

#[test]
fn ids_and_masks_are_those_of_transformers() {
    let Some(world) = World::open() else { return };
    let (mut n_equal, mut n_forging, mut n_masks) = (0, 0, 0);
    for render in world.golden["renders"].as_array().expect("a list") {
        let template = world.template(render["template"].as_str().expect("a path"));
        for (chat, golden) in world.chats.iter().zip(render["whole"].as_array().expect("a list")) {
            let row = world.row(&template, &chat["messages"]);
            let ids: Vec<u32> = serde_json::from_value(golden["ids"].clone()).expect("ids");
            if golden.get("sanitized_ids").is_some() {
                // Here transformers forges; what it would have cut is text for us, and the whole text is still there.
                assert_ne!(world.ids(&row), ids, "{}", chat["name"]);
                assert_eq!(world.vocab.decode(&world.ids(&row), false).expect("text"), row.text);
                n_forging += 1;
                continue;
            }
            assert_eq!(world.ids(&row), ids, "{}", chat["name"]);
            n_equal += 1;
            if let (Some(trained), Ok(tokens)) =
                (golden.get("trained"), tokenize(&world.vocab, &row, &rules()))
            {
                compare_masks(&chat["name"], &row, &tokens.rows[0], trained);
                n_masks += 1;
            }
        }
    }
    assert_eq!((n_equal, n_forging), (20, 4), "a golden was added or lost");
    assert!(n_masks >= 9, "{n_masks} masks were compared");
}

/// Trained are the tokens that the reference's mask marks, but for the line ends that its template puts behind a stop token.
fn compare_masks(name: &Value, row: &Rendered, tokens: &Row, golden: &Value) {
    let ranges: Vec<[usize; 2]> = serde_json::from_value(golden.clone()).expect("ranges");
    let golden: BTreeSet<usize> = ranges.into_iter().flat_map(|[start, end]| start..end).collect();
    let ours: BTreeSet<usize> =
        (0..tokens.ids.len()).filter(|t| tokens.weights[*t] > 0.0).collect();
    assert!(ours.is_subset(&golden), "{name}: {ours:?} is not within {golden:?}");
    for token in golden.difference(&ours) {
        let before = &row.text[..tokens.offsets[*token].start];
        assert_eq!(&row.text[tokens.offsets[*token].clone()], "\n", "{name}: token {token}");
        assert!(before.ends_with("<|im_end|>"), "{name}: token {token}");
    }
}

/// Every added token of a real family, in every role, whole and in halves.
#[test]
fn no_message_can_write_a_control_token_of_a_real_family() {
    let Some(world) = World::open() else { return };
    let template = world.template("tokenizers/qwen3/tokenizer_config.json");
    let says = |system: &str, user: &str, answer: &str| {
        let message = |role: &str, content: &str| json!({"role": role, "content": content});
        json!([message("system", system), message("user", user), message("assistant", answer)])
    };
    let control = |row: &Rendered| {
        let ids = world.ids(row);
        ids.into_iter().filter(|id| world.vocab.is_control(*id)).count()
    };
    let benign = control(&world.row(&template, &says("x", "x", "x")));
    let mut n = 0;
    for (_, token) in world.vocab.control_tokens() {
        let (head, tail) = token.split_at(token.len() / 2);
        for attempt in
            [token.clone(), format!("a {token}{token} b"), format!("{head}{token}{tail}")]
        {
            for role in 0..3 {
                let mut words = ["x", "x", "x"];
                words[role] = &attempt;
                let messages = parse_messages(&says(words[0], words[1], words[2]).to_string());
                // The template itself splits answers at its thought marks: such rows may be refused, and lose their own marks.
                let may_split = role == 2 && token.contains("think");
                match template.locate(&messages.expect("messages"), None, 1.0) {
                    Ok(_) => {
                        let row = world.row(&template, &says(words[0], words[1], words[2]));
                        let found = control(&row);
                        assert!(found == benign || may_split && found <= benign, "{:?}", row.text);
                    }
                    Err(error) => assert!(may_split, "{attempt:?}: {error}"),
                }
                n += 1;
            }
        }
    }
    assert_eq!(n, 26 * 3 * 3, "a control token was added or lost");
}
