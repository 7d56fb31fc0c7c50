//! Ids beside those of transformers.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::sync::Mutex;
use std::thread;

use hone_schema::sha256;
use hone_testkit::workspace;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::cells::{Ours, ours};
use crate::golden::{Cell, Chat, Entry, Index, Line, Tokenizer, chats, folder, json};

/// Templates whose text differs in some chats, and why: tokenizer (empty for any), template, reason.
/// Every other difference is a fault.
const DIFFERENT: [[&str; 3]; 1] = [[
    "",
    "llama.cpp/meetkai-functionary-medium-v3.1.jinja",
    "`'…'|safe + x` escapes HTML in `x` under Jinja2, so its tools arrive as `&#34;name&#34;`",
]];

/// Conversations of the committed golden in which [`DIFFERENT`] templates do differ.
const N_DIFFERENT: usize = 0;

fn may_differ(tokenizer: &str, template: &str) -> bool {
    DIFFERENT.iter().any(|[t, name, _]| *name == template && (t.is_empty() || *t == tokenizer))
}

/// How one template fared with one tokenizer, in chats.
#[derive(Default, Serialize)]
struct Score {
    /// Text and ids equal those of transformers.
    identical: usize,
    /// Transformers and hone both refuse the conversation.
    both_refuse: usize,
    /// The conversation spells an added token: what transformers makes of it is a forgery, and is not
    /// compared.
    not_benign: usize,
    /// Transformers fails on the template, and hone renders it.
    only_hone: usize,
    /// Hone does not take it: reason, how often.
    not_taken: BTreeMap<String, usize>,
    /// The text differs: names of the chats.
    text: Vec<String>,
    /// The ids differ: names of the chats, and where.
    ids: Vec<String>,
}

impl Score {
    fn count(&self) -> usize {
        let lists = self.text.len() + self.ids.len() + self.not_taken.values().sum::<usize>();
        self.identical + self.both_refuse + self.not_benign + self.only_hone + lists
    }

    fn add(&mut self, golden: &Cell, found: Ours, chat: &Chat, at: usize) {
        let name = format!("{at} {}", chat.name);
        match (golden, found) {
            (Cell::Ids { text, ids }, Ours::Ids(our_text, our_ids)) => {
                if !sha256(our_text.as_bytes()).as_str().starts_with(text.as_str()) {
                    self.text.push(name);
                } else if let Some(place) = difference(ids, &our_ids) {
                    self.ids.push(format!("{name}: {place}"));
                } else {
                    self.identical += 1;
                }
            }
            (Cell::Ids { .. }, Ours::Refused) => self.text.push(format!("{name}: refused")),
            (Cell::Ids { .. }, Ours::Failed(e)) => self.text.push(format!("{name}: {e}")),
            (Cell::Ids { .. }, Ours::NotTaken(reason, e)) => {
                let token = e.split('`').nth(1).unwrap_or_default();
                let reason = match reason {
                    "not encoded" => format!("the model itself makes the control token `{token}`"),
                    other => other.to_owned(),
                };
                *self.not_taken.entry(reason).or_default() += 1;
            }
            (Cell::Not(_), Ours::Refused | Ours::Failed(_) | Ours::NotTaken(..)) => {
                self.both_refuse += 1;
            }
            (Cell::Not(how), Ours::Ids(..)) if how == "fails" => self.only_hone += 1,
            (Cell::Not(_), Ours::Ids(..)) => self.text.push(format!("{name}: only hone renders")),
        }
    }
}

fn difference(golden: &[u32], found: &[u32]) -> Option<String> {
    if golden == found {
        return None;
    }
    let at = golden.iter().zip(found).take_while(|(a, b)| a == b).count();
    let around = |ids: &[u32]| format!("{:?}", &ids[at.min(ids.len())..(at + 4).min(ids.len())]);
    Some(format!("at token {at} {} instead of {}", around(found), around(golden)))
}

/// Scores of one tokenizer, by template.
fn tokenizer(root: &Path, index: &Index, entry: &Entry, chats: &[Chat]) -> Vec<(String, Score)> {
    let tokenizer = Tokenizer::read(&root.join("tokenizers").join(&entry.name), &entry.tokens);
    let golden = File::open(root.join(format!("golden/{}.jsonl", entry.name))).expect("a golden");
    let lines = BufReader::new(golden).lines();
    let scores = lines.zip(&entry.templates).map(|(line, file)| {
        let line: Line = serde_json::from_str(&line.expect("a line")).expect("a golden line");
        assert_eq!((&line.template, line.cells.len()), (&file.name, chats.len()));
        let source = fs::read_to_string(root.join(&file.file)).expect("a template");
        let template = tokenizer.template(&source, &index.now);
        let template = template.unwrap_or_else(|e| panic!("{} {}: {e}", entry.name, file.name));
        let mut score = Score::default();
        for (at, (chat, cell)) in chats.iter().zip(&line.cells).enumerate() {
            if entry.benign[at] {
                score.add(cell, ours(&template, &tokenizer.vocab, chat), chat, at);
            } else {
                score.not_benign += 1;
            }
        }
        assert_eq!(score.count(), chats.len(), "{} {}", entry.name, file.name);
        (line.template, score)
    });
    let scores: Vec<_> = scores.collect();
    assert_eq!(scores.len(), entry.templates.len(), "{}", entry.name);
    scores
}

