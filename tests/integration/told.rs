//! Losses told apart by source and by role, replay among them, and TensorBoard's file read by a
//! reader that shares nothing with its writer.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use crate::fixture::{PIPELINE, Place, differing, wait_until};

/// Chats in which four roles speak and one thinks, and plain text at half its weight beside them.
const SOURCES: &str = r#"replay_share = 0.5

[[ingest.source]]
name = "chats"
path = "chats.jsonl"

[[ingest.source]]
name = "replay"
path = "replay.jsonl"
replay = true
weight = 0.5
eval_rows = 8
"#;

/// All packs in every step, and nothing that chance decides.
const SETTINGS: [&str; 5] = [
    "train.batch_size=1000",
    "train.max_steps=3",
    "train.dropout=0",
    "train.shuffle=none",
    "train.eval_every=1",
];

/// Writes the pipeline with these sources; so large a share of the others is held out in each split.
fn write_pipeline(place: &Place, sources: &str, share: &str) {
    let (head, tail) = PIPELINE.split_once("[[ingest.source]]").unwrap();
    let (_, tail) = tail.split_once("[template]").unwrap();
    let head = head.replace("share = 0.1", &format!("share = {share}"));
    let pipeline = format!("{head}{sources}\n[template]{tail}");
    place.tree.write("p.toml", pipeline.replace("max_len = 64", "max_len = 96"));
}

fn place() -> Place {
    let place = Place::new();
    write_pipeline(&place, SOURCES, "0.2");
    let message = |role: &str, content: String| json!({"role": role, "content": content});
    let chat = |i: usize| {
        let messages = [
            message("system", "Add.".into()),
            message("user", format!("What is {i} and {i}?")),
            message("assistant", format!("<think>{i} twice</think>It is {}.", 2 * i)),
            message("tool", format!("{}", 2 * i)),
            message("assistant", "So it is.".into()),
        ];
        format!("{}\n", json!({"messages": messages}))
    };
    place.tree.write("chats.jsonl", (0..30).map(chat).collect::<String>());
    let text = |i: usize| {
        format!("{}\n", json!({"text": format!("{i} is a number and so is {}.", i + 1)}))
    };
    place.tree.write("replay.jsonl", (0..40).map(text).collect::<String>());
    place.done("ingest", &[]);
    place.done("template", &[]);
    place
}

/// Tokenizes with a policy and trains; the record's lines, and the report.
fn train(place: &Place, train_on: &str, more: &[&str]) -> (Vec<Value>, Value) {
    let policy = format!("tokenize.train_on={train_on}");
    place.done("tokenize", &["--set", &policy]);
    let sets = SETTINGS.iter().chain(more).flat_map(|set| ["--set", set]);
    place.done("train", &sets.collect::<Vec<_>>());
    let record = String::from_utf8(place.artefact("train")["runs/p/train/metrics.jsonl"].clone());
    let lines = record.unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    (lines, place.json("runs/p/train/manifest.json")["report"].clone())
}

