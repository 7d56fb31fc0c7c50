//! Templates that leave out of earlier answers what they write when those are the last, or move what
//! stands before them.

use std::path::PathBuf;

use hone_chat::{ChatTemplate, Date, Dialect, Given, Rewritten, Sample, TemplateError};
use hone_schema::{Message, Part, Share, parse_messages};
use serde_json::{Map, Value, json};

/// Thoughts stand in the last answer only.
const FORGETS: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n\
    {% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}\
    {{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// Thoughts inside the content, cut off everywhere but in the last answer.
const CUTS: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n\
    {{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}";

fn template(source: &str) -> ChatTemplate {
    let added = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"];
    let tokens = [
        ("bos_token", "<s>"),
        ("eos_token", "</s>"),
        ("pad_token", "<pad>"),
        ("unk_token", "<unk>"),
    ];
    let dialect = Dialect {
        tokens: tokens.map(|(name, token)| (name.to_owned(), token.to_owned())).into(),
        added_tokens: added.map(str::to_owned).to_vec(),
        date: Some(Date::parse("2026-01-02").expect("a date")),
        ..Dialect::default()
    };
    ChatTemplate::new(source, dialect).expect("a valid template")
}

fn messages(list: &Value) -> Vec<Message> {
    parse_messages(&list.to_string()).expect("messages")
}

/// What a sample trains: its spans with a weight that are an answer's, or that the row chose.
fn trained(sample: &Sample) -> String {
    let found = &sample.located;
    let is_trained = |part: Part, role: &str, chosen: bool| {
        part != Part::Scaffold && (role == "assistant" || chosen)
    };
    let spans = found.spans.iter();
    let spans = spans.filter(|s| s.weight > 0.0 && is_trained(s.part, &s.role, s.chosen));
    spans.map(|s| &found.text[s.start as usize..s.end as usize]).collect()
}

/// The samples of a row as `answer: what it trains`.
fn check(source: &str, policy: Rewritten, list: Value, expect: &[&str]) {
    let template = template(source);
    let messages = messages(&list);
    let samples = template.samples(&messages, &Given::default(), 0.5, policy).expect("renders");
    let found: Vec<String> = samples
        .iter()
        .map(|s| {
            let answer = s.answer.map_or("whole".to_owned(), |answer| answer.to_string());
            format!("{answer}: {}{}", trained(s), s.located.notes.join(", "))
        })
        .collect();
    assert_eq!(found, expect);
    trains_each_message_once(&messages, &samples);
    for sample in samples {
        // A sample of an answer is what a served model reads and has to write.
        let Some(answer) = sample.answer else { continue };
        let served = template.render(&messages[..=answer], None, false).expect("renders");
        assert_eq!(sample.located.text, served);
        let weights = sample.located.spans.iter().filter(|s| s.weight > 0.0);
        assert!(weights.clone().all(|s| s.message == Some(answer as u32) && s.weight == 0.5));
    }
}

/// Each message with a weight has it in one sample, and the last answer is in the one that says so.
fn trains_each_message_once(messages: &[Message], samples: &[Sample]) {
    let weighs = |sample: &Sample, message: usize| {
        let mut spans = sample.located.spans.iter();
        spans.any(|s| s.message == Some(message as u32) && s.weight > 0.0)
    };
    let last = messages.iter().rposition(|message| message.role == "assistant");
    for (idx, message) in messages.iter().enumerate() {
        let mut those = samples.iter().filter(|sample| weighs(sample, idx));
        let is_said = message.text().is_some_and(|text| !text.trim().is_empty());
        let expect = message.weight > 0.0 && is_said;
        assert_eq!(
            those.next().map(|s| last != Some(idx) || s.share == Share::Main),
            expect.then_some(true)
        );
        assert!(those.next().is_none(), "message {idx} is trained twice");
    }
}

/// Two questions, the answers with thoughts.
fn thoughts() -> Value {
    json!([
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "t"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "reasoning_content": "u"},
    ])
}

#[test]
fn each_rewritten_answer_is_a_sample() {
    check(FORGETS, Rewritten::Expand, thoughts(), &["1: tb<|im_end|>", "whole: ud<|im_end|>"]);
    // So it is whatever the name under which the row has them, and the template reads them.
    for (given, read) in [("thinking", "reasoning_content"), ("reasoning_content", "thinking")] {
        let named = |text: &str, name| text.replace("reasoning_content", name);
        let list = serde_json::from_str(&named(&thoughts().to_string(), given)).expect("JSON");
        let expect = ["1: tb<|im_end|>", "whole: ud<|im_end|>"];
        check(&named(FORGETS, read), Rewritten::Expand, list, &expect);
        let keeps = named(FORGETS, read).replace(" and loop.last", "");
        let list = serde_json::from_str(&named(&thoughts().to_string(), given)).expect("JSON");
        check(&keeps, Rewritten::Expand, list, &["whole: tb<|im_end|>ud<|im_end|>"]);
    }
    let cut = json!([
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>t</think>b"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e"}, {"role": "assistant", "content": "<think>u</think>f"},
    ]);
    // The marks are frame, as those of the thoughts above.
    let expect = ["1: tb<|im_end|>", "whole: d<|im_end|>uf<|im_end|>"];
    check(CUTS, Rewritten::Expand, cut, &expect);
}

/// The system message stands before the last question.
const MOVES: &str = "{% set system = messages[0].content %}{% for m in messages[1:] %}\
    {% if m.role == 'user' and (loop.last or loop.revindex == 2) %}({{ system }}){% endif %}\
    {{ m.content }}<|im_end|>{% endfor %}";

#[test]
fn an_answer_is_trained_behind_what_a_served_model_reads_before_it() {
    let list = json!([
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"},
    ]);
    check(MOVES, Rewritten::Expand, list.clone(), &["2: b<|im_end|>", "whole: d<|im_end|>"]);
    let all = ["whole: b<|im_end|>d<|im_end|>history rewritten"];
    check(MOVES, Rewritten::Accept, list.clone(), &all);
    let stays = MOVES.replace("loop.last or loop.revindex == 2", "loop.first");
    check(&stays, Rewritten::Expand, list, &["whole: b<|im_end|>d<|im_end|>"]);
}

#[test]
fn what_is_not_rewritten_or_not_trained_stays_one_sample() {
    let plain = json!([
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": " d "},
    ]);
    check(FORGETS, Rewritten::Expand, plain, &["whole: b<|im_end|> d <|im_end|>"]);
    let keeps = FORGETS.replace(" and loop.last", "");
    check(&keeps, Rewritten::Expand, thoughts(), &["whole: tb<|im_end|>ud<|im_end|>"]);
    let mut first_untrained = thoughts();
    first_untrained[1]["train"] = json!(false);
    check(FORGETS, Rewritten::Expand, first_untrained, &["whole: ud<|im_end|>"]);
    let never = FORGETS.replace("loop.last", "false");
    let note = "part of an answer left out by the template";
    let expect = format!("whole: b<|im_end|>d<|im_end|>{note}");
    check(&never, Rewritten::Expand, thoughts(), &[expect.as_str()]);
}

#[test]
fn a_conversation_stays_while_anything_of_it_has_a_weight() {
    let mut last_untrained = thoughts();
    last_untrained[3]["weight"] = json!(0);
    // Questions weigh as much as answers: a policy may train them.
    let expect = ["1: tb<|im_end|>", "whole: "];
    check(FORGETS, Rewritten::Expand, last_untrained.clone(), &expect);
    last_untrained[0]["train"] = json!(false);
    last_untrained[2]["train"] = json!(false);
    check(FORGETS, Rewritten::Expand, last_untrained.clone(), &["1: tb<|im_end|>"]);
    last_untrained[2]["train"] = json!(true);
    check(FORGETS, Rewritten::Expand, last_untrained, &["1: tb<|im_end|>", "whole: c"]);
    let mut unanswered = thoughts();
    unanswered.as_array_mut().expect("a list").pop();
    check(FORGETS, Rewritten::Expand, unanswered, &expect);
}

#[test]
fn a_sample_says_which_answers_it_is_there_for() {
    let shares = |list: Value| -> Vec<(Option<usize>, Share)> {
        let samples =
            template(FORGETS).samples(&messages(&list), &Given::default(), 1.0, Rewritten::Expand);
        let samples = samples.expect("renders");
        trains_each_message_once(&messages(&list), &samples);
        samples.iter().map(|sample| (sample.answer, sample.share)).collect()
    };
    let (main, earlier, rest) = (Share::Main, Share::Earlier, Share::Rest);
    assert_eq!(shares(thoughts()), [(Some(1), earlier), (None, main)]);
    let mut list = thoughts();
    list[1]["reasoning_content"] = Value::Null;
    assert_eq!(shares(list.clone()), [(None, main)]);
    // The last answer is not the last message, and is rewritten.
    let ask = json!({"role": "user", "content": "e"});
    list.as_array_mut().expect("a list").push(ask.clone());
    assert_eq!(shares(list), [(Some(3), main), (None, earlier)]);
    let mut list = thoughts();
    list.as_array_mut().expect("a list").push(ask);
    assert_eq!(shares(list), [(Some(1), earlier), (Some(3), main), (None, rest)]);
    let mut list = thoughts();
    list[3]["weight"] = json!(0);
    assert_eq!(shares(list), [(Some(1), earlier), (None, rest)]);
}

#[test]
fn it_can_be_accepted_or_refused() {
    let expect = ["whole: b<|im_end|>ud<|im_end|>history rewritten"];
    check(FORGETS, Rewritten::Accept, thoughts(), &expect);
    let (template, messages) = (template(FORGETS), messages(&thoughts()));
    let error = template.samples(&messages, &Given::default(), 1.0, Rewritten::Refuse).unwrap_err();
    assert_eq!(error.reason(), "history rewritten");
    let TemplateError::Rewritten { message, whole, served } = &error else { panic!("{error}") };
    assert_eq!(*message, 1);
    assert!(whole.contains("assistant\nb<|im_end|>"), "{error}");
    assert!(served.contains("assistant\n<think>t</think>b<|im_end|>"), "{error}");
}

#[test]
fn an_answer_of_which_nothing_is_written_is_refused() {
    let source = "{% for m in messages %}{% if m.content is not string %}{{ m.content[0].text }}\
        {% endif %}<|im_end|>{% endfor %}";
    let template = template(source);
    let samples = |list: Value| {
        let messages = messages(&list);
        template.samples(&messages, &Given::default(), 1.0, Rewritten::Expand)
    };
    let error = samples(thoughts()).unwrap_err();
    assert_eq!(error.reason(), "answer left out by the template", "{error}");
    let parts = |text: &str| json!([{"type": "text", "text": text}]);
    let list = json!([
        {"role": "user", "content": "a"}, {"role": "assistant", "content": parts("b")},
        {"role": "assistant", "content": "c", "train": false}, {"role": "assistant", "content": ""},
    ]);
    assert_eq!(trained(&samples(list).expect("renders")[0]), "b<|im_end|>");
}

#[test]
fn documents_are_located_and_variables_are_the_rows_own() {
    let source = "{% for d in documents %}[{{ d.text }}]{% endfor %}{{ style }}\
        {% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}";
    let mut template = template(source);
    let messages = messages(&json!([{"role": "user", "content": "a"}]));
    let documents = json!([{"text": "x<|im_end|>"}, {"text": "y"}]);
    let variables = Map::from_iter([("style".to_owned(), json!("brief"))]);
    let given =
        Given { documents: Some(&documents), variables: Some(&variables), ..Given::default() };
    let found = template.locate_with(&messages, &given, 1.0).expect("renders");
    assert_eq!(found.text, "[x<|im_end|>][y]briefa<|im_end|>");
    let of_documents = found.spans.iter().filter(|s| s.part.is_said() && s.message.is_none());
    let texts: Vec<&str> =
        of_documents.map(|s| &found.text[s.start as usize..s.end as usize]).collect();
    assert_eq!(texts, ["x<|im_end|>", "y"]);
    let dialect = Dialect { variables: variables.clone(), ..Dialect::default() };
    template = ChatTemplate::new(source, dialect).expect("a valid template");
    let own = Map::from_iter([("style".to_owned(), json!("long"))]);
    let given = Given { documents: Some(&documents), variables: Some(&own), ..Given::default() };
    let text = template.render_with(&messages, &given, false).expect("renders");
    assert_eq!(text, "[x<|im_end|>][y]longa<|im_end|>");
    let forged = Map::from_iter([("style".to_owned(), json!(["<|im_end|>"]))]);
    let given = Given { variables: Some(&forged), ..Given::default() };
    let error = self::template(source).locate_with(&messages, &given, 1.0).unwrap_err();
    assert_eq!(error.reason(), "forged control token", "{error}");
}

/// Templates of the corpus that leave out of an earlier answer what they write when it is the last.
const REWRITERS: [&str; 21] = [
    "templates/axolotl/src/axolotl/utils/chat_templates/templates/qwen3.jinja",
    "templates/axolotl/src/axolotl/utils/chat_templates/templates/qwen3_5.jinja",
    "templates/llama.cpp/MiniMax-M2.jinja",
    "templates/llama.cpp/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16.jinja",
    "templates/llama.cpp/Qwen3.5-4B.jinja",
    "templates/llama.cpp/openai-gpt-oss-120b.jinja",
    "templates/llama.cpp/openbmb-MiniCPM5-1B.jinja",
    "templates/llama.cpp/tencent-Hy3.jinja",
    "templates/trl/tests/data/template.jinja",
    "templates/trl/trl/chat_templates/diffusion_gemma.jinja",
    "templates/trl/trl/chat_templates/diffusion_gemma_training.jinja",
    "templates/trl/trl/chat_templates/glm4moe.jinja",
    "templates/trl/trl/chat_templates/gptoss.jinja",
    "templates/trl/trl/chat_templates/lfm2_2_5.jinja",
    "templates/trl/trl/chat_templates/nemotron_3_nano.jinja",
    "templates/trl/trl/chat_templates/nemotron_3_nano_training.jinja",
    "templates/trl/trl/chat_templates/nemotron_3_super.jinja",
    "templates/trl/trl/chat_templates/nemotron_3_super_training.jinja",
    "templates/trl/trl/chat_templates/qwen3.jinja",
    "templates/trl/trl/chat_templates/qwen3_5_nothink.jinja",
    "templates/trl/trl/chat_templates/qwen3_5_think.jinja",
];

/// Templates that leave a thought out even when its answer is the last.
const N_LEAVE_OUT: usize = 68;

/// Templates that want more than this: tools, or contents in parts.
const N_FAILED: usize = 6;

#[test]
fn real_templates_forget_thoughts_or_keep_them() {
    let Some(corpus) = std::env::var_os("HONE_CORPUS").map(PathBuf::from) else {
        use std::io::Write;
        let said = writeln!(std::io::stderr(), "skipped: HONE_CORPUS is not set");
        return said.expect("stderr is open");
    };
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/renders.json");
    let golden: Value =
        serde_json::from_str(&std::fs::read_to_string(golden).expect("a golden")).expect("JSON");
    let mut chat = thoughts();
    for answer in [1, 3] {
        chat[answer]["thinking"] = chat[answer]["reasoning_content"].clone();
    }
    let (mut rewriters, mut n_leave_out, mut n, mut failed) = (Vec::new(), 0, 0, Vec::new());
    for name in names_of(&golden) {
        n += 1;
        let source = std::fs::read_to_string(corpus.join(name)).expect("a template");
        let samples =
            template(&source).samples(&messages(&chat), &Given::default(), 1.0, Rewritten::Expand);
        let samples = match samples {
            Ok(samples) => samples,
            Err(error) => {
                failed.push(format!("{name}: {error}"));
                continue;
            }
        };
        let leaves_out = |s: &Sample| s.located.notes.iter().any(|note| note.starts_with("part"));
        n_leave_out += usize::from(samples.iter().any(leaves_out));
        if samples.len() > 1 {
            rewriters.push(name);
        }
    }
    assert_eq!(n, 103, "a template was added or lost");
    assert_eq!(rewriters, REWRITERS);
    assert_eq!(n_leave_out, N_LEAVE_OUT);
    assert_eq!(failed.len(), N_FAILED, "{failed:?}");
}

/// Paths of the templates in the corpus.
fn names_of(golden: &Value) -> impl Iterator<Item = &str> {
    let renders = golden["renders"].as_array().expect("a list").iter();
    renders.filter_map(|r| r["template"].as_str()).filter(|name| name.ends_with(".jinja"))
}
