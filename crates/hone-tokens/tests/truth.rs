//! From messages to trained tokens and back, under every template that hone brings along: decoded, the trained tokens are the
//! answers and their stop markers, whatever the messages spell.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use hone_chat::{BUILTINS, ChatTemplate, Dialect};
use hone_schema::{Kind, Rendered, Split, parse_messages};
use hone_tokens::{Policy, Row, Rules, TooLong, Vocab, VocabSpec, tokenize, train_vocab};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

/// Markers of all the families together.
const MARKERS: [&str; 25] = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|im_sep|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "[INST]",
    "[/INST]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
];

/// What ends an answer, where it is not `</s>`.
const STOPS: [(&str, &str); 6] = [
    ("chatml", "<|im_end|>"),
    ("command", "<|END_OF_TURN_TOKEN|>"),
    ("gemma", "<end_of_turn>"),
    ("llama3", "<|eot_id|>"),
    ("phi3", "<|end|>"),
    ("phi4", "<|im_end|>"),
];

struct World {
    vocab: Vocab,
    templates: Vec<(&'static str, ChatTemplate)>,
}

fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(|| {
        let markers = MARKERS.map(str::to_owned).to_vec();
        let spec = VocabSpec::new(256 + MARKERS.len() + 40, markers).expect("room for merges");
        let texts =
            ["user assistant USER: ASSISTANT: ### Response: yo yo the the answer is . \n\n"; 4];
        let vocab = Vocab::from_json(&train_vocab(texts, &spec)).expect("train_vocab writes one");
        let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")];
        let dialect = || Dialect {
            tokens: BTreeMap::from(tokens.map(|(name, text)| (name.to_owned(), text.to_owned()))),
            added_tokens: MARKERS.map(str::to_owned).into(),
            date: None,
            variables: Map::new(),
        };
        let template = |(name, source): &(&'static str, &str)| {
            (*name, ChatTemplate::new(source, dialect()).expect("a built-in template is one"))
        };
        World { vocab, templates: BUILTINS.iter().map(template).collect() }
    })
}

/// What somebody says: it begins and ends with a letter, since templates may trim.
fn said() -> impl Strategy<Value = String> {
    let word = prop_oneof![
        3 => "[a-z .,\n]{1,8}",
        2 => prop::sample::select(MARKERS.to_vec()).prop_map(str::to_owned),
        1 => prop::sample::select(vec!["é", "日本", "🐈‍⬛", "USER: ", "\n\n### Response:\n", "[INST"])
            .prop_map(str::to_owned),
    ];
    prop::collection::vec(word, 0..5).prop_map(|words| format!("a{}z", words.concat()))
}

/// The row's trained tokens, decoded, run by run.
fn trained(world: &World, row: &Row) -> Vec<String> {
    let tokens: Vec<(u32, f32)> =
        row.ids.iter().copied().zip(row.weights.iter().copied()).collect();
    tokens
        .chunk_by(|a, b| (a.1 > 0.0) == (b.1 > 0.0))
        .filter(|run| run[0].1 > 0.0)
        .map(|run| {
            let ids: Vec<u32> = run.iter().map(|(id, _)| *id).collect();
            world.vocab.decode(&ids, false).expect("bytes decode")
        })
        .collect()
}

fn render(template: &ChatTemplate, system: Option<&str>, turns: &[(String, String)]) -> Rendered {
    let system = system.map(|text| json!({"role": "system", "content": text}));
    let turns = turns.iter().flat_map(|(question, answer)| {
        [
            json!({"role": "user", "content": question}),
            json!({"role": "assistant", "content": answer}),
        ]
    });
    let messages: Vec<Value> = system.into_iter().chain(turns).collect();
    let messages = parse_messages(&Value::Array(messages).to_string()).expect("messages");
    let located = template.locate(&messages, None, 1.0).expect("a built-in template takes these");
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn trained_tokens_are_the_answers_and_their_stops(
        system in prop::option::of(said()),
        turns in prop::collection::vec((said(), said()), 1..4),
    ) {
        let world = world();
        prop_assert_eq!(world.templates.len(), 14, "a template was added or lost");
        for (name, template) in &world.templates {
            let stop = STOPS.iter().find(|(known, _)| known == name).map_or("</s>", |(_, stop)| stop);
            let rendered = render(template, system.as_deref(), &turns);
            let rules = Rules {
                max_len: 100_000,
                too_long: TooLong::Error,
                policy: Policy::default(),
                bos: world.vocab.id_of("<s>"),
                n_embeddings: None,
            };
            let taken = match tokenize(&world.vocab, &rendered, &rules) {
                Ok(taken) => taken,
                Err(refusal) => return Err(TestCaseError::fail(format!("{name}: {refusal}"))),
            };
            let runs = trained(world, &taken.rows[0]);
            prop_assert_eq!(runs.len(), turns.len(), "{}: {:?}", name, runs);
            for (run, (_, answer)) in runs.iter().zip(&turns) {
                // Blanks around an answer are the template's: the space of `[/INST] yo </s>`.
                let content = run.strip_suffix(stop).map(str::trim);
                prop_assert_eq!(content, Some(answer.as_str()), "{}: {:?}", name, rendered.text);
            }
            // The template's own markers are control tokens; those that messages spell are not.
            let n_control = taken.rows[0].ids.iter().filter(|id| world.vocab.is_control(**id)).count();
            let plain = turns.iter().map(|_| ("az".to_owned(), "az".to_owned())).collect::<Vec<_>>();
            let plain = render(template, system.as_ref().map(|_| "az"), &plain);
            let plain = tokenize(&world.vocab, &plain, &rules).expect("plain words are taken");
            let n_plain = plain.rows[0].ids.iter().filter(|id| world.vocab.is_control(**id)).count();
            prop_assert_eq!(n_control, n_plain, "{}: {:?}", name, rendered.text);
        }
    }
}