fn names(object: &Value) -> Vec<&str> {
    let mut names: Vec<&str> = object.as_object().unwrap().keys().map(String::as_str).collect();
    names.sort_unstable();
    names
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

const ROLES: [&str; 6] = ["assistant", "assistant/reasoning", "system", "text", "tool", "user"];

#[test]
fn the_loss_of_a_role_is_that_of_a_run_that_trains_no_other() {
    let place = place();
    let (lines, report) = train(&place, "every", &[]);
    let first = &lines[0];
    assert_eq!(names(&first["losses_by_role"]), ROLES);
    assert_eq!(names(&first["losses"]), ["chats", "replay"]);
    assert_eq!(names(&report["trained_tokens"]["by_role"]), ROLES);

    // Every pack is in every step: the loss is the mean of its parts, replay at half its weight.
    let counts = &report["trained_tokens"];
    let mean = |by: &str, losses: &Value, replay: &str| {
        let mut sums = [0.0; 2];
        for (name, n) in counts[by].as_object().unwrap() {
            let weight = number(n) * if name == replay { 0.5 } else { 1.0 };
            sums[0] += weight * number(&losses[name]);
            sums[1] += weight;
        }
        sums[0] / sums[1]
    };
    for line in lines.iter().filter(|line| line.get("loss").is_some()) {
        let loss = number(&line["loss"]);
        assert!((mean("by_role", &line["losses_by_role"], "text") - loss).abs() < 1e-6, "{line}");
        assert!((mean("by_source", &line["losses"], "replay") - loss).abs() < 1e-6, "{line}");
    }
    let (replay, all) = (&counts["by_source"]["replay"], &first["num_trained_tokens"]);
    assert_eq!(number(&first["replay_share"]), number(replay) / number(all));
    assert!((number(&report["replay_share"]) - number(&first["replay_share"])).abs() < 1e-12);
    assert_eq!(replay, &counts["by_role"]["text"]);
    let last = lines.iter().rfind(|line| line.get("loss").is_some()).unwrap();
    assert_eq!(report["losses_by_role"], last["losses_by_role"]);

    // Held out, likewise.
    let held_out = lines.iter().rfind(|line| line.get("eval_loss").is_some()).unwrap();
    assert_eq!(names(&held_out["eval_losses_by_role"]), ROLES);
    assert_eq!(names(&held_out["eval_losses"]), ["chats", "replay"]);
    for key in ["losses", "losses_by_role"] {
        for (name, loss) in report["eval"][key].as_object().unwrap() {
            let line = number(&held_out[format!("eval_{key}")][name]);
            assert!((number(loss) - line).abs() < 1e-12, "{name}");
        }
    }

    // Before the first update the weights are the same whatever is trained.
    for (train_on, roles) in [
        ("[\"user\"]", &["text", "user"][..]),
        ("[\"tool\"]", &["text", "tool"]),
        ("[\"system\"]", &["system", "text"]),
        ("all", &["assistant", "assistant/reasoning", "text"]),
    ] {
        let (alone, _) = train(&place, train_on, &[]);
        assert_eq!(names(&alone[0]["losses_by_role"]), roles);
        for role in roles {
            let [here, there] =
                [&alone[0], first].map(|line| number(&line["losses_by_role"][role]));
            assert!((here - there).abs() < 1e-6, "{role}: {here} and {there}");
        }
    }
    // Pre-training has one role, and no source or role is told apart from one.
    let (causal, _) = train(&place, "every", &["train.objective=causal"]);
    assert!(causal[0].get("losses_by_role").is_none() && causal[0].get("losses").is_some());
}

/// Chats that are replay beside plain text that is not, both at half their weight.
const CHATS_AS_REPLAY: &str = r#"replay_share = 0.5

[[ingest.source]]
name = "plain"
path = "plain.jsonl"
weight = 0.5

[[ingest.source]]
name = "chats"
path = "chats.jsonl"
weight = 0.5
replay = true
eval_rows = 2
"#;

/// Computed by hand: a text `3 3` has three trained tokens behind its first, `3`, ` 3` and the end
/// of the text; a chat has two, a digit and the end of the turn. Nine of each are trained, so that
/// half of the rows are replay and 18 of 45 trained tokens, of a weight of 22.5 together.
#[test]
fn replay_is_what_its_source_says_whatever_its_form() {
    let place = Place::new();
    write_pipeline(&place, CHATS_AS_REPLAY, "0");
    let text = |i: usize| format!("{}\n", json!({"text": format!("{i} {i}")}));
    place.tree.write("plain.jsonl", (1..10).map(text).collect::<String>());
    let message = |role: &str, content: String| json!({"role": role, "content": content});
    let chat = |i: usize| {
        let asked = message("user", format!("Say {} of {i}.", i % 10));
        let said = message("assistant", (i % 10).to_string());
        format!("{}\n", json!({"messages": [asked, said]}))
    };
    place.tree.write("chats.jsonl", (0..11).map(chat).collect::<String>());
    for stage in ["ingest", "template", "tokenize"] {
        place.done(stage, &[]);
        let sources = &place.json(&format!("runs/p/{stage}/manifest.json"))["ledger"]["sources"];
        assert_eq!(sources["chats"]["replay"], true, "{stage}");
        assert_eq!(sources["plain"].get("replay"), None, "{stage}");
    }
    let sets: Vec<&str> = SETTINGS.iter().flat_map(|set| ["--set", set]).collect();
    let plan = place.done("train", &[&["plan", "--json"], &sets[..]].concat()).stdout;
    let plan: Value = serde_json::from_str(&plan).unwrap();
    let step = &plan["steps"][0];
    assert_eq!((&step["trained_tokens"], &step["weight"]), (&json!(45), &json!(22.5)));
    assert_eq!((&step["replay_share"], &plan["replay_share"]), (&json!(0.4), &json!(0.4)));

    let (lines, report) = train(&place, "all", &[]);
    let steps: Vec<&Value> = lines.iter().filter(|line| line.get("loss").is_some()).collect();
    assert_eq!(steps.len(), 3);
    for line in steps {
        assert_eq!((&line["num_trained_tokens"], &line["replay_share"]), (&json!(45), &json!(0.4)));
        let [chats, plain] = ["chats", "plain"].map(|name| number(&line["losses"][name]));
        assert!((0.4 * chats + 0.6 * plain - number(&line["loss"])).abs() < 1e-6, "{line}");
    }
    assert!((number(&report["replay_share"]) - 0.4).abs() < 1e-12);
    assert_eq!(report["trained_tokens"]["by_source"], json!({"chats": 18, "plain": 27}));
    // Held out are the two chats alone, so the held-out curve is replay's own.
    assert_eq!(place.json("runs/p/ingest/manifest.json")["report"]["replay"]["rows_there"], 9);

    // The same rows, and none of them replay.
    let without = CHATS_AS_REPLAY.replace("replay = true\neval_rows = 2\n", "");
    write_pipeline(&place, &without, "0");
    place.done("ingest", &[]);
    place.done("template", &[]);
    let (lines, report) = train(&place, "all", &[]);
    assert_eq!(report["trained_tokens"]["by_source"], json!({"chats": 22, "plain": 27}));
    assert_eq!(report["replay_share"], Value::Null);
    assert!(lines.iter().all(|line| line.get("replay_share").is_none()), "{}", lines[0]);
}

#[test]
fn a_resumed_run_tells_apart_what_the_unbroken_one_does() {
    let place = place();
    place.done("tokenize", &["--set", "tokenize.train_on=every"]);
    let sets = ["train.epochs=6", "train.eval_every=4", "train.checkpoint_every=3"];
    let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
    let straight = place.copy();
    straight.done("train", &[&sets[..], &["--threads", "2"]].concat());
    let mut running = place.start("train", &sets);
    assert!(wait_until(&mut running, || place.live_lines() >= 8), "it ended too early");
    running.signal("TERM");
    assert_eq!(running.end().code, Some(143));
    let output = place.done("train", &[&sets[..], &["--threads", "1"]].concat());
    assert!(output.stderr.contains("train: resumes after step "), "{}", output.stderr);
    let found = differing(&straight.artefact("train"), &place.artefact("train"));
    assert_eq!(found, Vec::<String>::new());
}

/// CRC-32C, bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _: u32| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
    !bytes.iter().fold(u32::MAX, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

fn is_masked(bytes: &[u8], crc: &[u8]) -> bool {
    let unmasked = u32::from_le_bytes(crc.try_into().unwrap()).wrapping_sub(0xa282_ead8);
    unmasked.rotate_left(15) == crc32c(bytes)
}

/// The payloads of an event file, each behind its length and its checksums.
fn payloads(mut file: &[u8]) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    while !file.is_empty() {
        let (head, rest) = file.split_at(12);
        assert!(is_masked(&head[..8], &head[8..]), "the length of record {}", all.len());
        let length = u64::from_le_bytes(head[..8].try_into().unwrap()) as usize;
        let (payload, rest) = rest.split_at(length);
        assert!(is_masked(payload, &rest[..4]), "record {}", all.len());
        all.push(payload.to_vec());
        file = &rest[4..];
    }
    all
}

/// A field of a protocol buffer.
#[derive(Debug)]
enum Field<'a> {
    Varint(u64),
    Fixed(&'a [u8]),
    Bytes(&'a [u8]),
}

fn varint(from: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = from.split_first().unwrap();
        *from = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return value;
        }
    }
    panic!("a varint without an end");
}