#[test]
fn ids_are_those_of_transformers_for_every_tokenizer() {
    let Some(root) = folder("HONE_PARITY") else { return };
    let index: Index = json(&root.join("index.json"));
    let chats = chats(&root.join("chats.json"));
    assert_eq!(chats.len(), index.n_chats);
    assert!(chats.len() >= 200 && index.tokenizers.len() >= 10, "make.py was cut short");
    let next = Mutex::new(index.tokenizers.iter().enumerate());
    let done = Mutex::new(BTreeMap::new());
    let n_threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..n_threads {
            scope.spawn(|| {
                loop {
                    let task = next.lock().expect("no thread panics here").next();
                    let Some((at, entry)) = task else { break };
                    let scores = tokenizer(&root, &index, entry, &chats);
                    done.lock().expect("no thread panics here").insert(at, scores);
                }
            });
        }
    });
    let done = done.into_inner().expect("no thread panicked");
    let entries = index.tokenizers.iter().zip(done.into_values());
    let results: Vec<_> = entries
        .map(|(entry, scores)| {
            let scores: serde_json::Map<_, _> =
                scores.into_iter().map(|(name, score)| (name, json!(score))).collect();
            json!({"name": entry.name, "kind": entry.kind, "apart": entry.apart, "templates": scores})
        })
        .collect();
    let report = json!({"versions": index.versions, "different": DIFFERENT, "n_chats": chats.len(), "tokenizers": results});
    fs::write(root.join("results.json"), report.to_string()).expect("results.json is written");
    judge(&report);
}

/// Nothing differs, and there is enough that does not.
fn judge(report: &serde_json::Value) {
    let (mut n_identical, mut wrong) = (0, Vec::new());
    for tokenizer in report["tokenizers"].as_array().expect("a list") {
        let name = tokenizer["name"].as_str().expect("a name");
        for (template, score) in tokenizer["templates"].as_object().expect("a map") {
            n_identical += score["identical"].as_u64().expect("a count");
            for kind in if may_differ(name, template) { &["ids"][..] } else { &["text", "ids"] } {
                for what in score[kind].as_array().expect("a list") {
                    wrong.push(format!("{name} {template} {kind} {what}"));
                }
            }
        }
    }
    let shown = wrong.iter().take(40).map(String::as_str).collect::<Vec<_>>().join("\n");
    assert!(wrong.is_empty(), "{} differ:\n{shown}", wrong.len());
    assert!(n_identical > 50_000, "only {n_identical} conversations were compared");
}

/// The committed golden: hashes instead of ids.
#[derive(Deserialize)]
struct Small {
    tokenizer: String,
    tokens: BTreeMap<String, serde_json::Value>,
    n_chats: usize,
    templates: Vec<SmallLine>,
}

#[derive(Deserialize)]
struct SmallLine {
    name: String,
    sha256: String,
    cells: Vec<String>,
}

/// Source of a template of the corpus, or of hone's own, by its name in a golden.
fn source(corpus: &Path, tokenizer: &str, name: &str) -> String {
    if name == "own" {
        let config: serde_json::Value = json(&corpus.join(tokenizer).join("tokenizer_config.json"));
        return config["chat_template"].as_str().expect("a template").to_owned();
    }
    let (family, file) = name.split_once('/').expect("a family and a file");
    let dir = match family {
        "axolotl" => corpus.join("templates/axolotl/src/axolotl/utils/chat_templates/templates"),
        "trl" => corpus.join("templates/trl/trl/chat_templates"),
        "hone" => workspace().join("crates/hone-chat/templates"),
        other => corpus.join("templates").join(other),
    };
    fs::read_to_string(dir.join(file)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

#[test]
fn ids_are_those_of_transformers_for_the_corpus_tokenizer() {
    let Some(corpus) = folder("HONE_CORPUS") else { return };
    let here = workspace().join("tests/parity");
    let small: Small = json(&here.join("small.json"));
    let chats = chats(&here.join("chats.json"));
    assert_eq!(chats.len(), small.n_chats);
    let tokenizer = Tokenizer::read(&corpus.join(&small.tokenizer), &small.tokens);
    let (mut n_identical, mut n_refused, mut n_different, mut wrong) = (0, 0, 0, Vec::new());
    for line in &small.templates {
        let source = source(&corpus, &small.tokenizer, &line.name);
        let is_same = sha256(source.as_bytes()).as_str() == line.sha256;
        assert!(is_same, "{} changed: run make.py --small", line.name);
        let template = tokenizer.template(&source, "2026-01-02").expect("a template");
        assert_eq!(line.cells.len(), chats.len(), "{}", line.name);
        for (chat, golden) in chats.iter().zip(&line.cells) {
            match ours(&template, &tokenizer.vocab, chat) {
                Ours::Ids(_, ids) if *golden == hashed(&ids) => n_identical += 1,
                Ours::Refused | Ours::Failed(_) if !golden.contains(':') => n_refused += 1,
                Ours::NotTaken(reason, why) => {
                    wrong.push(format!("{} {}: {reason}: {why}", line.name, chat.name))
                }
                Ours::Ids(..) if may_differ("qwen3", &line.name) => n_different += 1,
                _ => wrong.push(format!("{} {}: not {golden}", line.name, chat.name)),
            }
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
    assert_eq!(n_identical + n_refused + n_different, small.n_chats * small.templates.len());
    assert_eq!(n_different, N_DIFFERENT, "a difference was mended or added");
    assert!(n_identical > 5_000, "only {n_identical} conversations were compared");
}

fn hashed(ids: &[u32]) -> String {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    format!("{}:{}", &sha256(&bytes).as_str()[..12], ids.len())
}