fn fields(mut message: &[u8]) -> Vec<(u64, Field<'_>)> {
    let mut all = Vec::new();
    while !message.is_empty() {
        let key = varint(&mut message);
        let mut take = |n: usize| {
            let (taken, rest) = message.split_at(n);
            message = rest;
            taken
        };
        let field = match key & 7 {
            1 => Field::Fixed(take(8)),
            5 => Field::Fixed(take(4)),
            0 => Field::Varint(varint(&mut message)),
            2 => {
                let n = varint(&mut message) as usize;
                let (taken, rest) = message.split_at(n);
                message = rest;
                Field::Bytes(taken)
            }
            other => panic!("there is no wire type {other}"),
        };
        all.push((key >> 3, field));
    }
    all
}

fn bytes(message: &[u8], number: u64) -> Option<&[u8]> {
    fields(message).into_iter().find_map(|(found, field)| match field {
        Field::Bytes(bytes) if found == number => Some(bytes),
        _ => None,
    })
}

/// What an event file holds: scalars by tag and step, texts, and the names of the settings.
#[derive(Default)]
struct Events {
    scalars: BTreeMap<(String, u64), f32>,
    texts: BTreeMap<(String, u64), String>,
    settings: BTreeSet<String>,
}

/// Reads a file that a run wrote from its first step on.
fn events(file: &[u8]) -> Events {
    let mut events = Events::default();
    let (mut last, mut time) = (0, 0.0);
    for (at, payload) in payloads(file).iter().enumerate() {
        let (mut step, mut is_start) = (0, false);
        for (number, field) in fields(payload) {
            match (number, field) {
                (1, Field::Fixed(seconds)) => {
                    let seconds = f64::from_le_bytes(seconds.try_into().unwrap());
                    assert!(seconds >= time, "time goes on");
                    time = seconds;
                }
                (2, Field::Varint(found)) => step = found,
                (3, Field::Bytes(version)) => assert_eq!((at, version), (0, &b"brain.Event:2"[..])),
                (7, Field::Bytes(session)) => {
                    is_start = matches!(fields(session)[..], [(1, Field::Varint(1))]);
                }
                (5, Field::Bytes(summary)) => {
                    assert!(step >= last, "step {step} behind step {last}");
                    last = step;
                    fields(summary).iter().for_each(|value| take(&mut events, step, value));
                }
                other => panic!("{other:?} in an event"),
            }
        }
        assert_eq!(is_start, at == 1, "a session starts at the second event");
    }
    events
}

fn take(events: &mut Events, step: u64, value: &(u64, Field<'_>)) {
    let (1, Field::Bytes(value)) = value else { panic!("{value:?} in a summary") };
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let tag = text(bytes(value, 1).unwrap());
    let scalar = fields(value).into_iter().find_map(|(number, field)| match field {
        Field::Fixed(bytes) if number == 2 => Some(f32::from_le_bytes(bytes.try_into().unwrap())),
        _ => None,
    });
    let before = match scalar {
        Some(scalar) => events.scalars.insert((tag.clone(), step), scalar).is_some(),
        None => {
            let plugin = bytes(bytes(value, 9).unwrap(), 1).unwrap();
            if bytes(plugin, 1) == Some(b"hparams") {
                assert_eq!((tag.as_str(), step), ("_hparams_/session_start_info", 0));
                let session = bytes(bytes(plugin, 2).unwrap(), 3).unwrap();
                let is_map = |(number, field): (u64, Field<'_>)| match (number, field) {
                    (1, Field::Bytes(entry)) => Some(text(bytes(entry, 1).unwrap())),
                    _ => None,
                };
                events.settings = fields(session).into_iter().filter_map(is_map).collect();
                return;
            }
            assert_eq!(bytes(plugin, 1).unwrap(), b"text");
            let said = text(bytes(bytes(value, 8).unwrap(), 8).unwrap());
            events.texts.insert((tag.clone(), step), said).is_some()
        }
    };
    assert!(!before, "{tag} twice at step {step}");
}

/// The names of a line's values in TensorBoard.
fn tags(line: &Value) -> Vec<(String, f64)> {
    let split = if line.get("eval_loss").is_some() { "eval" } else { "train" };
    let mut tags = Vec::new();
    for (key, value) in line.as_object().unwrap() {
        let short = key.strip_prefix("eval_").unwrap_or(key);
        let mut add = |tag: String, value: &Value| tags.push((tag, number(value)));
        match (short, value) {
            ("step" | "num_tokens" | "num_trained_tokens" | "samples", _) => {}
            ("losses", Value::Object(all)) => {
                all.iter().for_each(|(name, v)| add(format!("{split}/{name}/loss"), v));
            }
            ("losses_by_role", Value::Object(all)) => {
                all.iter().for_each(|(role, v)| add(format!("{split}/role/{role}/loss"), v));
            }
            ("grad_norms", Value::Object(all)) => {
                all.iter().for_each(|(part, v)| add(format!("train/grad_norm/{part}"), v));
            }
            (_, value) => add(format!("{split}/{short}"), value),
        }
    }
    tags
}

#[test]
fn an_event_file_holds_the_record_for_any_reader() {
    assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    let place = place();
    let more = ["train.log_layers_every=2", "train.sample_every=2", "train.sample_tokens=4"];
    let (lines, _) = train(&place, "every", &more);
    let files = place.tree.files("runs/p/logs/train");
    let files: Vec<_> = files.iter().filter(|(name, _)| name.contains("tfevents")).collect();
    assert_eq!(files.len(), 1);
    let mut found = events(files[0].1);
    let mut seen = BTreeSet::new();
    for line in &lines {
        let step = line["step"].as_u64().unwrap();
        for (tag, value) in tags(line) {
            let scalar = found.scalars.remove(&(tag.clone(), step));
            assert_eq!(scalar, Some(value as f32), "{tag} at step {step}");
            seen.insert(tag);
        }
        for sample in line["samples"].as_array().into_iter().flatten() {
            let tag = format!("samples/{}", sample["id"].as_str().unwrap());
            let text = found.texts.remove(&(tag, step)).unwrap();
            assert!(text.contains(sample["reference"].as_str().unwrap()), "{text}");
        }
    }
    // Speed is no part of the record.
    let rest: BTreeSet<String> = found.scalars.into_keys().map(|(tag, _)| tag).collect();
    assert_eq!(rest, BTreeSet::from(["train/tokens_per_second".to_owned()]));
    assert!(found.texts.is_empty());
    for key in ["lr", "rank", "schedule", "seed", "shuffle"] {
        assert!(found.settings.contains(key), "no {key} in {:?}", found.settings);
    }
    for tag in ["train/role/assistant/reasoning/loss", "eval/role/tool/loss", "eval/replay/loss"] {
        assert!(seen.contains(tag), "no {tag} in {seen:?}");
    }
}
